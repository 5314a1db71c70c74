//! Resuming a paused sandbox: from its memory and disk, or, where its memory cannot be used, from its disk alone.
//!
//! ```text
//! record, manifest, image --> parts: shim, disk, network --> config.json --> record "resuming" --> VMM restores, guest frozen
//!     --> vm.resume --> envd answers, /init (the gate) --> record "running" --> thaw --> old snapshot removed
//! '------------- a failure up to here ends the VMM: it is paused -------------'
//! ```
//!
//! The guest wakes with its filesystems frozen, so that up to the thaw it can write nothing and the memory on disk still belongs to
//! the disk. That is checked and not believed: a guest could thaw itself. The exception store's time of change tells, and a
//! memory that the disk has left behind is never offered again.
//!
//! A guest that boots from its disk alone writes at once, so there its memory is given up before it starts.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use roost_common::ids::SandboxId;
use roost_common::net::SlotAddresses;
use roost_common::shim::{API_SOCKET, RestoreMode, SHIM_SOCKET, Start};

use super::parts::{DiskFiles, MemoryLoad, PartError, Parts, Vm, boot_limit, identity, millis};
use super::pause::tidy;
use super::record::{Kept, Memory, Phase, Record, RecordError};
use super::{BuildError, ResumeEnd, build};
use crate::config::RestoreMemory;
use crate::errors::{Chain, FileError};
use crate::failpoint::{pass, reach};
use crate::guest::{Guest, GuestError};
use crate::host::acl::{self, Access};
use crate::host::files;
use crate::host::kernels::Kernel;
use crate::host::shim::{self, ExitSummary, ShimFault, VmmEnd};
use crate::host::slots::SlotLease;
use crate::host::{Host, kernels};
use crate::snapshot::{self, Cpu, HostFacts, Manifest, Misfit, RestoreConfig, SnapshotError};
use crate::vmm::{Vmm, VmmError};

/// How long a restored guest's envd may take to answer: it was running when it was paused.
const WAKE_LIMIT: Duration = Duration::from_secs(60);
/// How often a thaw is tried.
const THAW_ATTEMPTS: u32 = 5;
/// Pause between two attempts.
const THAW_PAUSE: Duration = Duration::from_millis(200);
/// Where a VMM that loads memory on demand learns of what is missing.
const USERFAULTFD: &str = "/dev/userfaultfd";

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
    memories: Option<Memories>,
}

/// A snapshot of memory, and what it meets here.
struct Memories {
    manifest: Manifest,
    facts: HostFacts,
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
        let (host, id) = (host.clone(), id.clone());
        move || make_ready(&host, &id, kept, wish)
    });
    let ready = match ready.await.expect("file work does not panic") {
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
            ResumeEnd::Running(Vm {
                shim: parts.into_shim().await,
                guest: Arc::new(guest),
                memory,
                record,
            })
        }
        Err(error) => {
            tracing::warn!(sandbox_id = %id, op = "resume", error = %Chain(&error), "undoing a resume");
            let kept = undo(&host, original, kept, parts).await;
            ResumeEnd::Paused(kept, error)
        }
    }
}

/// Reads and checks everything that can be before anything is started, and makes room for a new VM.
fn make_ready(host: &Host, id: &SandboxId, kept: Kept, wish: ResumeWish) -> Result<Ready, ResumeError> {
    // No VM of it runs any more, so what its disk says now is final.
    if wish.from == From::Memory && settle(host, kept, id).memory == Memory::Spent {
        return Err(ResumeError::Spent);
    }
    let original = Record::read(&host.layout, id)?;
    if !matches!(original.phase, Phase::Paused(_) | Phase::Resuming(_)) {
        return Err(ResumeError::NotPaused);
    }
    let mut record = original.clone();
    let plan = &mut record.plan;
    plan.timeout_sec = wish.timeout_sec.unwrap_or(plan.timeout_sec);
    plan.user = wish.user.or(plan.user.take());
    plan.env = wish.env.unwrap_or_else(|| std::mem::take(&mut plan.env));
    let (image, size, latest) = build::find(host, &record.plan).map_err(ResumeError::Template)?;
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
            let kernels = host.layout.kernels();
            let facts = HostFacts {
                // Where no VMM has started yet the version is told by the one that is about to.
                vmm_version: host.vmm_version().unwrap_or_else(|| manifest.about.vmm_version.clone()),
                cpu: Cpu::of_this_host()?,
                kernel: kernels::of_version(&kernels, &manifest.about.kernel_version),
            };
            manifest.fits(&facts, record.size())?;
            Some(Memories { manifest, facts })
        }
    };
    tidy(host, id, Some(kept.generation))?;
    files::make_dir(&host.layout.vm_run(id))?;
    Ok(Ready {
        files: DiskFiles {
            origin: image.rootfs,
            cow: open_cow(&host.layout.cow(id))?,
            size,
        },
        original,
        record,
        kernel,
        memories,
    })
}

fn open_cow(path: &std::path::Path) -> Result<File, FileError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(|source| FileError::new("opening", path, source))
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
        async move { gate.run(move || record.write(&host.layout)).await }
    };
    reach("resume.ready").await?;
    parts.start_shim(host);
    let disk_minor = parts.acquire(host, &id, slot.slot(), files).await?;
    reach("resume.acquired").await?;
    let uid = parts.shim.here().await.map_err(PartError::from)?.uid();
    let start = match &memories {
        Some(memories) => {
            let initramfs = memories
                .facts
                .kernel
                .as_ref()
                .and_then(|kernel| kernel.initramfs.clone());
            gate.run({
                let (generation, record) = (host.layout.generation(&id, kept.generation), record.clone());
                let (kernel, initramfs) = (memories.facts.kernel.clone(), initramfs.clone());
                let devices = memories.manifest.about.devices;
                move || {
                    let config = RestoreConfig {
                        size: record.size(),
                        devices,
                        disk_minor,
                        kernel: &kernel.expect("a snapshot fits only where its kernel is").kernel,
                        initramfs: initramfs.as_deref(),
                    };
                    offer(&generation, &config, uid)
                }
            })
            .await?;
            // Durable before the VM runs: whoever finds this knows that the guest is frozen and nobody was told that it runs.
            write(record.with(Phase::Resuming(*kept))).await?;
            Start::Restore {
                attempt: kept.generation,
                memory: restore_mode(host.config.restore_memory, memories.manifest.about.restore),
                initramfs: initramfs.map(|path| path.to_string_lossy().into_owned()),
            }
        }
        None => {
            kept.memory = Memory::Spent;
            write(record.with(Phase::Paused(*kept))).await?;
            build::boot(&kernel)
        }
    };
    reach("resume.offered").await?;
    let memory = MemoryLoad::of(&start);
    let shim = parts.launch(host, &plan, start).await?;

    reach("resume.launched").await?;
    let guest = Guest::new(SlotAddresses::of(slot.slot()).host, record.token.clone());
    let api = Vmm::new(&host.layout.vm_run(&id).join(API_SOCKET));
    let up = async {
        let limit = match &memories {
            Some(Memories { manifest, facts }) => {
                api.restored().await?;
                let facts = HostFacts {
                    vmm_version: api.version().await?,
                    ..facts.clone()
                };
                manifest.fits(&facts, record.size())?;
                reach("resume.restored").await?;
                api.resume().await?;
                reach("resume.woken").await?;
                WAKE_LIMIT
            }
            None => boot_limit(host, &plan),
        };
        let (vmm, envd) = tokio::try_join!(async { api.version().await.map_err(ResumeError::from) }, async {
            guest.wait_until_up(limit).await.map_err(ResumeError::from)
        })?;
        guest.init(identity(host, &plan)).await?;
        reach("resume.gated").await?;
        Ok::<_, ResumeError>((vmm, envd))
    };
    let (vmm, envd) = tokio::select! {
        versions = up => versions?,
        end = shim.ended() => return Err(match end {
            VmmEnd::Reported(exit) => ResumeError::VmmEnded(ExitSummary(*exit)),
            VmmEnd::ShimLost => ResumeError::ShimLost,
        }),
    };
    if memories.is_none() {
        record.versions.kernel = kernel.version;
    }
    host.vmm_is(&vmm);
    (record.versions.vmm, record.versions.envd) = (vmm, envd);
    record.phase = Phase::Running;
    write(record.clone()).await?;
    // From here on the guest may write, and the sandbox is a running one whatever happens.
    pass("resume.recorded").await;
    thaw(&guest, &id).await;
    pass("resume.thawed").await;
    let removed = gate.run({
        let directory = host.layout.generation(&id, kept.generation);
        move || files::remove_tree(&directory)
    });
    if let Err(error) = removed.await {
        tracing::warn!(sandbox_id = %id, error = %Chain(&error), "a snapshot that was resumed stays until the next one");
    }
    Ok((guest, record, memory))
}

/// Writes the VMM's configuration beside the memory, and lets the VM's uid reach both.
fn offer(generation: &std::path::Path, config: &RestoreConfig<'_>, uid: u32) -> Result<(), ResumeError> {
    snapshot::write_config(generation, config)?;
    if uid != nix::unistd::geteuid().as_raw() {
        acl::grant(generation, uid, Access::Enter)
            .map_err(|source| FileError::new("opening to the VM", generation, source))?;
    }
    Ok(())
}

/// On demand where that is wanted, and the snapshot and the host can.
fn restore_mode(wanted: RestoreMemory, most: RestoreMode) -> RestoreMode {
    let on_demand = wanted == RestoreMemory::OnDemand && most == RestoreMode::OnDemand;
    if on_demand && std::path::Path::new(USERFAULTFD).exists() {
        RestoreMode::OnDemand
    } else {
        RestoreMode::Copy
    }
}

/// Thaws a guest that has been recorded as running. A guest that does not thaw is its own affair by now: it runs, it can be paused,
/// destroyed, and looked at.
async fn thaw(guest: &Guest, id: &SandboxId) {
    for attempt in 1..=THAW_ATTEMPTS {
        match guest.thaw().await {
            Ok(()) => return,
            Err(error) => {
                tracing::error!(sandbox_id = %id, attempt, error = %Chain(&error), "a resumed guest does not thaw");
                tokio::time::sleep(THAW_PAUSE).await;
            }
        }
    }
}

/// Ends the VMM of a resume that failed, and puts the sandbox back to disk. What of it is kept.
async fn undo(host: &Arc<Host>, record: Record, mut kept: Kept, parts: Parts) -> Kept {
    let id = record.plan.id.clone();
    let (gate, killed) = parts.let_go().await;
    if let Err(error) = killed {
        tracing::error!(sandbox_id = %id, error = %Chain(&error), "the VMM of a resume that failed could not be ended");
    }
    let host = host.clone();
    gate.run(move || {
        kept = settle(&host, kept, &record.plan.id);
        let put_back = record
            .with(Phase::Paused(kept))
            .write(&host.layout)
            .and_then(|()| tidy(&host, &record.plan.id, Some(kept.generation)));
        if let Err(error) = put_back {
            tracing::error!(sandbox_id = %record.plan.id, error = %Chain(&error), "a resume that failed left something behind");
        }
        kept
    })
    .await
}

/// What is kept of a sandbox whose VM has ended, or may have: its memory only where its disk is as it was.
pub(crate) fn settle(host: &Host, mut kept: Kept, id: &SandboxId) -> Kept {
    match files::written_at(&host.layout.cow(id)) {
        Ok(written) if written == kept.disk_written_at => {}
        Ok(_) => {
            tracing::warn!(sandbox_id = %id, "the disk has been written since the sandbox was paused; its memory is of no use any more");
            kept.memory = Memory::Spent;
        }
        Err(error) => {
            tracing::error!(sandbox_id = %id, error = %Chain(&error), "nobody can say whether memory and disk agree");
            kept.memory = Memory::Spent;
        }
    }
    kept
}
