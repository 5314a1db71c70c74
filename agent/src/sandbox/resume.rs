//! Resuming a paused sandbox: from its memory and disk, or, where its memory cannot be used, from its disk alone.
//!
//! ```text
//! record, manifest, image --> parts: shim (its VMM's version fits), disk, network --> config.json --> record "resuming" --> VMM restores, guest frozen
//!     --> vm.resume --> envd answers, /init (the gate) --> record "thawing" --> thaw --> record "running" --> old snapshot removed
//! '---------------------- a failure up to here ends the VMM: it is paused ----------------------'
//! ```
//!
//! The guest wakes with its filesystems frozen, so that up to the thaw it can write nothing and the memory on disk still belongs to
//! the disk. That is checked and not believed: a guest could thaw itself. The exception store's time of change tells, and a
//! memory that the disk has left behind is never offered again.
//!
//! An envd that knows nothing of freezing lets its guest write as soon as it runs, and has nothing to thaw; a resume of such a guest that
//! fails, fails alike: its disk tells whether it has written.
//!
//! A guest that boots from its disk alone writes at once, so there its memory is given up before it starts.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use roost_common::ids::{SandboxId, Slot};
use roost_common::shim::{API_SOCKET, CONSOLE_FILE, SHIM_SOCKET};

use super::parts::{DiskFiles, MemoryLoad, PartError, Parts, Vm, boot_limit, identity, millis};
use super::pause::{self, tidy};
use super::record::{Kept, Memory, Phase, Record, RecordError};
use super::wake::{Memories, Steps, WAKE_LIMIT, wake};
use super::{BuildError, Ending, ResumeEnd, build};
use crate::errors::{Chain, FileError};
use crate::failpoint::{pass, reach};
use crate::guest::{Guest, GuestError, Nonces};
use crate::host::files;
use crate::host::kernels::Kernel;
use crate::host::shim::{self, ExitSummary, ShimFault};
use crate::host::slots::SlotLease;
use crate::host::{Host, kernels};
use crate::snapshot::{Manifest, Misfit, SnapshotError};
use crate::trace::step;
use crate::vmm::{Vmm, VmmError};

const STEPS: Steps = Steps {
    restored: "resume.restored",
    woken: "resume.woken",
};

/// What a resume asks for, checked; what it leaves out stays as it was.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResumeWish {
    /// Another inactivity limit, in seconds.
    pub timeout_sec: Option<u32>,
    /// Another user for commands of calls that name none.
    pub user: Option<String>,
    /// Another environment of all commands.
    pub env: Option<BTreeMap<String, String>>,
    /// The kernel to boot with [`From::Disk`], where there is one of this version.
    pub kernel_version: Option<String>,
    /// What to resume from.
    pub from: From,
}

/// What a sandbox is resumed from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum From {
    /// Memory and disk: everything goes on where it was.
    #[default]
    Memory,
    /// The disk alone: the guest boots.
    Disk,
}

/// Why a sandbox could not be resumed.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    /// It was told to stop.
    #[error("the resume was stopped")]
    Stopped,
    /// Its record.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// Its record does not say that it is paused.
    #[error("the sandbox's record does not say that it is paused")]
    NotPaused,
    /// Its disk has been written since its memory was.
    #[error(
        "the sandbox's memory no longer fits its disk, which has been written since; resume it from its disk alone"
    )]
    Spent,
    /// Its memory cannot be used on this host as it is.
    #[error("the sandbox's memory cannot be used on this host; resume it from its disk alone")]
    Misfit(#[from] Misfit),
    /// Its snapshot is damaged.
    #[error("the sandbox's memory is damaged; resume it from its disk alone")]
    Snapshot(#[from] SnapshotError),
    /// Image or kernel.
    #[error(transparent)]
    Template(BuildError),
    /// A file operation.
    #[error(transparent)]
    File(#[from] FileError),
    /// An earlier VMM of this sandbox still runs.
    #[error("an earlier VMM of this sandbox could not be ended")]
    Earlier(#[source] ShimFault),
    /// Shim, disk, network or VMM.
    #[error(transparent)]
    Part(#[from] PartError),
    /// The VMM's API.
    #[error("the VMM could not load the sandbox")]
    Vmm(#[from] VmmError),
    /// The VMM ended.
    #[error("the VMM ended before its guest was up: {0}")]
    VmmEnded(ExitSummary),
    /// The shim ended, and the VMM with it.
    #[error("the vmmshim ended before the guest was up")]
    ShimLost,
    /// The guest did not answer, or refused its identity.
    #[error("the guest did not wake up")]
    Guest(#[from] GuestError),
}

/// Everything that is known before anything is started.
struct Ready {
    /// As it was, for an undo.
    original: Record,
    /// With what the wish changes.
    record: Record,
    kernel: Kernel,
    files: DiskFiles,
    /// Where memory is used.
    memories: Option<Arc<Memories>>,
}

/// Resumes a paused sandbox; `stop` ends that at any point before it runs.
pub async fn resume(
    host: Arc<Host>,
    id: SandboxId,
    slot: Arc<SlotLease>,
    kept: Kept,
    wish: ResumeWish,
    stop: impl Future<Output = ()>,
) -> ResumeEnd<Vm> {
    let began = Instant::now();
    // Nothing of an earlier VM may be there: it would hold the disk.
    if let Err(fault) = shim::end_at(&host.layout.vm_run(&id).join(SHIM_SOCKET)).await {
        return ResumeEnd::Paused(kept, ResumeError::Earlier(fault));
    }
    let ready = tokio::task::spawn_blocking({
        let (host, id, slot) = (host.clone(), id.clone(), slot.slot());
        move || make_ready(&host, &id, slot, kept, wish)
    });
    let ready = match step("ready", ready).await.expect("file work does not panic") {
        Ok(ready) => ready,
        Err(error) => return ResumeEnd::Paused(kept, error),
    };
    let (mut parts, mut kept) = (Parts::default(), kept);
    let original = ready.original.clone();
    let outcome = tokio::select! {
        biased;
        () = stop => Err(ResumeError::Stopped),
        outcome = steps(&host, &slot, &mut kept, ready, &mut parts) => outcome,
    };
    match outcome {
        Ok((guest, record, memory)) => {
            tracing::info!(sandbox_id = %id, op = "resume", elapsed_ms = millis(began), "guest is up");
            ResumeEnd::Running(Vm::new(parts.into_shim().await, Arc::new(guest), memory, record))
        }
        Err(error) => {
            tracing::warn!(sandbox_id = %id, op = "resume", error = %Chain(&error), "undoing a resume");
            let kept = undo(&host, original, kept, parts).await;
            ResumeEnd::Paused(kept, error)
        }
    }
}

/// Reads and checks everything that can be before anything is started, and makes room for a new VM.
fn make_ready(host: &Host, id: &SandboxId, slot: Slot, kept: Kept, wish: ResumeWish) -> Result<Ready, ResumeError> {
    // No VM of it runs any more, so what its disk says now is final.
    if wish.from == From::Memory && !kept.is_whole(&host.layout, id)? {
        return Err(ResumeError::Spent);
    }
    let found = Record::read(&host.layout, id)?;
    if !matches!(found.phase, Phase::Paused(_) | Phase::Resuming(_) | Phase::Thawing(_)) {
        return Err(ResumeError::NotPaused);
    }
    let original = Record {
        // An agent that starts may have found its old one taken.
        slot: slot.into(),
        ..found.with(Phase::Paused(kept))
    };
    // A resume that failed may not have been able to say so.
    if found != original {
        original.write(&host.layout)?;
    }
    let mut record = original.clone();
    let plan = &mut record.plan;
    plan.timeout_sec = wish.timeout_sec.unwrap_or(plan.timeout_sec);
    plan.user = wish.user.or(plan.user.take());
    plan.env = wish.env.unwrap_or_else(|| std::mem::take(&mut plan.env));
    let files = build::disk_of(host, &record).map_err(ResumeError::Template)?;
    let latest = build::latest_kernel(host).map_err(ResumeError::Template)?;
    let kernel = match &wish.kernel_version {
        Some(version) => kernels::of_version(&host.layout.kernels(), version).unwrap_or(latest),
        None => latest,
    };
    let memories = match wish.from {
        From::Disk => None,
        From::Memory => {
            let generation = host.layout.generation(id, kept.generation);
            let manifest = Manifest::read(&generation)?;
            manifest.verify(&generation)?;
            let memories = Memories::new(host, manifest)?;
            memories.fits(record.size())?;
            Some(Arc::new(memories))
        }
    };
    tidy(host, id, Some(kept.generation))?;
    files::make_dir(&host.layout.vm_run(id))?;
    Ok(Ready {
        files,
        original,
        record,
        kernel,
        memories,
    })
}

async fn steps(
    host: &Arc<Host>,
    slot: &SlotLease,
    kept: &mut Kept,
    ready: Ready,
    parts: &mut Parts,
) -> Result<(Guest, Record, MemoryLoad), ResumeError> {
    let Ready {
        original: _,
        mut record,
        kernel,
        files,
        memories,
    } = ready;
    let (plan, id) = (record.plan.clone(), record.plan.id.clone());
    let gate = parts.gate.clone();
    let write = |record: Record| {
        let (gate, host) = (gate.clone(), host.clone());
        async move { step("record", gate.run(move || record.write(&host.layout))).await }
    };
    reach("resume.ready").await?;
    parts.start_shim(host);
    if let Some(memories) = &memories {
        memories.fits_vmm(&parts.shim().await?.vmm_version)?;
    }
    let disk_minor = parts.acquire(host, &plan, slot, files).await?;
    reach("resume.acquired").await?;
    // Asked again now that the disk is ours: a VM whose end was known before may have written until its last descriptor was closed.
    if memories.is_some() {
        let (host, id, found) = (host.clone(), id.clone(), *kept);
        if !gate.run(move || found.is_whole(&host.layout, &id)).await? {
            return Err(ResumeError::Spent);
        }
    }
    let uid = parts.shim().await?.link.uid();
    let (start, before_it_runs) = match &memories {
        Some(memories) => {
            let offered = gate.run({
                let (host, id, memories, generation) = (host.clone(), id.clone(), memories.clone(), kept.generation);
                move || memories.offer(&host, &id, generation, disk_minor, uid)
            });
            let start = step("offer", offered).await?;
            // Whoever finds this knows that the guest is frozen and nobody was told that it runs. A VM that is restored is stopped until
            // it is woken, so this may be written beside its launch.
            (start, Some(record.with(Phase::Resuming(*kept))))
        }
        None => {
            kept.memory = Memory::Spent;
            write(record.with(Phase::Paused(*kept))).await?;
            (build::boot(&kernel), None)
        }
    };
    reach("resume.offered").await?;
    let memory = MemoryLoad::of(&start);
    let written = async {
        match before_it_runs {
            Some(record) => write(record).await,
            None => Ok(()),
        }
    };
    let (written, launched) = tokio::join!(written, parts.launch(host, &plan, start));
    written?;
    let shim = launched?;

    reach("resume.launched").await?;
    let guest = host.guest(slot.slot(), record.token.clone());
    let run_dir = host.layout.vm_run(&id);
    let (api, console) = (
        Vmm::new(&run_dir.join(API_SOCKET)),
        host.consoles.listen(&run_dir.join(CONSOLE_FILE)),
    );
    // The envd of its memory is the one that there was; from its disk another may boot.
    let known_nonces = match &memories {
        Some(_) => record.versions.nonces,
        None => Nonces::Unknown,
    };
    let up = async {
        let (vmm, limit) = match &memories {
            Some(_) => (wake::<ResumeError>(&api, &STEPS).await?, WAKE_LIMIT),
            None => {
                let limit = boot_limit(host, &plan);
                (api.version(limit).await?, limit)
            }
        };
        let envd = step("up", guest.wait_until_up(limit, &console)).await?;
        let nonces = step("init", guest.init(None, identity(host, &plan), known_nonces)).await?;
        reach("resume.gated").await?;
        Ok::<_, ResumeError>((vmm, envd, nonces))
    };
    let (vmm, envd, nonces) = tokio::select! {
        versions = up => versions?,
        end = shim.ended() => return Err(ended(pause::ending(end))),
    };
    if memories.is_none() {
        record.versions.kernel = kernel.version;
    }
    (record.versions.vmm, record.versions.envd, record.versions.nonces) = (vmm, envd, nonces);
    if memories.is_some() {
        write(record.with(Phase::Thawing(*kept))).await?;
        // From here on the guest may write. Whether it has, its disk says: a VM that is lost may still be a sandbox that is paused.
        pass("resume.recorded").await;
        if let Some(ending) = step("thaw", pause::thaw(shim, &guest, &id)).await {
            return Err(ended(ending));
        }
        pass("resume.thawed").await;
    }
    // A VM that has ended by now still leaves a sandbox that is paused; once its record says that it runs, no more.
    if let Some(end) = shim.end_by_now().await {
        return Err(ended(pause::ending(end)));
    }
    record.phase = Phase::Running;
    if let Err(error) = write(record.clone()).await {
        if memories.is_none() {
            // On disk it is still paused, and an agent that starts would end it. So it is what it was, and its caller is told so.
            return Err(error.into());
        }
        // It runs, and that is what its caller wants to hear. An agent that starts finds it thawing, and lets it run on; what it had in
        // memory stays for as long as its record names it.
        tracing::error!(sandbox_id = %id, error = %Chain(&error), "the record of a resumed sandbox says that it is about to run");
        return Ok((guest, record, memory));
    }
    pass("resume.running").await;
    // Nobody waits for it: what comes next takes a number of its own, and removes what it finds.
    tokio::task::spawn_blocking({
        let directory = host.layout.generation(&id, kept.generation);
        move || {
            if let Err(error) = files::remove_tree(&directory) {
                tracing::warn!(sandbox_id = %id, error = %Chain(&error), "a snapshot that was resumed stays until the next one");
            }
        }
    });
    Ok((guest, record, memory))
}

/// A VMM's end as an error of the resume.
fn ended(end: Ending) -> ResumeError {
    match end {
        Ending::Reported(exit) => ResumeError::VmmEnded(ExitSummary(*exit)),
        Ending::ShimLost | Ending::Unseen | Ending::NotPaused(_) | Ending::Stopped(_) | Ending::DiskLost => {
            ResumeError::ShimLost
        }
    }
}

/// Ends the VMM of a resume that failed, and puts the sandbox back to disk. What of it is kept.
async fn undo(host: &Arc<Host>, record: Record, kept: Kept, parts: Parts) -> Kept {
    let (gate, killed) = parts.let_go().await;
    if let Err(error) = &killed {
        tracing::error!(sandbox_id = %record.plan.id, error = %Chain(error), "the VMM of a resume that failed could not be ended");
    }
    let (host, vm_has_ended) = (host.clone(), killed.is_ok());
    gate.run(move || put_back(&host, &record, kept, vm_has_ended)).await
}

/// Makes what is on disk a paused sandbox again. What of it is kept. Where its VM may still run, its run directory stays: its socket there
/// is the only way to end it, which the next resume or destroy does first.
pub(crate) fn put_back(host: &Host, record: &Record, kept: Kept, vm_has_ended: bool) -> Kept {
    let id = &record.plan.id;
    let kept = settle(host, kept, id);
    let record = record.with(Phase::Paused(kept)).write(&host.layout);
    let tidied = if vm_has_ended {
        tidy(host, id, Some(kept.generation))
    } else {
        Ok(())
    };
    for outcome in [record, tidied] {
        if let Err(error) = outcome {
            tracing::error!(sandbox_id = %id, error = %Chain(&error), "something is left beside a paused sandbox");
        }
    }
    kept
}

/// What is kept of a sandbox whose VM has ended, or may have: its memory only where its disk is as it was.
pub(crate) fn settle(host: &Host, mut kept: Kept, id: &SandboxId) -> Kept {
    match kept.is_whole(&host.layout, id) {
        Ok(is_whole) if is_whole || kept.memory == Memory::Spent => {}
        Ok(_) => {
            tracing::warn!(sandbox_id = %id, "the disk has been written since the sandbox was paused; its memory is of no use any more");
            kept.memory = Memory::Spent;
        }
        // It may be a moment's failure, and the next resume looks again.
        Err(error) => {
            tracing::error!(sandbox_id = %id, error = %Chain(&error), "nobody can say now whether memory and disk agree");
        }
    }
    kept
}
