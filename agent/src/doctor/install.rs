//! Whether roost is installed, set up and serving.

use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use super::{Finding, Host};
use crate::config::{Config, Shim};
use crate::vmm::version;

/// What systemd makes at boot.
const DIRECTORIES: &str = include_str!("../../../packaging/tmpfiles.d/roost.conf");
/// The VMM, where the shims' environment names no other.
const VMM: &str = "/usr/bin/cloud-hypervisor";
/// The flag of a socket that listens, in `/proc/net/unix` (`__SO_ACCEPTCON`).
const LISTENS: &str = "00010000";
/// The shims' environment.
const SHIM_ENVIRONMENT: &str = "/etc/roost/vmmshim.env";

/// A directory as systemd makes it.
pub(super) struct Directory {
    pub(super) path: &'static str,
    pub(super) mode: u32,
    owner: &'static str,
    group: &'static str,
}

/// The directories that the package has systemd make.
pub(super) fn packaged_directories() -> impl Iterator<Item = Directory> {
    DIRECTORIES.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()? == "d").then_some(())?;
        let (path, mode) = (words.next()?, words.next()?);
        Some(Directory {
            path,
            mode: u32::from_str_radix(mode, 8).ok()?,
            owner: words.next()?,
            group: words.next()?,
        })
    })
}

pub(super) fn configuration(host: &Host) -> Vec<Finding> {
    let check = "configuration";
    match &host.loaded {
        Ok(loaded) if loaded.files.is_empty() => vec![Finding::ok(check, "no file: all is default")],
        Ok(loaded) => {
            let files: Vec<_> = loaded.files.iter().map(|file| file.display().to_string()).collect();
            vec![Finding::ok(check, files.join(", "))]
        }
        Err(problems) => problems
            .problems
            .iter()
            .map(|problem| {
                Finding::problem(
                    check,
                    problem.to_string(),
                    "correct it; roost-agent --check-config says whether it is right",
                )
            })
            .collect(),
    }
}

pub(super) fn vmm(host: &Host) -> Vec<Finding> {
    let check = "VMM";
    let environment = host.read(SHIM_ENVIRONMENT).unwrap_or_default();
    let program = named_vmm(&environment).unwrap_or_else(|| VMM.into());
    if let Err(unseen) = host.metadata(&program) {
        let finding = if unseen.is_missing() {
            Finding::problem(
                check,
                format!("there is no {}: no VM starts", program.display()),
                "install cloud-hypervisor 53 or newer there, or name another place in /etc/roost/vmmshim.env (ROOST_SHIM_ARGS=\"--vmm PATH\")",
            )
        } else {
            Finding::not_checked(check, unseen)
        };
        return vec![finding];
    }
    let shown = program.display();
    let finding = match (host.vmm_version)(&host.at(&program)).map(|said| version::of_words(&said)) {
        Ok(version) if version::may_run(&version) => Finding::ok(check, format!("{shown} {version}")),
        Ok(version) => Finding::problem(
            check,
            format!("{shown} says that it is version {version:?}: no VM starts with one before 53"),
            "install cloud-hypervisor 53 or newer",
        ),
        Err(error) => Finding::problem(
            check,
            format!("{shown} does not say its version: {error}"),
            "install the program for this machine's architecture, with mode 0755",
        ),
    };
    vec![finding]
}

/// The program that the shims' environment names.
fn named_vmm(environment: &str) -> Option<PathBuf> {
    let line = environment
        .lines()
        .rev()
        .find_map(|line| line.trim().strip_prefix("ROOST_SHIM_ARGS="))?;
    let mut words = line.trim_matches(['"', '\'']).split_whitespace();
    words.find(|word| *word == "--vmm")?;
    words.next().map(PathBuf::from)
}

pub(super) fn users(host: &Host) -> Vec<Finding> {
    let check = "users";
    let advice = "install sysusers.d/roost.conf and run systemd-sysusers";
    let mut findings = Vec::new();
    if host.uid("roost").is_none() {
        findings.push(Finding::problem(check, "there is no user roost in /etc/passwd", advice));
    }
    for group in ["roost", "roost-vm", "kvm"] {
        if host.gid(group).is_none() {
            findings.push(Finding::problem(
                check,
                format!("there is no group {group} in /etc/group"),
                advice,
            ));
        }
    }
    let groups = host.read("/etc/group").unwrap_or_default();
    let mut of_vms = groups.lines().filter(|line| line.starts_with("roost-vm:"));
    let members = of_vms
        .next()
        .and_then(|line| line.rsplit(':').next())
        .unwrap_or_default();
    if findings.is_empty() && !members.split(',').any(|member| member == "roost") {
        let said = "user roost is not in group roost-vm, and cannot enter the directories of VMs";
        findings.push(Finding::problem(check, said, advice));
    }
    if findings.is_empty() {
        findings.push(Finding::ok(check, "roost, roost-vm, kvm"));
    }
    findings
}

/// Where a packaged directory is on this host.
fn placed(path: &str, config: &Config) -> PathBuf {
    let usual = Config::default();
    let places = [
        (&usual.vm_run_dir, &config.vm_run_dir),
        (&usual.dir, &config.dir),
        (&usual.pki_dir, &config.pki_dir),
    ];
    let moved = places
        .iter()
        .find_map(|(from, to)| Some(to.join(Path::new(path).strip_prefix(from).ok()?)));
    // Joined to nothing, a path ends with a slash.
    moved.map_or_else(|| path.into(), |path| path.components().collect())
}

pub(super) fn directories(host: &Host) -> Vec<Finding> {
    packaged_directories()
        .map(|directory| one_directory(host, &directory))
        .collect()
}

fn one_directory(host: &Host, wanted: &Directory) -> Finding {
    let check = "directories";
    let path = placed(wanted.path, &host.config);
    let shown = path.display();
    let Directory { mode, owner, group, .. } = wanted;
    let metadata = match host.metadata(&path) {
        Ok(metadata) => metadata,
        Err(unseen) if unseen.is_missing() => {
            return Finding::problem(check, format!("there is no {shown}"), "systemd-tmpfiles --create");
        }
        Err(unseen) => return Finding::not_checked(check, unseen),
    };
    let is_owners = host.uid(owner) == Some(metadata.uid()) && host.gid(group) == Some(metadata.gid());
    let has = metadata.mode() & 0o7777;
    if !metadata.is_dir() {
        Finding::problem(
            check,
            format!("{shown} is no directory"),
            "move it away and run systemd-tmpfiles --create",
        )
    } else if !is_owners {
        Finding::problem(
            check,
            format!(
                "{shown} belongs to {}:{} and not to {owner}:{group}",
                metadata.uid(),
                metadata.gid()
            ),
            format!("chown {owner}:{group} {shown}"),
        )
    } else if has != *mode {
        let open = if has & !mode & 0o007 != 0 {
            ", open to other users"
        } else {
            ""
        };
        Finding::problem(
            check,
            format!("{shown} has mode {has:04o} in place of {mode:04o}{open}"),
            format!("chmod {mode:04o} {shown}"),
        )
    } else {
        Finding::ok(check, format!("{shown} {mode:04o} {owner}:{group}"))
    }
}

pub(super) fn sockets(host: &Host) -> Vec<Finding> {
    let mut wanted = vec![(
        &host.config.privd_socket,
        "roost-privd.socket",
        0o660,
        ["root", "roost"],
    )];
    if host.config.shim == Shim::Systemd {
        wanted.push((
            &host.config.shim_socket,
            "roost-vmmshim.socket",
            0o600,
            ["roost", "roost"],
        ));
    }
    // Whoever listens, by path. What came in there and is connected has the same one.
    let bound = host.read("/proc/net/unix");
    let one = |(path, unit, mode, [owner, group]): (&PathBuf, &str, u32, [&str; 2])| {
        let check = "sockets";
        let (shown, advice) = (path.display(), format!("systemctl enable --now {unit}"));
        let metadata = match host.metadata(path) {
            Ok(metadata) => metadata,
            Err(unseen) if unseen.is_missing() => {
                return Finding::problem(check, format!("there is no {shown}"), advice);
            }
            Err(unseen) => return Finding::not_checked(check, unseen),
        };
        let is_bound = |text: &String| {
            text.lines().any(|line| {
                let fields: Vec<_> = line.split_whitespace().collect();
                fields.get(3) == Some(&LISTENS) && fields.get(7).copied() == path.to_str()
            })
        };
        let is_owners = host.uid(owner) == Some(metadata.uid()) && host.gid(group) == Some(metadata.gid());
        let has = metadata.mode() & 0o7777;
        if !metadata.file_type().is_socket() {
            Finding::problem(
                check,
                format!("{shown} is no socket"),
                format!("remove it, and systemctl restart {unit}"),
            )
        } else if bound.as_ref().is_ok_and(|text| !is_bound(text)) {
            Finding::problem(
                check,
                format!("nobody listens on {shown}"),
                format!("systemctl restart {unit}"),
            )
        } else if !is_owners || has != mode {
            Finding::problem(
                check,
                format!(
                    "{shown} is {}:{} {has:04o} in place of {owner}:{group} {mode:04o}",
                    metadata.uid(),
                    metadata.gid()
                ),
                format!("systemctl restart {unit}"),
            )
        } else {
            Finding::ok(check, shown.to_string())
        }
    };
    wanted.into_iter().map(one).collect()
}

pub(super) fn agent(host: &Host) -> Vec<Finding> {
    let check = "agent";
    let finding = match &host.health {
        Ok(200) => Finding::ok(check, "serves"),
        Ok(503) => Finding::warning(
            check,
            "is taking over what runs on this host, and does not serve yet",
            "wait; journalctl -u roost-agent says what it waits for",
        ),
        Ok(status) => Finding::problem(
            check,
            format!("answers with status {status}"),
            "journalctl -u roost-agent",
        ),
        Err(why) => Finding::problem(
            check,
            format!("does not answer ({why})"),
            "systemctl status roost-agent.service; journalctl -u roost-agent",
        ),
    };
    vec![finding]
}

pub(super) fn space(host: &Host) -> Vec<Finding> {
    let (check, dir) = ("free space", &host.config.dir);
    let finding = match rustix::fs::statvfs(host.at(dir)) {
        Ok(space) => judge_space(
            dir,
            space.f_bavail.saturating_mul(space.f_frsize),
            space.f_blocks.saturating_mul(space.f_frsize),
            u64::from(host.config.disk_reserve_mb) << 20,
            // File systems without a fixed number of files say 0.
            (space.f_files > 0).then_some((space.f_favail, space.f_files)),
        ),
        Err(errno) => Finding::not_checked(check, format!("{}: {errno}", dir.display())),
    };
    vec![finding]
}

fn judge_space(dir: &Path, free: u64, total: u64, reserve: u64, files: Option<(u64, u64)>) -> Finding {
    let (check, shown) = ("free space", dir.display());
    let mebibytes = |bytes: u64| bytes >> 20;
    let advice = "pause or destroy sandboxes, delete templates (roost rmi), or make the file system larger";
    let said = format!("{} MiB of {} in {shown}", mebibytes(free), mebibytes(total));
    if free < reserve {
        Finding::problem(
            check,
            format!("{said}, less than disk_reserve_mb: sandboxes are refused"),
            advice,
        )
    } else if files.is_some_and(|(left, all)| left < all / 100) {
        Finding::problem(check, format!("{shown} has room for hardly any more files"), advice)
    } else if free < (total / 20).max(2 * reserve) {
        Finding::warning(
            check,
            format!("{said}: little, besides the memory that pauses write"),
            advice,
        )
    } else {
        Finding::ok(check, said)
    }
}

pub(super) fn clock(host: &Host) -> Vec<Finding> {
    let check = "clock";
    // Each writes one once it has begun, and systemd's once it has heard of the time.
    let kept_by = [
        ("/run/systemd/timesync/synchronized", "systemd-timesyncd"),
        ("/run/chrony/chronyd.pid", "chrony"),
        ("/run/ntpd.pid", "ntpd"),
        ("/run/openntpd/ntpd.sock", "openntpd"),
    ];
    let keeper = kept_by.iter().find(|(path, _)| host.metadata(path).is_ok());
    let finding = match keeper {
        Some((_, name)) => Finding::ok(check, format!("kept by {name}")),
        None => Finding::warning(
            check,
            "nothing that is known here keeps it: certificates and tokens are judged by it, and guests are set by it",
            "install systemd-timesyncd or chrony, and timedatectl set-ntp true",
        ),
    };
    vec![finding]
}

#[cfg(test)]
mod tests {
    use super::super::host::fake::Fake;
    use super::super::{State, Text};
    use super::*;

    type Check = fn(&Host) -> Vec<Finding>;
    type Change = fn(&mut Fake);

    #[test]
    fn each_thing_that_is_not_set_up_is_named_with_what_to_do() {
        let cases: [(Check, Change, State, &str); 20] = [
            (
                configuration,
                |fake| fake.write("etc/roost/agent.toml", "\nlistne = 1"),
                State::Problem,
                "agent.toml:2: listne",
            ),
            (
                configuration,
                |fake| fake.write("etc/roost/agent.toml.d/a.toml", "max_vcpus = 0"),
                State::Problem,
                "a.toml:1: max_vcpus",
            ),
            (
                vmm,
                |fake| fake.remove("usr/bin/cloud-hypervisor"),
                State::Problem,
                "no /usr/bin/cloud-hypervisor",
            ),
            (
                vmm,
                |fake| fake.write("etc/roost/vmmshim.env", "ROOST_SHIM_ARGS=\"--vmm /opt/ch\"\n"),
                State::Problem,
                "no /opt/ch",
            ),
            (
                vmm,
                |fake| fake.vmm_version = |_| Ok(b"cloud-hypervisor v52.0\n".to_vec()),
                State::Problem,
                "\"v52.0\"",
            ),
            (
                vmm,
                |fake| fake.vmm_version = |_| Err(std::io::ErrorKind::PermissionDenied.into()),
                State::Problem,
                "0755",
            ),
            (
                users,
                |fake| fake.write("etc/passwd", "root:x:0:0::/:\n"),
                State::Problem,
                "no user roost",
            ),
            (
                users,
                |fake| fake.write("etc/group", "roost:x:1:\nkvm:x:2:\n"),
                State::Problem,
                "no group roost-vm",
            ),
            (
                users,
                |fake| fake.write("etc/group", "roost:x:1:\nkvm:x:2:\nroost-vm:x:3:\n"),
                State::Problem,
                "not in group",
            ),
            (
                directories,
                |fake| fake.remove("var/lib/roost/outbox"),
                State::Problem,
                "no /var/lib/roost/outbox",
            ),
            (
                directories,
                |fake| fake.mode("var/lib/roost/images", 0o705),
                State::Problem,
                "0705 in place of 2700, open to other users",
            ),
            (
                directories,
                |fake| fake.mode("var/lib/roost/sandboxes", 0o700),
                State::Problem,
                "chmod 2710",
            ),
            (
                sockets,
                |fake| fake.remove("run/roost/privd.sock"),
                State::Problem,
                "enable --now roost-privd.socket",
            ),
            (
                sockets,
                |fake| fake.mode("run/roost/vmmshim.sock", 0o666),
                State::Problem,
                "0666 in place of roost:roost 0600",
            ),
            (
                sockets,
                |fake| {
                    fake.write(
                        "proc/net/unix",
                        "Num\n0: 3 0 00000000 0005 03 9 /run/roost/privd.sock\n",
                    )
                },
                State::Problem,
                "nobody listens on /run/roost/privd.sock",
            ),
            (
                sockets,
                |fake| {
                    fake.remove("run/roost/privd.sock");
                    fake.write("run/roost/privd.sock", "");
                },
                State::Problem,
                "privd.sock is no socket",
            ),
            (
                agent,
                |fake| fake.health = Err("refused".into()),
                State::Problem,
                "(refused)",
            ),
            (
                agent,
                |fake| fake.health = Ok(503),
                State::Warning,
                "does not serve yet",
            ),
            (agent, |fake| fake.health = Ok(404), State::Problem, "status 404"),
            (
                clock,
                |fake| fake.remove("run/systemd/timesync/synchronized"),
                State::Warning,
                "timedatectl",
            ),
        ];
        for (check, change, state, said) in cases {
            let mut fake = Fake::good();
            assert!(
                check(&fake.host()).iter().all(|finding| finding.state == State::Ok),
                "{said}"
            );
            change(&mut fake);
            let findings = check(&fake.host());
            let bad = findings.iter().filter(|finding| finding.state == state);
            let bad: Vec<_> = bad.cloned().collect();
            assert!(
                Text(&bad).to_string().contains(said),
                "{said:?} is not in\n{}",
                Text(&findings)
            );
        }
    }

    #[test]
    fn directories_that_are_elsewhere_are_looked_for_there() {
        let config = Config {
            dir: "/data/roost".into(),
            vm_run_dir: "/run/vms".into(),
            ..Config::default()
        };
        for (path, place) in [
            ("/var/lib/roost", "/data/roost"),
            ("/var/lib/roost/outbox", "/data/roost/outbox"),
            ("/run/roost/vm", "/run/vms"),
            ("/run/roost", "/run/roost"),
        ] {
            assert_eq!(placed(path, &config).to_str(), Some(place));
        }
        assert!(packaged_directories().count() > 10);
    }

    #[test]
    fn room_is_judged_by_the_reserve_and_the_whole() {
        let state = |free: u64, total: u64, files| {
            judge_space(Path::new("/d"), free << 20, total << 20, 256 << 20, files).state
        };
        assert_eq!(state(255, 100_000, None), State::Problem);
        assert_eq!(state(4_000, 100_000, None), State::Warning);
        assert_eq!(state(500, 1_000, None), State::Warning);
        assert_eq!(state(6_000, 100_000, None), State::Ok);
        assert_eq!(state(6_000, 100_000, Some((9, 1_000))), State::Problem);
        assert_eq!(state(6_000, 100_000, Some((10, 1_000))), State::Ok);
    }
}
