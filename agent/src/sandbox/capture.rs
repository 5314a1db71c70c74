//! Making a template of a sandbox: of its disk, and, for a snapshot, of its memory too.
//!
//! ```text
//! running: prepare --> freeze --> vm.pause --> sync disk --> [vm.snapshot --> publish --> seal] --> flatten --> runs on, thawed
//!              --> [copy the memory] --> the template appears, by a rename
//! paused:  flatten its disk, which privd opens --> [copy the memory] --> the template appears
//! ```
//!
//! In brackets: what a snapshot has and a root filesystem alone does not. The guest stands still for as long as memory is written and the
//! disk read, and no longer; a failure anywhere lets it run on, and leaves no template. Its processors are stopped for the disk alone,
//! too: a guest could thaw itself, and what is read is to be of one moment.
//!
//! A capture is not cancelled. Every step is bounded.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use roost_common::ids::SandboxId;
use roost_common::ipc::PassedFd;
use roost_common::privd::OpenDisk;
use roost_common::units::Bytes;

use super::parts::{Vm, millis};
use super::pause::{self, PauseError, StopSteps, WriteSteps, unless_ended};
use super::record::{Kept, Record, RecordError};
use super::{BuildError, CaptureEnd, Ending};
use crate::errors::{Chain, FileError};
use crate::failpoint::{pass, reach};
use crate::host::Host;
use crate::host::files::blocking;
use crate::host::privd::CallError;
use crate::snapshot::{self, Manifest, SnapshotError};
use crate::templates::{CaptureKind, CaptureWish, Making, TemplateError, TemplateFile};

/// How long a guest may stand still for its disk to be read: control planes end a call after ten minutes.
const FLATTEN_LIMIT: Duration = Duration::from_secs(540);

/// Why there is no template.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The template's place.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The guest could not be stopped, or its memory not written.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// Its snapshot.
    #[error("the sandbox's memory cannot be copied")]
    Snapshot(#[from] SnapshotError),
    /// A file operation.
    #[error(transparent)]
    File(#[from] FileError),
    /// The record of a paused sandbox.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The image of a paused sandbox.
    #[error(transparent)]
    Image(#[from] BuildError),
    /// The disk of a paused sandbox.
    #[error("no disk to read")]
    Privd(#[from] CallError),
    /// The disk took too long to read.
    #[error("the disk was not copied within {} s", .0.as_secs())]
    FlattenTimeout(Duration),
    /// The VMM ended meanwhile.
    #[error("the VMM ended while the sandbox was being made a template")]
    VmmEnded,
}

/// The names of the steps, by what is made.
struct Steps {
    stop: StopSteps,
    flattened: &'static str,
    thawed: &'static str,
    finished: &'static str,
}

const SNAPSHOT_STEPS: Steps = Steps {
    stop: StopSteps {
        prepared: "snapshot.prepared",
        frozen: "snapshot.frozen",
        stopped: "snapshot.stopped",
        synced: "snapshot.synced",
    },
    flattened: "snapshot.flattened",
    thawed: "snapshot.thawed",
    finished: "snapshot.finished",
};
const ROOTFS_STEPS: Steps = Steps {
    stop: StopSteps {
        prepared: "flatten.prepared",
        frozen: "flatten.frozen",
        stopped: "flatten.stopped",
        synced: "flatten.synced",
    },
    flattened: "flatten.flattened",
    thawed: "flatten.thawed",
    finished: "flatten.finished",
};
const WRITE: WriteSteps = WriteSteps {
    written: "snapshot.written",
    sealed: "snapshot.sealed",
};

fn steps_of(kind: CaptureKind) -> &'static Steps {
    match kind {
        CaptureKind::Snapshot => &SNAPSHOT_STEPS,
        CaptureKind::Rootfs => &ROOTFS_STEPS,
    }
}

/// Makes a template of a running sandbox, which runs on.
pub(crate) async fn capture(host: Arc<Host>, mut vm: Vm, wish: CaptureWish) -> CaptureEnd<Vm> {
    let began = Instant::now();
    let id = vm.record.plan.id.clone();
    let making = match begin(&host, &wish).await {
        Ok(making) => making,
        Err(error) => return CaptureEnd::Running(vm, Err(error)),
    };
    let mut ended = None;
    let stood_still = stand_still(&host, &mut vm, &wish, &making, &mut ended).await;
    if let Some(ending) = ended {
        drop_making(making).await;
        return CaptureEnd::Ended(vm, ending);
    }
    // Whatever became of that, the guest runs on before anything else is done.
    let Vm {
        shim, guest, record, ..
    } = &mut vm;
    if let Some(ending) = pause::run_on(&pause::api(&host, &id), shim, guest, &id).await {
        drop_making(making).await;
        return CaptureEnd::Ended(vm, ending);
    }
    let steps = steps_of(wish.kind);
    let outcome = match stood_still {
        Ok(generation) => {
            let memory = generation.map(|number| host.layout.generation(&id, number));
            let finishing = async {
                reach(steps.thawed).await?;
                finish(making, wish, record, memory, steps).await
            };
            // A VM that ends now leaves a template all the same; its end is heard of next.
            finishing.await
        }
        Err(error) => {
            drop_making(making).await;
            Err(error)
        }
    };
    let removed = blocking({
        let (host, id) = (host.clone(), id.clone());
        move || pause::remove_snapshots(&host, &id, None)
    });
    if let Err(error) = removed.await {
        tracing::warn!(sandbox_id = %id, error = %Chain(&error), "a snapshot that was copied stays until the next one");
    }
    report(&id, began, &outcome);
    CaptureEnd::Running(vm, outcome)
}

/// Makes a template of a paused sandbox, which stays paused.
pub(crate) async fn capture_kept(host: Arc<Host>, id: SandboxId, kept: Kept, wish: CaptureWish) -> CaptureEnd<Vm> {
    let began = Instant::now();
    let steps = steps_of(wish.kind);
    let outcome = match begin(&host, &wish).await {
        Ok(making) => match copy_kept(&host, &id, kept, &wish, &making).await {
            Ok((record, memory)) => finish(making, wish, &record, memory, steps).await,
            Err(error) => {
                drop_making(making).await;
                Err(error)
            }
        },
        Err(error) => Err(error),
    };
    report(&id, began, &outcome);
    CaptureEnd::Paused(kept, outcome)
}

fn report(id: &SandboxId, began: Instant, outcome: &Result<Bytes, CaptureError>) {
    match outcome {
        Ok(bytes) => {
            tracing::info!(sandbox_id = %id, op = "capture", elapsed_ms = millis(began), bytes = bytes.0, "a template was made");
        }
        Err(error) => tracing::warn!(sandbox_id = %id, op = "capture", error = %Chain(error), "no template was made"),
    }
}

async fn begin(host: &Arc<Host>, wish: &CaptureWish) -> Result<Making, CaptureError> {
    let (images, template) = (host.layout.images(), wish.template);
    Ok(blocking(move || Making::begin(&images, template)).await?)
}

/// Removes a template that is not to be.
async fn drop_making(making: Making) {
    blocking(move || drop(making)).await;
}

/// Stops the guest, writes its memory where that is wanted, and copies its disk. The generation that its memory is.
async fn stand_still(
    host: &Arc<Host>,
    vm: &mut Vm,
    wish: &CaptureWish,
    making: &Making,
    ended: &mut Option<Ending>,
) -> Result<Option<u32>, CaptureError> {
    let steps = steps_of(wish.kind);
    if wish.kind == CaptureKind::Snapshot {
        pause::load_memory(host, vm, ended).await?;
    }
    let stopped = pause::stop_guest(host, vm, &steps.stop, ended).await?;
    let generation = match wish.kind {
        CaptureKind::Rootfs => None,
        CaptureKind::Snapshot => Some(pause::write_memory(host, vm, stopped.freeze, &WRITE, ended).await?),
    };
    let copied = flatten(stopped.disk, &vm.record, making);
    unless_ended(&mut vm.shim, ended, copied).await??;
    reach(steps.flattened).await?;
    Ok(generation)
}

/// Copies a disk as the template's root filesystem.
async fn flatten(disk: OwnedFd, record: &Record, making: &Making) -> Result<(), CaptureError> {
    let (size, to) = (record.disk.bytes(), making.rootfs());
    let copied = blocking(move || snapshot::flatten(&File::from(disk), size, &to));
    // What it goes on to make when nobody waits any more is in a directory that goes.
    let copied = tokio::time::timeout(FLATTEN_LIMIT, copied)
        .await
        .map_err(|_| CaptureError::FlattenTimeout(FLATTEN_LIMIT))?;
    copied?;
    Ok(())
}

/// Copies the memory, where there is some, and lets the template appear. What it takes on disk.
async fn finish(
    making: Making,
    wish: CaptureWish,
    record: &Record,
    memory: Option<PathBuf>,
    steps: &Steps,
) -> Result<Bytes, CaptureError> {
    let id = record.plan.id.clone();
    let copied = blocking(move || {
        let Some(memory) = memory else {
            return Ok((making, false));
        };
        if !Manifest::read(&memory)?.about.held {
            // Two that wake from it would draw the same random numbers before either is told who it is.
            tracing::warn!(sandbox_id = %id, "not all programs could be stopped, so the template has no memory and is booted");
            return Ok((making, false));
        }
        snapshot::copy_generation(&memory, &making.snapshot()).map(|_| (making, true))
    });
    let (making, has_memory) = copied.await?;
    let token = has_memory.then(|| record.token.clone());
    if has_memory {
        reach("snapshot.copied").await?;
    }
    // Once more through all of it, beside a guest that runs already: in the copying itself it would stand still for longer.
    let finished = move || {
        let sums = making.sums()?;
        making.finish(&TemplateFile::new(wish.name, token, sums))
    };
    let size = blocking(finished).await?;
    pass(steps.finished).await;
    Ok(size)
}

/// Copies the disk of a paused sandbox. Its record, and its memory where the template is to have one.
async fn copy_kept(
    host: &Arc<Host>,
    id: &SandboxId,
    kept: Kept,
    wish: &CaptureWish,
    making: &Making,
) -> Result<(Record, Option<PathBuf>), CaptureError> {
    let (record, files) = blocking({
        let (host, id) = (host.clone(), id.clone());
        move || {
            let record = Record::read(&host.layout, &id)?;
            let files = super::build::disk_of(&host, &record)?;
            Ok::<_, CaptureError>((record, files))
        }
    })
    .await?;
    let disk = host
        .privd
        .open_disk(OpenDisk {
            sandbox: id.clone(),
            origin: PassedFd::from(OwnedFd::from(files.origin)),
            cow: PassedFd::from(OwnedFd::from(files.cow)),
            size: files.size,
            // For us: no VM is to read it.
            owner: nix::unistd::geteuid().as_raw(),
        })
        .await?;
    let device = disk
        .device
        .into_owned()
        .map_err(|source| FileError::new("taking the disk of", &host.layout.sandbox(id), source))?;
    flatten(device, &record, making).await?;
    reach(steps_of(wish.kind).flattened).await?;
    // Reading changes nothing. Had something been written all the same, its memory would be of no use, and so would the template's.
    let memory = (wish.kind == CaptureKind::Snapshot && kept.is_whole(&host.layout, id)?)
        .then(|| host.layout.generation(id, kept.generation));
    Ok((record, memory))
}
