//! The files of memory snapshots. A VMM writes one into a directory made for that attempt, and that VMM may be hijacked; from
//! there on everything is ours.
//!
//! ```text
//! vm/<n>/  the VMM's: config.json  state.json  memory-ranges         (an attempt; thrown away)
//!              never read ---+         | parsed,      | moved by rename,
//!                                      v copied       v compared by inode
//! vm/<m>/  ours:                   state.json  memory-ranges  manifest.json      (a generation: [`seal`])
//!                                      |  checked against the manifest: [`Manifest::verify`], [`Manifest::fits`]
//!          + config.json from our record, for the VM that is to wake: [`write_config`]
//!
//! a template's snapshot/, a generation --[`share`]--> a sandbox's vm/1/: state.json copied, memory-ranges another name of the same file
//! ```
//!
//! Holds: files are opened relative to a directory's descriptor, without following links or waiting for a FIFO, and are used only
//! when they are regular and have one name, but for a template's memory, which nobody can write to; a generation is whole and durable, or
//! not there; nothing from a snapshot's text reaches a message of ours.
//! Not here: when to take a snapshot, what a record says of it, the VMM's API.
//!
//! Functions here block; callers put them on a blocking thread.

pub mod config;
pub mod copy;
pub mod cpu;
pub mod fit;
pub mod generations;
pub mod manifest;
pub mod seal;
pub mod share;
mod state;

use std::fs::{DirBuilder, File};
use std::io::{self, Read, Write};
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, fchmod};
use roost_common::units::Bytes;

pub use config::{RestoreConfig, write_config};
pub use copy::{copy_generation, copy_sparse, flatten};
pub use cpu::Cpu;
pub use fit::{HostFacts, Misfit};
pub use generations::{generations, next_number};
pub use manifest::{About, Devices, Manifest, MemoryFile, Size};
pub use seal::seal;
pub use share::{Shared, share};
pub use state::StateError;

use manifest::VERSION;

use crate::errors::{Chain, FileError};
use crate::host::files;

/// The state of vCPUs and devices.
pub const STATE: &str = "state.json";
/// The guest's memory.
pub const MEMORY: &str = roost_common::shim::MEMORY_FILE;
/// What a VMM is restored as.
pub const CONFIG: &str = "config.json";
/// What we know of the snapshot.
pub const MANIFEST: &str = "manifest.json";

/// Most names in a directory of a snapshot. A VMM writes three, and we one more.
const MAX_NAMES: usize = 64;
/// What a VM of the directory's group may do with a file: read it.
const SHARED: u32 = 0o640;
/// For a file that is ours alone.
const PRIVATE: u32 = 0o600;

/// Why a snapshot cannot be taken over, or used.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file operation.
    #[error(transparent)]
    File(#[from] FileError),
    /// A link, a FIFO, a directory, a device.
    #[error("{name} of the snapshot is no regular file")]
    NotRegular {
        /// Which file.
        name: &'static str,
    },
    /// Hard links: another name could be written through later.
    #[error("{name} of the snapshot has {links} names")]
    Linked {
        /// Which file.
        name: &'static str,
        /// How many.
        links: u64,
    },
    /// Too short, too long, or not what the rest of the snapshot says.
    #[error("{name} of the snapshot is {found} bytes long, not {} to {}", expected.start(), expected.end())]
    Length {
        /// Which file.
        name: &'static str,
        /// Its length.
        found: u64,
        /// What it may be.
        expected: RangeInclusive<u64>,
    },
    /// The state is not what a VMM writes.
    #[error("state.json cannot be used")]
    State(#[source] StateError),
    /// The state is that of a VM with other memory.
    #[error("state.json describes {found} of memory, not {expected}")]
    OtherMemory {
        /// What it describes.
        found: Bytes,
        /// What the VM has.
        expected: Bytes,
    },
    /// Another file took its place between the check and the move.
    #[error("{name} of the snapshot was exchanged while it was being taken over")]
    Exchanged {
        /// Which file.
        name: &'static str,
    },
    /// More than [`MAX_NAMES`].
    #[error("a directory of a snapshot holds more than {MAX_NAMES} names")]
    TooManyNames,
    /// Something that we never put there.
    #[error("the snapshot holds something that is not in its manifest: {name}")]
    Unexpected {
        /// Its name, escaped and cut short.
        name: String,
    },
    /// The content is not what was sealed.
    #[error("{name} of the snapshot does not have the checksum of its manifest")]
    Checksum {
        /// Which file.
        name: &'static str,
    },
    /// The manifest is none of ours.
    #[error("the manifest does not parse")]
    Manifest(#[source] serde_json::Error),
    /// Another version wrote the manifest.
    #[error("the manifest is of version {0}, not {VERSION}")]
    Version(u32),
}

/// An open directory of a snapshot, with the path for messages.
#[derive(Debug)]
struct SnapshotDir {
    path: PathBuf,
    fd: OwnedFd,
}

impl SnapshotDir {
    fn open(path: &Path) -> Result<Self, FileError> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = nix::fcntl::open(path, flags, Mode::empty())
            .map_err(|errno| FileError::new("opening", path, errno.into()))?;
        Ok(Self { path: path.into(), fd })
    }

    fn error(&self, doing: &'static str, name: &str, source: impl Into<io::Error>) -> FileError {
        FileError::new(doing, &self.path.join(name), source.into())
    }

    /// Opens a regular file with one name for reading. Whoever wrote it may still be writing.
    fn open_regular(&self, name: &'static str) -> Result<File, SnapshotError> {
        let file = self.open_named(name)?;
        let metadata = file.metadata().map_err(|error| self.error("inspecting", name, error))?;
        match metadata.nlink() {
            1 => Ok(file),
            links => Err(SnapshotError::Linked { name, links }),
        }
    }

    /// The same for a file that may have other names.
    fn open_named(&self, name: &'static str) -> Result<File, SnapshotError> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let file = match openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => File::from(fd),
            // A symbolic link, or a socket.
            Err(Errno::ELOOP | Errno::ENXIO) => return Err(SnapshotError::NotRegular { name }),
            Err(errno) => return Err(self.error("opening", name, errno).into()),
        };
        let metadata = file.metadata().map_err(|error| self.error("inspecting", name, error))?;
        if metadata.is_file() {
            Ok(file)
        } else {
            Err(SnapshotError::NotRegular { name })
        }
    }

    /// Reads a file whose length is within `expected`; what is returned was checked, whatever becomes of the file.
    fn read_bounded(&self, name: &'static str, expected: RangeInclusive<u64>) -> Result<Vec<u8>, SnapshotError> {
        let mut content = Vec::new();
        self.open_regular(name)?
            .take(expected.end() + 1)
            .read_to_end(&mut content)
            .map_err(|error| self.error("reading", name, error))?;
        check_length(name, content.len() as u64, expected)?;
        Ok(content)
    }

    /// Makes a file that is not there yet, with exactly this mode whatever the umask says, and its content on disk.
    fn write_new(&self, name: &str, mode: u32, content: &[u8]) -> Result<File, FileError> {
        let file = self.make(name, mode, content)?;
        file.sync_all().map_err(|error| self.error("syncing", name, error))?;
        Ok(file)
    }

    /// The same, for what need not outlive a power cut.
    fn make(&self, name: &str, mode: u32, content: &[u8]) -> Result<File, FileError> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mut file = openat(&self.fd, name, flags, Mode::from_bits_truncate(PRIVATE))
            .map(File::from)
            .map_err(|errno| self.error("making", name, errno))?;
        file.write_all(content)
            .map_err(|error| self.error("writing", name, error))?;
        fchmod(&file, Mode::from_bits_truncate(mode))
            .map_err(|errno| self.error("opening to the group", name, errno))?;
        Ok(file)
    }

    /// The names in it, at most [`MAX_NAMES`].
    fn names(&self) -> Result<Vec<Vec<u8>>, SnapshotError> {
        let listing = |errno: Errno| FileError::new("listing", &self.path, errno.into());
        let flags = OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut dir = Dir::openat(self.fd.as_fd(), ".", flags, Mode::empty()).map_err(listing)?;
        let mut names = Vec::new();
        for entry in dir.iter() {
            let entry = entry.map_err(listing)?;
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            if names.len() == MAX_NAMES {
                return Err(SnapshotError::TooManyNames);
            }
            names.push(name.to_vec());
        }
        Ok(names)
    }

    /// Whether its path leads to it.
    fn is_still_there(&self) -> bool {
        let (ours, found) = (nix::sys::stat::fstat(&self.fd), nix::sys::stat::lstat(&self.path));
        ours.is_ok_and(|ours| found.is_ok_and(|found| (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)))
    }

    fn sync(&self) -> Result<(), FileError> {
        nix::unistd::fsync(&self.fd).map_err(|errno| FileError::new("syncing", &self.path, errno.into()))
    }
}

/// A generation in the making; it is removed unless it is [kept](Self::keep).
#[derive(Debug)]
struct Unkept {
    dir: SnapshotDir,
    kept: bool,
}

impl Unkept {
    /// Makes the directory, for us alone: the VM that is to read from it gets an ACL entry. The group, which may read the files, is
    /// that of the directory above where that one is set-group-id, and so is the mark. Both must come from the kernel: the agent's
    /// unit refuses every chmod with that mark.
    fn make(path: &Path) -> Result<Self, FileError> {
        DirBuilder::new()
            .mode(0o700)
            .create(path)
            .map_err(|error| FileError::new("making", path, error))?;
        let dir = SnapshotDir::open(path).inspect_err(|_| give_up(path))?;
        Ok(Self { dir, kept: false })
    }

    /// Lets it stay without a manifest, as what is no generation.
    fn stay(mut self) {
        self.kept = true;
    }

    /// Writes the manifest, makes all durable, and lets it stay.
    fn keep(mut self, manifest: &Manifest) -> Result<(), FileError> {
        let content = serde_json::to_vec_pretty(manifest).expect("strings and numbers serialise");
        self.dir.write_new(MANIFEST, PRIVATE, &content)?;
        self.dir.sync()?;
        let parent = self.dir.path.parent().unwrap_or(Path::new("/"));
        SnapshotDir::open(parent)?.sync()?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Unkept {
    fn drop(&mut self) {
        // Not another one: the number of one that was given up while its disk was waited for may be a later one's by now.
        if !self.kept && self.dir.is_still_there() {
            give_up(&self.dir.path);
        }
    }
}

fn give_up(path: &Path) {
    if let Err(error) = files::remove_tree(path) {
        tracing::error!(error = %Chain(&error), "half a snapshot stays; the next start removes it");
    }
}

fn check_length(name: &'static str, found: u64, expected: RangeInclusive<u64>) -> Result<(), SnapshotError> {
    if expected.contains(&found) {
        Ok(())
    } else {
        Err(SnapshotError::Length { name, found, expected })
    }
}

/// What a file takes on disk.
pub(crate) fn allocated(metadata: &std::fs::Metadata) -> Bytes {
    // The unit of `st_blocks`, whatever the filesystem's block is.
    Bytes(metadata.blocks() * 512)
}

/// For [`crate::fuzz`]: whether a text is a state that describes memory. The check reads more closely than who looks for memory does, who
/// passes over numbers that are none, so each is asked.
#[cfg(any(test, fuzzing))]
pub(crate) fn judge_state(text: &[u8]) -> bool {
    let is_json = state::check(text).is_ok();
    let described = state::memory(text).is_ok();
    is_json && described
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generation_that_was_given_up_takes_no_later_one_of_its_number_with_it() {
        let above = tempfile::tempdir().unwrap();
        let path = above.path().join("2");
        drop(Unkept::make(&path).unwrap());
        assert!(!path.exists());
        let given_up = Unkept::make(&path).unwrap();
        files::remove_tree(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        drop(given_up);
        assert!(path.exists());
    }
}
