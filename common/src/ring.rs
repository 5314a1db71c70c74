//! The bounded files in which a shim keeps what its VMM writes: the newest [`RING_BYTES`] of an endless stream.
//!
//! ```text
//! 0         8                    16                                         16 + RING_BYTES
//! +---------+--------------------+------------------------------------------+
//! | MAGIC   | total, u64 LE      | byte i of the stream at i % RING_BYTES    |
//! +---------+--------------------+------------------------------------------+
//! ```
//!
//! `total` counts every byte ever written, so it orders the data. One process writes: first data, at most [`MAX_WRITE`] at once,
//! then `total`. Whoever reads meanwhile therefore never trusts the [`MAX_WRITE`] oldest bytes of a ring that has wrapped.
//! Not here: the writer (the shim), what the bytes mean (a guest wrote them).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// First bytes of a ring file.
pub const MAGIC: [u8; 8] = *b"ROOSTRNG";
/// Bytes before the data: [`MAGIC`] and `total`.
pub const HEADER_BYTES: u64 = 16;
/// Most bytes of the stream that a ring holds.
pub const RING_BYTES: u64 = 256 * 1024;
/// Most bytes that a writer writes before it counts them in `total`.
pub const MAX_WRITE: usize = 64 * 1024;

/// The newest bytes of the stream, oldest first, at most `limit`; at least `RING_BYTES - MAX_WRITE` are to be had once that
/// many have been written.
///
/// # Errors
/// `InvalidData` where the file is no ring, `UnexpectedEof` where it is shorter than it says, and those of reading.
pub fn read(file: &File, limit: usize) -> io::Result<Vec<u8>> {
    let before = total(file)?;
    let length = before.min(RING_BYTES).min(limit as u64);
    let start = before - length;
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    let place = start % RING_BYTES;
    let unwrapped = usize::try_from((RING_BYTES - place).min(length)).unwrap_or(0);
    let (head, tail) = bytes.split_at_mut(unwrapped);
    file.read_exact_at(head, HEADER_BYTES + place)?;
    file.read_exact_at(tail, HEADER_BYTES)?;
    // What a writer may have overwritten since `before` was read, or is overwriting now.
    let oldest = total(file)?.saturating_add(MAX_WRITE as u64).saturating_sub(RING_BYTES);
    let stale = oldest.saturating_sub(start).min(length);
    bytes.drain(..usize::try_from(stale).unwrap_or(0));
    Ok(bytes)
}

/// How many bytes have ever been written.
fn total(file: &File) -> io::Result<u64> {
    let mut header = [0; HEADER_BYTES as usize];
    file.read_exact_at(&mut header, 0)?;
    match header.split_first_chunk::<8>() {
        Some((magic, total)) if *magic == MAGIC => Ok(u64::from_le_bytes(total.try_into().unwrap_or_default())),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A ring as a writer leaves it after `total` bytes of a stream in which byte i is `i % 251`.
    fn ring(total: u64) -> File {
        let path = std::env::temp_dir().join(format!("roost-ring-{}-{total}", std::process::id()));
        let file = File::options()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .open(&path)
            .expect("opened");
        std::fs::remove_file(path).expect("unlinked");
        let mut data = vec![0; total.min(RING_BYTES) as usize];
        for position in total.saturating_sub(RING_BYTES)..total {
            data[(position % RING_BYTES) as usize] = (position % 251) as u8;
        }
        file.write_all_at(&MAGIC, 0).expect("written");
        file.write_all_at(&total.to_le_bytes(), 8).expect("written");
        file.write_all_at(&data, HEADER_BYTES).expect("written");
        file
    }

    #[test]
    fn a_ring_is_read_in_order_wherever_it_stands() {
        for total in [
            0,
            1,
            1000,
            RING_BYTES - 1,
            RING_BYTES,
            RING_BYTES + 1,
            3 * RING_BYTES + 77,
        ] {
            for limit in [0, 1, 500, RING_BYTES as usize, usize::MAX] {
                let got = read(&ring(total), limit).expect("read");
                let wanted: Vec<u8> = (total - got.len() as u64..total).map(|i| (i % 251) as u8).collect();
                assert_eq!(got, wanted, "total {total}, limit {limit}");
                let least = total.min(RING_BYTES - MAX_WRITE as u64).min(limit as u64);
                assert!(got.len() as u64 >= least, "total {total}, limit {limit}: {}", got.len());
            }
        }
    }

    #[test]
    fn what_is_no_ring_is_an_error_and_an_absurd_total_is_harmless() {
        let file = ring(10);
        file.write_all_at(b"X", 0).expect("written");
        assert_eq!(
            read(&file, 10).expect_err("not a ring").kind(),
            io::ErrorKind::InvalidData
        );
        file.set_len(3).expect("cut");
        assert!(read(&file, 10).is_err());
        let absurd = ring(10);
        absurd.write_all_at(&[0xff; 8], 8).expect("written");
        assert_eq!(
            read(&absurd, 100).expect_err("shorter than it says").kind(),
            io::ErrorKind::UnexpectedEof
        );
    }
}
