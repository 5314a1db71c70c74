//! All sandboxes of this host, by id: who asks for one finds its handle here.
//!
//! An id is here from the moment its create is accepted until nothing of the sandbox is left, so two creates of one id cannot
//! overlap, and a listing never misses a sandbox that exists.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use roost_common::ids::SandboxId;
use tokio::sync::oneshot;

use crate::errors::Chain;
use crate::host::Host;
use crate::host::slots::SlotLease;
use crate::sandbox::CreateFailure;
use crate::sandbox::plan::Plan;
use crate::sandbox::record::Record;
use crate::sandbox::task::{self, Found, Handle, View};
use crate::templates::{self, Sweep};
use crate::watermark::Space;

/// Why a create was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The id is in use or in flight.
    #[error("sandbox {0} exists already")]
    Exists(SandboxId),
    /// The host is being emptied.
    #[error("this host is being drained and takes no new work")]
    Draining,
    /// What is left of the host's disk is kept for what runs.
    #[error(
        "this host's disk has no room for {} MiB: {} MiB are free, of which {} MiB are kept so that what runs can be paused; free some, \
         or destroy sandboxes",
        needed >> 20,
        room.free >> 20,
        room.reserve >> 20
    )]
    NoRoom {
        /// What was seen last.
        room: Space,
        /// Bytes that are wanted.
        needed: u64,
    },
    /// The host has as many as it may.
    #[error("this host has {0} sandboxes, as many as it may")]
    Full(usize),
}

/// What is left of the disk for new work.
#[derive(Debug, Clone, Copy, Default)]
enum Room {
    /// Nobody has looked yet.
    #[default]
    Unknown,
    /// Nothing.
    Short(Space),
    /// So many bytes, until the next look.
    Spare { seen: Space, left: u64 },
}

/// The registry.
#[derive(Debug)]
pub struct Registry {
    host: Arc<Host>,
    draining: AtomicBool,
    /// Held while deleted templates are looked through.
    sweep: Mutex<()>,
    room: Mutex<Room>,
    sandboxes: Mutex<HashMap<SandboxId, Handle>>,
}

impl Registry {
    /// An empty registry.
    pub fn new(host: Arc<Host>) -> Arc<Self> {
        Arc::new(Self {
            host,
            draining: AtomicBool::new(false),
            sweep: Mutex::default(),
            room: Mutex::default(),
            sandboxes: Mutex::default(),
        })
    }

    /// The host of these sandboxes.
    pub fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// Accepts a create and starts it. The receiver has its outcome; dropping it stops the create.
    ///
    /// # Errors
    /// Any [`Refusal`]; nothing has been started.
    pub fn create(
        self: &Arc<Self>,
        plan: Plan,
    ) -> Result<(Handle, oneshot::Receiver<Result<(), CreateFailure>>), Refusal> {
        let max = usize::try_from(self.host.config().max_sandboxes).unwrap_or(usize::MAX);
        let mut sandboxes = self.lock();
        self.is_open()?;
        if sandboxes.contains_key(&plan.id) {
            return Err(Refusal::Exists(plan.id));
        }
        let slot: Option<SlotLease> = if sandboxes.len() < max {
            self.host.slot(&plan.egress.policy(&self.host.resolvers()))
        } else {
            None
        };
        let slot = slot.ok_or(Refusal::Full(sandboxes.len()))?;
        self.take_room(plan.memory.bytes().0)?;
        let id = plan.id.clone();
        let (handle, outcome) = task::spawn(self.clone(), self.host.clone(), plan, slot);
        sandboxes.insert(id, handle.clone());
        Ok((handle, outcome))
    }

    /// Whether new work is taken.
    ///
    /// # Errors
    /// [`Refusal::Draining`].
    fn is_open(&self) -> Result<(), Refusal> {
        if self.draining.load(Ordering::Acquire) {
            Err(Refusal::Draining)
        } else {
            Ok(())
        }
    }

    /// Whether a sandbox of so much memory may be resumed.
    ///
    /// # Errors
    /// [`Refusal::Draining`] or [`Refusal::NoRoom`].
    pub fn takes_work(&self, memory: u64) -> Result<(), Refusal> {
        self.is_open()?;
        self.take_room(memory)
    }

    /// Takes so many bytes of what the last look at the disk left to be taken.
    ///
    /// # Errors
    /// [`Refusal::NoRoom`].
    pub fn take_room(&self, needed: u64) -> Result<(), Refusal> {
        let mut room = self.room();
        let refused = |room| Err(Refusal::NoRoom { room, needed });
        match *room {
            Room::Unknown => Ok(()),
            Room::Short(seen) => refused(seen),
            Room::Spare { seen, left } if needed > left => refused(seen),
            Room::Spare { seen, left } => {
                *room = Room::Spare {
                    seen,
                    left: left - needed,
                };
                Ok(())
            }
        }
    }

    /// Whether there was room for new work at the last look, for what takes a while.
    ///
    /// # Errors
    /// [`Refusal::NoRoom`].
    pub(crate) fn has_room(&self) -> Result<(), Refusal> {
        self.take_room(0)
    }

    /// What was seen of the disk at the last look.
    pub(crate) fn space(&self) -> Option<Space> {
        match *self.room() {
            Room::Unknown => None,
            Room::Short(seen) | Room::Spare { seen, .. } => Some(seen),
        }
    }

    /// What was seen of the disk, and whether that is too little for new work.
    pub(crate) fn room_is(&self, seen: Space, is_short: bool) {
        let now = if is_short {
            Room::Short(seen)
        } else {
            let left = seen.free.saturating_sub(seen.reserve);
            Room::Spare { seen, left }
        };
        let before = std::mem::replace(&mut *self.room(), now);
        let was_short = matches!(before, Room::Short(_));
        let Space { free, reserve } = seen;
        if is_short && !was_short {
            tracing::warn!(free, reserve, "the disk has no room: new work is refused");
        } else if was_short && !is_short {
            tracing::info!(free, reserve, "the disk has room again");
        }
    }

    /// Held for moments.
    fn room(&self) -> std::sync::MutexGuard<'_, Room> {
        self.room.lock().expect("nothing panics while it holds this")
    }

    /// Takes no new work from now on.
    pub(crate) fn refuse_work(&self) {
        // Under the lock, so that a create is listed or refused.
        let _sandboxes = self.lock();
        self.draining.store(true, Ordering::Release);
    }

    /// Takes in a sandbox of an earlier agent.
    pub(crate) fn take(self: &Arc<Self>, record: Record, slot: SlotLease, found: Found) {
        let mut sandboxes = self.lock();
        let id = record.plan.id.clone();
        let (registry, host) = (self.clone(), self.host.clone());
        let handle = task::spawn_found(registry, host, record.plan, slot, record.created_at_unix, found);
        sandboxes.insert(id, handle);
    }

    /// The sandbox of an id.
    pub fn find(&self, id: &SandboxId) -> Option<Handle> {
        self.lock().get(id).cloned()
    }

    /// All sandboxes, in order of their ids.
    pub fn list(&self) -> Vec<Handle> {
        self.those(|_| true)
    }

    /// Those sandboxes, in order of their ids. Who looks again and again asks for no more than it sees to: of thousands most may be paused.
    pub(crate) fn those(&self, wanted: impl Fn(&View) -> bool) -> Vec<Handle> {
        let mut all: Vec<Handle> = {
            let sandboxes = self.lock();
            sandboxes
                .values()
                .filter(|handle| wanted(&handle.view()))
                .cloned()
                .collect()
        };
        all.sort_by(|a, b| a.plan.id.cmp(&b.plan.id));
        all
    }

    /// Takes a sandbox out; its task does, when nothing is left.
    pub(crate) fn forget(self: &Arc<Self>, id: &SandboxId) {
        let gone = self.lock().remove(id);
        // A template that was deleted goes with the last sandbox that needs it.
        if gone.is_some_and(|gone| !gone.plan.template.is_minimal()) {
            let registry = self.clone();
            tokio::spawn(async move { registry.sweep_templates(Sweep::Deleted).await });
        }
    }

    /// Removes what is left of templates that no sandbox needs.
    pub(crate) async fn sweep_templates(self: &Arc<Self>, what: Sweep) {
        let registry = self.clone();
        let swept = tokio::task::spawn_blocking(move || {
            // One at a time, and each looks at who there is when its turn has come: a sandbox is here before it opens its template.
            let _sweeping = registry.sweep.lock().expect("no sweep panics");
            let sandboxes = registry.list();
            // One whose record cannot be read may need any template.
            if sandboxes
                .iter()
                .any(|handle| matches!(handle.view(), View::Unreachable))
            {
                return Ok(());
            }
            let needed = sandboxes
                .iter()
                .map(|handle| templates::named(handle.plan.template))
                .collect();
            templates::sweep(&registry.host.layout.images(), &needed, what)
        });
        if let Err(error) = swept.await.expect("file work does not panic") {
            tracing::error!(error = %Chain(&error), "a deleted template stays until the next one is deleted");
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SandboxId, Handle>> {
        self.sandboxes
            .lock()
            .expect("nothing panics while it holds the registry")
    }
}
