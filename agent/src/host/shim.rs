//! The agent's side of a vmmshim: start one, launch its VMM, hear of its end.
//!
//! A [`ShimLink`] that has not launched ends its shim when it is dropped, because the shim sees the end of the connection. One
//! that has launched kills its VMM when it is dropped, unless it was [let go](ShimLink::let_go): so a failed or cancelled create
//! cannot leave a VMM, and an agent that ends can.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use roost_common::ipc::{self, IpcError, PacketSocket};
use roost_common::shim::{Exit, FromShim, Launch, PROTOCOL, ShimError, Started, ToShim};

use super::privd::{Credentials, connect_packets};
use crate::config::{self, Config};

/// How long a new shim may take to say hello: systemd starts a unit for it.
const HELLO_LIMIT: Duration = Duration::from_secs(60);
/// How long a shim may take to answer a request; a launch reads and maps nothing large.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// How long a killed VMM may take to end; its memory is freed on the way.
const EXIT_LIMIT: Duration = Duration::from_secs(60);

/// What is wrong with a shim.
#[derive(Debug, thiserror::Error)]
pub enum ShimFault {
    /// It cannot be started or reached.
    #[error("cannot reach a vmmshim by {}", at.display())]
    Unreachable {
        /// The socket or program.
        at: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection broke, or what came is no message of ours.
    #[error("the connection to the vmmshim failed")]
    Connection(#[source] IpcError),
    /// It said something that answers nothing we asked.
    #[error("the vmmshim broke the protocol: {0}")]
    Protocol(&'static str),
    /// It took too long.
    #[error("the vmmshim did not {0} in time")]
    Timeout(&'static str),
    /// It refused.
    #[error("the vmmshim refused")]
    Refused(#[source] ShimError),
    /// The VMM ended where it should have run.
    #[error("the VMM ended: {0}")]
    Ended(ExitSummary),
}

/// How a VMM ended, short enough for an error; the whole is in the tombstone.
#[derive(Debug, Clone)]
pub struct ExitSummary(pub Exit);

impl std::fmt::Display for ExitSummary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Exit {
            wait,
            oom_kills,
            console,
            log,
        } = &self.0;
        write!(f, "{wait}")?;
        if *oom_kills > 0 {
            write!(f, ", out of memory")?;
        }
        for (what, tail) in [("log", log), ("console", console)] {
            if !tail.is_empty() {
                write!(f, "; {what}: {}", last_lines(tail))?;
            }
        }
        Ok(())
    }
}

/// The end of a guest's or VMM's bytes as one printable line: escaped, because a guest wrote it, and cut short.
fn last_lines(tail: &[u8]) -> String {
    let start = tail.len().saturating_sub(400);
    tail[start..].trim_ascii().escape_ascii().to_string()
}

/// Starts shims.
#[derive(Debug)]
pub enum Shims {
    /// systemd does, one for each connection.
    Systemd {
        /// The socket.
        socket: PathBuf,
    },
    /// We do.
    Child {
        /// The program.
        program: PathBuf,
        /// Further arguments.
        args: Vec<String>,
    },
}

impl Shims {
    /// As the configuration says.
    pub fn new(config: &Config) -> Self {
        match config.shim {
            config::Shim::Systemd => Self::Systemd {
                socket: config.shim_socket.clone(),
            },
            config::Shim::Child => Self::Child {
                program: config.shim_program.clone(),
                args: config.shim_args.clone(),
            },
        }
    }

    /// Starts a shim and waits for its first packet.
    ///
    /// # Errors
    /// Any [`ShimFault`]; nothing is left.
    pub async fn start(&self) -> Result<ShimLink, ShimFault> {
        match self {
            Self::Systemd { socket } => connect(socket).await,
            Self::Child { program, args } => {
                let failed = |source| ShimFault::Unreachable {
                    at: program.clone(),
                    source,
                };
                let socket = spawn(program, args).map_err(failed)?;
                ShimLink::greet(PacketSocket::new(socket).map_err(failed)?).await
            }
        }
    }
}

/// Connects to a shim, a new one of systemd's or one that runs, and waits for its first packet.
///
/// # Errors
/// Any [`ShimFault`].
pub async fn connect(socket: &Path) -> Result<ShimLink, ShimFault> {
    let failed = |source| ShimFault::Unreachable {
        at: socket.into(),
        source,
    };
    let path = socket.to_owned();
    let connection = tokio::task::spawn_blocking(move || connect_packets(&path, Credentials::Wanted))
        .await
        .expect("connecting does not panic")
        .map_err(failed)?;
    ShimLink::greet(PacketSocket::new(connection).map_err(failed)?).await
}

/// Starts a shim as our child with one end of a socket pair as its standard input. A task of its own reaps it.
fn spawn(program: &Path, args: &[String]) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
    setsockopt(&ours, sockopt::PassCred, &true)?;
    nix::fcntl::fcntl(&ours, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK))?;
    let mut child = tokio::process::Command::new(program)
        .arg("--child")
        .args(args)
        .env_clear()
        .stdin(Stdio::from(theirs))
        // A process group of its own: a terminal's Ctrl-C is for the agent, not for the VMs.
        .process_group(0)
        .spawn()?;
    tokio::spawn(async move {
        match child.wait().await {
            Ok(status) if status.success() => {}
            Ok(status) => tracing::warn!(%status, "a vmmshim ended"),
            Err(error) => tracing::error!(%error, "cannot reap a vmmshim"),
        }
    });
    Ok(ours)
}

/// A connection to one shim.
#[derive(Debug)]
pub struct ShimLink {
    socket: PacketSocket,
    uid: u32,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    /// Nothing launched: dropping the connection ends the shim.
    Idle,
    /// Launched, or a launch is on its way: dropping kills the VMM.
    Launched,
    /// Its VMM has ended, the end has been told, or the link was let go: dropping does nothing.
    Over,
}

/// The end of a VMM as its link saw it.
#[derive(Debug)]
pub enum VmmEnd {
    /// The shim reported it.
    Reported(Box<Exit>),
    /// The shim itself has gone, and the VMM with it.
    ShimLost,
}

impl ShimLink {
    async fn greet(socket: PacketSocket) -> Result<Self, ShimFault> {
        let hello = tokio::time::timeout(HELLO_LIMIT, socket.receive::<FromShim>()).await;
        let (message, sender) = hello
            .map_err(|_| ShimFault::Timeout("say hello"))?
            .map_err(ShimFault::Connection)?;
        let FromShim::Hello { protocol } = message else {
            return Err(ShimFault::Protocol("its first packet is no hello"));
        };
        if protocol != PROTOCOL {
            return Err(ShimFault::Protocol("it speaks another version"));
        }
        let uid = sender
            .ok_or(ShimFault::Protocol("its first packet has no credentials"))?
            .uid;
        Ok(Self {
            socket,
            uid,
            phase: Phase::Idle,
        })
    }

    /// The uid that the VM runs as.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// Launches the VMM. From here on dropping the link kills it.
    ///
    /// # Errors
    /// Any [`ShimFault`].
    pub async fn launch(&mut self, launch: Launch) -> Result<Started, ShimFault> {
        self.phase = Phase::Launched;
        match self.ask(&ToShim::Launch(Box::new(launch))).await? {
            FromShim::Started(started) => Ok(started),
            _ => Err(ShimFault::Protocol("it did not answer a launch with its start")),
        }
    }

    /// Waits for the VMM's end. Safe to cancel.
    pub async fn ended(&mut self) -> VmmEnd {
        loop {
            match self.socket.receive::<FromShim>().await {
                Ok((FromShim::Exited(exit), _)) => {
                    self.phase = Phase::Over;
                    return VmmEnd::Reported(Box::new(exit));
                }
                // Late answers, as to the Kill of an earlier attempt.
                Ok((_, _)) => {}
                Err(error) => {
                    tracing::warn!(%error, "connection to a vmmshim lost");
                    self.phase = Phase::Over;
                    return VmmEnd::ShimLost;
                }
            }
        }
    }

    /// Kills the VMM, or ends a shim that has launched none, and waits until the shim has let go of everything: its connection
    /// ends only then.
    ///
    /// # Errors
    /// [`ShimFault::Timeout`] when it does not end.
    pub async fn kill(mut self) -> Result<Option<Exit>, ShimFault> {
        if !matches!(self.phase, Phase::Over) {
            // A shim that cannot be told has gone already, and so has its VMM.
            if let Err(error) = self.socket.send(&ToShim::Kill).await {
                tracing::debug!(%error, "vmmshim gone before it was told to kill");
            }
        }
        let gone = async {
            let mut reported = None;
            while let Ok((message, _)) = self.socket.receive::<FromShim>().await {
                if let FromShim::Exited(exit) = message {
                    reported = Some(exit);
                }
            }
            reported
        };
        let outcome = tokio::time::timeout(EXIT_LIMIT, gone).await;
        self.phase = Phase::Over;
        outcome.map_err(|_| ShimFault::Timeout("end its VMM"))
    }

    /// Gives the link up without harm to the VMM.
    pub fn let_go(mut self) {
        self.phase = Phase::Over;
    }

    async fn ask(&mut self, request: &ToShim) -> Result<FromShim, ShimFault> {
        let answer = async {
            self.socket.send(request).await?;
            self.socket.receive::<FromShim>().await
        };
        let (answer, _) = tokio::time::timeout(ANSWER_LIMIT, answer)
            .await
            .map_err(|_| ShimFault::Timeout("answer"))?
            .map_err(ShimFault::Connection)?;
        match answer {
            FromShim::Refused(error) => Err(ShimFault::Refused(error)),
            FromShim::Exited(exit) => {
                self.phase = Phase::Over;
                Err(ShimFault::Ended(ExitSummary(exit)))
            }
            answer => Ok(answer),
        }
    }
}

impl Drop for ShimLink {
    fn drop(&mut self) {
        if matches!(self.phase, Phase::Launched)
            && let Err(error) = ipc::send(self.socket.as_fd(), &ToShim::Kill)
        {
            tracing::error!(%error, "a VMM could not be killed; the next start of the agent does");
        }
    }
}
