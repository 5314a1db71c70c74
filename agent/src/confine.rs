//! What the agent gives up before it starts a thread or listens to anyone: files that are not its own, programs, other processes.
//!
//! Its unit takes away as much and more; this binds an agent that somebody starts by hand or under another supervisor, and says in code
//! what the agent never does. A list of what is forbidden, and not of what is allowed: what resolvers of names and C libraries ask for is
//! theirs to change, and an agent that is killed for it loses no VM, but serves nobody.

use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, NetPort, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};
use roost_common::net::{PROXY_HTTP, PROXY_TLS};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Length, SeccompCmpOp as Is, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

use crate::config::{Config, Shim, Sources};
use crate::tls;

/// What is read outside of its own directories: the resolver's configuration and modules, certificates of the system, its own and the VMs'
/// figures. Directories, since files in them are replaced; who may read what in them is for permission bits to say.
const READ: [&str; 8] = [
    "/etc",
    "/usr",
    "/lib",
    "/lib64",
    "/proc",
    "/sys",
    "/run/systemd",
    "/run/NetworkManager",
];
/// Where `/dev/null` and `/dev/urandom` are.
const DEVICES: &str = "/dev";

/// Why the agent is not confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// A path that it needs.
    #[error("cannot open {} to confine the agent to it", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: landlock::PathFdError,
    },
    /// The kernel refuses a Landlock domain.
    #[error("the kernel refuses a Landlock domain")]
    Landlock(#[from] landlock::RulesetError),
    /// The kernel refuses a filter.
    #[error("the kernel refuses a filter of system calls")]
    Filter(#[source] io::Error),
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Confined {
    /// All of it is in force.
    Whole,
    /// The kernel has no Landlock: all files are there that permission bits and the unit leave.
    WithoutLandlock,
    /// Nothing is: shims are children of this agent, and would be confined with it.
    Not,
}

/// Gives up what the agent has no use for, in the calling thread and all that it starts: it must be the only one.
///
/// # Errors
/// [`ConfineError`].
pub fn confine(config: &Config, sources: &Sources) -> Result<Confined, ConfineError> {
    if config.shim == Shim::Child {
        return Ok(Confined::Not);
    }
    let has_landlock = restrict_files(config, sources)?;
    for program in filters().map_err(ConfineError::Filter)? {
        apply_filter(&program).map_err(|error| ConfineError::Filter(io::Error::other(error)))?;
    }
    Ok(if has_landlock {
        Confined::Whole
    } else {
        Confined::WithoutLandlock
    })
}

/// Enters a Landlock domain of its own directories, and of ports that it listens on. Whether the kernel has such domains.
fn restrict_files(config: &Config, sources: &Sources) -> Result<bool, ConfineError> {
    // All that a file system knows but programs and devices.
    let own = AccessFs::from_all(ABI::V5)
        & !(AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::MakeSock | AccessFs::IoctlDev);
    let read: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::ReadDir;
    let ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))?
        .handle_access(AccessNet::BindTcp)?
        .scope(Scope::from_all(ABI::V6))?
        .create()?;
    let mut rules = Vec::new();
    for dir in own_directories(config) {
        rules.push(PathBeneath::new(opened(&dir)?, own));
    }
    rules.push(PathBeneath::new(
        opened(Path::new(DEVICES))?,
        AccessFs::ReadFile | AccessFs::WriteFile,
    ));
    let given = config.control_plane.ca_file.as_deref().and_then(Path::parent);
    let credentials = tls::credentials_directory();
    let given = given
        .into_iter()
        .chain([&*config.pki_dir])
        // What a reload reads; not all there is, where somebody has put it there.
        .chain(sources.directory().filter(|directory| directory.parent().is_some()))
        .chain(credentials.as_deref());
    // What is not there need not be read.
    let there = READ.iter().map(Path::new).chain(given).filter(|path| path.exists());
    for path in there {
        rules.push(PathBeneath::new(opened(path)?, read));
    }
    let ports = [config.listen.port(), config.status_listen.port(), PROXY_HTTP, PROXY_TLS];
    let ports = ports.map(|port| NetPort::new(port, AccessNet::BindTcp));
    let ruleset = rules.into_iter().try_fold(ruleset, RulesetCreatedAttr::add_rule)?;
    let ruleset = ports.into_iter().try_fold(ruleset, RulesetCreatedAttr::add_rule)?;
    Ok(ruleset.restrict_self()?.ruleset != RulesetStatus::NotEnforced)
}

/// Those that it writes to, and what is directly in them: an operator may have put that elsewhere, behind a symbolic link.
fn own_directories(config: &Config) -> Vec<PathBuf> {
    let mut directories = vec![config.dir.clone(), config.vm_run_dir.clone()];
    let entries = std::fs::read_dir(&config.dir).into_iter().flatten().flatten();
    let linked = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_symlink()));
    directories.extend(linked.map(|entry| entry.path()).filter(|path| path.is_dir()));
    directories
}

fn opened(path: &Path) -> Result<PathFd, ConfineError> {
    PathFd::new(path).map_err(|source| ConfineError::Path {
        path: path.into(),
        source,
    })
}

macro_rules! calls {
    ($($call:ident)*) => { &[$((stringify!($call), libc::$call)),*] };
}

/// What an agent never does, whoever tells it to: it is killed. Programs, other processes' insides and their ends (VMMs and shims are ended by
/// their shim; `tgkill` stays, for an abort of its own), the kernel's and the host's settings, mounts and namespaces, what reaches around
/// file permissions, io_uring.
const FATAL: &[(&str, i64)] = calls![
    SYS_acct SYS_add_key SYS_bpf SYS_chroot SYS_clock_adjtime SYS_clock_settime SYS_delete_module SYS_execve SYS_execveat
    SYS_finit_module SYS_fsconfig SYS_fsmount SYS_fsopen SYS_fspick SYS_init_module SYS_io_uring_enter SYS_io_uring_register
    SYS_io_uring_setup SYS_kcmp SYS_kexec_load SYS_keyctl SYS_kill SYS_mknodat SYS_mount SYS_mount_setattr SYS_move_mount
    SYS_open_by_handle_at SYS_open_tree SYS_perf_event_open SYS_personality SYS_pidfd_getfd SYS_pidfd_send_signal
    SYS_pivot_root SYS_process_madvise SYS_process_vm_readv SYS_process_vm_writev SYS_ptrace SYS_quotactl SYS_reboot
    SYS_request_key SYS_rt_sigqueueinfo SYS_setdomainname SYS_setgid SYS_setgroups SYS_sethostname SYS_setns SYS_setregid SYS_setresgid SYS_setresuid
    SYS_setreuid SYS_settimeofday SYS_setuid SYS_swapoff SYS_swapon SYS_syslog SYS_tkill SYS_umount2 SYS_unshare SYS_userfaultfd
    SYS_vhangup
];

/// The same, where only this architecture has it.
#[cfg(target_arch = "x86_64")]
const FATAL_HERE: &[(&str, i64)] =
    calls![SYS_fork SYS_ioperm SYS_iopl SYS_kexec_file_load SYS_mknod SYS_modify_ldt SYS_vfork];
#[cfg(not(target_arch = "x86_64"))]
const FATAL_HERE: &[(&str, i64)] = &[];

/// A thread, and never a process.
const THREAD: u64 = (libc::CLONE_VM | libc::CLONE_THREAD) as u64;
const NAMESPACES: u64 = 0x7e02_0000;
/// `TIOCSTI`: what is typed at a terminal.
const TYPING: u64 = 0x5412;

/// The filters, in the order in which they are installed.
fn filters() -> io::Result<[BpfProgram; 3]> {
    let errno = |errno: i32| SeccompAction::Errno(errno.unsigned_abs());
    let rule = |conditions: &[(u8, Is, u64)]| {
        let conditions = conditions.iter().map(|(argument, is, value)| {
            // Families of sockets and requests of ioctl are of 32 bits; flags are not.
            SeccompCondition::new(*argument, Length::Dword, is.clone(), *value)
        });
        conditions
            .collect::<Result<Vec<_>, _>>()
            .and_then(SeccompRule::new)
            .map_err(io::Error::other)
    };
    let family = |family: i32| (0, Is::Ne, u64::from(family.unsigned_abs()));
    let [unix, inet, inet6] = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6].map(family);
    let mut fatal: Vec<(i64, Vec<SeccompRule>)> = FATAL
        .iter()
        .chain(FATAL_HERE)
        .map(|(_, call)| (*call, vec![]))
        .collect();
    // Less than all flags of a thread, or a namespace.
    let flags_of = |mask: u64| [0x100_u64, 0x1_0000].into_iter().filter(move |flag| mask & flag != 0);
    let mut processes = flags_of(THREAD)
        .map(|flag| rule(&[(0, Is::MaskedEq(flag), 0)]))
        .collect::<io::Result<Vec<_>>>()?;
    for bit in (0..32).map(|bit| 1_u64 << bit).filter(|bit| NAMESPACES & bit != 0) {
        processes.push(rule(&[(0, Is::MaskedEq(bit), bit)])?);
    }
    fatal.push((libc::SYS_clone, processes));
    fatal.push((libc::SYS_ioctl, vec![rule(&[(1, Is::Eq, TYPING)])?]));
    Ok([
        // A filter cannot see its flags; the C library then takes `clone`.
        compile(vec![(libc::SYS_clone3, vec![])], errno(libc::ENOSYS))?,
        // Resolvers of names ask for netlink, and do without.
        compile(
            vec![(libc::SYS_socket, vec![rule(&[unix, inet, inet6])?])],
            errno(libc::EAFNOSUPPORT),
        )?,
        compile(fatal, SeccompAction::KillProcess)?,
    ])
}

fn compile(rules: Vec<(i64, Vec<SeccompRule>)>, matched: SeccompAction) -> io::Result<BpfProgram> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(io::Error::other)?;
    SeccompFilter::new(rules.into_iter().collect(), SeccompAction::Allow, matched, arch)
        .and_then(BpfProgram::try_from)
        .map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::Command;

    use super::*;

    const ATTEMPT: &str = "ROOST_ATTEMPT";
    const DIR: &str = "ROOST_ATTEMPT_DIR";

    /// Makes an attempt in a confined process of its own: this test binary once more.
    fn attempted(what: &str) -> (std::process::ExitStatus, String) {
        let dir = tempfile::tempdir().expect("a directory");
        for name in ["data", "run", "pki", "elsewhere", "others"] {
            fs::create_dir(dir.path().join(name)).expect("made");
        }
        fs::write(dir.path().join("others/secret"), "x").expect("written");
        std::os::unix::fs::symlink("../elsewhere", dir.path().join("data/images")).expect("linked");
        let output = Command::new(std::env::current_exe().expect("a test binary"))
            .args(["--exact", "confine::tests::an_attempt", "--ignored", "--nocapture"])
            .env(ATTEMPT, what)
            .env(DIR, dir.path())
            .output()
            .expect("started");
        (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
    }

    #[test]
    #[ignore = "a part of other tests, which start it in a process of its own"]
    fn an_attempt() {
        let what = std::env::var(ATTEMPT).expect("something to try");
        let at = |name: &str| Path::new(&std::env::var_os(DIR).expect("a directory")).join(name);
        let config = Config {
            dir: at("data"),
            vm_run_dir: at("run"),
            pki_dir: at("pki"),
            ..Config::default()
        };
        let confined = confine(&config, &Sources::default()).expect("confined");
        assert_ne!(confined, Confined::Not);
        let denied = |outcome: io::Result<()>| {
            let error = outcome.expect_err("it worked");
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
        };
        match what.as_str() {
            // What it has use for works.
            "nothing" => {
                std::thread::spawn(|| ()).join().expect("a thread");
                for place in ["data/a", "run/a", "data/images/a"] {
                    fs::write(at(place), "x").expect(place);
                    fs::rename(at(place), at("data/b")).expect(place);
                    fs::remove_file(at("data/b")).expect(place);
                }
                fs::read("/etc/resolv.conf").expect("read");
                fs::read("/proc/self/status").expect("read");
                std::net::TcpListener::bind(("127.0.0.1", PROXY_TLS)).expect("bound");
                let local = std::net::ToSocketAddrs::to_socket_addrs(&("localhost", 80)).expect("resolved");
                assert!(local.count() > 0);
            }
            "another's file" => denied(fs::read(at("others/secret")).map(drop)),
            "a file elsewhere" => denied(fs::write(at("others/new"), "x")),
            "a file of the system" => denied(fs::write("/etc/roost-attempt", "x")),
            "a key" => denied(fs::write(at("pki/server-key.pem"), "x")),
            "a program" => drop(Command::new("/bin/true").status()),
            "netlink" => {
                let family = nix::sys::socket::AddressFamily::Netlink;
                let (kind, flags) = (nix::sys::socket::SockType::Raw, nix::sys::socket::SockFlag::empty());
                let errno = nix::sys::socket::socket(family, kind, flags, None).expect_err("opened");
                assert_eq!(errno, nix::errno::Errno::EAFNOSUPPORT);
            }
            "raw packets" => {
                let family = nix::sys::socket::AddressFamily::Packet;
                let (kind, flags) = (nix::sys::socket::SockType::Raw, nix::sys::socket::SockFlag::empty());
                let errno = nix::sys::socket::socket(family, kind, flags, None).expect_err("opened");
                assert_eq!(errno, nix::errno::Errno::EAFNOSUPPORT);
            }
            "another uid" => drop(nix::unistd::setuid(nix::unistd::Uid::from_raw(1))),
            "a root directory" => drop(nix::unistd::chroot("/")),
            "a namespace" => drop(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER)),
            // To itself, and none: nothing else is in its way.
            "a signal" => drop(nix::sys::signal::kill(nix::unistd::getpid(), None)),
            // By whoever has started it, which nothing but the filter refuses.
            "a trace" => drop(nix::sys::ptrace::traceme()),
            other => panic!("{other}"),
        }
    }

    #[test]
    fn what_the_agent_does_works_in_its_cage() {
        let (status, said) = attempted("nothing");
        assert!(status.success(), "{said}");
    }

    #[test]
    fn files_that_are_not_the_agents_and_sockets_that_are_not_of_its_kinds_are_refused() {
        for what in [
            "another's file",
            "a file elsewhere",
            "a file of the system",
            "a key",
            "netlink",
            "raw packets",
        ] {
            let (status, said) = attempted(what);
            assert!(status.success(), "{what}: {said}");
        }
    }

    #[test]
    fn an_agent_that_runs_a_program_or_becomes_somebody_else_is_killed() {
        for what in [
            "a program",
            "another uid",
            "a root directory",
            "a namespace",
            "a signal",
            "a trace",
        ] {
            let (status, said) = attempted(what);
            assert_eq!(status.signal(), Some(libc::SIGSYS), "{what}: {said}");
        }
    }

    #[test]
    fn the_filters_compile() {
        let filters = filters().expect("filters");
        assert!(
            filters
                .iter()
                .all(|program| !program.is_empty() && program.len() < 4096)
        );
    }
}
