//! The task that owns one sandbox: it takes one message at a time, asks the state machine, and performs what it says.
//!
//! Everyone else holds a [`Handle`]: a way to send messages, and a view to read. The task ends when nothing of the sandbox is
//! left, and takes it out of the registry as the last thing it does.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::build::{self, Versions, Vm};
use super::plan::Plan;
use super::{Action, BuildFailure, CreateFailure, Ending, Event, Sandbox, TeardownError, unix_now};
use crate::errors::Chain;
use crate::guest::Guest;
use crate::host::Host;
use crate::host::shim::VmmEnd;
use crate::host::slots::SlotLease;
use crate::registry::Registry;
use crate::tombstone::{self, End, Tombstone};

/// Pause between two attempts to remove what could not be removed.
const RETRY_PAUSE: Duration = Duration::from_secs(30);

/// What others see of a sandbox.
#[derive(Debug, Clone)]
pub enum View {
    /// Being built.
    Creating,
    /// Takes commands.
    Running(Arc<Guest>, Arc<Versions>),
    /// On its way out.
    Destroying,
    /// Nothing is left.
    Gone,
}

/// A sandbox as everyone but its task has it.
#[derive(Debug, Clone)]
pub struct Handle {
    /// What was asked for.
    pub plan: Arc<Plan>,
    /// Its place in the network plan.
    pub slot: Arc<SlotLease>,
    /// When it was made, in seconds since 1970.
    pub created_at_unix: i64,
    last_active: Arc<AtomicI64>,
    commands: mpsc::Sender<oneshot::Sender<Result<(), Arc<TeardownError>>>>,
    view: watch::Receiver<View>,
}

impl Handle {
    /// What the sandbox is doing.
    pub fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// When it was last used, in seconds since 1970.
    pub fn last_active_at_unix(&self) -> i64 {
        self.last_active.load(Ordering::Relaxed)
    }

    /// Waits until the sandbox runs no more.
    pub async fn stopped_running(&self) {
        let mut view = self.view.clone();
        // A task that has ended has nothing that runs.
        drop(view.wait_for(|view| !matches!(view, View::Running(..))).await);
    }

    /// Counts as use.
    pub fn touch(&self) {
        self.last_active.store(unix_now(), Ordering::Relaxed);
    }

    /// Destroys the sandbox and waits until nothing of it is left.
    ///
    /// # Errors
    /// What is still there, and why; a repetition goes on.
    pub async fn destroy(&self) -> Result<(), Arc<TeardownError>> {
        let (reply, answer) = oneshot::channel();
        // A task that has ended has nothing left: both failures are success.
        if self.commands.send(reply).await.is_err() {
            return Ok(());
        }
        answer.await.unwrap_or(Ok(()))
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
    let mut driver = driver(registry, host, plan, slot, View::Creating);
    let handle = driver.handle.clone();
    driver.start_build();
    tokio::spawn(driver.run(Sandbox::new(caller)));
    (handle, answer)
}

/// Starts the task of what an earlier agent left and could not be removed.
pub fn spawn_remains(registry: Arc<Registry>, host: Arc<Host>, plan: Plan, slot: SlotLease) -> Handle {
    let driver = driver(registry, host, plan, slot, View::Destroying);
    let handle = driver.handle.clone();
    tokio::spawn(driver.run(Sandbox::remains()));
    handle
}

fn driver(registry: Arc<Registry>, host: Arc<Host>, plan: Plan, slot: SlotLease, first: View) -> Driver {
    let (commands, inbox) = mpsc::channel(16);
    let (view, seen) = watch::channel(first);
    let now = unix_now();
    let handle = Handle {
        plan: Arc::new(plan),
        slot: Arc::new(slot),
        created_at_unix: now,
        last_active: Arc::new(AtomicI64::new(now)),
        commands,
        view: seen,
    };
    Driver {
        registry,
        host,
        handle,
        view,
        inbox,
        work: Work::None,
    }
}

struct Driver {
    registry: Arc<Registry>,
    host: Arc<Host>,
    handle: Handle,
    view: watch::Sender<View>,
    inbox: mpsc::Receiver<super::DestroyReply>,
    work: Work,
}

/// The one long step under way.
enum Work {
    None,
    Build {
        task: JoinHandle<Result<Vm, BuildFailure>>,
        stop: Option<oneshot::Sender<()>>,
    },
    TearDown(JoinHandle<Result<(), TeardownError>>),
}

impl Driver {
    async fn run(mut self, mut sandbox: Sandbox<Vm>) {
        let mut follows = None;
        while !matches!(sandbox, Sandbox::Gone) {
            let event = match follows.take() {
                Some(event) => event,
                None => self.next(&mut sandbox).await,
            };
            let from = name(&sandbox);
            let (next, actions) = sandbox.on(event);
            sandbox = next;
            self.show(&sandbox);
            if from != name(&sandbox) {
                tracing::info!(sandbox_id = %self.handle.plan.id, from, to = name(&sandbox), "sandbox changed");
            }
            // Out of the registry before anyone is told, so that the id can be used again by who has been told.
            if matches!(sandbox, Sandbox::Gone) {
                self.registry.forget(&self.handle.plan.id);
            }
            for action in actions {
                if let Some(event) = self.perform(action).await {
                    follows = Some(event);
                }
            }
        }
        // Destroys that arrived too late for the state machine.
        self.inbox.close();
        while let Some(reply) = self.inbox.recv().await {
            answer(reply, Ok(()));
        }
    }

    /// Waits for the next thing to happen.
    async fn next(&mut self, sandbox: &mut Sandbox<Vm>) -> Event<Vm> {
        let work = async {
            match &mut self.work {
                Work::None => std::future::pending().await,
                Work::Build { task, .. } => Event::Built(task.await.expect("a build does not panic")),
                Work::TearDown(task) => Event::TornDown(task.await.expect("a teardown does not panic")),
            }
        };
        let state = async {
            match sandbox {
                Sandbox::Creating(state) => {
                    state.caller.closed().await;
                    Event::CallerGone
                }
                Sandbox::Running(state) => Event::VmmEnded(match state.vm.shim.ended().await {
                    VmmEnd::Reported(exit) => Ending::Reported(exit),
                    VmmEnd::ShimLost => Ending::ShimLost,
                }),
                remains if remains.is_stuck() => {
                    tokio::time::sleep(RETRY_PAUSE).await;
                    Event::RetryDue
                }
                Sandbox::Destroying(_) | Sandbox::Gone => std::future::pending().await,
            }
        };
        let event = tokio::select! {
            // A caller that has gone comes before a build that has just ended: nobody would hear of what it built.
            biased;
            event = state => event,
            event = work => event,
            reply = self.inbox.recv() => Event::DestroyRequested(reply.expect("the driver's own handle keeps the channel open")),
        };
        if matches!(event, Event::Built(_) | Event::TornDown(_)) {
            self.work = Work::None;
        }
        event
    }

    /// Performs an action; what follows from it, where something does.
    async fn perform(&mut self, action: Action<Vm>) -> Option<Event<Vm>> {
        let id = &self.handle.plan.id;
        match action {
            Action::CancelBuild => {
                if let Work::Build { stop, .. } = &mut self.work {
                    // The build may have ended by itself just now.
                    drop(stop.take());
                }
            }
            Action::TearDown(vm) => {
                let (host, id) = (self.host.clone(), id.clone());
                self.work = Work::TearDown(tokio::spawn(async move { build::tear_down(&host, &id, vm).await }));
            }
            Action::Bury(ending) => self.bury(ending).await,
            Action::AnswerCreate(reply, outcome) => {
                if let Err(Ok(())) = reply.send(outcome) {
                    return Some(Event::Unclaimed);
                }
            }
            Action::AnswerDestroys(replies, outcome) => {
                let outcome = outcome.map_err(|error| {
                    tracing::error!(sandbox_id = %id, error = %Chain(&error), "sandbox not removed; destroy it again");
                    Arc::new(error)
                });
                for reply in replies {
                    answer(reply, outcome.clone());
                }
            }
        }
        None
    }

    async fn bury(&self, ending: Ending) {
        let (host, handle) = (self.host.clone(), self.handle.clone());
        let written = tokio::task::spawn_blocking(move || {
            let end = match &ending {
                Ending::Reported(exit) => End::Vmm(exit),
                Ending::ShimLost => End::ShimLost,
            };
            let tombstone = Tombstone::new(&handle.plan.id, handle.created_at_unix, end);
            tracing::warn!(sandbox_id = %handle.plan.id, reason = %tombstone.summary(), "sandbox ended");
            tombstone::bury(&host.layout, &tombstone)
        });
        if let Err(error) = written.await.expect("file work does not panic") {
            tracing::error!(sandbox_id = %self.handle.plan.id, error = %Chain(&error), "no tombstone");
        }
    }

    fn start_build(&mut self) {
        let (stop, stopped) = oneshot::channel::<()>();
        let handle = &self.handle;
        let (host, plan) = (self.host.clone(), (*handle.plan).clone());
        let task = build::build(host, plan, handle.slot.clone(), handle.created_at_unix, async move {
            // Dropping the sender is the signal.
            drop(stopped.await);
        });
        self.work = Work::Build {
            task: tokio::spawn(task),
            stop: Some(stop),
        };
    }

    fn show(&self, sandbox: &Sandbox<Vm>) {
        let view = match sandbox {
            Sandbox::Creating(_) => View::Creating,
            Sandbox::Running(state) => View::Running(state.vm.guest.clone(), Arc::new(state.vm.versions.clone())),
            Sandbox::Destroying(_) => View::Destroying,
            Sandbox::Gone => View::Gone,
        };
        self.view.send_replace(view);
    }
}

/// A caller that has gone needs no answer.
fn answer(reply: super::DestroyReply, outcome: Result<(), Arc<TeardownError>>) {
    drop(reply.send(outcome));
}

fn name(sandbox: &Sandbox<Vm>) -> &'static str {
    match sandbox {
        Sandbox::Creating(_) => "creating",
        Sandbox::Running(_) => "running",
        Sandbox::Destroying(_) => "destroying",
        Sandbox::Gone => "gone",
    }
}
