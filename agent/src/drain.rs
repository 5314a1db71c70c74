//! Emptying a host before it is taken away: nothing new begins, and what runs goes to disk.
//!
//! A sandbox is brought to rest by what its state allows: a create is undone, a VM is paused, and what is on its way somewhere is waited
//! for. One that cannot be paused, or reached, runs on and is reported: whoever empties a host can make room and ask again, or destroy
//! it, and a sandbox that was destroyed for a full disk would be lost for nothing. Nothing here takes longer than the pauses and
//! teardowns do, which are bounded.

use std::sync::Arc;
use std::time::Duration;

use roost_common::ids::SandboxId;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::errors::Chain;
use crate::registry::Registry;
use crate::sandbox::task::{Handle, View};
use crate::sandbox::{PauseFailure, PauseReason};

/// How many sandboxes are paused at a time: each writes its memory to the same disk.
const AT_ONCE: usize = 4;
/// How long a VM of an earlier agent may take to be reached, so that it can be paused: as long as one attempt of its task does.
const REACH_LIMIT: Duration = Duration::from_secs(75);

/// What became of a host's sandboxes.
#[derive(Debug, Default)]
pub struct Drained {
    /// On disk.
    pub paused: Vec<SandboxId>,
    /// Gone, since they never ran.
    pub destroyed: Vec<SandboxId>,
    /// Neither: still there, and the log says why.
    pub failed: Vec<SandboxId>,
}

enum Rest {
    Paused,
    Destroyed,
    Failed,
}

/// Refuses new work from now on, and brings all sandboxes to rest.
pub async fn drain(registry: &Arc<Registry>) -> Drained {
    registry.refuse_work();
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut tasks = JoinSet::new();
    for handle in registry.list() {
        let places = places.clone();
        tasks.spawn(async move {
            let _place = places.acquire_owned().await.expect("never closed");
            let rest = bring_to_rest(&handle).await;
            (handle.plan.id.clone(), rest)
        });
    }
    let mut drained = Drained::default();
    for (id, rest) in tasks.join_all().await {
        match rest {
            Rest::Paused => drained.paused.push(id),
            Rest::Destroyed => drained.destroyed.push(id),
            Rest::Failed => drained.failed.push(id),
        }
    }
    tracing::info!(
        op = "drain",
        paused = drained.paused.len(),
        destroyed = drained.destroyed.len(),
        failed = drained.failed.len(),
        "drained"
    );
    drained
}

async fn bring_to_rest(handle: &Handle) -> Rest {
    let id = &handle.plan.id;
    loop {
        match handle.view() {
            View::Gone => return Rest::Destroyed,
            // A pause that is under way is not joined: where it fails, its own caller is told, and there was no attempt of ours.
            View::Resuming | View::Pausing => {
                handle.left(|view| matches!(view, View::Resuming | View::Pausing)).await;
            }
            View::Unreachable => {
                let reached = tokio::time::timeout(REACH_LIMIT, handle.left(|view| matches!(view, View::Unreachable)));
                if reached.await.is_ok() {
                    continue;
                }
                tracing::error!(sandbox_id = %id, "not to be paused: its VM may run, and its vmmshim does not answer");
                return Rest::Failed;
            }
            View::Creating | View::Destroying => return destroy(handle).await,
            // A paused one is asked too: a resume may have been accepted before the host took no more work, and comes first.
            View::Paused(_) | View::Running(..) => match handle.pause(PauseReason::Drain).await {
                Ok(()) => return Rest::Paused,
                // It has gone elsewhere meanwhile, which the next look tells.
                Err(PauseFailure::Refused(_)) => handle.left(|view| matches!(view, View::Pausing)).await,
                Err(error @ PauseFailure::Failed(_)) => {
                    if !matches!(handle.view(), View::Running(..)) {
                        continue;
                    }
                    tracing::error!(sandbox_id = %id, error = %Chain(&error), "not to be paused; it runs on");
                    return Rest::Failed;
                }
            },
        }
    }
}

async fn destroy(handle: &Handle) -> Rest {
    match handle.destroy().await {
        Ok(()) => Rest::Destroyed,
        Err(error) => {
            tracing::error!(sandbox_id = %handle.plan.id, error = %Chain(error.as_ref()), "not to be destroyed either");
            Rest::Failed
        }
    }
}
