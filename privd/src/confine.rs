//! What this process gives up before it listens to anyone: every file but devices, every system call but those listed here.
//!
//! The unit takes away more, but cannot say which ioctls, which netlink, or that no program is executed; and this binds a privd that
//! somebody starts by hand, too. `AUDIT.md` has the same lists with their reasons, and a test compares.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Length, SeccompCmpOp as Is, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

/// The files that it opens: devices, whose nodes come and go.
const DEVICES: &str = "/dev";
/// The one that it reads at start.
pub(crate) const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

/// A system call: its name, and its number here.
type Call = (&'static str, i64);

macro_rules! calls {
    ($($call:ident)*) => { &[$((stringify!($call), libc::$call)),*] };
}

/// Calls that are allowed whatever their arguments.
const PLAIN: &[Call] = calls![
    SYS_accept4 SYS_bind SYS_brk SYS_clock_gettime SYS_clock_nanosleep SYS_close SYS_epoll_create1 SYS_epoll_ctl
    SYS_epoll_pwait SYS_eventfd2 SYS_exit SYS_exit_group SYS_fchmod SYS_fchown SYS_fcntl SYS_fstat SYS_fstatfs SYS_futex
    SYS_getpid SYS_getrandom SYS_getsockopt SYS_gettid SYS_lseek SYS_madvise SYS_mremap SYS_munmap SYS_newfstatat
    SYS_openat SYS_ppoll SYS_pread64 SYS_read SYS_recvfrom SYS_recvmsg SYS_restart_syscall SYS_rseq SYS_rt_sigaction
    SYS_rt_sigprocmask SYS_rt_sigreturn SYS_sched_getaffinity SYS_sched_yield SYS_sendmsg SYS_sendto
    SYS_set_robust_list SYS_setsockopt SYS_shutdown SYS_sigaltstack SYS_statx SYS_tgkill SYS_uname SYS_write SYS_writev
];

/// Calls that only this architecture has, for what others do by calls of [`PLAIN`].
#[cfg(target_arch = "x86_64")]
const OLDER: &[Call] = calls![SYS_epoll_wait SYS_poll];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[Call] = &[];

/// Answered with ENOSYS. A filter cannot see the flags of `clone3`, and the C library then takes `clone`. Without `semctl` the
/// devicemapper library does without semaphores, and so waits for no udev.
const UNKNOWN: &[Call] = calls![SYS_clone3 SYS_semctl];

/// Requests of [`libc::SYS_ioctl`]. A filter sees the request and not what it is about: which device, or which table, is in memory.
const IOCTLS: &[(&str, u32)] = &[
    ("DM_VERSION", dm(0)),
    ("DM_LIST_DEVICES", dm(2)),
    ("DM_DEV_CREATE", dm(3)),
    ("DM_DEV_REMOVE", dm(4)),
    ("DM_DEV_SUSPEND", dm(6)),
    ("DM_DEV_STATUS", dm(7)),
    ("DM_TABLE_LOAD", dm(9)),
    ("DM_TABLE_DEPS", dm(11)),
    ("DM_TABLE_STATUS", dm(12)),
    ("DM_DEV_ARM_POLL", dm(16)),
    ("LOOP_CONFIGURE", 0x4c0a),
    ("LOOP_CTL_GET_FREE", 0x4c82),
    ("TUNSETIFF", 0x4004_54ca),
    ("TUNGETIFF", 0x8004_54d2),
    ("TUNGETDEVNETNS", 0x54e3),
    ("FIONBIO", 0x5421),
];

/// `_IOWR(0xfd, request, struct dm_ioctl)`.
const fn dm(request: u32) -> u32 {
    0xc138_fd00 | request
}

/// Threads: these flags and no namespace. Never a process.
const THREAD: u64 = (libc::CLONE_VM | libc::CLONE_THREAD) as u64;
const NAMESPACES: u64 = 0x7e02_0000;

/// Gives up what this process has no use for, in the calling thread and all that it starts: it must be the only one.
///
/// # Errors
/// When the kernel has no seccomp, or refuses.
pub(crate) fn confine() -> io::Result<()> {
    if !restrict_files()? {
        tracing::warn!("this kernel has no Landlock: privd keeps access to all files that its unit leaves it");
    }
    for program in filters()? {
        apply_filter(&program).map_err(io::Error::other)?;
    }
    Ok(())
}

/// Enters a Landlock domain with nothing in it but devices. Whether the kernel has such domains.
fn restrict_files() -> io::Result<bool> {
    let opened = |path: &str| PathFd::new(Path::new(path)).map_err(io::Error::other);
    let devices = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let build = || {
        Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(ABI::V9))?
            .handle_access(AccessNet::from_all(ABI::V9))?
            .scope(Scope::from_all(ABI::V9))?
            .create()
    };
    let rules = [
        PathBeneath::new(opened(DEVICES)?, devices),
        PathBeneath::new(opened(FORWARDING)?, AccessFs::ReadFile),
    ];
    let restricted = build()
        .and_then(|ruleset| rules.into_iter().try_fold(ruleset, RulesetCreatedAttr::add_rule))
        .and_then(landlock::RulesetCreated::restrict_self)
        .map_err(io::Error::other)?;
    Ok(restricted.ruleset != RulesetStatus::NotEnforced)
}

/// The filters, in the order in which they are installed.
fn filters() -> io::Result<[BpfProgram; 2]> {
    let unknown = compile(
        UNKNOWN.iter().map(|(_, number)| (*number, Vec::new())).collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS.unsigned_abs()),
    )?;
    let allowed = compile(allowed()?, SeccompAction::KillProcess, SeccompAction::Allow)?;
    Ok([unknown, allowed])
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> io::Result<BpfProgram> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(io::Error::other)?;
    SeccompFilter::new(rules, otherwise, matched, arch)
        .and_then(BpfProgram::try_from)
        .map_err(io::Error::other)
}

/// Calls with all of their rules: one of them must hold, and no rule at all is none to break.
fn allowed() -> io::Result<BTreeMap<i64, Vec<SeccompRule>>> {
    let plain = PLAIN.iter().chain(OLDER).chain(UNKNOWN);
    let mut calls: BTreeMap<i64, Vec<SeccompRule>> = plain.map(|(_, number)| (*number, Vec::new())).collect();
    for (_, number, conditions) in bounded() {
        let conditions = conditions
            .into_iter()
            .map(|(argument, is, value)| SeccompCondition::new(argument, Length::Dword, is, value));
        let rule = conditions
            .collect::<Result<Vec<_>, _>>()
            .and_then(SeccompRule::new)
            .map_err(io::Error::other)?;
        calls.entry(number).or_default().push(rule);
    }
    Ok(calls)
}

/// Conditions of a rule: an argument, what it is to be, and the value.
type Conditions = Vec<(u8, Is, u64)>;

/// Calls that are allowed for some arguments: a rule each.
fn bounded() -> Vec<(&'static str, i64, Conditions)> {
    let equal = |argument, value: i32| (argument, Is::Eq, u64::from(value.unsigned_abs()));
    let without = |argument, bits: i32| (argument, Is::MaskedEq(u64::from(bits.unsigned_abs())), 0);
    let new_network = |argument| equal(argument, libc::CLONE_NEWNET);
    let mut rules = vec![
        // W^X.
        ("SYS_mmap", libc::SYS_mmap, vec![without(2, libc::PROT_EXEC)]),
        ("SYS_mprotect", libc::SYS_mprotect, vec![without(2, libc::PROT_EXEC)]),
        (
            "SYS_clone",
            libc::SYS_clone,
            vec![(0, Is::MaskedEq(THREAD | NAMESPACES), THREAD)],
        ),
        ("SYS_prctl", libc::SYS_prctl, vec![equal(0, libc::PR_SET_NAME)]),
        ("SYS_unshare", libc::SYS_unshare, vec![new_network(0)]),
        ("SYS_setns", libc::SYS_setns, vec![new_network(1)]),
        // tokio's for signals.
        ("SYS_socketpair", libc::SYS_socketpair, vec![equal(0, libc::AF_UNIX)]),
    ];
    for protocol in [libc::NETLINK_ROUTE, libc::NETLINK_NETFILTER] {
        let netlink = vec![equal(0, libc::AF_NETLINK), equal(2, protocol)];
        rules.push(("SYS_socket", libc::SYS_socket, netlink));
    }
    for (_, request) in IOCTLS {
        rules.push(("SYS_ioctl", libc::SYS_ioctl, vec![(1, Is::Eq, u64::from(*request))]));
    }
    rules
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const AUDIT: &str = include_str!("../AUDIT.md");

    /// What stands between backquotes at the beginning of the rows of the table under a heading.
    fn rows(heading: &str) -> BTreeSet<&'static str> {
        let section = AUDIT
            .split(&format!("\n## {heading}\n"))
            .nth(1)
            .expect("the heading is there");
        let section = section.split("\n## ").next().expect("a part");
        let first = |line: &'static str| line.strip_prefix("| ")?.split(" |").next();
        let cells = section.lines().filter_map(first);
        cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).collect()
    }

    fn short(name: &str) -> &str {
        name.strip_prefix("SYS_").expect("a system call")
    }

    #[test]
    fn the_audit_lists_exactly_the_system_calls_that_are_allowed() {
        let bounded = bounded();
        let plain = PLAIN.iter().chain(OLDER).chain(UNKNOWN).map(|(name, _)| short(name));
        let ours: BTreeSet<&str> = plain.chain(bounded.iter().map(|(name, ..)| short(name))).collect();
        let mut written = rows("System calls");
        // What the other architecture has in their place stands among them too.
        if OLDER.is_empty() {
            written.remove("epoll_wait");
            written.remove("poll");
        }
        assert_eq!(written, ours);
        assert!(ours.len() <= 70, "{}", ours.len());
    }

    #[test]
    fn the_audit_lists_exactly_the_requests_of_ioctl_that_are_allowed() {
        let ours: BTreeSet<&str> = IOCTLS.iter().map(|(name, _)| *name).collect();
        assert_eq!(rows("Requests of ioctl"), ours);
    }

    #[test]
    fn the_audit_lists_exactly_the_verbs_and_capabilities() {
        let verbs: BTreeSet<&str> = AUDIT
            .lines()
            .filter_map(|line| line.strip_prefix("### "))
            .flat_map(|line| line.split('`').skip(1).step_by(2))
            .filter_map(|verb| verb.split('(').next())
            .collect();
        let service = include_str!("server.rs");
        let served = service
            .lines()
            .filter_map(|line| line.trim_start().strip_prefix("async fn "));
        let served: BTreeSet<&str> = served
            .filter_map(|line| line.split_once("(self, context").map(|(name, _)| name))
            .collect();
        assert_eq!(verbs, served);
        let unit = include_str!("../../packaging/systemd/roost-privd.service");
        let bound = unit
            .lines()
            .find_map(|line| line.strip_prefix("CapabilityBoundingSet="));
        let bound: BTreeSet<&str> = bound.expect("a bounding set").split(' ').collect();
        assert_eq!(rows("Privilege, as found in the rig"), bound);
    }

    #[test]
    fn the_audit_lists_exactly_the_dependencies() {
        let manifest = include_str!("../Cargo.toml");
        let section = manifest.split("[dependencies]\n").nth(1).expect("dependencies");
        let section = section.split("\n[").next().expect("a part");
        let lines = section.lines().filter(|line| !line.starts_with('#'));
        let ours: BTreeSet<&str> = lines
            .filter_map(|line| line.split(['.', ' ']).next())
            .filter(|name| !name.is_empty())
            .collect();
        assert_eq!(rows("Dependencies"), ours);
    }

    /// What somebody who has taken privd over tries: a name, a system call, its arguments.
    const FORBIDDEN: &[(&str, i64, [i64; 3])] = &[
        ("a program", libc::SYS_execve, [0, 0, 0]),
        ("a program by descriptor", libc::SYS_execveat, [0, 0, 0]),
        ("a process", libc::SYS_clone, [17, 0, 0]),
        (
            "a namespace of users",
            libc::SYS_unshare,
            [libc::CLONE_NEWUSER as i64, 0, 0],
        ),
        (
            "a namespace of mounts",
            libc::SYS_unshare,
            [libc::CLONE_NEWNS as i64, 0, 0],
        ),
        ("somebody's mounts", libc::SYS_setns, [0, libc::CLONE_NEWNS as i64, 0]),
        ("a mount", libc::SYS_mount, [0, 0, 0]),
        ("a mount, newer", libc::SYS_fsopen, [0, 0, 0]),
        ("a file system's handle", libc::SYS_open_by_handle_at, [0, 0, 0]),
        ("a kernel module", libc::SYS_finit_module, [0, 0, 0]),
        ("a BPF program", libc::SYS_bpf, [0, 0, 0]),
        ("another process's memory", libc::SYS_ptrace, [16, 1, 0]),
        ("another process's memory, newer", libc::SYS_process_vm_readv, [1, 0, 0]),
        ("another process's descriptors", libc::SYS_pidfd_open, [1, 0, 0]),
        ("another process's life", libc::SYS_kill, [1, 0, 0]),
        ("an io_uring", libc::SYS_io_uring_setup, [1, 0, 0]),
        ("another uid", libc::SYS_setuid, [1, 0, 0]),
        ("a file's end", libc::SYS_unlinkat, [0, 0, 0]),
        ("a key", libc::SYS_keyctl, [0, 0, 0]),
        (
            "the internet",
            libc::SYS_socket,
            [libc::AF_INET as i64, libc::SOCK_STREAM as i64, 0],
        ),
        (
            "raw packets",
            libc::SYS_socket,
            [libc::AF_PACKET as i64, libc::SOCK_RAW as i64, 0],
        ),
        (
            "a local service",
            libc::SYS_socket,
            [libc::AF_UNIX as i64, libc::SOCK_STREAM as i64, 0],
        ),
        ("a connection", libc::SYS_connect, [0, 0, 0]),
        (
            "the audit log",
            libc::SYS_socket,
            [libc::AF_NETLINK as i64, libc::SOCK_RAW as i64, 9],
        ),
        ("all devices' end", libc::SYS_ioctl, [0, 0xc138_fd01, 0]),
        ("a message to a target", libc::SYS_ioctl, [0, 0xc138_fd0e, 0]),
        ("a loop's end", libc::SYS_ioctl, [0, 0x4c01, 0]),
        ("a tap that stays", libc::SYS_ioctl, [0, 0x4004_54cb, 1]),
        ("a terminal's input", libc::SYS_ioctl, [0, 0x5412, 0]),
        ("code", libc::SYS_mprotect, [0, 0, libc::PROT_EXEC as i64]),
    ];
    /// Files that root may read by their permission bits.
    const FILES: &[&str] = &["/etc/passwd", "/proc/self/environ", "/sys/kernel/uevent_seqnum"];
    const ATTEMPT: &str = "ROOST_ATTEMPT";

    /// Makes an attempt in a confined process of its own: this test binary once more.
    fn attempted(what: &str) -> std::process::ExitStatus {
        let own = std::env::current_exe().expect("a test binary");
        let output = std::process::Command::new(own)
            .args(["--exact", "confine::tests::an_attempt", "--ignored", "--nocapture"])
            .env(ATTEMPT, what)
            .output();
        output.expect("started").status
    }

    #[test]
    #[ignore = "a part of other tests, which start it in a process of its own"]
    fn an_attempt() {
        let what = std::env::var(ATTEMPT).expect("something to try");
        confine().expect("confined");
        // What it has use for works, so that nothing else fails for want of it.
        std::thread::spawn(|| ()).join().expect("a thread");
        std::fs::OpenOptions::new()
            .write(true)
            .open("/dev/null")
            .expect("a device");
        if let Some((_, number, [a, b, c])) = FORBIDDEN.iter().find(|(name, ..)| *name == what) {
            // SAFETY: it ends this process, or fails for its arguments.
            #[allow(unsafe_code, reason = "an attack is made of system calls")]
            let outcome = unsafe { libc::syscall(*number, a, b, c) };
            panic!("{what}: {outcome}");
        }
        if what == "a new file" {
            let made = std::fs::File::create("/tmp/roost-privd-attempt").expect_err("made");
            assert_eq!(made.kind(), io::ErrorKind::PermissionDenied);
        }
        let opened = std::fs::File::open(&what).map(drop);
        assert!(what == "a new file" || opened.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied));
    }

    #[test]
    fn a_forbidden_call_kills_the_process() {
        use std::os::unix::process::ExitStatusExt;
        for (name, ..) in FORBIDDEN {
            assert_eq!(attempted(name).signal(), Some(libc::SIGSYS), "{name}");
        }
    }

    #[test]
    fn no_file_is_opened_but_devices() {
        for path in FILES.iter().chain(&["a new file"]) {
            assert!(attempted(path).success(), "{path}");
        }
    }

    #[test]
    fn the_filters_compile() {
        let [unknown, allowed] = filters().expect("filters");
        assert!(!unknown.is_empty() && allowed.len() < 4096, "{}", allowed.len());
    }
}
