//! Holding a running guest: its processors stand still, and it writes nothing more, until there is room on the host's disk again. What
//! it has written before and the host has not, is written all the same.
//!
//! Not a state of the sandbox. It runs as far as anybody is concerned who lists it, pauses it or destroys it; only its guest does not
//! answer. What is held is released before a pause, which talks to the guest. An agent that ends forgets it: the next one lets
//! every VM run that it takes over ([`crate::recover`]), and holds it again where there is still no room.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use roost_common::ids::SandboxId;

use super::pause::api;
use crate::errors::Chain;
use crate::host::Host;
use crate::vmm::{State, VmmError};

/// What a sandbox's task and those who look at it share.
#[derive(Debug, Default)]
pub struct Hold {
    held: AtomicBool,
    /// Whether the sandbox's task was asked to hold or release it, and has not done so yet.
    asked: AtomicBool,
    /// Whether something is being done with it that is no pause, and that it must run for.
    busy: AtomicBool,
    cgroup: Mutex<Option<PathBuf>>,
}

impl Hold {
    /// Whether the guest's processors are stopped for want of room.
    pub fn is_held(&self) -> bool {
        self.held.load(Ordering::Acquire)
    }

    /// Whether something is being done with it for which it cannot be held.
    pub fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Acquire)
    }

    pub(super) fn is_busy_from_now(&self, is_busy: bool) {
        self.busy.store(is_busy, Ordering::Release);
    }

    /// Whether its task may be asked: it has done what it was asked for last.
    pub(super) fn ask(&self) -> bool {
        !self.asked.swap(true, Ordering::AcqRel)
    }

    /// Its task has done what it was asked for, or was not asked after all.
    pub(super) fn answered(&self) {
        self.asked.store(false, Ordering::Release);
    }

    /// The cgroup of the VM that runs, where it has one of its own.
    pub fn cgroup(&self) -> Option<PathBuf> {
        self.lock().clone()
    }

    /// A VM runs, in this cgroup where it has one of its own.
    pub(super) fn runs_in(&self, cgroup: Option<&Path>) {
        *self.lock() = cgroup.map(Path::to_owned);
    }

    /// Forgets that it was held: its VM has gone.
    pub(super) fn forget(&self) {
        self.held.store(false, Ordering::Release);
        *self.lock() = None;
    }

    /// Stops the guest's processors.
    pub(super) async fn hold(&self, host: &Host, id: &SandboxId) {
        if self.is_held() {
            return;
        }
        // Before the call, so that nobody waits for an answer of a guest that is about to stand still.
        self.held.store(true, Ordering::Release);
        if let Err(error) = api(host, id).pause().await {
            tracing::error!(sandbox_id = %id, error = %Chain(&error), "not held");
            self.undo(host, id, &error).await;
        }
    }

    /// Lets them run again, where they were held.
    ///
    /// # Errors
    /// [`VmmError`]; they may be held still.
    pub(super) async fn release(&self, host: &Host, id: &SandboxId) -> Result<(), VmmError> {
        if !self.is_held() {
            return Ok(());
        }
        let api = api(host, id);
        let outcome = match api.state().await {
            // A pause that failed has let it run.
            Ok(State::Running) => Ok(()),
            Ok(State::Created | State::Paused | State::Shutdown) | Err(_) => api.resume().await,
        };
        match &outcome {
            Ok(()) => self.held.store(false, Ordering::Release),
            Err(error) => tracing::error!(sandbox_id = %id, error = %Chain(error), "not released"),
        }
        outcome
    }

    /// A call that was not answered in time may have been followed all the same; one that was refused was not.
    async fn undo(&self, host: &Host, id: &SandboxId, error: &VmmError) {
        match error {
            VmmError::Refused { .. } | VmmError::Connect { .. } => self.held.store(false, Ordering::Release),
            // Twice, for it may be followed only once the VMM has said that its guest runs. Where that fails too it is tried again from
            // without, as for any that is held.
            VmmError::Timeout { .. } | VmmError::Http { .. } => {
                drop(self.release(host, id).await);
                self.held.store(true, Ordering::Release);
                drop(self.release(host, id).await);
            }
        }
    }

    /// Held for moments.
    fn lock(&self) -> MutexGuard<'_, Option<PathBuf>> {
        self.cgroup.lock().expect("nothing panics while it holds this")
    }
}
