//! Building a sandbox that boots, and taking one down.
//!
//! ```text
//! files (record, cow) --> parts: shim, disk, network, VMM --> envd up --> init --> record
//! ```
//!
//! A build that fails or is told to stop undoes everything before it ends.

use std::fs::File;
use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use roost_common::ids::SandboxId;
use roost_common::net::SlotAddresses;
use roost_common::shim::{API_SOCKET, SHIM_SOCKET, Start};
use roost_common::units::{Bytes, Sectors};

use super::parts::{DiskFiles, Gate, MemoryLoad, PartError, Parts, Versions, Vm, boot_limit, identity, millis};
use super::plan::Plan;
use super::record::{Phase, Record};
use super::{BuildFailure, TeardownError};
use crate::errors::{Chain, FileError};
use crate::failpoint::{pass, reach};
use crate::guest::{Guest, GuestError, Token};
use crate::host::images::{self, Image, ImageError};
use crate::host::kernels::{self, Kernel};
use crate::host::shim::{self, ExitSummary, VmmEnd};
use crate::host::slots::SlotLease;
use crate::host::{Host, files};
use crate::tombstone;
use crate::vmm::{Vmm, VmmError};

/// Why a sandbox could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// It was told to stop.
    #[error("the build was stopped")]
    Stopped,
    /// The template.
    #[error(transparent)]
    Image(#[from] ImageError),
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
        Ok((guest, record)) => Ok(Vm {
            shim: parts.into_shim().await,
            guest: Arc::new(guest),
            memory: MemoryLoad::Complete,
            record,
        }),
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

async fn steps(
    host: &Arc<Host>,
    plan: &Plan,
    slot: &SlotLease,
    created_at_unix: i64,
    parts: &mut Parts,
    made: &mut Files,
) -> Result<(Guest, Record), BuildError> {
    let started = Instant::now();
    let gate = parts.gate.clone();
    // What the caller may have got wrong comes first, before anything is made or started.
    let (image, size, kernel) = gate
        .run({
            let (host, plan) = (host.clone(), plan.clone());
            move || find(&host, &plan)
        })
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
    let record = Record::new(slot.slot().into(), plan.clone(), size, created_at_unix, Token::random());
    let cow = gate
        .run({
            let (host, record) = (host.clone(), record.clone());
            move || make_files(&host, &record, cow_length)
        })
        .await?;
    let files = DiskFiles {
        origin: image.rootfs,
        cow,
        size,
    };
    reach("create.files").await?;
    parts.acquire(host, &plan.id, slot.slot(), files).await?;
    reach("create.acquired").await?;
    let shim = parts.launch(host, plan, boot(&kernel)).await?;
    reach("create.launched").await?;

    let guest = Guest::new(SlotAddresses::of(slot.slot()).host, record.token.clone());
    let api = Vmm::new(&host.layout.vm_run(&plan.id).join(API_SOCKET));
    let up = async {
        let (version, envd) = tokio::try_join!(async { api.version().await.map_err(BuildError::from) }, async {
            guest
                .wait_until_up(boot_limit(host, plan))
                .await
                .map_err(BuildError::from)
        },)?;
        guest.init(identity(host, plan)).await?;
        Ok::<_, BuildError>(Versions {
            kernel: kernel.version.clone(),
            vmm: version,
            envd,
        })
    };
    let versions = tokio::select! {
        versions = up => versions?,
        end = shim.ended() => return Err(match end {
            VmmEnd::Reported(exit) => BuildError::VmmEnded(ExitSummary(*exit)),
            VmmEnd::ShimLost => BuildError::ShimLost,
        }),
    };
    reach("create.up").await?;
    host.vmm_is(&versions.vmm);
    let record = Record {
        versions,
        ..record.with(Phase::Running)
    };
    gate.run({
        let (host, record) = (host.clone(), record.clone());
        move || record.write(&host.layout)
    })
    .await?;
    pass("create.recorded").await;
    tracing::info!(sandbox_id = %plan.id, op = "create", elapsed_ms = millis(started), "guest is up");
    Ok((guest, record))
}

/// How a kernel is booted.
pub(super) fn boot(kernel: &Kernel) -> Start {
    let path = |path: &std::path::Path| path.to_string_lossy().into_owned();
    Start::Boot {
        kernel: path(&kernel.kernel),
        initramfs: kernel.initramfs.as_deref().map(path),
    }
}

/// Finds image and kernel, and what size the disk has. Changes nothing.
pub(super) fn find(host: &Host, plan: &Plan) -> Result<(Image, Sectors, Kernel), BuildError> {
    let image = images::open(&host.layout.images(), plan.template)?;
    let size = plan.disk_over(image.size).ok_or(BuildError::DiskTooSmall {
        asked: plan.disk.map_or(0, |disk| disk.0),
        image: image.size,
    })?;
    let dir = host.layout.kernels();
    let kernel = kernels::latest(&dir)
        .map_err(|source| FileError::new("reading", &dir, source))?
        .ok_or(BuildError::NoKernel { dir })?;
    Ok((image, size, kernel))
}

/// Whether an earlier sandbox of this id could not be removed.
fn left_behind(host: &Host, id: &SandboxId) -> bool {
    [host.layout.sandbox(id), host.layout.vm_run(id)]
        .iter()
        .any(|dir| dir.exists())
}

/// Makes a sandbox's directories, its record and its exception store.
fn make_files(host: &Host, record: &Record, cow_length: Bytes) -> Result<File, FileError> {
    let (layout, id) = (&host.layout, &record.plan.id);
    files::make_dir(&layout.sandbox(id))?;
    record.write(layout)?;
    tombstone::forget(layout, id)?;
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
