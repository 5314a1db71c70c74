//! The task that owns one sandbox: it takes one message at a time, asks the state machine, and performs what it says.
//!
//! Everyone else holds a [`Handle`]: a way to send messages, and a view to read. The task ends when nothing of the sandbox is
//! left, and takes it out of the registry before it tells anyone so.

mod egress;

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use roost_common::units::Bytes;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{Instrument as _, Span};

use super::build;
use super::hold::Hold;
use super::parts::{Versions, Vm};
use super::plan::Plan;
use super::record::Record;
use super::{
    Action, BuildFailure, CaptureEnd, CaptureFailure, CaptureWish, CreateFailure, EgressFailure, Ending, Event, Kept,
    PauseEnd, PauseError, PauseFailure, PauseReason, ReachEnd, ResumeEnd, ResumeFailure, ResumeWish, Sandbox,
    TeardownError, capture, pause, resume, unix_now,
};
use crate::activity::{Activity, Moment};
use crate::egress::Egress;
use crate::egress::by_name::{ByName, Counts, Tally};
use crate::errors::Chain;
use crate::guest::Guest;
use crate::host::images::ROOTFS;
use crate::host::slots::SlotLease;
use crate::host::{Host, counters};
use crate::metrics::Rings;
use crate::outbox;
use crate::recover;
use crate::registry::Registry;
use crate::snapshot;
use crate::templates::CaptureKind;
use crate::tombstone::{self, End, Tombstone};

/// Pause between two attempts to remove what could not be removed.
const RETRY_PAUSE: Duration = Duration::from_secs(30);
/// How long the outcome of a capture is kept for a caller that was not there to hear it: callers end a call before a large one is done,
/// and ask again.
const UNCLAIMED_KEPT: Duration = Duration::from_secs(600);

/// What others see of a sandbox.
#[derive(Debug, Clone)]
pub enum View {
    /// Being built.
    Creating,
    /// Takes commands.
    Running(Arc<Guest>, Arc<Versions>),
    /// On its way to disk.
    Pausing,
    /// On disk.
    Paused(Kept),
    /// On its way back.
    Resuming,
    /// Its VM may run, and cannot be reached so far.
    Unreachable,
    /// On its way out.
    Destroying,
    /// Nothing is left.
    Gone,
}

impl View {
    /// The state in the words of the protocol.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Creating => "starting",
            Self::Running(..) => "running",
            Self::Pausing => "pausing",
            Self::Paused(_) => "paused",
            Self::Resuming => "resuming",
            Self::Unreachable => "unreachable",
            Self::Destroying => "stopping",
            Self::Gone => "stopped",
        }
    }
}

/// What a handle asks for.
#[derive(Debug)]
enum Command {
    Destroy(super::DestroyReply),
    Pause(PauseReason, super::PauseReply),
    Resume(ResumeWish, super::ResumeReply),
    Capture(CaptureWish, super::CaptureReply),
    /// Stop the guest's processors, until [`Command::Release`].
    Hold(oneshot::Sender<()>),
    Release(oneshot::Sender<()>),
    /// The disk can be used no more.
    DiskLost,
    /// What it may reach from now on.
    SetEgress(Egress, EgressReply),
}

/// The answer to a change of what a sandbox may reach.
type EgressReply = oneshot::Sender<Result<(), EgressFailure>>;

/// A command, and the span of the call that it came with.
#[derive(Debug)]
struct Asked {
    command: Command,
    span: Span,
}

impl Asked {
    fn now(command: Command) -> Self {
        Self {
            command,
            span: Span::current(),
        }
    }
}

/// A sandbox as everyone but its task has it.
#[derive(Debug, Clone)]
pub struct Handle {
    /// What was asked for when it was made.
    pub plan: Arc<Plan>,
    /// Its place in the network plan.
    pub slot: Arc<SlotLease>,
    /// When it was made, in seconds since 1970.
    pub created_at_unix: i64,
    /// What it uses.
    pub metrics: Arc<Rings>,
    usage: Arc<Usage>,
    hold: Arc<Hold>,
    egress: watch::Receiver<Arc<Egress>>,
    by_name: Arc<Tally>,
    commands: mpsc::Sender<Asked>,
    view: watch::Receiver<View>,
}

/// When a sandbox was last used, and whether it is being used; its callers say so from any thread.
#[derive(Debug)]
struct Usage {
    activity: Mutex<Activity>,
    /// Calls that are under way.
    calls: AtomicUsize,
}

impl Usage {
    fn new(limit_sec: u32) -> Self {
        Self {
            activity: Mutex::new(Activity::new(limit_sec, Moment::now())),
            calls: AtomicUsize::new(0),
        }
    }

    /// Held for moments.
    fn activity(&self) -> MutexGuard<'_, Activity> {
        self.activity.lock().expect("nothing panics while it holds this")
    }

    fn touch(&self) {
        self.activity().touch(Moment::now());
    }
}

/// A call that is under way: for as long as this lives its sandbox is in use, and its end is the last use.
#[derive(Debug)]
pub struct InUse(Arc<Usage>);

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.touch();
        self.0.calls.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Waits until nobody has used the sandbox for as long as it may go unused, and its guest does nothing by itself either.
async fn idle<F: Future<Output = bool>>(usage: &Usage, at_work: impl Fn() -> F) {
    loop {
        let deadline = usage.activity().deadline();
        let Some(deadline) = deadline else {
            return std::future::pending().await;
        };
        tokio::time::sleep_until(deadline).await;
        let in_use = usage.calls.load(Ordering::Acquire) > 0 || at_work().await;
        if in_use {
            usage.touch();
        } else if usage.activity().is_idle(Instant::now()) {
            return;
        }
    }
}

impl Handle {
    /// What the sandbox is doing.
    pub fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// When it was last used, in seconds since 1970.
    pub fn last_active_at_unix(&self) -> i64 {
        self.usage.activity().last_used_unix()
    }

    /// Seconds without use until it is paused; 0 is never.
    pub fn timeout_sec(&self) -> u32 {
        self.usage.activity().limit_sec()
    }

    /// Waits until this incarnation of the guest can answer no more. A pause that fails leaves it running, so one under way is no end
    /// yet.
    pub async fn stopped_running(&self, guest: &Arc<Guest>) {
        let mut view = self.view.clone();
        let has_stopped = |view: &View| match view {
            View::Running(now, _) => !Arc::ptr_eq(now, guest),
            View::Pausing => false,
            _ => true,
        };
        // A task that has ended has nothing that runs.
        drop(view.wait_for(has_stopped).await);
    }

    /// Waits until it is no longer as `was` says.
    pub async fn left(&self, was: impl Fn(&View) -> bool) {
        let mut view = self.view.clone();
        // A task that has ended has left every state.
        drop(view.wait_for(|view| !was(view)).await);
    }

    /// Counts as use.
    pub fn touch(&self) {
        self.usage.touch();
    }

    /// Counts as use for as long as what this returns lives.
    pub fn begin_use(&self) -> InUse {
        self.usage.calls.fetch_add(1, Ordering::AcqRel);
        self.usage.touch();
        InUse(self.usage.clone())
    }

    /// Destroys the sandbox and waits until nothing of it is left.
    ///
    /// # Errors
    /// What is still there, and why; a repetition goes on.
    pub async fn destroy(&self) -> Result<(), Arc<TeardownError>> {
        // A task that has ended has nothing left.
        self.ask(Command::Destroy).await.unwrap_or(Ok(()))
    }

    /// Pauses the sandbox and waits until it is on disk. Goes on when the caller does not wait.
    ///
    /// # Errors
    /// [`PauseFailure`].
    pub async fn pause(&self, reason: PauseReason) -> Result<(), PauseFailure> {
        let gone = Err(PauseFailure::Refused(View::Gone.name()));
        self.ask(|reply| Command::Pause(reason, reply)).await.unwrap_or(gone)
    }

    /// Makes a template of the sandbox and waits until it is there; what it takes on disk. Goes on when the caller does not wait, and
    /// one that asks for the same again is answered with its end.
    ///
    /// # Errors
    /// [`CaptureFailure`].
    pub async fn capture(&self, wish: CaptureWish) -> Result<Bytes, CaptureFailure> {
        let gone = Err(CaptureFailure::Refused(View::Gone.name()));
        self.ask(|reply| Command::Capture(wish, reply)).await.unwrap_or(gone)
    }

    /// Resumes the sandbox and waits until it runs. Goes on when the caller does not wait.
    ///
    /// # Errors
    /// [`ResumeFailure`].
    pub async fn resume(&self, wish: ResumeWish) -> Result<(), ResumeFailure> {
        let gone = Err(ResumeFailure::Refused(View::Gone.name()));
        self.ask(|reply| Command::Resume(wish, reply)).await.unwrap_or(gone)
    }

    /// Replaces what it may reach, from now on and over pauses.
    ///
    /// # Errors
    /// [`EgressFailure`]; where it is of the network, a repetition goes on.
    pub async fn set_egress(&self, egress: Egress) -> Result<(), EgressFailure> {
        let gone = Err(EgressFailure::Refused(View::Gone.name()));
        self.ask(|reply| Command::SetEgress(egress, reply))
            .await
            .unwrap_or(gone)
    }

    /// What it may reach.
    pub fn egress(&self) -> Arc<Egress> {
        self.egress.borrow().clone()
    }

    /// What became of its connections by name.
    pub fn by_name(&self) -> Counts {
        self.by_name.counts()
    }

    /// Whether its guest is held for want of room on the disk, and where its VM runs.
    pub fn hold_state(&self) -> &Hold {
        &self.hold
    }

    /// Holds the guest, where it runs.
    pub async fn hold(&self) {
        self.ask_once(Command::Hold).await;
    }

    /// Lets a guest that is held run again.
    pub async fn release(&self) {
        self.ask_once(Command::Release).await;
    }

    /// Its disk can be used no more: it is ended where it runs, and why is written down.
    pub fn disk_is_lost(&self) {
        // A task that has ended needs no disk, and one that has much to do is told again.
        drop(self.commands.try_send(Asked::now(Command::DiskLost)));
    }

    /// Asks to hold or release, unless that has been asked and not been done yet: a VMM that does not answer must not fill the queue.
    async fn ask_once(&self, command: impl FnOnce(oneshot::Sender<()>) -> Command) {
        if !self.hold.ask() {
            return;
        }
        let (reply, answer) = oneshot::channel();
        if self.commands.try_send(Asked::now(command(reply))).is_err() {
            self.hold.answered();
            return;
        }
        // A task that has ended has nothing to hold.
        drop(answer.await);
    }

    /// The task's answer; `None` when it has ended.
    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Asked::now(command(reply))).await.ok()?;
        answer.await.ok()
    }
}

/// Starts the task of a new sandbox. The receiver has the create's answer; dropping it stops the create.
pub fn spawn(
    registry: Arc<Registry>,
    host: Arc<Host>,
    plan: Plan,
    slot: SlotLease,
) -> (Handle, oneshot::Receiver<Result<(), CreateFailure>>) {
    let (caller, answer) = oneshot::channel();
    let mut driver = driver(registry, host, plan, slot, unix_now(), View::Creating);
    let handle = driver.handle.clone();
    driver.cause = Span::current();
    let sandbox = Sandbox::new(caller);
    // Before there is a guest.
    driver.serve_by_name(&sandbox);
    driver.start_build();
    tokio::spawn(driver.run(sandbox));
    (handle, answer)
}

/// What an agent finds of a sandbox of an earlier one.
pub enum Found {
    /// Its VM runs.
    Running(Box<Vm>),
    /// It is on disk.
    Paused(Kept),
    /// Its VM is still being reached.
    Reaching(Box<Record>, JoinHandle<ReachEnd<Vm>>),
    /// Its VM may run and cannot be reached, by this agent at least: what there is does not say how.
    Unreachable,
    /// It could not be removed.
    Remains,
}

/// Starts the task of a sandbox of an earlier agent.
pub fn spawn_found(
    registry: Arc<Registry>,
    host: Arc<Host>,
    plan: Plan,
    slot: SlotLease,
    created_at_unix: i64,
    found: Found,
) -> Handle {
    let (sandbox, work, to_reach) = match found {
        Found::Running(vm) => (Sandbox::adopted(*vm), Work::None, None),
        Found::Paused(kept) => (Sandbox::kept(kept), Work::None, None),
        Found::Reaching(record, task) => (Sandbox::unreachable(true), Work::Reach(task), Some(*record)),
        Found::Unreachable => (Sandbox::unreachable(false), Work::None, None),
        Found::Remains => (Sandbox::remains(), Work::None, None),
    };
    let first = view_of(&sandbox).expect("no sandbox is found in the middle of a capture");
    let mut driver = driver(registry, host, plan, slot, created_at_unix, first);
    driver.work = work;
    driver.to_reach = to_reach;
    // Also where its VM runs.
    driver.show(&sandbox);
    let handle = driver.handle.clone();
    tokio::spawn(driver.run(sandbox));
    handle
}

fn driver(
    registry: Arc<Registry>,
    host: Arc<Host>,
    plan: Plan,
    slot: SlotLease,
    created_at_unix: i64,
    first: View,
) -> Driver {
    let (commands, inbox) = mpsc::channel(16);
    let (view, seen) = watch::channel(first);
    let (egress, reachable) = watch::channel(Arc::new(plan.egress.clone()));
    let handle = Handle {
        usage: Arc::new(Usage::new(plan.timeout_sec)),
        hold: Arc::default(),
        egress: reachable,
        by_name: Arc::default(),
        plan: Arc::new(plan),
        slot: Arc::new(slot),
        created_at_unix,
        metrics: Arc::default(),
        commands,
        view: seen,
    };
    Driver {
        registry,
        host,
        handle,
        view,
        egress,
        by_name: None,
        inbox,
        work: Work::None,
        cause: Span::none(),
        to_reach: None,
        unclaimed: None,
        unburied: None,
        untold: None,
    }
}

struct Driver {
    registry: Arc<Registry>,
    host: Arc<Host>,
    handle: Handle,
    view: watch::Sender<View>,
    egress: watch::Sender<Arc<Egress>>,
    /// Where names count, for as long as there may be a guest.
    by_name: Option<ByName>,
    inbox: mpsc::Receiver<Asked>,
    work: Work,
    /// The last call that asked, while what it asked for is being done; none where nobody did.
    cause: Span,
    /// What an earlier agent wrote of a VM that is still to be reached.
    to_reach: Option<Record>,
    /// The last capture, where nobody was there to hear of it.
    unclaimed: Option<(CaptureWish, Bytes, Instant)>,
    /// What there was no room to write down, until what the sandbox had is given back.
    unburied: Option<Tombstone>,
    untold: Option<outbox::Event>,
}

/// The one long step under way.
enum Work {
    None,
    Build {
        task: JoinHandle<Result<Vm, BuildFailure>>,
        stop: Option<oneshot::Sender<()>>,
    },
    Pause(JoinHandle<PauseEnd<Vm>>),
    Resume {
        task: JoinHandle<ResumeEnd<Vm>>,
        stop: Option<oneshot::Sender<()>>,
    },
    Capture(JoinHandle<CaptureEnd<Vm>>),
    Reach(JoinHandle<ReachEnd<Vm>>),
    TearDown(JoinHandle<Result<(), TeardownError>>),
}

impl Driver {
    async fn run(mut self, mut sandbox: Sandbox<Vm>) {
        let mut follows = None;
        self.restore_egress(&sandbox).await;
        while !matches!(sandbox, Sandbox::Gone) {
            let event = match follows.take() {
                Some(event) => event,
                None => match self.next(&mut sandbox).await {
                    Some(event) => event,
                    None => {
                        self.forget_cause();
                        continue;
                    }
                },
            };
            let (from, was_out_of_reach) = (sandbox.name(), matches!(sandbox, Sandbox::Unreachable(_)));
            let (next, actions) = sandbox.on(event);
            sandbox = next;
            self.show(&sandbox);
            if was_out_of_reach {
                self.restore_egress(&sandbox).await;
            }
            if from != sandbox.name() {
                let id = &self.handle.plan.id;
                tracing::info!(parent: &self.cause, sandbox_id = %id, from, to = sandbox.name(), "sandbox changed");
                self.host.changes.add(id, from, sandbox.name());
            }
            // Out of the registry before anyone is told, so that the id can be used again by who has been told.
            if matches!(sandbox, Sandbox::Gone) {
                if let Some(tombstone) = self.unburied.take() {
                    self.write_down(tombstone).await;
                }
                if let Some(event) = self.untold.take() {
                    // Where it is lost now that has been logged.
                    drop(self.host.tell(event).await);
                }
                self.registry.forget(&self.handle.plan.id);
            }
            for action in actions {
                if let Some(event) = self.perform(action, &mut sandbox).await {
                    follows = Some(event);
                }
            }
            if follows.is_none() {
                self.forget_cause();
            }
        }
        // Commands that arrived too late for the state machine: a destroy has what it wants, and the others find nobody.
        self.inbox.close();
        while let Some(asked) = self.inbox.recv().await {
            if let Command::Destroy(reply) = asked.command {
                answer(vec![reply], &Ok(()));
            }
        }
    }

    /// Waits for the next thing to happen; `None` where it is none of the sandbox's.
    async fn next(&mut self, sandbox: &mut Sandbox<Vm>) -> Option<Event<Vm>> {
        let (host, usage) = (self.host.clone(), self.handle.usage.clone());
        let (is_running, is_paused) = (
            matches!(sandbox, Sandbox::Running(_)),
            matches!(sandbox, Sandbox::Paused(_)),
        );
        let work = async {
            match &mut self.work {
                Work::None => std::future::pending().await,
                Work::Build { task, .. } => Event::Built(task.await.expect("a build does not panic")),
                Work::Pause(task) => Event::PauseEnded(task.await.expect("a pause does not panic")),
                Work::Resume { task, .. } => Event::ResumeEnded(task.await.expect("a resume does not panic")),
                Work::Capture(task) => Event::CaptureEnded(task.await.expect("a capture does not panic")),
                Work::Reach(task) => Event::Reached(task.await.expect("reaching does not panic")),
                Work::TearDown(task) => Event::TornDown(task.await.expect("a teardown does not panic")),
            }
        };
        let state = async {
            match &mut *sandbox {
                Sandbox::Creating(state) => {
                    state.caller.closed().await;
                    Event::CallerGone
                }
                Sandbox::Running(state) => {
                    let (id, cgroup) = (&state.vm.record.plan.id, state.vm.shim.cgroup().map(Path::to_owned));
                    let at_work = || counters::at_work(host.clone(), id.clone(), cgroup.clone());
                    tokio::select! {
                        biased;
                        end = state.vm.shim.ended() => Event::VmmEnded(pause::ending(end)),
                        () = idle(&usage, at_work) => Event::IdleDeadline,
                    }
                }
                found if found.waits_to_retry() => {
                    tokio::time::sleep(RETRY_PAUSE).await;
                    Event::RetryDue
                }
                Sandbox::Pausing(_)
                | Sandbox::Paused(_)
                | Sandbox::Resuming(_)
                | Sandbox::Capturing(_)
                | Sandbox::Unreachable(_)
                | Sandbox::Destroying(_)
                | Sandbox::Gone => std::future::pending().await,
            }
        };
        let event = tokio::select! {
            // A caller that has gone comes before a build that has just ended: nobody would hear of what it built.
            biased;
            event = state => event,
            event = work => event,
            asked = self.inbox.recv() => {
                let Asked { command, span } = asked.expect("the driver's own handle keeps the channel open");
                self.cause = span;
                if let Command::SetEgress(egress, reply) = command {
                    let outcome = self.set_egress(sandbox, egress).await;
                    self.serve_by_name(sandbox);
                    // A caller that has gone needs no answer.
                    drop(reply.send(outcome));
                    return None;
                }
                return self.admit(command, is_running, is_paused).await;
            }
        };
        match &event {
            Event::Built(_) | Event::TornDown(_) | Event::CaptureEnded(_) | Event::Reached(_) => self.work = Work::None,
            Event::PauseEnded(end) => {
                self.work = Work::None;
                // One that could not be paused is tried again when it has gone unused for as long once more.
                if matches!(end, PauseEnd::Running(..)) {
                    usage.touch();
                }
            }
            Event::ResumeEnded(end) => {
                self.work = Work::None;
                if let ResumeEnd::Running(vm) = end {
                    *usage.activity() = Activity::new(vm.record.plan.timeout_sec, Moment::now());
                }
            }
            _ => {}
        }
        Some(event)
    }

    /// What a command is to the sandbox; `None` where it has been answered here.
    async fn admit(&mut self, command: Command, is_running: bool, is_paused: bool) -> Option<Event<Vm>> {
        match command {
            Command::Destroy(reply) => Some(Event::DestroyRequested(reply)),
            Command::Pause(reason, reply) => Some(Event::PauseRequested(reason, reply)),
            // Here and not where the call comes in: a host that is being emptied asks this task too, and must find what it has begun.
            Command::Resume(wish, reply) if is_paused => {
                match self.registry.takes_work(self.handle.plan.memory.bytes().0) {
                    Err(refusal) => {
                        answer(vec![reply], &Err(refusal.into()));
                        None
                    }
                    Ok(()) => Some(Event::ResumeRequested(wish, reply)),
                }
            }
            Command::Resume(wish, reply) => Some(Event::ResumeRequested(wish, reply)),
            Command::Capture(wish, reply) => match self.unclaimed.take() {
                Some((made, bytes, at))
                    if made == wish
                        && at.elapsed() < UNCLAIMED_KEPT
                        && wish.template.dir(&self.host.layout.images()).exists() =>
                {
                    answer(vec![reply], &Ok(bytes));
                    None
                }
                other => {
                    self.unclaimed = other;
                    // One under way is joined.
                    let room = if is_running || is_paused {
                        self.registry.take_room(self.size_of_template(wish.kind).await)
                    } else {
                        Ok(())
                    };
                    match room {
                        Ok(()) => Some(Event::CaptureRequested(wish, reply)),
                        Err(refusal) => {
                            answer(vec![reply], &Err(refusal.into()));
                            None
                        }
                    }
                }
            },
            // Its VMM is still there, but what follows is the same: it is taken down, and why is written down. What is being done with
            // one that does not run fails by the disk itself.
            Command::DiskLost => is_running.then_some(Event::VmmEnded(Ending::DiskLost)),
            // Answered where the sandbox itself is at hand.
            Command::SetEgress(..) => None,
            Command::Hold(reply) => {
                if is_running {
                    self.handle.hold.hold(&self.host, &self.handle.plan.id).await;
                }
                self.handle.hold.answered();
                answer(vec![reply], &());
                None
            }
            Command::Release(reply) => {
                if is_running {
                    // Asked again where it failed.
                    drop(self.handle.hold.release(&self.host, &self.handle.plan.id).await);
                }
                self.handle.hold.answered();
                answer(vec![reply], &());
                None
            }
        }
    }

    /// Performs an action; what follows from it, where something does.
    async fn perform(&mut self, action: Action<Vm>, sandbox: &mut Sandbox<Vm>) -> Option<Event<Vm>> {
        let id = &self.handle.plan.id;
        match action {
            Action::CancelBuild => {
                if let Work::Build { stop, .. } = &mut self.work {
                    // The build may have ended by itself just now.
                    drop(stop.take());
                }
            }
            Action::Pause(vm, reason) => {
                let (host, hold, id) = (self.host.clone(), self.handle.hold.clone(), id.clone());
                self.work = Work::Pause(self.start(async move {
                    // A pause begins with the guest's own part in it, which one that is held could not do.
                    match hold.release(&host, &id).await {
                        Ok(()) => pause::pause(host, vm, reason).await,
                        Err(error) => PauseEnd::Running(vm, PauseError::Vmm(error)),
                    }
                }));
            }
            Action::Resume(kept, wish) => self.start_resume(kept, wish),
            Action::CancelResume => {
                if let Work::Resume { stop, .. } = &mut self.work {
                    drop(stop.take());
                }
            }
            Action::Capture(vm, wish) => {
                let (host, hold, id) = (self.host.clone(), self.handle.hold.clone(), id.clone());
                self.work = Work::Capture(self.start(async move {
                    match hold.release(&host, &id).await {
                        Ok(()) => capture::capture(host, vm, wish).await,
                        Err(error) => CaptureEnd::Running(vm, Err(PauseError::Vmm(error).into())),
                    }
                }));
            }
            Action::CaptureKept(kept, wish) => {
                let (host, id) = (self.host.clone(), id.clone());
                self.work = Work::Capture(self.start(capture::capture_kept(host, id, kept, wish)));
            }
            Action::Reach => {
                let (host, slot) = (self.host.clone(), self.handle.slot.slot());
                let record = self.to_reach.clone();
                self.work = Work::Reach(tokio::spawn(async move {
                    match record {
                        Some(record) => recover::reach(host, record, slot).await,
                        None => ReachEnd::Unreachable,
                    }
                }));
            }
            Action::TearDown(vm) => {
                let (host, id) = (self.host.clone(), id.clone());
                self.work = Work::TearDown(self.start(async move { build::tear_down(&host, &id, vm).await }));
            }
            Action::Kill(vm) => {
                tracing::error!(sandbox_id = %id, "a second VM of one sandbox is killed");
                if let Err(error) = vm.shim.kill().await {
                    tracing::error!(sandbox_id = %id, error = %Chain(&error), "it could not be");
                }
            }
            Action::Bury(ending) => self.bury(&ending).await,
            Action::TellAutoPaused => self.tell_auto_paused(sandbox).await,
            Action::AnswerCreate(reply, outcome) => {
                if let Err(Ok(())) = reply.send(outcome) {
                    return Some(Event::Unclaimed);
                }
            }
            Action::AnswerPauses(replies, outcome) => answer(replies, &outcome),
            Action::AnswerResumes(replies, outcome) => {
                if outcome.is_ok() {
                    self.handle.touch();
                }
                answer(replies, &outcome);
            }
            Action::AnswerCaptures(wish, replies, outcome) => {
                let (mut heard, made) = (false, outcome.as_ref().ok().copied());
                for reply in replies {
                    heard |= reply.send(outcome.clone()).is_ok();
                }
                self.unclaimed = made.filter(|_| !heard).map(|bytes| (wish, bytes, Instant::now()));
            }
            Action::AnswerDestroys(replies, outcome) => {
                let outcome = outcome.map_err(|error| {
                    tracing::error!(sandbox_id = %id, error = %Chain(&error), "sandbox not removed; destroy it again");
                    Arc::new(error)
                });
                answer(replies, &outcome);
            }
        }
        None
    }

    async fn bury(&mut self, ending: &Ending) {
        let id = &self.handle.plan.id;
        let end = match ending {
            Ending::Reported(exit) => End::Vmm(exit),
            Ending::ShimLost => End::ShimLost,
            Ending::Unseen => End::VmmLost,
            Ending::DiskLost => End::DiskLost,
            Ending::NotPaused(error) => {
                tracing::error!(sandbox_id = %id, error = %Chain(error.as_ref()), "idle and not to be paused");
                End::NotPaused
            }
            Ending::Stopped(_) => End::Stopped,
        };
        let tombstone = Tombstone::new(id, self.handle.created_at_unix, end);
        tracing::warn!(sandbox_id = %id, reason = %tombstone.summary(), "sandbox ended");
        let event = tombstone.event();
        self.unburied = self.write_down(tombstone).await;
        self.untold = match event {
            Some(event) => self.host.tell(event).await.err(),
            None => None,
        };
    }

    /// Bytes that a template of this sandbox takes at most, as far as its files tell.
    async fn size_of_template(&self, kind: CaptureKind) -> u64 {
        let (host, plan) = (self.host.clone(), self.handle.plan.clone());
        let disk = tokio::task::spawn_blocking(move || {
            let image = plan.template.dir(&host.layout.images()).join(ROOTFS);
            let files = [image, host.layout.cow(&plan.id)].map(|file| std::fs::metadata(file).ok());
            files
                .iter()
                .flatten()
                .map(|metadata| snapshot::allocated(metadata).0)
                .sum::<u64>()
        });
        let disk = disk.await.expect("file work does not panic");
        match kind {
            CaptureKind::Snapshot => disk + self.handle.plan.memory.bytes().0,
            CaptureKind::Rootfs => disk,
        }
    }

    /// Writes a tombstone; returns one that could not be written.
    async fn write_down(&self, tombstone: Tombstone) -> Option<Tombstone> {
        let host = self.host.clone();
        let written = tokio::task::spawn_blocking(move || match tombstone::bury(&host.layout, &tombstone) {
            Ok(()) => None,
            Err(error) => {
                tracing::error!(sandbox_id = %tombstone.sandbox_id, error = %Chain(&error), "no tombstone");
                Some(tombstone)
            }
        });
        written.await.expect("file work does not panic")
    }

    /// Lets go of a call's span once nothing is being done for it.
    fn forget_cause(&mut self) {
        if matches!(self.work, Work::None) {
            self.cause = Span::none();
        }
    }

    /// Starts a task that works for the call that asked for it.
    fn start<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        tokio::spawn(work.instrument(self.cause.clone()))
    }

    fn start_build(&mut self) {
        let (stop, stopped) = stopper();
        let handle = &self.handle;
        let (host, plan) = (self.host.clone(), (*handle.plan).clone());
        let task = build::build(host, plan, handle.slot.clone(), handle.created_at_unix, stopped);
        self.work = Work::Build {
            task: self.start(task),
            stop: Some(stop),
        };
    }

    fn start_resume(&mut self, kept: Kept, wish: ResumeWish) {
        let (stop, stopped) = stopper();
        let handle = &self.handle;
        let (host, id) = (self.host.clone(), handle.plan.id.clone());
        let task = resume::resume(host, id, handle.slot.clone(), kept, wish, stopped);
        self.work = Work::Resume {
            task: self.start(task),
            stop: Some(stop),
        };
    }

    fn show(&mut self, sandbox: &Sandbox<Vm>) {
        self.serve_by_name(sandbox);
        self.handle
            .hold
            .is_busy_from_now(matches!(sandbox, Sandbox::Capturing(_)));
        match sandbox {
            Sandbox::Running(state) => self.handle.hold.runs_in(state.vm.shim.cgroup()),
            // Its VM is still there, and is released as the first step.
            Sandbox::Pausing(_) | Sandbox::Capturing(_) => {}
            Sandbox::Creating(_)
            | Sandbox::Paused(_)
            | Sandbox::Resuming(_)
            | Sandbox::Unreachable(_)
            | Sandbox::Destroying(_)
            | Sandbox::Gone => self.handle.hold.forget(),
        }
        if let Some(view) = view_of(sandbox) {
            self.view.send_replace(view);
        }
    }

    async fn tell_auto_paused(&self, sandbox: &mut Sandbox<Vm>) {
        let Sandbox::Paused(state) = sandbox else { return };
        let (host, id) = (self.host.clone(), self.handle.plan.id.clone());
        let record = tokio::task::spawn_blocking(move || Record::read(&host.layout, &id));
        match record.await.expect("file work does not panic") {
            Ok(record) => pause::tell(&self.host, &record, &mut state.kept).await,
            Err(error) => {
                tracing::error!(sandbox_id = %self.handle.plan.id, error = %Chain(&error), "nobody was told of a pause; the next start will");
            }
        }
    }
}

/// A future that ends when its sender is dropped, which is the signal to stop.
fn stopper() -> (oneshot::Sender<()>, impl Future<Output = ()>) {
    let (stop, stopped) = oneshot::channel::<()>();
    (stop, async move { drop(stopped.await) })
}

/// Callers that have gone need no answer.
fn answer<T: Clone>(replies: Vec<oneshot::Sender<T>>, outcome: &T) {
    for reply in replies {
        drop(reply.send(outcome.clone()));
    }
}

/// What others see of a state. `None`: what they saw before, for while a template is made of a sandbox it goes on as what it was.
fn view_of(sandbox: &Sandbox<Vm>) -> Option<View> {
    Some(match sandbox {
        Sandbox::Creating(_) => View::Creating,
        Sandbox::Running(state) => {
            let versions = Arc::new(state.vm.record.versions.clone());
            View::Running(state.vm.guest.clone(), versions)
        }
        Sandbox::Pausing(_) => View::Pausing,
        Sandbox::Paused(state) => View::Paused(state.kept),
        Sandbox::Resuming(_) => View::Resuming,
        Sandbox::Capturing(_) => return None,
        Sandbox::Unreachable(_) => View::Unreachable,
        Sandbox::Destroying(_) => View::Destroying,
        Sandbox::Gone => View::Gone,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_sandbox_is_idle_once_nobody_uses_it_any_more() {
        let usage = Arc::new(Usage::new(60));
        let began = Instant::now();
        let watcher = tokio::spawn({
            let usage = usage.clone();
            async move { idle(&usage, || std::future::ready(false)).await }
        });
        usage.calls.fetch_add(1, Ordering::AcqRel);
        let call = InUse(usage.clone());
        tokio::time::sleep(Duration::from_secs(200)).await;
        assert!(!watcher.is_finished(), "idle with a call under way");
        drop(call);
        watcher.await.expect("no panic");
        let after = began.elapsed().as_secs();
        assert!(
            (260..=261).contains(&after),
            "idle {after} s after the start, 60 s after the last use"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_sandbox_without_a_limit_is_never_idle() {
        let usage = Usage::new(0);
        let outcome =
            tokio::time::timeout(Duration::from_secs(1 << 30), idle(&usage, || std::future::ready(false))).await;
        assert!(outcome.is_err());
    }
}
