//! The main job: create, exec, list, ping, destroy, and what each promises.

use roost_tests::census::Census;
use roost_tests::roost::{self, Sandbox, call, find};
use roost_tests::{eventually, in_rig};
use serde_json::json;

#[test]
fn a_sandbox_lives_from_create_to_destroy() {
    in_rig(|| {
        let sandbox = Sandbox::create(&[]);
        assert!(
            sandbox.id.starts_with("cl-") && sandbox.id.len() == 28,
            "{}",
            sandbox.id
        );
        assert!(sandbox.sh("uname -a").starts_with("Linux"));
        assert_eq!(sandbox.sh("cat /proc/1/comm"), "envd");

        let listed = find(&sandbox.id).expect("listed");
        assert_eq!(listed["status"], "running");
        assert_eq!((&listed["vcpus"], &listed["memoryMb"]), (&json!(1), &json!(512)));
        for version in ["kernel_version", "vmm_version", "envd_version", "agent_version"] {
            assert!(
                listed["metadata"][version]
                    .as_str()
                    .is_some_and(|text| !text.is_empty()),
                "no {version}: {listed}"
            );
        }
        let table = roost::ok(&["ls"]);
        assert!(table.contains(&sandbox.id) && table.contains("running"), "{table}");

        let there = Census::take();
        let unit = if roost::under_systemd() { "unit" } else { "process" };
        for kind in ["loop", "veth", unit] {
            assert!(
                there.count(kind) > 0,
                "a running sandbox without a {kind}: this census sees nothing"
            );
        }
        assert_eq!(
            there.count("dm device"),
            2,
            "the sandbox's disk and its origin: {there:?}"
        );
        assert_eq!(there.count("network namespace"), 1, "{there:?}");

        roost::ok(&["rm", &sandbox.id]);
        assert!(find(&sandbox.id).is_none());
        assert!(roost::fails(&["exec", &sandbox.id, "--", "true"]).contains("no sandbox"));
        sandbox.forget();
    });
}

#[test]
fn the_guest_is_what_was_asked_for() {
    in_rig(|| {
        let sandbox = Sandbox::create(&["--vcpus", "2", "--memory", "256", "--env", "COLOUR=teal"]);
        assert_eq!(sandbox.sh("nproc"), "2");
        let kib: u64 = sandbox
            .sh("awk '/MemTotal/ {print $2}' /proc/meminfo")
            .parse()
            .expect("a number");
        assert!((150_000..262_144).contains(&kib), "{kib} KiB");
        assert_eq!(sandbox.sh("echo $COLOUR"), "teal");
        assert_eq!(sandbox.sh("echo $E2B_SANDBOX_ID"), sandbox.id);
        let skew = sandbox.sh("date +%s").parse::<i64>().expect("a number") - roost_now();
        assert!(skew.abs() <= 2, "the guest's clock is {skew} s off");
        assert_eq!(sandbox.sh("cat /proc/sys/kernel/random/entropy_avail"), "256");
    });
}

fn roost_now() -> i64 {
    let age = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("after 1970");
    i64::try_from(age.as_secs()).expect("a time")
}

#[test]
fn exec_passes_output_and_exit_codes_on() {
    in_rig(|| {
        let sandbox = Sandbox::create(&[]);
        let output = sandbox.exec(&["/bin/bash", "-c", "echo out; echo err >&2; exit 7"]);
        assert_eq!(output.status.code(), Some(7));
        assert_eq!(
            (output.stdout.as_slice(), output.stderr.as_slice()),
            (&b"out\n"[..], &b"err\n"[..])
        );
        assert_eq!(
            sandbox.exec(&["/bin/bash", "-c", "kill -TERM $$"]).status.code(),
            Some(128 + 15)
        );
        assert_eq!(
            sandbox.exec(&["/bin/bash", "-c", "kill -KILL $$"]).status.code(),
            Some(128 + 9)
        );
        // Bytes that are no text, in both directions of the pipe.
        let output = sandbox.exec(&["/usr/bin/printf", "\\000\\377\\n"]);
        assert_eq!(output.stdout, [0, 255, b'\n']);

        let missing = sandbox.exec(&["/no/such/program"]);
        assert_eq!(
            missing.status.code(),
            Some(125),
            "{}",
            String::from_utf8_lossy(&missing.stderr)
        );
        assert!(String::from_utf8_lossy(&missing.stderr).contains("/no/such/program"));
    });
}

#[test]
fn exec_has_a_deadline_and_a_bound_and_ends_what_breaks_them() {
    in_rig(|| {
        let sandbox = Sandbox::create(&[]);
        let error = roost::fails(&["exec", "--timeout", "2", &sandbox.id, "--", "sleep", "1234"]);
        assert!(error.contains("did not end within 2 s"), "{error}");
        eventually("the sleep to be gone", || {
            sandbox
                .sh("pgrep -x sleep || echo none")
                .ends_with("none")
                .then_some(())
        });

        let megabytes = sandbox.exec(&["/bin/bash", "-c", "head -c 8000000 /dev/zero"]);
        assert_eq!(megabytes.stdout.len(), 8_000_000);
        // As a stream it has no bound; whole, it has.
        let whole = [
            "exec",
            "--json",
            "--timeout",
            "100",
            &sandbox.id,
            "--",
            "cat",
            "/dev/zero",
        ];
        let error = roost::fails(&whole);
        assert!(error.contains("more than 16777216 bytes"), "{error}");
        eventually("the cat to be gone", || {
            sandbox.sh("pgrep -x cat || echo none").ends_with("none").then_some(())
        });
    });
}

#[test]
fn a_disk_larger_than_its_image_is_all_usable_and_the_image_stays_as_it_was() {
    in_rig(|| {
        let image = "/var/lib/roost/images/minimal/rootfs.ext4";
        let before = sum(image);
        {
            let sandbox = Sandbox::create(&["--memory", "256", "--disk", "2048"]);
            let mib: u64 = sandbox
                .sh("df --output=size -BM / | tail -1 | tr -dc 0-9")
                .parse()
                .expect("a number");
            assert!(mib > 1800, "the guest sees {mib} MiB");
            // More than the image holds, written and read back.
            sandbox.sh(
                "head -c 4M /dev/urandom > /piece && for n in $(seq 65); do cat /piece; done > /big && sync && echo 3 > /proc/sys/vm/drop_caches \
                 && for n in $(seq 65); do cmp -n 4M -i $(((n - 1) * 4194304)):0 /big /piece || exit 1; done",
            );
        }
        {
            let fresh = Sandbox::create(&["--memory", "256"]);
            assert_eq!(fresh.sh("test -e /big && echo there || echo gone"), "gone");
        }
        assert_eq!(sum(image), before, "the image was written to");
    });
}

fn sum(file: &str) -> String {
    let output = std::process::Command::new("cksum").arg(file).output().expect("it runs");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_api_speaks_json_to_anyone_with_a_certificate() {
    in_rig(|| {
        let created = call("CreateSandbox", &json!({"sandboxId": "by-hand", "memoryMb": 256}));
        assert_eq!(created.status, 200, "{created:?}");
        assert_eq!(created.body["status"], "running");
        assert!(
            created.body["hostIp"]
                .as_str()
                .is_some_and(|ip| ip.starts_with("10.11."))
        );
        let ping = call("PingSandbox", &json!({"sandbox_id": "by-hand"}));
        assert_eq!((ping.status, ping.text.as_str()), (200, "{}"));
        let exec = call(
            "Exec",
            &json!({"sandboxId": "by-hand", "cmd": "echo", "args": ["hello"]}),
        );
        assert_eq!(exec.body["stdout"], "aGVsbG8K", "{exec:?}");
        assert_eq!(call("DestroySandbox", &json!({"sandboxId": "by-hand"})).status, 200);
        assert_eq!(
            call("PingSandbox", &json!({"sandboxId": "by-hand"})).body["code"],
            "not_found"
        );
    });
}

#[test]
fn procedures_that_are_none_are_unimplemented() {
    in_rig(|| {
        for procedure in ["RebootSandbox", "listSandboxes"] {
            let answer = call(procedure, &json!({}));
            assert_eq!(
                (answer.status, &answer.body["code"]),
                (404, &json!("unimplemented")),
                "{procedure}: {answer:?}"
            );
        }
    });
}
