//! What is made ahead of the sandboxes that take it: shims, and networks of the policy that sandboxes have by default.
//!
//! Holds: nothing here has ever been a sandbox's. All of it lives by descriptors of this process, so that an agent that ends, however it
//! does, leaves nothing of it.
//!
//! [`keep`] makes it; a create or a resume takes what there is and makes the rest itself, as if there were no such thing.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use roost_common::net::SlotAddresses;
use roost_common::privd::{EgressPolicy, OpenNetwork};
use tokio::sync::Notify;

use super::Host;
use super::shim::{NewShim, ShimFault};
use super::slots::SlotLease;
use crate::egress::Egress;
use crate::errors::Chain;
use crate::host::privd::CallError;

/// Pause before another attempt to make what could not be made.
const RETRY_PAUSE: Duration = Duration::from_secs(30);
/// How long after something was taken more is made: at once it would be in the way of who took it.
const REST: Duration = Duration::from_millis(200);

/// What is ready.
#[derive(Debug, Default)]
pub struct Ready {
    shims: Mutex<VecDeque<NewShim>>,
    networks: Mutex<VecDeque<Place>>,
    changed: Notify,
}

/// A network with its slot.
#[derive(Debug)]
struct Place {
    lease: SlotLease,
    policy: EgressPolicy,
}

/// Why something could not be made ahead.
#[derive(Debug, thiserror::Error)]
enum NotMade {
    #[error(transparent)]
    Shim(#[from] ShimFault),
    #[error(transparent)]
    Network(#[from] CallError),
    #[error("all slots are taken")]
    NoSlot,
}

impl Ready {
    /// How many shims there are.
    pub fn shims(&self) -> usize {
        self.lock_shims().len()
    }

    /// The addresses of the networks that there are.
    pub fn addresses(&self) -> Vec<Ipv4Addr> {
        let address = |place: &Place| SlotAddresses::of(place.lease.slot()).host;
        self.lock_networks().iter().map(address).collect()
    }

    /// More or less is wanted by now.
    pub(super) fn changed(&self) {
        self.changed.notify_one();
    }

    /// Held for moments.
    fn lock_shims(&self) -> MutexGuard<'_, VecDeque<NewShim>> {
        self.shims.lock().expect("nothing panics while it holds this")
    }

    /// Held for moments.
    fn lock_networks(&self) -> MutexGuard<'_, VecDeque<Place>> {
        self.networks.lock().expect("nothing panics while it holds this")
    }
}

impl Host {
    /// A shim: one that is ready, where it is still good for something, else a new one.
    ///
    /// # Errors
    /// Any [`ShimFault`].
    pub(crate) async fn shim(&self) -> Result<NewShim, ShimFault> {
        loop {
            let Some(mut shim) = self.ready.lock_shims().pop_front() else {
                return self.shims.start().await;
            };
            self.ready.changed();
            if shim.is_as_it_was().await {
                return Ok(shim);
            }
        }
    }

    /// A slot for a sandbox with this policy, with its network where such a one is ready; `None` when all are in use.
    pub(crate) fn slot(&self, policy: &EgressPolicy) -> Option<SlotLease> {
        let ready = {
            let mut networks = self.ready.lock_networks();
            let position = networks.iter().position(|place| place.policy == *policy);
            position.and_then(|position| networks.remove(position))
        };
        match ready {
            Some(place) => {
                self.ready.changed();
                Some(place.lease)
            }
            None => self.slots.lease(),
        }
    }
}

/// Keeps ready what the configuration wants.
pub async fn keep(host: Arc<Host>) -> Infallible {
    loop {
        match fill(&host).await {
            Ok(()) => host.ready.changed.notified().await,
            Err(error) => {
                // Whoever needs one hears of it in any case.
                tracing::debug!(error = %Chain(&error), "nothing could be made ahead");
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        }
        tokio::time::sleep(REST).await;
    }
}

/// Makes what is missing, one after the other, and lets go of what is not wanted any more.
async fn fill(host: &Arc<Host>) -> Result<(), NotMade> {
    let wanted = || usize::try_from(host.config().ready_sandboxes).unwrap_or(usize::MAX);
    let policy = Egress::default().policy(&host.resolvers());
    let unwanted: Vec<Place> = {
        let mut networks = host.ready.lock_networks();
        let (mut fitting, mut unwanted): (Vec<_>, Vec<_>) =
            networks.drain(..).partition(|place| place.policy == policy);
        unwanted.extend(fitting.drain(fitting.len().min(wanted())..));
        networks.extend(fitting);
        unwanted
    };
    drop(unwanted);
    host.ready.lock_shims().truncate(wanted());
    while host.ready.shims() < wanted() {
        let shim = host.shims.start().await?;
        host.ready.lock_shims().push_back(shim);
    }
    while host.ready.lock_networks().len() < wanted() {
        let lease = host.slots.lease().ok_or(NotMade::NoSlot)?;
        let request = OpenNetwork {
            slot: lease.slot(),
            policy: policy.clone(),
        };
        let network = host.privd.open_network(request).await?;
        let place = Place {
            lease: lease.with_network(network),
            policy: policy.clone(),
        };
        host.ready.lock_networks().push_back(place);
    }
    Ok(())
}
