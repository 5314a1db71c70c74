//! Pausing a sandbox: from a running VM to files that it can be resumed from.
//!
//! ```text
//! drain proxied --> prepare --> freeze --> vm.pause --> sync disk --> vm.snapshot --> publish --> seal --> record --> end the VMM --> tidy
//! '------------- a failure up to here thaws the guest, and it runs on -------------------'
//! ```
//!
//! Guest memory and disk agree because the guest's filesystems are frozen before its processors stop, and because the disk is
//! synced through its device: the VMM writes through the device's page cache, so that syncing the file behind it moves nothing.
//! The record is the point of no return: before it the sandbox runs whatever happens to us, after it the sandbox is paused.
//!
//! A pause is not cancelled. Every step is bounded, so it ends. One that nobody asked for is tried a few times, for its failure costs
//! more than an answer.

use std::fs::File;
use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use roost_common::ids::SandboxId;
use roost_common::shim::{API_SOCKET, Lendable, RestoreMode, SHIM_SOCKET};
use tracing::Instrument as _;

use super::parts::{self, Gate, MemoryLoad, Versions, Vm, millis};
use super::record::{Kept, Memory, PauseReason, Phase, Record};
use super::{Ending, PauseEnd, unix_now};
use crate::errors::{Chain, FileError};
use crate::failpoint::{pass, reach};
use crate::guest::{Freeze, Guest, GuestError};
use crate::host::acl::{self, Access};
use crate::host::files::blocking;
use crate::host::shim::{self, ShimFault, ShimLink, VmmEnd};
use crate::host::{Host, files, kernels};
use crate::outbox::{self, EventKind};
use crate::snapshot::{self, About, Cpu, Devices, MemoryFile, SnapshotError};
use crate::trace::step;
use crate::vmm::{self, State, Vmm, VmmError};

/// How long the disk may take to write out what the VMM has written.
const SYNC_LIMIT: Duration = Duration::from_secs(120);
/// How long a snapshot may take to be taken over: its memory is written out here.
const SEAL_LIMIT: Duration = Duration::from_secs(240);
/// How long a record may take to be written while its guest stands still: it is a few blocks, behind whatever else the disk has to do.
const RECORD_LIMIT: Duration = Duration::from_secs(120);
/// How long a VMM may take to let its guest's processors run on: longer than the snapshot takes that it may still be writing.
const RUN_ON_LIMIT: Duration = Duration::from_secs(300);
/// How long a guest whose processors run may take to thaw.
const THAW_LIMIT: Duration = Duration::from_secs(120);
/// Pause between two attempts at either.
const RUN_ON_PAUSE: Duration = Duration::from_millis(200);
/// How often a pause that nobody asked for is tried.
const UNASKED_ATTEMPTS: u32 = 3;
/// Pause between two such attempts.
const UNASKED_PAUSE: Duration = Duration::from_secs(5);
/// How often a VMM that is to end is told so.
const KILL_ATTEMPTS: u32 = 3;

const STOP: StopSteps = StopSteps {
    prepared: "pause.prepared",
    frozen: "pause.frozen",
    stopped: "pause.stopped",
    synced: "pause.synced",
};
const WRITE: WriteSteps = WriteSteps {
    written: "pause.written",
    sealed: "pause.sealed",
};

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

impl PauseError {
    /// Whether it is the host that is in the way, such as a full disk, and not the guest or its VMM.
    pub fn is_the_hosts(&self) -> bool {
        match self {
            Self::Shim(_) | Self::File(_) | Self::SyncTimeout(_) => true,
            Self::Snapshot(SnapshotError::File(_)) => true,
            // What a VMM cannot write is a full disk, mostly; it does not say so in words of a kind.
            Self::Vmm(VmmError::Refused { call, .. } | VmmError::Timeout { call }) => *call == vmm::SNAPSHOT,
            Self::Freeze(_) | Self::Vmm(_) | Self::Snapshot(_) | Self::VmmEnded => false,
        }
    }
}

/// How far a pause has come, for its undo.
#[derive(Default)]
struct Progress {
    /// The record on disk may say that it is paused.
    recorded: bool,
    /// How the VMM ended, where it did.
    ended: Option<Ending>,
}

/// Pauses a running sandbox.
pub async fn pause(host: Arc<Host>, mut vm: Vm, reason: PauseReason) -> PauseEnd<Vm> {
    let mut attempt = 1;
    loop {
        match attempt_to_pause(&host, vm, reason).await {
            PauseEnd::Running(back, error) if reason != PauseReason::Requested && attempt < UNASKED_ATTEMPTS => {
                tracing::warn!(sandbox_id = %back.record.plan.id, attempt, error = %Chain(&error), "not paused; tried again");
                vm = back;
            }
            end => return end,
        }
        attempt += 1;
        tokio::select! {
            () = tokio::time::sleep(UNASKED_PAUSE) => {}
            end = vm.shim.ended() => return PauseEnd::Ended(vm, ending(end)),
        }
    }
}

async fn attempt_to_pause(host: &Arc<Host>, mut vm: Vm, reason: PauseReason) -> PauseEnd<Vm> {
    let began = Instant::now();
    let id = vm.record.plan.id.clone();
    let mut progress = Progress::default();
    match steps(host, &mut vm, reason, &mut progress).await {
        Ok(kept) => {
            step("end", stop(host, vm, kept.generation)).await;
            tracing::info!(sandbox_id = %id, op = "pause", elapsed_ms = millis(began), "sandbox is on disk");
            PauseEnd::Paused(kept)
        }
        Err(error) => {
            tracing::warn!(sandbox_id = %id, op = "pause", error = %Chain(&error), "undoing a pause");
            if let Some(ending) = progress.ended.take() {
                return PauseEnd::Ended(vm, ending);
            }
            match undo(host, &mut vm, progress).await {
                None => {
                    vm.guest.connections().open();
                    PauseEnd::Running(vm, error)
                }
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
    let ended = &mut progress.ended;
    load_memory(host, vm, ended).await?;
    // Before the guest makes ready, so that what it does to end a connection is in its snapshot.
    step(
        "drain",
        unless_ended(&mut vm.shim, ended, vm.guest.connections().drain()),
    )
    .await?;
    let Stopped {
        disk: _,
        written_at: disk_written_at,
        freeze,
    } = stop_guest(host, vm, &STOP, ended).await?;
    let generation = write_memory(host, vm, freeze, &WRITE, ended).await?;
    let kept = Kept {
        generation,
        memory: Memory::Whole,
        reason,
        told: false,
        paused_at_unix: unix_now(),
        disk_written_at,
    };
    progress.recorded = true;
    let (host, record) = (host.clone(), vm.record.with(Phase::Paused(kept)));
    let written = in_turn(&vm.writes, RECORD_LIMIT, move || {
        // That the sandbox's directory is there at all has not been on disk so far: a sandbox that only runs does not survive a
        // power cut anyway.
        files::sync_dir(&host.layout.sandboxes())?;
        record.write(&host.layout)
    });
    step("record", written).await?;
    pass("pause.recorded").await;
    Ok(kept)
}

/// The names of the steps of [`stop_guest`], for tests.
pub(super) struct StopSteps {
    pub(super) prepared: &'static str,
    pub(super) frozen: &'static str,
    pub(super) stopped: &'static str,
    pub(super) synced: &'static str,
}

/// The names of the steps of [`write_memory`], for tests.
pub(super) struct WriteSteps {
    pub(super) written: &'static str,
    pub(super) sealed: &'static str,
}

/// A guest that stands still, its disk on the host's.
pub(super) struct Stopped {
    /// The disk's device.
    pub(super) disk: OwnedFd,
    /// When the exception store was last written, in nanoseconds since 1970.
    pub(super) written_at: i64,
    pub(super) freeze: Freeze,
}

/// Waits until all of a VM's memory is there: a snapshot of memory that is still being loaded would hold holes in its place. Before the
/// guest is stopped for it.
pub(super) async fn load_memory(host: &Arc<Host>, vm: &mut Vm, ended: &mut Option<Ending>) -> Result<(), PauseError> {
    if vm.memory == MemoryLoad::UnderWay {
        let api = api(host, &vm.record.plan.id);
        unless_ended(&mut vm.shim, ended, api.loaded()).await??;
        vm.memory = MemoryLoad::Complete;
    }
    Ok(())
}

/// Brings a guest to a stop: filesystems, then processors, then its disk. Whoever calls this lets it [run on](run_on), or ends it.
pub(super) async fn stop_guest(
    host: &Arc<Host>,
    vm: &mut Vm,
    steps: &StopSteps,
    ended: &mut Option<Ending>,
) -> Result<Stopped, PauseError> {
    let Vm {
        shim, guest, record, ..
    } = vm;
    let id = &record.plan.id;
    let api = api(host, id);
    if let Err(error) = step("prepare", unless_ended(shim, ended, guest.prepare())).await? {
        tracing::info!(sandbox_id = %id, error = %Chain(&error), "the guest did not make ready for a snapshot");
    }
    reach(steps.prepared).await?;
    let freeze = step("freeze", unless_ended(shim, ended, guest.freeze()))
        .await?
        .map_err(PauseError::Freeze)?;
    reach(steps.frozen).await?;
    step("stop", unless_ended(shim, ended, api.pause())).await??;
    reach(steps.stopped).await?;
    let disk = shim
        .lend(Lendable::Disk)
        .await
        .map_err(|fault| fault_of(fault, ended))?;
    let synced = blocking({
        let cow = host.layout.cow(id);
        move || sync(disk, &cow)
    });
    let (disk, written_at) = tokio::time::timeout(SYNC_LIMIT, step("sync", synced))
        .await
        .map_err(|_| PauseError::SyncTimeout(SYNC_LIMIT))??;
    reach(steps.synced).await?;
    Ok(Stopped {
        disk,
        written_at,
        freeze,
    })
}

/// Has the VMM write the memory of a guest that was stopped, and takes that over. The generation that it is.
pub(super) async fn write_memory(
    host: &Arc<Host>,
    vm: &mut Vm,
    freeze: Freeze,
    steps: &WriteSteps,
    ended: &mut Option<Ending>,
) -> Result<u32, PauseError> {
    let Vm { shim, record, .. } = vm;
    let id = &record.plan.id;
    let attempt = blocking({
        let (host, id, uid) = (host.clone(), id.clone(), shim.uid());
        move || make_attempt(&host, &id, uid)
    })
    .await?;
    let directory = host.layout.generation(id, attempt);
    step(
        "snapshot",
        unless_ended(shim, ended, api(host, id).snapshot(&directory)),
    )
    .await??;
    reach(steps.written).await?;
    shim.publish(attempt).await.map_err(|fault| fault_of(fault, ended))?;
    let memory = shim
        .lend(Lendable::Memory { attempt })
        .await
        .map_err(|fault| fault_of(fault, ended))?;
    step("seal", seal(host, record, freeze, attempt, memory)).await?;
    reach(steps.sealed).await?;
    Ok(attempt + 1)
}

/// The API of a sandbox's VMM.
pub(crate) fn api(host: &Host, id: &SandboxId) -> Vmm {
    Vmm::new(&host.layout.vm_run(id).join(API_SOCKET))
}

/// Takes over what the VMM has written as `attempt`, as the generation that follows. `memory` is the shim's word for its memory file.
async fn seal(
    host: &Arc<Host>,
    record: &Record,
    freeze: Freeze,
    attempt: u32,
    memory: OwnedFd,
) -> Result<(), PauseError> {
    let sealed = blocking({
        let (host, record) = (host.clone(), record.clone());
        move || {
            let about = about(&host, &record, freeze)?;
            let directory = |number| host.layout.generation(&record.plan.id, number);
            snapshot::seal(&directory(attempt), &directory(attempt + 1), &about, &memory.into())
        }
    });
    // What it goes on to make when nobody waits any more is removed with the next snapshot.
    tokio::time::timeout(SEAL_LIMIT, sealed)
        .await
        .map_err(|_| PauseError::SyncTimeout(SEAL_LIMIT))??;
    Ok(())
}

/// Tells the control plane of a pause that nobody asked for, once: it goes by the last it has heard, so a second time, after a resume,
/// would say what is no longer true.
pub(crate) async fn tell(host: &Arc<Host>, record: &Record, kept: &mut Kept) {
    if kept.told || kept.reason == PauseReason::Requested {
        return;
    }
    let id = record.plan.id.clone();
    let event = outbox::Event::new(EventKind::AutoPaused, id.clone(), kept.paused_at_unix);
    if host.tell(event).await.is_err() {
        // The next start tells it.
        return;
    }
    kept.told = true;
    let written = blocking({
        let (host, record) = (host.clone(), record.with(Phase::Paused(*kept)));
        move || record.write(&host.layout)
    });
    if let Err(error) = written.await {
        tracing::warn!(sandbox_id = %id, error = %Chain(&error), "the next start will tell of a pause once more");
    }
}

/// What a snapshot of a running sandbox is of.
fn about(host: &Host, record: &Record, freeze: Freeze) -> Result<About, SnapshotError> {
    let Versions {
        kernel,
        vmm,
        envd,
        nonces,
        ..
    } = &record.versions;
    Ok(About {
        vmm_version: vmm.clone(),
        kernel_version: kernel.clone(),
        initramfs: kernels::of_version(&host.layout.kernels(), kernel).is_some_and(|kernel| kernel.initramfs.is_some()),
        envd_version: envd.clone(),
        nonces: *nonces,
        cpu: Cpu::of_this_host()?,
        size: record.size(),
        devices: Devices::RootfsNet0BalloonSerial,
        memory_file: MemoryFile::of_version(vmm),
        held: freeze == Freeze::Held,
        restore: RestoreMode::OnDemand,
        made_at_unix: unix_now(),
    })
}

/// The piece of a disk that is read to see whether it can be.
const BLOCK: usize = 4096;

/// Syncs a disk through its device and then the file behind it, which its loop wrote, and sees that it can be read. The device, and
/// when the file was last written.
fn sync(device: OwnedFd, cow: &std::path::Path) -> Result<(OwnedFd, i64), FileError> {
    let failed = |source| FileError::new("syncing the disk behind", cow, source);
    let device = File::from(device);
    device.sync_all().map_err(failed)?;
    let file = File::open(cow).map_err(failed)?;
    file.sync_all().map_err(failed)?;
    // A disk that dm-snapshot has given up fails every read, while the error of the write that it was given up for has been told to
    // somebody else: the VMM writes through the same open file.
    let reading = |source| FileError::new("reading the disk behind", cow, source);
    rustix::fs::fadvise(&device, 0, NonZeroU64::new(BLOCK as u64), rustix::fs::Advice::DontNeed)
        .map_err(|errno| reading(errno.into()))?;
    device.read_exact_at(&mut [0; BLOCK], 0).map_err(reading)?;
    Ok((device.into(), files::written_at(cow)?))
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
    let mut killed = vm.shim.kill().await;
    for _ in 1..KILL_ATTEMPTS {
        let Err(error) = &killed else { break };
        tracing::error!(sandbox_id = %id, error = %Chain(error), "the VMM of a paused sandbox could not be ended");
        killed = shim::end_at(&host.layout.vm_run(&id).join(SHIM_SOCKET)).await.map(drop);
    }
    if killed.is_err() {
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
    parts::shut_out(host, id, keep)?;
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
async fn undo(host: &Arc<Host>, vm: &mut Vm, progress: Progress) -> Option<Ending> {
    let Vm {
        shim,
        guest,
        record,
        writes,
        ..
    } = vm;
    let id = &record.plan.id;
    // First of all, so that an agent that starts meanwhile does not take it for paused.
    if progress.recorded {
        let (host, record) = (host.clone(), record.clone());
        let written = in_turn(writes, RECORD_LIMIT, move || record.write(&host.layout));
        if let Err(error) = written.await {
            tracing::error!(sandbox_id = %id, error = %Chain(&error), "the record of a sandbox that runs on may say that it is paused");
        }
    }
    if let Some(ending) = run_on(&api(host, id), shim, guest, id).await {
        return Some(ending);
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

/// Lets the processors run, where they are stopped, and thaws the filesystems, where they are frozen: until that is done, or the VMM
/// ends. How it ended. A VMM that cannot be brought to run its guest is as good as ended; a guest that runs and does not thaw is not,
/// for what else it does is its own affair.
pub(crate) async fn run_on(api: &Vmm, shim: &mut ShimLink, guest: &Guest, id: &SandboxId) -> Option<Ending> {
    let run = || async {
        let stopped = api.state().await? == State::Paused;
        if stopped { api.resume().await } else { Ok(()) }
    };
    match until(RUN_ON_LIMIT, shim, run).await {
        Ok(()) => {}
        Err(NotDone::Ended(ending)) => return Some(ending),
        Err(NotDone::Late(error)) => {
            tracing::error!(sandbox_id = %id, error = %Chain(&error), "a VMM does not let its guest run on; it is ended");
            return Some(Ending::Stopped(Arc::new(PauseError::Vmm(error))));
        }
    }
    let thaw = || async {
        let thawed = guest.thaw().await;
        // A pause that was not answered in time may come about only now, after the VMM was seen to run.
        if let Err(error) = run().await {
            tracing::debug!(sandbox_id = %id, error = %Chain(&error), "a VMM does not say whether its guest runs");
        }
        thawed
    };
    until_thawed(shim, id, thaw).await
}

/// Thaws a guest's filesystems: until that is done, or the VMM ends, or it is time to leave the guest to itself. How the VMM ended.
pub(super) async fn thaw(shim: &mut ShimLink, guest: &Guest, id: &SandboxId) -> Option<Ending> {
    until_thawed(shim, id, || guest.thaw()).await
}

async fn until_thawed<F>(shim: &mut ShimLink, id: &SandboxId, thaw: impl FnMut() -> F) -> Option<Ending>
where
    F: Future<Output = Result<(), GuestError>>,
{
    match until(THAW_LIMIT, shim, thaw).await {
        Ok(()) => None,
        Err(NotDone::Ended(ending)) => Some(ending),
        Err(NotDone::Late(error)) => {
            tracing::error!(sandbox_id = %id, error = %Chain(&error), "a guest does not say that it has thawed; it is left to itself");
            None
        }
    }
}

/// Why something that is tried again and again was not done.
enum NotDone<E> {
    Ended(Ending),
    /// The last attempt's error.
    Late(E),
}

/// Tries something until it succeeds, the VMM ends, or the time is up.
async fn until<E, F>(limit: Duration, shim: &mut ShimLink, mut attempt: impl FnMut() -> F) -> Result<(), NotDone<E>>
where
    E: std::error::Error + 'static,
    F: Future<Output = Result<(), E>>,
{
    let deadline = tokio::time::Instant::now() + limit;
    let attempts = async {
        loop {
            match attempt().await {
                Ok(()) => return Ok(()),
                Err(error) if tokio::time::Instant::now() >= deadline => return Err(NotDone::Late(error)),
                Err(error) => tracing::debug!(error = %Chain(&error), "a guest does not run on yet"),
            }
            tokio::time::sleep(RUN_ON_PAUSE).await;
        }
    };
    tokio::select! {
        biased;
        outcome = attempts => outcome,
        end = shim.ended() => Err(NotDone::Ended(ending(end))),
    }
}

/// What a step yields, unless the VMM ends first.
pub(super) async fn unless_ended<T>(
    shim: &mut ShimLink,
    ended: &mut Option<Ending>,
    step: impl Future<Output = T>,
) -> Result<T, PauseError> {
    tokio::select! {
        biased;
        outcome = step => Ok(outcome),
        end = shim.ended() => {
            *ended = Some(ending(end));
            Err(PauseError::VmmEnded)
        }
    }
}

/// A shim's fault, which may be that its VMM has ended.
fn fault_of(fault: ShimFault, ended: &mut Option<Ending>) -> PauseError {
    match fault {
        ShimFault::Ended(exit) => {
            *ended = Some(Ending::Reported(Box::new(exit.0)));
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

/// Writes something of a VM that goes on whatever becomes of that. What takes too long is still written, and before anything that is
/// written after it.
async fn in_turn(
    writes: &Gate,
    limit: Duration,
    work: impl FnOnce() -> Result<(), FileError> + Send + 'static,
) -> Result<(), PauseError> {
    let writes = writes.clone();
    // A task of its own: it keeps its turn when nobody waits for it any more.
    let written = tokio::spawn(async move { writes.run(work).await }.in_current_span());
    let written = tokio::time::timeout(limit, written)
        .await
        .map_err(|_| PauseError::SyncTimeout(limit))?;
    Ok(written.expect("file work does not panic")?)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::super::plan::{Plan, Wish};
    use super::*;
    use crate::config::Config;
    use crate::guest::Token;
    use crate::outbox::{Limits, Outbox};

    #[tokio::test]
    async fn what_is_written_too_late_is_written_before_what_comes_after_it() {
        let (writes, written) = (Gate::default(), Arc::new(Mutex::new(Vec::new())));
        let write = |what: &'static str| {
            let written = written.clone();
            move || {
                written.lock().expect("no panic").push(what);
                Ok(())
            }
        };
        let (go, held) = std::sync::mpsc::channel::<()>();
        let first = write("paused");
        let slow = move || {
            held.recv().expect("let go");
            first()
        };
        let limit = Duration::from_millis(20);
        for outcome in [
            in_turn(&writes, limit, slow).await,
            in_turn(&writes, limit, write("running")).await,
        ] {
            assert!(matches!(outcome, Err(PauseError::SyncTimeout(_))), "{outcome:?}");
        }
        assert!(written.lock().expect("no panic").is_empty());
        go.send(()).expect("awaited");
        let last = in_turn(&writes, Duration::from_secs(60), write("paused again"));
        last.await.expect("written");
        assert_eq!(
            *written.lock().expect("no panic"),
            ["paused", "running", "paused again"]
        );
    }

    #[tokio::test]
    async fn a_pause_that_nobody_could_be_told_of_is_told_of_by_the_next_start() {
        let dir = tempfile::tempdir().expect("a directory");
        let config = || Config {
            dir: dir.path().into(),
            vm_run_dir: dir.path().into(),
            ..Config::default()
        };
        let id: SandboxId = "x".parse().expect("an id");
        let plan = Plan::check(Wish::default(), &config(), |_| None, || id.clone()).expect("checked");
        let mut kept = Kept {
            generation: 2,
            memory: Memory::Whole,
            reason: PauseReason::Idle,
            told: false,
            paused_at_unix: 5,
            disk_written_at: 5,
        };
        let record = Record::new(7, plan, roost_common::units::Sectors(16), 5, Token::random());
        let paused = record.with(Phase::Paused(kept));
        let mute = Arc::new(Host::new(config()));
        std::fs::create_dir_all(mute.layout.sandbox(&id)).expect("made");
        paused.write(&mute.layout).expect("written");

        tell(&mute, &paused, &mut kept).await;
        assert!(!kept.told);
        assert_eq!(Record::read(&mute.layout, &id).expect("read"), paused);

        let host = Host::new(config());
        let outbox = Outbox::open(&host.layout.outbox(), Limits::default()).expect("opened");
        let host = Arc::new(host.with_outbox(outbox));
        tell(&host, &paused, &mut kept).await;
        assert!(kept.told);
        let told = Record::read(&host.layout, &id).expect("read");
        assert_eq!(told.phase, Phase::Paused(kept));
        let events = std::fs::read_to_string(host.layout.outbox().join("events.log")).expect("read");
        assert!(events.contains("sandbox.auto_paused"), "{events}");
    }
}
