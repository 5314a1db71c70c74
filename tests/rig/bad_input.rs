//! What must be refused, by the right code, with nothing left behind.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::MetadataExt as _;
use std::process::Command;

use roost_tests::in_rig;
use roost_tests::roost::{self, Sandbox, call, certificates, curl};
use serde_json::json;

const URL: &str = "https://127.0.0.1:50051/hostagent.v1.HostAgentService/ListSandboxes";

#[test]
fn creates_with_bad_fields_are_refused_by_name() {
    in_rig(|| {
        let uuid = "67e55044-10b1-426f-9247-bb680e5fe0c8";
        for (request, code, names) in [
            (json!({"templateId": uuid}), "not_found", uuid),
            (json!({"teamId": uuid, "templateId": uuid}), "not_found", uuid),
            (json!({"templateId": "../../etc"}), "invalid_argument", "template_id"),
            (json!({"teamId": "67e55044"}), "invalid_argument", "team_id"),
            (json!({"sandboxId": "../x"}), "invalid_argument", "sandbox_id"),
            (json!({"sandboxId": "UPPER"}), "invalid_argument", "sandbox_id"),
            (json!({"sandboxId": "x".repeat(64)}), "invalid_argument", "sandbox_id"),
            (json!({"vcpus": 1000}), "invalid_argument", "vcpus"),
            (json!({"vcpus": -1}), "invalid_argument", "vcpus"),
            (json!({"memoryMb": 1}), "invalid_argument", "memory_mb"),
            (json!({"memoryMb": i32::MAX}), "invalid_argument", "memory_mb"),
            (json!({"diskSizeMb": 1}), "invalid_argument", "disk"),
            (json!({"diskSizeMb": i32::MAX}), "invalid_argument", "disk_size_mb"),
            (json!({"timeoutSec": 5}), "invalid_argument", "timeout_sec"),
            (json!({"defaultUser": "a b"}), "invalid_argument", "default_user"),
            (json!({"vcpus": "many"}), "invalid_argument", ""),
            (json!("words"), "invalid_argument", ""),
        ] {
            let answer = call("CreateSandbox", &request);
            assert_eq!(answer.body["code"], code, "{request}: {answer:?}");
            let message = answer.body["message"].as_str().unwrap_or_default();
            assert!(message.contains(names), "{request}: {message:?} does not say {names:?}");
        }
    });
}

#[test]
fn an_id_in_use_is_refused_and_its_sandbox_not_touched() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256", "--id", "taken"]);
        let answer = call("CreateSandbox", &json!({"sandboxId": "taken"}));
        assert_eq!(
            (answer.status, &answer.body["code"]),
            (409, &json!("already_exists")),
            "{answer:?}"
        );
        assert_eq!(sandbox.sh("echo fine"), "fine");
    });
}

#[test]
fn calls_for_sandboxes_that_are_not_there_say_so() {
    in_rig(|| {
        for procedure in ["Exec", "PingSandbox", "DestroySandbox"] {
            let answer = call(procedure, &json!({"sandboxId": "nobody", "cmd": "true"}));
            assert_eq!(
                (answer.status, &answer.body["code"]),
                (404, &json!("not_found")),
                "{procedure}: {answer:?}"
            );
            let answer = call(procedure, &json!({"sandboxId": "../../etc", "cmd": "true"}));
            assert_eq!(answer.body["code"], "invalid_argument", "{procedure}: {answer:?}");
        }
        let error = roost::fails(&["exec", "nobody", "--", "true"]);
        assert!(error.contains("no sandbox nobody"), "{error}");
    });
}

#[test]
fn commands_that_cannot_be_are_refused() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--memory", "256"]);
        for (request, code) in [
            (json!({"sandboxId": sandbox.id, "cmd": ""}), "invalid_argument"),
            (
                json!({"sandboxId": sandbox.id, "cmd": "true", "timeoutSec": -1}),
                "invalid_argument",
            ),
            (
                json!({"sandboxId": sandbox.id, "cmd": "true", "timeoutSec": i32::MAX}),
                "invalid_argument",
            ),
            (json!({"sandboxId": sandbox.id, "cmd": "\u{0}"}), "invalid_argument"),
            (json!({"sandboxId": sandbox.id, "cmd": "/etc"}), "permission_denied"),
        ] {
            let answer = call("Exec", &request);
            assert_eq!(answer.body["code"], code, "{request}: {answer:?}");
        }
        assert_eq!(sandbox.sh("echo fine"), "fine");
    });
}

#[test]
fn a_default_user_that_the_guest_does_not_have_is_the_callers_mistake() {
    in_rig(|| {
        let sandbox = call(
            "CreateSandbox",
            &json!({"sandboxId": "nouser", "defaultUser": "nosuch", "memoryMb": 256}),
        );
        // Either the create says so, or the first command does; a command never runs as somebody else.
        if sandbox.status == 200 {
            let answer = call("Exec", &json!({"sandboxId": "nouser", "cmd": "id"}));
            assert_eq!(answer.body["code"], "invalid_argument", "{answer:?}");
            assert_eq!(call("DestroySandbox", &json!({"sandboxId": "nouser"})).status, 200);
        } else {
            assert_eq!(sandbox.body["code"], "invalid_argument", "{sandbox:?}");
        }
    });
}

#[test]
fn nobody_calls_without_a_certificate_of_our_ca_and_a_listed_name() {
    in_rig(|| {
        let ours = certificates(roost::PKI);
        let ours: Vec<&str> = ours.iter().map(String::as_str).collect();
        let body = ["--header", "Content-Type: application/json", "--data", "{}", URL];
        assert_eq!(curl(&[&ours[..], &body].concat()).status, 200, "the control");

        let none = curl(&[&ours[..2], &body].concat());
        assert_eq!(none.status, 0, "answered without a certificate: {none:?}");

        // Another CA with the same names.
        let dir = "/tmp/foreign-pki";
        roost::ok(&["pki", "init", "--dir", dir]);
        let foreign = [
            "--cacert",
            &format!("{}/ca.pem", roost::PKI),
            "--cert",
            &format!("{dir}/client.pem"),
            "--key",
            &format!("{dir}/client-key.pem"),
        ];
        let answer = curl(&[&foreign[..], &body].concat());
        assert_eq!(answer.status, 0, "answered a foreign certificate: {answer:?}");
        let said = roost::fails(&["--pki", dir, "ls"]);
        assert!(said.contains("certificate"), "{said}");

        // Our CA, but a server's certificate: no clientAuth.
        let server = [
            "--cacert",
            &format!("{}/ca.pem", roost::PKI),
            "--cert",
            &format!("{}/server.pem", roost::PKI),
            "--key",
            &format!("{}/server-key.pem", roost::PKI),
        ];
        assert_eq!(
            curl(&[&server[..], &body].concat()).status,
            0,
            "answered a server's certificate"
        );

        let old = curl(&[&ours[..], &["--tls-max", "1.2"], &body].concat());
        assert_eq!(old.status, 0, "answered TLS 1.2: {old:?}");
        std::fs::remove_dir_all(dir).expect("removed");
    });
}

#[test]
fn what_is_no_tls_on_the_tls_port_is_told_or_dropped() {
    in_rig(|| {
        let plain = curl(&["http://127.0.0.1:50051/"]);
        assert_eq!(plain.status, 400);
        assert!(plain.text.contains("HTTPS"), "{plain:?}");
        for junk in [&b"\x16\x03\x01\xff\xff"[..], b"\x00\x00\x00", b"SSH-2.0-x\r\n"] {
            let mut stream = TcpStream::connect("127.0.0.1:50051").expect("connected");
            stream.write_all(junk).expect("sent");
            // A reset is as good an end as any, and may be here already.
            drop(stream.shutdown(std::net::Shutdown::Write));
            let mut answer = Vec::new();
            drop(stream.read_to_end(&mut answer));
            assert!(answer.len() < 1024);
        }
        assert!(roost::ok(&["ls"]).contains("ID"));
    });
}

#[test]
fn wrong_bodies_and_methods_are_refused() {
    in_rig(|| {
        let certificates = certificates(roost::PKI);
        let certificates: Vec<&str> = certificates.iter().map(String::as_str).collect();
        let with = |more: &[&str]| curl(&[&certificates[..], more].concat());
        let json = ["--header", "Content-Type: application/json"];
        assert_eq!(
            with(&[&json[..], &["--data", "{", URL]].concat()).body["code"],
            "invalid_argument"
        );
        assert_eq!(
            with(&["--header", "Content-Type: text/plain", "--data", "{}", URL]).status,
            415
        );
        assert!((400..500).contains(&with(&["--request", "PUT", "--data", "{}", URL]).status));
        // Larger than a whole file in JSON.
        let huge = "/tmp/huge";
        std::fs::write(huge, vec![b' '; 50 << 20]).expect("written");
        let huge_data = format!("@{huge}");
        for version in ["--http1.1", "--http2"] {
            let answer = with(&[&json[..], &[version, "--data-binary", &huge_data, URL]].concat());
            assert_eq!(answer.body["code"], "resource_exhausted", "{version}: {answer:?}");
        }
        std::fs::remove_file(huge).expect("removed");
    });
}

#[test]
fn the_sockets_of_privd_and_shim_are_closed_to_other_users() {
    in_rig(|| {
        for socket in ["/run/roost/privd.sock", "/run/roost/vmmshim.sock"] {
            for user in ["nobody", "roost-other"] {
                let uid = if user == "nobody" { "65534" } else { "4242" };
                let output = Command::new("setpriv")
                    .args([
                        "--reuid",
                        uid,
                        "--regid",
                        uid,
                        "--clear-groups",
                        "socat",
                        "-u",
                        "/dev/zero",
                    ])
                    .arg(format!("UNIX-CONNECT:{socket},type=5"))
                    .output()
                    .expect("it runs");
                assert!(!output.status.success(), "uid {uid} wrote to {socket}");
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                assert!(said.contains("Permission denied"), "{socket}: {said}");
            }
        }
        // Who may put another socket in their place, or ask privd at all.
        let about = |path: &str| {
            let about = std::fs::metadata(path).expect(path);
            (about.uid(), about.gid(), about.mode() & 0o7777)
        };
        let agent = nix::unistd::Group::from_name("roost").expect("read").expect("a group");
        assert_eq!(about("/run/roost"), (0, 0, 0o755));
        assert_eq!(about("/run/roost/privd.sock"), (0, agent.gid.as_raw(), 0o660));
        drop(Sandbox::create(&["--memory", "256"]));
    });
}
