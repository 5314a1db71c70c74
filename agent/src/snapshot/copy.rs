//! Copies of large files that stay sparse, and do not fill the page cache on their way.

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use roost_common::units::Bytes;
use rustix::fs::{Advice, FallocateFlags, SeekFrom, copy_file_range, fadvise, fallocate, ioctl_ficlone, seek};
use rustix::io::Errno;

use super::manifest::{Files, Manifest};
use super::{MEMORY, PRIVATE, SHARED, STATE, SnapshotDir, SnapshotError, Unkept, allocated, check_length};
use crate::errors::{Chain, FileError};

/// How much is read at a time.
const BUFFER: usize = 1 << 20;
/// What is all zeros in this unit, the guest's page and the usual block, becomes a hole.
const BLOCK: usize = 4096;
/// How much may be dirty in the page cache, and how much read ahead stays there.
const WINDOW: u64 = 32 << 20;

/// How long a copy of memory may take at least. The limit is heeded by the copy itself and not by who waits for it: a copy that nobody
/// waits for would go on, and so would everything that must come behind it.
const COPY_LEAST: Duration = Duration::from_secs(120);
/// And for each MiB of memory: a slow disk, shared by others that do the same.
const COPY_PER_MEBIBYTE: Duration = Duration::from_millis(50);

/// Copies a file to a new one that is ours alone (0600) and on disk: as a reflink where the filesystem can, else extent by extent,
/// so that holes stay holes. Returns what the copy takes on disk. Moves the position of `from`.
///
/// # Errors
/// [`FileError`] naming the copy, or its source, also where it is not done `until` then; there is no copy then. The length is the
/// one that `from` had at first.
pub fn copy_sparse(from: &File, to: &Path, until: Instant) -> Result<Bytes, FileError> {
    fill(to, |file| {
        // Whatever speaks against it, the copy below says so if it matters.
        if ioctl_ficlone(file, from).is_ok() {
            return Ok(());
        }
        let reading = |source| FileError::new("reading the source of", to, source);
        let length = from.metadata().map_err(reading)?.len();
        file.set_len(length)
            .map_err(|error| FileError::new("extending", to, error))?;
        copy_extents(Way::Kernel, &mut Pace::new(from, file, to), length, until)
    })
}

/// Copies the memory of a generation with this manifest into a directory, for VMs of its group to read. The copy.
pub(super) fn copy_memory(memory: &File, manifest: &Manifest, to: &SnapshotDir) -> Result<File, SnapshotError> {
    let limit = COPY_LEAST + COPY_PER_MEBIBYTE * manifest.about.size.memory.0;
    copy_sparse(memory, &to.path.join(MEMORY), Instant::now() + limit)?;
    let copied = to.open_regular(MEMORY)?;
    copied
        .set_permissions(PermissionsExt::from_mode(SHARED))
        .map_err(|error| to.error("opening to the group", MEMORY, error))?;
    Ok(copied)
}

/// Copies a sealed generation to a new one, ours altogether, checked against its manifest on the way. Returns the copy's manifest.
///
/// # Errors
/// Any [`SnapshotError`]; nothing of `to` stays.
pub fn copy_generation(from: &Path, to: &Path) -> Result<Manifest, SnapshotError> {
    let from = SnapshotDir::open(from)?;
    let manifest = Manifest::read_in(&from)?;
    let (state, memory) = manifest.open_verified(&from)?;
    let unkept = Unkept::make(to)?;
    let dir = &unkept.dir;
    let inspect = |file: &File, name| file.metadata().map_err(|error| dir.error("inspecting", name, error));
    let written = dir.write_new(STATE, SHARED, &state)?;
    let copied = copy_memory(&memory, &manifest, dir)?;
    let (written, copied) = (inspect(&written, STATE)?, inspect(&copied, MEMORY)?);
    let length = manifest.files.memory.length;
    check_length(MEMORY, copied.len(), length.0..=length.0)?;
    let files = Files::new(&state, allocated(&written), length, allocated(&copied));
    let manifest = Manifest::new(manifest.about, files);
    unkept.keep(&manifest)?;
    Ok(manifest)
}

/// Copies the first `size` bytes of a disk to a new file that is ours alone (0600), sparse wherever the disk has zeros, and on
/// disk. Returns what the file takes there. What it has read, and nothing else, is dropped from the device's page cache.
///
/// # Errors
/// [`FileError`] naming the file, also when the disk is shorter or cannot be read; there is no file then.
pub fn flatten(device: &File, size: Bytes, to: &Path) -> Result<Bytes, FileError> {
    fill(to, |file| {
        file.set_len(size.0)
            .map_err(|error| FileError::new("extending", to, error))?;
        let mut pace = Pace::new(device, file, to);
        let mut buffer = vec![0; BUFFER];
        let mut at = 0;
        while at < size.0 {
            let chunk = &mut buffer[..clamp(size.0 - at, BUFFER)];
            device
                .read_exact_at(chunk, at)
                .map_err(|error| FileError::new("reading the disk for", to, error))?;
            for (start, end) in nonzero(chunk) {
                file.write_all_at(&chunk[start..end], at + start as u64)
                    .map_err(|error| FileError::new("writing", to, error))?;
            }
            at += chunk.len() as u64;
            pace.reached(at)?;
        }
        Ok(())
    })
}

/// Makes a file, has it filled, and brings it to disk; without success there is none.
fn fill(to: &Path, work: impl FnOnce(&File) -> Result<(), FileError>) -> Result<Bytes, FileError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(PRIVATE)
        .open(to)
        .map_err(|error| FileError::new("making", to, error))?;
    let outcome = work(&file).and_then(|()| {
        file.sync_all()
            .and_then(|()| file.metadata())
            .map_err(|error| FileError::new("syncing", to, error))
    });
    if outcome.is_err()
        && let Err(error) = std::fs::remove_file(to)
    {
        let error = FileError::new("removing", to, error);
        tracing::error!(error = %Chain(&error), "half a copy stays; the next start removes it");
    }
    outcome.map(|metadata| allocated(&metadata))
}

/// Brings what has been written to disk window by window, and drops both files' windows from the page cache.
struct Pace<'a> {
    from: &'a File,
    to: &'a File,
    path: &'a Path,
    start: u64,
}

impl<'a> Pace<'a> {
    fn new(from: &'a File, to: &'a File, path: &'a Path) -> Self {
        Self {
            from,
            to,
            path,
            start: 0,
        }
    }

    /// Everything before `at` has been read and written.
    fn reached(&mut self, at: u64) -> Result<(), FileError> {
        let done = at - self.start;
        if done < WINDOW {
            return Ok(());
        }
        self.to
            .sync_data()
            .map_err(|error| FileError::new("writing", self.path, error))?;
        for file in [self.from, self.to] {
            // Advice: where it is not taken, only memory is.
            fadvise(file, self.start, NonZeroU64::new(done), Advice::DontNeed).ok();
        }
        self.start = at;
        Ok(())
    }
}

/// The next extent with data at or behind `at`. A filesystem without holes has one extent.
pub(crate) fn next_data(file: &File, at: u64, length: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= length {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        // Nothing but a hole.
        Err(Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    if start >= length {
        return Ok(None);
    }
    let end = seek(file, SeekFrom::Hole(start))?;
    Ok(Some((start, end.min(length))))
}

/// How bytes get from one file to another.
enum Way {
    /// `copy_file_range`, which not every pair of filesystems can.
    Kernel,
    /// Through here.
    Buffer(Vec<u8>),
}

fn copy_extents(mut way: Way, pace: &mut Pace<'_>, length: u64, until: Instant) -> Result<(), FileError> {
    let reading = |source| FileError::new("reading the source of", pace.path, source);
    let mut at = 0;
    while let Some((start, end)) = next_data(pace.from, at, length).map_err(reading)? {
        at = start;
        while at < end {
            if Instant::now() >= until {
                return Err(FileError::new("copying to", pace.path, io::ErrorKind::TimedOut.into()));
            }
            at += copy_some(&mut way, pace, at, clamp(end - at, BUFFER))?;
            pace.reached(at)?;
        }
    }
    Ok(())
}

/// Copies at most `length` bytes at `at`, and returns how many: none when the next call is to go another way.
fn copy_some(way: &mut Way, pace: &Pace<'_>, at: u64, length: usize) -> Result<u64, FileError> {
    let failed = |doing, source| FileError::new(doing, pace.path, source);
    match way {
        Way::Kernel => match copy_file_range(pace.from, Some(&mut { at }), pace.to, Some(&mut { at }), length) {
            // The source has become shorter.
            Ok(0) => Err(failed("copying to", io::ErrorKind::UnexpectedEof.into())),
            Ok(copied) => Ok(copied as u64),
            // Not between these two.
            Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS | Errno::PERM) => {
                *way = Way::Buffer(vec![0; BUFFER]);
                Ok(0)
            }
            Err(errno) => Err(failed("copying to", errno.into())),
        },
        Way::Buffer(buffer) => {
            let chunk = &mut buffer[..length];
            pace.from
                .read_exact_at(chunk, at)
                .map_err(|error| failed("reading the source of", error))?;
            pace.to
                .write_all_at(chunk, at)
                .map_err(|error| failed("writing", error))?;
            Ok(length as u64)
        }
    }
}

/// Runs of blocks that are not all zeros, as ranges of bytes.
pub(crate) fn nonzero(chunk: &[u8]) -> Vec<(usize, usize)> {
    const ZEROS: [u8; BLOCK] = [0; BLOCK];
    let mut runs: Vec<(usize, usize)> = Vec::new();
    let mut start = 0;
    for block in chunk.chunks(BLOCK) {
        let end = start + block.len();
        if block != &ZEROS[..block.len()] {
            match runs.last_mut() {
                Some(last) if last.1 == start => last.1 = end,
                Some(_) | None => runs.push((start, end)),
            }
        }
        start = end;
    }
    runs
}

/// The shortest run of zeros that becomes a hole. Shorter ones would make a file of many small extents, each of which is a read more.
const RUN: u64 = 16 << 10;

/// Makes holes of what is all zeros in the first `length` bytes of a file that is open to read and write; its content stays the same.
/// Where the filesystem does not want to, it takes the room that it takes. Moves the position.
///
/// # Errors
/// When it cannot be read.
pub(super) fn punch_zeros(file: &File, length: u64) -> io::Result<()> {
    // Less than what an allocator keeps for the next time, on every thread that does this.
    let mut buffer = vec![0; BUFFER / 16];
    let mut at = 0;
    while let Some((start, end)) = next_data(file, at, length)? {
        // Where the run of zeros begins that goes on up to `at`.
        let mut zeros = start;
        at = start;
        while at < end {
            let most = buffer.len();
            let chunk = &mut buffer[..clamp(end - at, most)];
            file.read_exact_at(chunk, at)?;
            for (from, to) in nonzero(chunk) {
                if !punch(file, zeros, at + from as u64) {
                    return Ok(());
                }
                zeros = at + to as u64;
            }
            at += chunk.len() as u64;
        }
        if !punch(file, zeros, end) {
            return Ok(());
        }
    }
    Ok(())
}

/// Makes a hole, where it is worth one. Whether it makes sense to go on.
fn punch(file: &File, start: u64, end: u64) -> bool {
    let length = end - start;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    length < RUN || fallocate(file, flags, start, length).is_ok()
}

fn clamp(length: u64, most: usize) -> usize {
    usize::try_from(length).map_or(most, |length| length.min(most))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::snapshot::manifest::tests::about;
    use crate::snapshot::seal::tests::Attempt;
    use crate::snapshot::{CONFIG, MANIFEST};

    /// 64 MiB with a page at 1 MiB, 40 MiB dense from 16 MiB on, and the last three sectors.
    fn sample(dir: &Path) -> File {
        let path = dir.join("from");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .expect("made");
        file.set_len((64 << 20) + 512 * 3).expect("extended");
        file.write_all_at(&[1; BLOCK], 1 << 20).expect("written");
        let dense: Vec<u8> = (0..40u32 << 20).map(|at| at.to_le_bytes()[1] | 1).collect();
        file.write_all_at(&dense, 16 << 20).expect("written");
        file.write_all_at(&[3; 512 * 3], 64 << 20).expect("written");
        file
    }

    /// None of these copies takes that long.
    fn late() -> Instant {
        Instant::now() + Duration::from_secs(600)
    }

    fn content(file: &File) -> Vec<u8> {
        let mut content = vec![0; usize::try_from(file.metadata().expect("metadata").len()).expect("small")];
        file.read_exact_at(&mut content, 0).expect("read");
        content
    }

    #[test]
    fn a_copy_is_equal_and_as_sparse() {
        let dir = tempfile::tempdir().expect("a directory");
        let from = sample(dir.path());
        let to = dir.path().join("to");
        let taken = copy_sparse(&from, &to, late()).expect("copied");
        let copy = File::open(&to).expect("opened");
        assert!(content(&copy) == content(&from), "another content");
        let metadata = copy.metadata().expect("metadata");
        assert_eq!(metadata.blocks() * 512, taken.0);
        assert!(taken.0 < 42 << 20, "{taken} for 40 MiB of data");
        assert_eq!(metadata.mode() & 0o7777, 0o600);
    }

    #[test]
    fn a_copy_is_the_same_whichever_way_it_goes() {
        let dir = tempfile::tempdir().expect("a directory");
        let from = sample(dir.path());
        let length = from.metadata().expect("metadata").len();
        for way in [Way::Kernel, Way::Buffer(vec![0; BUFFER])] {
            let copy = tempfile::tempfile_in(dir.path()).expect("made");
            copy.set_len(length).expect("extended");
            copy_extents(way, &mut Pace::new(&from, &copy, dir.path()), length, late()).expect("copied");
            assert!(content(&copy) == content(&from), "another content");
            assert!(copy.metadata().expect("metadata").blocks() * 512 < 42 << 20);
        }
    }

    #[test]
    fn a_copy_that_takes_too_long_is_none() {
        let dir = tempfile::tempdir().expect("a directory");
        let from = sample(dir.path());
        let length = from.metadata().expect("metadata").len();
        let to = dir.path().join("to");
        let copied = fill(&to, |file| {
            copy_extents(Way::Kernel, &mut Pace::new(&from, file, &to), length, Instant::now())
        });
        assert_eq!(copied.expect_err("late").source.kind(), io::ErrorKind::TimedOut);
        assert!(!to.exists());
    }

    #[test]
    fn a_file_that_is_one_hole_or_empty_is_copied() {
        let dir = tempfile::tempdir().expect("a directory");
        for length in [0, 1, 1 << 30] {
            let from = tempfile::tempfile_in(dir.path()).expect("made");
            from.set_len(length).expect("extended");
            let to = dir.path().join(format!("to-{length}"));
            copy_sparse(&from, &to, late()).expect("copied");
            let metadata = fs::metadata(&to).expect("there");
            assert_eq!((metadata.len(), metadata.blocks()), (length, 0));
        }
    }

    #[test]
    fn nothing_that_exists_is_written_over() {
        let dir = tempfile::tempdir().expect("a directory");
        let from = sample(dir.path());
        let to = dir.path().join("to");
        fs::write(&to, "keep").expect("written");
        for error in [copy_sparse(&from, &to, late()), flatten(&from, Bytes(4096), &to)] {
            let error = error.expect_err("it exists");
            assert_eq!(error.doing, "making");
        }
        assert_eq!(fs::read_to_string(&to).expect("read"), "keep");
    }

    #[test]
    fn a_flat_disk_has_holes_where_the_device_has_zeros() {
        let dir = tempfile::tempdir().expect("a directory");
        let device = tempfile::tempfile_in(dir.path()).expect("made");
        let size = (16 << 20) + 512 * 3;
        device.write_all_at(&vec![0; size], 0).expect("allocated");
        for at in [0, BUFFER - 1, 5 * BLOCK, size - 1] {
            device.write_all_at(&[9], at as u64).expect("written");
        }
        let to = dir.path().join("rootfs.ext4");
        let taken = flatten(&device, Bytes(size as u64), &to).expect("flattened");
        let flat = File::open(&to).expect("opened");
        assert!(content(&flat) == content(&device), "another content");
        assert_eq!(flat.metadata().expect("metadata").blocks() * 512, taken.0);
        assert!(taken.0 <= 8 * BLOCK as u64, "{taken} for four blocks");
    }

    #[test]
    fn a_disk_longer_than_a_window_is_whole() {
        let dir = tempfile::tempdir().expect("a directory");
        let device = sample(dir.path());
        let to = dir.path().join("rootfs.ext4");
        let size = device.metadata().expect("metadata").len();
        flatten(&device, Bytes(size), &to).expect("flattened");
        assert!(
            content(&File::open(&to).expect("opened")) == content(&device),
            "another content"
        );
    }

    #[test]
    fn a_disk_that_is_too_short_leaves_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let device = sample(dir.path());
        let to = dir.path().join("rootfs.ext4");
        let error = flatten(&device, Bytes(1 << 30), &to).expect_err("too short");
        assert_eq!(error.doing, "reading the disk for");
        assert!(!to.exists());
    }

    #[test]
    fn only_blocks_with_something_in_them_are_runs() {
        let mut chunk = vec![0; 5 * BLOCK + 100];
        assert_eq!(nonzero(&chunk), []);
        chunk[BLOCK] = 1;
        chunk[3 * BLOCK - 1] = 1;
        chunk[5 * BLOCK + 99] = 1;
        assert_eq!(nonzero(&chunk), [(BLOCK, 3 * BLOCK), (5 * BLOCK, 5 * BLOCK + 100)]);
    }

    #[test]
    fn a_copied_generation_is_a_generation() {
        let attempt = Attempt::new();
        let sealed = attempt.seal().expect("sealed");
        fs::write(attempt.generation.join(CONFIG), "{}").expect("written");
        let to = attempt.vm.join("3");
        let copied = copy_generation(&attempt.generation, &to).expect("copied");
        assert_eq!(copied.about, about());
        assert_eq!(copied.files.state.sha256, sealed.files.state.sha256);
        assert!(copied.files.memory.allocated < Bytes(1 << 20), "holes stay holes");
        assert_eq!(Manifest::read(&to).expect("read"), copied);
        copied.verify(&to).expect("whole");
        let mode = |name: &str| fs::metadata(to.join(name)).expect("there").mode() & 0o7777;
        assert_eq!(
            [mode(""), mode(STATE), mode(MEMORY), mode(MANIFEST)],
            [0o700, 0o640, 0o640, 0o600]
        );
        assert!(!to.join(CONFIG).exists());
        assert!(matches!(
            copy_generation(&attempt.generation, &to),
            Err(SnapshotError::File(_))
        ));
        copied.verify(&to).expect("still whole");
    }

    #[test]
    fn a_generation_that_is_not_as_sealed_is_not_copied() {
        let attempt = Attempt::new();
        attempt.seal().expect("sealed");
        fs::write(attempt.generation.join(STATE), "{}").expect("written");
        let to = attempt.vm.join("3");
        assert!(copy_generation(&attempt.generation, &to).is_err());
        assert!(!to.exists());
    }
}
