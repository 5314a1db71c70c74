//! What an agent does with what it finds when it starts: files of sandboxes, and shims that still run.
//!
//! An agent that was stopped or killed leaves VMs running. The record of a sandbox says what may have happened since it was written
//! (see [`record`](crate::sandbox::record)): running ones are taken over, paused ones kept, everything half-done is finished or
//! undone. Until that is complete the API answers Unavailable.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use roost_common::ids::{SandboxId, Slot};
use roost_common::net::SlotAddresses;
use roost_common::shim::{API_SOCKET, EXIT_FILE, Exit, MAX_EXIT_FILE, SHIM_SOCKET, VmSpec};

use crate::errors::{Chain, FileError};
use crate::guest::Guest;
use crate::host::files::Layout;
use crate::host::shim::{self, ShimLink};
use crate::host::slots::SlotLease;
use crate::outbox::{Event, EventKind};
use crate::registry::Registry;
use crate::sandbox::plan::Plan;
use crate::sandbox::record::{Kept, Phase, Record, RecordError};
use crate::sandbox::task::Found;
use crate::sandbox::{MemoryLoad, PauseReason, TeardownError, Vm, build, pause, resume};
use crate::tombstone::{self, End, Tombstone};
use crate::vmm::Vmm;

/// How often a VM that is taken over is told to run, in case its last agent ended in the middle of a pause.
const RUN_ON_ATTEMPTS: u32 = 3;
/// Pause between two such attempts.
const RUN_ON_PAUSE: Duration = Duration::from_millis(200);

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
            return;
        }
    };
    let Some(slot) = slot else {
        tracing::error!(sandbox_id = %id, slot = record.slot, "left alone: its slot is none, or another sandbox's");
        return;
    };
    match record.phase {
        Phase::Creating => clear(registry, id, Some(record), Some(slot), None).await,
        Phase::Running => match take_over(registry, &record).await {
            Some(vm) => registry.take(record, slot, Found::Running(Box::new(vm))),
            None => {
                let end = exit.as_ref().map_or(End::VmmLost, End::Vmm);
                let tombstone = Tombstone::new(&id, record.created_at_unix, end);
                clear(registry, id, Some(record), Some(slot), Some(tombstone)).await;
            }
        },
        Phase::Paused(kept) | Phase::Resuming(kept) => {
            let kept = keep(registry, &record, kept).await;
            // Once more: the agent before us may have ended between the pause and the event.
            if kept.reason == PauseReason::Idle {
                let event = Event::new(EventKind::AutoPaused, id.clone(), kept.paused_at_unix);
                registry.host().tell(event).await;
            }
            registry.take(record, slot, Found::Paused(kept));
        }
    }
}

/// The VM of a sandbox that was running, if it still is.
async fn take_over(registry: &Arc<Registry>, record: &Record) -> Option<Vm> {
    let (host, id) = (registry.host(), &record.plan.id);
    let run_dir = host.layout.vm_run(id);
    let (shim, spec): (ShimLink, VmSpec) = match shim::adopt(&run_dir.join(SHIM_SOCKET)).await {
        Ok(Some((shim, spec))) if spec.sandbox == *id => (shim, spec),
        Ok(_) => return None,
        Err(error) => {
            // It holds a VM that we cannot get at; the teardown ends it.
            tracing::error!(sandbox_id = %id, error = %Chain(&error), "a running VM could not be taken over");
            return None;
        }
    };
    let slot = Slot::try_from(record.slot).ok()?;
    let vm = Vm {
        shim,
        guest: Arc::new(Guest::new(SlotAddresses::of(slot).host, record.token.clone())),
        memory: MemoryLoad::of(&spec.start),
        record: record.clone(),
    };
    // The agent before us may have ended in the middle of a pause, or between recording a resume and thawing.
    let api = Vmm::new(&run_dir.join(API_SOCKET));
    for attempt in 1..=RUN_ON_ATTEMPTS {
        match pause::run_on(&api, &vm.guest).await {
            Ok(()) => break,
            Err(error) => {
                tracing::warn!(sandbox_id = %id, attempt, error = %Chain(error.as_ref()), "a VM that was taken over does not say that it runs");
                tokio::time::sleep(RUN_ON_PAUSE).await;
            }
        }
    }
    let tidied = tokio::task::spawn_blocking({
        let (host, id) = (host.clone(), id.clone());
        move || pause::remove_snapshots(&host, &id, None)
    });
    if let Err(error) = tidied.await.expect("file work does not panic") {
        tracing::warn!(sandbox_id = %id, error = %Chain(&error), "an unfinished snapshot stays until the next one");
    }
    tracing::info!(sandbox_id = %id, op = "adopt", "a running sandbox of an earlier agent was taken over");
    Some(vm)
}

/// Makes a paused sandbox, or one that was on its way back, one that is paused and nothing else.
async fn keep(registry: &Arc<Registry>, record: &Record, kept: Kept) -> Kept {
    let (host, id) = (registry.host(), &record.plan.id);
    match shim::end_at(&host.layout.vm_run(id).join(SHIM_SOCKET)).await {
        Ok(false) => {}
        Ok(true) => tracing::info!(sandbox_id = %id, op = "adopt", "ended the VM of a paused sandbox"),
        Err(error) => {
            tracing::error!(sandbox_id = %id, error = %Chain(&error), "the VM of a paused sandbox could not be ended");
        }
    }
    let settled = tokio::task::spawn_blocking({
        let (host, record) = (host.clone(), record.clone());
        move || {
            let kept = match record.phase {
                Phase::Resuming(_) => resume::settle(&host, kept, &record.plan.id),
                // It was stopped, or about to be, by an agent that had all of it on disk.
                Phase::Creating | Phase::Running | Phase::Paused(_) => kept,
            };
            let put_back = if record.phase == Phase::Paused(kept) {
                Ok(())
            } else {
                record.with(Phase::Paused(kept)).write(&host.layout)
            };
            let put_back = put_back.and_then(|()| pause::tidy(&host, &record.plan.id, Some(kept.generation)));
            if let Err(error) = put_back {
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
    let outcome = build::tear_down(host, &id, None).await;
    if let Some(tombstone) = tombstone {
        tracing::warn!(sandbox_id = %id, reason = %tombstone.summary(), "a sandbox of an earlier agent has ended");
        let host = host.clone();
        if let Some(event) = tombstone.event() {
            host.tell(event).await;
        }
        let written = tokio::task::spawn_blocking(move || tombstone::bury_once(&host.layout, &tombstone));
        if let Err(error) = written.await.expect("file work does not panic") {
            tracing::error!(sandbox_id = %id, error = %Chain(&error), "no tombstone");
        }
    }
    if let Err(error) = outcome {
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

fn names(dir: &Path) -> Result<Vec<String>, FileError> {
    let failed = |source| FileError::new("reading", dir, source);
    std::fs::read_dir(dir)
        .map_err(failed)?
        .map(|entry| Ok(entry.map_err(failed)?.file_name().to_string_lossy().into_owned()))
        .collect()
}
