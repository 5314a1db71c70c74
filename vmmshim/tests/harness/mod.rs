//! Drives the built shim over a socket pair.
#![allow(dead_code, reason = "each test binary uses its part")]

pub(crate) mod sys;

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, connect, setsockopt, socket, socketpair, sockopt};
use nix::sys::time::TimeVal;
use roost_common::ipc::{self, IpcError};
use roost_common::shim::{Exit, FromShim, Launch, PROTOCOL, RateLimits, SHIM_SOCKET, Start, Started, ToShim, VmSpec};
use roost_common::units::{Mebibytes, Vcpus};

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whether a part of a test that not every machine allows can run here. Where all of them must (`CI=true`, or `ROOST_CI` set),
/// it is no choice.
pub(crate) fn can_test(possible: bool, need: &str) -> bool {
    let must = std::env::var("CI").is_ok_and(|value| value == "true") || std::env::var_os("ROOST_CI").is_some();
    assert!(possible || !must, "{need}, and must be tested: CI or ROOST_CI is set");
    if !possible {
        // Past libtest, which would keep it to itself.
        writeln!(io::stderr(), "\nNOT TESTED: {need}").expect("standard error");
    }
    possible
}

/// A connection to a shim.
pub(crate) struct Agent(pub(crate) OwnedFd);

impl Agent {
    pub(crate) fn send(&self, message: &ToShim) {
        ipc::send(self.0.as_fd(), message).expect("the shim takes a request");
    }

    pub(crate) fn receive(&self) -> Result<FromShim, IpcError> {
        ipc::receive(self.0.as_fd()).map(|(message, _)| message)
    }

    pub(crate) fn ask(&self, message: &ToShim) -> FromShim {
        self.send(message);
        self.receive().expect("an answer")
    }

    pub(crate) fn hello(self) -> Self {
        match self.receive() {
            Ok(FromShim::Hello { protocol: PROTOCOL, .. }) => self,
            other => panic!("no hello but {other:?}"),
        }
    }

    pub(crate) fn launch(&self, spec: &VmSpec) -> FromShim {
        self.launch_with(spec, null(), null())
    }

    pub(crate) fn launch_with(&self, spec: &VmSpec, tap: OwnedFd, disk: OwnedFd) -> FromShim {
        self.ask(&ToShim::Launch(Box::new(Launch {
            spec: spec.clone(),
            tap: tap.into(),
            disk: disk.into(),
        })))
    }

    pub(crate) fn started(&self, spec: &VmSpec) -> Started {
        match self.launch(spec) {
            FromShim::Started(started) => started,
            other => panic!("not started but {other:?}"),
        }
    }

    pub(crate) fn exited(&self) -> Exit {
        match self.receive() {
            Ok(FromShim::Exited(exit)) => exit,
            other => panic!("no exit but {other:?}"),
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        matches!(self.receive(), Err(IpcError::Closed))
    }
}

/// A shim process; killed with its test.
pub(crate) struct Shim {
    pub(crate) process: Child,
    pub(crate) agent: Agent,
}

impl Shim {
    pub(crate) fn start<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Self {
        Self::start_by(env!("CARGO_BIN_EXE_roost-vmmshim"), arguments)
    }

    /// Starts the shim by a program that executes it.
    pub(crate) fn start_by<S: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = S>) -> Self {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).expect("a socket pair");
        let process = Command::new(program)
            .args(arguments)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .expect("the shim starts");
        let agent = Agent(patient(ours));
        Self { process, agent }
    }

    pub(crate) fn ended(&mut self) -> ExitStatus {
        let mut status = None;
        wait_for("the shim's end", || {
            status = self.process.try_wait().expect("a child");
            status.is_some()
        });
        status.expect("waited for")
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().expect("reaped");
    }
}

/// The directories of one sandbox in a directory of their own, removed in the end.
pub(crate) struct Place {
    pub(crate) root: PathBuf,
    pub(crate) run_dir: PathBuf,
    pub(crate) vm_dir: PathBuf,
}

impl Place {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let root = std::env::temp_dir().join(format!("roost-shim-{}-{number}", std::process::id()));
        let place = Self {
            run_dir: root.join("vm/cl-1"),
            vm_dir: root.join("sandboxes/cl-1/vm"),
            root,
        };
        fs::create_dir_all(&place.run_dir).expect("made");
        fs::create_dir_all(&place.vm_dir).expect("made");
        place
    }

    /// A spec that boots a kernel with this content.
    pub(crate) fn spec(&self, kernel: &str) -> VmSpec {
        let path = self.root.join("vmlinux");
        fs::write(&path, kernel).expect("written");
        let text = |path: &Path| path.to_str().expect("a plain path").to_owned();
        VmSpec {
            sandbox: "cl-1".parse().expect("an id"),
            vcpus: Vcpus(1),
            memory: Mebibytes(512),
            disk_minor: 3,
            limits: RateLimits::default(),
            start: Start::Boot {
                kernel: text(&path),
                initramfs: None,
            },
            run_dir: text(&self.run_dir),
            vm_dir: text(&self.vm_dir),
        }
    }

    pub(crate) fn connect(&self) -> io::Result<Agent> {
        let agent = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        let address = nix::sys::socket::UnixAddr::new(&self.run_dir.join(SHIM_SOCKET))?;
        connect(std::os::fd::AsRawFd::as_raw_fd(&agent), &address)?;
        Ok(Agent(patient(agent)))
    }

    /// Names in the run directory.
    pub(crate) fn run_files(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(&self.run_dir)
            .expect("listed")
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("ASCII"))
            .collect();
        names.sort();
        names
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.root).expect("removed");
    }
}

/// A descriptor that is neither disk nor tap.
pub(crate) fn null() -> OwnedFd {
    File::from(OwnedFd::from(
        OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/null")
            .expect("opened"),
    ))
    .into()
}

/// Waits for a condition.
pub(crate) fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a process has ended (it may wait to be reaped).
pub(crate) fn is_gone(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| {
        stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z'))
    })
}

fn patient(connection: OwnedFd) -> OwnedFd {
    let limit = TimeVal::new(PATIENCE.as_secs() as _, 0);
    setsockopt(&connection, sockopt::ReceiveTimeout, &limit).expect("SO_RCVTIMEO");
    connection
}
