//! What the units leave to each daemon, by systemd's own count and by what the kernel says of the processes.

use std::process::Command;

use roost_tests::roost::{Sandbox, pids, vmm_command};
use roost_tests::{in_rig, show};

/// Capabilities of privd, as `/proc/PID/status` has them: CHOWN, NET_ADMIN, SYS_ADMIN.
const PRIVD: u64 = 1 << 0 | 1 << 12 | 1 << 21;

#[test]
fn the_units_leave_to_each_daemon_no_more_than_they_say() {
    in_rig(|| {
        for (unit, most) in [
            ("roost-privd.service", 2.8),
            ("roost-agent.service", 1.4),
            ("roost-vmmshim@0-0-0.service", 0.6),
        ] {
            let output = Command::new("systemd-analyze")
                .args(["security", "--no-pager", unit])
                .env("LANG", "C.UTF-8")
                .output()
                .expect("systemd-analyze runs");
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let overall = text.lines().find(|line| line.contains("Overall exposure level"));
            let exposure = overall.and_then(|line| line.split(": ").nth(1)?.split(' ').next()?.parse::<f64>().ok());
            let exposure = exposure.unwrap_or_else(|| panic!("{unit}: {text} {output:?}"));
            show(&format!("{unit}: exposure {exposure} of at most {most}"));
            for line in text.lines().filter(|line| line.starts_with('\u{2717}')) {
                show(&format!("  {line}"));
            }
            assert!(exposure <= most, "{unit}: {exposure}");
        }
    });
}

/// A field of a thread's status.
fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let value = status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    value.unwrap_or_else(|| panic!("no {name}: {status}")).trim()
}

#[test]
fn every_thread_of_every_daemon_is_confined() {
    in_rig(|| {
        let _sandbox = Sandbox::create(&["--memory", "256"]);
        for (name, capabilities) in [
            ("roost-privd", PRIVD),
            ("roost-agent", 0),
            ("roost-vmmshim", 0),
            (vmm_command(), 0),
        ] {
            let pid = *pids(name).first().unwrap_or_else(|| panic!("{name} runs"));
            let threads = std::fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
            // A thread may end meanwhile.
            let statuses = threads
                .flatten()
                .filter_map(|thread| std::fs::read_to_string(thread.path().join("status")).ok());
            let statuses: Vec<String> = statuses.collect();
            assert!(!statuses.is_empty(), "{name} has no thread");
            for status in statuses {
                let bits = |field: &str| u64::from_str_radix(field, 16).expect("a bit mask");
                for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                    let found = bits(field(&status, set));
                    assert_eq!(found & !capabilities, 0, "{name} {set}: {found:x}");
                }
                assert_eq!(field(&status, "NoNewPrivs"), "1", "{name}");
                assert_eq!(field(&status, "Seccomp"), "2", "{name}");
            }
        }
    });
}
