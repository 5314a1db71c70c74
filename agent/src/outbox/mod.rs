//! Lifecycle events on their way to the control plane: kept on disk until somebody has taken them.
//!
//! ```text
//! a sandbox's task -- put --> inbox --> log (events.log, synced) --> backlog --> run --> Deliver
//!                      ^                  |                             ^          |
//!                      +--- kept ---------+        a start reads it ----+          +--> gone (log, not synced)
//! ```
//!
//! Holds: an event that was put survives `kill -9` and power failure; it is delivered at least once, and again only where an agent
//! ended between a delivery and the note of it; a sandbox's events are delivered in the order in which they were put, one at a
//! time. Disk and memory are bounded by [`Limits`], and what is dropped for that is counted and logged.
//!
//! One log that is appended to, rather than a file for each event, because an event then costs one sync instead of two (file and
//! directory), and one sync serves all that are put meanwhile: a host that drains puts hundreds at once. No cursor into it either:
//! sandboxes do not wait for each other, so what is gone has no common end; it is noted in the same log. The format is in
//! `log`; whose turn it is and what is dropped in `backlog`; delivery in `deliver`.
//!
//! Not here: how events reach the control plane (a [`Deliver`]), and which are worth one (the sandboxes' tasks know).

mod backlog;
mod deliver;
mod log;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use roost_common::ids::SandboxId;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, oneshot};

use crate::errors::{Chain, FileError};
use backlog::Backlog;
pub use deliver::{Deliver, Delivery, run};
use log::{Durable, Log};

/// Longest error text in an event, in characters: the start of it, where the cause's name is.
const MAX_ERROR: usize = 400;
/// Largest event, as JSON.
const MAX_EVENT: usize = 2048;
/// Most events that wait for the disk at a time. Tasks put one at a time, so more than this is a disk that hangs.
const MAX_WAITING: usize = 8192;

/// What happened to a sandbox, by the control plane's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum EventKind {
    /// It was created and runs.
    #[serde(rename = "sandbox.started")]
    Started,
    /// It runs again.
    #[serde(rename = "sandbox.resumed")]
    Resumed,
    /// It was paused by request.
    #[serde(rename = "sandbox.paused")]
    Paused,
    /// It was paused for want of use, or because the host shuts down.
    #[serde(rename = "sandbox.auto_paused")]
    AutoPaused,
    /// It was destroyed.
    #[serde(rename = "sandbox.stopped")]
    Stopped,
    /// It could not be created.
    #[serde(rename = "sandbox.failed")]
    Failed,
    /// Its VM ended by itself.
    #[serde(rename = "sandbox.error")]
    Error,
    /// It could not be paused.
    #[serde(rename = "sandbox.pause_failed")]
    PauseFailed,
    /// It could not be resumed.
    #[serde(rename = "sandbox.resume_failed")]
    ResumeFailed,
}

impl EventKind {
    /// Whether nothing of the sandbox is left after it, so that it says all that a receiver must know.
    fn is_terminal(self) -> bool {
        match self {
            Self::Stopped | Self::Failed | Self::Error => true,
            Self::Started
            | Self::Resumed
            | Self::Paused
            | Self::AutoPaused
            | Self::PauseFailed
            | Self::ResumeFailed => false,
        }
    }
}

/// A lifecycle event. Its JSON is the control plane's, without the host's id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// What happened.
    pub event: EventKind,
    /// To which sandbox.
    pub sandbox_id: SandboxId,
    /// Why, where something went wrong. A guest may have written parts of it, so [`Outbox::put`] escapes it and cuts it to 400
    /// characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// When, in seconds since 1970.
    #[serde(rename = "timestamp")]
    pub timestamp_unix: i64,
    /// Where the sandbox can be reached on this host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<String>,
}

impl Event {
    /// An event with neither error nor address.
    pub fn new(event: EventKind, sandbox_id: SandboxId, timestamp_unix: i64) -> Self {
        Self {
            event,
            sandbox_id,
            error: None,
            timestamp_unix,
            host_ip: None,
        }
    }
}

/// How much an outbox keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most events.
    pub events: usize,
    /// Most bytes of them. The log grows to about twice this and 64 KiB before it is written anew, which for a moment takes as much
    /// again as is kept.
    pub bytes: u64,
}

impl Default for Limits {
    /// 10,000 events in 16 MiB: some days of a busy host.
    fn default() -> Self {
        Self {
            events: 10_000,
            bytes: 16 << 20,
        }
    }
}

/// Why there is no outbox, or why an event is not in it.
#[derive(Debug, thiserror::Error)]
pub enum OutboxError {
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// Another process, or this one, has it open.
    #[error("the outbox {} is in use", path.display())]
    InUse {
        /// Its directory.
        path: PathBuf,
    },
    /// Another version wrote it.
    #[error("{} is of version {version}, which this agent does not know", path.display())]
    Version {
        /// The log.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// The event is larger than any of ours.
    #[error("an event of {bytes} bytes is larger than {MAX_EVENT}")]
    TooLarge {
        /// Its size as JSON.
        bytes: usize,
    },
    /// The disk is behind: as many events as may wait for it do.
    #[error("{MAX_WAITING} events wait for the disk")]
    Behind,
    /// The event could not be written. It may be delivered all the same after a restart.
    #[error("the event was not kept")]
    NotKept(#[source] Arc<FileError>),
}

/// The outbox. Clones are the same one; its lock is held until the last of them is gone and has written what it had to.
#[derive(Debug, Clone)]
pub struct Outbox {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    limits: Limits,
    /// Held for moments, never while a file is written.
    state: Mutex<State>,
    /// Held by the one commit that is under way.
    log: Mutex<Log>,
    /// Told when a turn may have come due.
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    backlog: Backlog,
    inbox: Vec<Waiting>,
    /// Out of the backlog, and not yet in the log as gone.
    gone: Vec<u64>,
    committing: bool,
    dropped: u64,
    refused: u64,
    /// Dropped since the outbox was last half empty.
    burst: u64,
}

#[derive(Debug)]
struct Waiting {
    event: Event,
    reply: oneshot::Sender<Result<(), Arc<FileError>>>,
}

impl Outbox {
    /// Opens the outbox in `dir`, which is made where it is missing; its parent must exist. Blocks.
    ///
    /// # Errors
    /// [`OutboxError::File`], [`OutboxError::InUse`] or [`OutboxError::Version`]; what is in it is intact.
    pub fn open(dir: &Path, limits: Limits) -> Result<Self, OutboxError> {
        let mut state = State::default();
        let mut log = Log::open(dir, &limits, &mut state.backlog)?;
        state.keep_within(&limits);
        log.owe(std::mem::take(&mut state.gone));
        let kept = state.backlog.len();
        tracing::info!(path = %dir.display(), kept, dropped = state.dropped, "outbox opened");
        Ok(Self {
            shared: Arc::new(Shared {
                limits,
                state: Mutex::new(state),
                log: Mutex::new(log),
                changed: Notify::new(),
            }),
        })
    }

    /// Keeps an event; it is on disk when this returns. Events that are put at a time share one write and one sync, on a blocking
    /// thread. Once polled it goes on to its end, whatever happens to the caller; the order of first polls is the order of events.
    ///
    /// # Errors
    /// [`OutboxError::TooLarge`] and [`OutboxError::Behind`]: nothing has happened. [`OutboxError::NotKept`]: the disk refused.
    pub async fn put(&self, mut event: Event) -> Result<(), OutboxError> {
        event.error = event.error.as_deref().map(shown);
        let bytes = serde_json::to_string(&event)
            .expect("strings and numbers serialise")
            .len();
        if bytes > MAX_EVENT {
            return Err(OutboxError::TooLarge { bytes });
        }
        let (reply, answer) = oneshot::channel();
        {
            let mut state = self.shared.state();
            if state.inbox.len() >= MAX_WAITING {
                return Err(OutboxError::Behind);
            }
            state.inbox.push(Waiting { event, reply });
            self.shared.start_commit(&mut state);
        }
        let kept = answer.await.expect("a commit answers every event that it takes");
        kept.map_err(OutboxError::NotKept)
    }

    /// How many events are kept.
    pub fn depth(&self) -> usize {
        self.shared.state().backlog.len()
    }

    /// How many events were dropped since the start because there were more than [`Limits`] allow.
    pub fn dropped(&self) -> u64 {
        self.shared.state().dropped
    }

    /// How many events the receiver has refused since the start.
    pub fn refused(&self) -> u64 {
        self.shared.state().refused
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("nothing panics while it holds the outbox's state")
    }

    /// Sees to it that what is in the inbox, and what is gone, is written. At most one thread does that.
    fn start_commit(self: &Arc<Self>, state: &mut State) {
        if !std::mem::replace(&mut state.committing, true) {
            let shared = self.clone();
            // Detached: it ends by itself, whoever is gone by then.
            drop(tokio::task::spawn_blocking(move || shared.commit()));
        }
    }

    /// Writes until there is nothing left to write.
    fn commit(&self) {
        let mut log = self.log.lock().expect("a commit does not panic");
        loop {
            let (batch, gone) = {
                let mut state = self.state();
                if state.inbox.is_empty() && state.gone.is_empty() {
                    state.committing = false;
                    return;
                }
                (std::mem::take(&mut state.inbox), std::mem::take(&mut state.gone))
            };
            log.owe(gone);
            self.commit_batch(&mut log, batch);
        }
    }

    fn commit_batch(&self, log: &mut Log, batch: Vec<Waiting>) {
        let mut lines = Vec::new();
        let mut kept = Vec::new();
        for Waiting { event, reply } in batch {
            let number = log.take_number();
            let line = log::put_line(number, &event);
            kept.push((number, event, line.len() as u64, reply));
            lines.extend(line);
        }
        let durable = if kept.is_empty() { Durable::Later } else { Durable::Now };
        let ready = if log.is_suspect() { self.rewrite(log) } else { Ok(()) };
        let written = ready.and_then(|()| log.append(lines, durable));
        if let Err(error) = written {
            if kept.is_empty() {
                tracing::warn!(error = %Chain(&error), "deliveries cannot be noted: after a restart they would be repeated");
            }
            let error = Arc::new(error);
            for (_, event, _, reply) in kept {
                if reply.send(Err(error.clone())).is_err() {
                    // Nobody else can say it.
                    tracing::error!(
                        sandbox_id = %event.sandbox_id, event = ?event.event, error = %Chain(&*error),
                        "a lifecycle event was not kept"
                    );
                }
            }
            return;
        }
        let mut replies = Vec::new();
        let kept_bytes = {
            let mut state = self.state();
            for (number, event, bytes, reply) in kept {
                state.backlog.insert(number, Arc::new(event), bytes);
                replies.push(reply);
            }
            state.keep_within(&self.limits);
            state.backlog.bytes()
        };
        for reply in replies {
            // A caller that has gone needs no answer.
            drop(reply.send(Ok(())));
        }
        self.changed.notify_one();
        if log.is_wasteful(kept_bytes)
            && let Err(error) = self.rewrite(log)
        {
            tracing::warn!(error = %Chain(&error), "the outbox's log stays as long as it is");
        }
    }

    fn rewrite(&self, log: &mut Log) -> Result<(), FileError> {
        let content = log::content(&self.state().backlog);
        log.rewrite(&content)
    }

    /// Takes an event out that the receiver has refused for good.
    fn refuse(self: &Arc<Self>, number: u64) {
        self.state().refused += 1;
        self.settle(number);
    }

    /// Takes an event out that needs no delivery any more, and has that written.
    fn settle(self: &Arc<Self>, number: u64) {
        let mut state = self.state();
        // It may have been dropped while it was on its way.
        if state.backlog.remove(number) {
            state.gone.push(number);
            state.end_burst(&self.limits);
            self.start_commit(&mut state);
        }
    }
}

impl State {
    /// Drops what is more than the limits allow.
    fn keep_within(&mut self, limits: &Limits) {
        while let Some(number) = self.backlog.surplus(limits) {
            self.backlog.remove(number);
            self.gone.push(number);
            self.dropped += 1;
            if self.burst == 0 {
                tracing::error!(
                    kept = self.backlog.len(),
                    "the outbox is full: the oldest events are dropped"
                );
            }
            self.burst += 1;
        }
    }

    fn end_burst(&mut self, limits: &Limits) {
        if self.burst > 0 && self.backlog.is_half_empty(limits) {
            tracing::warn!(dropped = self.burst, "the outbox has room again");
            self.burst = 0;
        }
    }
}

/// Printable ASCII, at most [`MAX_ERROR`] characters of it, no escape sequence cut in two.
fn shown(error: &str) -> String {
    let mut shown = String::new();
    for byte in error.bytes() {
        let escaped = byte.escape_ascii();
        if shown.len() + escaped.len() > MAX_ERROR {
            break;
        }
        shown.extend(escaped.map(char::from));
    }
    shown
}
