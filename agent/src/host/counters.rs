//! The counters of a running VM: those of its cgroup, and of its network; and what its network lets through.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use roost_common::ids::SandboxId;
use roost_common::ipc::PassedFd;
use roost_common::privd::{EgressPolicy, RuleCounter};
use roost_common::shim::{Lendable, SHIM_SOCKET};
use tokio::time::Instant;

use super::privd::CallError;
use super::shim::ShimFault;
use super::{Host, shim};
use crate::activity::{Floors, Pulse, Sample, WINDOW, read_cgroup};
use crate::errors::Chain;

/// Time between two samples.
const SECOND: Duration = Duration::from_secs(1);

/// Watches the counters of a sandbox that runs for as long as it takes to say whether its guest is at work. What cannot be read says
/// nothing.
pub async fn at_work(host: Arc<Host>, id: SandboxId, cgroup: Option<PathBuf>) -> bool {
    let floors = Floors::new(&host.config());
    let counters = Counters::open(&host, &id, cgroup).await;
    let (mut pulse, mut busy) = (Pulse::default(), false);
    // One more than are looked at: the first has nothing before it.
    for _ in 0..=WINDOW {
        busy = pulse.take(Instant::now(), counters.sample(&host).await, &floors);
        tokio::time::sleep(SECOND).await;
    }
    busy
}

/// Why nothing is known of a VM's network, or nothing was done about it.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// Its shim does not lend the tap.
    #[error(transparent)]
    Shim(#[from] ShimFault),
    /// privd.
    #[error(transparent)]
    Privd(#[from] CallError),
}

/// Which rules of a running VM's network have matched how much.
///
/// # Errors
/// Any [`NetworkError`].
pub async fn rules(host: &Host, id: &SandboxId) -> Result<Vec<RuleCounter>, NetworkError> {
    let tap = lend_tap(host, id).await?;
    Ok(host.privd.network_counters(tap).await?.rules)
}

/// Has a running VM's network keep to a policy.
///
/// # Errors
/// Any [`NetworkError`].
pub async fn set_policy(host: &Host, id: &SandboxId, policy: EgressPolicy) -> Result<(), NetworkError> {
    let tap = lend_tap(host, id).await?;
    Ok(host.privd.set_policy(tap, policy).await?)
}

/// The tap of a VM that runs. It keeps the network there, so it must not outlive what it is used for.
///
/// # Errors
/// Any [`ShimFault`].
async fn lend_tap(host: &Host, id: &SandboxId) -> Result<PassedFd, ShimFault> {
    let socket = host.layout.vm_run(id).join(SHIM_SOCKET);
    shim::lend_at(&socket, Lendable::Tap).await
}

/// What the counters of a VM are read through.
///
/// The tap is lent by the VM's shim over a connection of its own, so that it can be given up at any moment without the task's own
/// connection being left with half of an answer. It keeps the network there, so this must not outlive the question.
#[derive(Debug)]
struct Counters {
    cgroup: Option<PathBuf>,
    tap: Option<PassedFd>,
}

impl Counters {
    /// Those of a sandbox that runs. What cannot be reached says nothing.
    async fn open(host: &Host, id: &SandboxId, cgroup: Option<PathBuf>) -> Self {
        let tap = match lend_tap(host, id).await {
            Ok(tap) => Some(tap),
            Err(error) => {
                tracing::warn!(sandbox_id = %id, error = %Chain(&error), "the network of a guest is not counted");
                None
            }
        };
        Self { cgroup, tap }
    }

    /// A sample; `None` where nothing can be read.
    async fn sample(&self, host: &Host) -> Option<Sample> {
        let network_bytes = match &self.tap {
            Some(tap) => host.privd.network_bytes(tap.clone()).await.ok(),
            None => None,
        };
        let cgroup = self.cgroup.as_deref().and_then(|cgroup| read_cgroup(cgroup).ok());
        if network_bytes.is_none() && cgroup.is_none() {
            return None;
        }
        Some(Sample {
            network_bytes,
            ..cgroup.unwrap_or_default()
        })
    }
}
