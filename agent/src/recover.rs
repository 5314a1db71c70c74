//! What an agent does with what it finds when it starts: files of sandboxes, and shims that still run.
//!
//! An agent that was stopped or killed leaves VMs running. The record of a sandbox says what may have happened since it was written
//! (see [`record`](crate::sandbox::record)): running ones are taken over, paused ones kept, everything half-done is finished or
//! undone. Until that is complete the API answers Unavailable.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use roost_common::ids::{SandboxId, Slot};
use roost_common::net::SlotAddresses;
use roost_common::shim::{EXIT_FILE, Exit, MAX_EXIT_FILE, SHIM_SOCKET};

use crate::errors::{Chain, FileError};
use crate::guest::Guest;
use crate::host::files::{Layout, names};
use crate::host::shim::{self, ShimFault};
use crate::host::slots::SlotLease;
use crate::registry::Registry;
use crate::sandbox::plan::Plan;
use crate::sandbox::record::{Kept, Phase, Record, RecordError};
use crate::sandbox::task::Found;
use crate::sandbox::{MemoryLoad, PauseEnd, TeardownError, Vm, build, pause, resume};
use crate::templates::Sweep;
use crate::tombstone::{self, End, Tombstone};

/// How long a VM that is taken over may take to say that it runs before recovery goes on without it: its last agent may have ended in
/// the middle of a pause. One that runs, as almost all do, says so in milliseconds.
const RUN_ON_LIMIT: Duration = Duration::from_secs(2);
/// How often the shim of a running VM is tried.
const ADOPT_ATTEMPTS: u32 = 5;
/// Pause between two such attempts.
const ADOPT_PAUSE: Duration = Duration::from_secs(1);

/// Takes over what runs, keeps what is paused, and removes what is left of the rest. What cannot be removed becomes a sandbox of the
/// registry that is on its way out: one sandbox's trouble is no reason to keep a host from serving.
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
    // All slots are taken before anything is done with one of them: a sandbox whose record is gone must get no other's.
    let read = tokio::task::spawn_blocking({
        let host = registry.host().clone();
        move || {
            ids.into_iter()
                .map(|id| (Remnant::read(&host.layout, &id), id))
                .collect::<Vec<_>>()
        }
    });
    let slots = &registry.host().slots;
    let remnants = read.await.expect("file work does not panic");
    let leased: Vec<_> = remnants
        .into_iter()
        .map(|(remnant, id)| {
            let slot = remnant
                .record
                .as_ref()
                .ok()
                .and_then(|record| Slot::try_from(record.slot).ok());
            (id, remnant, slot.and_then(|slot| slots.lease_this(slot)))
        })
        .collect();
    let mut tasks = tokio::task::JoinSet::new();
    for (id, remnant, slot) in leased {
        let registry = registry.clone();
        tasks.spawn(async move { recover_one(&registry, id, remnant, slot).await });
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

/// The files of a sandbox as an agent finds them.
struct Remnant {
    record: Result<Record, RecordError>,
    exit: Option<Exit>,
}

impl Remnant {
    fn read(layout: &Layout, id: &SandboxId) -> Self {
        Self {
            record: Record::read(layout, id),
            exit: read_exit(layout, id),
        }
    }
}

async fn recover_one(registry: &Arc<Registry>, id: SandboxId, remnant: Remnant, slot: Option<SlotLease>) {
    let Remnant { record, exit } = remnant;
    let record = match record {
        Ok(record) => record,
        Err(error) if error.is_missing() => return clear(registry, id, None, None, None).await,
        // It may be somebody's paused sandbox, and another version of the agent may know what to make of it.
        Err(error) => {
            tracing::error!(sandbox_id = %id, error = %Chain(&error), "left alone: its record cannot be used");
            return registry.leave_alone();
        }
    };
    let Some(slot) = slot else {
        tracing::error!(sandbox_id = %id, slot = record.slot, "left alone: its slot is none, or another sandbox's");
        return registry.leave_alone();
    };
    match record.phase {
        Phase::Creating => clear(registry, id, Some(record), Some(slot), None).await,
        Phase::Running => match take_over(registry, &record, slot.slot()).await {
            TakenOver::Vm(vm) => adopt(registry, record, slot, *vm).await,
            TakenOver::Nothing => {
                let end = exit.as_ref().map_or(End::VmmLost, End::Vmm);
                let tombstone = Tombstone::new(&id, record.created_at_unix, end);
                clear(registry, id, Some(record), Some(slot), Some(tombstone)).await;
            }
            TakenOver::Unreachable => registry.leave_alone(),
        },
        Phase::Thawing(kept) => match take_over(registry, &record, slot.slot()).await {
            TakenOver::Vm(vm) => adopt(registry, record, slot, *vm).await,
            TakenOver::Nothing => put_to_rest(registry, record, slot, kept).await,
            TakenOver::Unreachable => registry.leave_alone(),
        },
        Phase::Paused(kept) | Phase::Resuming(kept) => put_to_rest(registry, record, slot, kept).await,
    }
}

async fn put_to_rest(registry: &Arc<Registry>, record: Record, slot: SlotLease, kept: Kept) {
    let mut kept = keep(registry, &record, kept).await;
    // The agent before us may have ended between the pause and the event.
    pause::tell(registry.host(), &record, &mut kept).await;
    registry.take(record, slot, Found::Paused(kept));
}

/// What was found where a VM should be.
enum TakenOver {
    Vm(Box<Vm>),
    /// No VM of this sandbox runs any more.
    Nothing,
    /// One may, and cannot be got at. It is somebody's: it is left alone until the agent is started again.
    Unreachable,
}

/// The VM of a sandbox that was running.
async fn take_over(registry: &Arc<Registry>, record: &Record, slot: Slot) -> TakenOver {
    let (host, id) = (registry.host(), &record.plan.id);
    let socket = host.layout.vm_run(id).join(SHIM_SOCKET);
    for attempt in 1..=ADOPT_ATTEMPTS {
        match shim::adopt(&socket).await {
            Ok(Some((shim, spec))) if spec.sandbox == *id => {
                return TakenOver::Vm(Box::new(Vm {
                    shim,
                    guest: Arc::new(Guest::new(SlotAddresses::of(slot).host, record.token.clone())),
                    memory: MemoryLoad::of(&spec.start),
                    record: record.clone(),
                }));
            }
            Ok(_) => return TakenOver::Nothing,
            // It is no shim that we know how to talk to; whatever it holds is ended with it.
            Err(error @ ShimFault::Protocol(_)) => {
                tracing::error!(sandbox_id = %id, error = %Chain(&error), "a running VM could not be taken over, and is ended");
                return TakenOver::Nothing;
            }
            Err(error) => {
                tracing::error!(sandbox_id = %id, attempt, error = %Chain(&error), "a running VM could not be taken over");
                // It has had a minute, and all others of this host wait for it.
                if matches!(error, ShimFault::Timeout(_)) {
                    break;
                }
                tokio::time::sleep(ADOPT_PAUSE).await;
            }
        }
    }
    tracing::error!(sandbox_id = %id, "left alone: its vmmshim cannot be reached; start the agent again when it can");
    TakenOver::Unreachable
}

/// Registers a VM that was taken over, once it runs: the agent before us may have ended in the middle of a pause, or of a resume's
/// thaw. Where that takes longer it is the sandbox's own task that sees to it.
async fn adopt(registry: &Arc<Registry>, record: Record, slot: SlotLease, vm: Vm) {
    let id = record.plan.id.clone();
    let mut running = tokio::spawn(pause::run_on_after_interruption(registry.host().clone(), vm));
    let found = match tokio::time::timeout(RUN_ON_LIMIT, &mut running).await {
        Ok(end) => match end.expect("running on does not panic") {
            PauseEnd::Running(vm, _) => Found::Running(Box::new(vm)),
            // As any end of a pause, for the task.
            end => Found::Interrupted(tokio::spawn(async move { end })),
        },
        Err(_) => Found::Interrupted(running),
    };
    registry.take(record, slot, found);
    tracing::info!(sandbox_id = %id, op = "adopt", "a running sandbox of an earlier agent was taken over");
}

/// Makes a paused sandbox, or one that was on its way back, one that is paused and nothing else.
async fn keep(registry: &Arc<Registry>, record: &Record, kept: Kept) -> Kept {
    let (host, id) = (registry.host(), &record.plan.id);
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
        stays(registry, id, record, slot, &error);
    }
}

fn stays(
    registry: &Arc<Registry>,
    id: SandboxId,
    record: Option<Record>,
    slot: Option<SlotLease>,
    error: &TeardownError,
) {
    tracing::error!(sandbox_id = %id, error = %Chain(error), "a sandbox of an earlier agent stays; it is tried again");
    let Some(slot) = slot.or_else(|| registry.host().slots.lease()) else {
        tracing::error!(sandbox_id = %id, "no slot for what is left of a sandbox; it stays until the next start");
        return;
    };
    let record = record.unwrap_or_else(|| Record::unknown(Plan::unknown(id), slot.slot().into()));
    registry.take(record, slot, Found::Remains);
}

/// How the VMM ended, where its shim has written that down: it ended while no agent was there to be told.
fn read_exit(layout: &Layout, id: &SandboxId) -> Option<Exit> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
    let file = File::options()
        .read(true)
        .custom_flags(flags.bits())
        .open(layout.vm_run(id).join(EXIT_FILE))
        .ok()?;
    // The VM's uid may write in this directory.
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut content = Vec::new();
    file.take(MAX_EXIT_FILE as u64 + 1).read_to_end(&mut content).ok()?;
    Exit::from_json(&content).ok()
}
