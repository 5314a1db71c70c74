//! Files, users, units and what there is in the kernel, before a package and after it.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use roost_tests::census::Census;
use roost_tests::disk::run;

/// All of a host that a package might leave something in.
pub(super) struct Inventory {
    census: Census,
    things: BTreeSet<String>,
}

/// What others write while we look, apt's and dpkg's own books among it, and the copies that are made of the users' files when these change.
const NOT_LISTED: &[&str] = &[
    "/proc",
    "/sys",
    "/dev",
    "/run",
    "/rig",
    "/tmp",
    "/root",
    "/var/cache",
    "/var/log",
    "/var/backups",
    "/var/lib/apt",
    "/var/lib/dpkg",
    "/var/lib/systemd/random-seed",
    "/var/lib/systemd/timers",
    "/var/lib/roost",
    "/etc/.pwd.lock",
    "/etc/passwd-",
    "/etc/shadow-",
    "/etc/group-",
    "/etc/gshadow-",
    "/etc/subuid-",
    "/etc/subgid-",
];

impl Inventory {
    pub(super) fn take() -> Self {
        let mut find = vec!["/", "-xdev", "("];
        for (number, path) in NOT_LISTED.iter().enumerate() {
            if number > 0 {
                find.push("-o");
            }
            find.extend(["-path", path]);
        }
        find.extend([
            ")",
            "-prune",
            "-o",
            "(",
            "-type",
            "d",
            "-printf",
            "%p %y %m %U %G\\n",
            "-o",
        ]);
        find.extend(["-printf", "%p %y %m %U %G %s %l\\n", ")"]);
        let mut things: BTreeSet<String> = run("find", &find).lines().map(str::to_owned).collect();
        for (what, program, args) in [
            ("user", "getent", &["passwd"][..]),
            ("group", "getent", &["group"]),
            ("unit file", "systemctl", &["list-unit-files", "--no-legend", "--plain"]),
            (
                "unit",
                "systemctl",
                &["list-units", "--all", "--no-legend", "--plain", "roost*"],
            ),
            ("device", "stat", &["--format=%n %a %U %G", "/dev/userfaultfd"]),
            ("run", "find", &["/run", "-xdev", "-name", "*roost*"]),
            (
                "data",
                "find",
                &["/var/lib/roost", "-mindepth", "1", "-not", "-name", "lost+found"],
            ),
        ] {
            let lines = run(program, args);
            things.extend(lines.lines().map(|line| format!("{what}: {line}")));
        }
        // The rig's own: kernel and images of the disk that is mounted there go with a purge.
        things.retain(|thing| {
            !thing.starts_with("data: /var/lib/roost/kernels") && !thing.starts_with("data: /var/lib/roost/images")
        });
        Self {
            census: Census::take(),
            things,
        }
    }

    /// Waits until the host is as it was.
    pub(super) fn is_all_there_is(&self) {
        let start = Instant::now();
        loop {
            let now = Self::take();
            let more = now.things.difference(&self.things).map(|thing| format!("+ {thing}"));
            let less = self.things.difference(&now.things).map(|thing| format!("- {thing}"));
            let mut differences: Vec<String> = more.chain(less).collect();
            differences.extend(now.census.differences(&self.census));
            if differences.is_empty() {
                assert!(!Path::new("/var/lib/roost/kernels").exists(), "a purge left data");
                return;
            }
            // Only the kernel takes its time.
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "left on the host:\n{}",
                differences.join("\n")
            );
            std::thread::sleep(Duration::from_millis(500));
        }
    }
}
