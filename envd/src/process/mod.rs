//! The processes that callers started: which there are, who reads their output, how they are fed, signalled and ended.
//!
//! | module | holds |
//! |---|---|
//! | [`service`] | the Connect service: requests checked, errors given their codes |
//! | [`spawn`], [`child`] | from a request to a running program; what runs between fork and exec |
//! | [`drive`] | output, deadline and exit of one process |
//! | [`input`] | its standard input |
//! | [`reaper`] | the only waitpid of envd |
//!
//! Not here: terminals, and replay of output to a client that comes back.

pub(crate) mod child;
mod drive;
mod input;
pub(crate) mod reaper;
pub(crate) mod service;
pub(crate) mod spawn;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use nix::sys::signal::Signal;
use roost_common::guest::process::process_event::{EndEvent, StartEvent};
use roost_common::guest::process::process_selector::Selector;
use roost_common::guest::process::{ProcessConfig, ProcessEvent, ProcessInfo};
use tokio::net::unix::pipe;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;

use self::drive::{Ends, drive};
use self::input::Stdin;
use self::reaper::Reaper;
use self::spawn::{Plan, SpawnError, spawn};

/// Processes that callers may have at a time. What these start themselves is the guest's own affair.
const MAX_PROCESSES: usize = 1024;

/// Clients that may read one process at a time.
const MAX_CLIENTS: usize = 16;

/// Events that wait for one client. With chunks of 32 KiB this is all the memory that a slow client costs.
const QUEUE: usize = 4;

/// The processes that have not ended.
pub(crate) struct Processes {
    reaper: Arc<Reaper>,
    room: Arc<Semaphore>,
    live: Mutex<Live>,
}

/// In the order in which they started: pids and tags can come again, and then the newest is meant.
#[derive(Default)]
struct Live {
    next: u64,
    processes: BTreeMap<u64, Arc<Process>>,
}

/// One process.
pub(crate) struct Process {
    pid: u32,
    config: ProcessConfig,
    tag: Option<String>,
    stdin: Stdin,
    /// `None` once `end` has been published.
    clients: Mutex<Option<Vec<mpsc::Sender<ProcessEvent>>>>,
    _room: OwnedSemaphorePermit,
}

/// What a client reads: `start`, data, `end`.
pub(crate) type Events = mpsc::Receiver<ProcessEvent>;

impl Processes {
    pub(crate) fn new(reaper: Arc<Reaper>) -> Self {
        Self {
            reaper,
            room: Arc::new(Semaphore::new(MAX_PROCESSES)),
            live: Mutex::default(),
        }
    }

    /// Starts a process, and accompanies it on the runtime until it ends, whatever becomes of the caller. Blocks for a
    /// fork and an exec.
    ///
    /// # Errors
    /// Nothing was started, or it has been reaped.
    pub(crate) fn start(
        self: &Arc<Self>,
        plan: &Plan,
        config: ProcessConfig,
        tag: Option<String>,
        deadline: Option<Instant>,
    ) -> Result<Events, SpawnError> {
        let room = Arc::clone(&self.room)
            .try_acquire_owned()
            .map_err(|_| SpawnError::TooMany(MAX_PROCESSES))?;
        let spawned = spawn(&self.reaper, plan)?;
        // Cannot fail: they are pipes, and we are on a runtime.
        let receiver = |fd| pipe::Receiver::from_owned_fd(fd).expect("a pipe of std can be read by tokio");
        let stdin = spawned
            .stdin
            .map(|fd| pipe::Sender::from_owned_fd(fd).expect("a pipe of std can be written by tokio"));
        let (client, events) = mpsc::channel(QUEUE);
        client.try_send(start_event(spawned.pid)).expect("a new queue has room");
        let process = Arc::new(Process {
            pid: spawned.pid,
            config,
            tag,
            stdin: Stdin::new(stdin),
            clients: Mutex::new(Some(vec![client])),
            _room: room,
        });
        let ends = Ends {
            stdout: receiver(spawned.stdout),
            stderr: receiver(spawned.stderr),
            exit: spawned.exit,
            deadline,
        };
        let number = self.live().add(Arc::clone(&process));
        let processes = Arc::clone(self);
        Handle::current().spawn(drive(Arc::clone(&process), Arc::clone(&self.reaper), ends, move || {
            processes.live().processes.remove(&number);
            process.stdin.close();
        }));
        Ok(events)
    }

    /// The process that `selector` names; of several with one tag, the newest.
    fn find(&self, selector: &Selector) -> Option<Arc<Process>> {
        let is_meant = |process: &Process| match selector {
            Selector::Pid(pid) => process.pid == *pid,
            Selector::Tag(tag) => process.tag.as_ref() == Some(tag),
        };
        self.live()
            .processes
            .values()
            .rev()
            .find(|process| is_meant(process))
            .cloned()
    }

    fn list(&self) -> Vec<ProcessInfo> {
        let info = |process: &Arc<Process>| ProcessInfo {
            config: process.config.clone().into(),
            pid: process.pid,
            tag: process.tag.clone(),
            ..Default::default()
        };
        self.live().processes.values().map(info).collect()
    }

    /// Signals the process and what is in its process group. `false` when it has ended.
    fn signal(&self, process: &Process, signal: Signal) -> bool {
        self.reaper.signal_group(process.pid, signal)
    }

    /// Kills all of them.
    pub(crate) fn kill_all(&self) {
        for process in self.live().processes.values() {
            self.signal(process, Signal::SIGKILL);
        }
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().expect("no holder of the process table panics")
    }
}

impl Live {
    fn add(&mut self, process: Arc<Process>) -> u64 {
        let number = self.next;
        self.next += 1;
        self.processes.insert(number, process);
        number
    }
}

/// Why a client cannot attach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AttachError {
    Ended,
    TooMany,
}

impl Process {
    /// Adds a client, which gets everything from now on.
    fn attach(&self) -> Result<Events, AttachError> {
        let mut clients = self.clients();
        let clients = clients.as_mut().ok_or(AttachError::Ended)?;
        clients.retain(|client| !client.is_closed());
        if clients.len() >= MAX_CLIENTS {
            return Err(AttachError::TooMany);
        }
        let (client, events) = mpsc::channel(QUEUE);
        client.try_send(start_event(self.pid)).expect("a new queue has room");
        clients.push(client);
        Ok(events)
    }

    /// Hands an event to every client, waiting for those whose queue is full.
    async fn publish(&self, event: ProcessEvent) {
        let clients = self.clients().as_ref().cloned().unwrap_or_default();
        let Some((last, others)) = clients.split_last() else {
            return;
        };
        for client in others {
            // An error is a client that has left; attach() forgets it.
            client.send(event.clone()).await.ok();
        }
        last.send(event).await.ok();
    }

    /// Hands `end` to every client; from now on nobody can attach.
    async fn publish_end(&self, end: EndEvent) {
        let clients = self.clients().take().unwrap_or_default();
        for client in clients {
            client
                .send(ProcessEvent {
                    event: end.clone().into(),
                    ..Default::default()
                })
                .await
                .ok();
        }
    }

    fn clients(&self) -> MutexGuard<'_, Option<Vec<mpsc::Sender<ProcessEvent>>>> {
        self.clients.lock().expect("no holder of a process's clients panics")
    }
}

fn start_event(pid: u32) -> ProcessEvent {
    ProcessEvent {
        event: StartEvent {
            pid,
            ..Default::default()
        }
        .into(),
        ..Default::default()
    }
}
