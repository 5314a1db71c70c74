//! What the units leave to each daemon, by systemd's own count and by what the kernel says of the processes.

use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Output};

use roost_tests::roost::{Sandbox, ok, pids, readable_by_anybody, vmm_command, wait_for_agent};
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

/// A drop-in of the agent's unit and a key that is root's alone, for as long as this value lives.
struct Handed {
    owner: (u32, u32),
}

const DROP_IN: &str = "/etc/systemd/system/roost-agent.service.d";
const KEY: &str = "/etc/roost/pki/server-key.pem";

impl Handed {
    fn by_the_manager() -> Self {
        let page = include_str!("../../packaging/README.md");
        let lines = page.split("```ini\n").nth(1).and_then(|rest| rest.split("```").next());
        std::fs::create_dir_all(DROP_IN).expect("made");
        std::fs::write(format!("{DROP_IN}/credentials.conf"), lines.expect("a drop-in")).expect("written");
        let metadata = std::fs::metadata(KEY).expect("a key");
        let handed = Self {
            owner: (metadata.uid(), metadata.gid()),
        };
        std::os::unix::fs::chown(KEY, Some(0), Some(0)).expect("given to root");
        handed
    }
}

impl Drop for Handed {
    fn drop(&mut self) {
        let (uid, gid) = self.owner;
        let given_back = std::os::unix::fs::chown(KEY, Some(uid), Some(gid));
        let removed = std::fs::remove_dir_all(DROP_IN);
        restart_agent();
        if !std::thread::panicking() {
            given_back.and(removed).expect("as before");
        }
    }
}

fn restart_agent() {
    for arguments in [&["daemon-reload"][..], &["restart", "roost-agent.service"]] {
        // What does not start is seen by who waits for it.
        drop(Command::new("systemctl").args(arguments).status());
    }
    wait_for_agent();
}

#[test]
fn an_agent_serves_with_a_key_that_is_not_its_users() {
    in_rig(|| {
        let handed = Handed::by_the_manager();
        restart_agent();
        ok(&["ls"]);
        let key = std::fs::metadata(KEY).expect("a key");
        assert_eq!(
            (key.uid(), key.gid(), key.mode() & 0o007),
            (0, 0, 0),
            "somebody else may read it"
        );
        drop(handed);
        ok(&["ls"]);
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
            let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).expect("it runs");
            let core = limits.lines().find_map(|line| line.strip_prefix("Max core file size"));
            let core: Vec<&str> = core.expect("a limit").split_whitespace().collect();
            assert_eq!(core, ["0", "0", "bytes"], "{name}");
        }

        // What is not dumpable is root's in /proc: no peer of its uid, so no VMM, attaches to it.
        let owner = |name: &str| {
            let maps = format!("/proc/{}/maps", pids(name)[0]);
            std::fs::metadata(maps).expect("it runs").uid()
        };
        assert_eq!(owner("roost-vmmshim"), 0);
        assert_ne!(owner(vmm_command()), 0, "the control");
    });
}

fn run(program: &str, arguments: &[&str]) -> Output {
    Command::new(program).args(arguments).output().expect("it runs")
}

#[test]
fn what_a_daemon_has_no_use_for_is_not_there_for_it() {
    in_rig(|| {
        ok(&["ls"]);
        let agent = pids("roost-agent")[0].to_string();
        for (path, is_there) in [
            ("/dev/null", true),
            ("/dev/kvm", false),
            ("/dev/mapper", false),
            ("/dev/vda", false),
        ] {
            assert!(std::path::Path::new(path).exists(), "{path}: not even on the host");
            let found = run("nsenter", &["--mount", "--target", &agent, "test", "-e", path]);
            assert_eq!(found.status.success(), is_there, "{path} for the agent");
        }

        // privd sees the host's devices, and its cgroup opens few of them.
        let read = |cgroup: &str| {
            let script =
                format!("echo $$ > /sys/fs/cgroup/{cgroup}/cgroup.procs && exec dd if=/dev/vda of=/dev/null count=1");
            run("sh", &["-c", &script])
        };
        assert!(read("").status.success(), "the control");
        let refused = read("system.slice/roost-privd.service");
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            !refused.status.success() && said.contains("Operation not permitted"),
            "{said}"
        );
    });
}

#[test]
fn nothing_that_is_installed_makes_anybody_more_than_they_are() {
    in_rig(|| {
        let mut programs = 0;
        for entry in std::fs::read_dir("/usr/bin").expect("listed").flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !name.starts_with("roost") && !name.starts_with(vmm_command()) {
                continue;
            }
            programs += 1;
            let about = std::fs::metadata(entry.path()).expect("there");
            assert_eq!((about.uid(), about.mode() & 0o7022), (0, 0), "{name}");
        }
        assert!(programs >= 4, "{programs} programs");
        for directory in ["/etc/sudoers.d", "/etc/polkit-1/rules.d"] {
            for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
                let name = entry.file_name();
                assert!(!name.to_string_lossy().contains("roost"), "{directory}: {name:?}");
            }
        }
        // Nor is anything of a sandbox, or a key, there for anybody to read.
        let sandbox = Sandbox::create(&["--memory", "256"]);
        only_certificates(&readable_by_anybody());
        sandbox.pause();
        only_certificates(&readable_by_anybody());
    });
}

fn only_certificates(readable: &[String]) {
    for path in readable {
        let is_certificate = path.starts_with("/etc/roost/pki/") && path.ends_with(".pem") && !path.contains("key");
        assert!(is_certificate, "anybody can read {path}");
    }
}
