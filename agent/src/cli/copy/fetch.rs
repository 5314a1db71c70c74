//! Files and trees out of a sandbox.
//!
//! Holds: what a guest's listing names is written below the target that the caller named, whatever the listing says, however often it
//! says it, and whatever an earlier copy has left there. Each name is a single one, in a directory that is held open, and no link of that
//! name is followed. A file has its name only once it is whole. Links are copied as they are: where one leads is the guest's to say, and
//! nobody's to follow here.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

use super::super::CliError;
use super::{CopyError, USUAL_MODE};
use crate::sandbox::build::random_hex;
use roost_hostagent::hostagent::v1::FileEntry;

/// Where files come from. Everything it says may be a hostile guest's.
pub(super) trait Source {
    /// What is in a directory; an error where it is none.
    async fn list(&self, path: &str) -> Result<Vec<FileEntry>, CliError>;
    /// What a symbolic link says.
    async fn read_link(&self, path: &str) -> Result<String, CliError>;
    /// Writes a file's content, in pieces.
    async fn read(&self, path: &str, into: &mut Unfinished<'_>) -> Result<(), CliError>;
    /// So many bytes more are to come.
    fn expect(&self, bytes: u64);
}

/// Copies a file or a tree to `to`; into it, where that is a directory.
pub(super) async fn fetch(source: &impl Source, path: &str, to: &Path) -> Result<(), CliError> {
    // What is no directory is a file, or is not there; reading says which.
    let listed = source.list(path).await;
    let (folder, name) = if to.is_dir() {
        let last = path.trim_end_matches('/').rsplit('/').next();
        let name = last.filter(|name| !matches!(*name, "" | "." | ".."));
        (Folder::open(to)?, name.map(OsStr::new))
    } else {
        let nothing = || super::at(to)(io::ErrorKind::NotFound.into());
        let name = to.file_name().ok_or_else(nothing)?;
        (Folder::open(to.parent().ok_or_else(nothing)?)?, Some(name))
    };
    match (listed, name) {
        (Ok(entries), Some(name)) => tree(source, entries, &folder.enter(name)?).await,
        (Ok(entries), None) => tree(source, entries, &folder).await,
        (Err(_), Some(name)) => file(source, path, &folder, name, USUAL_MODE).await,
        (Err(error), None) => Err(error),
    }
}

async fn tree(source: &impl Source, entries: Vec<FileEntry>, folder: &Folder) -> Result<(), CliError> {
    for entry in entries {
        let is_name = !entry.name.contains('/') && !matches!(entry.name.as_str(), "" | "." | "..");
        if !is_name {
            return Err(CopyError::Name(entry.name).into());
        }
        let name = OsStr::new(&entry.name);
        match entry.r#type.as_str() {
            "directory" => {
                let below = folder.enter(name)?;
                Box::pin(tree(source, source.list(&entry.path).await?, &below)).await?;
            }
            // The listing says where it leads to in the end; what it says itself is to be copied.
            "symlink" => folder.link(name, &source.read_link(&entry.path).await?)?,
            _ => {
                source.expect(entry.size.max(0).unsigned_abs());
                file(source, &entry.path, folder, name, entry.mode & 0o777).await?;
            }
        }
    }
    Ok(())
}

async fn file(source: &impl Source, path: &str, folder: &Folder, name: &OsStr, mode: u32) -> Result<(), CliError> {
    let mut unfinished = folder.begin(name)?;
    source.read(path, &mut unfinished).await?;
    Ok(unfinished.finish(mode)?)
}

/// A directory here that is written into.
struct Folder {
    /// As the caller knows it.
    path: PathBuf,
    held: OwnedFd,
}

impl Folder {
    /// One that the caller named, so links that lead to it are followed.
    fn open(path: &Path) -> Result<Self, CopyError> {
        let opened = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let held = rustix::fs::openat(CWD, opened, flags, Mode::empty());
        Ok(Self {
            path: path.to_owned(),
            held: held.map_err(|errno| failed(path, errno))?,
        })
    }

    /// The directory of this name in it, made where there is none.
    fn enter(&self, name: &OsStr) -> Result<Self, CopyError> {
        let path = self.path.join(name);
        match rustix::fs::mkdirat(&self.held, name, Mode::from_raw_mode(0o777)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(failed(&path, errno)),
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.held, name, flags, Mode::empty()) {
            Ok(held) => Ok(Self { path, held }),
            Err(Errno::NOTDIR) if self.is_link(name) => Err(CopyError::Link(path)),
            Err(errno) => Err(failed(&path, errno)),
        }
    }

    fn is_link(&self, name: &OsStr) -> bool {
        let about = rustix::fs::statat(&self.held, name, AtFlags::SYMLINK_NOFOLLOW);
        about.is_ok_and(|about| rustix::fs::FileType::from_raw_mode(about.st_mode).is_symlink())
    }

    /// Makes a symbolic link, in place of a file of that name.
    fn link(&self, name: &OsStr, target: &str) -> Result<(), CopyError> {
        rustix::fs::unlinkat(&self.held, name, AtFlags::empty()).ok();
        let made = rustix::fs::symlinkat(target, &self.held, name);
        made.map_err(|errno| failed(&self.path.join(name), errno))
    }

    /// A file that is to have this name. Until then it has one that nobody knows before, so none of the guest's files is in its way.
    fn begin(&self, name: &OsStr) -> Result<Unfinished<'_>, CopyError> {
        let path = self.path.join(name);
        let unfinished = format!(".roost-cp-{}", random_hex());
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.held, &unfinished, flags, Mode::from_raw_mode(0o600));
        Ok(Unfinished {
            folder: self,
            file: file.map_err(|errno| failed(&path, errno))?.into(),
            unfinished,
            path,
        })
    }
}

/// A file that is being written, beside the one that has its name: what was there stays until this is whole. Dropping it removes it.
pub(super) struct Unfinished<'a> {
    folder: &'a Folder,
    file: File,
    unfinished: String,
    path: PathBuf,
}

impl Unfinished<'_> {
    pub(super) fn write(&mut self, piece: &[u8]) -> Result<(), CopyError> {
        let written = self.file.write_all(piece);
        written.map_err(|source| failed(&self.path, source))
    }

    /// Gives it its permissions and its name.
    fn finish(self, mode: u32) -> Result<(), CopyError> {
        let failed = |errno| failed(&self.path, errno);
        rustix::fs::fchmod(&self.file, Mode::from_raw_mode(mode)).map_err(failed)?;
        let name = self.path.file_name().unwrap_or_default();
        rustix::fs::renameat(&self.folder.held, &self.unfinished, &self.folder.held, name).map_err(failed)
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        // Nothing is there where it has its name.
        rustix::fs::unlinkat(&self.folder.held, &self.unfinished, AtFlags::empty()).ok();
    }
}

fn failed(path: &Path, source: impl Into<io::Error>) -> CopyError {
    CopyError::File {
        path: path.to_owned(),
        source: source.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    /// A guest's tree: each directory's path and what its listing says, as (name, kind).
    struct Scripted {
        listings: Vec<(&'static str, Vec<(&'static str, &'static str)>)>,
        link: &'static str,
        breaks_off: Cell<bool>,
    }

    impl Source for Scripted {
        async fn list(&self, path: &str) -> Result<Vec<FileEntry>, CliError> {
            let listing = self.listings.iter().find(|(of, _)| *of == path);
            let (_, entries) = listing.ok_or_else(|| CopyError::Command("list".into(), "no directory".into()))?;
            let entry = |(name, kind): &(&str, &str)| FileEntry {
                name: (*name).to_owned(),
                path: format!("{path}/{name}"),
                r#type: (*kind).to_owned(),
                mode: 0o4755,
                ..FileEntry::default()
            };
            Ok(entries.iter().map(entry).collect())
        }

        async fn read_link(&self, _: &str) -> Result<String, CliError> {
            Ok(self.link.to_owned())
        }

        async fn read(&self, path: &str, into: &mut Unfinished<'_>) -> Result<(), CliError> {
            into.write(b"of ")?;
            if self.breaks_off.get() {
                return Err(CopyError::Command("read".into(), "broke off".into()).into());
            }
            Ok(into.write(path.as_bytes())?)
        }

        fn expect(&self, _: u64) {}
    }

    /// A place with a file that is not the copy's, and a target beside it.
    struct Place {
        dir: tempfile::TempDir,
    }

    impl Place {
        fn new() -> Self {
            let dir = tempfile::tempdir().expect("a directory");
            fs::create_dir(dir.path().join("outside")).expect("made");
            fs::write(dir.path().join("outside/kept"), "mine").expect("written");
            fs::create_dir(dir.path().join("target")).expect("made");
            Self { dir }
        }

        fn target(&self) -> PathBuf {
            self.dir.path().join("target")
        }

        /// Copies `/t`, whose contents go into the target; an error in words.
        async fn copy(&self, listings: Vec<(&'static str, Vec<(&'static str, &'static str)>)>) -> Result<(), String> {
            let source = Scripted {
                listings,
                link: "../outside",
                breaks_off: Cell::new(false),
            };
            let copied = fetch(&source, "/t/.", &self.target()).await;
            // Whatever came of it.
            let outside: Vec<_> = fs::read_dir(self.dir.path().join("outside")).expect("listed").collect();
            assert_eq!(outside.len(), 1, "{outside:?}");
            assert_eq!(
                fs::read_to_string(self.dir.path().join("outside/kept")).expect("read"),
                "mine"
            );
            let beside = fs::read_dir(self.dir.path()).expect("listed").count();
            assert_eq!(beside, 2, "something is beside the target");
            copied.map_err(|error| crate::errors::Chain(&error).to_string())
        }

        fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(self.target()).expect("listed");
            let mut names: Vec<_> = entries
                .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
                .collect();
            names.sort();
            names
        }
    }

    #[tokio::test]
    async fn names_that_lead_anywhere_are_refused() {
        for name in ["..", ".", "", "../x", "a/b", "/outside/x", "x/"] {
            for kind in ["file", "directory", "symlink", "socket"] {
                let place = Place::new();
                let refused = place.copy(vec![("/t/.", vec![(name, kind)])]).await.expect_err(name);
                assert!(refused.contains("a name that is none here"), "{refused}");
                assert_eq!(place.names(), [""; 0], "{name:?} as {kind}");
            }
        }
        let place = Place::new();
        place
            .copy(vec![("/t/.", vec![("a\0b", "file")])])
            .await
            .expect_err("no name of a file");
    }

    #[tokio::test]
    async fn a_link_is_never_followed_whatever_is_listed_behind_it() {
        // The same name as a link and then as a directory, as two hostile answers have it.
        let place = Place::new();
        let tree = vec![
            ("/t/.", vec![("x", "symlink"), ("x", "directory")]),
            ("/t/./x", vec![("kept", "file"), ("new", "file")]),
        ];
        let refused = place.copy(tree).await.expect_err("followed");
        assert!(refused.contains("target/x\" is a symbolic link"), "{refused}");
        // As a link and then as a file: the file takes its place.
        let place = Place::new();
        place
            .copy(vec![("/t/.", vec![("kept", "symlink"), ("kept", "file")])])
            .await
            .expect("copied");
        assert_eq!(
            fs::read_to_string(place.target().join("kept")).expect("read"),
            "of /t/./kept"
        );
        assert!(!place.target().join("kept").is_symlink());
        // As a file, then as a directory.
        let refused = place
            .copy(vec![("/t/.", vec![("kept", "directory")])])
            .await
            .expect_err("entered");
        assert!(refused.contains("Not a directory"), "{refused}");
        // A link where an unfinished file might be expected.
        let place = Place::new();
        place
            .copy(vec![("/t/.", vec![("a.part", "symlink"), ("a", "file")])])
            .await
            .expect("copied");
        assert_eq!(place.names(), ["a", "a.part"]);
        assert_eq!(
            fs::read_link(place.target().join("a.part")).expect("a link"),
            Path::new("../outside")
        );
    }

    #[tokio::test]
    async fn a_link_of_an_earlier_copy_is_not_followed_by_the_next() {
        let place = Place::new();
        place
            .copy(vec![("/t/.", vec![("x", "symlink")])])
            .await
            .expect("copied");
        let tree = vec![("/t/.", vec![("x", "directory")]), ("/t/./x", vec![("kept", "file")])];
        place.copy(tree).await.expect_err("followed");
        // Nor where its name is the last of what was asked for.
        let source = Scripted {
            listings: vec![("/y/x", vec![("kept", "file")])],
            link: "",
            breaks_off: Cell::new(false),
        };
        let refused = fetch(&source, "/y/x", &place.target()).await.expect_err("followed");
        assert!(matches!(refused, CliError::Copy(CopyError::Link(_))), "{refused:?}");
        assert_eq!(
            fs::read_to_string(place.target().join("../outside/kept")).expect("read"),
            "mine"
        );
    }

    #[tokio::test]
    async fn a_target_that_the_caller_named_may_be_a_link() {
        let place = Place::new();
        let link = place.dir.path().join("link");
        symlink("target", &link).expect("made");
        let source = Scripted {
            listings: vec![("/t", vec![("a", "file"), ("d", "directory")]), ("/t/d", vec![])],
            link: "",
            breaks_off: Cell::new(false),
        };
        fetch(&source, "/t", &link).await.expect("copied");
        assert_eq!(fs::read_to_string(place.target().join("t/a")).expect("read"), "of /t/a");
        assert!(place.target().join("t/d").is_dir());
        // Again, over itself, and to a name of its own.
        fetch(&source, "/t", &link).await.expect("copied");
        fetch(&source, "/t", &place.target().join("u")).await.expect("copied");
        assert_eq!(place.names(), ["t", "u"]);
        let mode = fs::metadata(place.target().join("u/a"))
            .expect("there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o7777, 0o755, "no bit beyond the permissions");
        fetch(&source, "/t/a", &place.target().join("b")).await.expect("copied");
        assert_eq!(place.names(), ["b", "t", "u"]);
        // A directory of none, and the home's contents of a sandbox that is not there.
        fetch(&source, "/t", &place.target().join("no/such"))
            .await
            .expect_err("made two");
        fetch(&source, ".", &place.target()).await.expect_err("nothing there");
    }

    #[tokio::test]
    async fn a_file_that_breaks_off_leaves_what_was_there_and_nothing_else() {
        let place = Place::new();
        fs::write(place.target().join("a"), "as it was").expect("written");
        let source = Scripted {
            listings: vec![],
            link: "",
            breaks_off: Cell::new(true),
        };
        fetch(&source, "/t/a", &place.target()).await.expect_err("broke off");
        assert_eq!(place.names(), ["a"]);
        assert_eq!(fs::read_to_string(place.target().join("a")).expect("read"), "as it was");
    }
}
