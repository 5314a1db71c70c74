//! A sandbox's whole life: one enum, each state owning what exists in it.
//!
//! ```text
//!             Built(Ok)              DestroyRequested, VmmEnded, Unclaimed
//! Creating ---------------> Running ------------------------------+
//!    |  |                   |  ^  ^ PauseEnded(Running)           |
//!    |  |    PauseRequested |  |  |                               |
//!    |  |    IdleDeadline   v  |  |   PauseEnded(Ended)           |
//!    |  |                  Pausing ----------------------------+  |
//!    |  |    PauseEnded(Paused) |   or any, a destroy waiting  |  |
//!    |  |                       v                              v  v
//!    |  |                    Paused -- DestroyRequested --> Destroying --TornDown(Ok)--> Gone
//!    |  |   ResumeRequested |   ^ ResumeEnded(Paused)          ^  ^    | TornDown(Err): stays; a repeated
//!    |  |                   v   |                              |  +----+ destroy tries again, and so does RetryDue
//!    |  |                  Resuming --ResumeEnded(Running)--> Running
//!    |  |                       +-- any end, a destroy waiting (which cancels it) --> Destroying
//!    |  +-- DestroyRequested, CallerGone (cancels the build) ----> Destroying
//!    +-- Built(Err), undone --> Gone
//!    +-- Built(Err), something left -----------------------------> Destroying
//!
//! Running <--CaptureRequested / CaptureEnded--> Capturing <--CaptureRequested / CaptureEnded--> Paused
//!
//! Unreachable --Reached(Running)--> Running    Unreachable --Reached(Paused)--> Paused
//!    |   ^ RetryDue tries again                    the VM has ended, or DestroyRequested --> Destroying
//!    +---+
//! ```
//!
//! A pause is never cancelled, nor is a capture: they end by themselves, bounded, and a destroy waits for them. A resume is, by a
//! destroy. All go on when whoever asked for them has gone, and whoever asks again meanwhile is answered with their end. A pause or
//! resume that meets a capture is begun when that has ended.
//!
//! Only an agent that starts finds a sandbox unreachable: its VM may run, so it is listed and its slot is kept, and nobody can say more
//! until its shim answers.
//!
//! Transitions here are plain functions from a state and an event to a state and actions; [`task`] performs the actions. Time and
//! effects stay outside. The type parameter is what a running sandbox owns on its host, so that tests can use something that
//! counts its owners.

pub mod build;
pub mod capture;
mod event;
pub mod hold;
mod parts;
pub mod pause;
pub mod plan;
pub mod record;
pub mod resume;
pub mod task;
mod wake;

use std::sync::Arc;

use roost_common::units::Bytes;

pub use crate::templates::CaptureWish;
pub use build::BuildError;
pub use capture::CaptureError;
pub use event::{
    Action, BuildFailure, CaptureEnd, CaptureFailure, CaptureReply, CreateFailure, CreateReply, DestroyReply,
    EgressFailure, Ending, Event, PauseEnd, PauseFailure, PauseReply, ReachEnd, ResumeEnd, ResumeFailure, ResumeReply,
    TeardownError,
};
pub use parts::{Began, MemoryLoad, PartError, Versions, Vm};
pub use pause::PauseError;
pub use record::{Kept, PauseReason};
pub use resume::{ResumeError, ResumeWish};

/// A sandbox.
#[derive(Debug)]
pub enum Sandbox<V> {
    /// Being built.
    Creating(Creating),
    /// Takes commands.
    Running(Running<V>),
    /// On its way to disk. Its VM is with the driver.
    Pausing(Pausing),
    /// On disk, and nowhere else.
    Paused(Paused),
    /// On its way back.
    Resuming(Resuming),
    /// Being made a template of.
    Capturing(Capturing),
    /// Left by an earlier agent, and out of reach so far.
    Unreachable(Unreachable),
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

/// The pause runs in the driver and owns the VM; here is who waits for it.
#[derive(Debug)]
pub struct Pausing {
    reason: PauseReason,
    pauses: Vec<PauseReply>,
    /// These wait for the pause, and then delete what it left.
    destroys: Vec<DestroyReply>,
}

/// A sandbox on disk.
#[derive(Debug)]
pub struct Paused {
    /// What of it can be resumed.
    pub kept: Kept,
}

/// The resume runs in the driver and owns what it has acquired; here is who waits for it.
#[derive(Debug)]
pub struct Resuming {
    resumes: Vec<ResumeReply>,
    /// Not empty: the resume has been told to stop.
    destroys: Vec<DestroyReply>,
}

/// The capture runs in the driver and owns the VM, where there is one; here is who waits for it.
#[derive(Debug)]
pub struct Capturing {
    /// What it was.
    from: Captured,
    wish: CaptureWish,
    captures: Vec<CaptureReply>,
    /// These wait for the capture, and then pause it.
    pauses: Vec<PauseReply>,
    reason: PauseReason,
    /// These wait for the capture, and then resume it as the first of them wished.
    resumes: Vec<(ResumeWish, ResumeReply)>,
    /// These wait for the capture, and then delete it.
    destroys: Vec<DestroyReply>,
}

/// What is captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Captured {
    Running,
    Paused,
}

/// What an earlier agent left where its VM may run and could not be reached so far. The attempt runs in the driver.
#[derive(Debug)]
pub struct Unreachable {
    /// An attempt is under way.
    is_tried: bool,
    /// These wait for it, and then delete what there is.
    destroys: Vec<DestroyReply>,
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

    /// A running sandbox of an earlier agent.
    pub fn adopted(vm: V) -> Self {
        Self::Running(Running { vm })
    }

    /// A sandbox of an earlier agent whose VM may run; whether the driver has an attempt to reach it under way.
    pub fn unreachable(is_tried: bool) -> Self {
        Self::Unreachable(Unreachable {
            is_tried,
            destroys: vec![],
        })
    }

    /// A paused sandbox of an earlier agent.
    pub fn kept(kept: Kept) -> Self {
        Self::Paused(Paused { kept })
    }

    /// Whether something about it failed that is tried again after a while.
    pub fn waits_to_retry(&self) -> bool {
        matches!(
            self,
            Self::Destroying(Destroying { step: Step::Stuck, .. })
                | Self::Unreachable(Unreachable { is_tried: false, .. })
        )
    }

    /// The state in the words of the protocol.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Creating(_) => "starting",
            Self::Running(_) => "running",
            Self::Pausing(_) => "pausing",
            Self::Paused(_) => "paused",
            Self::Resuming(_) => "resuming",
            Self::Capturing(_) => "being made a template",
            Self::Unreachable(_) => "unreachable",
            Self::Destroying(_) => "stopping",
            Self::Gone => "stopped",
        }
    }

    /// What follows from an event.
    pub fn on(self, event: Event<V>) -> Next<V> {
        let name = self.name();
        match self {
            Self::Creating(state) => state.on(event, name),
            Self::Running(state) => state.on(event),
            Self::Pausing(state) => state.on(event, name),
            Self::Paused(state) => state.on(event),
            Self::Resuming(state) => state.on(event, name),
            Self::Capturing(state) => state.on(event, name),
            Self::Unreachable(state) => state.on(event, name),
            Self::Destroying(state) => state.on(event, name),
            Self::Gone => match event {
                Event::DestroyRequested(reply) => (Self::Gone, vec![Action::AnswerDestroys(vec![reply], Ok(()))]),
                Event::PauseRequested(_, reply) => (Self::Gone, vec![refuse_pause(reply, name)]),
                Event::ResumeRequested(_, reply) => (Self::Gone, vec![refuse_resume(reply, name)]),
                Event::CaptureRequested(wish, reply) => (Self::Gone, vec![refuse_capture(wish, reply, name)]),
                // Echoes of how we got here.
                Event::Built(Err(_))
                | Event::PauseEnded(PauseEnd::Paused(_))
                | Event::ResumeEnded(ResumeEnd::Paused(..))
                | Event::CaptureEnded(CaptureEnd::Paused(..))
                | Event::CallerGone
                | Event::IdleDeadline
                | Event::VmmEnded(_)
                | Event::TornDown(_)
                | Event::Unclaimed
                | Event::RetryDue
                | Event::Reached(ReachEnd::Paused(_) | ReachEnd::Gone(_) | ReachEnd::Unreachable) => {
                    (Self::Gone, vec![])
                }
                // Nothing is under way for a sandbox that is gone; should it be, nothing of it may stay.
                Event::Built(Ok(vm))
                | Event::Reached(ReachEnd::Running(vm) | ReachEnd::Ended(vm, _))
                | Event::PauseEnded(PauseEnd::Running(vm, _) | PauseEnd::Ended(vm, _))
                | Event::CaptureEnded(CaptureEnd::Running(vm, _) | CaptureEnd::Ended(vm, _))
                | Event::ResumeEnded(ResumeEnd::Running(vm)) => (Self::Gone, vec![Action::TearDown(Some(vm))]),
            },
        }
    }
}

fn refuse_pause<V>(reply: PauseReply, state: &'static str) -> Action<V> {
    Action::AnswerPauses(vec![reply], Err(PauseFailure::Refused(state)))
}

fn refuse_resume<V>(reply: ResumeReply, state: &'static str) -> Action<V> {
    Action::AnswerResumes(vec![reply], Err(ResumeFailure::Refused(state)))
}

fn refuse_capture<V>(wish: CaptureWish, reply: CaptureReply, state: &'static str) -> Action<V> {
    Action::AnswerCaptures(wish, vec![reply], Err(CaptureFailure::Refused(state)))
}

impl Creating {
    fn on<V>(self, event: Event<V>, name: &'static str) -> Next<V> {
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
                (Sandbox::remains(), actions)
            }
            Event::DestroyRequested(reply) => self.cut_short(vec![reply]),
            Event::CallerGone => self.cut_short(vec![]),
            Event::PauseRequested(_, reply) => (Sandbox::Creating(self), vec![refuse_pause(reply, name)]),
            Event::ResumeRequested(_, reply) => (Sandbox::Creating(self), vec![refuse_resume(reply, name)]),
            Event::CaptureRequested(wish, reply) => (Sandbox::Creating(self), vec![refuse_capture(wish, reply, name)]),
            // A VM's end is an error of the build while there is one, and nothing has been paused or taken down yet.
            Event::PauseEnded(_)
            | Event::ResumeEnded(_)
            | Event::CaptureEnded(_)
            | Event::IdleDeadline
            | Event::VmmEnded(_)
            | Event::TornDown(_)
            | Event::Unclaimed
            | Event::RetryDue
            | Event::Reached(_) => (Sandbox::Creating(self), vec![]),
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
            Event::DestroyRequested(reply) => Destroying::begin(vec![reply], Some(self.vm), vec![]),
            Event::VmmEnded(ending) => Destroying::begin(vec![], Some(self.vm), vec![Action::Bury(ending)]),
            Event::Unclaimed => Destroying::begin(vec![], Some(self.vm), vec![]),
            Event::PauseRequested(reason, reply) => Pausing::begin(self.vm, reason, vec![reply]),
            Event::CaptureRequested(wish, reply) => {
                let state = Capturing::new(Captured::Running, wish.clone(), reply);
                (Sandbox::Capturing(state), vec![Action::Capture(self.vm, wish)])
            }
            Event::IdleDeadline => Pausing::begin(self.vm, PauseReason::Idle, vec![]),
            // It is what was asked for, so nothing changes.
            Event::ResumeRequested(_, reply) => {
                (Sandbox::Running(self), vec![Action::AnswerResumes(vec![reply], Ok(()))])
            }
            // The create has been answered, so its caller may go; the others are echoes of how we got here.
            Event::CallerGone
            | Event::Built(Err(_))
            | Event::PauseEnded(PauseEnd::Paused(_))
            | Event::ResumeEnded(ResumeEnd::Paused(..))
            | Event::CaptureEnded(CaptureEnd::Paused(..))
            | Event::TornDown(_)
            | Event::RetryDue
            | Event::Reached(ReachEnd::Paused(_) | ReachEnd::Gone(_) | ReachEnd::Unreachable) => {
                (Sandbox::Running(self), vec![])
            }
            // One VM per sandbox; should a second one come, it is the surplus one.
            Event::Built(Ok(vm))
            | Event::Reached(ReachEnd::Running(vm) | ReachEnd::Ended(vm, _))
            | Event::PauseEnded(PauseEnd::Running(vm, _) | PauseEnd::Ended(vm, _))
            | Event::CaptureEnded(CaptureEnd::Running(vm, _) | CaptureEnd::Ended(vm, _))
            | Event::ResumeEnded(ResumeEnd::Running(vm)) => (Sandbox::Running(self), vec![Action::Kill(vm)]),
        }
    }
}

impl Pausing {
    fn begin<V>(vm: V, reason: PauseReason, pauses: Vec<PauseReply>) -> Next<V> {
        let state = Self {
            reason,
            pauses,
            destroys: vec![],
        };
        (Sandbox::Pausing(state), vec![Action::Pause(vm, reason)])
    }

    fn on<V>(mut self, event: Event<V>, name: &'static str) -> Next<V> {
        match event {
            Event::PauseEnded(end) => self.ended(end),
            Event::PauseRequested(_, reply) => {
                self.pauses.push(reply);
                (Sandbox::Pausing(self), vec![])
            }
            Event::CaptureRequested(wish, reply) => (Sandbox::Pausing(self), vec![refuse_capture(wish, reply, name)]),
            Event::DestroyRequested(reply) => {
                self.destroys.push(reply);
                (Sandbox::Pausing(self), vec![])
            }
            Event::ResumeRequested(_, reply) => (Sandbox::Pausing(self), vec![refuse_resume(reply, name)]),
            // The VMM's end comes with the pause's; nothing else is under way.
            Event::Built(Err(_))
            | Event::ResumeEnded(ResumeEnd::Paused(..))
            | Event::CaptureEnded(CaptureEnd::Paused(..))
            | Event::CallerGone
            | Event::IdleDeadline
            | Event::VmmEnded(_)
            | Event::TornDown(_)
            | Event::Unclaimed
            | Event::RetryDue
            | Event::Reached(ReachEnd::Paused(_) | ReachEnd::Gone(_) | ReachEnd::Unreachable) => {
                (Sandbox::Pausing(self), vec![])
            }
            Event::Built(Ok(vm))
            | Event::Reached(ReachEnd::Running(vm) | ReachEnd::Ended(vm, _))
            | Event::CaptureEnded(CaptureEnd::Running(vm, _) | CaptureEnd::Ended(vm, _))
            | Event::ResumeEnded(ResumeEnd::Running(vm)) => (Sandbox::Pausing(self), vec![Action::Kill(vm)]),
        }
    }

    fn ended<V>(self, end: PauseEnd<V>) -> Next<V> {
        let Self {
            reason,
            pauses,
            destroys,
        } = self;
        match end {
            PauseEnd::Paused(kept) => {
                let answer = Action::AnswerPauses(pauses, Ok(()));
                if destroys.is_empty() {
                    // Told first, for the agent may end once a drain has its answer.
                    let tell = (reason != PauseReason::Requested).then_some(Action::TellAutoPaused);
                    let actions = tell.into_iter().chain([answer]).collect();
                    (Sandbox::Paused(Paused { kept }), actions)
                } else {
                    Destroying::begin(destroys, None, vec![answer])
                }
            }
            PauseEnd::Running(vm, error) => {
                let error = Arc::new(error);
                // Nobody uses it and its guest cannot be kept: it must not hold its memory for ever. What is wrong with the host is no
                // guest's fault and passes, and whoever has asked for it meanwhile is told that it runs.
                let is_given_up = reason == PauseReason::Idle && pauses.is_empty() && !error.is_the_hosts();
                let answer = Action::AnswerPauses(pauses, Err(PauseFailure::Failed(error.clone())));
                if !destroys.is_empty() {
                    return Destroying::begin(destroys, Some(vm), vec![answer]);
                }
                if is_given_up {
                    Destroying::begin(vec![], Some(vm), vec![answer, Action::Bury(Ending::NotPaused(error))])
                } else {
                    (Sandbox::Running(Running { vm }), vec![answer])
                }
            }
            PauseEnd::Ended(vm, ending) => {
                let error = Arc::new(PauseError::VmmEnded);
                let answer = Action::AnswerPauses(pauses, Err(PauseFailure::Failed(error)));
                Destroying::begin(destroys, Some(vm), vec![answer, Action::Bury(ending)])
            }
        }
    }
}

impl Paused {
    fn on<V>(self, event: Event<V>) -> Next<V> {
        match event {
            Event::ResumeRequested(wish, reply) => Resuming::begin(self.kept, wish, vec![reply]),
            Event::CaptureRequested(wish, reply) => {
                let state = Capturing::new(Captured::Paused, wish.clone(), reply);
                (Sandbox::Capturing(state), vec![Action::CaptureKept(self.kept, wish)])
            }
            Event::DestroyRequested(reply) => Destroying::begin(vec![reply], None, vec![]),
            // It is what was asked for, so nothing changes.
            Event::PauseRequested(_, reply) => (Sandbox::Paused(self), vec![Action::AnswerPauses(vec![reply], Ok(()))]),
            // Echoes of how we got here.
            Event::Built(Err(_))
            | Event::PauseEnded(PauseEnd::Paused(_))
            | Event::ResumeEnded(ResumeEnd::Paused(..))
            | Event::CaptureEnded(CaptureEnd::Paused(..))
            | Event::CallerGone
            | Event::IdleDeadline
            | Event::VmmEnded(_)
            | Event::TornDown(_)
            | Event::Unclaimed
            | Event::RetryDue
            | Event::Reached(ReachEnd::Paused(_) | ReachEnd::Gone(_) | ReachEnd::Unreachable) => {
                (Sandbox::Paused(self), vec![])
            }
            // A VM beside what is kept would write to its disk.
            Event::Built(Ok(vm))
            | Event::Reached(ReachEnd::Running(vm) | ReachEnd::Ended(vm, _))
            | Event::PauseEnded(PauseEnd::Running(vm, _) | PauseEnd::Ended(vm, _))
            | Event::CaptureEnded(CaptureEnd::Running(vm, _) | CaptureEnd::Ended(vm, _))
            | Event::ResumeEnded(ResumeEnd::Running(vm)) => (Sandbox::Paused(self), vec![Action::Kill(vm)]),
        }
    }
}

impl Resuming {
    fn begin<V>(kept: Kept, wish: ResumeWish, resumes: Vec<ResumeReply>) -> Next<V> {
        let state = Self {
            resumes,
            destroys: vec![],
        };
        (Sandbox::Resuming(state), vec![Action::Resume(kept, wish)])
    }

    fn on<V>(mut self, event: Event<V>, name: &'static str) -> Next<V> {
        match event {
            Event::ResumeEnded(ResumeEnd::Running(vm)) => {
                let answer = Action::AnswerResumes(self.resumes, Ok(()));
                if self.destroys.is_empty() {
                    (Sandbox::Running(Running { vm }), vec![answer])
                } else {
                    Destroying::begin(self.destroys, Some(vm), vec![answer])
                }
            }
            Event::ResumeEnded(ResumeEnd::Paused(kept, error)) => {
                let answer = Action::AnswerResumes(self.resumes, Err(ResumeFailure::Failed(Arc::new(error))));
                if self.destroys.is_empty() {
                    (Sandbox::Paused(Paused { kept }), vec![answer])
                } else {
                    Destroying::begin(self.destroys, None, vec![answer])
                }
            }
            // Whatever this one wishes: it joins the one under way.
            Event::ResumeRequested(_, reply) => {
                self.resumes.push(reply);
                (Sandbox::Resuming(self), vec![])
            }
            Event::DestroyRequested(reply) => {
                let actions = if self.destroys.is_empty() {
                    vec![Action::CancelResume]
                } else {
                    vec![]
                };
                self.destroys.push(reply);
                (Sandbox::Resuming(self), actions)
            }
            Event::PauseRequested(_, reply) => (Sandbox::Resuming(self), vec![refuse_pause(reply, name)]),
            Event::CaptureRequested(wish, reply) => (Sandbox::Resuming(self), vec![refuse_capture(wish, reply, name)]),
            // The VMM's end is an error of the resume; nothing else is under way.
            Event::Built(Err(_))
            | Event::PauseEnded(PauseEnd::Paused(_))
            | Event::CaptureEnded(CaptureEnd::Paused(..))
            | Event::CallerGone
            | Event::IdleDeadline
            | Event::VmmEnded(_)
            | Event::TornDown(_)
            | Event::Unclaimed
            | Event::RetryDue
            | Event::Reached(ReachEnd::Paused(_) | ReachEnd::Gone(_) | ReachEnd::Unreachable) => {
                (Sandbox::Resuming(self), vec![])
            }
            Event::Built(Ok(vm))
            | Event::Reached(ReachEnd::Running(vm) | ReachEnd::Ended(vm, _))
            | Event::CaptureEnded(CaptureEnd::Running(vm, _) | CaptureEnd::Ended(vm, _))
            | Event::PauseEnded(PauseEnd::Running(vm, _) | PauseEnd::Ended(vm, _)) => {
                (Sandbox::Resuming(self), vec![Action::Kill(vm)])
            }
        }
    }
}

impl Capturing {
    fn new(from: Captured, wish: CaptureWish, reply: CaptureReply) -> Self {
        Self {
            from,
            wish,
            captures: vec![reply],
            pauses: vec![],
            reason: PauseReason::Requested,
            resumes: vec![],
            destroys: vec![],
        }
    }

    fn on<V>(mut self, event: Event<V>, name: &'static str) -> Next<V> {
        match event {
            Event::CaptureEnded(end) => self.ended(end),
            Event::CaptureRequested(wish, reply) if wish == self.wish => {
                self.captures.push(reply);
                (Sandbox::Capturing(self), vec![])
            }
            Event::CaptureRequested(wish, reply) => (Sandbox::Capturing(self), vec![refuse_capture(wish, reply, name)]),
            Event::DestroyRequested(reply) => {
                self.destroys.push(reply);
                (Sandbox::Capturing(self), vec![])
            }
            Event::PauseRequested(reason, reply) => match self.from {
                Captured::Running => {
                    // A host that is being emptied says so to the control plane even where somebody has asked as well.
                    if self.pauses.is_empty() || reason == PauseReason::Drain {
                        self.reason = reason;
                    }
                    self.pauses.push(reply);
                    (Sandbox::Capturing(self), vec![])
                }
                Captured::Paused => {
                    let answer = Action::AnswerPauses(vec![reply], Ok(()));
                    (Sandbox::Capturing(self), vec![answer])
                }
            },
            Event::ResumeRequested(wish, reply) => match self.from {
                Captured::Running => {
                    let answer = Action::AnswerResumes(vec![reply], Ok(()));
                    (Sandbox::Capturing(self), vec![answer])
                }
                Captured::Paused => {
                    self.resumes.push((wish, reply));
                    (Sandbox::Capturing(self), vec![])
                }
            },
            // The VMM's end comes with the capture's; nothing else is under way.
            Event::Built(Err(_))
            | Event::PauseEnded(PauseEnd::Paused(_))
            | Event::ResumeEnded(ResumeEnd::Paused(..))
            | Event::CallerGone
            | Event::IdleDeadline
            | Event::VmmEnded(_)
            | Event::TornDown(_)
            | Event::Unclaimed
            | Event::RetryDue
            | Event::Reached(ReachEnd::Paused(_) | ReachEnd::Gone(_) | ReachEnd::Unreachable) => {
                (Sandbox::Capturing(self), vec![])
            }
            Event::Built(Ok(vm))
            | Event::Reached(ReachEnd::Running(vm) | ReachEnd::Ended(vm, _))
            | Event::PauseEnded(PauseEnd::Running(vm, _) | PauseEnd::Ended(vm, _))
            | Event::ResumeEnded(ResumeEnd::Running(vm)) => (Sandbox::Capturing(self), vec![Action::Kill(vm)]),
        }
    }

    fn ended<V>(self, end: CaptureEnd<V>) -> Next<V> {
        let Self {
            from: _,
            wish,
            captures,
            pauses,
            reason,
            resumes,
            destroys,
        } = self;
        let answer = |outcome: Result<Bytes, CaptureError>| {
            let outcome = outcome.map_err(|error| CaptureFailure::Failed(Arc::new(error)));
            Action::AnswerCaptures(wish, captures, outcome)
        };
        let (next, first) = match end {
            CaptureEnd::Ended(vm, ending) => {
                let failed = Arc::new(PauseError::VmmEnded);
                let first = vec![
                    answer(Err(CaptureError::VmmEnded)),
                    Action::AnswerPauses(pauses, Err(PauseFailure::Failed(failed))),
                    Action::Bury(ending),
                ];
                return Destroying::begin(destroys, Some(vm), first);
            }
            CaptureEnd::Running(vm, outcome) if !destroys.is_empty() => {
                let refused = Action::AnswerPauses(pauses, Err(PauseFailure::Refused("stopping")));
                return Destroying::begin(destroys, Some(vm), vec![answer(outcome), refused]);
            }
            CaptureEnd::Paused(_, outcome) if !destroys.is_empty() => {
                let resumes = resumes.into_iter().map(|(_, reply)| reply).collect();
                let refused = Action::AnswerResumes(resumes, Err(ResumeFailure::Refused("stopping")));
                return Destroying::begin(destroys, None, vec![answer(outcome), refused]);
            }
            CaptureEnd::Running(vm, outcome) => {
                let next = if pauses.is_empty() {
                    (Sandbox::Running(Running { vm }), vec![])
                } else {
                    Pausing::begin(vm, reason, pauses)
                };
                (next, answer(outcome))
            }
            CaptureEnd::Paused(kept, outcome) => {
                let (wishes, replies): (Vec<_>, Vec<_>) = resumes.into_iter().unzip();
                let next = match wishes.into_iter().next() {
                    Some(wish) => Resuming::begin(kept, wish, replies),
                    None => (Sandbox::Paused(Paused { kept }), vec![]),
                };
                (next, answer(outcome))
            }
        };
        let (next, mut actions) = next;
        actions.insert(0, first);
        (next, actions)
    }
}

impl Unreachable {
    fn on<V>(mut self, event: Event<V>, name: &'static str) -> Next<V> {
        match event {
            Event::Reached(end) => self.reached(end),
            Event::RetryDue if !self.is_tried => {
                self.is_tried = true;
                (Sandbox::Unreachable(self), vec![Action::Reach])
            }
            Event::DestroyRequested(reply) if self.is_tried => {
                self.destroys.push(reply);
                (Sandbox::Unreachable(self), vec![])
            }
            // By its socket, which says whether that could be done.
            Event::DestroyRequested(reply) => Destroying::begin(vec![reply], None, vec![]),
            Event::PauseRequested(_, reply) => (Sandbox::Unreachable(self), vec![refuse_pause(reply, name)]),
            Event::ResumeRequested(_, reply) => (Sandbox::Unreachable(self), vec![refuse_resume(reply, name)]),
            Event::CaptureRequested(wish, reply) => {
                (Sandbox::Unreachable(self), vec![refuse_capture(wish, reply, name)])
            }
            // Nothing else is ever under way here.
            Event::Built(Err(_))
            | Event::PauseEnded(PauseEnd::Paused(_))
            | Event::ResumeEnded(ResumeEnd::Paused(..))
            | Event::CaptureEnded(CaptureEnd::Paused(..))
            | Event::CallerGone
            | Event::IdleDeadline
            | Event::VmmEnded(_)
            | Event::TornDown(_)
            | Event::Unclaimed
            | Event::RetryDue => (Sandbox::Unreachable(self), vec![]),
            Event::Built(Ok(vm))
            | Event::PauseEnded(PauseEnd::Running(vm, _) | PauseEnd::Ended(vm, _))
            | Event::CaptureEnded(CaptureEnd::Running(vm, _) | CaptureEnd::Ended(vm, _))
            | Event::ResumeEnded(ResumeEnd::Running(vm)) => (Sandbox::Unreachable(self), vec![Action::Kill(vm)]),
        }
    }

    fn reached<V>(self, end: ReachEnd<V>) -> Next<V> {
        let Self { is_tried: _, destroys } = self;
        let goes = !destroys.is_empty();
        match end {
            ReachEnd::Running(vm) if goes => Destroying::begin(destroys, Some(vm), vec![]),
            ReachEnd::Paused(_) | ReachEnd::Unreachable if goes => Destroying::begin(destroys, None, vec![]),
            ReachEnd::Running(vm) => (Sandbox::Running(Running { vm }), vec![]),
            // The agent before us may have ended between the pause and the event.
            ReachEnd::Paused(kept) => (Sandbox::Paused(Paused { kept }), vec![Action::TellAutoPaused]),
            ReachEnd::Unreachable => (Sandbox::unreachable(false), vec![]),
            ReachEnd::Ended(vm, ending) => Destroying::begin(destroys, Some(vm), vec![Action::Bury(ending)]),
            ReachEnd::Gone(exit) => {
                let ending = exit.map_or(Ending::Unseen, Ending::Reported);
                Destroying::begin(destroys, None, vec![Action::Bury(ending)])
            }
        }
    }
}

impl Destroying {
    /// Starts a teardown, after `first`.
    fn begin<V>(waiting: Vec<DestroyReply>, vm: Option<V>, mut first: Vec<Action<V>>) -> Next<V> {
        let state = Self {
            caller: None,
            waiting,
            step: Step::Teardown,
        };
        first.push(Action::TearDown(vm));
        (Sandbox::Destroying(state), first)
    }

    fn on<V>(mut self, event: Event<V>, name: &'static str) -> Next<V> {
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
            Event::PauseRequested(_, reply) => (Sandbox::Destroying(self), vec![refuse_pause(reply, name)]),
            Event::CaptureRequested(wish, reply) => {
                (Sandbox::Destroying(self), vec![refuse_capture(wish, reply, name)])
            }
            Event::ResumeRequested(_, reply) => (Sandbox::Destroying(self), vec![refuse_resume(reply, name)]),
            // The build was finished before it could be told to stop; nothing else is ever under way here.
            Event::Built(Ok(vm))
            | Event::Reached(ReachEnd::Running(vm) | ReachEnd::Ended(vm, _))
            | Event::PauseEnded(PauseEnd::Running(vm, _) | PauseEnd::Ended(vm, _))
            | Event::CaptureEnded(CaptureEnd::Running(vm, _) | CaptureEnd::Ended(vm, _))
            | Event::ResumeEnded(ResumeEnd::Running(vm)) => {
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
            Event::PauseEnded(PauseEnd::Paused(_))
            | Event::ResumeEnded(ResumeEnd::Paused(..))
            | Event::CaptureEnded(CaptureEnd::Paused(..))
            | Event::CallerGone
            | Event::IdleDeadline
            | Event::VmmEnded(_)
            | Event::Unclaimed
            | Event::Reached(ReachEnd::Paused(_) | ReachEnd::Gone(_) | ReachEnd::Unreachable) => {
                (Sandbox::Destroying(self), vec![])
            }
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
