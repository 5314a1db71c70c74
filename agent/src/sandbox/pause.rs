//! Pausing a sandbox: from a running VM to files that it can be resumed from.
//!
//! ```text
//! prepare --> freeze --> vm.pause --> sync disk --> vm.snapshot --> publish --> seal --> record --> end the VMM --> tidy
//! '------------- a failure up to here thaws the guest, and it runs on -------------------'
//! ```
//!
//! Guest memory and disk agree because the guest's filesystems are frozen before its processors stop, and because the disk is
//! synced through its device: the VMM writes through the device's page cache, so that syncing the file behind it moves nothing.
//! The record is the point of no return: before it the sandbox runs whatever happens to us, after it the sandbox is paused.
//!
//! A pause is not cancelled. Every step is bounded, so it ends.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use roost_common::ids::SandboxId;
use roost_common::shim::{API_SOCKET, RestoreMode};

use super::parts::{self, MemoryLoad, Versions, Vm, millis};
use super::record::{Kept, Memory, PauseReason, Phase, Record};
use super::{Ending, PauseEnd, unix_now};
use crate::errors::{Chain, FileError};
use crate::failpoint::{pass, reach};
use crate::guest::{Freeze, GuestError};
use crate::host::acl::{self, Access};
use crate::host::shim::{ShimFault, ShimLink, VmmEnd};
use crate::host::{Host, files, kernels};
use crate::snapshot::{self, About, Cpu, Devices, MemoryFile, SnapshotError};
use crate::vmm::{State, Vmm, VmmError};

/// How long the disk may take to write out what the VMM has written.
const SYNC_LIMIT: Duration = Duration::from_secs(120);
/// How often a guest is told to run on before we give up on it.
const UNDO_ATTEMPTS: u32 = 5;
/// Pause between two such attempts.
const UNDO_PAUSE: Duration = Duration::from_millis(200);

/// Why a sandbox could not be paused.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// The guest's filesystems could not be frozen.
    #[error("the guest could not be frozen")]
    Freeze(#[source] GuestError),
    /// The VMM did not pause or did not write.
    #[error("the VMM could not write the sandbox's memory")]
    Vmm(#[from] VmmError),
    /// The shim.
    #[error("the vmmshim did not help")]
    Shim(#[from] ShimFault),
    /// A file operation.
    #[error(transparent)]
    File(#[from] FileError),
    /// What the VMM wrote is no snapshot.
    #[error("what the VMM wrote cannot be kept")]
    Snapshot(#[from] SnapshotError),
    /// The disk took too long to write.
    #[error("the disk was not written out within {} s", .0.as_secs())]
    SyncTimeout(Duration),
    /// The VMM ended meanwhile.
    #[error("the VMM ended while it was being paused")]
    VmmEnded,
}

/// How far a pause has come, for its undo.
#[derive(Default)]
struct Progress {
    /// The guest may be frozen.
    frozen: bool,
    /// Its processors may be stopped.
    stopped: bool,
    /// The record on disk may say that it is paused.
    recorded: bool,
    /// How the VMM ended, where it did.
    ended: Option<Ending>,
}

/// Pauses a running sandbox.
pub async fn pause(host: Arc<Host>, mut vm: Vm, reason: PauseReason) -> PauseEnd<Vm> {
    let began = Instant::now();
    let id = vm.record.plan.id.clone();
    let mut progress = Progress::default();
    match steps(&host, &mut vm, reason, &mut progress).await {
        Ok(kept) => {
            stop(&host, vm, kept.generation).await;
            tracing::info!(sandbox_id = %id, op = "pause", elapsed_ms = millis(began), "sandbox is on disk");
            PauseEnd::Paused(kept)
        }
        Err(error) => {
            tracing::warn!(sandbox_id = %id, op = "pause", error = %Chain(&error), "undoing a pause");
            if let Some(ending) = progress.ended.take() {
                return PauseEnd::Ended(vm, ending);
            }
            match undo(&host, &mut vm, progress).await {
                None => PauseEnd::Running(vm, error),
                Some(ending) => PauseEnd::Ended(vm, ending),
            }
        }
    }
}

async fn steps(
    host: &Arc<Host>,
    vm: &mut Vm,
    reason: PauseReason,
    progress: &mut Progress,
) -> Result<Kept, PauseError> {
    let Vm {
        shim,
        guest,
        memory,
        record,
    } = vm;
    let id = &record.plan.id;
    let api = Vmm::new(&host.layout.vm_run(id).join(API_SOCKET));
    // Before the guest is stopped for it: a snapshot of memory that is still being loaded would hold holes in its place.
    if *memory == MemoryLoad::UnderWay {
        unless_ended(shim, progress, api.loaded()).await??;
        *memory = MemoryLoad::Complete;
    }
    if let Err(error) = unless_ended(shim, progress, guest.prepare()).await? {
        tracing::info!(sandbox_id = %id, error = %Chain(&error), "the guest did not make ready for a snapshot");
    }
    reach("pause.prepared").await?;
    progress.frozen = true;
    let freeze = unless_ended(shim, progress, guest.freeze())
        .await?
        .map_err(PauseError::Freeze)?;
    reach("pause.frozen").await?;
    progress.stopped = true;
    unless_ended(shim, progress, api.pause()).await??;
    reach("pause.stopped").await?;

    let disk = shim.lend_disk().await.map_err(|fault| fault_of(fault, progress))?;
    let synced = blocking({
        let cow = host.layout.cow(id);
        move || sync(disk, &cow)
    });
    let disk_written_at = tokio::time::timeout(SYNC_LIMIT, synced)
        .await
        .map_err(|_| PauseError::SyncTimeout(SYNC_LIMIT))??;
    reach("pause.synced").await?;
    let attempt = blocking({
        let (host, id, uid) = (host.clone(), id.clone(), shim.uid());
        move || make_attempt(&host, &id, uid)
    })
    .await?;
    let directory = host.layout.generation(id, attempt);
    unless_ended(shim, progress, api.snapshot(&directory)).await??;
    reach("pause.written").await?;
    shim.publish(attempt).await.map_err(|fault| fault_of(fault, progress))?;

    let kept = Kept {
        generation: attempt + 1,
        memory: Memory::Whole,
        reason,
        paused_at_unix: unix_now(),
        disk_written_at,
    };
    blocking({
        let (host, record, generation) = (
            host.clone(),
            record.clone(),
            host.layout.generation(id, kept.generation),
        );
        move || {
            let about = about(&host, &record, freeze)?;
            snapshot::seal(&directory, &generation, &about)
        }
    })
    .await?;
    reach("pause.sealed").await?;
    progress.recorded = true;
    blocking({
        let (host, record) = (host.clone(), record.with(Phase::Paused(kept)));
        move || record.write(&host.layout)
    })
    .await?;
    pass("pause.recorded").await;
    Ok(kept)
}

/// What a snapshot of a running sandbox is of.
fn about(host: &Host, record: &Record, freeze: Freeze) -> Result<About, SnapshotError> {
    let Versions { kernel, vmm, envd } = &record.versions;
    Ok(About {
        vmm_version: vmm.clone(),
        kernel_version: kernel.clone(),
        initramfs: kernels::of_version(&host.layout.kernels(), kernel).is_some_and(|kernel| kernel.initramfs.is_some()),
        envd_version: envd.clone(),
        cpu: Cpu::of_this_host()?,
        size: record.size(),
        devices: Devices::RootfsNet0BalloonSerial,
        memory_file: MemoryFile::of_version(vmm),
        frozen: freeze == Freeze::Frozen,
        restore: RestoreMode::OnDemand,
        made_at_unix: unix_now(),
    })
}

/// Syncs a disk through its device and then the file behind it, which its loop wrote. When that was last written.
fn sync(device: OwnedFd, cow: &std::path::Path) -> Result<i64, FileError> {
    let failed = |source| FileError::new("syncing the disk behind", cow, source);
    File::from(device).sync_all().map_err(failed)?;
    let file = File::open(cow).map_err(failed)?;
    file.sync_all().map_err(failed)?;
    files::written_at(cow)
}

/// Makes a directory of the next number that the VMM may write to.
fn make_attempt(host: &Host, id: &SandboxId, uid: u32) -> Result<u32, FileError> {
    let attempt = snapshot::next_number(&host.layout.vm(id))?;
    let directory = host.layout.generation(id, attempt);
    files::make_dir(&directory)?;
    if uid != nix::unistd::geteuid().as_raw() {
        acl::grant(&directory, uid, Access::Write)
            .map_err(|source| FileError::new("opening to the VM", &directory, source))?;
    }
    Ok(attempt)
}

/// Ends the VMM of a sandbox that is on disk, and removes what it leaves. Nothing here fails the pause: what stays behind is dealt with
/// by the resume, the destroy, or the next start.
async fn stop(host: &Arc<Host>, vm: Vm, generation: u32) {
    let id = vm.record.plan.id.clone();
    if let Err(error) = vm.shim.kill().await {
        tracing::error!(sandbox_id = %id, error = %Chain(&error), "the VMM of a paused sandbox could not be ended");
        return;
    }
    let host = host.clone();
    let tidied = tokio::task::spawn_blocking({
        let id = id.clone();
        move || tidy(&host, &id, Some(generation))
    });
    if let Err(error) = tidied.await.expect("file work does not panic") {
        tracing::warn!(sandbox_id = %id, error = %Chain(&error), "something of a paused sandbox's VM stays until it is resumed or destroyed");
    }
}

/// Removes what a VM that has ended leaves of a sandbox that stays: its run directory, its access, and all snapshots but the one
/// that is named.
pub(crate) fn tidy(host: &Host, id: &SandboxId, keep: Option<u32>) -> Result<(), FileError> {
    parts::shut_out(host, id)?;
    files::remove_tree(&host.layout.vm_run(id))?;
    remove_snapshots(host, id, keep)
}

/// Removes all snapshots of a sandbox, finished or not, but the one that is named.
pub(crate) fn remove_snapshots(host: &Host, id: &SandboxId, keep: Option<u32>) -> Result<(), FileError> {
    snapshot::generations(&host.layout.vm(id))?
        .into_iter()
        .filter(|number| Some(*number) != keep)
        .try_for_each(|number| files::remove_tree(&host.layout.generation(id, number)))
}

/// Lets a guest run on whose pause failed: its processors, then its filesystems. Its VMM's end, where that came first.
async fn undo(host: &Arc<Host>, vm: &mut Vm, mut progress: Progress) -> Option<Ending> {
    let Vm {
        shim, guest, record, ..
    } = vm;
    let id = &record.plan.id;
    let api = Vmm::new(&host.layout.vm_run(id).join(API_SOCKET));
    // First of all, so that an agent that starts meanwhile does not take it for paused.
    if progress.recorded {
        let written = blocking({
            let (host, record) = (host.clone(), record.clone());
            move || record.write(&host.layout)
        });
        if let Err(error) = written.await {
            tracing::error!(sandbox_id = %id, error = %Chain(&error), "the record of a sandbox that runs on may say that it is paused");
        }
    }
    for attempt in 1..=UNDO_ATTEMPTS {
        let outcome = unless_ended(shim, &mut progress, run_on(&api, guest)).await;
        match outcome {
            Err(_) => return progress.ended.take().or(Some(Ending::ShimLost)),
            Ok(Ok(())) => break,
            Ok(Err(error)) => {
                tracing::error!(sandbox_id = %id, attempt, error = %Chain(error.as_ref()), "a guest whose pause failed does not run on");
                tokio::time::sleep(UNDO_PAUSE).await;
            }
        }
    }
    let removed = blocking({
        let (host, id) = (host.clone(), id.clone());
        move || remove_snapshots(&host, &id, None)
    });
    if let Err(error) = removed.await {
        tracing::warn!(sandbox_id = %id, error = %Chain(&error), "an unfinished snapshot stays until the next one");
    }
    None
}

/// Resumes the processors, where they are stopped, and thaws the filesystems, where they are frozen.
pub(crate) async fn run_on(
    api: &Vmm,
    guest: &crate::guest::Guest,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    if api.state().await? == State::Paused {
        api.resume().await?;
    }
    guest.thaw().await?;
    Ok(())
}

/// What a step yields, unless the VMM ends first.
async fn unless_ended<T>(
    shim: &mut ShimLink,
    progress: &mut Progress,
    step: impl Future<Output = T>,
) -> Result<T, PauseError> {
    tokio::select! {
        biased;
        outcome = step => Ok(outcome),
        end = shim.ended() => {
            progress.ended = Some(ending(end));
            Err(PauseError::VmmEnded)
        }
    }
}

/// A shim's fault, which may be that its VMM has ended.
fn fault_of(fault: ShimFault, progress: &mut Progress) -> PauseError {
    match fault {
        ShimFault::Ended(exit) => {
            progress.ended = Some(Ending::Reported(Box::new(exit.0)));
            PauseError::VmmEnded
        }
        fault => PauseError::Shim(fault),
    }
}

/// A VMM's end in the words of the state machine.
pub(super) fn ending(end: VmmEnd) -> Ending {
    match end {
        VmmEnd::Reported(exit) => Ending::Reported(exit),
        VmmEnd::ShimLost => Ending::ShimLost,
    }
}

/// File work, to its end.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work)
        .await
        .expect("file work does not panic")
}
