//! What the procedures do, with the rights of the thread that calls. They block for as long as the disk takes.

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{FsType, statfs};
use roost_common::guest::filesystem::EntryInfo;

use super::entry::entry;
use super::{FileError, Step, at, errno_at};
use crate::users::Names;

/// Most entries of one listing, and most bytes of their paths: an answer is one message, made in envd's memory.
const MAX_ENTRIES: usize = 65_536;
const MAX_PATHS: usize = 8 << 20;

/// Of directories that are made on the way.
const DIRECTORY_MODE: u32 = 0o755;

/// Makes a directory and what is missing above it.
///
/// # Errors
/// [`FileError::Exists`] where it is there already, [`FileError::NotDirectory`] where something else is. Directories that
/// were made before a failure stay.
pub(super) fn make_dir(path: &Path) -> Result<(), FileError> {
    match fs::metadata(path) {
        Ok(there) if there.is_dir() => return Err(FileError::Exists(path.to_owned())),
        Ok(_) => return Err(FileError::NotDirectory(path.to_owned())),
        Err(_) => {}
    }
    make_dirs(path)
}

/// Makes a directory and what is missing above it; one that is there is left as it is.
///
/// # Errors
/// As [`make_dir`], but for [`FileError::Exists`].
pub(crate) fn make_dirs(path: &Path) -> Result<(), FileError> {
    // From the top, so that what is refused is the first that is missing, or in the way.
    for path in path.ancestors().collect::<Vec<_>>().into_iter().rev() {
        match fs::metadata(path) {
            Ok(there) if there.is_dir() => continue,
            Ok(_) => return Err(FileError::NotDirectory(path.to_owned())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(at(Step::Look, path)(error)),
        }
        match DirBuilder::new().mode(DIRECTORY_MODE).create(path) {
            // Somebody else made it meanwhile, or it is a link that leads nowhere; the next one shows.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists && fs::metadata(path).is_ok() => {}
            made => made.map_err(at(Step::Make, path))?,
        }
    }
    Ok(())
}

/// Moves a file or directory to a new path, over a file that is there; makes the directories on the way.
///
/// # Errors
/// The kernel's. Between filesystems nothing is moved.
pub(super) fn move_to(from: &Path, to: &Path) -> Result<(), FileError> {
    // First, so that no directories are made for nothing.
    fs::symlink_metadata(from).map_err(at(Step::Look, from))?;
    make_dirs(to.parent().unwrap_or(Path::new("/")))?;
    fs::rename(from, to).map_err(at(Step::Move, from))
}

/// Removes a file, a link, or a directory with all that is in it. What is not there is removed already.
///
/// # Errors
/// The kernel's. A part may be gone.
pub(super) fn remove(path: &Path) -> Result<(), FileError> {
    let is_gone = |error: &std::io::Error| error.kind() == std::io::ErrorKind::NotFound;
    let removed = match fs::symlink_metadata(path) {
        // However it is written.
        Ok(there) if there.is_dir() && fs::canonicalize(path).is_ok_and(|real| real.parent().is_none()) => {
            return Err(FileError::Path("is the root of all files"));
        }
        Ok(there) if there.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if is_gone(&error) => Ok(()),
        removed => removed.map_err(at(Step::Remove, path)),
    }
}

/// The entries of a directory, down to `depth` levels, each directory's in the order of their names. Links are listed and
/// not followed, but for `path` itself.
///
/// # Errors
/// [`FileError::NotDirectory`], [`FileError::TooManyEntries`], the kernel's. Directories below that the user may not read
/// are listed as if they were empty.
pub(super) fn list(path: &Path, depth: u32, names: &Names) -> Result<Vec<EntryInfo>, FileError> {
    if !fs::metadata(path).map_err(at(Step::Look, path))?.is_dir() {
        return Err(FileError::NotDirectory(path.to_owned()));
    }
    let mut entries = Vec::new();
    let mut paths = 0;
    // Directories and entries still to come, the next one last.
    let mut ahead: Vec<(PathBuf, u32)> = children(path)?.into_iter().map(|path| (path, 1)).collect();
    while let Some((path, level)) = ahead.pop() {
        paths += path.as_os_str().len();
        if entries.len() + ahead.len() >= MAX_ENTRIES || paths > MAX_PATHS {
            return Err(FileError::TooManyEntries { max: MAX_ENTRIES });
        }
        let entry = match entry(&path, names) {
            Ok(entry) => entry,
            // Somebody has removed it meanwhile.
            Err(error) if error.code() == connectrpc::ErrorCode::NotFound => continue,
            Err(error) => return Err(error),
        };
        let is_dir = fs::symlink_metadata(&path).is_ok_and(|own| own.is_dir());
        entries.push(entry);
        if is_dir && level < depth {
            match children(&path) {
                Ok(children) => ahead.extend(children.into_iter().map(|path| (path, level + 1))),
                Err(error) if unreadable(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(entries)
}

/// Whether a directory below the one that was asked for is passed over: gone, or closed to the user.
pub(super) fn unreadable(error: &FileError) -> bool {
    matches!(
        error.code(),
        connectrpc::ErrorCode::NotFound | connectrpc::ErrorCode::PermissionDenied
    )
}

/// Paths of what is in a directory, in the opposite order of their names.
pub(super) fn children(path: &Path) -> Result<Vec<PathBuf>, FileError> {
    let mut children = Vec::new();
    for child in fs::read_dir(path).map_err(at(Step::Read, path))? {
        children.push(child.map_err(at(Step::Read, path))?.path());
        if children.len() > MAX_ENTRIES {
            return Err(FileError::TooManyEntries { max: MAX_ENTRIES });
        }
    }
    children.sort_unstable_by(|one, other| other.cmp(one));
    Ok(children)
}

/// Checks that `path` is a directory that can be watched.
///
/// # Errors
/// [`FileError::NotDirectory`], [`FileError::Network`], the kernel's.
pub(super) fn check_watchable(path: &Path, allow_network: bool) -> Result<(), FileError> {
    if !fs::metadata(path).map_err(at(Step::Look, path))?.is_dir() {
        return Err(FileError::NotDirectory(path.to_owned()));
    }
    let on = statfs(path).map_err(errno_at(Step::Look, path))?.filesystem_type();
    if is_network(on) && !allow_network {
        return Err(FileError::Network(path.to_owned()));
    }
    Ok(())
}

/// Whether files of this kind of filesystem can change without this kernel's doing. Numbers of linux/magic.h, and of
/// fs/smb; FUSE is among them because what is behind it is not known.
fn is_network(kind: FsType) -> bool {
    const NETWORK: [u32; 8] = [
        0x0000_6969, // NFS
        0xff53_4d42, // CIFS
        0x0000_517b, // SMB
        0xfe53_4d42, // SMB 2
        0x6573_5546, // FUSE
        0x0102_1997, // 9p
        0x5346_414f, // AFS
        0x00c3_6400, // Ceph
    ];
    // The field is wider than the numbers, and signed on some machines.
    NETWORK.contains(&(kind.0 as u32))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::testing::Dir;

    fn listed(path: &Path, depth: u32) -> Vec<String> {
        let names = Names::read(Path::new("/nonexistent"));
        let entries = list(path, depth, &names).unwrap();
        let base = format!("{}/", path.display());
        entries.into_iter().map(|entry| entry.path.replace(&base, "")).collect()
    }

    #[test]
    fn a_listing_goes_as_deep_as_asked_and_through_no_link() {
        let dir = Dir::new("list");
        make_dirs(&dir.path().join("a/b/c")).unwrap();
        fs::write(dir.path().join("a/file"), "").unwrap();
        fs::write(dir.path().join("z"), "").unwrap();
        symlink("..", dir.path().join("a/b/up")).unwrap();
        assert_eq!(listed(dir.path(), 1), ["a", "z"]);
        assert_eq!(listed(dir.path(), 2), ["a", "a/b", "a/file", "z"]);
        assert_eq!(listed(dir.path(), 100), ["a", "a/b", "a/b/c", "a/b/up", "a/file", "z"]);
        assert_eq!(listed(&dir.path().join("a/b/up"), 1), ["b", "file"]);
    }

    #[test]
    fn more_entries_than_an_answer_holds_are_refused() {
        let dir = Dir::new("list-many");
        let directories = 260;
        for directory in 0..directories {
            let path = dir.path().join(directory.to_string());
            make_dirs(&path).unwrap();
            for link in 0..MAX_ENTRIES / directories {
                // Of all kinds of entries the cheapest: the second and later names of one file.
                let (first, name) = (dir.path().join("0/0"), path.join(link.to_string()));
                if name == first {
                    fs::write(&first, "").unwrap();
                } else if fs::hard_link(&first, &name).is_err() {
                    // A filesystem that allows fewer.
                    fs::write(&name, "").unwrap();
                }
            }
        }
        let names = Names::read(Path::new("/nonexistent"));
        assert_eq!(list(dir.path(), 1, &names).unwrap().len(), directories);
        let refused = list(dir.path(), 2, &names).unwrap_err();
        assert!(matches!(refused, FileError::TooManyEntries { .. }), "{refused}");
        assert_eq!(refused.code(), connectrpc::ErrorCode::ResourceExhausted);
    }

    #[test]
    fn removing_a_link_leaves_what_it_leads_to() {
        let dir = Dir::new("remove");
        make_dirs(&dir.path().join("a")).unwrap();
        fs::write(dir.path().join("a/kept"), "").unwrap();
        symlink("a", dir.path().join("link")).unwrap();
        remove(&dir.path().join("link")).unwrap();
        assert!(dir.path().join("a/kept").exists() && !dir.path().join("link").is_symlink());
        remove(&dir.path().join("a")).unwrap();
        remove(&dir.path().join("a")).unwrap();
        for root in ["/", "/proc/..", "/.."] {
            assert!(matches!(remove(Path::new(root)), Err(FileError::Path(_))), "{root}");
        }
    }

    #[test]
    fn filesystems_of_networks_are_told_from_those_of_disks() {
        assert!(is_network(FsType(0x6969)) && is_network(FsType(0x6573_5546)));
        for disk in [0xef53, 0x0102_1994, 0x794c_7630, 0x5846_5342, 0x9fa0] {
            assert!(!is_network(FsType(disk)), "{disk:x}");
        }
    }
}
