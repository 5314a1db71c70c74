//! What happens to a sandbox, what its driver is to do about it, and how callers are answered: the words of the state machine.

use std::sync::Arc;
use std::time::Duration;

use roost_common::shim::Exit;
use roost_common::units::Bytes;
use tokio::sync::oneshot;

use super::record::RecordError;
use super::{BuildError, CaptureError, CaptureWish, Kept, PauseError, PauseReason, ResumeError, ResumeWish};
use crate::errors::FileError;
use crate::host::counters::NetworkError;
use crate::host::shim::ShimFault;

/// The answer to a create.
pub type CreateReply = oneshot::Sender<Result<(), CreateFailure>>;
/// The answer to a destroy.
pub type DestroyReply = oneshot::Sender<Result<(), Arc<TeardownError>>>;
/// The answer to a pause.
pub type PauseReply = oneshot::Sender<Result<(), PauseFailure>>;
/// The answer to a resume.
pub type ResumeReply = oneshot::Sender<Result<(), ResumeFailure>>;
/// The answer to a capture: what the template takes on disk.
pub type CaptureReply = oneshot::Sender<Result<Bytes, CaptureFailure>>;

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

/// Why a sandbox is not paused.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PauseFailure {
    /// A step failed; the sandbox runs on, unless the error is that its VMM has ended.
    #[error("the sandbox could not be paused")]
    Failed(#[source] Arc<PauseError>),
    /// It is doing something else.
    #[error("the sandbox is {0}, not running")]
    Refused(&'static str),
}

/// Why a sandbox does not run again.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ResumeFailure {
    /// A step failed; the sandbox is still paused.
    #[error("the sandbox could not be resumed")]
    Failed(#[source] Arc<ResumeError>),
    /// It is doing something else.
    #[error("the sandbox is {0}, not paused")]
    Refused(&'static str),
    /// The host takes no new work.
    #[error(transparent)]
    Host(#[from] crate::registry::Refusal),
}

/// Why a sandbox has become no template.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CaptureFailure {
    /// A step failed; the sandbox is as it was, unless the error is that its VMM has ended.
    #[error("the sandbox could not be made a template")]
    Failed(#[source] Arc<CaptureError>),
    /// It is doing something else.
    #[error("the sandbox is {0}, neither running nor paused")]
    Refused(&'static str),
    /// The host has no room for it.
    #[error(transparent)]
    Host(#[from] crate::registry::Refusal),
}

/// Why what a sandbox may reach has not changed.
#[derive(Debug, thiserror::Error)]
pub enum EgressFailure {
    /// It could not be written down; nothing has changed.
    #[error("the policy could not be written down")]
    Record(#[from] RecordError),
    /// It is being written down; nothing else has changed.
    #[error("the policy was not written down within {} s; say it again", .0.as_secs())]
    Slow(Duration),
    /// It is written down, and counts from the next resume on; the network keeps to the one before.
    #[error("the policy is written down, but not in force yet; say it again")]
    Network(#[from] NetworkError),
    /// It is doing something else.
    #[error("the sandbox is {0}, neither running nor paused")]
    Refused(&'static str),
}

impl From<FileError> for EgressFailure {
    fn from(error: FileError) -> Self {
        Self::Record(error.into())
    }
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
    Vmm(#[source] ShimFault),
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
    /// Somebody wants it paused.
    PauseRequested(PauseReason, PauseReply),
    /// Nobody has used it for as long as its plan allows.
    IdleDeadline,
    /// The pause has ended.
    PauseEnded(PauseEnd<V>),
    /// Somebody wants it to run again.
    ResumeRequested(ResumeWish, ResumeReply),
    /// The resume has ended.
    ResumeEnded(ResumeEnd<V>),
    /// Somebody wants a template of it.
    CaptureRequested(CaptureWish, CaptureReply),
    /// The capture has ended.
    CaptureEnded(CaptureEnd<V>),
    /// The VMM has ended by itself.
    VmmEnded(Ending),
    /// The teardown has ended.
    TornDown(Result<(), TeardownError>),
    /// The create was answered, and nobody was there to hear it: nobody will ever destroy what it made.
    Unclaimed,
    /// A teardown failed a while ago, or an attempt to reach its VM did.
    RetryDue,
    /// An attempt to reach the VM of an earlier agent has ended.
    Reached(ReachEnd<V>),
}

/// How a VMM ended that nobody ended, or why we ended one.
#[derive(Debug)]
pub enum Ending {
    /// The shim reports it.
    Reported(Box<Exit>),
    /// The shim has gone.
    ShimLost,
    /// Nobody saw it: it had gone when an agent looked for it.
    Unseen,
    /// It was idle and could not be paused.
    NotPaused(Arc<PauseError>),
    /// Its VMM would not let the guest run on.
    Stopped(Arc<PauseError>),
    /// Its disk can be used no more; the VMM is still there.
    DiskLost,
}

/// How a pause ended.
#[derive(Debug)]
pub enum PauseEnd<V> {
    /// It is on disk, and its VMM has been stopped.
    Paused(Kept),
    /// It failed; the sandbox runs on.
    Running(V, PauseError),
    /// The VMM ended meanwhile, by itself.
    Ended(V, Ending),
}

/// How a resume ended.
#[derive(Debug)]
pub enum ResumeEnd<V> {
    /// It runs.
    Running(V),
    /// It failed, and has undone itself: what is on disk is as this says.
    Paused(Kept, ResumeError),
}

/// How a capture ended.
#[derive(Debug)]
pub enum CaptureEnd<V> {
    /// The sandbox runs on.
    Running(V, Result<Bytes, CaptureError>),
    /// It stays paused.
    Paused(Kept, Result<Bytes, CaptureError>),
    /// The VMM ended meanwhile, by itself.
    Ended(V, Ending),
}

/// How an attempt to reach the VM of an earlier agent ended.
#[derive(Debug)]
pub enum ReachEnd<V> {
    /// It runs.
    Running(V),
    /// It has gone, and the sandbox is on disk.
    Paused(Kept),
    /// It has ended, or is as good as ended.
    Ended(V, Ending),
    /// It has gone; how, where its shim has written that down.
    Gone(Option<Box<Exit>>),
    /// It may run, and its shim does not answer.
    Unreachable,
}

/// What the driver is to do.
#[derive(Debug)]
pub enum Action<V> {
    /// Ask the build to stop; its end comes as [`Event::Built`].
    CancelBuild,
    /// Pause a VM; the end comes as [`Event::PauseEnded`].
    Pause(V, PauseReason),
    /// Resume from what is kept; the end comes as [`Event::ResumeEnded`].
    Resume(Kept, ResumeWish),
    /// Ask the resume to stop; its end comes all the same.
    CancelResume,
    /// Make a template of a VM; the end comes as [`Event::CaptureEnded`].
    Capture(V, CaptureWish),
    /// Make a template of what is kept; the end comes as [`Event::CaptureEnded`].
    CaptureKept(Kept, CaptureWish),
    /// Try to reach the VM of an earlier agent; the end comes as [`Event::Reached`].
    Reach,
    /// Take down a VM, or only the files where there is none; its end comes as [`Event::TornDown`].
    TearDown(Option<V>),
    /// Kill a VM that is one too many; the sandbox's files stay.
    Kill(V),
    /// Write down why the sandbox ended, and tell the control plane.
    Bury(Ending),
    /// Tell the control plane that it was paused and nobody asked for it.
    TellAutoPaused,
    /// Answer a create.
    AnswerCreate(CreateReply, Result<(), CreateFailure>),
    /// Answer pauses.
    AnswerPauses(Vec<PauseReply>, Result<(), PauseFailure>),
    /// Answer resumes.
    AnswerResumes(Vec<ResumeReply>, Result<(), ResumeFailure>),
    /// Answer captures of this wish.
    AnswerCaptures(CaptureWish, Vec<CaptureReply>, Result<Bytes, CaptureFailure>),
    /// Answer destroys.
    AnswerDestroys(Vec<DestroyReply>, Result<(), TeardownError>),
}
