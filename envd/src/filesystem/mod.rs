//! Files of the sandbox, touched with the rights of the user that a call runs as.
//!
//! | module | holds |
//! |---|---|
//! | [`service`] | the Connect service: requests checked, errors given their codes |
//! | [`rights`] | threads that become a user |
//! | [`path`], [`entry`] | where a path leads; what is told of a file |
//! | [`operations`] | what the procedures do |
//! | [`watch`] | what changes in a directory |
//!
//! Not here: what is in files (`files`).

pub(crate) mod entry;
pub(crate) mod operations;
pub(crate) mod path;
pub(crate) mod rights;
pub(crate) mod service;
mod watch;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use connectrpc::{ConnectError, ErrorCode};
use nix::errno::Errno;

use crate::users::UserError;

/// Why a call on files is refused, or what the kernel refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    #[error(transparent)]
    User(#[from] UserError),
    #[error("the path {0}")]
    Path(&'static str),
    #[error("cannot become user {user:?}: {errno}")]
    Identity { user: String, errno: Errno },
    #[error("{0:?} is not a directory")]
    NotDirectory(PathBuf),
    #[error("{0:?} is not a regular file")]
    NotFile(PathBuf),
    #[error("{0:?} is a directory")]
    Directory(PathBuf),
    #[error("{0:?} exists already")]
    Exists(PathBuf),
    #[error("there are more than {max} entries; ask for less depth")]
    TooManyEntries { max: usize },
    #[error("{0:?} is on a network, which does not tell what others change")]
    Network(PathBuf),
    #[error("cannot {step} {path:?}: {errno}")]
    Kernel { step: Step, path: PathBuf, errno: Errno },
    #[error("the work on files failed")]
    Panicked,
}

/// What the kernel refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Thread,
    Look,
    Open,
    Read,
    Write,
    Describe,
    Make,
    Move,
    Remove,
    Watch,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Step::Thread => "start a thread for work below",
            Step::Look => "look at",
            Step::Open => "open",
            Step::Read => "read",
            Step::Write => "write",
            Step::Describe => "set the metadata of",
            Step::Make => "make",
            Step::Move => "move",
            Step::Remove => "remove",
            Step::Watch => "watch",
        })
    }
}

impl FileError {
    /// Its code, for clients of either kind of call.
    pub(crate) fn code(&self) -> ErrorCode {
        match self {
            FileError::User(UserError::Unknown(_))
            | FileError::Path(_)
            | FileError::NotDirectory(_)
            | FileError::NotFile(_)
            | FileError::Directory(_)
            | FileError::Network(_) => ErrorCode::InvalidArgument,
            FileError::Identity { .. } => ErrorCode::PermissionDenied,
            FileError::Exists(_) => ErrorCode::AlreadyExists,
            FileError::TooManyEntries { .. } => ErrorCode::ResourceExhausted,
            FileError::User(UserError::Read { .. }) | FileError::Panicked => ErrorCode::Internal,
            FileError::Kernel { errno, .. } => match errno {
                Errno::ENOENT | Errno::ENOTDIR => ErrorCode::NotFound,
                Errno::EACCES | Errno::EPERM => ErrorCode::PermissionDenied,
                Errno::EEXIST => ErrorCode::AlreadyExists,
                Errno::EINVAL | Errno::ENAMETOOLONG | Errno::EISDIR => ErrorCode::InvalidArgument,
                Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG | Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM => {
                    ErrorCode::ResourceExhausted
                }
                Errno::EAGAIN if matches!(self, FileError::Kernel { step: Step::Thread, .. }) => {
                    ErrorCode::ResourceExhausted
                }
                Errno::ELOOP
                | Errno::EXDEV
                | Errno::EROFS
                | Errno::EBUSY
                | Errno::ETXTBSY
                | Errno::ENXIO
                | Errno::ENOTEMPTY => ErrorCode::FailedPrecondition,
                _ => ErrorCode::Internal,
            },
        }
    }

    /// Whether the disk is full, or the user's part of it.
    pub(crate) fn is_full_disk(&self) -> bool {
        matches!(
            self,
            FileError::Kernel { step: Step::Write | Step::Make | Step::Open | Step::Describe, errno, .. }
                if [Errno::ENOSPC, Errno::EDQUOT].contains(errno)
        )
    }
}

impl From<FileError> for ConnectError {
    fn from(error: FileError) -> Self {
        ConnectError::new(error.code(), error.to_string())
    }
}

/// Puts what failed, and where, to an error of the kernel.
pub(crate) fn at(step: Step, path: &Path) -> impl FnOnce(io::Error) -> FileError {
    move |error| FileError::Kernel {
        step,
        path: path.to_owned(),
        // Without a number it comes from std, which refuses what is no path.
        errno: error.raw_os_error().map_or(Errno::EINVAL, Errno::from_raw),
    }
}

/// The same for an error of `nix`.
pub(crate) fn errno_at(step: Step, path: &Path) -> impl FnOnce(Errno) -> FileError {
    move |errno| FileError::Kernel {
        step,
        path: path.to_owned(),
        errno,
    }
}
