//! What `roost doctor` says of a host that is well, and of one in which something was broken.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Output};

use roost_tests::disk::run;
use roost_tests::doctor::Report;
use roost_tests::roost::{Sandbox, ok};
use roost_tests::{in_rig, show};
use serde_json::Value;

/// Checks that may warn here: what an emulated machine is like, and what nobody has hardened.
const EXCUSED: [&str; 11] = [
    "clock",
    "swap",
    "same-page merging",
    "hyper-threading",
    "nested virtualisation",
    "user namespaces",
    "BPF",
    "io_uring",
    "ptrace",
    "core dumps",
    "processor",
];
const IMAGES: &str = "/var/lib/roost/images";
const CERTIFICATE: &str = "/etc/roost/pki/server.pem";
const ADDITION: &str = "/etc/roost/agent.toml.d/99-test.toml";
const PAGE: &str = "http://127.0.0.1:50052/status.json";
const LEFT: &str = "/var/lib/roost/left-over";

fn reload() -> Output {
    let mut systemctl = Command::new("systemctl");
    systemctl
        .args(["reload", "roost-agent.service"])
        .output()
        .expect("systemctl runs")
}

/// A host in which several things are broken, until this is dropped.
struct Broken {
    certificate: String,
    looped: String,
}

impl Broken {
    fn new() -> Self {
        run("systemctl", &["stop", "roost-vmmshim.socket"]);
        fs::set_permissions(IMAGES, Permissions::from_mode(0o755)).expect("opened");
        let certificate = fs::read_to_string(CERTIFICATE).expect("a certificate");
        fs::write(CERTIFICATE, include_str!("expired.pem")).expect("written");
        fs::create_dir_all("/etc/roost/agent.toml.d").expect("made");
        fs::write(ADDITION, "max_vcpus = 0\n").expect("written");
        fs::write(LEFT, vec![0; 1 << 20]).expect("written");
        let looped = run("losetup", &["--find", "--show", LEFT]).trim().to_owned();
        Self { certificate, looped }
    }
}

impl Drop for Broken {
    fn drop(&mut self) {
        let socket = Command::new("systemctl")
            .args(["start", "roost-vmmshim.socket"])
            .status();
        let detached = Command::new("losetup").args(["--detach", &self.looped]).status();
        let files = fs::set_permissions(IMAGES, Permissions::from_mode(0o2700))
            .and_then(|()| fs::write(CERTIFICATE, &self.certificate))
            .and_then(|()| fs::remove_dir_all("/etc/roost/agent.toml.d"))
            .and_then(|()| fs::remove_file(LEFT));
        // A test that fails anyway says why itself.
        if !std::thread::panicking() {
            assert!(socket.expect("systemctl runs").success() && detached.expect("losetup runs").success());
            files.expect("as before");
        }
    }
}

#[test]
fn a_host_is_well_and_each_thing_that_is_broken_is_named_and_keeps_a_reload_from_doing_anything() {
    in_rig(|| {
        let sandbox = Sandbox::create(&[]);
        let report = Report::take();
        for (check, said) in [report.said("warning"), report.said("not_checked")].concat() {
            show(&format!("{check}: {said}"));
        }
        assert_eq!(report.said("problem"), []);
        let unexcused: Vec<_> = report
            .said("warning")
            .into_iter()
            .filter(|(check, _)| !EXCUSED.contains(check))
            .collect();
        assert_eq!(unexcused, []);
        assert_eq!(report.status, Some(i32::from(!report.said("warning").is_empty())));
        let well = report.said("ok");
        for check in [
            "VMM",
            "devices",
            "modules",
            "directories",
            "sockets",
            "agent",
            "certificates",
            "left over",
            "Landlock",
        ] {
            assert!(
                well.iter().any(|(name, _)| *name == check),
                "{check} was not checked: {report:?}"
            );
        }
        // Whoever may see less is told so.
        let output = Command::new("setpriv")
            .args(["--reuid=nobody", "--regid=nogroup", "--clear-groups", "roost", "doctor"])
            .output()
            .expect("setpriv runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            text.contains("not seen  left over") && text.contains("can only be seen as root"),
            "{text}"
        );
        assert_ne!(output.status.code(), Some(2), "{text}");

        let broken = Broken::new();
        let report = Report::take();
        assert_eq!(report.status, Some(2), "{report:?}");
        let (problems, warnings) = (report.said("problem"), report.said("warning"));
        for (check, words) in [
            ("sockets", "nobody listens on /run/roost/vmmshim.sock"),
            ("directories", "/var/lib/roost/images has mode 0755"),
            ("certificates", "server.pem expired"),
            ("configuration", "99-test.toml:1: max_vcpus = 0"),
        ] {
            let is_named = |(name, said): &(&str, &str)| *name == check && said.contains(words);
            assert!(problems.iter().any(is_named), "{check}: {problems:?}");
        }
        assert_eq!(problems.len(), 4, "{problems:?}");
        assert!(
            warnings
                .iter()
                .any(|(check, said)| *check == "left over" && said.contains(LEFT)),
            "{warnings:?}"
        );
        let refused = reload();
        assert!(!refused.status.success(), "{refused:?}");
        drop(broken);

        assert_eq!(Report::take().said("problem"), []);
        fs::create_dir_all("/etc/roost/agent.toml.d").expect("made");
        fs::write(ADDITION, "max_vcpus = 1\nstatus_page = true\n").expect("written");
        assert!(reload().status.success());
        // Refused in any case: at first for its memory.
        let asked = || roost_tests::roost::roost(&["create", "--vcpus", "2", "--memory", "1"]);
        let refused = roost_tests::eventually("the agent to take up its configuration", || {
            Some(asked()).filter(|output| String::from_utf8_lossy(&output.stderr).contains("vcpus"))
        });
        // The page has been switched on with it: what it shows is this host's.
        let status: Value = serde_json::from_str(&run("curl", &["--silent", "--fail", PAGE])).expect("JSON");
        let shown = status["sandboxes"].as_array().expect("a list");
        assert!(
            shown
                .iter()
                .any(|one| one["id"] == *sandbox.id && one["state"] == "running"),
            "{status}"
        );
        assert!(
            status["changes"]
                .as_array()
                .expect("a list")
                .iter()
                .any(|one| one["id"] == *sandbox.id),
            "{status}"
        );
        let elsewhere = Command::new("curl")
            .args(["--silent", "--fail", "--header", "Host: evil.example", PAGE])
            .status();
        assert!(
            !elsewhere.expect("curl runs").success(),
            "by another name it is refused"
        );
        fs::remove_dir_all("/etc/roost/agent.toml.d").expect("removed");
        assert!(reload().status.success() && !refused.status.success());
        // Nothing of it has touched what runs.
        assert_eq!(sandbox.sh("echo here"), "here");
        ok(&["ls"]);
    });
}
