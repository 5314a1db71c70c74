//! Errors that several parts of the agent share, and how an error with its sources is printed.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// A file operation that failed, with the file and what was being done to it.
#[derive(Debug, thiserror::Error)]
#[error("{doing} {} failed", path.display())]
pub struct FileError {
    /// What was being done, as in "writing".
    pub doing: &'static str,
    /// To which file.
    pub path: PathBuf,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

impl FileError {
    /// An error of one operation on one file.
    pub fn new(doing: &'static str, path: &Path, source: io::Error) -> Self {
        Self {
            doing,
            path: path.into(),
            source,
        }
    }
}

/// Prints an error and its sources on one line, outermost first.
#[derive(Debug)]
pub struct Chain<'a>(pub &'a (dyn std::error::Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}
