//! A template of an image that comes over the API.
//!
//! Holds: the agent stores bytes and understands none of them; what comes is bounded by what its header announced, and written in rising
//! order, so that nothing is written twice; an import whose sender goes away before its end leaves nothing.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use roost_common::units::Bytes;
use tokio::sync::mpsc::Receiver;

use super::digest::Digest;
use super::{Making, Sums, TemplateError, TemplateFile};
use crate::errors::FileError;
use crate::host::images::TemplateRef;

/// Unit of an image's length and of its pieces.
pub const BLOCK: u64 = 4096;
/// Largest piece.
pub const MAX_PIECE: usize = 4 << 20;
/// How much may be dirty in the page cache.
const WINDOW: u64 = 32 << 20;

/// What is to be imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Under which identity.
    pub template: TemplateRef,
    /// Under which name, for people.
    pub name: String,
    /// Bytes of the image.
    pub length: u64,
    /// Bytes that all pieces have together.
    pub data: u64,
}

/// What comes of an image.
#[derive(Debug)]
pub enum Part {
    /// Bytes at an offset.
    Piece(u64, Vec<u8>),
    /// The end, with the checksum that the sender has.
    End(Option<Digest>),
}

/// Why an import fails that its sender could have made otherwise.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// A length that no disk has.
    #[error("the image has {length} bytes, and not {BLOCK} to {most} in whole blocks of {BLOCK}")]
    Length {
        /// What was announced.
        length: u64,
        /// What is allowed.
        most: u64,
    },
    /// A piece in the wrong place or of the wrong size.
    #[error(
        "a piece of {size} bytes at {offset} is not {BLOCK} to {MAX_PIECE} bytes in whole blocks of {BLOCK}, behind the one before and \
         within the image"
    )]
    Piece {
        /// Where.
        offset: u64,
        /// How large.
        size: usize,
    },
    /// More than was announced.
    #[error("the pieces have more than the {0} bytes that the header announced")]
    TooMuch(u64),
    /// Another image than the one that was sent.
    #[error("the image that has come has the checksum {found}, and the one that was sent {expected}")]
    Differs {
        /// Of what was sent.
        expected: Digest,
        /// Of what has come.
        found: Digest,
    },
    /// The sender has gone.
    #[error("the image broke off before its end")]
    BrokenOff,
}

impl Header {
    /// Checks what can be told before anything has come. `most` is the length of the largest disk that is allowed.
    ///
    /// # Errors
    /// [`ImportError::Length`], [`ImportError::TooMuch`].
    pub fn check(&self, most: u64) -> Result<(), ImportError> {
        if self.length == 0 || self.length > most || !self.length.is_multiple_of(BLOCK) {
            return Err(ImportError::Length {
                length: self.length,
                most,
            });
        }
        if self.data > self.length {
            return Err(ImportError::TooMuch(self.length));
        }
        Ok(())
    }
}

/// Makes a template of what comes, until its end. Blocks. Its checksum, and what it takes on disk.
///
/// # Errors
/// Any [`TemplateError`]; there is no template then.
pub fn import(images: &Path, header: Header, mut parts: Receiver<Part>) -> Result<(Digest, Bytes), TemplateError> {
    let making = Making::begin(images, header.template)?;
    let path = making.rootfs();
    let failed = |doing, source| FileError::new(doing, &path, source);
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
    let file = made.map_err(|source| failed("making", source))?;
    file.set_len(header.length)
        .map_err(|source| failed("extending", source))?;
    let expected = receive(&file, &path, &header, &mut parts)?;
    file.sync_all().map_err(|source| failed("syncing", source))?;
    // Read again from there: what is recorded is what is stored.
    let sums = making.sums()?;
    let found = sums.rootfs.digest.clone();
    if let Some(expected) = expected
        && expected != found
    {
        return Err(ImportError::Differs { expected, found }.into());
    }
    let size = making.finish(&TemplateFile::new(header.name, None, sums))?;
    Ok((found, size))
}

fn receive(
    file: &File,
    path: &Path,
    header: &Header,
    parts: &mut Receiver<Part>,
) -> Result<Option<Digest>, TemplateError> {
    let (mut at, mut taken, mut dirty) = (0, 0, 0);
    loop {
        let (offset, bytes) = match parts.blocking_recv() {
            None => return Err(ImportError::BrokenOff.into()),
            Some(Part::End(digest)) => return Ok(digest),
            Some(Part::Piece(offset, bytes)) => (offset, bytes),
        };
        let (size, length) = (bytes.len(), bytes.len() as u64);
        let is_good = (1..=MAX_PIECE).contains(&size)
            && offset.is_multiple_of(BLOCK)
            && length.is_multiple_of(BLOCK)
            && offset >= at
            && offset.checked_add(length).is_some_and(|end| end <= header.length);
        if !is_good {
            return Err(ImportError::Piece { offset, size }.into());
        }
        taken += length;
        if taken > header.data {
            return Err(ImportError::TooMuch(header.data).into());
        }
        let failed = |source| FileError::new("writing", path, source);
        file.write_all_at(&bytes, offset).map_err(failed)?;
        at = offset + length;
        dirty += length;
        if dirty >= WINDOW {
            file.sync_data().map_err(failed)?;
            dirty = 0;
        }
    }
}

impl Sums {
    /// Sums that no file has.
    #[cfg(test)]
    pub(crate) fn sample() -> Self {
        Self {
            rootfs: super::Sum {
                length: Bytes(BLOCK),
                digest: format!("sha256-1m:{}", "0".repeat(64)).parse().expect("a digest"),
            },
            memory: None,
        }
    }
}
