//! What is kept of a sandbox on disk, so that an agent that starts knows what its predecessor had.
//!
//! The record is durable before the step that relies on it: *creating* before anything else of the sandbox exists, *running*
//! before the create is answered, *paused* before the VM is stopped, *resuming* before the restored VM runs, *thawing* before its
//! guest may write, and *running* again before the resume is answered. So whoever reads one knows what may have happened since:
//!
//! | phase | what a new agent does where a VM still runs | and where none does |
//! |---|---|---|
//! | creating | ends it, removes all | removes all |
//! | running | adopts it, thawed | tombstone, removes all |
//! | paused | ends it: it was about to be stopped | keeps it |
//! | resuming | ends it: its guest has written nothing | keeps it |
//! | thawing | adopts it, thawed | keeps it: with its memory, unless the disk was written, or the host itself went down |
//!
//! Whether the disk was written its file's time of change tells, to whoever asks the kernel that has seen the writes. After a power cut that
//! time may be older than what is on the disk. In the last one nobody has been told that the sandbox runs, so whoever asked still has it for paused. That is why its memory is kept
//! until the guest has thawed, and why a VM that is lost there is no sandbox lost.

use roost_common::ids::SandboxId;
use roost_common::units::Sectors;
use serde::{Deserialize, Serialize};

use super::parts::Versions;
use super::plan::Plan;
use crate::errors::FileError;
use crate::guest::Token;
use crate::host::files::{Layout, read_small, write_durably, written_at};
use crate::host::images::Origin;
use crate::snapshot::Size;

/// Version of the format.
const VERSION: u32 = 1;

/// What a sandbox was doing when its record was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Being built; whoever finds this removes it.
    Creating,
    /// Answered as running.
    Running,
    /// On disk.
    Paused(Kept),
    /// On its way back from disk; nothing of that has been answered, and the guest is frozen.
    Resuming(Kept),
    /// The same, and the guest has been told to thaw, or is about to be.
    Thawing(Kept),
}

/// What of a paused sandbox can be resumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// The directory `vm/<generation>` with its memory.
    pub generation: u32,
    /// Whether that memory still belongs to the disk.
    pub memory: Memory,
    /// Who wanted it paused.
    pub reason: PauseReason,
    /// Whether the control plane has been told, where nobody had asked: the event is in the outbox.
    #[serde(default)]
    pub told: bool,
    /// When it was paused, in seconds since 1970.
    pub paused_at_unix: i64,
    /// When the exception store was last written, in nanoseconds since 1970. Later than that, somebody wrote to the disk behind the
    /// memory's back.
    pub disk_written_at: i64,
}

impl Kept {
    /// Whether its memory still belongs to its disk, as far as the exception store's time of change tells: final once no VM of it runs.
    ///
    /// # Errors
    /// [`FileError`] naming the store; nobody can say then.
    pub fn is_whole(&self, layout: &Layout, id: &SandboxId) -> Result<bool, FileError> {
        Ok(self.memory == Memory::Whole && written_at(&layout.cow(id))? == self.disk_written_at)
    }
}

/// Whether a memory snapshot can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Memory {
    /// It and the disk are of one moment.
    Whole,
    /// The disk has been written since; it can be booted, and that is all.
    Spent,
}

/// Who wanted a sandbox paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PauseReason {
    /// A caller.
    Requested,
    /// Its inactivity limit.
    Idle,
    /// The host is being emptied.
    Drain,
}

/// The record of a sandbox. Nobody but the agent reads it, for it holds the guest's token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Version of this format, 1.
    pub version: u32,
    /// What it was doing.
    pub phase: Phase,
    /// Its place in the network plan.
    pub slot: u32,
    /// What was asked for.
    pub plan: Plan,
    /// The size of its disk.
    pub disk: Sectors,
    /// When it was made, in seconds since 1970.
    pub created_at_unix: i64,
    /// What its envd asks of callers.
    pub token: Token,
    /// Which versions run in it, known from *running* on.
    pub versions: Versions,
    /// Which file its disk's changes are of, once that is known.
    #[serde(default)]
    pub origin: Option<Origin>,
}

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// Its content is none of ours.
    #[error("the record of sandbox {0} does not parse")]
    Format(String, #[source] serde_json::Error),
    /// Another version wrote it.
    #[error("the record of sandbox {0} is of version {1}, not {VERSION}")]
    Version(String, u32),
}

impl RecordError {
    /// Whether there is none: its create never got far.
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::File(error) if error.source.kind() == std::io::ErrorKind::NotFound)
    }
}

impl Record {
    /// The record of a create that begins.
    pub fn new(slot: u32, plan: Plan, disk: Sectors, created_at_unix: i64, token: Token) -> Self {
        Self {
            version: VERSION,
            phase: Phase::Creating,
            slot,
            plan,
            disk,
            created_at_unix,
            token,
            versions: Versions::default(),
            origin: None,
        }
    }

    /// The record of something whose own cannot be read.
    pub fn unknown(plan: Plan, slot: u32) -> Self {
        Self::new(slot, plan, Sectors(0), super::unix_now(), Token::random())
    }

    /// What its VM has.
    pub fn size(&self) -> Size {
        Size {
            vcpus: self.plan.vcpus,
            memory: self.plan.memory,
            disk: self.disk,
        }
    }

    /// The same, doing something else.
    #[must_use]
    pub fn with(&self, phase: Phase) -> Self {
        Self { phase, ..self.clone() }
    }

    /// Writes the record durably.
    ///
    /// # Errors
    /// [`FileError`]; the old record is intact.
    pub fn write(&self, layout: &Layout) -> Result<(), FileError> {
        let content = serde_json::to_vec_pretty(self).expect("strings and numbers serialise");
        write_durably(&layout.record(&self.plan.id), &content)
    }

    /// Reads a sandbox's record.
    ///
    /// # Errors
    /// Any [`RecordError`].
    pub fn read(layout: &Layout, id: &SandboxId) -> Result<Self, RecordError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let content = read_small(&layout.record(id))?;
        let format = |error| RecordError::Format(id.to_string(), error);
        let versioned: Versioned = serde_json::from_slice(&content).map_err(format)?;
        if versioned.version != VERSION {
            return Err(RecordError::Version(id.to_string(), versioned.version));
        }
        serde_json::from_slice(&content).map_err(format)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::egress::Egress;
    use crate::guest::Nonces;
    use crate::sandbox::plan::Wish;

    #[test]
    fn a_record_is_read_as_it_was_written_and_another_version_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let layout = Layout::new(dir.path(), dir.path());
        let id: SandboxId = "x".parse().expect("an id");
        std::fs::create_dir_all(layout.sandbox(&id)).expect("made");
        let plan = Plan::check(Wish::default(), &Config::default(), |_| None, || id.clone()).expect("checked");
        let kept = Kept {
            generation: 3,
            memory: Memory::Whole,
            reason: PauseReason::Idle,
            told: true,
            paused_at_unix: 5,
            disk_written_at: 1_700_000_000_123_456_789,
        };
        let created = Record::new(7, plan, Sectors(16), 5, Token::random());
        for phase in [
            Phase::Creating,
            Phase::Running,
            Phase::Paused(kept),
            Phase::Resuming(kept),
            Phase::Thawing(kept),
        ] {
            let record = created.with(phase);
            record.write(&layout).expect("written");
            assert_eq!(Record::read(&layout, &id).expect("read"), record);
        }
        std::fs::write(layout.record(&id), "{\"version\": 2, \"new\": {}}").expect("written");
        assert!(matches!(Record::read(&layout, &id), Err(RecordError::Version(_, 2))));
        std::fs::write(layout.record(&id), "{\"version\": 1").expect("written");
        assert!(matches!(Record::read(&layout, &id), Err(RecordError::Format(..))));
    }
    #[test]
    fn stored_records_are_read_and_what_they_do_not_say_is_as_it_was() {
        let dir = tempfile::tempdir().expect("a directory");
        let layout = Layout::new(dir.path(), dir.path());
        let id: SandboxId = "cl-5pvvpzk2ad7m842gxhvqksz49".parse().expect("an id");
        std::fs::create_dir_all(layout.sandbox(&id)).expect("made");
        let read = |stored: &str| {
            std::fs::write(layout.record(&id), stored).expect("written");
            Record::read(&layout, &id).expect("read")
        };
        let now = read(include_str!("samples/record-1.json"));
        assert!(matches!(
            now.phase,
            Phase::Paused(Kept {
                generation: 2,
                memory: Memory::Whole,
                ..
            })
        ));
        assert_eq!(
            (now.slot, now.disk, now.plan.egress.names.len()),
            (1, Sectors(497_664), 1)
        );
        assert_eq!(now.versions.nonces, Nonces::Repeated);
        // Of an agent that knew of neither nonces, policies, origins nor events.
        let first = read(include_str!("samples/record-1-first.json"));
        assert_eq!((first.versions.nonces, first.origin), (Nonces::Unknown, None));
        assert_eq!(first.plan.egress, Egress::default());
        assert!(first.plan.egress.internet && first.plan.egress.dns);
        let rest = Record {
            phase: now.phase,
            versions: now.versions.clone(),
            origin: now.origin,
            plan: Plan {
                egress: now.plan.egress.clone(),
                ..first.plan
            },
            ..first
        };
        assert_eq!(rest, now);
    }
}
