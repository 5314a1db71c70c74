//! The outbox's file: `events.log`, to which records are appended, one a line.
//!
//! ```text
//! 71309a33 {"version":1}                                        the first line
//! d5bbdf66 {"put":{"number":7,"event":{"event":"sandbox.stopped","sandbox_id":"cl-1","timestamp":1754000000}}}
//! e18f0400 {"gone":[7]}                                         taken by the receiver, refused by it, or dropped
//! ^ CRC-32 of the JSON, eight hex digits
//! ```
//!
//! JSON has no line ends inside, so a line that is damaged costs no other. Numbers of puts rise through the file. An event that is
//! put and not gone is kept.
//!
//! Puts are synced before anybody is told. What is gone is written and not synced: a killed agent loses none of it, a power failure
//! some, and then events are delivered again. The file grows to twice what is kept and [`SLACK`], then it is [written
//! anew](Log::rewrite) with what is kept; the old one is whole until the new one, `events.new`, has taken its name.
//!
//! Functions here block.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::backlog::Backlog;
use super::{Event, Limits, OutboxError};
use crate::errors::FileError;
use crate::host::files::write_durably;

/// Version of the format.
const VERSION: u32 = 1;
/// Longest line of ours, its end included: [`MAX_EVENT`](super::MAX_EVENT) or [`GONE_PER_LINE`] numbers, and what is around them.
const MAX_LINE: u64 = 4096;
/// Numbers in one record of what is gone: 20 digits and a comma each.
const GONE_PER_LINE: usize = 128;
/// How much a small log may grow before it is written anew, so that a few events do not rewrite it all the time.
const SLACK: u64 = 64 << 10;
/// Most that is set aside of a damaged log; it is for a person to look at.
const MAX_SET_ASIDE: usize = 1 << 20;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Record<E> {
    Version(u32),
    Put { number: u64, event: E },
    Gone(Vec<u64>),
}

/// The open file. At most one process has it.
#[derive(Debug)]
pub(super) struct Log {
    /// The directory: locked for as long as this is open, and synced after a rename.
    dir: File,
    path: PathBuf,
    file: File,
    length: u64,
    /// Whether the file, or its name, may be other than what was written: then it is written anew before it is relied on.
    suspect: bool,
    /// The length at which to try again to write it anew, where that failed.
    patience: u64,
    /// Longest that the file may become.
    max_length: u64,
    next_number: u64,
    /// Gone, and not yet in the file as gone.
    owed: Vec<u64>,
}

/// When an append has to be on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Durable {
    /// Before it returns.
    Now,
    /// When the kernel sees fit, or with the next append that is synced.
    Later,
}

impl Log {
    /// Opens the log in `dir`, which is made where it is missing, and puts what it keeps into `backlog`. What cannot be read is
    /// set aside.
    pub(super) fn open(dir: &Path, limits: &Limits, backlog: &mut Backlog) -> Result<Self, OutboxError> {
        let lock = lock(dir)?;
        let path = dir.join("events.log");
        let file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&path)
            .map_err(|source| FileError::new("opening", &path, source))?;
        let found = Found::read(&file, &path)?;
        for (number, event) in found.kept {
            let bytes = put_line(number, &event).len() as u64;
            backlog.insert(number, event.into(), bytes);
        }
        let mut log = Self {
            dir: lock,
            path,
            file,
            length: found.length,
            suspect: false,
            patience: 0,
            max_length: limits.bytes.saturating_mul(3).saturating_add(2 * SLACK),
            next_number: found.highest + 1,
            owed: Vec::new(),
        };
        if found.damage.bytes > 0 {
            log.set_aside(&found.damage)?;
        }
        if found.damage.bytes > 0 || found.length == 0 {
            log.rewrite(&content(backlog))?;
        }
        // Its name, and a rename that a killed agent did not live to sync.
        log.sync_dir()?;
        Ok(log)
    }

    /// A number for an event, higher than any before.
    pub(super) fn take_number(&mut self) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        number
    }

    /// Notes events that are gone; the next append has them in it. They must be in no backlog any more.
    pub(super) fn owe(&mut self, gone: Vec<u64>) {
        self.owed.extend(gone);
    }

    /// Appends [lines of puts](put_line), and what is owed.
    ///
    /// # Errors
    /// [`FileError`]; what was appended before is intact, and after a restart some of `puts` may be found all the same.
    pub(super) fn append(&mut self, mut puts: Vec<u8>, durable: Durable) -> Result<(), FileError> {
        puts.extend(gone_lines(&self.owed));
        if let Err(source) = self.file.write_all(&puts) {
            // Half a line would spoil the next one.
            self.suspect |= self.file.set_len(self.length).is_err();
            return Err(FileError::new("appending to", &self.path, source));
        }
        self.length += puts.len() as u64;
        self.owed.clear();
        if durable == Durable::Now {
            // The name is synced since the file was made, and the length goes with the data.
            self.file.sync_data().map_err(|source| {
                // The kernel may have thrown the data away and forget the failure: syncing again would prove nothing.
                self.suspect = true;
                FileError::new("syncing", &self.path, source)
            })?;
        }
        Ok(())
    }

    /// Whether the file must be written anew before anything is appended.
    pub(super) fn is_suspect(&self) -> bool {
        self.suspect || self.length > self.max_length
    }

    /// Whether so much of the file is of no use any more that it should be written anew.
    pub(super) fn is_wasteful(&self, kept: u64) -> bool {
        self.length > kept.saturating_mul(2).saturating_add(SLACK).max(self.patience)
    }

    /// Writes the file anew, with the [`content`] of what is kept and nothing else.
    ///
    /// # Errors
    /// [`FileError`]; the old one is intact and in use, unless [`Self::is_suspect`].
    pub(super) fn rewrite(&mut self, content: &[u8]) -> Result<(), FileError> {
        // Not `write_durably`: the new file's descriptor has to be in hand when it takes the name, and a failure before that must
        // leave the old one in use, for a full disk often has room for a few lines more but not for a second log.
        self.patience = self.length + SLACK;
        let new = self.path.with_extension("new");
        let step = |what, path: &Path, source| FileError::new(what, path, source);
        let mut file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&new)
            .map_err(|error| step("making", &new, error))?;
        file.set_len(0).map_err(|error| step("emptying", &new, error))?;
        file.write_all(content).map_err(|error| step("writing", &new, error))?;
        file.sync_all().map_err(|error| step("syncing", &new, error))?;
        fs::rename(&new, &self.path).map_err(|error| step("replacing", &self.path, error))?;
        self.file = file;
        self.length = content.len() as u64;
        self.patience = 0;
        self.owed.clear();
        // Until the directory is on the disk, a power failure may bring the old file back, without what is appended to this one.
        self.suspect = true;
        self.sync_dir()?;
        self.suspect = false;
        Ok(())
    }

    fn sync_dir(&self) -> Result<(), FileError> {
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        self.dir
            .sync_all()
            .map_err(|source| FileError::new("syncing", dir, source))
    }

    fn set_aside(&self, damage: &Damage) -> Result<(), FileError> {
        let aside = self.path.with_extension("damaged");
        write_durably(&aside, &damage.sample)?;
        tracing::warn!(
            path = %self.path.display(), lines = damage.lines, bytes = damage.bytes, set_aside = %aside.display(),
            "the outbox was damaged, as by a power failure; what can be read of it is kept"
        );
        Ok(())
    }

    /// Makes every append fail as on a full disk.
    #[cfg(test)]
    pub(super) fn fill_disk(&mut self) {
        self.file = OpenOptions::new().append(true).open("/dev/full").expect("opened");
    }
}

/// The line of an event that is put.
pub(super) fn put_line(number: u64, event: &Event) -> Vec<u8> {
    line(&Record::Put { number, event })
}

fn gone_lines(numbers: &[u64]) -> Vec<u8> {
    let records = numbers.chunks(GONE_PER_LINE);
    records
        .flat_map(|numbers| line(&Record::Gone::<&Event>(numbers.to_vec())))
        .collect()
}

/// A whole log, with what is kept and nothing else.
pub(super) fn content(kept: &Backlog) -> Vec<u8> {
    let mut content = line(&Record::Version::<&Event>(VERSION));
    for (number, event) in kept.iter() {
        content.extend(put_line(number, event));
    }
    content
}

fn line(record: &Record<&Event>) -> Vec<u8> {
    let json = serde_json::to_string(record).expect("strings and numbers serialise");
    format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes())).into_bytes()
}

fn parse(line: &[u8]) -> Option<Record<Event>> {
    let (sum, json) = line.strip_suffix(b"\n")?.split_at_checked(9)?;
    let sum = std::str::from_utf8(sum.strip_suffix(b" ")?).ok()?;
    let intact = u32::from_str_radix(sum, 16) == Ok(crc32fast::hash(json));
    intact.then(|| serde_json::from_slice(json).ok()).flatten()
}

/// Makes the directory where it is missing, and locks it.
fn lock(path: &Path) -> Result<File, OutboxError> {
    let step = |what, path: &Path, source| FileError::new(what, path, source);
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        outcome => outcome.map_err(|error| step("making", path, error))?,
    }
    let parent = path.parent().unwrap_or(Path::new("/"));
    File::open(parent)
        .and_then(|parent| parent.sync_all())
        .map_err(|error| step("syncing", parent, error))?;
    let dir = File::open(path).map_err(|error| step("opening", path, error))?;
    match dir.try_lock() {
        Ok(()) => Ok(dir),
        Err(TryLockError::WouldBlock) => Err(OutboxError::InUse { path: path.into() }),
        Err(TryLockError::Error(error)) => Err(step("locking", path, error).into()),
    }
}

/// What a log has in it.
#[derive(Default)]
struct Found {
    kept: BTreeMap<u64, Event>,
    highest: u64,
    length: u64,
    damage: Damage,
}

#[derive(Default)]
struct Damage {
    lines: u64,
    bytes: u64,
    /// The first [`MAX_SET_ASIDE`] of them.
    sample: Vec<u8>,
}

impl Found {
    /// Reads a log to its end; memory is bounded by what is good in it and by [`MAX_SET_ASIDE`].
    fn read(file: &File, path: &Path) -> Result<Self, OutboxError> {
        let mut found = Self::default();
        let mut reader = BufReader::new(file);
        let (mut line, mut last_put) = (Vec::new(), 0);
        loop {
            line.clear();
            // A longer line is none of ours, and is judged in pieces.
            let read = reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line);
            if read.map_err(|source| FileError::new("reading", path, source))? == 0 {
                return Ok(found);
            }
            found.length += line.len() as u64;
            match parse(&line) {
                Some(Record::Version(VERSION)) => {}
                Some(Record::Version(version)) => {
                    let path = path.into();
                    return Err(OutboxError::Version { path, version });
                }
                Some(Record::Put { number, event }) if number > last_put => {
                    last_put = number;
                    found.highest = found.highest.max(number);
                    found.kept.insert(number, event);
                }
                Some(Record::Gone(numbers)) => {
                    for number in numbers {
                        found.highest = found.highest.max(number);
                        found.kept.remove(&number);
                    }
                }
                Some(Record::Put { .. }) | None => found.damage.add(&line),
            }
        }
    }
}

impl Damage {
    fn add(&mut self, line: &[u8]) {
        self.lines += 1;
        self.bytes += line.len() as u64;
        let room = MAX_SET_ASIDE.saturating_sub(self.sample.len());
        self.sample.extend(&line[..line.len().min(room)]);
    }
}
