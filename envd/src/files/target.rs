//! How what arrives gets to its place: first into a file without a name beside it, and from there, once all of it is here.
//!
//! Holds: an upload that breaks off, or for which there is no room, leaves what was there, and nothing beside it. A file
//! that is there already stays the same one: its owner, mode, hard links and links to it, and whoever has it open, see new
//! contents and no new file; it is written to only when its new contents are here and the disk has room for them.
//!
//! Straight to its place goes what is for something other than a regular file (`/proc/sys`, a device), into a directory that
//! the user may not write to, and onto a filesystem that knows no files without names.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Seek as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, FallocateFlags, fallocate};
use nix::unistd::linkat;
use xattr::FileExt as _;

use crate::filesystem::entry::METADATA_PREFIX;
use crate::filesystem::operations::make_dirs;
use crate::filesystem::{FileError, Step, at, errno_at};

/// Of a new file, before the umask.
const FILE_MODE: u32 = 0o666;

/// A file under way to its place.
pub(super) struct Target {
    path: PathBuf,
    /// What takes the bytes.
    file: File,
    place: Place,
}

enum Place {
    /// The bytes go to a file without a name; this is the one that is there already.
    Beside(Option<File>),
    Straight,
}

impl Target {
    /// Makes the directories on the way, and whatever takes the bytes.
    ///
    /// # Errors
    /// The kernel's; [`FileError::Directory`].
    pub(super) fn open(path: PathBuf) -> Result<Self, FileError> {
        let parent = path.parent().ok_or_else(|| FileError::Directory(path.clone()))?;
        make_dirs(parent)?;
        // Nonblocking, so that a pipe without a reader is refused rather than waited for.
        let there = File::options()
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(&path);
        let there = match there {
            Ok(there) => Some(there),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) if error.raw_os_error() == Some(libc::EISDIR) => return Err(FileError::Directory(path)),
            Err(error) => return Err(at(Step::Open, &path)(error)),
        };
        let is_regular = |file: &File| file.metadata().is_ok_and(|metadata| metadata.is_file());
        if let Some(other) = there.as_ref().filter(|file| !is_regular(file)) {
            return Ok(Self {
                file: other.try_clone().map_err(at(Step::Open, &path))?,
                path,
                place: Place::Straight,
            });
        }
        // Where a link leads to another filesystem, the room is needed there.
        let real = fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
        let unnamed = File::options()
            .read(true)
            .write(true)
            .mode(FILE_MODE)
            .custom_flags(libc::O_TMPFILE)
            .open(real.parent().unwrap_or(Path::new("/")));
        match (unnamed, there) {
            (Ok(file), there) => Ok(Self {
                path,
                file,
                place: Place::Beside(there),
            }),
            (Err(error), _) if is_full(&error) => Err(at(Step::Write, &path)(error)),
            (Err(_), Some(there)) => {
                there.set_len(0).map_err(at(Step::Write, &path))?;
                Ok(Self {
                    path,
                    file: there,
                    place: Place::Straight,
                })
            }
            (Err(error), None) if knows_no_unnamed(&error) => Ok(Self {
                file: create(&path)?,
                path,
                place: Place::Straight,
            }),
            (Err(error), None) => Err(at(Step::Make, &path)(error)),
        }
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), FileError> {
        self.file.write_all(bytes).map_err(at(Step::Write, &self.path))
    }

    /// Adds all of `source`, which is at `from`.
    pub(super) fn copy(&mut self, source: &mut File) -> Result<(), FileError> {
        let copied = io::copy(source, &mut self.file);
        copied.map(drop).map_err(at(Step::Write, &self.path))
    }

    /// Puts what was written to its place, with these attributes and no others of clients.
    ///
    /// # Errors
    /// The kernel's. What was at the place is still there, unless the disk failed while it was written.
    pub(super) fn finish(self, metadata: &BTreeMap<String, String>) -> Result<PathBuf, FileError> {
        let Self { path, mut file, place } = self;
        let there = match place {
            Place::Straight => {
                describe(&file, &path, metadata)?;
                return Ok(path);
            }
            Place::Beside(Some(there)) => there,
            Place::Beside(None) => {
                describe(&file, &path, metadata)?;
                let unnamed = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
                match linkat(AT_FDCWD, &unnamed, AT_FDCWD, &path, AtFlags::AT_SYMLINK_FOLLOW) {
                    Ok(()) => {
                        tell_watchers(&file, &path);
                        return Ok(path);
                    }
                    // Made by somebody else meanwhile, or a link to what is not there yet.
                    Err(Errno::EEXIST) => create(&path)?,
                    Err(errno) => return Err(errno_at(Step::Make, &path)(errno)),
                }
            }
        };
        replace(&mut file, &there, &path)?;
        describe(&there, &path, metadata)?;
        Ok(path)
    }
}

/// Has those who watch the directory see that a file was written there, and not only that one has come: clients wait for that. Its last
/// byte is written again, by its name: the kernel tells of what is written by the name that was opened, and `file` had none. Best effort.
fn tell_watchers(file: &File, path: &Path) {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let named = File::options().write(true).custom_flags(flags).open(path);
    let (Ok(named), Ok(ours)) = (named, file.metadata()) else {
        return;
    };
    // Somebody else may have put another there.
    let is_same = |there: fs::Metadata| (there.dev(), there.ino()) == (ours.dev(), ours.ino());
    if !named.metadata().is_ok_and(is_same) {
        return;
    }
    let mut byte = [0];
    if let Some(last) = ours.len().checked_sub(1)
        && file.read_exact_at(&mut byte, last).is_ok()
    {
        named.write_all_at(&byte, last).ok();
    }
}

/// Opens a file for writing, which is made where it is not there, also at the end of a link.
fn create(path: &Path) -> Result<File, FileError> {
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(FILE_MODE)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path);
    file.map_err(at(Step::Make, path))
}

/// Gives `there` the contents of `new`.
fn replace(new: &mut File, mut there: &File, path: &Path) -> Result<(), FileError> {
    let failed = || at(Step::Write, path);
    let before = there.metadata().map_err(failed())?.len();
    let length = new.stream_position().map_err(failed())?;
    // All the room first. A filesystem that cannot do this takes what it can.
    let room = i64::try_from(length).unwrap_or(i64::MAX);
    let reserved = if room == 0 {
        Ok(())
    } else {
        fallocate(there, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, room)
    };
    if let Err(errno @ (Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG)) = reserved {
        // Gives back what was reserved; the length is what it was, so an error changes nothing.
        there.set_len(before).ok();
        return Err(errno_at(Step::Write, path)(errno));
    }
    new.rewind().map_err(failed())?;
    io::copy(new, &mut there).map_err(failed())?;
    there.set_len(length).map_err(failed())
}

/// Sets the attributes of clients, and removes those that are not given.
fn describe(file: &File, path: &Path, metadata: &BTreeMap<String, String>) -> Result<(), FileError> {
    let failed = || at(Step::Describe, path);
    let names = match file.list_xattr() {
        Ok(names) => names,
        // Such as /proc/sys: the contents are what counts there.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(()),
        Err(error) => return Err(failed()(error)),
    };
    for name in names {
        let key = name.to_str().and_then(|name| name.strip_prefix(METADATA_PREFIX));
        if key.is_some_and(|key| !metadata.contains_key(key)) {
            file.remove_xattr(&name).map_err(failed())?;
        }
    }
    for (key, value) in metadata {
        match file.set_xattr(format!("{METADATA_PREFIX}{key}"), value.as_bytes()) {
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(()),
            set => set.map_err(failed())?,
        }
    }
    Ok(())
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

/// Kernels and filesystems without such files take the flag for another.
fn knows_no_unnamed(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL | libc::ENOENT)
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;
    use crate::testing::Dir;

    fn put(path: &Path, bytes: &[u8]) -> Result<PathBuf, FileError> {
        let mut target = Target::open(path.to_owned())?;
        target.write(bytes)?;
        target.finish(&BTreeMap::new())
    }

    #[test]
    fn a_file_that_is_there_stays_the_same_one() {
        let dir = Dir::new("target");
        let at = |name: &str| dir.path().join(name);
        fs::write(at("file"), "a long text").unwrap();
        fs::set_permissions(at("file"), fs::Permissions::from_mode(0o604)).unwrap();
        fs::hard_link(at("file"), at("hard")).unwrap();
        symlink("file", at("link")).unwrap();
        let before = fs::metadata(at("file")).unwrap();
        put(&at("link"), b"short").unwrap();
        let after = fs::metadata(at("file")).unwrap();
        assert_eq!(
            (after.ino(), after.mode(), after.len()),
            (before.ino(), before.mode(), 5)
        );
        assert_eq!(fs::read_to_string(at("hard")).unwrap(), "short");
        assert!(at("link").is_symlink());
    }

    #[test]
    fn a_link_to_what_is_not_there_makes_it() {
        let dir = Dir::new("target-link");
        symlink("new", dir.path().join("link")).unwrap();
        put(&dir.path().join("link"), b"text").unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("new")).unwrap(), "text");
        put(&dir.path().join("a/b/c"), b"").unwrap();
        assert_eq!(fs::read(dir.path().join("a/b/c")).unwrap(), b"");
    }

    #[test]
    fn what_breaks_off_leaves_what_was_there_and_nothing_else() {
        let dir = Dir::new("target-broken");
        let path = dir.path().join("file");
        fs::write(&path, "before").unwrap();
        for path in [path.clone(), dir.path().join("new")] {
            let mut target = Target::open(path).unwrap();
            target.write(b"half").unwrap();
            drop(target);
        }
        assert_eq!(fs::read_to_string(&path).unwrap(), "before");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn devices_are_written_to_and_pipes_without_a_reader_and_directories_refused() {
        let dir = Dir::new("target-special");
        put(Path::new("/dev/null"), b"gone").unwrap();
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = put(&pipe, b"x").unwrap_err();
        assert!(
            matches!(
                error,
                FileError::Kernel {
                    errno: Errno::ENXIO,
                    ..
                }
            ),
            "{error}"
        );
        assert!(matches!(put(dir.path(), b"x"), Err(FileError::Directory(_))));
    }
}
