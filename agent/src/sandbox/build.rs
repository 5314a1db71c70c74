//! Building a sandbox, and taking one down.
//!
//! ```text
//! boots:    files (record, cow) --> parts: shim, disk, network, VMM --> envd up --> init --> record
//! restores: the same and a copy of the template's memory --> parts --> it wakes, frozen --> envd up --> init --> thaw --> record
//! ```
//!
//! A template that carries memory is restored where that fits this host and what was asked for; else it is booted from its disk, and the
//! answer says why. A build that fails or is told to stop undoes everything before it ends.

use std::fs::File;
use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use roost_common::ids::SandboxId;
use roost_common::shim::{API_SOCKET, CONSOLE_FILE, SHIM_SOCKET, Start};
use roost_common::units::{Bytes, Sectors};

use super::parts::{Began, DiskFiles, Gate, MemoryLoad, PartError, Parts, Versions, Vm, boot_limit, identity, millis};
use super::plan::Plan;
use super::record::{Phase, Record};
use super::wake::{Memories, Steps, WAKE_LIMIT, wake};
use super::{BuildFailure, Ending, TeardownError, pause};
use crate::errors::{Chain, FileError};
use crate::failpoint::{pass, reach};
use crate::guest::{Guest, GuestError, Nonces, Token};
use crate::host::images::{self, Image, ImageError};
use crate::host::kernels::{self, Kernel};
use crate::host::shim::{self, ExitSummary};
use crate::host::slots::SlotLease;
use crate::host::{Host, files};
use crate::snapshot::{self, Size};
use crate::trace::step;
use crate::vmm::{Vmm, VmmError};
use crate::{templates, tombstone};

/// Why a sandbox could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// It was told to stop.
    #[error("the build was stopped")]
    Stopped,
    /// The template.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The template is not what it was.
    #[error(transparent)]
    Template(#[from] templates::TemplateError),
    /// The image is larger than the disk that was asked for.
    #[error("a disk of {asked} MiB is smaller than its image of {image}")]
    DiskTooSmall {
        /// What was asked for, in MiB.
        asked: u32,
        /// The image's size.
        image: Sectors,
    },
    /// The disk is larger than any there can be.
    #[error("a disk of {0} is larger than 2 TiB")]
    DiskTooLarge(Sectors),
    /// An earlier sandbox of this id is on disk, and its record could not be used when the agent started.
    #[error("an earlier sandbox of this id is in {}, and its record could not be used; the agent's log says why", dir.display())]
    Kept {
        /// Its directory.
        dir: std::path::PathBuf,
    },
    /// An earlier sandbox of this id is still there.
    #[error("an earlier sandbox of this id could not be removed")]
    Left(#[source] TeardownError),
    /// There is no kernel to boot.
    #[error("no guest kernel in {}: put vmlinux-<version> there", dir.display())]
    NoKernel {
        /// The directory.
        dir: std::path::PathBuf,
    },
    /// A file operation.
    #[error(transparent)]
    File(#[from] FileError),
    /// Shim, disk, network or VMM.
    #[error(transparent)]
    Part(#[from] PartError),
    /// The VMM's API.
    #[error("the VMM does not answer")]
    Vmm(#[from] VmmError),
    /// The VMM ended before the guest was up.
    #[error("the VMM ended before its guest was up: {0}")]
    VmmEnded(ExitSummary),
    /// The shim ended, and the VMM with it.
    #[error("the vmmshim ended before the guest was up")]
    ShimLost,
    /// The guest did not come up, or refused its identity.
    #[error("the guest did not come up")]
    Guest(#[from] GuestError),
}

/// The generation that a template's memory is copied to.
const CLONE: u32 = 1;

const STEPS: Steps = Steps {
    restored: "clone.restored",
    woken: "clone.woken",
};

/// Builds a sandbox; `stop` ends the build at any point.
///
/// # Errors
/// [`BuildFailure`], after everything has been undone, or with what could not be.
pub async fn build(
    host: Arc<Host>,
    plan: Plan,
    slot: Arc<SlotLease>,
    created_at_unix: i64,
    stop: impl Future<Output = ()>,
) -> Result<Vm, BuildFailure> {
    let (mut parts, mut made) = (Parts::default(), Files::None);
    let outcome = tokio::select! {
        biased;
        () = stop => Err(BuildError::Stopped),
        outcome = steps(&host, &plan, &slot, created_at_unix, &mut parts, &mut made) => outcome,
    };
    match outcome {
        Ok((guest, record, memory)) => Ok(Vm::new(parts.into_shim().await, Arc::new(guest), memory, record)),
        Err(error) => {
            tracing::info!(sandbox_id = %plan.id, error = %Chain(&error), "undoing a create");
            let left = undo(&host, &plan, parts, made).await.err();
            Err(BuildFailure { error, left })
        }
    }
}

/// Whether a build may have made files.
enum Files {
    None,
    Some,
}

/// What a sandbox is made of, found and checked before anything is made.
struct Found {
    image: Image,
    /// The size of its disk.
    size: Sectors,
    kernel: Kernel,
    /// The template's memory, or how the sandbox begins without.
    memory: Result<(templates::Memory, Memories), Began>,
}

async fn steps(
    host: &Arc<Host>,
    plan: &Plan,
    slot: &SlotLease,
    created_at_unix: i64,
    parts: &mut Parts,
    made: &mut Files,
) -> Result<(Guest, Record, MemoryLoad), BuildError> {
    let started = Instant::now();
    let gate = parts.gate.clone();
    // What the caller may have got wrong comes first, before anything is made or started.
    let Found {
        image,
        size,
        kernel,
        memory,
    } = step(
        "find",
        gate.run({
            let (host, plan) = (host.clone(), plan.clone());
            move || find(&host, &plan)
        }),
    )
    .await?;
    let cow_length = size.cow_length().ok_or(BuildError::DiskTooLarge(size))?;
    // What recovery has left alone is not ours to remove.
    if host.layout.record(&plan.id).exists() {
        return Err(BuildError::Kept {
            dir: host.layout.sandbox(&plan.id),
        });
    }
    *made = Files::Some;
    if left_behind(host, &plan.id) {
        remove_files(host, &gate, &plan.id).await.map_err(BuildError::Left)?;
    }
    // It starts while files are made.
    parts.start_shim(host);
    let mut record = Record::new(slot.slot().into(), plan.clone(), size, created_at_unix, Token::random());
    record.origin = Some(image.origin);
    let cow = step(
        "files",
        gate.run({
            let (host, id) = (host.clone(), plan.id.clone());
            move || make_files(&host, &id, cow_length)
        }),
    )
    .await?;
    let memory = match memory {
        Ok(memory) => fits_vmm(parts, &plan.id, memory).await?,
        Err(began) => Err(began),
    };
    let files = DiskFiles {
        origin: image.rootfs,
        cow,
        size,
    };
    reach("create.files").await?;
    // The record is to be on disk before anything runs, and nothing runs before all of this is there.
    let recorded = gate.run({
        let (host, record) = (host.clone(), record.clone());
        move || {
            record.write(&host.layout)?;
            tombstone::forget(&host.layout, &record.plan.id)
        }
    });
    let (recorded, memory, disk_minor) = tokio::join!(
        step("first_record", recorded),
        take_memory(host, &gate, &plan.id, memory),
        parts.acquire(host, plan, slot, files)
    );
    recorded?;
    let disk_minor = disk_minor?;
    reach("create.acquired").await?;
    let start = match &memory {
        Ok((memories, _)) => {
            let uid = parts.shim().await?.link.uid();
            let offered = gate.run({
                let (host, id, memories) = (host.clone(), plan.id.clone(), memories.clone());
                move || memories.offer(&host, &id, CLONE, disk_minor, uid)
            });
            let start = step("offer", offered).await?;
            reach("clone.offered").await?;
            start
        }
        Err(_) => boot(&kernel),
    };
    let load = MemoryLoad::of(&start);
    let shim = parts.launch(host, plan, start).await?;
    reach("create.launched").await?;

    let guest = host.guest(slot.slot(), record.token.clone());
    let run_dir = host.layout.vm_run(&plan.id);
    let (api, console) = (
        Vmm::new(&run_dir.join(API_SOCKET)),
        host.consoles.listen(&run_dir.join(CONSOLE_FILE)),
    );
    let up = async {
        match &memory {
            Ok((memories, token)) => {
                let vmm = wake::<BuildError>(&api, &STEPS).await?;
                let envd = step("up", guest.wait_until_up(WAKE_LIMIT, &console)).await?;
                let known = memories.manifest.about.nonces;
                let nonces = step("init", guest.init(Some(token), identity(host, plan), known)).await?;
                reach("clone.gated").await?;
                Ok(Versions {
                    kernel: memories.manifest.about.kernel_version.clone(),
                    vmm,
                    envd,
                    nonces,
                    began: Began::Restored,
                })
            }
            Err(began) => {
                let limit = boot_limit(host, plan);
                let (vmm, envd) =
                    tokio::try_join!(async { api.version(limit).await.map_err(BuildError::from) }, async {
                        step("boot", guest.wait_until_up(limit, &console))
                            .await
                            .map_err(BuildError::from)
                    })?;
                let nonces = step("init", guest.init(None, identity(host, plan), Nonces::Unknown)).await?;
                Ok::<_, BuildError>(Versions {
                    kernel: kernel.version.clone(),
                    vmm,
                    envd,
                    nonces,
                    began: began.clone(),
                })
            }
        }
    };
    let versions = tokio::select! {
        versions = up => versions?,
        end = shim.ended() => return Err(ended(pause::ending(end))),
    };
    if memory.is_ok() {
        if let Some(ending) = step("thaw", pause::thaw(shim, &guest, &plan.id)).await {
            return Err(ended(ending));
        }
        // The VMM has it open for as long as it needs it.
        let removed = gate.run({
            let (host, id) = (host.clone(), plan.id.clone());
            move || pause::remove_snapshots(&host, &id, None)
        });
        removed.await?;
    }
    reach("create.up").await?;
    let record = Record {
        versions,
        ..record.with(Phase::Running)
    };
    let recorded = gate.run({
        let (host, record) = (host.clone(), record.clone());
        move || record.write(&host.layout)
    });
    step("record", recorded).await?;
    pass("create.recorded").await;
    tracing::info!(sandbox_id = %plan.id, op = "create", elapsed_ms = millis(started), "guest is up");
    Ok((guest, record, load))
}

/// A VMM's end as an error of the build.
fn ended(end: Ending) -> BuildError {
    match end {
        Ending::Reported(exit) => BuildError::VmmEnded(ExitSummary(*exit)),
        Ending::ShimLost | Ending::Unseen | Ending::NotPaused(_) | Ending::Stopped(_) | Ending::DiskLost => {
            BuildError::ShimLost
        }
    }
}

/// A template's memory, where the VMM that the shim would launch can load it.
async fn fits_vmm(
    parts: &mut Parts,
    id: &SandboxId,
    memory: (templates::Memory, Memories),
) -> Result<Result<(templates::Memory, Memories), Began>, BuildError> {
    let fits = memory.1.fits_vmm(&parts.shim().await?.vmm_version);
    Ok(fits.map(|()| memory).map_err(|misfit| instead(id, &misfit)))
}

/// Puts a template's memory where one sandbox's VMM reads it: that is given the directory, and a template is everybody's. Where it cannot be
/// put there the sandbox begins without the memory.
async fn take_memory(
    host: &Arc<Host>,
    gate: &Gate,
    id: &SandboxId,
    memory: Result<(templates::Memory, Memories), Began>,
) -> Result<(Arc<Memories>, Token), Began> {
    let (template, memories) = memory?;
    let shared = gate.run({
        let to = host.layout.generation(id, CLONE);
        move || snapshot::share(&template.dir, &to)
    });
    match step("share_memory", shared).await {
        Ok(shared) => {
            tracing::debug!(sandbox_id = %id, ?shared, "a template's memory");
            Ok((Arc::new(memories), template.token))
        }
        Err(error) => Err(instead(id, &error)),
    }
}

fn instead(id: &SandboxId, why: &(dyn std::error::Error + 'static)) -> Began {
    let why = Chain(why).to_string();
    tracing::warn!(sandbox_id = %id, why, "booted, though its template has memory");
    Began::BootedInstead(why)
}

/// How a kernel is booted.
pub(super) fn boot(kernel: &Kernel) -> Start {
    let path = |path: &std::path::Path| path.to_string_lossy().into_owned();
    Start::Boot {
        kernel: path(&kernel.kernel),
        initramfs: kernel.initramfs.as_deref().map(path),
    }
}

/// Finds image, kernel and memory, and what size the disk has. Changes nothing.
fn find(host: &Host, plan: &Plan) -> Result<Found, BuildError> {
    let image = images::open(&host.layout.images(), plan.template)?;
    templates::check(&image.dir, image.size.bytes())?;
    let size = plan.disk_over(image.size).ok_or(BuildError::DiskTooSmall {
        asked: plan.disk.map_or(0, |disk| disk.0),
        image: image.size,
    })?;
    Ok(Found {
        kernel: latest_kernel(host)?,
        memory: memory(host, plan, &image.dir, size),
        image,
        size,
    })
}

/// The memory of a template, where a sandbox can be restored from it.
fn memory(
    host: &Host,
    plan: &Plan,
    dir: &std::path::Path,
    disk: Sectors,
) -> Result<(templates::Memory, Memories), Began> {
    if plan.template.is_minimal() {
        return Err(Began::Booted);
    }
    let found = templates::memory(dir).map_err(|error| instead(&plan.id, &error))?;
    let found = found.ok_or(Began::Booted)?;
    let memories = Memories::new(host, found.manifest.clone()).map_err(|error| instead(&plan.id, &error))?;
    let size = Size {
        vcpus: plan.vcpus,
        memory: plan.memory,
        disk,
    };
    memories.fits(size).map_err(|misfit| instead(&plan.id, &misfit))?;
    Ok((found, memories))
}

/// Finds the kernel that is booted where nothing else is asked for.
pub(super) fn latest_kernel(host: &Host) -> Result<Kernel, BuildError> {
    let dir = host.layout.kernels();
    kernels::latest(&dir)
        .map_err(|source| FileError::new("reading", &dir, source))?
        .ok_or(BuildError::NoKernel { dir })
}

/// Opens the files of a sandbox's disk as its record has it, whatever has become of the template since.
pub(super) fn disk_of(host: &Host, record: &Record) -> Result<DiskFiles, BuildError> {
    let image = images::open_origin(&host.layout.images(), record.plan.template, record.origin)?;
    let path = host.layout.cow(&record.plan.id);
    let cow = File::options()
        .read(true)
        .write(true)
        .open(&path)
        .map_err(|source| FileError::new("opening", &path, source))?;
    Ok(DiskFiles {
        origin: image.rootfs,
        cow,
        size: record.disk,
    })
}

/// Whether an earlier sandbox of this id could not be removed.
fn left_behind(host: &Host, id: &SandboxId) -> bool {
    [host.layout.sandbox(id), host.layout.vm_run(id)]
        .iter()
        .any(|dir| dir.exists())
}

/// Makes a sandbox's directories and its exception store.
fn make_files(host: &Host, id: &SandboxId, cow_length: Bytes) -> Result<File, FileError> {
    let layout = &host.layout;
    files::make_dir(&layout.sandbox(id))?;
    files::make_dir(&layout.vm(id))?;
    files::make_dir(&layout.vm_run(id))?;
    files::make_cow(&layout.cow(id), cow_length)
}

async fn undo(host: &Arc<Host>, plan: &Plan, parts: Parts, made: Files) -> Result<(), TeardownError> {
    let (gate, killed) = parts.let_go().await;
    killed.map_err(TeardownError::Vmm)?;
    match made {
        Files::Some => remove_files(host, &gate, &plan.id).await,
        Files::None => Ok(()),
    }
}

/// Takes a VM down, where there is a connection to one, and removes the sandbox's files.
///
/// # Errors
/// [`TeardownError`]; a repetition without a VM goes on where this ended.
pub async fn tear_down(host: &Arc<Host>, id: &SandboxId, vm: Option<Vm>) -> Result<(), TeardownError> {
    pass("destroy.begun").await;
    if let Some(vm) = vm {
        vm.shim.kill().await.map_err(TeardownError::Vmm)?;
    }
    pass("destroy.killed").await;
    remove_files(host, &Gate::default(), id).await?;
    pass("destroy.removed").await;
    Ok(())
}

/// Removes a sandbox's files, once no shim of it answers any more: its socket is among them, and the only way back to it.
async fn remove_files(host: &Arc<Host>, gate: &Gate, id: &SandboxId) -> Result<(), TeardownError> {
    shim::end_at(&host.layout.vm_run(id).join(SHIM_SOCKET))
        .await
        .map_err(TeardownError::Vmm)?;
    let (host, id) = (host.clone(), id.clone());
    gate.run(move || files::remove_sandbox(&host.layout, &id))
        .await
        .map_err(TeardownError::Files)
}

/// 128 random bits in hexadecimal.
pub(crate) fn random_hex() -> String {
    let mut bytes = [0; 16];
    fill_random(&mut bytes);
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Fills `bytes` from the kernel's generator.
pub fn fill_random(bytes: &mut [u8]) {
    getrandom::fill(bytes).expect("getrandom works once the host has booted");
}
