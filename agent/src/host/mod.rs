//! What the agent has of its host: privd for disks and networks, shims for VMMs, and files.
//!
//! Everything here that exists outside the agent is a descriptor in a struct, or a file below the two directories of the
//! configuration. Dropping the struct frees the first; the second is removed by who made it, or by recovery.

pub mod acl;
pub mod consoles;
pub mod counters;
pub mod files;
pub mod images;
pub mod kernels;
pub mod privd;
pub mod ready;
pub mod shim;
pub mod slots;

use std::net::Ipv4Addr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use roost_common::ids::Slot;

use crate::config::Config;
use crate::control::listing::Listing;
use crate::errors::Chain;
use crate::guest::{Guest, Token};
use crate::outbox::{Event, Outbox};
use crate::page::Changes;
use crate::status::Timings;
use consoles::Consoles;
use files::Layout;
use privd::PrivdClientHandle;
use ready::Ready;
use shim::Shims;
use slots::Slots;

/// One host, shared by all sandboxes.
#[derive(Debug)]
pub struct Host {
    config: ArcSwap<Config>,
    /// Where files are.
    pub layout: Layout,
    /// The privileged daemon.
    pub privd: PrivdClientHandle,
    /// Starts shims.
    pub shims: Shims,
    /// Which slots are free.
    pub slots: Arc<Slots>,
    /// What was made ahead.
    pub ready: Ready,
    /// Guests that are coming up.
    pub consoles: Consoles,
    resolvers: ArcSwap<Vec<Ipv4Addr>>,
    /// How paused sandboxes are listed.
    pub listing: Listing,
    /// How long what callers ask of sandboxes takes.
    pub operations: Timings,
    /// Which sandboxes have changed of late.
    pub changes: Changes,
    outbox: Option<Outbox>,
}

impl Host {
    /// The host of a configuration. Connects to nothing yet.
    pub fn new(config: Config) -> Self {
        Self {
            layout: Layout::new(&config.dir, &config.vm_run_dir),
            privd: PrivdClientHandle::new(config.privd_socket.clone()),
            shims: Shims::new(&config),
            slots: Arc::new(Slots::new()),
            ready: Ready::default(),
            consoles: Consoles::default(),
            resolvers: ArcSwap::from_pointee(config.resolvers()),
            listing: Listing::standalone(),
            operations: Timings::default(),
            changes: Changes::default(),
            outbox: None,
            config: ArcSwap::from_pointee(config),
        }
    }

    /// The configuration as it is now. Ask again for each piece of work: a reload replaces it as a whole.
    pub fn config(&self) -> Arc<Config> {
        self.config.load_full()
    }

    /// Resolvers for guests, as they are now.
    pub fn resolvers(&self) -> Arc<Vec<Ipv4Addr>> {
        self.resolvers.load_full()
    }

    /// Goes by another configuration from now on, in which only keys differ that a reload may change.
    pub fn reconfigure(&self, config: Config) {
        self.resolvers.store(Arc::new(config.resolvers()));
        self.config.store(Arc::new(config));
        self.ready.changed();
    }

    /// The same, with a place for events.
    #[must_use]
    pub fn with_outbox(self, outbox: Outbox) -> Self {
        Self {
            outbox: Some(outbox),
            ..self
        }
    }

    /// The same, under a control plane.
    #[must_use]
    pub fn under_control_plane(self) -> Self {
        Self {
            listing: Listing::under_control_plane(),
            ..self
        }
    }

    /// Where events are kept, if they are.
    pub fn outbox(&self) -> Option<&Outbox> {
        self.outbox.as_ref()
    }

    /// Keeps an event until somebody has taken it. Where it cannot be kept that is logged: a control plane that lists sandboxes
    /// learns of it all the same, only later.
    ///
    /// # Errors
    /// The event, where it was not kept; also where there is no outbox, which was logged when it could not be opened.
    pub async fn tell(&self, event: Event) -> Result<(), Event> {
        let Some(outbox) = &self.outbox else { return Err(event) };
        let put = outbox.put(event.clone()).await;
        put.map_err(|error| {
            tracing::error!(sandbox_id = %event.sandbox_id, event = ?event.event, error = %Chain(&error), "an event is not kept");
            event
        })
    }

    /// The guest in a slot. Connects to nothing yet.
    pub fn guest(&self, slot: Slot, token: Token) -> Guest {
        Guest::new(self.config.load().guests.address_of(slot), token)
    }
}
