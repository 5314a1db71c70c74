//! The shim's loop: one thread, poll, and nothing that a peer or the VMM could make it wait for.
//!
//! ```text
//! Idle --Launch--> Running --VMM ends--> report, write the exit record, end
//!   |                 |
//!   EOF, Kill,        EOF: nothing changes
//!   SIGTERM: end      Kill, SIGTERM: SIGKILL to the VMM
//! ```
//!
//! A connection that cannot take a packet, or sends one that does not decode, is dropped; so is the oldest one where there are
//! [`MAX_CONNECTIONS`] already, so that a new agent always gets in. One whose peer has gone is served to its end: the last that an agent
//! has said may be Kill, and nobody else would say it again before the next agent starts.
//!
//! A launch that nobody can be told of is undone at once: an agent that has not heard of it ends it when it finds it, whatever its record
//! says, and until there is one it would run for nobody. (Where the agent goes with the answer unread, that is left to the next.)

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{Shutdown, getsockopt, shutdown, sockopt};
use nix::unistd::getuid;
use roost_common::ipc::{self, IpcError};
use roost_common::ring::MAX_WRITE;
use roost_common::shim::{FromShim, PROTOCOL, ProgramId, ShimError, Status, ToShim};

use crate::Options;
use crate::launch::{self, launch};
use crate::version::version;
use crate::vm::{Cgroup, Vm};

/// Agents at once: one, its successor, and some to look at it with.
const MAX_CONNECTIONS: usize = 4;

/// The life of a shim.
enum State {
    Idle,
    Running(Box<Vm>),
}

/// Whether to go on.
#[derive(PartialEq, Eq)]
enum Then {
    Go,
    End,
}

/// What poll found.
#[derive(Default)]
struct Ready {
    connections: Vec<usize>,
    outputs: Vec<usize>,
    listener: bool,
    ended: bool,
    terminate: bool,
}

struct Shim {
    options: Options,
    signals: SignalFd,
    state: State,
    /// Last of what is held, so last to be closed: an agent takes the end of its connection to mean that disk and tap are free.
    connections: VecDeque<OwnedFd>,
    buffer: Vec<u8>,
}

/// Serves the agent's connection, and later ones, until the VMM has ended or there is nobody left to launch one.
///
/// # Errors
/// The loop's own system calls.
pub(crate) fn serve(options: Options, connection: OwnedFd) -> io::Result<()> {
    let mut shim = Shim {
        options,
        signals: terminations()?,
        state: State::Idle,
        connections: VecDeque::new(),
        buffer: vec![0; MAX_WRITE],
    };
    shim.welcome(connection)?;
    loop {
        // Also when the agent was gone before it could be told hello.
        if matches!(shim.state, State::Idle) && shim.connections.is_empty() {
            return Ok(());
        }
        let ready = shim.wait()?;
        // From the last one, because serving one may remove it.
        for &index in ready.connections.iter().rev() {
            if shim.serve(index) == Then::End {
                return Ok(());
            }
        }
        let State::Running(vm) = &mut shim.state else {
            if ready.terminate {
                return Ok(());
            }
            continue;
        };
        if ready.terminate && shim.signals.read_signal()?.is_some() {
            crate::log!("sandbox_id={}: SIGTERM, the VMM is killed", vm.spec.sandbox);
            vm.kill();
        }
        for index in ready.outputs {
            vm.copy(index, &mut shim.buffer);
        }
        if ready.ended {
            shim.report();
            return Ok(());
        }
        if ready.listener {
            shim.accept();
        }
    }
}

/// Whether this process may open KVM. What its unit lets it open was settled when it was started: where the module was being loaded anew
/// just then, the device was not there to be let through.
fn can_run_a_vm() -> bool {
    File::options().read(true).write(true).open("/dev/kvm").is_ok()
}

/// SIGTERM as something to poll: systemd stops the shim with it, alone, and the VMM's end is to be reported.
fn terminations() -> io::Result<SignalFd> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.thread_block()?; // the child empties its mask before exec
    Ok(SignalFd::with_flags(
        &signals,
        SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK,
    )?)
}

impl Shim {
    /// Waits until something can be done.
    fn wait(&self) -> io::Result<Ready> {
        enum Source {
            Connection(usize),
            Output(usize),
            Listener,
            Process,
            Signal,
        }
        let mut sources: Vec<(Source, PollFd<'_>)> = Vec::new();
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        sources.push((Source::Signal, readable(self.signals.as_fd())));
        for (index, connection) in self.connections.iter().enumerate() {
            sources.push((Source::Connection(index), readable(connection.as_fd())));
        }
        if let State::Running(vm) = &self.state {
            for (index, output) in vm.outputs.iter().enumerate() {
                if let Some(pipe) = &output.pipe {
                    sources.push((Source::Output(index), readable(pipe.as_fd())));
                }
            }
            sources.push((Source::Listener, readable(vm.listener.as_fd())));
            sources.push((Source::Process, readable(vm.process.pidfd.as_fd())));
        }
        let (sources, mut polled): (Vec<_>, Vec<_>) = sources.into_iter().unzip();
        match poll(&mut polled, PollTimeout::NONE) {
            Err(Errno::EINTR) => return Ok(Ready::default()),
            outcome => outcome?,
        };
        let mut ready = Ready::default();
        for (source, _) in sources.iter().zip(&polled).filter(|(_, fd)| fd.any().unwrap_or(true)) {
            match source {
                Source::Connection(index) => ready.connections.push(*index),
                Source::Output(index) => ready.outputs.push(*index),
                Source::Listener => ready.listener = true,
                Source::Process => ready.ended = true,
                Source::Signal => ready.terminate = true,
            }
        }
        Ok(ready)
    }

    /// Takes a connection and says hello; a peer that cannot take even that is left alone.
    fn welcome(&mut self, connection: OwnedFd) -> io::Result<()> {
        fcntl(&connection, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        if self.connections.len() == MAX_CONNECTIONS {
            self.connections.pop_front();
        }
        let hello = FromShim::Hello {
            protocol: PROTOCOL,
            vmm: self.program(),
        };
        match ipc::send(connection.as_fd(), &hello) {
            Ok(()) | Err(IpcError::Closed) => self.connections.push_back(connection),
            Err(error) => crate::log!("connection dropped: {error}"),
        }
        Ok(())
    }

    /// Which file the VMM's program is.
    fn program(&self) -> Option<ProgramId> {
        ProgramId::of(&self.options.vmm).ok()
    }

    /// Accepts all that wait at `shim.sock`, so that an agent never waits behind others for another turn of the loop. The
    /// directory admits only the agent and this uid, and under PrivateUsers= every foreign uid reads as the overflow uid, so what
    /// can be refused is this uid: it is the VMM's, unless this is the agent's child. That is refused without a word: the VMM
    /// could fill the journal by it.
    fn accept(&mut self) {
        // Bounded: somebody who connects as fast as we accept must not keep us from everything else.
        for _ in 0..launch::BACKLOG {
            let State::Running(vm) = &self.state else { return };
            let stream = match vm.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // One of a connection that is gone again, as likely as not: the next turn of the loop looks again.
                Err(error) => return crate::log!("cannot accept a connection: {error}"),
            };
            let foreign = getsockopt(&stream, sockopt::PeerCredentials).map(|peer| peer.uid() != getuid().as_raw());
            let outcome = match foreign {
                Ok(true) => self.welcome(stream.into()),
                Ok(false) if self.options.child => self.welcome(stream.into()),
                Ok(false) => Ok(()),
                Err(errno) => Err(errno.into()),
            };
            if let Err(error) = outcome {
                crate::log!("a connection was refused: {error}");
            }
        }
    }

    /// Answers one request of one connection, which is dropped where it breaks the rules or cannot take the answer.
    fn serve(&mut self, index: usize) -> Then {
        let receive = || ipc::receive(self.connections[index].as_fd());
        let received = match receive() {
            Err(IpcError::Socket(error)) if error.kind() == io::ErrorKind::WouldBlock => return Then::Go,
            // A peer that goes with something of ours unread is told as gone first, and then what it had said.
            Err(IpcError::Closed) => receive().map_err(|_| IpcError::Closed),
            received => received,
        };
        let request = match received {
            Ok((request, _)) => request,
            Err(error) => {
                if !matches!(error, IpcError::Closed) {
                    crate::log!("connection dropped: {error}");
                }
                self.connections.remove(index);
                return Then::Go;
            }
        };
        let (answer, then) = self.answer(request);
        match ipc::send(self.connections[index].as_fd(), &answer) {
            Ok(()) => return then,
            Err(IpcError::Closed) => {}
            Err(error) => {
                crate::log!("connection dropped: {error}");
                self.connections.remove(index);
            }
        }
        if let (FromShim::Started(_), State::Running(vm)) = (answer, &self.state) {
            crate::log!(
                "sandbox_id={}: nobody can be told that its VMM runs, it is killed",
                vm.spec.sandbox
            );
            vm.kill();
        }
        then
    }

    fn answer(&mut self, request: ToShim) -> (FromShim, Then) {
        let answer = match (&self.state, request) {
            (State::Idle, ToShim::Launch(request)) => match launch(&self.options, *request) {
                Ok(vm) => {
                    let (id, pid, profile) = (&vm.spec.sandbox, vm.started.pid, &self.options.profile.name);
                    crate::log!("sandbox_id={id} vmm_pid={pid}: VMM started under the profile {profile}");
                    let started = vm.started.clone();
                    self.state = State::Running(Box::new(vm));
                    FromShim::Started(started)
                }
                Err(error) => {
                    crate::log!("launch refused: {error}");
                    FromShim::Refused(error)
                }
            },
            (State::Running(_), ToShim::Launch(_)) => FromShim::Refused(ShimError::AlreadyLaunched),
            (State::Idle, ToShim::Version) => match version(&self.options) {
                Ok(said) => FromShim::Version(said),
                Err(error) => {
                    crate::log!("the VMM does not say its version: {error}");
                    FromShim::Refused(error)
                }
            },
            (State::Idle, ToShim::Program) => FromShim::Program(self.program().filter(|_| can_run_a_vm())),
            (State::Running(_), ToShim::Version | ToShim::Program) => FromShim::Refused(ShimError::AlreadyLaunched),
            (State::Idle, ToShim::Status) => FromShim::Status(Status::Idle),
            (State::Running(vm), ToShim::Status) => FromShim::Status(vm.status()),
            (State::Idle, ToShim::Kill) => return (FromShim::Killed, Then::End),
            (State::Running(vm), ToShim::Kill) => {
                vm.kill();
                FromShim::Killed
            }
            (State::Idle, ToShim::Lend(_) | ToShim::Publish { .. }) => FromShim::Refused(ShimError::NotRunning),
            (State::Running(vm), ToShim::Lend(what)) => match vm.lend(what) {
                Ok(descriptor) => FromShim::Lent(descriptor.into()),
                Err(error) => FromShim::Refused(error),
            },
            (State::Running(vm), ToShim::Publish { attempt }) => match vm.publish(attempt) {
                Ok(()) => FromShim::Published,
                Err(error) => FromShim::Refused(error),
            },
        };
        (answer, Then::Go)
    }

    /// Tells everybody how the VMM ended.
    fn report(&mut self) {
        let State::Running(vm) = &mut self.state else { return };
        let cgroup = if self.options.child {
            Cgroup::Shared
        } else {
            Cgroup::Own
        };
        let exit = vm.reap(&mut self.buffer, cgroup);
        crate::log!("sandbox_id={}: VMM ended: {}", vm.spec.sandbox, exit.wait);
        for connection in &self.connections {
            if let Err(error) = ipc::send(connection.as_fd(), &FromShim::Exited(exit.clone())) {
                crate::log!("connection not told: {error}");
                continue;
            }
            // A socket closed with unread requests in it resets its peer, which then does not get to see our last packet: no more
            // requests from here on, and read away those that are there.
            shutdown(connection.as_raw_fd(), Shutdown::Read).ok();
            while ipc::receive::<ToShim>(connection.as_fd()).is_ok() {}
        }
    }
}
