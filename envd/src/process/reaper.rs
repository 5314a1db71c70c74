//! The one place that waits for children: those of the process service, whose exit statuses it delivers, and, as PID 1, all
//! orphans of the machine, whose statuses nobody wants.
//!
//! Invariants: a child is registered before it can be reaped (fork and registration happen under the lock that reaping
//! takes), so no status is lost; a registered pid is a child that has not been reaped, so a signal never reaches a stranger.

use std::collections::HashMap;
use std::io;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex, MutexGuard};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::sys;

/// Children that somebody waits for.
#[derive(Default)]
pub(crate) struct Reaper {
    waiting: Mutex<HashMap<u32, oneshot::Sender<ExitStatus>>>,
}

impl Reaper {
    /// Starts reaping, for as long as the runtime lives.
    ///
    /// # Errors
    /// The signal handler cannot be installed.
    pub(crate) fn spawn() -> io::Result<Arc<Self>> {
        let reaper = Arc::new(Self::default());
        let mut children = signal(SignalKind::child())?;
        let task = Arc::clone(&reaper);
        tokio::spawn(async move {
            loop {
                // Signals that arrive together are one, and one may have come before the handler: look first, and reap all.
                task.reap();
                if children.recv().await.is_none() {
                    return;
                }
            }
        });
        Ok(reaper)
    }

    /// Starts a child whose exit status the receiver gets.
    ///
    /// # Errors
    /// As [`Command::spawn`]; the child that did not get as far as exec has been reaped.
    pub(crate) fn start(&self, command: &mut Command) -> io::Result<(Child, oneshot::Receiver<ExitStatus>)> {
        let mut waiting = self.lock();
        let child = command.spawn()?;
        let (sender, receiver) = oneshot::channel();
        waiting.insert(child.id(), sender);
        Ok((child, receiver))
    }

    /// Signals the process group that `leader` leads. `false` when the leader has ended.
    pub(crate) fn signal_group(&self, leader: u32, signal: Signal) -> bool {
        let waiting = self.lock();
        let Ok(pid) = i32::try_from(leader) else { return false };
        waiting.contains_key(&leader) && killpg(Pid::from_raw(pid), signal).is_ok()
    }

    fn reap(&self) {
        loop {
            let mut waiting = self.lock();
            match sys::wait_any() {
                Ok(Some((pid, status))) => {
                    if let Some(sender) = waiting.remove(&pid) {
                        // A receiver that is gone wanted no status.
                        sender.send(status).ok();
                    }
                }
                // No child has ended, or there is none.
                Ok(None) | Err(_) => return,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u32, oneshot::Sender<ExitStatus>>> {
        self.waiting.lock().expect("no holder of the reaper's lock panics")
    }
}
