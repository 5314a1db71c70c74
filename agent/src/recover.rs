//! What an agent does with what it finds when it starts: files of sandboxes, and shims that still run.
//!
//! An agent that was stopped or killed leaves VMs running. The record of a sandbox says what may have happened since it was written
//! (see [`record`](crate::sandbox::record)): running ones are taken over, paused ones kept, everything half-done is finished or
//! undone. Until that is complete the API answers Unavailable.

use std::collections::BTreeSet;
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

use roost_common::ids::{SandboxId, Slot};
use roost_common::shim::{EXIT_FILE, Exit, MAX_EXIT_FILE, SHIM_SOCKET};

use crate::errors::{Chain, FileError};
use crate::host::Host;
use crate::host::files::{Layout, blocking, names, open_of_vm};
use crate::host::shim::{self, ShimFault};
use crate::host::slots::SlotLease;
use crate::registry::Registry;
use crate::sandbox::plan::Plan;
use crate::sandbox::record::{Kept, Memory, Phase, Record, RecordError};
use crate::sandbox::task::Found;
use crate::sandbox::{MemoryLoad, ReachEnd, Vm, build, pause, resume};
use crate::templates::Sweep;
use crate::tombstone::{self, End, Tombstone};

/// How long a VM may take to be reached, and to say that it runs, before recovery goes on without it: all others wait for it, and its
/// last agent may have ended in the middle of a pause. One that runs, as almost all do, says so in milliseconds.
const REACH_LIMIT: Duration = Duration::from_secs(10);
/// How often in a row the shim of a running VM is tried.
const ADOPT_ATTEMPTS: u32 = 5;
/// Pause between two such attempts.
const ADOPT_PAUSE: Duration = Duration::from_secs(1);

/// Takes over what runs, keeps what is paused, and removes what is left of the rest. What cannot be removed becomes a sandbox of the
/// registry that is on its way out, and what cannot be reached or understood one that is unreachable: one sandbox's trouble is no reason
/// to keep a host from serving, nor to let a control plane take that sandbox for stopped.
///
/// # Errors
/// When the directories themselves cannot be read.
pub async fn recover(registry: &Arc<Registry>) -> Result<(), FileError> {
    let started = Instant::now();
    let layout = &registry.host().layout;
    let (runs, sandboxes) = (layout.vm_runs().to_owned(), layout.sandboxes());
    let listed = tokio::task::spawn_blocking(move || {
        Ok::<_, FileError>(
            names(&runs)?
                .into_iter()
                .chain(names(&sandboxes)?)
                .collect::<BTreeSet<String>>(),
        )
    });
    let mut ids = BTreeSet::new();
    for name in listed.await.expect("file work does not panic")? {
        // A directory on its way out has its id behind the prefix; what is no id is none of ours.
        let id = name.strip_prefix(".removing-").unwrap_or(&name).parse::<SandboxId>();
        match id {
            Ok(id) => drop(ids.insert(id)),
            Err(_) => tracing::warn!(name = %name.escape_debug(), "left alone: its name is no sandbox id"),
        }
    }
    let count = ids.len();
    let read = tokio::task::spawn_blocking({
        let host = registry.host().clone();
        move || {
            ids.into_iter()
                .map(|id| (Record::read(&host.layout, &id), id))
                .collect::<Vec<_>>()
        }
    });
    let mut records = read.await.expect("file work does not panic");
    // All slots are taken before anything is done with one of them: a sandbox whose record is gone must get no other's. Those first that
    // may be using theirs.
    records.sort_by_key(|(record, _)| !record.as_ref().is_ok_and(|record| may_run(record.phase)));
    let slots = &registry.host().slots;
    let leased: Vec<_> = records
        .into_iter()
        .map(|(record, id)| {
            let slot = record.as_ref().ok().and_then(|record| Slot::try_from(record.slot).ok());
            (id, record, slot.and_then(|slot| slots.lease_this(slot)))
        })
        .collect();
    let mut tasks = tokio::task::JoinSet::new();
    for (id, record, slot) in leased {
        let registry = registry.clone();
        tasks.spawn(async move { recover_one(&registry, id, record, slot).await });
    }
    tasks.join_all().await;
    registry.sweep_templates(Sweep::DeletedAndUnfinished).await;
    tracing::info!(
        op = "recover",
        sandboxes = count,
        elapsed_ms = started.elapsed().as_millis(),
        "recovered"
    );
    Ok(())
}

/// Whether a sandbox that was doing this may have a VM that is not to be ended.
fn may_run(phase: Phase) -> bool {
    match phase {
        Phase::Running | Phase::Thawing(_) => true,
        Phase::Creating | Phase::Paused(_) | Phase::Resuming(_) => false,
    }
}

async fn recover_one(
    registry: &Arc<Registry>,
    id: SandboxId,
    record: Result<Record, RecordError>,
    slot: Option<SlotLease>,
) {
    let record = match record {
        Ok(record) => record,
        Err(error) if error.is_missing() => return clear(registry, id, None, None, None).await,
        // It may be somebody's paused sandbox, and another version of the agent may know what to make of it.
        Err(error) => {
            tracing::error!(sandbox_id = %id, error = %Chain(&error), "its record cannot be used; mend it and start the agent again");
            return take(registry, id, None, None, Found::Unreachable);
        }
    };
    match (record.phase, slot) {
        (Phase::Creating, slot) => clear(registry, id, Some(record), slot, None).await,
        (Phase::Running | Phase::Thawing(_), Some(slot)) => take_over(registry, record, slot).await,
        (Phase::Running | Phase::Thawing(_), None) => {
            tracing::error!(sandbox_id = %id, slot = record.slot, "its slot is none, or another sandbox's; destroy one of the two");
            take(registry, id, Some(record), None, Found::Unreachable);
        }
        (Phase::Paused(kept) | Phase::Resuming(kept), slot) => {
            if slot.is_none() {
                tracing::warn!(sandbox_id = %id, slot = record.slot, "its slot is none, or another sandbox's; it gets another");
            }
            put_to_rest(registry, record, slot, kept).await;
        }
    }
}

/// Registers a paused sandbox, once it is paused and nothing else.
async fn put_to_rest(registry: &Arc<Registry>, record: Record, slot: Option<SlotLease>, kept: Kept) {
    let mut kept = keep(registry.host(), &record, kept).await;
    // The agent before us may have ended between the pause and the event.
    pause::tell(registry.host(), &record, &mut kept).await;
    let id = record.plan.id.clone();
    take(registry, id, Some(record), slot, Found::Paused(kept));
}

/// Registers a sandbox that was running, once its VM runs again, or has been waited for long enough: then its own task sees to it.
async fn take_over(registry: &Arc<Registry>, record: Record, slot: SlotLease) {
    let id = record.plan.id.clone();
    let mut reaching = tokio::spawn(reach(registry.host().clone(), record.clone(), slot.slot()));
    let found = match tokio::time::timeout(REACH_LIMIT, &mut reaching).await {
        Err(_) => Found::Reaching(Box::new(record.clone()), reaching),
        Ok(end) => match end.expect("reaching does not panic") {
            ReachEnd::Running(vm) => {
                tracing::info!(sandbox_id = %id, op = "adopt", "a running sandbox of an earlier agent was taken over");
                Found::Running(Box::new(vm))
            }
            ReachEnd::Paused(mut kept) => {
                pause::tell(registry.host(), &record, &mut kept).await;
                Found::Paused(kept)
            }
            ReachEnd::Gone(exit) => {
                let end = exit.as_deref().map_or(End::VmmLost, End::Vmm);
                let tombstone = Tombstone::new(&id, record.created_at_unix, end);
                return clear(registry, id, Some(record), Some(slot), Some(tombstone)).await;
            }
            end @ (ReachEnd::Ended(..) | ReachEnd::Unreachable) => {
                Found::Reaching(Box::new(record.clone()), tokio::spawn(async move { end }))
            }
        },
    };
    take(registry, id, Some(record), Some(slot), found);
}

/// Registers a sandbox under its own slot, or another one where it has none.
fn take(registry: &Arc<Registry>, id: SandboxId, record: Option<Record>, slot: Option<SlotLease>, found: Found) {
    let Some(slot) = slot.or_else(|| registry.host().slots.lease()) else {
        tracing::error!(sandbox_id = %id, "no slot for a sandbox of an earlier agent; it stays as it is until the next start");
        return;
    };
    let record = record.unwrap_or_else(|| Record::unknown(Plan::unknown(id), slot.slot().into()));
    registry.take(record, slot, found);
}

/// Reaches the VM of a sandbox that was running, and brings it to run on: the agent before us may have ended in the middle of a pause, or
/// of a resume's thaw.
pub(crate) async fn reach(host: Arc<Host>, record: Record, slot: Slot) -> ReachEnd<Vm> {
    let id = record.plan.id.clone();
    let socket = host.layout.vm_run(&id).join(SHIM_SOCKET);
    for attempt in 1..=ADOPT_ATTEMPTS {
        match shim::adopt(&socket).await {
            Ok(Some((shim, spec))) if spec.sandbox == id => {
                let guest = Arc::new(host.guest(slot, record.token.clone()));
                return run_on(host, Vm::new(shim, guest, MemoryLoad::of(&spec.start), record)).await;
            }
            Ok(_) => return gone(&host, &record).await,
            // It is no shim that we know how to talk to; whatever it holds is ended with it.
            Err(error @ ShimFault::Protocol(_)) => {
                tracing::error!(sandbox_id = %id, error = %Chain(&error), "a running VM could not be taken over, and is ended");
                return gone(&host, &record).await;
            }
            Err(error) => {
                tracing::error!(sandbox_id = %id, attempt, error = %Chain(&error), "a running VM could not be taken over");
                // It has had a minute; or it is somebody's VM that an agent of its own version knows how to talk to.
                if matches!(error, ShimFault::Timeout(_) | ShimFault::Version(_)) {
                    break;
                }
                tokio::time::sleep(ADOPT_PAUSE).await;
            }
        }
    }
    tracing::error!(sandbox_id = %id, "its vmmshim cannot be reached; tried again in a while");
    ReachEnd::Unreachable
}

/// What is left of a sandbox whose VM has gone.
async fn gone(host: &Arc<Host>, record: &Record) -> ReachEnd<Vm> {
    match record.phase {
        Phase::Thawing(mut kept) => {
            // The host itself went down, and its run directories with it. What the guest wrote may have reached the disk before the time of
            // that write did, so nobody can say whether it wrote.
            if !host.layout.vm_run(&record.plan.id).exists() {
                tracing::warn!(sandbox_id = %record.plan.id, "the host went down as its guest was told to thaw; its memory is given up");
                kept.memory = Memory::Spent;
            }
            ReachEnd::Paused(keep(host, record, kept).await)
        }
        Phase::Creating | Phase::Running | Phase::Paused(_) | Phase::Resuming(_) => {
            let (host, id) = (host.clone(), record.plan.id.clone());
            let exit = blocking(move || read_exit(&host.layout, &id));
            ReachEnd::Gone(exit.await.map(Box::new))
        }
    }
}

/// Lets a VM run on that may have been in the middle of a pause, or of anything else that stops or freezes it.
async fn run_on(host: Arc<Host>, mut vm: Vm) -> ReachEnd<Vm> {
    let Vm {
        shim, guest, record, ..
    } = &mut vm;
    let id = record.plan.id.clone();
    let ending = pause::run_on(&pause::api(&host, &id), shim, guest, &id).await;
    match (ending, record.phase) {
        // Nobody had been told that it runs again, so it is as paused as it was, as far as its disk allows.
        (Some(_), Phase::Thawing(kept)) => {
            let record = record.clone();
            let killed = vm.shim.kill().await;
            if let Err(error) = &killed {
                tracing::error!(sandbox_id = %id, error = %Chain(error), "the VMM of a resume that failed could not be ended");
            }
            let vm_has_ended = killed.is_ok();
            let kept = blocking(move || resume::put_back(&host, &record, kept, vm_has_ended));
            ReachEnd::Paused(kept.await)
        }
        (Some(ending), _) => ReachEnd::Ended(vm, ending),
        (None, phase) => {
            record.phase = Phase::Running;
            let stale = phase != Phase::Running;
            let settled = blocking({
                let (host, record) = (host.clone(), record.clone());
                move || {
                    if stale {
                        record.write(&host.layout)?;
                    }
                    pause::remove_snapshots(&host, &record.plan.id, None)
                }
            });
            if let Err(error) = settled.await {
                tracing::warn!(sandbox_id = %id, error = %Chain(&error), "an earlier snapshot stays until the next one");
            }
            ReachEnd::Running(vm)
        }
    }
}

/// Makes a paused sandbox, or one that was on its way back, one that is paused and nothing else.
async fn keep(host: &Arc<Host>, record: &Record, kept: Kept) -> Kept {
    let id = &record.plan.id;
    let vm_has_ended = match shim::end_at(&host.layout.vm_run(id).join(SHIM_SOCKET)).await {
        Ok(false) => true,
        Ok(true) => {
            tracing::info!(sandbox_id = %id, op = "adopt", "ended the VM of a paused sandbox");
            true
        }
        Err(error) => {
            tracing::error!(sandbox_id = %id, error = %Chain(&error), "the VM of a paused sandbox could not be ended");
            false
        }
    };
    let settled = tokio::task::spawn_blocking({
        let (host, record) = (host.clone(), record.clone());
        move || {
            if record.phase != Phase::Paused(kept) {
                return resume::put_back(&host, &record, kept, vm_has_ended);
            }
            // By its socket a resume or a destroy ends it, and neither goes on before it has.
            if !vm_has_ended {
                return kept;
            }
            // It was stopped, or about to be, by an agent that had all of it on disk.
            if let Err(error) = pause::tidy(&host, &record.plan.id, Some(kept.generation)) {
                tracing::error!(sandbox_id = %record.plan.id, error = %Chain(&error), "something is left beside a paused sandbox");
            }
            kept
        }
    });
    settled.await.expect("file work does not panic")
}

/// Ends and removes what is left of a sandbox, and writes its tombstone where it had been answered as running.
async fn clear(
    registry: &Arc<Registry>,
    id: SandboxId,
    record: Option<Record>,
    slot: Option<SlotLease>,
    tombstone: Option<Tombstone>,
) {
    let host = registry.host();
    // Why it ended comes first: once its files are gone nobody else will say so.
    if let Some(tombstone) = tombstone {
        tracing::warn!(sandbox_id = %id, reason = %tombstone.summary(), "a sandbox of an earlier agent has ended");
        let host = host.clone();
        if let Some(event) = tombstone.event() {
            // Where it is lost that has been logged.
            drop(host.tell(event).await);
        }
        let written = tokio::task::spawn_blocking(move || tombstone::bury_once(&host.layout, &tombstone));
        if let Err(error) = written.await.expect("file work does not panic") {
            tracing::error!(sandbox_id = %id, error = %Chain(&error), "no tombstone");
        }
    }
    if let Err(error) = build::tear_down(registry.host(), &id, None).await {
        tracing::error!(sandbox_id = %id, error = %Chain(&error), "a sandbox of an earlier agent stays; it is tried again");
        take(registry, id, record, slot, Found::Remains);
    }
}

/// How the VMM ended, where its shim has written that down: it ended while no agent was there to be told.
fn read_exit(layout: &Layout, id: &SandboxId) -> Option<Exit> {
    let file = open_of_vm(&layout.vm_run(id).join(EXIT_FILE)).ok()?;
    let mut content = Vec::new();
    file.take(MAX_EXIT_FILE as u64 + 1).read_to_end(&mut content).ok()?;
    Exit::from_json(&content).ok()
}
