//! Writes the rings of `roost_common::ring`: bounded on disk, and never in the way of the VMM.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;

use roost_common::ring::{HEADER_BYTES, MAGIC, MAX_WRITE, RING_BYTES, read};

/// The newest bytes of one stream.
pub(crate) struct Ring {
    file: File,
    total: u64,
}

impl Ring {
    /// Makes an empty ring; what is there already is in the way. Everybody may read it whom the directory lets in.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create_new(true).open(path)?;
        file.set_permissions(Permissions::from_mode(0o644))?;
        let ring = Self { file, total: 0 };
        ring.file.write_all_at(&MAGIC, 0)?;
        ring.write_total()?;
        Ok(ring)
    }

    /// Appends bytes. They count even where they could not be written (a full file system), or later ones would be out of place.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut outcome = Ok(());
        for piece in bytes.chunks(MAX_WRITE) {
            outcome = self.write_data(piece).and(outcome);
            self.total += piece.len() as u64;
            outcome = self.write_total().and(outcome);
        }
        outcome
    }

    /// The newest bytes, at most `limit`; empty where they cannot be read.
    pub(crate) fn tail(&self, limit: usize) -> Vec<u8> {
        read(&self.file, limit).unwrap_or_default()
    }

    fn write_data(&self, piece: &[u8]) -> io::Result<()> {
        let place = self.total % RING_BYTES;
        let unwrapped = usize::try_from(RING_BYTES - place).unwrap_or(usize::MAX);
        let (head, tail) = piece.split_at(unwrapped.min(piece.len()));
        self.file.write_all_at(head, HEADER_BYTES + place)?;
        self.file.write_all_at(tail, HEADER_BYTES)
    }

    fn write_total(&self) -> io::Result<()> {
        self.file.write_all_at(&self.total.to_le_bytes(), MAGIC.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_keeps_the_newest_bytes_in_order_and_never_grows() {
        let path = std::env::temp_dir().join(format!("roost-shim-ring-{}", std::process::id()));
        let mut ring = Ring::create(&path).expect("created");
        assert!(Ring::create(&path).is_err(), "an existing ring was taken over");
        let stream: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
        let mut written = 0;
        for (turn, size) in [1, 65_536, 7, 100_000, 4096].into_iter().cycle().enumerate() {
            let next = (written + size).min(stream.len());
            ring.append(&stream[written..next]).expect("appended");
            written = next;
            let tail = ring.tail(16 * 1024);
            assert_eq!(tail, stream[written - tail.len()..written], "turn {turn}");
            assert!(tail.len() == written.min(16 * 1024));
            assert!(ring.file.metadata().expect("metadata").len() <= HEADER_BYTES + RING_BYTES);
            if written == stream.len() {
                break;
            }
        }
        std::fs::remove_file(path).expect("removed");
    }
}
