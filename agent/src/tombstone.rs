//! Why sandboxes ended that nobody asked to end: `tombstones/<id>.json`, kept for a day.

use std::path::Path;
use std::time::{Duration, SystemTime};

use roost_common::ids::SandboxId;
use roost_common::shim::{Exit, RESET_EVENT, WaitStatus};
use serde::{Deserialize, Serialize};

use crate::errors::{Chain, FileError};
use crate::host::files::{Layout, read_small, write_durably};
use crate::outbox::{Event, EventKind};

/// How long a tombstone is kept.
const KEPT: Duration = Duration::from_secs(24 * 60 * 60);
/// Version of the file's format.
const VERSION: u32 = 1;

/// Why a sandbox ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The guest's kernel panicked and reset its machine, which ends it.
    GuestPanic,
    /// The guest reset its machine, as by `reboot`, which ends it: it would come back without its identity.
    GuestReset,
    /// The guest powered off.
    GuestPoweredOff,
    /// The VMM ended by itself, with an error.
    VmmExited,
    /// A signal ended the VMM.
    VmmKilled,
    /// The kernel ended the VMM for want of memory.
    OutOfMemory,
    /// The shim ended, and the VMM with it.
    ShimLost,
    /// An agent started and found that it had been running, and its VMM gone without a word: the host was restarted, or its shim
    /// was killed meanwhile.
    VmmLost,
    /// Nobody used it for as long as it may be idle, and it could not be paused.
    NotPaused,
    /// Its VMM had stopped it for a snapshot that failed, and would not let it run on.
    Stopped,
    /// Its disk could not be written any more: the host's filesystem was full, or failed.
    DiskLost,
}

impl Reason {
    /// As it is written in files and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::GuestPanic => "guest_panic",
            Self::GuestReset => "guest_reset",
            Self::GuestPoweredOff => "guest_powered_off",
            Self::VmmExited => "vmm_exited",
            Self::VmmKilled => "vmm_killed",
            Self::OutOfMemory => "out_of_memory",
            Self::ShimLost => "shim_lost",
            Self::VmmLost => "vmm_lost",
            Self::NotPaused => "not_paused",
            Self::Stopped => "stopped",
            Self::DiskLost => "disk_lost",
        }
    }
}

/// The record of an end.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Tombstone {
    /// Version of this format, 1.
    pub version: u32,
    /// The sandbox.
    pub sandbox_id: String,
    /// Why it ended.
    pub reason: Reason,
    /// Exit code of the VMM, where it exited.
    pub exit_code: Option<i32>,
    /// Signal that ended the VMM, where one did.
    pub signal: Option<i32>,
    /// When it was made, in seconds since 1970.
    pub created_at_unix: i64,
    /// When it ended, in seconds since 1970.
    pub ended_at_unix: i64,
    /// The end of the guest's console; anything but printable ASCII is escaped, for a guest wrote it.
    pub console_tail: String,
    /// The end of the VMM's own messages, escaped likewise.
    pub vmm_log_tail: String,
}

impl Tombstone {
    /// The record of a sandbox that ended now.
    pub fn new(id: &SandboxId, created_at_unix: i64, end: End<'_>) -> Self {
        let exit = match end {
            End::Vmm(exit) => Some(exit),
            End::ShimLost | End::VmmLost | End::NotPaused | End::Stopped | End::DiskLost => None,
        };
        let reason = match end {
            End::Vmm(exit) => reason_of(exit),
            End::ShimLost => Reason::ShimLost,
            End::VmmLost => Reason::VmmLost,
            End::NotPaused => Reason::NotPaused,
            End::Stopped => Reason::Stopped,
            End::DiskLost => Reason::DiskLost,
        };
        let lines = |tail: Option<&[u8]>| match tail {
            Some(tail) => tail
                .split(|byte| *byte == b'\n')
                .map(|line| line.escape_ascii().to_string())
                .collect::<Vec<_>>()
                .join("\n"),
            None => String::new(),
        };
        Self {
            version: VERSION,
            sandbox_id: id.to_string(),
            reason,
            exit_code: exit.and_then(|exit| match exit.wait {
                WaitStatus::Exited(code) => Some(code),
                WaitStatus::Signaled(_) => None,
            }),
            signal: exit.and_then(|exit| match exit.wait {
                WaitStatus::Signaled(signal) => Some(signal),
                WaitStatus::Exited(_) => None,
            }),
            created_at_unix,
            ended_at_unix: crate::sandbox::unix_now(),
            console_tail: lines(exit.map(|exit| exit.console.as_slice())),
            vmm_log_tail: lines(exit.map(|exit| exit.log.as_slice())),
        }
    }

    /// What a control plane is told: that a sandbox was stopped by us, or ended by itself.
    pub fn event(&self) -> Option<Event> {
        let kind = match self.reason {
            Reason::NotPaused | Reason::GuestPoweredOff => EventKind::Stopped,
            Reason::GuestPanic
            | Reason::GuestReset
            | Reason::Stopped
            | Reason::VmmExited
            | Reason::VmmKilled
            | Reason::OutOfMemory
            | Reason::ShimLost
            | Reason::VmmLost
            | Reason::DiskLost => EventKind::Error,
        };
        let id = self.sandbox_id.parse().ok()?;
        Some(Event {
            error: Some(self.summary()),
            ..Event::new(kind, id, self.ended_at_unix)
        })
    }

    /// One clause for an error message.
    pub fn summary(&self) -> String {
        match (self.reason, self.exit_code, self.signal) {
            (Reason::GuestPanic, _, _) => "its guest's kernel panicked".into(),
            (Reason::GuestReset, _, _) => "its guest rebooted, which ends a sandbox".into(),
            (Reason::GuestPoweredOff, _, _) => "its guest powered off".into(),
            (Reason::VmmExited, Some(code), _) => format!("its VMM ended with exit code {code}"),
            (Reason::VmmKilled, _, Some(signal)) => format!("its VMM was ended by {}", WaitStatus::Signaled(signal)),
            (Reason::VmmExited | Reason::VmmKilled, _, _) => "its VMM ended".into(),
            (Reason::OutOfMemory, _, _) => "its VMM ran out of memory".into(),
            (Reason::ShimLost, _, _) => "its vmmshim ended, and the VMM with it".into(),
            (Reason::VmmLost, _, _) => {
                "its VMM had gone when the agent was started, as after a restart of the host".into()
            }
            (Reason::NotPaused, _, _) => "nobody used it, and it could not be paused".into(),
            (Reason::Stopped, _, _) => {
                "its VMM had stopped it for a snapshot that failed, and did not let it run on".into()
            }
            (Reason::DiskLost, _, _) => {
                "its disk could not be written any more, as when the host's is full, and is lost".into()
            }
        }
    }
}

/// What ended a sandbox.
#[derive(Debug, Clone, Copy)]
pub enum End<'a> {
    /// The VMM ended, as its shim reports.
    Vmm(&'a Exit),
    /// The shim has gone.
    ShimLost,
    /// An agent started and found its VMM gone.
    VmmLost,
    /// It was idle and could not be paused.
    NotPaused,
    /// Its VMM did not let it run on.
    Stopped,
    /// Its disk can be used no more.
    DiskLost,
}

/// What a Linux kernel prints first when it panics (`kernel/panic.c`), at a level that `quiet` does not hide.
const PANIC: &[u8] = b"Kernel panic - not syncing";

/// Why a VMM ended. The tails are read for it, which a guest or a VMM that it took over wrote: either can at most misname its own end.
/// A panic counts only with the reset that it leads to, so that a line on the console does not hide who killed the VMM.
fn reason_of(exit: &Exit) -> Reason {
    let contains = |tail: &[u8], what: &[u8]| tail.windows(what.len()).any(|window| window == what);
    match exit.wait {
        _ if exit.oom_kills > 0 => Reason::OutOfMemory,
        _ if contains(&exit.log, RESET_EVENT.as_bytes()) => {
            if contains(&exit.console, PANIC) {
                Reason::GuestPanic
            } else {
                Reason::GuestReset
            }
        }
        WaitStatus::Signaled(_) => Reason::VmmKilled,
        // Nobody but its guest tells a VMM of ours to end: we kill.
        WaitStatus::Exited(0) => Reason::GuestPoweredOff,
        WaitStatus::Exited(_) => Reason::VmmExited,
    }
}

/// Writes a tombstone and removes those that are older than a day.
///
/// # Errors
/// [`FileError`] naming the file that could not be written; one that could not be removed is only logged.
pub fn bury(layout: &Layout, tombstone: &Tombstone) -> Result<(), FileError> {
    let dir = layout.tombstones();
    let content = serde_json::to_vec_pretty(tombstone).expect("strings and numbers serialise");
    write_durably(&dir.join(format!("{}.json", tombstone.sandbox_id)), &content)?;
    if let Err(error) = expire(&dir, SystemTime::now()) {
        tracing::warn!(error = %Chain(&error), "old tombstones stay");
    }
    Ok(())
}

/// [`bury`], unless the sandbox's end is on record: an agent that was killed between writing and removing knew more.
///
/// # Errors
/// Those of [`bury`].
pub fn bury_once(layout: &Layout, tombstone: &Tombstone) -> Result<(), FileError> {
    let id = tombstone.sandbox_id.parse::<SandboxId>();
    let known = id.ok().and_then(|id| find(layout, &id));
    if known.is_some_and(|known| known.created_at_unix == tombstone.created_at_unix) {
        return Ok(());
    }
    bury(layout, tombstone)
}

/// The tombstone of a sandbox, where there is one that is not a day old. One of another version is left to whoever can read it.
pub fn find(layout: &Layout, id: &SandboxId) -> Option<Tombstone> {
    let content = read_small(&path(layout, id)).ok()?;
    let found = parse(&content)
        .inspect_err(|error| tracing::warn!(sandbox_id = %id, error = %Chain(error), "its tombstone cannot be read"))
        .ok()?;
    let age = crate::sandbox::unix_now().saturating_sub(found.ended_at_unix);
    u64::try_from(age)
        .is_ok_and(|age| age < KEPT.as_secs())
        .then_some(found)
}

/// Why a tombstone cannot be read.
#[derive(Debug, thiserror::Error)]
enum TombstoneError {
    #[error("a tombstone does not parse")]
    Format(#[source] serde_json::Error),
    #[error("a tombstone is of version {0}, not {VERSION}")]
    Version(u32),
}

fn parse(content: &[u8]) -> Result<Tombstone, TombstoneError> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let Versioned { version } = serde_json::from_slice(content).map_err(TombstoneError::Format)?;
    if version != VERSION {
        return Err(TombstoneError::Version(version));
    }
    serde_json::from_slice(content).map_err(TombstoneError::Format)
}

/// Removes the tombstone of an earlier sandbox of this id: a new one would be taken for it.
///
/// # Errors
/// [`FileError`] naming it.
pub fn forget(layout: &Layout, id: &SandboxId) -> Result<(), FileError> {
    let path = path(layout, id);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        outcome => outcome.map_err(|source| FileError::new("removing", &path, source)),
    }
}

fn path(layout: &Layout, id: &SandboxId) -> std::path::PathBuf {
    layout.tombstones().join(format!("{id}.json"))
}

fn expire(dir: &Path, now: SystemTime) -> Result<(), FileError> {
    let failed = |source| FileError::new("tidying", dir, source);
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let written = entry
            .metadata()
            .and_then(|metadata| metadata.modified())
            .map_err(failed)?;
        if now.duration_since(written).is_ok_and(|age| age > KEPT) {
            match std::fs::remove_file(entry.path()) {
                // Another sandbox's end was written down at the same time, and tidied first.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                outcome => outcome.map_err(failed)?,
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exit(wait: WaitStatus, oom_kills: u64) -> Exit {
        Exit {
            wait,
            oom_kills,
            console: b"one\n\x1b[31mtwo".to_vec(),
            log: Vec::new(),
        }
    }

    #[test]
    fn the_reason_says_what_ended_it() {
        let id: SandboxId = "x".parse().expect("an id");
        for (wait, oom, reason) in [
            (WaitStatus::Exited(0), 0, Reason::GuestPoweredOff),
            (WaitStatus::Exited(1), 0, Reason::VmmExited),
            (WaitStatus::Signaled(9), 0, Reason::VmmKilled),
            (WaitStatus::Signaled(9), 1, Reason::OutOfMemory),
        ] {
            assert_eq!(Tombstone::new(&id, 0, End::Vmm(&exit(wait, oom))).reason, reason);
        }
        let panic: &[u8] = b"[   9.5] Kernel panic - not syncing: Fatal exception\n";
        let reset = format!("{{ {RESET_EVENT} }}").into_bytes();
        for (console, log, reason) in [
            (panic, &reset[..], Reason::GuestPanic),
            (b"reboot: Restarting system", &reset[..], Reason::GuestReset),
            (panic, b"", Reason::VmmKilled),
        ] {
            let exit = Exit {
                console: console.to_vec(),
                log: log.to_vec(),
                ..exit(WaitStatus::Signaled(9), 0)
            };
            assert_eq!(Tombstone::new(&id, 0, End::Vmm(&exit)).reason, reason);
        }
    }

    #[test]
    fn a_tombstone_is_found_again_and_carries_no_control_characters() {
        let dir = tempfile::tempdir().expect("a directory");
        let layout = Layout::new(dir.path(), dir.path());
        std::fs::create_dir(layout.tombstones()).expect("made");
        let id: SandboxId = "x".parse().expect("an id");
        assert!(find(&layout, &id).is_none());
        bury(
            &layout,
            &Tombstone::new(&id, 5, End::Vmm(&exit(WaitStatus::Signaled(9), 0))),
        )
        .expect("written");
        let found = find(&layout, &id).expect("found");
        assert_eq!((found.signal, found.created_at_unix), (Some(9), 5));
        assert_eq!(found.console_tail, "one\n\\x1b[31mtwo");
    }

    #[test]
    fn a_stored_tombstone_is_read_and_one_of_a_newer_version_is_left_alone() {
        let first = parse(include_bytes!("samples/tombstone-1.json")).expect("read");
        assert_eq!(
            (first.reason, first.signal, first.exit_code),
            (Reason::VmmKilled, Some(9), None)
        );
        assert_eq!(first.sandbox_id, "cl-0w4c6e1m9xk2u7q3d5h8t0bzn");
        let newer = br#"{"version": 2, "sandbox_id": {"of": "x"}}"#;
        assert!(matches!(parse(newer), Err(TombstoneError::Version(2))));
        let dir = tempfile::tempdir().expect("a directory");
        let layout = Layout::new(dir.path(), dir.path());
        std::fs::create_dir(layout.tombstones()).expect("made");
        let id: SandboxId = "x".parse().expect("an id");
        std::fs::write(path(&layout, &id), newer).expect("written");
        assert!(find(&layout, &id).is_none());
        assert_eq!(std::fs::read(path(&layout, &id)).expect("there"), newer);
    }

    #[test]
    fn a_tombstone_that_is_a_day_old_is_none() {
        let dir = tempfile::tempdir().expect("a directory");
        let layout = Layout::new(dir.path(), dir.path());
        std::fs::create_dir(layout.tombstones()).expect("made");
        let id: SandboxId = "x".parse().expect("an id");
        for (hours, is_there) in [(23, true), (24, false), (1000, false)] {
            let mut old = Tombstone::new(&id, 5, End::ShimLost);
            old.ended_at_unix -= hours * 3600;
            bury(&layout, &old).expect("written");
            assert_eq!(find(&layout, &id).is_some(), is_there, "{hours} h old");
        }
    }

    #[test]
    fn a_reason_has_one_name() {
        for reason in [
            Reason::GuestPanic,
            Reason::GuestReset,
            Reason::GuestPoweredOff,
            Reason::VmmExited,
            Reason::VmmKilled,
            Reason::OutOfMemory,
            Reason::ShimLost,
            Reason::VmmLost,
            Reason::NotPaused,
            Reason::Stopped,
            Reason::DiskLost,
        ] {
            assert_eq!(serde_json::to_value(reason).expect("a string"), reason.name());
        }
    }

    #[test]
    fn tombstones_go_after_a_day() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("a.json"), "{}").expect("written");
        expire(dir.path(), SystemTime::now() + Duration::from_secs(23 * 3600)).expect("tidied");
        assert_eq!(std::fs::read_dir(dir.path()).expect("read").count(), 1);
        expire(dir.path(), SystemTime::now() + Duration::from_secs(25 * 3600)).expect("tidied");
        assert_eq!(std::fs::read_dir(dir.path()).expect("read").count(), 0);
    }
}
