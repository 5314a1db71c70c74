//! Every error that a caller can see, and its Connect code, in one place.
//!
//! The codes are part of the protocol: control planes act on them. Unavailable is for what concerns the whole host.

use connectrpc::{ConnectError, ErrorCode};
use roost_common::ids::{IdError, SandboxId};
use roost_common::privd::PrivdError;

use crate::errors::{Chain, FileError};
use crate::guest::GuestError;
use crate::host::counters::NetworkError;
use crate::host::images::ImageError;
use crate::host::privd::CallError;
use crate::host::shim::ShimFault;
use crate::registry::Refusal;
use crate::sandbox::plan::WishError;
use crate::sandbox::{
    BuildError, CaptureError, CaptureFailure, CreateFailure, EgressFailure, PartError, PauseFailure, ResumeError,
    ResumeFailure, TeardownError,
};
use crate::templates::TemplateError;
use crate::templates::digest::BadDigest;
use crate::templates::import::ImportError;

/// Why a call has no result.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The agent has started and still tidies up.
    #[error("the agent is recovering; try again in a moment")]
    Recovering,
    /// The request names no sandbox.
    #[error("sandbox_id is no sandbox id")]
    BadId(#[source] IdError),
    /// A field of a create.
    #[error(transparent)]
    Wish(#[from] WishError),
    /// A create that was not accepted.
    #[error(transparent)]
    Refusal(#[from] Refusal),
    /// A create that failed.
    #[error(transparent)]
    Create(#[from] CreateFailure),
    /// A destroy that failed.
    #[error(transparent)]
    Destroy(#[from] std::sync::Arc<TeardownError>),
    /// A pause that failed.
    #[error(transparent)]
    Pause(PauseFailure),
    /// A resume that failed.
    #[error(transparent)]
    Resume(ResumeFailure),
    /// A template that was not made of a sandbox.
    #[error(transparent)]
    Capture(CaptureFailure),
    /// A policy that did not change.
    #[error(transparent)]
    Egress(#[from] EgressFailure),
    /// Counters that could not be read.
    #[error("the counters of sandbox {id} cannot be read")]
    Counters {
        /// The id.
        id: SandboxId,
        /// Why.
        #[source]
        source: NetworkError,
    },
    /// A checksum that is none.
    #[error("digest is no checksum")]
    Digest(#[from] BadDigest),
    /// A sender of whom nothing has been heard.
    #[error("nothing has come for {} s", .0.as_secs())]
    Silent(std::time::Duration),
    /// A template that was not imported, read or deleted.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// There is no such sandbox; why, where that is known.
    #[error("no sandbox {id} on this host{}", why.as_deref().map(|why| format!(": {why}")).unwrap_or_default())]
    NoSandbox {
        /// The id.
        id: SandboxId,
        /// What its tombstone says.
        why: Option<String>,
    },
    /// The sandbox is there, so nothing is known of its end.
    #[error("sandbox {id} has not ended")]
    NotEnded {
        /// The id.
        id: SandboxId,
    },
    /// The sandbox is not running.
    #[error("sandbox {id} is {state}, not running")]
    NotRunning {
        /// The id.
        id: SandboxId,
        /// What it is doing.
        state: &'static str,
    },
    /// Its VM may run, and nobody can ask it.
    #[error(
        "sandbox {id} cannot be reached: its vmmshim has not answered since the agent was started, or its record cannot be used; \
             the agent's log says which"
    )]
    Unreachable {
        /// The id.
        id: SandboxId,
    },
    /// The sandbox runs, but its guest is held.
    #[error("sandbox {id} is held: this host's disk is nearly full; it runs on once there is room again")]
    Held {
        /// The id.
        id: SandboxId,
    },
    /// A field of an exec.
    #[error("{0}")]
    BadCommand(&'static str),
    /// The guest.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The caller's own stream.
    #[error("the request broke off")]
    Caller(#[source] ConnectError),
    /// A file of the host's.
    #[error(transparent)]
    File(#[from] FileError),
    /// A span of time that is none of the protocol's.
    #[error("range is none of 5m, 10m, 1h, 2h, 6h, 12h and 24h")]
    BadRange,
}

impl ApiError {
    fn code(&self) -> ErrorCode {
        match self {
            Self::Recovering | Self::Unreachable { .. } | Self::Held { .. } => ErrorCode::Unavailable,
            Self::Silent(_) => ErrorCode::DeadlineExceeded,
            Self::BadId(_) | Self::Digest(_) | Self::Wish(_) | Self::BadCommand(_) | Self::BadRange => {
                ErrorCode::InvalidArgument
            }
            Self::Refusal(Refusal::Exists(_)) => ErrorCode::AlreadyExists,
            Self::Refusal(Refusal::Full(_) | Refusal::Draining | Refusal::NoRoom { .. }) => ErrorCode::Unavailable,
            Self::Create(CreateFailure::Destroyed) => ErrorCode::Aborted,
            Self::Create(CreateFailure::Failed(error)) => build_code(error),
            Self::Destroy(_) | Self::File(_) => ErrorCode::Internal,
            Self::Pause(PauseFailure::Refused(_)) | Self::Resume(ResumeFailure::Refused(_)) => {
                ErrorCode::FailedPrecondition
            }
            Self::Pause(PauseFailure::Failed(_)) => ErrorCode::Internal,
            Self::Resume(ResumeFailure::Host(_)) | Self::Capture(CaptureFailure::Host(_)) => ErrorCode::Unavailable,
            Self::Resume(ResumeFailure::Failed(error)) => resume_code(error),
            Self::Capture(CaptureFailure::Refused(_)) => ErrorCode::FailedPrecondition,
            Self::Capture(CaptureFailure::Failed(error)) => match error.as_ref() {
                CaptureError::Template(error) => template_code(error),
                CaptureError::Privd(error) => call_code(error),
                CaptureError::Pause(_)
                | CaptureError::Snapshot(_)
                | CaptureError::File(_)
                | CaptureError::Record(_)
                | CaptureError::Image(_)
                | CaptureError::FlattenTimeout(_)
                | CaptureError::VmmEnded => ErrorCode::Internal,
            },
            Self::Egress(EgressFailure::Refused(_)) => ErrorCode::FailedPrecondition,
            Self::Egress(EgressFailure::Slow(_)) => ErrorCode::Unavailable,
            Self::Egress(_) | Self::Counters { .. } => ErrorCode::Internal,
            Self::Template(error) => template_code(error),
            Self::NoSandbox { .. } => ErrorCode::NotFound,
            Self::NotRunning { .. } | Self::NotEnded { .. } => ErrorCode::FailedPrecondition,
            Self::Guest(error) => guest_code(error),
            Self::Caller(error) => error.code,
        }
    }
}

fn build_code(error: &BuildError) -> ErrorCode {
    match error {
        BuildError::Stopped => ErrorCode::Aborted,
        BuildError::Image(ImageError::Unknown(..)) => ErrorCode::NotFound,
        BuildError::DiskTooSmall { .. } | BuildError::DiskTooLarge(_) => ErrorCode::InvalidArgument,
        BuildError::Part(error) => part_code(error),
        BuildError::Template(error) => template_code(error),
        // What the guest says to its identity is about the caller's default_user and default_env.
        BuildError::Guest(GuestError::Refused { status, .. }) if status.as_u16() == 400 => ErrorCode::InvalidArgument,
        BuildError::Image(ImageError::File(_) | ImageError::NotAnImage { .. } | ImageError::Replaced { .. })
        | BuildError::NoKernel { .. }
        | BuildError::Left(_)
        | BuildError::Kept { .. }
        | BuildError::File(_)
        | BuildError::Vmm(_)
        | BuildError::VmmEnded(_)
        | BuildError::ShimLost
        | BuildError::Guest(_) => ErrorCode::Internal,
    }
}

fn resume_code(error: &ResumeError) -> ErrorCode {
    match error {
        ResumeError::Stopped => ErrorCode::Aborted,
        // What its caller can act on: there is another way to resume it.
        ResumeError::Spent | ResumeError::Misfit(_) | ResumeError::Snapshot(_) => ErrorCode::FailedPrecondition,
        ResumeError::Part(error) => part_code(error),
        ResumeError::Guest(GuestError::Refused { status, .. }) if status.as_u16() == 400 => ErrorCode::InvalidArgument,
        ResumeError::Record(_)
        | ResumeError::NotPaused
        | ResumeError::Template(_)
        | ResumeError::File(_)
        | ResumeError::Earlier(_)
        | ResumeError::Vmm(_)
        | ResumeError::VmmEnded(_)
        | ResumeError::ShimLost
        | ResumeError::Guest(_) => ErrorCode::Internal,
    }
}

fn part_code(error: &PartError) -> ErrorCode {
    match error {
        PartError::Privd(error) => call_code(error),
        // For whoever looks after the host: the same would fail again.
        PartError::Shim(ShimFault::OldVmm { .. }) => ErrorCode::FailedPrecondition,
        PartError::Shim(_) | PartError::File(_) => ErrorCode::Internal,
    }
}

fn call_code(error: &CallError) -> ErrorCode {
    match error {
        CallError::Refused {
            source: PrivdError::TooMany { .. },
            ..
        } => ErrorCode::Unavailable,
        CallError::Refused { .. } | CallError::Connect { .. } | CallError::Lost { .. } => ErrorCode::Internal,
    }
}

fn template_code(error: &TemplateError) -> ErrorCode {
    match error {
        TemplateError::Exists { .. } => ErrorCode::AlreadyExists,
        TemplateError::Own => ErrorCode::InvalidArgument,
        TemplateError::Unknown { .. } => ErrorCode::NotFound,
        TemplateError::Import(error) => match error {
            ImportError::Length { .. } | ImportError::Piece { .. } | ImportError::TooMuch(_) => {
                ErrorCode::InvalidArgument
            }
            ImportError::Differs { .. } => ErrorCode::DataLoss,
            ImportError::BrokenOff => ErrorCode::Canceled,
        },
        TemplateError::Damaged { .. } => ErrorCode::DataLoss,
        TemplateError::Stopped => ErrorCode::Canceled,
        TemplateError::File(_) | TemplateError::Format { .. } | TemplateError::Snapshot(_) => ErrorCode::Internal,
    }
}

fn guest_code(error: &GuestError) -> ErrorCode {
    match error {
        // What the caller got wrong keeps its code, but for NotFound, which would be taken for the sandbox's; what the guest did
        // wrong is not the caller's to act on.
        GuestError::Process { code, .. } => match code {
            ErrorCode::InvalidArgument | ErrorCode::NotFound => ErrorCode::InvalidArgument,
            ErrorCode::PermissionDenied | ErrorCode::ResourceExhausted => *code,
            _ => ErrorCode::Internal,
        },
        // These name what is in the guest, so nobody takes it for the sandbox.
        GuestError::NoProcess(_) => ErrorCode::NotFound,
        GuestError::File { code, .. } => match code {
            ErrorCode::InvalidArgument
            | ErrorCode::NotFound
            | ErrorCode::AlreadyExists
            | ErrorCode::PermissionDenied
            | ErrorCode::FailedPrecondition
            | ErrorCode::ResourceExhausted => *code,
            _ => ErrorCode::Internal,
        },
        GuestError::TimedOut(_) => ErrorCode::DeadlineExceeded,
        GuestError::TooMuchOutput(_) | GuestError::TooLarge(_) => ErrorCode::ResourceExhausted,
        GuestError::Aborted => ErrorCode::Canceled,
        GuestError::NotUp(_)
        | GuestError::Unreachable(_)
        | GuestError::Http { .. }
        | GuestError::Refused { .. }
        | GuestError::BadStream(_)
        | GuestError::WrongNonce
        | GuestError::NoNonce => ErrorCode::Internal,
    }
}

impl From<ApiError> for ConnectError {
    fn from(error: ApiError) -> Self {
        let code = error.code();
        match &error {
            // A guest can fail as often as it likes; that is no trouble of the host's.
            ApiError::Guest(_) => tracing::info!(error = %Chain(&error), "a guest failed a call"),
            _ if code == ErrorCode::Internal => tracing::error!(error = %Chain(&error), "a call failed"),
            _ => {}
        }
        Self::new(code, Chain(&error).to_string())
    }
}
