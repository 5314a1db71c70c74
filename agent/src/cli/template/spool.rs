//! Contents of files, in files of our own that are numbered.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use super::archive::shown;
use super::tree::TreeError;
use crate::snapshot::copy::nonzero;

/// Unit in which content that is all zeros becomes a hole.
const BLOCK: u64 = 4096;
/// How much is read at a time.
const BUFFER: usize = 256 << 10;

/// Content of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Content {
    /// Number in the spool; `None` for an empty file.
    pub(super) number: Option<u64>,
    /// Bytes in blocks that are not all zeros.
    pub(super) data: u64,
}

impl Content {
    pub(super) const EMPTY: Self = Self { number: None, data: 0 };
}

/// Contents, in files that are numbered.
#[derive(Debug)]
pub(super) struct Spool {
    dir: PathBuf,
    next: u64,
    /// Bytes of content that are in the tree, holes included in none.
    live: u64,
    most: u64,
}

impl Spool {
    /// In an empty directory of ours, with at most so many bytes.
    pub(super) fn new(dir: &Path, most: u64) -> Self {
        Self {
            dir: dir.to_owned(),
            next: 0,
            live: 0,
            most,
        }
    }

    pub(super) fn path(&self, number: u64) -> PathBuf {
        self.dir.join(number.to_string())
    }

    /// Keeps `size` bytes of what comes. Blocks of zeros become holes and count for nothing.
    pub(super) fn keep(
        &mut self,
        of: &[u8],
        size: u64,
        content: &mut impl Read,
        stop: &AtomicBool,
    ) -> Result<Content, TreeError> {
        if size == 0 {
            return Ok(Content::EMPTY);
        }
        let number = self.next;
        self.next += 1;
        let path = self.path(number);
        let failed = |source| TreeError::Spool {
            path: path.clone(),
            source,
        };
        let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        let file = made.map_err(failed)?;
        file.set_len(size).map_err(failed)?;
        let data = self.copy(of, size, content, &file, stop, failed)?;
        Ok(Content {
            number: Some(number),
            data,
        })
    }

    fn copy(
        &mut self,
        of: &[u8],
        size: u64,
        content: &mut impl Read,
        to: &File,
        stop: &AtomicBool,
        failed: impl Fn(io::Error) -> TreeError,
    ) -> Result<u64, TreeError> {
        let mut buffer = vec![0; BUFFER];
        let (mut at, mut data) = (0, 0);
        while at < size {
            if stop.load(Ordering::Relaxed) {
                return Err(TreeError::Stopped);
            }
            let some = usize::try_from(size - at).map_or(BUFFER, |rest| rest.min(BUFFER));
            let chunk = &mut buffer[..some];
            content.read_exact(chunk).map_err(|source| TreeError::Content {
                path: shown(of),
                source,
            })?;
            for (start, end) in nonzero(chunk) {
                let bytes = (end as u64 - start as u64).next_multiple_of(BLOCK);
                data += bytes;
                self.live += bytes;
                if self.live > self.most {
                    return Err(TreeError::TooLarge(self.most));
                }
                to.write_all_at(&chunk[start..end], at + start as u64)
                    .map_err(&failed)?;
            }
            at += some as u64;
        }
        Ok(data)
    }

    /// Removes what nobody has any more. Where that fails it is room that is lost until the spool goes.
    pub(super) fn forget(&mut self, content: Content) {
        self.live -= content.data;
        if let Some(number) = content.number {
            drop(std::fs::remove_file(self.path(number)));
        }
    }
}
