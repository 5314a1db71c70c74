//! `POST /snapshot/prepare`: a snapshot should find the disk written and the memory free of what the disk has too.

use std::sync::Mutex;
use std::time::{Duration, Instant};
use std::{fs, io};

use nix::unistd::sync;
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::console::say;
use crate::filesystems::LIMIT;
use crate::metrics::meminfo;
use crate::sys::Blank;

/// How much memory is zeroed between two looks at what is free.
const PIECE: usize = 4 << 20;
/// The part of what is free that is left alone, so that nobody else runs out of memory meanwhile.
const LEFT: u64 = 8;
/// For how long free memory is zeroed: what it saves is written to a disk and read back.
const ZERO_LIMIT: Duration = Duration::from_secs(1);

/// The last run. Calls that come while it is under way wait for it: two would do the work twice, and on a slow disk calls
/// that are given up and repeated would take all threads.
#[derive(Default)]
pub(crate) struct Settling(Mutex<Option<Run>>);

/// Under way as long as the sender lives, which the thread that works has.
type Run = watch::Receiver<()>;

/// The disk has not taken everything yet; it goes on.
#[derive(Debug, thiserror::Error)]
#[error("the disk took too long")]
pub(crate) struct Late;

impl Settling {
    /// Returns when everything is written and what is only cached is dropped.
    ///
    /// # Errors
    /// [`Late`], after [`LIMIT`].
    pub(crate) async fn settle(&self) -> Result<(), Late> {
        self.run(settle_machine).await
    }

    async fn run(&self, work: impl FnOnce() + Send + 'static) -> Result<(), Late> {
        let mut run = self.join(work);
        // Nothing is ever sent: the only news is the end.
        timeout(LIMIT, run.changed()).await.map_or(Err(Late), |_| Ok(()))
    }

    fn join(&self, work: impl FnOnce() + Send + 'static) -> Run {
        let mut last = self.0.lock().expect("no holder of a run panics");
        if let Some(run) = &*last
            && run.has_changed().is_ok()
        {
            return run.clone();
        }
        let (under_way, run) = watch::channel(());
        *last = Some(run.clone());
        spawn_blocking(move || {
            work();
            drop(under_way);
        });
        run
    }
}

fn settle_machine() {
    sync();
    let free = free_memory();
    // The clean page cache, after the sync has made it so. Free pages are reported to the host through the balloon and
    // become holes in the snapshot, so it is smaller, written and read faster, and what was cached is on the disk all the
    // same. Not dentries and inodes (2): they are few bytes, scattered over pages that stay in use.
    if let Err(error) = fs::write("/proc/sys/vm/drop_caches", "1") {
        say!("cannot drop the page cache: {error}");
    }
    let free_now = free_memory();
    let dropped = free_now.saturating_sub(free);
    // The kernel reports free pages in blocks of 2 MiB and two seconds later, which is too late for the snapshot of a pause that somebody
    // waits for. But pages of zeros are not kept in one either.
    if let Err(error) = zero(dropped.min(free_now.saturating_sub(free_now / LEFT))) {
        say!("free memory is not zeroed: {error}");
    }
}

/// Zeroes about as much of the free memory, by taking it from the kernel and giving it back: what has just become free is what the kernel
/// hands out first.
fn zero(length: u64) -> io::Result<()> {
    let length = usize::try_from(length).map_or(0, |length| length - length % PIECE);
    if length == 0 {
        return Ok(());
    }
    let blank = Blank::reserve(length)?;
    let began = Instant::now();
    for start in (0..length).step_by(PIECE) {
        // Others may have taken what was free.
        if began.elapsed() > ZERO_LIMIT || free_memory() < 2 * PIECE as u64 {
            break;
        }
        blank.fill(start, PIECE)?;
    }
    Ok(())
}

/// Bytes that the kernel has to give away.
fn free_memory() -> u64 {
    meminfo(&fs::read_to_string("/proc/meminfo").unwrap_or_default(), "MemFree")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::{Arc, mpsc};

    use super::*;

    #[test]
    fn nothing_is_filled_that_is_not_reserved() {
        let blank = Blank::reserve(PIECE).unwrap();
        blank.fill(0, PIECE).unwrap();
        for (start, length) in [(0, PIECE + 1), (PIECE, 1), (usize::MAX, 2)] {
            assert!(blank.fill(start, length).is_err(), "{length} bytes at {start}");
        }
        assert!(Blank::reserve(0).is_err());
        assert!(Blank::reserve(usize::MAX - PIECE).is_err());
        // Less than a piece is not worth it.
        for length in [0, PIECE as u64 - 1, 2 * PIECE as u64 + 1] {
            zero(length).unwrap();
        }
    }

    #[tokio::test]
    async fn a_call_that_comes_while_another_runs_waits_for_the_same() {
        let settling = Settling::default();
        let runs = Arc::new(AtomicU32::new(0));
        let (go, gate) = mpsc::channel::<()>();
        let count = |gate: Option<mpsc::Receiver<()>>| {
            let runs = Arc::clone(&runs);
            move || {
                if let Some(gate) = gate {
                    gate.recv().unwrap();
                }
                runs.fetch_add(1, Ordering::Relaxed);
            }
        };
        // A caller that leaves ends nothing.
        drop(settling.join(count(Some(gate))));
        // Before the first is let go: a future that nobody has asked yet would come too late.
        let mut second = settling.join(count(None));
        go.send(()).unwrap();
        second.changed().await.unwrap_err();
        assert_eq!(runs.load(Ordering::Relaxed), 1);
        settling.run(count(None)).await.unwrap();
        assert_eq!(runs.load(Ordering::Relaxed), 2, "one that has ended was waited for");
    }
}
