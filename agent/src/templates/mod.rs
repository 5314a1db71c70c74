//! Templates that are made of sandboxes or imported: how one comes to be, is read, and goes.
//!
//! ```text
//! images/teams/<team>/<template>/          rootfs.ext4, template.json, and where it has memory: snapshot/ (a sealed generation)
//!                    .making-<template>-…  one that is being made; a start removes it
//!                    .deleted-<template>-… one that is deleted and still needed; it goes with the last sandbox that needs it
//! ```
//!
//! Holds: a template is whole and durable, or not there; two that are made at once under one name are one that is made and one error;
//! a deleted one is found by the sandboxes that were made of it and by nobody else.
//! Not here: how a sandbox is captured ([`crate::sandbox::capture`]), how one is made of a template ([`crate::sandbox::build`]), how an image
//! is made of other people's archives (`crate::cli`, on whatever machine and as whatever user: here an image is bytes).
//!
//! Functions here block; callers put them on a blocking thread.

pub(crate) mod digest;
pub mod import;
pub mod look;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use roost_common::units::Bytes;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::errors::{Chain, FileError};
use crate::guest::Token;
use crate::host::files::{self, make_dir, names, read_small, sync_dir, write_durably};
use crate::host::images::{ROOTFS, TemplateRef, base36};
use crate::sandbox::build::random_hex;
use crate::snapshot::{self, MEMORY, Manifest, Size, SnapshotError};
use digest::Digest;
use import::ImportError;

/// A template's memory, where it has some.
const SNAPSHOT: &str = "snapshot";
/// What is known of a template.
const FILE: &str = "template.json";
/// Version of that file's format.
const VERSION: u32 = 1;
const MAKING: &str = ".making-";
const DELETED: &str = ".deleted-";

/// What a template is to be made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CaptureKind {
    /// Memory and disk.
    Snapshot,
    /// The disk alone.
    Rootfs,
}

/// A template that somebody wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaptureWish {
    /// Of what.
    pub kind: CaptureKind,
    /// Under which identity.
    pub template: TemplateRef,
    /// Under which name, for people.
    pub name: String,
}

/// Why a template is not made, read or deleted.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// There is one.
    #[error("template {template} of team {team} is there already")]
    Exists {
        /// The team.
        team: Uuid,
        /// The template.
        template: Uuid,
    },
    /// It is the platform's.
    #[error("team and template all zero are the platform's own image, which is neither made nor deleted here")]
    Own,
    /// A file operation.
    #[error(transparent)]
    File(#[from] FileError),
    /// Its file is none of ours.
    #[error("{} is no template of this version", path.display())]
    Format {
        /// The file.
        path: PathBuf,
    },
    /// Its memory.
    #[error("the template's memory cannot be used")]
    Snapshot(#[from] SnapshotError),
    /// There is none.
    #[error("no template {template} of team {team} on this host")]
    Unknown {
        /// The team.
        team: Uuid,
        /// The template.
        template: Uuid,
    },
    /// Its root filesystem is not what it was when it was made.
    #[error(
        "{} has {found} bytes, and had {expected} when the template was made: it is damaged, and `roost template verify` says how much \
         of it",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What it has.
        found: u64,
        /// What it had.
        expected: u64,
    },
    /// What was sent to be one.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// Its reader has gone.
    #[error("the template was not read to its end")]
    Stopped,
}

impl TemplateError {
    /// There is no such template.
    pub fn unknown(which: TemplateRef) -> Self {
        Self::Unknown {
            team: which.team,
            template: which.template,
        }
    }
}

/// What is known of a template. Nobody but the agent reads it, for it may hold a guest's token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplateFile {
    /// Version of this format, 1.
    version: u32,
    /// For people.
    name: String,
    /// When it was made, in seconds since 1970.
    made_at_unix: i64,
    /// What the envd in its memory asks of callers, where it has memory: who wakes it must know, and sets another.
    token: Option<Token>,
    /// Its root filesystem. Not in templates of agents before this was looked at, which read this file all the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rootfs: Option<Sum>,
    /// Its memory, where it has some.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    memory: Option<Sum>,
}

/// What a large file was when its template was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sum {
    /// Its length.
    pub length: Bytes,
    /// Its checksum.
    pub digest: Digest,
}

/// What the large files of a template were when it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sums {
    /// Its root filesystem.
    pub rootfs: Sum,
    /// Its memory, where it has some.
    pub memory: Option<Sum>,
}

impl TemplateFile {
    /// A template that is made now.
    pub fn new(name: String, token: Option<Token>, sums: Sums) -> Self {
        Self {
            version: VERSION,
            name,
            made_at_unix: crate::sandbox::unix_now(),
            token,
            rootfs: Some(sums.rootfs),
            memory: sums.memory,
        }
    }

    /// What is known of the template in `dir`; `None` where an operator has put it there without saying anything.
    ///
    /// # Errors
    /// [`TemplateError::File`], [`TemplateError::Format`].
    fn read(dir: &Path) -> Result<Option<Self>, TemplateError> {
        let path = dir.join(FILE);
        let content = match read_small(&path) {
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => return Ok(None),
            outcome => outcome?,
        };
        match serde_json::from_slice::<Self>(&content) {
            Ok(file) if file.version == VERSION => Ok(Some(file)),
            _ => Err(TemplateError::Format { path }),
        }
    }

    /// Whether the root filesystem in `dir`, of `length` bytes, is as long as it was.
    fn check(&self, dir: &Path, length: u64) -> Result<(), TemplateError> {
        match &self.rootfs {
            Some(known) if known.length.0 != length => Err(TemplateError::Damaged {
                path: dir.join(ROOTFS),
                found: length,
                expected: known.length.0,
            }),
            Some(_) | None => Ok(()),
        }
    }
}

/// Whether a template's root filesystem is as long as it was: what can be told at each create. What is in it, [`look::verify`] tells.
///
/// # Errors
/// [`TemplateError::Damaged`].
pub fn check(dir: &Path, length: Bytes) -> Result<(), TemplateError> {
    // One that cannot be read says nothing of the root filesystem; of the memory it is asked again.
    match TemplateFile::read(dir) {
        Ok(Some(file)) => file.check(dir, length.0),
        Ok(None) | Err(_) => Ok(()),
    }
}

/// A template that is being made; it goes with this value unless it is [finished](Self::finish).
#[derive(Debug)]
pub struct Making {
    dir: PathBuf,
    place: PathBuf,
    template: TemplateRef,
    is_finished: bool,
}

impl Making {
    /// Makes an empty directory for a template to be.
    ///
    /// # Errors
    /// [`TemplateError::Own`], [`TemplateError::Exists`], [`TemplateError::File`].
    pub fn begin(images: &Path, template: TemplateRef) -> Result<Self, TemplateError> {
        if template.is_minimal() {
            return Err(TemplateError::Own);
        }
        let place = template.dir(images);
        if place.symlink_metadata().is_ok() {
            return Err(exists(template));
        }
        let team = team_of(&place);
        for dir in [team.parent().unwrap_or(images), team] {
            match make_dir(dir) {
                Err(error) if error.source.kind() == io::ErrorKind::AlreadyExists => {}
                outcome => {
                    outcome?;
                    sync_dir(dir.parent().unwrap_or(images))?;
                }
            }
        }
        let name = format!("{MAKING}{}-{}", base36(template.template.as_u128()), random_hex());
        let dir = team.join(name);
        make_dir(&dir)?;
        Ok(Self {
            dir,
            place,
            template,
            is_finished: false,
        })
    }

    /// Where its root filesystem is to be.
    pub fn rootfs(&self) -> PathBuf {
        self.dir.join(ROOTFS)
    }

    /// Where its memory is to be.
    pub fn snapshot(&self) -> PathBuf {
        self.dir.join(SNAPSHOT)
    }

    /// Reads the files that are there, for what is to be known of them later.
    ///
    /// # Errors
    /// [`FileError`] naming the file.
    pub fn sums(&self) -> Result<Sums, FileError> {
        let memory = self.snapshot().join(MEMORY);
        Ok(Sums {
            rootfs: sum(&self.rootfs())?,
            memory: memory.exists().then(|| sum(&memory)).transpose()?,
        })
    }

    /// Lets the template appear. What its files take on disk.
    ///
    /// # Errors
    /// [`TemplateError::Exists`], [`TemplateError::File`]; there is none of it then.
    pub fn finish(mut self, file: &TemplateFile) -> Result<Bytes, TemplateError> {
        let content = serde_json::to_vec_pretty(file).expect("strings and numbers serialise");
        write_durably(&self.dir.join(FILE), &content)?;
        sync_dir(&self.dir)?;
        let size = allocated(&self.dir)?;
        // The lock: of two that get here one finds the name taken.
        match renameat_with(CWD, &self.dir, CWD, &self.place, RenameFlags::NOREPLACE) {
            Err(rustix::io::Errno::EXIST) => return Err(exists(self.template)),
            outcome => outcome.map_err(|errno| FileError::new("renaming", &self.dir, errno.into()))?,
        }
        self.is_finished = true;
        sync_dir(team_of(&self.place))?;
        Ok(size)
    }
}

fn sum(path: &Path) -> Result<Sum, FileError> {
    let read = File::open(path).and_then(|file| digest::read(&file, |_| true));
    let read = read.map_err(|source| FileError::new("reading", path, source))?;
    Ok(Sum {
        length: Bytes(read.length),
        digest: read.digest,
    })
}

impl Drop for Making {
    fn drop(&mut self) {
        if self.is_finished {
            return;
        }
        if let Err(error) = files::remove_tree(&self.dir) {
            tracing::error!(error = %Chain(&error), "half a template could not be removed; that is tried again");
            remove_later(self.dir.clone());
        }
    }
}

/// Pause between two attempts to remove half a template, and how many there are: it may be gibibytes, and what was in the way, such as
/// a want of descriptors, passes.
const REMOVAL_PAUSE: Duration = Duration::from_secs(5);
const REMOVAL_ATTEMPTS: u32 = 120;

/// Removes a directory on a thread of its own, once that is possible.
fn remove_later(dir: PathBuf) {
    let attempts = move || {
        for _ in 0..REMOVAL_ATTEMPTS {
            std::thread::sleep(REMOVAL_PAUSE);
            match files::remove_tree(&dir) {
                Ok(()) => return,
                Err(error) => tracing::debug!(error = %Chain(&error), "half a template stays"),
            }
        }
        tracing::error!(path = %dir.display(), "half a template stays until the agent is started anew");
    };
    let thread = std::thread::Builder::new()
        .name("template-remains".into())
        .spawn(attempts);
    if let Err(error) = thread {
        tracing::error!(%error, "half a template stays until the agent is started anew");
    }
}

fn exists(which: TemplateRef) -> TemplateError {
    TemplateError::Exists {
        team: which.team,
        template: which.template,
    }
}

fn team_of(place: &Path) -> &Path {
    place.parent().expect("a template is in its team's directory")
}

/// What all files of a directory take on disk.
fn allocated(dir: &Path) -> Result<Bytes, FileError> {
    let failed = |source| FileError::new("measuring", dir, source);
    let mut sum = 0;
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let metadata = entry.metadata().map_err(failed)?;
        sum += if metadata.is_dir() {
            allocated(&entry.path())?.0
        } else {
            snapshot::allocated(&metadata).0
        };
    }
    Ok(Bytes(sum))
}

/// A template's memory.
#[derive(Debug)]
pub struct Memory {
    /// The directory that holds it: a sealed generation.
    pub dir: PathBuf,
    /// What it is of.
    pub manifest: Manifest,
    /// What the envd in it asks of callers.
    pub token: Token,
}

/// The memory of the template in `dir`; `None` where it has none. Its checksums are compared when it is copied.
///
/// # Errors
/// Any [`TemplateError`].
pub fn memory(dir: &Path) -> Result<Option<Memory>, TemplateError> {
    let snapshot = dir.join(SNAPSHOT);
    if !snapshot.exists() {
        return Ok(None);
    }
    match TemplateFile::read(dir)?.and_then(|file| file.token) {
        Some(token) => Ok(Some(Memory {
            manifest: Manifest::read(&snapshot)?,
            dir: snapshot,
            token,
        })),
        None => Err(TemplateError::Format { path: dir.join(FILE) }),
    }
}

/// What a sandbox that asks for nothing else has, where its template carries memory. What cannot be read is told by the create.
pub fn size(images: &Path, template: TemplateRef) -> Option<Size> {
    if template.is_minimal() {
        return None;
    }
    let found = memory(&template.dir(images)).ok().flatten()?;
    Some(found.manifest.about.size)
}

/// Deletes a template: from here on nothing is made of it. Its files stay for [`sweep`] to remove. Whether there was one.
///
/// # Errors
/// [`TemplateError::Own`], [`TemplateError::File`].
pub fn delete(images: &Path, template: TemplateRef) -> Result<bool, TemplateError> {
    if template.is_minimal() {
        return Err(TemplateError::Own);
    }
    let place = template.dir(images);
    let team = team_of(&place);
    let name = format!("{DELETED}{}-{}", base36(template.template.as_u128()), random_hex());
    match fs::rename(&place, team.join(name)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        outcome => outcome.map_err(|source| FileError::new("renaming", &place, source))?,
    }
    sync_dir(team)?;
    Ok(true)
}

/// The directories of a template that was deleted, once or more often.
pub(crate) fn deleted(place: &Path) -> Vec<PathBuf> {
    let Some(name) = place.file_name().and_then(|name| name.to_str()) else {
        return Vec::new();
    };
    let entries = fs::read_dir(team_of(place)).into_iter().flatten().flatten();
    entries
        .filter(|entry| template_in(DELETED, &entry.file_name().to_string_lossy()) == Some(name))
        .map(|entry| entry.path())
        .collect()
}

/// A template as its directories name it: team and template, in base 36.
pub type Named = (String, String);

/// How the directories name a template.
pub fn named(template: TemplateRef) -> Named {
    (base36(template.team.as_u128()), base36(template.template.as_u128()))
}

/// What of templates is swept away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sweep {
    /// Those that were deleted.
    Deleted,
    /// And, when the agent has just started, those that were never finished.
    DeletedAndUnfinished,
}

/// Removes what is left of templates, but for those deleted ones that are needed.
///
/// # Errors
/// [`FileError`] naming what could not be read or removed.
pub fn sweep(images: &Path, needed: &BTreeSet<Named>, what: Sweep) -> Result<(), FileError> {
    let teams = images.join("teams");
    for team in names_if_any(&teams)? {
        let dir = teams.join(&team);
        for name in names_if_any(&dir)? {
            let deleted = template_in(DELETED, &name);
            let is_needed = deleted.is_some_and(|template| needed.contains(&(team.clone(), template.to_owned())));
            let was_making = what == Sweep::DeletedAndUnfinished && template_in(MAKING, &name).is_some();
            if was_making || (deleted.is_some() && !is_needed) {
                files::remove_tree(&dir.join(name))?;
            }
        }
    }
    Ok(())
}

/// The template in the name of a directory that is being made or was deleted.
fn template_in<'a>(prefix: &str, name: &'a str) -> Option<&'a str> {
    name.strip_prefix(prefix)?.split_once('-').map(|(template, _)| template)
}

/// The names in a directory; none where it is not there, or is none.
fn names_if_any(dir: &Path) -> Result<Vec<String>, FileError> {
    match names(dir) {
        Err(error)
            if matches!(
                error.source.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(Vec::new())
        }
        outcome => outcome,
    }
}
