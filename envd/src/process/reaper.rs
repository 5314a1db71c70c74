//! The one place that waits for children: those of the process service, whose exit statuses it delivers, and, as PID 1,
//! all orphans of the machine, whose statuses nobody wants.
//!
//! Invariants: a child that is neither registered nor known to be an orphan is not reaped, so no status is lost; a
//! registered pid is a child that has not been reaped, so a signal never reaches a stranger. The lock is never held
//! while a program is started: entering a directory may take for ever, where that is on a network.

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
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    waiting: HashMap<u32, oneshot::Sender<ExitStatus>>,
    /// Forks of ours whose pids are not in `waiting` yet. While there are any, an unknown child may be one of them.
    starting: usize,
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
                // Signals that arrive together are one, and one may have come before the handler: look first, reap all.
                task.lock().reap();
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
    /// As [`Command::spawn`], which has reaped a child that did not get as far as exec.
    pub(crate) fn start(&self, command: &mut Command) -> io::Result<(Child, oneshot::Receiver<ExitStatus>)> {
        self.lock().starting += 1;
        let spawned = command.spawn();
        let mut state = self.lock();
        state.starting -= 1;
        let (sender, receiver) = oneshot::channel();
        if let Ok(child) = &spawned {
            state.waiting.insert(child.id(), sender);
        }
        // The signals of this child, and of orphans meanwhile, may have come and found nothing to be done.
        state.reap();
        spawned.map(|child| (child, receiver))
    }

    /// Signals the process group that `leader` leads. `false` when the leader has ended.
    pub(crate) fn signal_group(&self, leader: u32, signal: Signal) -> bool {
        let state = self.lock();
        let Ok(pid) = i32::try_from(leader) else { return false };
        state.waiting.contains_key(&leader) && killpg(Pid::from_raw(pid), signal).is_ok()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of the reaper's lock panics")
    }
}

impl State {
    /// Reaps all that have ended and may be reaped.
    fn reap(&mut self) {
        // An error: there are no children.
        while let Ok(Some(pid)) = sys::peek_ended() {
            if !self.waiting.contains_key(&pid) && self.starting > 0 {
                // Whose it is shows when it has started, and then we look again. Those behind it need not wait.
                return self.reap_registered();
            }
            match sys::reap(pid) {
                Some(status) => self.deliver(pid, status),
                None => return,
            }
        }
    }

    fn reap_registered(&mut self) {
        let ended: Vec<_> = self
            .waiting
            .keys()
            .filter_map(|pid| Some((*pid, sys::reap(*pid)?)))
            .collect();
        for (pid, status) in ended {
            self.deliver(pid, status);
        }
    }

    fn deliver(&mut self, pid: u32, status: ExitStatus) {
        if let Some(sender) = self.waiting.remove(&pid) {
            // A receiver that is gone wanted no status.
            sender.send(status).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    /// The state letter of a process; `None` when it has been reaped.
    fn state(pid: u32) -> Option<char> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit(") ").next()?.chars().next()
    }

    async fn becomes(pid: u32, wanted: Option<char>) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while state(pid) != wanted {
            assert!(Instant::now() < deadline, "{pid} is {:?}, not {wanted:?}", state(pid));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn a_start_that_hangs_holds_no_status_back_and_is_not_robbed_of_its_own() {
        let reaper = Reaper::spawn().unwrap();
        // As if this fork had not come as far as being registered.
        reaper.lock().starting += 1;
        let mut unknown = Command::new("/bin/true").spawn().unwrap();
        becomes(unknown.id(), Some('Z')).await;
        let (_, exit) = reaper.start(Command::new("/bin/sh").args(["-c", "exit 3"])).unwrap();
        assert_eq!(exit.await.unwrap().code(), Some(3));
        assert!(unknown.wait().unwrap().success());
        // Once nothing is starting, an unknown child is an orphan.
        reaper.lock().starting -= 1;
        let orphan = Command::new("/bin/true").spawn().unwrap().id();
        becomes(orphan, None).await;
        assert!(!reaper.signal_group(orphan, Signal::SIGKILL));
    }
}
