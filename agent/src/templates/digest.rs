//! Checksums of large files that are mostly holes.
//!
//! ```text
//! sha256-1m:<hex>  =  SHA-256 of (SHA-256 of MiB 0 || SHA-256 of MiB 1 || ... || SHA-256 of what is left)
//! ```
//!
//! Not the plain SHA-256 of the file: that would have to go through all zeros of a disk of many GiB, where this knows the sum of a MiB of
//! zeros and does not read what is a hole. Not fs-verity: it is a feature that the host's filesystem was made with, or was not, and an ioctl,
//! of which the agent makes none.
//!
//! ```sh
//! split --bytes=1M --filter='sha256sum | cut -c-64 | xxd -r -p' rootfs.ext4 | sha256sum     # the same by hand
//! ```

use std::fmt;
use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt as _;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};

use ring::digest::{Context, SHA256, digest};
use rustix::fs::{Advice, fadvise};
use serde::{Deserialize, Serialize};

use crate::snapshot::copy::{next_data, nonzero};

/// Bytes of a piece.
pub(crate) const PIECE: usize = 1 << 20;
/// How much of what was read stays in the page cache.
const WINDOW: u64 = 32 << 20;
const PREFIX: &str = "sha256-1m:";

/// A checksum, as it is written: `sha256-1m:` and 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

/// A text that is no such checksum.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no checksum of the form sha256-1m:<64 hexadecimal digits>")]
pub struct BadDigest(String);

impl FromStr for Digest {
    type Err = BadDigest;

    fn from_str(text: &str) -> Result<Self, BadDigest> {
        let hex = text.strip_prefix(PREFIX).unwrap_or_default();
        if hex.len() == 64 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            Ok(Self(text.to_owned()))
        } else {
            Err(BadDigest(text.chars().take(100).collect()))
        }
    }
}

impl TryFrom<String> for Digest {
    type Error = BadDigest;

    fn try_from(text: String) -> Result<Self, BadDigest> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A file that was read to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Read {
    pub(crate) digest: Digest,
    /// Its length.
    pub(crate) length: u64,
    /// Bytes that were read; holes are not.
    pub(crate) read: u64,
    /// Bytes in blocks that are not all zeros.
    pub(crate) data: u64,
}

/// Reads a file. `seen` is called with what has been come to, and ends it by `false`.
///
/// # Errors
/// The kernel's; [`io::ErrorKind::Interrupted`] where `seen` ended it.
pub(crate) fn read(file: &File, mut seen: impl FnMut(u64) -> bool) -> io::Result<Read> {
    let length = file.metadata()?.len();
    let zeros = digest(&SHA256, &vec![0; PIECE]);
    let mut sum = Context::new(&SHA256);
    let mut buffer = vec![0; PIECE];
    let (mut at, mut read, mut data, mut kept) = (0, 0, 0, 0);
    let mut next = next_data(file, 0, length)?;
    while at < length {
        let some = usize::try_from(length - at).map_or(PIECE, |rest| rest.min(PIECE));
        let end = at + some as u64;
        let piece = &mut buffer[..some];
        if next.is_some_and(|(start, _)| start < end) {
            file.read_exact_at(piece, at)?;
            read += some as u64;
        } else {
            piece.fill(0);
        }
        let blocks: usize = nonzero(piece).iter().map(|(start, end)| end - start).sum();
        data += blocks as u64;
        if blocks == 0 && some == PIECE {
            sum.update(zeros.as_ref());
        } else {
            sum.update(digest(&SHA256, piece).as_ref());
        }
        at = end;
        if next.is_some_and(|(_, until)| until <= at) {
            next = next_data(file, at, length)?;
        }
        if at - kept >= WINDOW {
            // Advice: where it is not taken, only memory is.
            fadvise(file, kept, NonZeroU64::new(at - kept), Advice::DontNeed).ok();
            kept = at;
        }
        if !seen(at) {
            return Err(io::ErrorKind::Interrupted.into());
        }
    }
    let hex: String = sum.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Read {
        digest: Digest(format!("{PREFIX}{hex}")),
        length,
        read,
        data,
    })
}

/// Whoever reads on as long as nobody has said stop.
pub(crate) fn until(stop: &AtomicBool) -> impl FnMut(u64) -> bool + '_ {
    |_| !stop.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn naive(content: &[u8]) -> String {
        let sums = content
            .chunks(PIECE)
            .flat_map(|piece| digest(&SHA256, piece).as_ref().to_vec());
        let sum = digest(&SHA256, &sums.collect::<Vec<_>>());
        let hex = sum.as_ref().iter().map(|byte| format!("{byte:02x}"));
        format!("{PREFIX}{}", hex.collect::<String>())
    }

    #[test]
    fn a_sum_is_of_the_content_wherever_its_holes_are() {
        let dir = tempfile::tempdir().expect("a directory");
        for (length, at) in [
            (0, vec![]),
            (1, vec![0]),
            (PIECE, vec![]),
            (3 * PIECE + 5, vec![PIECE, 3 * PIECE + 4]),
            (5 * PIECE, vec![PIECE - 1, 4 * PIECE]),
            (5 * PIECE + 4096, vec![]),
        ] {
            let mut content = vec![0; length];
            at.iter().for_each(|at| content[*at] = 7);
            let sparse = tempfile::tempfile_in(dir.path()).expect("made");
            sparse.set_len(length as u64).expect("extended");
            at.iter()
                .for_each(|at| sparse.write_all_at(&[7], *at as u64).expect("written"));
            let dense = tempfile::tempfile_in(dir.path()).expect("made");
            dense.write_all_at(&content, 0).expect("written");
            for file in [&sparse, &dense] {
                let read = read(file, |_| true).expect("read");
                assert_eq!(read.digest.to_string(), naive(&content), "{length} {at:?}");
                assert_eq!(read.length, length as u64);
                assert!(read.data >= at.len().min(1) as u64 && read.data <= 4096 * at.len() as u64);
            }
            let read = read(&sparse, |_| true).expect("read");
            assert!(read.read <= (at.len() * PIECE) as u64, "holes were read: {read:?}");
        }
    }

    #[test]
    fn reading_ends_when_it_is_told_to() {
        let file = tempfile::tempfile().expect("made");
        file.set_len(5 << 20).expect("extended");
        let stop = AtomicBool::new(true);
        let error = read(&file, until(&stop)).expect_err("stopped");
        assert_eq!(error.kind(), io::ErrorKind::Interrupted);
    }

    #[test]
    fn only_what_looks_like_a_sum_is_one() {
        let hex = "0123456789abcdef".repeat(4);
        assert!(format!("{PREFIX}{hex}").parse::<Digest>().is_ok());
        for bad in [
            String::new(),
            hex.clone(),
            format!("sha256:{hex}"),
            format!("{PREFIX}{}", &hex[1..]),
            format!("{PREFIX}{}", hex.to_uppercase()),
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }
}
