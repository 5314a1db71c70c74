//! The files of a directory that holds a root filesystem, with owners and extended attributes as far as this user may read them.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, Metadata, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use super::archive::{Entry, EntryKind, Time};
use super::tree::{Meaning, Tree, TreeError};

/// Why a directory cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DirectoryError {
    /// A file in it.
    #[error("{} cannot be read", path.display())]
    Read {
        /// Which one.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file that no image can hold.
    #[error(transparent)]
    Tree(#[from] TreeError),
}

/// Puts all that is below `root` into the tree.
pub(super) fn add(tree: &mut Tree, root: &Path, stop: &AtomicBool) -> Result<(), DirectoryError> {
    let mut walk = Walk {
        tree,
        root,
        stop,
        linked: HashMap::new(),
    };
    walk.file(Path::new(""))
}

struct Walk<'a> {
    tree: &'a mut Tree,
    root: &'a Path,
    stop: &'a AtomicBool,
    /// The first path of each file that has several, by device and inode.
    linked: HashMap<(u64, u64), Vec<u8>>,
}

impl Walk<'_> {
    fn file(&mut self, path: &Path) -> Result<(), DirectoryError> {
        let here = self.root.join(path);
        let failed = |source| DirectoryError::Read {
            path: here.clone(),
            source,
        };
        // The root may be given by way of a link; what is in it may not lead elsewhere.
        let is_root = path.as_os_str().is_empty();
        let metadata = if is_root {
            fs::metadata(&here)
        } else {
            fs::symlink_metadata(&here)
        };
        let metadata = metadata.map_err(failed)?;
        let Some(kind) = kind(&metadata) else {
            self.tree.left_out.sockets += 1;
            return Ok(());
        };
        let mut entry = Entry {
            path: path.as_os_str().as_bytes().to_vec(),
            kind,
            size: if kind == EntryKind::File { metadata.len() } else { 0 },
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            modified: Time {
                seconds: metadata.mtime(),
                nanoseconds: u32::try_from(metadata.mtime_nsec()).unwrap_or(0),
            },
            xattrs: xattrs(&here).map_err(failed)?,
            has_acl: false,
            link: Vec::new(),
            device: (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev())),
        };
        if kind != EntryKind::Directory && metadata.nlink() > 1 {
            let place = (metadata.dev(), metadata.ino());
            match self.linked.get(&place) {
                Some(first) => {
                    entry.kind = EntryKind::HardLink;
                    entry.link.clone_from(first);
                    entry.size = 0;
                }
                None => drop(self.linked.insert(place, entry.path.clone())),
            }
        }
        match entry.kind {
            EntryKind::File => {
                let flags = nix::fcntl::OFlag::O_NOFOLLOW | nix::fcntl::OFlag::O_NONBLOCK;
                let opened = OpenOptions::new().read(true).custom_flags(flags.bits()).open(&here);
                let mut content = opened.map_err(failed)?;
                self.tree.put(entry, &mut content, Meaning::Plain, self.stop)?;
            }
            EntryKind::Symlink => {
                entry.link = fs::read_link(&here).map_err(failed)?.as_os_str().as_bytes().to_vec();
                self.tree.put(entry, &mut io::empty(), Meaning::Plain, self.stop)?;
            }
            _ => self.tree.put(entry, &mut io::empty(), Meaning::Plain, self.stop)?,
        }
        if kind == EntryKind::Directory {
            let names = fs::read_dir(&here).map_err(failed)?.collect::<Result<Vec<_>, _>>();
            for name in names.map_err(failed)? {
                self.file(&path.join(name.file_name()))?;
            }
        }
        Ok(())
    }
}

/// `None` for a socket, which is nothing without the program that listens on it.
fn kind(metadata: &Metadata) -> Option<EntryKind> {
    let is = metadata.file_type();
    Some(match () {
        () if is.is_file() => EntryKind::File,
        () if is.is_dir() => EntryKind::Directory,
        () if is.is_symlink() => EntryKind::Symlink,
        () if is.is_char_device() => EntryKind::Char,
        () if is.is_block_device() => EntryKind::Block,
        () if is.is_fifo() => EntryKind::Fifo,
        () => return None,
    })
}

/// Those of the file itself, not of what a link leads to.
fn xattrs(path: &Path) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut found = BTreeMap::new();
    let names = match xattr::list(path) {
        Ok(names) => names,
        Err(error) if error.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => return Ok(found),
        Err(error) => return Err(error),
    };
    for name in names {
        if let Some(value) = xattr::get(path, &name)? {
            found.insert(name.as_bytes().to_vec(), value);
        }
    }
    Ok(found)
}
