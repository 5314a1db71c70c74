//! Slots: which place of the network plan each sandbox has, and the network there where that was made ahead.
//!
//! A slot is leased for as long as its [`SlotLease`] lives. Slots are handed out in turn rather than lowest first: the kernel
//! takes a network down asynchronously, so the slot freed last is the one most likely to be still in use.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use roost_common::ids::Slot;
use roost_common::privd::Network;
use tokio::runtime::Handle;

/// All slots of the plan.
#[derive(Debug)]
pub struct Slots(Mutex<Pool>);

#[derive(Debug)]
struct Pool {
    leased: BTreeSet<Slot>,
    next: Slot,
}

/// A slot in use; free again when dropped.
#[derive(Debug)]
pub struct SlotLease {
    slot: Slot,
    pool: Arc<Slots>,
    /// What was made ahead, until a start takes it.
    network: Mutex<Option<Network>>,
}

impl SlotLease {
    /// The same with its network, which was made ahead.
    pub(super) fn with_network(mut self, network: Network) -> Self {
        self.network = Mutex::new(Some(network));
        self
    }

    /// The network that was made ahead, once.
    pub(crate) fn take_network(&self) -> Option<Network> {
        self.network.lock().expect("no panic while taking").take()
    }

    /// The leased slot.
    pub fn slot(&self) -> Slot {
        self.slot
    }
}

impl Slots {
    /// All slots free.
    pub fn new() -> Self {
        Self(Mutex::new(Pool {
            leased: BTreeSet::new(),
            next: Slot::MIN,
        }))
    }

    /// Leases one slot; `None` when it is in use.
    pub fn lease_this(self: &Arc<Self>, slot: Slot) -> Option<SlotLease> {
        let mut pool = self.0.lock().expect("no panic while leasing");
        let free = pool.leased.insert(slot);
        drop(pool);
        free.then(|| self.leased(slot))
    }

    /// Leases the next free slot; `None` when all are in use.
    pub fn lease(self: &Arc<Self>) -> Option<SlotLease> {
        let mut pool = self.0.lock().expect("no panic while leasing");
        let mut slot = pool.next;
        while !pool.leased.insert(slot) {
            slot = after(slot);
            if slot == pool.next {
                return None;
            }
        }
        pool.next = after(slot);
        drop(pool);
        Some(self.leased(slot))
    }

    fn leased(self: &Arc<Self>, slot: Slot) -> SlotLease {
        SlotLease {
            slot,
            pool: self.clone(),
            network: Mutex::default(),
        }
    }

    fn free(&self, slot: Slot) {
        self.0.lock().expect("no panic while leasing").leased.remove(&slot);
    }
}

impl Default for Slots {
    fn default() -> Self {
        Self::new()
    }
}

fn after(slot: Slot) -> Slot {
    Slot::try_from(u32::from(slot) + 1).unwrap_or(Slot::MIN)
}

impl Drop for SlotLease {
    fn drop(&mut self) {
        let Some(network) = self.take_network() else {
            return self.pool.free(self.slot);
        };
        let (pool, slot) = (self.pool.clone(), self.slot);
        let close = move || {
            drop(network);
            pool.free(slot);
        };
        // The last copy of a tap takes its network down, which takes tens of milliseconds: not on a thread of the runtime.
        match Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(close)),
            Err(_) => close(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_slot_is_leased_twice_and_all_can_be() {
        let slots = Arc::new(Slots::new());
        let leases: Vec<SlotLease> = std::iter::from_fn(|| slots.lease()).collect();
        let distinct: BTreeSet<Slot> = leases.iter().map(SlotLease::slot).collect();
        assert_eq!((leases.len(), distinct.len()), (32767, 32767));
    }

    #[test]
    fn a_freed_slot_is_the_last_to_be_used_again() {
        let slots = Arc::new(Slots::new());
        let first = slots.lease().expect("free").slot();
        assert_ne!(slots.lease().expect("free").slot(), first);
        let rest: Vec<SlotLease> = std::iter::from_fn(|| slots.lease()).collect();
        assert_eq!(rest.len(), 32767, "both were free again");
    }
}
