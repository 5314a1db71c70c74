//! The agent's side of a vmmshim: start one, hear what VMM it has, launch that, hear of its end.
//!
//! A [`ShimLink`] that has not launched ends its shim when it is dropped, because the shim sees the end of the connection. One
//! that has launched is [killed](ShimLink::kill) by who holds it; one that is dropped all the same kills its VMM as well as a drop
//! can. An agent that ends drops nothing, so VMs outlive it.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use roost_common::ipc::{self, IpcError, PacketSocket, PassedFd};
use roost_common::shim::{
    Exit, FromShim, Launch, Lendable, PROTOCOL, ProgramId, ShimError, Started, Status, ToShim, VmSpec,
};

use super::privd::{Credentials, connect_packets};
use crate::config::{self, Config};
use crate::failpoint;
use crate::vmm::version::{self, OLDEST};

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
    /// Another version of roost started it, and it holds a VM that this one cannot talk to.
    #[error(
        "a roost of another version started this vmmshim (its messages are of version {0}, ours of {PROTOCOL}); that version can pause the sandbox, \
         and this one resume it"
    )]
    Version(u32),
    /// It took too long.
    #[error("the vmmshim did not {0} in time")]
    Timeout(&'static str),
    /// It refused.
    #[error("the vmmshim refused")]
    Refused(#[source] ShimError),
    /// The VMM that it would launch is one that must not run.
    #[error("it needs cloud-hypervisor {OLDEST} or newer, this host has {found:?}")]
    OldVmm {
        /// Its version, as it says.
        found: String,
    },
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
pub struct Shims {
    starter: Starter,
    /// What the program of the VMM said its version is, for as long as it is the same file.
    version: Mutex<Option<(ProgramId, String)>>,
}

#[derive(Debug)]
enum Starter {
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
        let starter = match config.shim {
            config::Shim::Systemd => Starter::Systemd {
                socket: config.shim_socket.clone(),
            },
            config::Shim::Child => Starter::Child {
                program: config.shim_program.clone(),
                args: config.shim_args.clone(),
            },
        };
        Self {
            starter,
            version: Mutex::default(),
        }
    }

    /// Starts a shim. Asks it for the version of its VMM where that may have been exchanged since another shim was asked.
    ///
    /// # Errors
    /// Any [`ShimFault`], [`ShimFault::OldVmm`] among them; nothing is left.
    pub async fn start(&self) -> Result<NewShim, ShimFault> {
        let (mut link, program) = self.greeted().await?;
        let known = self
            .version()
            .clone()
            .filter(|(known, _)| program.as_ref() == Some(known));
        let vmm_version = match known {
            Some((_, version)) => version,
            None => {
                let version = link.vmm_version().await?;
                *self.version() = program.map(|program| (program, version.clone()));
                version
            }
        };
        if version::may_run(&vmm_version) {
            Ok(NewShim {
                link,
                vmm_version,
                program,
            })
        } else {
            Err(ShimFault::OldVmm { found: vmm_version })
        }
    }

    /// Held for moments.
    fn version(&self) -> MutexGuard<'_, Option<(ProgramId, String)>> {
        self.version.lock().expect("nothing panics while it holds this")
    }

    async fn greeted(&self) -> Result<(ShimLink, Option<ProgramId>), ShimFault> {
        match &self.starter {
            Starter::Systemd { socket } => connect(socket).await,
            Starter::Child { program, args } => {
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

async fn connect(socket: &Path) -> Result<(ShimLink, Option<ProgramId>), ShimFault> {
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

/// Takes over the VM of the shim that listens at a socket: what was launched, and a link that holds it. `None` where no shim is.
///
/// # Errors
/// Any [`ShimFault`]; the VM is as it was.
pub async fn adopt(socket: &Path) -> Result<Option<(ShimLink, VmSpec)>, ShimFault> {
    let mut link = match connect(socket).await {
        Ok((link, _)) => link,
        Err(ShimFault::Unreachable { source, .. })
            if matches!(
                source.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    match link.ask(&ToShim::Status).await? {
        FromShim::Status(Status::Running { spec, started }) => {
            link.phase = Phase::Launched;
            link.runs_in(&started);
            Ok(Some((link, spec)))
        }
        // Its VMM has ended and it is about to: a shim listens only once it has launched.
        FromShim::Status(Status::Idle) => Ok(None),
        _ => Err(ShimFault::Protocol("it did not answer a question for its status")),
    }
}

/// A copy of a descriptor that the shim at a socket holds, over a connection that is there for this alone.
///
/// # Errors
/// Any [`ShimFault`].
pub async fn lend_at(socket: &Path, what: Lendable) -> Result<PassedFd, ShimFault> {
    let (mut link, _) = connect(socket).await?;
    match link.ask(&ToShim::Lend(what)).await? {
        FromShim::Lent(descriptor) => Ok(descriptor),
        _ => Err(ShimFault::Protocol("it did not lend what it was asked for")),
    }
}

/// Ends the shim that listens at a socket, and its VMM with it, and waits until it has let go of everything. Whether there was one.
///
/// # Errors
/// [`ShimFault::Timeout`] when it does not end, [`ShimFault::Unreachable`] when nobody can say whether there is one.
pub async fn end_at(socket: &Path) -> Result<bool, ShimFault> {
    let path = socket.to_owned();
    let connection = tokio::task::spawn_blocking(move || connect_packets(&path, Credentials::NotWanted));
    let failed = |source| ShimFault::Unreachable {
        at: socket.into(),
        source,
    };
    match connection.await.expect("connecting does not panic") {
        Ok(connection) => {
            // Without waiting for hello: a shim of another version is to end too, and Kill is the same in all of them.
            kill_and_wait(&PacketSocket::new(connection).map_err(failed)?, true).await?;
            Ok(true)
        }
        // No socket, or nobody behind it: the shim has gone, and its VMM with it.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => Ok(false),
        Err(error) => Err(failed(error)),
    }
}

async fn kill_and_wait(socket: &PacketSocket, tell: bool) -> Result<(), ShimFault> {
    let gone = async {
        // A shim that cannot be told has gone already, and so has its VMM.
        if tell && let Err(error) = socket.send(&ToShim::Kill).await {
            tracing::debug!(%error, "vmmshim gone before it was told to kill");
        }
        loop {
            match socket.receive::<FromShim>().await {
                Err(IpcError::Closed) => return Ok(()),
                Err(error @ IpcError::Socket(_)) => return Err(ShimFault::Connection(error)),
                // Last words, also in a version that we do not know.
                Ok(_) | Err(_) => {}
            }
        }
    };
    tokio::time::timeout(EXIT_LIMIT, gone)
        .await
        .map_err(|_| ShimFault::Timeout("end its VMM"))?
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

/// A shim that was started, and has launched nothing yet.
#[derive(Debug)]
pub struct NewShim {
    /// The connection to it.
    pub link: ShimLink,
    /// The version of the VMM that it launches, as that says. No guest has a say in it.
    pub vmm_version: String,
    /// Which file said so.
    program: Option<ProgramId>,
}

impl NewShim {
    /// Whether it is still there, and the VMM that it launches still the one that it was when it started.
    pub(super) async fn is_as_it_was(&mut self) -> bool {
        match self.link.ask(&ToShim::Program).await {
            Ok(FromShim::Program(program)) => program == self.program,
            Ok(_) => false,
            Err(error) => {
                tracing::info!(%error, "a shim that was kept ready is of no use any more");
                false
            }
        }
    }
}

/// A connection to one shim.
#[derive(Debug)]
pub struct ShimLink {
    socket: PacketSocket,
    uid: u32,
    phase: Phase,
    /// The VMM's cgroup, where it has one of its own.
    cgroup: Option<PathBuf>,
}

#[derive(Debug)]
enum Phase {
    /// Nothing launched: dropping the connection ends the shim.
    Idle,
    /// Launched, or a launch is on its way: dropping kills the VMM.
    Launched,
    /// Its VMM has ended, or has been told to: dropping does nothing.
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
    /// Takes a shim's first packet: the link, and which VMM it has.
    async fn greet(socket: PacketSocket) -> Result<(Self, Option<ProgramId>), ShimFault> {
        let hello = tokio::time::timeout(HELLO_LIMIT, socket.receive::<FromShim>()).await;
        let (message, sender) = hello
            .map_err(|_| ShimFault::Timeout("say hello"))?
            .map_err(ShimFault::Connection)?;
        let FromShim::Hello { protocol, vmm } = message else {
            return Err(ShimFault::Protocol("its first packet is no hello"));
        };
        if protocol != PROTOCOL {
            return Err(ShimFault::Version(protocol));
        }
        let uid = sender
            .ok_or(ShimFault::Protocol("its first packet has no credentials"))?
            .uid;
        let link = Self {
            socket,
            uid,
            phase: Phase::Idle,
            cgroup: None,
        };
        Ok((link, vmm))
    }

    /// The uid that the VM runs as.
    pub fn uid(&self) -> u32 {
        self.uid
    }

    async fn vmm_version(&mut self) -> Result<String, ShimFault> {
        match self.ask(&ToShim::Version).await? {
            FromShim::Version(said) => Ok(version::of_words(&said)),
            _ => Err(ShimFault::Protocol(
                "it did not answer a question for its VMM's version",
            )),
        }
    }

    /// Launches the VMM. From here on dropping the link kills it.
    ///
    /// # Errors
    /// Any [`ShimFault`].
    pub async fn launch(&mut self, launch: Launch) -> Result<Started, ShimFault> {
        self.phase = Phase::Launched;
        match self.ask(&ToShim::Launch(Box::new(launch))).await? {
            FromShim::Started(started) => {
                self.runs_in(&started);
                Ok(started)
            }
            _ => Err(ShimFault::Protocol("it did not answer a launch with its start")),
        }
    }

    /// The VMM's cgroup, where it has one of its own: a VMM of our own uid was started in ours.
    pub fn cgroup(&self) -> Option<&Path> {
        self.cgroup.as_deref()
    }

    fn runs_in(&mut self, started: &Started) {
        let path = started.cgroup.trim_start_matches('/');
        // The shim's word, and it becomes a path of ours: only a plain one is taken.
        let plain = !path.is_empty() && path.split('/').all(|name| !matches!(name, "" | "." | ".."));
        let own = self.uid != nix::unistd::geteuid().as_raw();
        self.cgroup = (own && plain).then(|| Path::new("/sys/fs/cgroup").join(path));
    }

    /// A descriptor that the shim has: a copy, or of a file that it opens.
    ///
    /// # Errors
    /// Any [`ShimFault`].
    pub async fn lend(&mut self, what: Lendable) -> Result<OwnedFd, ShimFault> {
        match self.ask(&ToShim::Lend(what)).await? {
            FromShim::Lent(descriptor) => descriptor
                .into_owned()
                .map_err(|error| ShimFault::Connection(IpcError::Socket(error))),
            _ => Err(ShimFault::Protocol("it did not lend what it was asked for")),
        }
    }

    /// Opens the files of a snapshot attempt to us.
    ///
    /// # Errors
    /// Any [`ShimFault`].
    pub async fn publish(&mut self, attempt: u32) -> Result<(), ShimFault> {
        match self.ask(&ToShim::Publish { attempt }).await? {
            FromShim::Published => Ok(()),
            _ => Err(ShimFault::Protocol("it did not answer a question to publish")),
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
                    // Only a closed connection says that the VMM has gone too; of any other it is still to be killed.
                    if matches!(error, IpcError::Closed) {
                        self.phase = Phase::Over;
                    }
                    return VmmEnd::ShimLost;
                }
            }
        }
    }

    /// The VMM's end, if it has come: the shim is asked, because the end of its connection may lag behind its own by as long as
    /// systemd takes to end what else is in its unit. `None` too where no answer comes in time: who holds the link hears of it later.
    pub async fn end_by_now(&mut self) -> Option<VmmEnd> {
        let answer = self.ask(&ToShim::Status).await;
        let end = match answer {
            Ok(_) | Err(ShimFault::Timeout(_)) => return None,
            Err(ShimFault::Ended(ExitSummary(exit))) => VmmEnd::Reported(Box::new(exit)),
            Err(error) => {
                tracing::warn!(%error, "a vmmshim does not say how its VMM is");
                // As in `ended`.
                if matches!(error, ShimFault::Connection(IpcError::Closed)) {
                    self.phase = Phase::Over;
                }
                VmmEnd::ShimLost
            }
        };
        Some(end)
    }

    /// Kills the VMM, or ends a shim that has launched none, and waits until the shim has let go of everything: its connection
    /// ends only then.
    ///
    /// # Errors
    /// [`ShimFault::Timeout`] when it does not end. [`end_at`] then leads back to it.
    pub async fn kill(mut self) -> Result<(), ShimFault> {
        let told = !matches!(self.phase, Phase::Over);
        self.phase = Phase::Over;
        kill_and_wait(&self.socket, told).await
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
        if failpoint::loses("shim") {
            return Err(ShimFault::Timeout("answer"));
        }
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

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use roost_common::shim::WaitStatus;

    use super::*;

    fn pair() -> (PacketSocket, OwnedFd) {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).expect("a socket pair");
        (PacketSocket::new(ours).expect("registered"), theirs)
    }

    fn link(phase: Phase) -> (ShimLink, OwnedFd) {
        let (socket, theirs) = pair();
        let link = ShimLink {
            socket,
            uid: 1,
            phase,
            cgroup: None,
        };
        (link, theirs)
    }

    fn asked(theirs: &OwnedFd) -> Option<ToShim> {
        ipc::receive(theirs.as_fd()).ok().map(|(request, _)| request)
    }

    /// Sends what no shim of ours would.
    fn send_garbage(theirs: &OwnedFd) {
        let duplicate = theirs.try_clone().expect("duplicated");
        UnixDatagram::from(duplicate).send(&[0xff; 8]).expect("sent");
    }

    #[tokio::test]
    async fn where_no_shim_listens_there_is_none_to_end() {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("shim.sock");
        assert!(!end_at(&socket).await.expect("no socket"));
        drop(std::os::unix::net::UnixListener::bind(&socket).expect("bound"));
        assert!(!end_at(&socket).await.expect("nobody listens any more"));
    }

    #[tokio::test]
    async fn a_link_that_is_dropped_kills_what_it_launched_and_nothing_else() {
        let (idle, theirs) = link(Phase::Idle);
        drop(idle);
        assert!(asked(&theirs).is_none());
        let (launched, theirs) = link(Phase::Launched);
        drop(launched);
        assert!(matches!(asked(&theirs), Some(ToShim::Kill)));
    }

    #[tokio::test]
    async fn a_shim_says_what_version_its_vmm_is_of() {
        for (answer, version) in [
            (FromShim::Version(b"cloud-hypervisor v52.0\n".to_vec()), Ok("v52.0")),
            (FromShim::Version(Vec::new()), Ok("")),
            (
                FromShim::Killed,
                Err("the vmmshim broke the protocol: it did not answer a question for its VMM's version"),
            ),
        ] {
            let (mut idle, theirs) = link(Phase::Idle);
            ipc::send(theirs.as_fd(), &answer).expect("sent");
            let said = idle.vmm_version().await.map_err(|fault| fault.to_string());
            assert_eq!(said, version.map(String::from).map_err(String::from));
            assert!(matches!(asked(&theirs), Some(ToShim::Version)));
        }
    }

    #[tokio::test]
    async fn a_shim_of_another_version_is_known_by_it_and_told_nothing() {
        let (socket, theirs) = pair();
        let hello = FromShim::Hello {
            protocol: PROTOCOL + 1,
            vmm: None,
        };
        ipc::send(theirs.as_fd(), &hello).expect("sent");
        let fault = ShimLink::greet(socket).await.expect_err("refused");
        assert!(
            matches!(fault, ShimFault::Version(version) if version == PROTOCOL + 1),
            "{fault}"
        );
        assert!(asked(&theirs).is_none(), "a VM that may be somebody's was ended");
    }

    #[tokio::test]
    async fn a_vmm_that_has_ended_is_known_before_its_shims_connection_ends() {
        let exit = Exit {
            wait: WaitStatus::Signaled(9),
            oom_kills: 0,
            console: Vec::new(),
            log: Vec::new(),
        };
        let (mut held, theirs) = link(Phase::Launched);
        ipc::send(theirs.as_fd(), &FromShim::Status(Status::Idle)).expect("sent");
        assert!(held.end_by_now().await.is_none());
        assert!(matches!(asked(&theirs), Some(ToShim::Status)));
        ipc::send(theirs.as_fd(), &FromShim::Exited(exit.clone())).expect("sent");
        assert!(matches!(held.end_by_now().await, Some(VmmEnd::Reported(end)) if *end == exit));
        let (mut held, theirs) = link(Phase::Launched);
        drop(theirs);
        assert!(matches!(held.end_by_now().await, Some(VmmEnd::ShimLost)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_shim_that_does_not_answer_is_not_taken_for_one_that_has_gone() {
        let (mut held, theirs) = link(Phase::Launched);
        assert!(held.end_by_now().await.is_none());
        assert!(matches!(asked(&theirs), Some(ToShim::Status)));
    }

    #[tokio::test]
    async fn only_a_closed_connection_means_that_the_vmm_has_gone() {
        let (mut launched, theirs) = link(Phase::Launched);
        send_garbage(&theirs);
        assert!(matches!(launched.ended().await, VmmEnd::ShimLost));
        let killed = tokio::spawn(launched.kill());
        let told = tokio::task::spawn_blocking(move || {
            let kill = std::iter::repeat_with(|| {
                std::thread::yield_now();
                asked(&theirs)
            })
            .find_map(|request| request);
            // Last words that nobody can read, then the end.
            send_garbage(&theirs);
            kill
        });
        assert!(matches!(told.await.expect("no panic"), Some(ToShim::Kill)));
        killed.await.expect("no panic").expect("ended");
    }
}
