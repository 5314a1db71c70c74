//! A sandbox's whole life: one enum, each state owning what exists in it.
//!
//! ```text
//!             Built(Ok)              DestroyRequested, VmmEnded
//! Creating ---------------> Running --Unclaimed-----------------+
//!    |  |                                                       v
//!    |  +-- DestroyRequested, CallerGone (cancels the build) --> Destroying --TornDown(Ok)--> Gone
//!    |                                                         ^  ^    | TornDown(Err): stays; a repeated
//!    +-- Built(Err), undone --> Gone                           |  +----+ destroy tries again, and so does RetryDue
//!    +-- Built(Err), something left ---------------------------+
//! ```
//!
//! Transitions here are plain functions from a state and an event to a state and actions; [`task`] performs the actions. Time and
//! effects stay outside. The type parameter is what a running sandbox owns on its host, so that tests can use something that
//! counts its owners.

pub mod build;
pub mod plan;
pub mod record;
pub mod task;

use std::sync::Arc;

use roost_common::shim::Exit;
use tokio::sync::oneshot;

pub use build::{BuildError, Vm};

use crate::errors::FileError;

/// The answer to a create.
pub type CreateReply = oneshot::Sender<Result<(), CreateFailure>>;
/// The answer to a destroy.
pub type DestroyReply = oneshot::Sender<Result<(), Arc<TeardownError>>>;

/// Why a create has no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum CreateFailure {
    /// A step failed; everything has been undone.
    #[error("the sandbox could not be created")]
    Failed(#[source] BuildError),
    /// A destroy came first; everything has been undone.
    #[error("the sandbox was destroyed while it was being created")]
    Destroyed,
}

/// A build that failed.
#[derive(Debug)]
pub struct BuildFailure {
    /// Why.
    pub error: BuildError,
    /// What could not be undone.
    pub left: Option<TeardownError>,
}

/// Why a sandbox's remains are still there.
#[derive(Debug, thiserror::Error)]
pub enum TeardownError {
    /// The VMM did not end.
    #[error("the VMM could not be ended")]
    Vmm(#[source] crate::host::shim::ShimFault),
    /// Files could not be removed.
    #[error("the sandbox's files could not be removed")]
    Files(#[source] FileError),
}

/// Everything that can happen to a sandbox.
#[derive(Debug)]
pub enum Event<V> {
    /// The build has ended; when it failed it has undone itself, as far as that went.
    Built(Result<V, BuildFailure>),
    /// The caller of the create has gone away.
    CallerGone,
    /// Somebody wants it gone.
    DestroyRequested(DestroyReply),
    /// The VMM has ended by itself.
    VmmEnded(Ending),
    /// The teardown has ended.
    TornDown(Result<(), TeardownError>),
    /// The create was answered, and nobody was there to hear it: nobody will ever destroy what it made.
    Unclaimed,
    /// A teardown failed a while ago.
    RetryDue,
}

/// How a VMM ended that nobody ended.
#[derive(Debug)]
pub enum Ending {
    /// The shim reports it.
    Reported(Box<Exit>),
    /// The shim has gone.
    ShimLost,
}

/// What the driver is to do.
#[derive(Debug)]
pub enum Action<V> {
    /// Ask the build to stop; its end comes as [`Event::Built`].
    CancelBuild,
    /// Take down a VM, or only the files where there is none; its end comes as [`Event::TornDown`].
    TearDown(Option<V>),
    /// Write down why the sandbox ended.
    Bury(Ending),
    /// Answer a create.
    AnswerCreate(CreateReply, Result<(), CreateFailure>),
    /// Answer destroys.
    AnswerDestroys(Vec<DestroyReply>, Result<(), TeardownError>),
}

/// A sandbox.
#[derive(Debug)]
pub enum Sandbox<V> {
    /// Being built.
    Creating(Creating),
    /// Takes commands.
    Running(Running<V>),
    /// On its way out.
    Destroying(Destroying),
    /// Nothing is left.
    Gone,
}

/// The build runs in the driver and owns what it has acquired; here is who waits for it.
#[derive(Debug)]
pub struct Creating {
    /// The caller of the create.
    pub caller: CreateReply,
}

/// A running VM.
#[derive(Debug)]
pub struct Running<V> {
    /// Everything it has on the host.
    pub vm: V,
}

/// Something is being taken down: the build (which undoes itself) or the VM, then the files.
#[derive(Debug)]
pub struct Destroying {
    /// The caller of a create that was cut short.
    caller: Option<CreateReply>,
    /// Callers of destroys.
    waiting: Vec<DestroyReply>,
    /// What is under way.
    step: Step,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The build was told to stop.
    Build,
    /// The teardown runs.
    Teardown,
    /// The last teardown failed; the next destroy tries again, or the driver in a while.
    Stuck,
}

type Next<V> = (Sandbox<V>, Vec<Action<V>>);

impl<V> Sandbox<V> {
    /// A sandbox whose build is about to start.
    pub fn new(caller: CreateReply) -> Self {
        Self::Creating(Creating { caller })
    }

    /// What an earlier agent left and could not be removed.
    pub fn remains() -> Self {
        Self::Destroying(Destroying {
            caller: None,
            waiting: vec![],
            step: Step::Stuck,
        })
    }

    /// Whether its last teardown failed, and is to be tried again.
    pub fn is_stuck(&self) -> bool {
        matches!(self, Self::Destroying(Destroying { step: Step::Stuck, .. }))
    }

    /// What follows from an event.
    pub fn on(self, event: Event<V>) -> Next<V> {
        match self {
            Self::Creating(state) => state.on(event),
            Self::Running(state) => state.on(event),
            Self::Destroying(state) => state.on(event),
            Self::Gone => match event {
                Event::DestroyRequested(reply) => (Self::Gone, vec![Action::AnswerDestroys(vec![reply], Ok(()))]),
                // Echoes of how we got here.
                Event::Built(Err(_))
                | Event::CallerGone
                | Event::VmmEnded(_)
                | Event::TornDown(_)
                | Event::Unclaimed
                | Event::RetryDue => (Self::Gone, vec![]),
                // Nothing builds for a sandbox that is gone; should it happen, nothing of it may stay.
                Event::Built(Ok(vm)) => (Self::Gone, vec![Action::TearDown(Some(vm))]),
            },
        }
    }
}

impl Creating {
    fn on<V>(self, event: Event<V>) -> Next<V> {
        match event {
            Event::Built(Ok(vm)) => (
                Sandbox::Running(Running { vm }),
                vec![Action::AnswerCreate(self.caller, Ok(()))],
            ),
            Event::Built(Err(BuildFailure { error, left })) => {
                let mut actions = vec![Action::AnswerCreate(self.caller, Err(CreateFailure::Failed(error)))];
                let Some(left) = left else {
                    return (Sandbox::Gone, actions);
                };
                // Nobody waits for this answer, but the driver logs it.
                actions.push(Action::AnswerDestroys(vec![], Err(left)));
                let state = Destroying {
                    caller: None,
                    waiting: vec![],
                    step: Step::Stuck,
                };
                (Sandbox::Destroying(state), actions)
            }
            Event::DestroyRequested(reply) => self.cut_short(vec![reply]),
            Event::CallerGone => self.cut_short(vec![]),
            // A VM's end is an error of the build while there is one, and nothing has been taken down yet.
            Event::VmmEnded(_) | Event::TornDown(_) | Event::Unclaimed | Event::RetryDue => {
                (Sandbox::Creating(self), vec![])
            }
        }
    }

    fn cut_short<V>(self, waiting: Vec<DestroyReply>) -> Next<V> {
        let state = Destroying {
            caller: Some(self.caller),
            waiting,
            step: Step::Build,
        };
        (Sandbox::Destroying(state), vec![Action::CancelBuild])
    }
}

impl<V> Running<V> {
    fn on(self, event: Event<V>) -> Next<V> {
        match event {
            Event::DestroyRequested(reply) => {
                let state = Destroying {
                    caller: None,
                    waiting: vec![reply],
                    step: Step::Teardown,
                };
                (Sandbox::Destroying(state), vec![Action::TearDown(Some(self.vm))])
            }
            Event::VmmEnded(ending) => {
                let state = Destroying {
                    caller: None,
                    waiting: vec![],
                    step: Step::Teardown,
                };
                (
                    Sandbox::Destroying(state),
                    vec![Action::Bury(ending), Action::TearDown(Some(self.vm))],
                )
            }
            Event::Unclaimed => {
                let state = Destroying {
                    caller: None,
                    waiting: vec![],
                    step: Step::Teardown,
                };
                (Sandbox::Destroying(state), vec![Action::TearDown(Some(self.vm))])
            }
            // The create has been answered, so its caller may go; the others are echoes of how we got here.
            Event::CallerGone | Event::Built(Err(_)) | Event::TornDown(_) | Event::RetryDue => {
                (Sandbox::Running(self), vec![])
            }
            // One build per sandbox; should a second one come, it is the surplus one.
            Event::Built(Ok(vm)) => (Sandbox::Running(self), vec![Action::TearDown(Some(vm))]),
        }
    }
}

impl Destroying {
    fn on<V>(mut self, event: Event<V>) -> Next<V> {
        match event {
            Event::DestroyRequested(reply) => {
                self.waiting.push(reply);
                match self.step {
                    Step::Build | Step::Teardown => (Sandbox::Destroying(self), vec![]),
                    Step::Stuck => {
                        self.step = Step::Teardown;
                        (Sandbox::Destroying(self), vec![Action::TearDown(None)])
                    }
                }
            }
            // The build was finished before it could be told to stop.
            Event::Built(Ok(vm)) => {
                self.step = Step::Teardown;
                (Sandbox::Destroying(self), vec![Action::TearDown(Some(vm))])
            }
            Event::Built(Err(failure)) => self.torn_down(failure.left.map_or(Ok(()), Err)),
            Event::TornDown(outcome) => self.torn_down(outcome),
            Event::RetryDue => match self.step {
                // A destroy came first.
                Step::Build | Step::Teardown => (Sandbox::Destroying(self), vec![]),
                Step::Stuck => {
                    self.step = Step::Teardown;
                    (Sandbox::Destroying(self), vec![Action::TearDown(None)])
                }
            },
            // The caller is answered in any case, and an end is what we are after.
            Event::CallerGone | Event::VmmEnded(_) | Event::Unclaimed => (Sandbox::Destroying(self), vec![]),
        }
    }

    fn torn_down<V>(mut self, outcome: Result<(), TeardownError>) -> Next<V> {
        let mut actions = Vec::new();
        if let Some(caller) = self.caller.take() {
            actions.push(Action::AnswerCreate(caller, Err(CreateFailure::Destroyed)));
        }
        let waiting = std::mem::take(&mut self.waiting);
        match outcome {
            Ok(()) => {
                actions.push(Action::AnswerDestroys(waiting, Ok(())));
                (Sandbox::Gone, actions)
            }
            Err(error) => {
                actions.push(Action::AnswerDestroys(waiting, Err(error)));
                self.step = Step::Stuck;
                (Sandbox::Destroying(self), actions)
            }
        }
    }
}

/// The time in seconds since 1970.
pub fn unix_now() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |age| i64::try_from(age.as_secs()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests;
