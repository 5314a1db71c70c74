//! A shim that launches: the probe runs in the place of a VMM, under a profile that only this kind of build takes.
//!
//! Needs Landlock (a kernel without it fails these tests, loudly), no root, no devices.

mod harness;

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use harness::sys::landlock_abi;
use harness::{Agent, Place, Shim, can_test, is_gone, null, wait_for};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::stat::Mode;
use nix::unistd::{getuid, mkfifo};
use roost_common::ring::{self, RING_BYTES};
use roost_common::shim::{
    API_SOCKET, CONSOLE_FILE, EXIT_FILE, Exit, FromShim, LOG_FILE, Launch, LaunchStep, Lendable, MAX_VERSION,
    MEMORY_FILE, ShimError, Start, Started, Status, ToShim, VmSpec, WaitStatus,
};

const PROFILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/probe-profile.json");
const PROBE: &str = env!("CARGO_BIN_EXE_roost-cage-probe");

fn shim() -> Shim {
    let shim = Shim::start(["--vmm", PROBE, "--profile", PROFILE, "--child"]);
    assert!(matches!(shim.agent.receive(), Ok(FromShim::Hello { .. })));
    shim
}

/// Runs a program of the probe to its end.
fn run(place: &Place, program: &str) -> Exit {
    let mut shim = shim();
    shim.agent.started(&place.spec(program));
    let exit = shim.agent.exited();
    assert_eq!(shim.ended().code(), Some(0), "the shim's own exit");
    exit
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("the probe writes ASCII")
}

/// Waits until the console holds a line.
fn wait_for_console(place: &Place, line: &str) {
    wait_for(line, || {
        let file = File::open(place.run_dir.join(CONSOLE_FILE)).expect("a console");
        text(&ring::read(&file, usize::MAX).expect("a ring")).contains(line)
    });
}

/// A probe that waits, and its shim.
fn waiting(place: &Place) -> (Shim, VmSpec, Started) {
    let shim = shim();
    let spec = place.spec("status\nwait");
    let started = shim.agent.started(&spec);
    wait_for_console(place, "status:");
    (shim, spec, started)
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("metadata").permissions().mode() & 0o7777
}

#[test]
fn a_vmm_runs_and_its_end_is_told_to_the_agent_and_in_the_exit_record() {
    let place = Place::new();
    let mut shim = shim();
    let started = shim.agent.started(&place.spec("log broken\nevent paniced\nexit 7"));
    assert_eq!(started.uid, getuid().as_raw());
    let exit = shim.agent.exited();
    assert_eq!((exit.wait, exit.oom_kills), (WaitStatus::Exited(7), 0));
    assert_eq!(text(&exit.console), "log broken: done\nevent paniced: done\n");
    assert!(text(&exit.log).contains("broken\n") && text(&exit.log).contains("paniced"));
    let record = fs::read(place.run_dir.join(EXIT_FILE)).expect("an exit record");
    assert_eq!(Exit::from_json(&record), Ok(exit));
    assert_eq!(mode(&place.run_dir.join(EXIT_FILE)), 0o644);
    assert_eq!(shim.ended().code(), Some(0));
    assert!(shim.agent.is_closed());
    assert!(is_gone(started.pid));
}

#[test]
fn the_vmm_says_its_version_in_its_cage_before_anything_is_launched() {
    let place = Place::new();
    let shim = shim();
    let asked = || match shim.agent.ask(&ToShim::Version) {
        FromShim::Version(said) => Ok(text(&said)),
        FromShim::Refused(error) => Err(error),
        other => panic!("{other:?}"),
    };
    assert_eq!(asked().as_deref(), Ok("roost-cage-probe v0.1 0 1 2 3 4 5\n"));
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", shim.process.id()));
    assert!(children.is_ok_and(|children| children.is_empty()), "a child is left");
    shim.agent.started(&place.spec("wait"));
    assert_eq!(asked(), Err(ShimError::AlreadyLaunched));
}

#[test]
fn a_vmm_that_says_much_or_nothing_is_told_as_far_as_that_goes() {
    let version = |vmm: &str| {
        let shim = Shim::start(["--vmm", vmm, "--profile", PROFILE, "--child"]);
        assert!(matches!(shim.agent.receive(), Ok(FromShim::Hello { .. })));
        shim.agent.ask(&ToShim::Version)
    };
    // Its licence is longer than any version.
    assert!(matches!(version("/usr/bin/yes"), FromShim::Version(said) if said.len() == MAX_VERSION));
    let missing = ShimError::Step {
        step: LaunchStep::OpenFiles,
        errno: libc::ENOENT,
    };
    let answer = version("/nonexistent/vmm");
    assert!(
        matches!(&answer, FromShim::Refused(error) if *error == missing),
        "{answer:?}"
    );
}

#[test]
fn a_vmm_that_dies_of_a_signal_is_told_as_such() {
    assert_eq!(run(&Place::new(), "abort").wait, WaitStatus::Signaled(libc::SIGABRT));
}

#[test]
fn the_vmm_is_given_exactly_its_command_line_and_an_empty_environment() {
    let place = Place::new();
    let console = text(&run(&place, "arguments\nenvironment\ndirectory\nexit 0").console);
    let kernel = place.root.join("vmlinux");
    let wanted = format!(
        "arguments: --api-socket fd=4 --kernel {} --cmdline console=ttyS0 ",
        kernel.display()
    );
    assert!(console.starts_with(&wanted), "{console}");
    assert!(
        console.contains("--disk path=/dev/dm-3,image_type=raw,id=rootfs --net fd=3,"),
        "{console}"
    );
    assert!(console.contains("\nenvironment: \ndirectory: /\n"), "{console}");
}

#[test]
fn the_vmm_has_no_descriptor_but_its_six() {
    let place = Place::new();
    // A leak on purpose: the agent's side opens a file that stays open across exec.
    let canary = File::open("/etc/hostname").expect("opened");
    fcntl(&canary, FcntlArg::F_SETFD(FdFlag::empty())).expect("F_SETFD");
    let shim = shim();
    let inherited = fs::read_dir(format!("/proc/{}/fd", shim.process.id())).map_or(usize::MAX, Iterator::count);
    assert!(inherited > 3, "the shim itself did not inherit the canary");
    shim.agent.started(&place.spec("descriptors\nexit 0"));
    assert_eq!(text(&shim.agent.exited().console), "descriptors: 0 1 2 3 4 5\n");
}

#[test]
fn the_vmm_has_no_capability_no_way_to_gain_one_and_default_signals() {
    let console = text(&run(&Place::new(), "status\nexit 0").console);
    let none = "0000000000000000";
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert!(console.contains(&format!("{set}:{none}")), "{set}: {console}");
    }
    // Without CAP_SETPCAP the bounding set is the unit's to empty.
    if can_test(getuid().is_root(), "the bounding set needs root") {
        assert!(console.contains(&format!("CapBnd:{none}")), "{console}");
    }
    assert!(console.contains("NoNewPrivs:1"), "{console}");
    assert!(console.contains(&format!("SigBlk:{none}")), "{console}");
}

#[test]
fn ambient_capabilities_end_at_the_vmm() {
    if !can_test(
        getuid().is_root(),
        "ambient capabilities need root, who has some to give away",
    ) {
        return;
    }
    let place = Place::new();
    // Without CAP_SETPCAP, so that the bounding set stays, and without what root gains at exec.
    let shim = Shim::start_by(
        "setpriv",
        [
            "--inh-caps=-all,+net_raw",
            "--ambient-caps=+net_raw",
            "--securebits=+noroot,+noroot_locked",
            env!("CARGO_BIN_EXE_roost-vmmshim"),
            "--vmm",
            PROBE,
            "--profile",
            PROFILE,
        ],
    );
    assert!(matches!(shim.agent.receive(), Ok(FromShim::Hello { .. })));
    let own = fs::read_to_string(format!("/proc/{}/status", shim.process.id())).expect("status");
    assert!(
        own.contains("CapAmb:\t0000000000002000"),
        "the shim was given nothing: {own}"
    );
    shim.agent.started(&place.spec("status\nexit 0"));
    let console = text(&shim.agent.exited().console);
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert!(console.contains(&format!("{set}:0000000000000000")), "{set}: {console}");
    }
    assert!(
        !console.contains("CapBnd:0000000000000000"),
        "the bounding set hides it: {console}"
    );
}

#[test]
fn the_vmm_touches_no_file_but_those_of_its_sandbox() {
    let place = Place::new();
    fs::create_dir(place.vm_dir.join("1")).expect("made");
    fs::create_dir(place.root.join("sandboxes/other")).expect("made");
    fs::write(place.root.join("sandboxes/other/disk"), "").expect("written");
    let socket = place.root.join("someone.sock");
    let _listener = UnixListener::bind(&socket).expect("bound");
    let (root, vm, run_dir) = (place.root.display(), place.vm_dir.display(), place.run_dir.display());
    let allowed = [
        format!("create {vm}/1/state.json"),
        format!("read {vm}/1/state.json"),
        format!("write {vm}/1/state.json"),
        format!("truncate {vm}/1/state.json"),
        format!("list {vm}/1"),
        format!("read {root}/vmlinux"),
        "read /dev/urandom".into(),
    ];
    let refused = [
        "read /etc/passwd".into(),
        "read /proc/1/environ".into(),
        "list /".into(),
        "list /dev".into(),
        "write /dev/urandom".into(),
        "write /dev/null".into(),
        format!("write {root}/vmlinux"),
        format!("read {root}/sandboxes/other/disk"),
        format!("create {root}/sandboxes/other/x"),
        format!("create {run_dir}/x"),
        format!("read {run_dir}/{CONSOLE_FILE}"),
        format!("write {run_dir}/{CONSOLE_FILE}"),
        format!("remove {run_dir}/{API_SOCKET}"),
        format!("create {root}/x"),
        format!("mkdir {vm}/2"),
        format!("symlink {vm}/1/config.json"),
        format!("rename {vm}/1/state.json {vm}/1/config.json"),
        format!("rename {vm}/1/state.json {vm}/state.json"),
        format!("remove {vm}/1/state.json"),
        "execute /bin/sh".into(),
        "execute /usr/bin/env".into(),
    ];
    let program: Vec<String> = allowed
        .iter()
        .chain(&refused)
        .cloned()
        .chain(["exit 0".into()])
        .collect();
    let console = text(&run(&place, &program.join("\n")).console);
    let outcome = |command: &str| {
        let line = console
            .lines()
            .find_map(|line| line.strip_prefix(&format!("{command}: ")));
        line.unwrap_or_else(|| panic!("{command} was not tried: {console}"))
            .to_owned()
    };
    for command in &allowed {
        assert_eq!(outcome(command), "done", "{command}");
    }
    for command in &refused {
        // A move between directories without the right to it is told as EXDEV.
        let errno = if command.ends_with("/vm/state.json") {
            libc::EXDEV
        } else {
            libc::EACCES
        };
        let got = outcome(command);
        assert!(
            got == format!("error {}", libc::EACCES) || got == format!("error {errno}"),
            "{command}: {got}"
        );
    }
}

#[test]
fn the_vmm_reaches_no_network_and_no_process_where_the_kernel_can_forbid_it() {
    let place = Place::new();
    // Asked by us: what the shim makes of the answer is under test.
    let abi = landlock_abi().expect("a kernel with Landlock");
    let console = text(&run(&place, "tcp bind\ntcp connect\nsignal 1\nexit 0").console);
    let eperm = format!("signal 1: error {}", libc::EPERM);
    if can_test(
        abi >= 4,
        "the VMM's network needs a kernel with Landlock ABI 4 (Linux 6.7)",
    ) {
        assert!(
            console.contains(&format!("tcp bind: error {}", libc::EACCES)),
            "{console}"
        );
        assert!(
            console.contains(&format!("tcp connect: error {}", libc::EACCES)),
            "{console}"
        );
    }
    if can_test(
        abi >= 6,
        "the VMM's signals need a kernel with Landlock ABI 6 (Linux 6.12)",
    ) {
        assert!(console.contains(&eperm), "{console}");
    }
}

/// What a program in the place of a VMM tries, and what a filter has to say to it.
const FORBIDDEN: &[(&str, i64, &[i64])] = &[
    ("socket AF_INET", libc::SYS_socket, &[2, 1, 0]),
    ("socket AF_INET6", libc::SYS_socket, &[10, 1, 0]),
    ("socket AF_NETLINK", libc::SYS_socket, &[16, 3, 0]),
    ("socket AF_PACKET", libc::SYS_socket, &[17, 3, 0]),
    ("socket AF_ALG", libc::SYS_socket, &[38, 5, 0]),
    ("socket AF_VSOCK", libc::SYS_socket, &[40, 1, 0]),
    ("connect", libc::SYS_connect, &[4, 0, 0]),
    ("bind", libc::SYS_bind, &[4, 0, 0]),
    ("listen", libc::SYS_listen, &[4, 1]),
    ("sendto an address", libc::SYS_sendto, &[4, 0, 0, 0, 4096, 2]),
    ("sendmsg", libc::SYS_sendmsg, &[4, 0, 0]),
    ("ptrace", libc::SYS_ptrace, &[16, 1, 0, 0]),
    ("process_vm_readv", libc::SYS_process_vm_readv, &[1, 0, 0, 0, 0, 0]),
    ("process_vm_writev", libc::SYS_process_vm_writev, &[1, 0, 0, 0, 0, 0]),
    ("pidfd_open", libc::SYS_pidfd_open, &[1, 0]),
    ("pidfd_getfd", libc::SYS_pidfd_getfd, &[4, 0, 0]),
    ("pidfd_send_signal", libc::SYS_pidfd_send_signal, &[4, 0, 0, 0]),
    ("kill", libc::SYS_kill, &[1, 0]),
    ("tkill", libc::SYS_tkill, &[1, 0]),
    ("tgkill another", libc::SYS_tgkill, &[1, 1, 0]),
    ("perf_event_open", libc::SYS_perf_event_open, &[0, 0, 0, 0, 0]),
    ("bpf", libc::SYS_bpf, &[0, 0, 0]),
    ("keyctl", libc::SYS_keyctl, &[0, 0]),
    ("add_key", libc::SYS_add_key, &[0, 0, 0, 0, 0]),
    ("clone a process", libc::SYS_clone, &[17, 0, 0, 0, 0]),
    ("clone a namespace", libc::SYS_clone, &[0x1001_0100, 0, 0, 0, 0]),
    ("unshare", libc::SYS_unshare, &[0x1000_0000]),
    ("setns", libc::SYS_setns, &[4, 0]),
    ("mount", libc::SYS_mount, &[0, 0, 0, 0, 0]),
    ("umount2", libc::SYS_umount2, &[0, 0]),
    ("fsopen", libc::SYS_fsopen, &[0, 0]),
    ("open_by_handle_at", libc::SYS_open_by_handle_at, &[4, 0, 0]),
    ("finit_module", libc::SYS_finit_module, &[4, 0, 0]),
    ("personality", libc::SYS_personality, &[0xffff_ffff]),
    ("setuid", libc::SYS_setuid, &[0]),
    ("io_uring_enter", libc::SYS_io_uring_enter, &[4, 0, 0, 0, 0, 0]),
    ("execveat", libc::SYS_execveat, &[4, 0, 0, 0, 0]),
    (
        "mmap writable and executable",
        libc::SYS_mmap,
        &[0, 4096, 7, 0x22, -1, 0],
    ),
    ("mprotect executable", libc::SYS_mprotect, &[0, 0, 4]),
    ("pkey_mprotect", libc::SYS_pkey_mprotect, &[0, 0, 4, -1]),
    ("prctl PR_SET_DUMPABLE", libc::SYS_prctl, &[4, 1, 0, 0, 0]),
    ("prctl PR_SET_PDEATHSIG", libc::SYS_prctl, &[1, 0, 0, 0, 0]),
    ("prlimit64 with a new limit", libc::SYS_prlimit64, &[0, 7, 4096, 0]),
    ("seccomp with a listener", libc::SYS_seccomp, &[1, 8, 0]),
    ("umask of a file for all", libc::SYS_umask, &[0]),
    ("ioctl TIOCSTI", libc::SYS_ioctl, &[0, 0x5412, 0]),
    ("ioctl TIOCSCTTY", libc::SYS_ioctl, &[0, 0x540e, 0]),
    ("ioctl SIOCSIFFLAGS", libc::SYS_ioctl, &[3, 0x8914, 0]),
    ("ioctl TUNSETQUEUE", libc::SYS_ioctl, &[3, 0x4004_54d9, 0]),
    ("ioctl TUNSETPERSIST", libc::SYS_ioctl, &[3, 0x4004_54cb, 0]),
    ("ioctl FS_IOC_SETFLAGS", libc::SYS_ioctl, &[3, 0x4008_6602, 0]),
    ("ioctl of VFIO", libc::SYS_ioctl, &[3, 0x3b64, 0]),
    ("ioctl of vhost", libc::SYS_ioctl, &[3, 0xaf01, 0]),
];

/// A profile whose VMM makes forbidden calls, and what becomes of it then.
fn filtered(place: &Place, violations: &str) -> Shim {
    let text = fs::read_to_string(PROFILE).expect("the probe's profile");
    let profile = place.root.join("profile.json");
    fs::write(&profile, text.replace("unfiltered", violations)).expect("written");
    let shim = Shim::start(["--vmm", PROBE, "--profile", profile.to_str().expect("UTF-8"), "--child"]);
    assert!(matches!(shim.agent.receive(), Ok(FromShim::Hello { .. })));
    shim
}

#[test]
fn the_vmm_makes_no_system_call_that_it_has_no_use_for() {
    let place = Place::new();
    let command = |(_, number, arguments): &(&str, i64, &[i64])| {
        let arguments = arguments.iter().map(|argument| format!(" {argument}"));
        format!("call {number}{}", arguments.collect::<String>())
    };
    let unix = format!("call {} 1 1 0", libc::SYS_socket);
    let own = format!("thread\n{unix}\ncall 1000000");
    let program: Vec<String> = FORBIDDEN.iter().map(command).collect();
    let mut shim = filtered(&place, "refused");
    let missing = [libc::SYS_clone3, libc::SYS_io_uring_setup].map(|number| format!("call {number} 0 0"));
    let userfaultfd = format!("call {} 0", libc::SYS_userfaultfd);
    let program = [
        own,
        program.join("\n"),
        missing.join("\n"),
        userfaultfd.clone(),
        "exit 0".into(),
    ]
    .join("\n");
    shim.agent.started(&place.spec(&program));
    let exit = shim.agent.exited();
    let console = text(&exit.console);
    assert_eq!(
        (exit.wait, shim.ended().code()),
        (WaitStatus::Exited(0), Some(0)),
        "{console}"
    );
    let outcome = |command: &str| {
        let mut lines = console.lines();
        lines
            .find_map(|line| line.strip_prefix(&format!("{command}: ")))
            .map(str::to_owned)
    };
    let refused = |errno: i32| Some(format!("error {errno}"));
    // What it has use for works, so that the others are not refused for want of anything.
    assert_eq!(outcome("thread").as_deref(), Some("done"), "{console}");
    let unix = outcome(&unix).expect("tried");
    assert!(unix.parse::<u32>().is_ok(), "a socket of AF_UNIX: {unix}");
    for attempt in FORBIDDEN {
        assert_eq!(outcome(&command(attempt)), refused(libc::EPERM), "{}", attempt.0);
    }
    for command in missing {
        assert_eq!(outcome(&command), refused(libc::ENOSYS), "{command}");
    }
    assert_eq!(outcome(&userfaultfd), refused(libc::EPERM));
}

#[test]
fn a_vmm_that_makes_a_forbidden_call_is_killed_and_its_end_says_so() {
    for (name, number, arguments) in FORBIDDEN {
        let place = Place::new();
        let arguments: String = arguments.iter().map(|argument| format!(" {argument}")).collect();
        let mut shim = filtered(&place, "killed");
        shim.agent
            .started(&place.spec(&format!("call {number}{arguments}\nexit 0")));
        assert_eq!(shim.agent.exited().wait, WaitStatus::Signaled(libc::SIGSYS), "{name}");
        assert_eq!(shim.ended().code(), Some(0), "{name}");
    }
}

#[test]
fn there_is_never_a_second_vmm() {
    let place = Place::new();
    let (shim, spec, _) = waiting(&place);
    let again = shim.agent.launch(&spec);
    assert!(
        matches!(again, FromShim::Refused(ShimError::AlreadyLaunched)),
        "{again:?}"
    );
    // Nor one of another shim in the same run directory; and what is there stays.
    let before = place.run_files();
    let other = self::shim();
    let answer = other.agent.launch(&spec);
    let taken = ShimError::Step {
        step: LaunchStep::BindApiSocket,
        errno: libc::EADDRINUSE,
    };
    assert!(
        matches!(&answer, FromShim::Refused(error) if *error == taken),
        "{answer:?}"
    );
    assert_eq!(place.run_files(), before);
    assert!(matches!(
        shim.agent.ask(&ToShim::Status),
        FromShim::Status(Status::Running { .. })
    ));
}

#[test]
fn kill_ends_the_vmm_and_with_it_the_shim() {
    let place = Place::new();
    let (mut shim, ..) = waiting(&place);
    assert!(matches!(shim.agent.ask(&ToShim::Kill), FromShim::Killed));
    assert_eq!(shim.agent.exited().wait, WaitStatus::Signaled(libc::SIGKILL));
    assert_eq!(shim.ended().code(), Some(0));
}

#[test]
fn a_shim_that_is_told_to_stop_kills_its_vmm_and_reports_it() {
    let place = Place::new();
    let (mut shim, ..) = waiting(&place);
    let pid = nix::unistd::Pid::from_raw(i32::try_from(shim.process.id()).expect("a pid"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("sent");
    assert_eq!(shim.agent.exited().wait, WaitStatus::Signaled(libc::SIGKILL));
    assert_eq!(shim.ended().code(), Some(0));
    assert!(place.run_dir.join(EXIT_FILE).exists());
}

#[test]
fn the_last_words_of_a_vmm_are_kept_however_far_the_shim_was_behind() {
    let place = Place::new();
    fs::create_dir(place.vm_dir.join("1")).expect("made");
    let go = place.vm_dir.join("1/go");
    let shim = shim();
    let program = format!("grow console\nawait {}\nburst 800\nexit 9", go.display());
    let started = shim.agent.started(&place.spec(&program));
    wait_for_console(&place, "grow console: 1048576");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(shim.process.id()).expect("a pid"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).expect("stopped");
    fs::write(go, "").expect("written");
    wait_for("the VMM's end", || is_gone(started.pid));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).expect("continued");
    let exit = shim.agent.exited();
    assert_eq!(exit.wait, WaitStatus::Exited(9));
    assert!(text(&exit.console).ends_with("burst 800: done\n"), "the end is lost");
}

#[test]
fn an_exit_reaches_an_agent_that_was_just_asking_something() {
    for _ in 0..20 {
        let place = Place::new();
        let (mut shim, ..) = waiting(&place);
        shim.agent.send(&ToShim::Kill);
        // Requests that the shim may or may not get to.
        let status = roost_common::ipc::Packet::encode(&ToShim::Status).expect("encoded");
        for _ in 0..20 {
            if status.send(shim.agent.0.as_fd()).is_err() {
                break;
            }
        }
        let exit = loop {
            match shim.agent.receive().expect("an exit before the end") {
                FromShim::Exited(exit) => break exit,
                FromShim::Killed | FromShim::Status(_) => {}
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(exit.wait, WaitStatus::Signaled(libc::SIGKILL));
        shim.ended();
    }
}

#[test]
fn a_vmm_dies_with_its_shim() {
    let place = Place::new();
    let (mut shim, _, started) = waiting(&place);
    assert!(!is_gone(started.pid));
    shim.process.kill().expect("killed");
    wait_for("the VMM's end", || is_gone(started.pid));
}

#[test]
fn an_agent_that_goes_after_the_launch_changes_nothing_and_another_takes_over() {
    let place = Place::new();
    let (mut shim, spec, started) = waiting(&place);
    drop(std::mem::replace(&mut shim.agent, Agent(null())));
    let next = place.connect().expect("connected").hello();
    match next.ask(&ToShim::Status) {
        FromShim::Status(Status::Running {
            spec: told,
            started: by,
        }) => assert_eq!((told, by), (spec, started)),
        other => panic!("{other:?}"),
    }
    assert_eq!(mode(&place.run_dir.join("shim.sock")), 0o666);
    assert_eq!(mode(&place.run_dir.join(API_SOCKET)), 0o666);
    next.send(&ToShim::Kill);
    assert!(matches!(next.receive(), Ok(FromShim::Killed)));
    assert_eq!(next.exited().wait, WaitStatus::Signaled(libc::SIGKILL));
}

/// What an agent that goes at once leaves to be read, in a shim that is held until it has gone.
fn after_the_agent_has_gone(shim: &Shim, leaves: impl FnOnce()) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(shim.process.id()).expect("a pid"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGSTOP).expect("stopped");
    leaves();
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).expect("continued");
}

#[test]
fn a_launch_that_nobody_can_be_told_of_is_undone() {
    let place = Place::new();
    let mut shim = shim();
    let agent = std::mem::replace(&mut shim.agent, Agent(null()));
    after_the_agent_has_gone(&shim, || {
        agent.send(&ToShim::Launch(Box::new(Launch {
            spec: place.spec("wait"),
            tap: null().into(),
            disk: null().into(),
        })));
        drop(agent);
    });
    assert_eq!(shim.ended().code(), Some(0));
    let record = fs::read(place.run_dir.join(EXIT_FILE)).expect("an exit record");
    let exit = Exit::from_json(&record).expect("a record");
    assert_eq!(exit.wait, WaitStatus::Signaled(libc::SIGKILL));
}

#[test]
fn a_kill_is_heard_of_an_agent_that_has_gone_before_it_was_greeted_or_with_answers_unread() {
    for greeted in [false, true] {
        let place = Place::new();
        let (mut shim, ..) = waiting(&place);
        let other = if greeted {
            // Its answer to this stays unread.
            let other = place.connect().expect("connected").hello();
            other.send(&ToShim::Status);
            other.send(&ToShim::Status);
            assert!(matches!(other.receive(), Ok(FromShim::Status(_))));
            Some(other)
        } else {
            None
        };
        after_the_agent_has_gone(&shim, || {
            let other = other.unwrap_or_else(|| place.connect().expect("connected"));
            // What is said before it has an answer that nobody takes.
            other.send(&ToShim::Status);
            other.send(&ToShim::Kill);
            drop(other);
        });
        assert_eq!(
            shim.agent.exited().wait,
            WaitStatus::Signaled(libc::SIGKILL),
            "greeted: {greeted}"
        );
        assert_eq!(shim.ended().code(), Some(0));
    }
}

#[test]
fn a_new_agent_gets_in_however_many_hang_on() {
    let place = Place::new();
    let (_shim, ..) = waiting(&place);
    let agents: Vec<Agent> = (0..10).map(|_| place.connect().expect("connected").hello()).collect();
    let newest = agents.last().expect("ten of them");
    assert!(matches!(
        newest.ask(&ToShim::Status),
        FromShim::Status(Status::Running { .. })
    ));
    assert!(agents[0].is_closed(), "the oldest was not dropped");
}

#[test]
fn peers_of_its_own_uid_are_refused_unless_it_is_the_agents_child() {
    let place = Place::new();
    let shim = Shim::start(["--vmm", PROBE, "--profile", PROFILE]);
    assert!(matches!(shim.agent.receive(), Ok(FromShim::Hello { .. })));
    shim.agent.started(&place.spec("wait"));
    assert!(place.connect().expect("queued").is_closed());
    assert!(matches!(
        shim.agent.ask(&ToShim::Status),
        FromShim::Status(Status::Running { .. })
    ));
}

#[test]
fn garbage_from_an_agent_costs_its_connection_and_nothing_else() {
    let place = Place::new();
    let (shim, ..) = waiting(&place);
    let second = place.connect().expect("connected").hello();
    let text = "not a request at all, and rather long".to_owned();
    roost_common::ipc::send(second.0.as_fd(), &(u32::MAX, text)).expect("sent");
    assert!(second.is_closed());
    assert!(matches!(
        shim.agent.ask(&ToShim::Status),
        FromShim::Status(Status::Running { .. })
    ));
}

#[test]
fn lent_descriptors_are_those_of_the_launch() {
    let place = Place::new();
    fs::write(place.root.join("disk"), "the disk").expect("written");
    let shim = shim();
    let disk = File::open(place.root.join("disk")).expect("opened");
    let answer = shim.agent.launch_with(&place.spec("wait"), null(), disk.into());
    assert!(matches!(answer, FromShim::Started(_)), "{answer:?}");
    for _ in 0..3 {
        let FromShim::Lent(disk) = shim.agent.ask(&ToShim::Lend(Lendable::Disk)) else {
            panic!("not lent");
        };
        let mut content = String::new();
        let mut disk = File::from(disk.into_owned().expect("owned"));
        std::io::Seek::rewind(&mut disk).expect("rewound");
        disk.read_to_string(&mut content).expect("read");
        assert_eq!(content, "the disk");
    }
    assert!(matches!(
        shim.agent.ask(&ToShim::Lend(Lendable::Tap)),
        FromShim::Lent(_)
    ));
}

#[test]
fn a_flood_on_every_output_is_drained_and_stays_bounded() {
    let place = Place::new();
    let shim = shim();
    shim.agent.started(&place.spec("flood 1024\nwait"));
    // Nobody listens meanwhile.
    wait_for_console(&place, "flood 1024: done");
    for name in [CONSOLE_FILE, LOG_FILE] {
        let length = fs::metadata(place.run_dir.join(name)).expect("a ring").len();
        assert!(length <= RING_BYTES + 16, "{name}: {length} bytes");
    }
    let status = fs::read_to_string(format!("/proc/{}/status", shim.process.id())).expect("status");
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .expect("a peak");
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().expect("a number");
    assert!(peak < 16 * 1024, "{peak} KiB");
}

#[test]
fn published_are_regular_files_and_nothing_else() {
    let place = Place::new();
    let attempt = |number: u32| place.vm_dir.join(number.to_string());
    for number in 1..=6 {
        fs::create_dir(attempt(number)).expect("made");
        for name in ["config.json", "memory-ranges"] {
            fs::write(attempt(number).join(name), "{}").expect("written");
            fs::set_permissions(attempt(number).join(name), PermissionsExt::from_mode(0o600)).expect("set");
        }
    }
    let outside = place.root.join("outside");
    fs::write(&outside, "").expect("written");
    fs::set_permissions(&outside, PermissionsExt::from_mode(0o600)).expect("set");
    symlink(&outside, attempt(2).join("state.json")).expect("linked");
    mkfifo(&attempt(3).join("state.json"), Mode::S_IRWXU).expect("made");
    fs::create_dir(attempt(4).join("state.json")).expect("made");
    fs::hard_link(attempt(5).join("config.json"), attempt(5).join("state.json")).expect("linked");
    for number in 0..100 {
        fs::write(attempt(6).join(number.to_string()), "").expect("written");
    }
    symlink(attempt(1), attempt(7)).expect("linked");

    let (shim, ..) = waiting(&place);
    for number in [2, 3, 4, 5, 6, 7, 8] {
        let answer = shim.agent.ask(&ToShim::Publish { attempt: number });
        assert!(
            matches!(
                answer,
                FromShim::Refused(ShimError::Step {
                    step: LaunchStep::PublishFiles,
                    ..
                })
            ),
            "attempt {number}: {answer:?}"
        );
    }
    assert_eq!(mode(&outside), 0o600);
    assert_eq!(mode(&attempt(1).join("config.json")), 0o600);
    let answer = shim.agent.ask(&ToShim::Publish { attempt: 1 });
    assert!(matches!(answer, FromShim::Published), "{answer:?}");
    for name in ["config.json", "memory-ranges"] {
        assert_eq!(mode(&attempt(1).join(name)), 0o640, "{name}");
    }
}

#[test]
fn a_lent_memory_file_is_the_attempts_own_and_can_be_written() {
    let place = Place::new();
    let memory = |number: u32| place.vm_dir.join(number.to_string()).join(MEMORY_FILE);
    for number in 1..=5 {
        fs::create_dir(place.vm_dir.join(number.to_string())).expect("made");
    }
    let outside = place.root.join("outside");
    fs::write(&outside, "kept").expect("written");
    fs::write(memory(1), "memory").expect("written");
    symlink(&outside, memory(2)).expect("linked");
    fs::hard_link(&outside, memory(3)).expect("linked");
    mkfifo(&memory(4), Mode::S_IRWXU).expect("made");
    // The fifth has none.

    let (shim, ..) = waiting(&place);
    for attempt in [2, 3, 4, 5, 6] {
        let answer = shim.agent.ask(&ToShim::Lend(Lendable::Memory { attempt }));
        assert!(
            matches!(
                answer,
                FromShim::Refused(ShimError::Step {
                    step: LaunchStep::LendDescriptor,
                    ..
                })
            ),
            "attempt {attempt}: {answer:?}"
        );
    }
    let FromShim::Lent(lent) = shim.agent.ask(&ToShim::Lend(Lendable::Memory { attempt: 1 })) else {
        panic!("not lent");
    };
    let lent = File::from(lent.into_owned().expect("owned"));
    std::os::unix::fs::FileExt::write_all_at(&lent, b"M", 0).expect("written");
    assert_eq!(fs::read_to_string(memory(1)).expect("read"), "Memory");
    assert_eq!(fs::read_to_string(&outside).expect("read"), "kept");
}

#[test]
fn a_step_that_fails_in_the_child_is_told_and_leaves_nothing() {
    let place = Place::new();
    let broken = place.root.join("no-program");
    fs::write(&broken, "not a program").expect("written");
    fs::set_permissions(&broken, PermissionsExt::from_mode(0o755)).expect("set");
    let vmm = broken.to_str().expect("plain");
    let shim = Shim::start(["--vmm", vmm, "--profile", PROFILE, "--child"]);
    assert!(matches!(shim.agent.receive(), Ok(FromShim::Hello { .. })));
    let answer = shim.agent.launch(&place.spec(""));
    let no_exec = ShimError::Step {
        step: LaunchStep::Exec,
        errno: libc::ENOEXEC,
    };
    assert!(
        matches!(&answer, FromShim::Refused(error) if *error == no_exec),
        "{answer:?}"
    );
    assert!(place.run_files().is_empty(), "{:?}", place.run_files());
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", shim.process.id()));
    assert!(children.is_ok_and(|children| children.is_empty()), "a child is left");
    // And it may try again.
    assert!(matches!(
        shim.agent.ask(&ToShim::Status),
        FromShim::Status(Status::Idle)
    ));
}

#[test]
fn missing_files_and_directories_are_told() {
    let place = Place::new();
    let shim = shim();
    let good = place.spec("exit 0");
    let missing = place.root.join("missing").to_str().expect("plain").to_owned();
    let directory = place.root.to_str().expect("plain").to_owned();
    let boot = |kernel: &str, initramfs: Option<String>| Start::Boot {
        kernel: kernel.into(),
        initramfs,
    };
    let kernel = place.root.join("vmlinux").to_str().expect("plain").to_owned();
    let restore = Start::Restore {
        attempt: 9,
        memory: roost_common::shim::RestoreMode::Copy,
        initramfs: None,
    };
    for (start, errno) in [
        (boot(&missing, None), libc::ENOENT),
        (boot(&directory, None), libc::EINVAL),
        (boot(&kernel, Some(missing.clone())), libc::ENOENT),
        (restore, libc::ENOENT),
    ] {
        let spec = VmSpec { start, ..good.clone() };
        let answer = shim.agent.launch(&spec);
        let wanted = ShimError::Step {
            step: LaunchStep::OpenFiles,
            errno,
        };
        assert!(
            matches!(&answer, FromShim::Refused(error) if *error == wanted),
            "{:?}: {answer:?}",
            spec.start
        );
        assert!(place.run_files().is_empty());
    }
    shim.agent.started(&good);
}
