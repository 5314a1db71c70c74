//! roost's root daemon: five verbs that make kernel objects and hand them out as descriptors.
//!
//! Privileged code is this crate and no other, and small enough to read in one sitting. In the order in which a call meets it:
//!
//! | module | holds |
//! |---|---|
//! | [`server`] | the socket, who may speak, limits, the five verbs |
//! | [`check`] | request to specification: everything a peer says is judged there |
//! | [`kernel`] | disks, networks, rules; undoes itself when it fails |
//! | [`undo`] | the few steps after which no descriptor holds the new object yet |
//! | [`inventory`] | what of ours exists |
//! | [`audit`] | a line per call |
//! | [`host`] | what a start makes sure of |
//! | [`confine`] | what it gives up before it listens |
//!
//! It keeps nothing between calls but a list that the kernel keeps true (`kernel::own`), and may be killed at any moment: what it made is
//! held by the descriptors it handed out.
//! Not here: HTTP, TLS, protobuf; executing anything; mounting anything; paths or kernel names chosen by a peer. `AUDIT.md`
//! beside the sources lists each call with its checks, its effects in the kernel and the capabilities it needs.

#![warn(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic))]

mod audit;
mod check;
mod confine;
mod host;
mod inventory;
mod kernel;
mod server;
mod undo;

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::io::{self, IsTerminal};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, getsockopt, listen, socket, sockopt,
};
use nix::unistd::User;
use tokio::signal::unix::{SignalKind, signal};

use crate::check::Limits;

/// How long work in progress is waited for at the end. A call takes milliseconds, or waits for up to [`kernel::BUSY`].
const GRACE: Duration = Duration::from_secs(6);

/// How long a failure holds back the next start where systemd starts by socket.
const FAILED_START: Duration = Duration::from_secs(1);

const USAGE: &str = "usage: roost-privd [--socket PATH] [--peer-uid UID | --peer-user NAME]

Makes disks and networks for one user, by default `roost`. Takes its listening socket from systemd, or binds PATH.";

/// Why it does not start, or stops.
#[derive(Debug)]
enum Failure {
    Usage(String),
    Failed { what: String, error: io::Error },
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage(problem) => write!(f, "{problem}\n{USAGE}"),
            Self::Failed { what, error } => write!(f, "cannot {what}: {error}"),
        }
    }
}

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> Failure {
    move |error| Failure::Failed {
        what: what.into(),
        error,
    }
}

fn main() -> ExitCode {
    // Before anything opens a descriptor of its own.
    let passed = passed_socket();
    start_log();
    // Crash-only: what a panic would leave behind, a new start repairs; a daemon that lives on with a dead thread it does not.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
    let activated = passed.is_some();
    match run(passed, env::args_os().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            tracing::error!("{failure}");
            if activated {
                // Whoever waits at the socket has not been accepted, so systemd starts the next one the moment this one ends,
                // and its units set no limit. A host that lacks something must not be kept busy finding that out.
                std::thread::sleep(FAILED_START);
            }
            ExitCode::FAILURE
        }
    }
}

fn run(passed: Option<io::Result<OwnedFd>>, args: impl Iterator<Item = OsString>) -> Result<(), Failure> {
    let options = Options::parse(args)?;
    let uid = options.peer.uid()?;
    let listener = match (passed, options.socket) {
        (Some(passed), None) => {
            let passed = passed.map_err(failed("take the socket that systemd passes"))?;
            check_listener(&passed)?;
            UnixListener::from(passed)
        }
        (None, Some(path)) => bind_listener(&path).map_err(failed(format!("listen on {}", path.display())))?,
        (None, None) => {
            return Err(Failure::Usage(
                "no socket: systemd passes none, and --socket is missing".into(),
            ));
        }
        (Some(_), Some(_)) => return Err(Failure::Usage("both systemd and --socket name a socket".into())),
    };
    // From here on it opens no file but devices, and executes nothing.
    confine::confine().map_err(failed("confine itself"))?;
    host::prepare().map_err(failed("load the host's packet filter table"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(server::MAX_WORKING)
        .build()
        .map_err(failed("start the runtime"))?;
    let outcome = runtime.block_on(async {
        let mut stop = signal(SignalKind::terminate()).map_err(failed("watch for SIGTERM"))?;
        tracing::info!(peer_uid = uid, "ready");
        tokio::select! {
            outcome = server::serve(listener, uid, Limits::default()) => outcome.map_err(failed("accept connections")),
            _ = stop.recv() => Ok(()),
        }
    });
    // Calls at work end properly; their callers find the connection closed, and what they would have got is removed.
    runtime.shutdown_timeout(GRACE);
    outcome
}

/// The socket that systemd passes, if it passes one: exactly one, to this process.
fn passed_socket() -> Option<io::Result<OwnedFd>> {
    let number = |name: &str| env::var(name).ok().and_then(|value| value.parse::<u32>().ok());
    if number("LISTEN_PID") != Some(std::process::id()) {
        return None;
    }
    match number("LISTEN_FDS") {
        None | Some(0) => None,
        Some(1) => Some(kernel::sys::take_passed_socket()),
        Some(_) => Some(Err(io::Error::other("it passes more than one"))),
    }
}

fn check_listener(passed: &OwnedFd) -> Result<(), Failure> {
    let kind =
        getsockopt(passed, sockopt::SockType).map_err(|errno| failed("use what systemd passes")(errno.into()))?;
    let listens = getsockopt(passed, sockopt::AcceptConn).unwrap_or(false);
    if kind == SockType::SeqPacket && listens {
        Ok(())
    } else {
        let error = io::Error::other("it is no listening SOCK_SEQPACKET socket (ListenSequentialPacket=)");
        Err(failed("use what systemd passes")(error))
    }
}

/// Binds a socket by hand, in place of one that an earlier run left; 0666, because the peer's uid decides and where it may be
/// reached from is the directory's matter.
fn bind_listener(path: &PathBuf) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
    listen(&socket, Backlog::MAXCONN)?;
    Ok(socket.into())
}

/// What happens to connections the server says itself, with the peer beside; tarpc would say it again.
fn start_log() {
    let log = tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_target(false)
        .with_ansi(io::stderr().is_terminal())
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("ROOST_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,tarpc=off")),
        );
    // The journal has its own clock.
    if env::var_os("JOURNAL_STREAM").is_some() {
        log.without_time().init();
    } else {
        log.init();
    }
}

/// The command line.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    socket: Option<PathBuf>,
    peer: PeerOption,
}

#[derive(Debug, PartialEq, Eq)]
enum PeerOption {
    Uid(u32),
    User(String),
}

impl PeerOption {
    fn uid(&self) -> Result<u32, Failure> {
        match self {
            Self::Uid(uid) => Ok(*uid),
            Self::User(name) => match User::from_name(name) {
                Ok(Some(user)) => Ok(user.uid.as_raw()),
                Ok(None) => Err(Failure::Usage(format!("there is no user `{name}`"))),
                Err(errno) => Err(failed(format!("look up user `{name}`"))(errno.into())),
            },
        }
    }
}

impl Options {
    fn parse(mut args: impl Iterator<Item = OsString>) -> Result<Self, Failure> {
        let (mut socket, mut peer) = (None, None);
        while let Some(option) = args.next() {
            let mut value = || {
                args.next()
                    .ok_or_else(|| Failure::Usage(format!("{} needs a value", option.display())))
            };
            let text = |value: OsString| {
                value
                    .into_string()
                    .map_err(|_| Failure::Usage("that is no text".into()))
            };
            let twice = match option.to_str() {
                Some("--socket") => socket.replace(PathBuf::from(value()?)).is_some(),
                Some("--peer-user") => peer.replace(PeerOption::User(text(value()?)?)).is_some(),
                Some("--peer-uid") => {
                    let uid = text(value()?)?
                        .parse()
                        .map_err(|_| Failure::Usage("--peer-uid needs a number".into()))?;
                    peer.replace(PeerOption::Uid(uid)).is_some()
                }
                _ => return Err(Failure::Usage(format!("unknown option {}", option.display()))),
            };
            if twice {
                return Err(Failure::Usage(format!(
                    "{} is given twice, or against another",
                    option.display()
                )));
            }
        }
        Ok(Self {
            socket,
            peer: peer.unwrap_or_else(|| PeerOption::User("roost".into())),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Option<Options> {
        Options::parse(args.iter().map(OsString::from)).ok()
    }

    #[test]
    fn the_command_line_says_where_to_listen_and_to_whom() {
        let by_default = parse(&[]).expect("valid");
        assert_eq!(by_default.peer, PeerOption::User("roost".into()));
        let given = parse(&["--socket", "/run/x.sock", "--peer-uid", "7"]).expect("valid");
        assert_eq!(
            (given.socket, given.peer),
            (Some("/run/x.sock".into()), PeerOption::Uid(7))
        );
    }

    #[test]
    fn a_command_line_that_says_nothing_clear_is_refused() {
        for bad in [
            &["--socket"][..],
            &["--peer-uid", "-1"],
            &["--peer-uid", "roost"],
            &["--peer-uid", "4294967296"],
            &["--peer-uid", "1", "--peer-user", "roost"],
            &["--socket", "a", "--socket", "b"],
            &["--help-me"],
            &["a"],
        ] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }
}
