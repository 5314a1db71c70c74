//! Which templates there are, what is known of each, and whether its files are still what they were.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use roost_common::units::Bytes;
use uuid::Uuid;

use super::digest::{self, Digest};
use super::{SNAPSHOT, Sum, TemplateError, TemplateFile, allocated, names_if_any};
use crate::errors::{Chain, FileError};
use crate::host::images::{ROOTFS, TemplateRef, from_base36};
use crate::snapshot::{self, MEMORY, Manifest, STATE, SnapshotError};

/// What is known of a template without reading its large files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// Which one.
    pub which: TemplateRef,
    /// For people; empty where it has none.
    pub name: String,
    /// In seconds since 1970; 0 where nobody knows.
    pub made_at_unix: i64,
    /// Of its root filesystem.
    pub rootfs_length: Bytes,
    /// What its root filesystem takes on disk.
    pub rootfs_allocated: Bytes,
    /// Checksum of its root filesystem, where one was taken.
    pub rootfs_digest: Option<Digest>,
    /// Its memory, where it has some.
    pub memory: Option<MemoryLook>,
    /// Why it cannot be used, as far as that can be told.
    pub broken: Option<String>,
}

/// What is known of a template's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryLook {
    /// What it takes on disk.
    pub allocated: Bytes,
    /// Checksum, where one was taken.
    pub digest: Option<Digest>,
    /// What it is of, where that can be read.
    pub about: Option<snapshot::About>,
}

/// All templates, the platform's own first.
///
/// # Errors
/// [`FileError`] naming a directory that cannot be read.
pub fn list(images: &Path) -> Result<Vec<Template>, FileError> {
    let mut found: Vec<Template> = look(images, TemplateRef::default()).into_iter().collect();
    let teams = images.join("teams");
    for team in names_if_any(&teams)? {
        let Some(number) = from_base36(&team) else { continue };
        for name in names_if_any(&teams.join(&team))? {
            // What is being made or was deleted has names of another kind.
            let Some(template) = from_base36(&name) else { continue };
            let which = TemplateRef {
                team: Uuid::from_u128(number),
                template: Uuid::from_u128(template),
            };
            found.extend(look(images, which));
        }
    }
    found.sort_by_key(|template| (template.made_at_unix, template.which.team, template.which.template));
    Ok(found)
}

/// One template; `None` where there is none.
pub fn look(images: &Path, which: TemplateRef) -> Option<Template> {
    let dir = which.dir(images);
    dir.symlink_metadata().ok().filter(fs::Metadata::is_dir)?;
    let mut broken = None;
    let file = TemplateFile::read(&dir).unwrap_or_else(|error| {
        broken = Some(Chain(&error).to_string());
        None
    });
    let rootfs = fs::symlink_metadata(dir.join(ROOTFS))
        .ok()
        .filter(fs::Metadata::is_file);
    let length = rootfs.as_ref().map_or(0, fs::Metadata::len);
    if rootfs.is_none() {
        broken = Some(format!("{} is missing", dir.join(ROOTFS).display()));
    } else if let Some(error) = file.as_ref().and_then(|file| file.check(&dir, length).err()) {
        broken = Some(error.to_string());
    }
    let snapshot = dir.join(SNAPSHOT);
    let memory = snapshot.is_dir().then(|| MemoryLook {
        allocated: allocated(&snapshot).unwrap_or(Bytes(0)),
        digest: file
            .as_ref()
            .and_then(|file| Some(file.memory.as_ref()?.digest.clone())),
        about: match Manifest::read(&snapshot) {
            Ok(manifest) => Some(manifest.about),
            Err(error) => {
                broken = Some(Chain(&error).to_string());
                None
            }
        },
    });
    Some(Template {
        which,
        name: match &file {
            None if which.is_minimal() => "minimal".into(),
            None => String::new(),
            Some(file) => file.name.clone(),
        },
        made_at_unix: file.as_ref().map_or(0, |file| file.made_at_unix),
        rootfs_length: Bytes(length),
        rootfs_allocated: rootfs.as_ref().map_or(Bytes(0), snapshot::allocated),
        rootfs_digest: file.and_then(|file| Some(file.rootfs?.digest)),
        memory,
        broken,
    })
}

/// What was found of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It is as it was.
    Ok,
    /// It is not, and how.
    Differs(String),
    /// The disk, or its permissions.
    Unreadable(String),
    /// It is not there.
    Missing,
    /// No checksum was taken of it when the template was made.
    Unchecked,
}

/// A file that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// Its name in the template's directory.
    pub file: &'static str,
    /// What was found.
    pub outcome: Outcome,
    /// Bytes that were read.
    pub read: u64,
}

/// Names of the files in a snapshot, as they are told.
const STATE_FILE: &str = "snapshot/state.json";
const MEMORY_FILE: &str = "snapshot/memory-ranges";
const MANIFEST_FILE: &str = "snapshot/manifest.json";

/// Reads the files of the template in `dir` and compares them with what they were when it was made. `stop` ends it.
///
/// # Errors
/// [`TemplateError`], where it is not known what they were; [`TemplateError::Stopped`].
pub fn verify(dir: &Path, stop: &AtomicBool) -> Result<Vec<Verified>, TemplateError> {
    let known = TemplateFile::read(dir)?;
    let (rootfs, memory) = known.map_or((None, None), |known| (known.rootfs, known.memory));
    let mut found = vec![compare(ROOTFS, &dir.join(ROOTFS), rootfs.as_ref(), stop)?];
    let snapshot = dir.join(SNAPSHOT);
    if !snapshot.exists() {
        if memory.is_some() {
            found.push(plain(MEMORY_FILE, Outcome::Missing));
        }
        return Ok(found);
    }
    let manifest = match Manifest::read(&snapshot) {
        Ok(manifest) => manifest,
        Err(error) => {
            found.push(plain(MANIFEST_FILE, Outcome::Unreadable(Chain(&error).to_string())));
            return Ok(found);
        }
    };
    let state = match manifest.verify_template(&snapshot) {
        Ok(()) => plain(STATE_FILE, Outcome::Ok),
        Err(error) => {
            let differs = Outcome::Differs(Chain(&error).to_string());
            match error {
                // The one below says more of it.
                SnapshotError::Length { name, .. } | SnapshotError::NotRegular { name } if name == MEMORY => {
                    plain(MEMORY_FILE, differs)
                }
                _ => plain(STATE_FILE, differs),
            }
        }
    };
    found.push(state);
    found.push(compare(MEMORY_FILE, &snapshot.join(MEMORY), memory.as_ref(), stop)?);
    debug_assert_eq!(STATE_FILE.rsplit('/').next(), Some(STATE));
    Ok(found)
}

fn plain(file: &'static str, outcome: Outcome) -> Verified {
    Verified { file, outcome, read: 0 }
}

fn compare(name: &'static str, path: &Path, known: Option<&Sum>, stop: &AtomicBool) -> Result<Verified, TemplateError> {
    let file = match open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(plain(name, Outcome::Missing)),
        Err(error) => return Ok(plain(name, Outcome::Unreadable(error.to_string()))),
    };
    let Some(known) = known else {
        return Ok(plain(name, Outcome::Unchecked));
    };
    let length = file.metadata().map_or(0, |metadata| metadata.len());
    if length != known.length.0 {
        let said = format!("it has {length} bytes, and had {}", known.length.0);
        return Ok(plain(name, Outcome::Differs(said)));
    }
    match digest::read(&file, digest::until(stop)) {
        Ok(read) => Ok(Verified {
            file: name,
            outcome: if read.digest == known.digest {
                Outcome::Ok
            } else {
                Outcome::Differs(format!("its checksum is {}, and was {}", read.digest, known.digest))
            },
            read: read.read,
        }),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(TemplateError::Stopped),
        Err(error) => Ok(plain(name, Outcome::Unreadable(error.to_string()))),
    }
}

fn open(path: &Path) -> io::Result<File> {
    let flags = nix::fcntl::OFlag::O_NOFOLLOW | nix::fcntl::OFlag::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    Ok(file)
}
