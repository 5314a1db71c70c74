//! roost-vmmshim: confines one VMM, holds what it runs on, and reports how it ended.
//!
//! ```text
//! roost-vmmshim [--vmm PATH] [--child]          descriptor 0: the agent's connection (SEQPACKET)
//! ```
//!
//! One thread, no capability, no network. It starts with the agent's connection on descriptor 0, from systemd or as the agent's
//! child (`--child`), launches one VMM when told to, and lives exactly as long as it. Killed, it takes the VMM along (PDEATHSIG).
//!
//! `--child` is for development: the VMM then has the agent's uid, so one that a guest has taken over may do what the agent may,
//! ask privd and reach the sockets of other VMs among it, as far as its Landlock and seccomp rules do not stop it.
//!
//! | module | holds |
//! |---|---|
//! | `serve` | the loop, connections, requests |
//! | `launch` | from a request to a running VMM |
//! | `version` | what version the VMM's program says it is |
//! | `spec` | what may be launched, and the VMM's command line |
//! | `profile` | what a kind of VMM may open on this host |
//! | `cgroup` | how much of the host it may use |
//! | `confine` | fork, cage, exec; which system calls it may make; all unsafe code |
//! | `vm`, `ring` | a running VMM, what it writes, how it ended |
//!
//! Not here: anything that parses bytes of a guest or a VMM; the VMM's API (the agent's).

mod cgroup;
mod confine;
mod launch;
mod profile;
mod ring;
mod serve;
mod spec;
mod version;
mod vm;

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;

use nix::sys::prctl;
use nix::sys::socket::{SockType, getsockopt, sockopt};
use nix::sys::stat::{Mode, umask};
use nix::unistd::dup2_stdin;

use crate::profile::Profile;

/// Where Debian installs cloud-hypervisor.
const DEFAULT_VMM: &str = "/usr/bin/cloud-hypervisor";

/// Writes a line to the journal, or to the agent's. A log that cannot be written stops nothing.
macro_rules! log {
    ($($argument:tt)*) => {{
        use std::io::Write as _;
        writeln!(std::io::stderr(), "roost-vmmshim: {}", format_args!($($argument)*)).ok();
    }};
}
pub(crate) use log;

/// How the shim was started.
struct Options {
    /// The VMM's program.
    vmm: PathBuf,
    /// Started by the agent itself: its uid is the VM's, and its cgroup is not the VM's alone.
    child: bool,
    /// What the VMM may open.
    profile: Profile,
}

impl Options {
    fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Self, String> {
        let mut options = Self {
            vmm: DEFAULT_VMM.into(),
            child: false,
            profile: Profile::compiled_in(),
        };
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            match argument.to_str() {
                Some("--vmm") => options.vmm = path(&mut arguments, "--vmm")?,
                Some("--child") => options.child = true,
                #[cfg(feature = "foreign-profiles")]
                Some("--profile") => {
                    let file = path(&mut arguments, "--profile")?;
                    options.profile = Profile::from_file(&file).map_err(|e| format!("{}: {e}", file.display()))?;
                }
                _ => {
                    return Err(format!(
                        "unknown argument {}; it takes --vmm PATH and --child",
                        argument.display()
                    ));
                }
            }
        }
        Ok(options)
    }
}

/// An option's absolute path.
fn path(arguments: &mut impl Iterator<Item = OsString>, option: &str) -> Result<PathBuf, String> {
    arguments
        .next()
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .ok_or_else(|| format!("{option} takes an absolute path"))
}

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args_os().skip(1)) {
        Ok(options) => options,
        Err(problem) => {
            log!("{problem}");
            return ExitCode::from(2);
        }
    };
    if options.child {
        log!(
            "WARNING: --child runs the VMM under the agent's uid: one that is taken over is the agent; for development only"
        );
    }
    match prepare().and_then(|connection| serve::serve(options, connection)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Hardens this process and takes the connection from descriptor 0, which becomes `/dev/null`.
fn prepare() -> io::Result<OwnedFd> {
    prctl::set_dumpable(false)?; // nobody of this uid, so no VMM, attaches to us or reads our memory
    umask(Mode::from_bits_truncate(0o077));
    std::env::set_current_dir("/")?;
    assert_eq!(confine::threads(), 1, "a shim has one thread");
    let connection = io::stdin().as_fd().try_clone_to_owned()?;
    if getsockopt(&connection, sockopt::SockType) != Ok(SockType::SeqPacket) {
        return Err(io::Error::other("descriptor 0 is not a SEQPACKET connection"));
    }
    dup2_stdin(File::open("/dev/null")?)?;
    Ok(connection)
}
