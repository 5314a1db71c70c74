//! What is kept of a sandbox on disk, so that an agent that starts knows what its predecessor had.
//!
//! The record is durable before the step that relies on it: *creating* before anything else of the sandbox exists, *running*
//! before the create is answered.

use roost_common::ids::SandboxId;
use serde::{Deserialize, Serialize};

use super::plan::Plan;
use crate::errors::FileError;
use crate::host::files::{Layout, read_small, write_durably};

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
}

/// The record of a sandbox.
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
    /// When it was made, in seconds since 1970.
    pub created_at_unix: i64,
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

impl Record {
    /// A record of this version.
    pub fn new(phase: Phase, slot: u32, plan: Plan, created_at_unix: i64) -> Self {
        Self {
            version: VERSION,
            phase,
            slot,
            plan,
            created_at_unix,
        }
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
    use crate::sandbox::plan::Wish;

    #[test]
    fn a_record_is_read_as_it_was_written_and_another_version_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let layout = Layout::new(dir.path(), dir.path());
        let id: SandboxId = "x".parse().expect("an id");
        std::fs::create_dir_all(layout.sandbox(&id)).expect("made");
        let plan = Plan::check(Wish::default(), &Config::default(), || id.clone()).expect("checked");
        let record = Record::new(Phase::Creating, 7, plan, 5);
        record.write(&layout).expect("written");
        assert_eq!(Record::read(&layout, &id).expect("read"), record);
        std::fs::write(layout.record(&id), "{\"version\": 2, \"new\": {}}").expect("written");
        assert!(matches!(Record::read(&layout, &id), Err(RecordError::Version(_, 2))));
        std::fs::write(layout.record(&id), "{\"version\": 1").expect("written");
        assert!(matches!(Record::read(&layout, &id), Err(RecordError::Format(..))));
    }
}
