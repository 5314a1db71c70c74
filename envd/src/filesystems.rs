//! Whether the guest's filesystems are frozen, and the files that envd writes.
//!
//! ```text
//!         programs stopped, then frozen     write while frozen: deferred, the newest counts
//! Thawed ------------------------------> Frozen { held, deferred }
//!    ^                                      |
//!    +--------------------------------------+
//!       thawed, then the deferred files written, then programs let go on
//! ```
//!
//! Programs are stopped first because one that waits for a frozen filesystem cannot be, and go on last, so that they find
//! what they are to have: filesystems that take their writes, the resolvers of this host. But both freezing and thawing
//! write, and a disk may be served by a program of the guest; so either is done with programs held for [`HELD_LIMIT`] only,
//! and then without.
//!
//! Holds: while the guest is frozen, envd itself writes to no filesystem that may be, because it would wait until the thaw
//! that only it can make. Everything that envd writes to disk therefore goes through [`Filesystems::write`]. State changes
//! on threads that finish whatever becomes of the caller, so that it says what is so.
//!
//! Not here: how freezing works (`freeze`), how programs are held (`hold`), what the files say (`identity`).

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};
use nix::unistd::sync;
use roost_common::guest::Held;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::console::{chain, say};
use crate::freeze::{Attempt, FreezeError, Mounted, thaw_all};
use crate::guest::Machine;
use crate::hold::Hold;
use crate::identity;

/// How long a caller waits for the disk. Longer than a disk that works takes, shorter than the host's patience.
pub(crate) const LIMIT: Duration = Duration::from_secs(10);

/// How long the disk has for a freeze or a thaw while programs are held.
const HELD_LIMIT: Duration = Duration::from_secs(5);

/// `RAMFS_MAGIC` of linux/magic.h.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// The state, which one call at a time looks at or changes.
#[derive(Default)]
pub(crate) struct Filesystems {
    state: Arc<Mutex<State>>,
    hold: Arc<Hold>,
}

#[derive(Default)]
enum State {
    #[default]
    Thawed,
    Frozen(Frozen),
}

#[derive(Default)]
struct Frozen {
    /// What we froze, in that order. Empty on a machine that is not ours.
    held: Vec<Arc<Mounted>>,
    deferred: Files,
}

/// Files that `/init` has envd write; what is absent stays as it was.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Files {
    /// `/etc/resolv.conf`.
    pub(crate) resolvers: Option<Vec<IpAddr>>,
    /// The files below `/run` that say who the sandbox is.
    pub(crate) identity: Option<BTreeMap<String, String>>,
}

/// Why files are not written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WriteError {
    #[error("/etc/resolv.conf cannot be written")]
    Resolvers(#[source] io::Error),
    #[error("the identity files cannot be written")]
    Identity(#[source] io::Error),
    #[error("the disk took too long")]
    Late,
}

impl Filesystems {
    pub(crate) fn new(hold: Arc<Hold>) -> Self {
        Self {
            state: Arc::default(),
            hold,
        }
    }

    /// Holds the programs and freezes all filesystems that are on disks; which programs. Where the machine is not ours, only
    /// envd behaves as if it had.
    ///
    /// # Errors
    /// None was frozen by this call, and the programs go on; those that were frozen or held before stay so.
    pub(crate) async fn freeze(&self, machine: Machine) -> Result<Held, FreezeError> {
        let state = self.lock().await.ok_or(FreezeError::Late)?;
        // A task of its own: a caller that leaves must not leave it half done, nor the state behind it.
        tokio::spawn(freeze_in_time(state, machine, Arc::clone(&self.hold)))
            .await
            .expect("freezing does not panic")
    }

    /// Thaws all filesystems that are on disks, ours or not, writes what was deferred, and lets the programs go on.
    ///
    /// # Errors
    /// Some are still frozen, and the guest counts as frozen; the programs go on. [`FreezeError::Late`]: so does the thaw.
    /// [`FreezeError::Release`]: all are thawed, but not all programs go on.
    pub(crate) async fn thaw(&self, machine: Machine, root: PathBuf) -> Result<(), FreezeError> {
        let state = self.lock().await.ok_or(FreezeError::Late)?;
        // As for freezing.
        tokio::spawn(thaw_in_time(state, machine, root, Arc::clone(&self.hold)))
            .await
            .expect("thawing does not panic")
    }

    /// Writes files below `root`, or remembers them until the thaw.
    ///
    /// # Errors
    /// Some may have been written. [`WriteError::Late`]: it goes on.
    pub(crate) async fn write(&self, root: PathBuf, files: Files) -> Result<(), WriteError> {
        let mut state = self.lock().await.ok_or(WriteError::Late)?;
        let work = spawn_blocking(move || match &mut *state {
            State::Thawed => files.write(&root),
            State::Frozen(frozen) => frozen.write(&root, files),
        });
        let done = timeout(LIMIT, work).await.map_err(|_| WriteError::Late)?;
        done.expect("writing files does not panic")
    }

    async fn lock(&self) -> Option<OwnedMutexGuard<State>> {
        timeout(LIMIT, Arc::clone(&self.state).lock_owned()).await.ok()
    }
}

async fn freeze_in_time(
    mut state: OwnedMutexGuard<State>,
    machine: Machine,
    hold: Arc<Hold>,
) -> Result<Held, FreezeError> {
    let frozen = match machine {
        Machine::Own => freeze_own(&hold).await,
        Machine::Borrowed => Ok((hold.hold().await, Vec::new())),
    };
    match (&mut *state, frozen) {
        (State::Frozen(frozen), Ok((programs, held))) => {
            frozen.held.extend(held);
            say!("filesystems frozen, {} programs held", programs.word());
            Ok(programs)
        }
        (State::Thawed, Ok((programs, held))) => {
            *state = State::Frozen(Frozen {
                held,
                deferred: Files::default(),
            });
            say!("filesystems frozen, {} programs held", programs.word());
            Ok(programs)
        }
        // What this call could not add to goes on as it was.
        (State::Frozen(_), Err(error)) => {
            hold.hold().await;
            Err(error)
        }
        (State::Thawed, Err(error)) => {
            release_or_say(&hold).await;
            Err(error)
        }
    }
}

/// Programs may be held after an error, or not.
async fn freeze_own(hold: &Hold) -> Result<(Held, Vec<Arc<Mounted>>), FreezeError> {
    // Most of it before anything stands still, so that all is so for as short a time as can be.
    let synced = timeout(LIMIT, spawn_blocking(sync)).await;
    synced
        .map_err(|_| FreezeError::Late)?
        .expect("writing out does not panic");
    match hold.hold().await {
        Held::None => Ok((Held::None, freeze_mounted(LIMIT, hold).await?)),
        held => match freeze_mounted(HELD_LIMIT, hold).await {
            Err(FreezeError::Late) => {
                say!("the filesystems cannot be frozen while programs are held, perhaps because one serves them");
                let mounted = freeze_mounted(LIMIT, hold).await?;
                Ok((hold.hold().await, mounted))
            }
            mounted => Ok((held, mounted?)),
        },
    }
}

/// Freezes what is mounted. Where that takes too long it is given up, and the programs go on: it may be one of them that it
/// waits for.
async fn freeze_mounted(limit: Duration, hold: &Hold) -> Result<Vec<Arc<Mounted>>, FreezeError> {
    let attempt = Arc::new(Attempt::new());
    let mut work = spawn_blocking({
        let attempt = Arc::clone(&attempt);
        move || attempt.run(Mounted::all()?)
    });
    if let Ok(done) = timeout(limit, &mut work).await {
        return done.expect("freezing does not panic");
    }
    release_or_say(hold).await;
    // Thaws, which writes: not on this thread.
    let undo = spawn_blocking(move || attempt.give_up());
    // With the state locked, so that no other call meets the rest of this one. Not for ever: a disk may be dead.
    timeout(LIMIT, async { (undo.await, work.await) }).await.ok();
    Err(FreezeError::Late)
}

async fn release_or_say(hold: &Hold) {
    if let Err(error) = hold.release().await {
        say!("letting programs go on: {}", chain(&error));
    }
}

/// Lets the programs go on whatever becomes of the filesystems.
async fn thaw_in_time(
    mut state: OwnedMutexGuard<State>,
    machine: Machine,
    root: PathBuf,
    hold: Arc<Hold>,
) -> Result<(), FreezeError> {
    // Hands the state back, so that no freeze comes between this and the release.
    let mut work = spawn_blocking(move || (thaw_now(&mut state, machine, &root), state));
    let early = timeout(HELD_LIMIT, &mut work).await;
    let released = hold.release().await.map_err(FreezeError::Release);
    let thawed = match early {
        Ok(done) => done,
        Err(_) => timeout(LIMIT - HELD_LIMIT, work).await.map_err(|_| FreezeError::Late)?,
    };
    let (thawed, _state) = thawed.expect("thawing does not panic");
    thawed.and(released)
}

fn thaw_now(state: &mut State, machine: Machine, root: &Path) -> Result<(), FreezeError> {
    if machine == Machine::Own {
        let held: &[Arc<Mounted>] = match state {
            State::Frozen(frozen) => &frozen.held,
            State::Thawed => &[],
        };
        // What is mounted may be frozen without us; what we froze may be mounted no more.
        let thawed = thaw_all(held.iter().map(|held| &**held));
        thawed.and(thaw_all(Mounted::all()?.iter()))?;
    }
    if let State::Frozen(frozen) = std::mem::take(state) {
        say!("filesystems thawed");
        // Not the caller's failure: they are thawed, and a full disk must not make a guest that cannot be woken.
        if let Err(error) = frozen.deferred.write(root) {
            say!("after the thaw: {}", chain(&error));
        }
    }
    Ok(())
}

impl Frozen {
    /// Writes what is surely not on a frozen filesystem, and remembers the rest.
    fn write(&mut self, root: &Path, files: Files) -> Result<(), WriteError> {
        let Files { resolvers, identity } = files;
        if resolvers.is_some() {
            self.deferred.resolvers = resolvers;
        }
        let Some(identity) = identity else { return Ok(()) };
        if identity::directories(root).iter().all(|path| is_in_memory(path)) {
            let now = Files {
                identity: Some(identity),
                resolvers: None,
            };
            return now.write(root);
        }
        // A template on which `/run` is no tmpfs.
        self.deferred.identity = Some(identity);
        Ok(())
    }
}

impl Files {
    fn write(&self, root: &Path) -> Result<(), WriteError> {
        if let Some(resolvers) = &self.resolvers {
            identity::write_resolvers(root, resolvers).map_err(WriteError::Resolvers)?;
        }
        if let Some(identity) = &self.identity {
            identity::write_files(root, identity).map_err(WriteError::Identity)?;
        }
        Ok(())
    }
}

/// Whether `path`, or what there is of it, is on a filesystem that has no disk and cannot be frozen.
pub(crate) fn is_in_memory(path: &Path) -> bool {
    let stat = path.ancestors().find_map(|path| statfs(path).ok());
    stat.is_some_and(|stat| [RAMFS_MAGIC, TMPFS_MAGIC].contains(&stat.filesystem_type()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::testing::Dir;

    fn resolvers(addresses: &[&str]) -> Files {
        Files {
            resolvers: Some(addresses.iter().map(|address| address.parse().unwrap()).collect()),
            identity: None,
        }
    }

    #[tokio::test]
    async fn while_frozen_resolvers_wait_for_the_thaw_and_the_newest_count() {
        let root = Dir::new("deferred");
        fs::create_dir_all(root.path().join("etc")).unwrap();
        let read = || fs::read_to_string(root.path().join("etc/resolv.conf")).unwrap_or_default();
        let filesystems = Filesystems::default();
        let write = async |files| filesystems.write(root.path().to_owned(), files).await.unwrap();
        let thaw = async || {
            let thawed = filesystems.thaw(Machine::Borrowed, root.path().to_owned()).await;
            thawed.unwrap();
        };
        write(resolvers(&["192.0.2.1"])).await;
        filesystems.freeze(Machine::Borrowed).await.unwrap();
        write(resolvers(&["192.0.2.2"])).await;
        // Neither a call that says nothing of them nor a repeated freeze makes them forgotten.
        write(Files::default()).await;
        filesystems.freeze(Machine::Borrowed).await.unwrap();
        assert_eq!(read(), "nameserver 192.0.2.1\n");
        write(resolvers(&["192.0.2.3"])).await;
        thaw().await;
        assert_eq!(read(), "nameserver 192.0.2.3\n");
        write(resolvers(&["192.0.2.4"])).await;
        thaw().await;
        assert_eq!(read(), "nameserver 192.0.2.4\n");
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_written_after_the_thaw_does_not_undo_it() {
        let root = Dir::new("unwritable");
        std::fs::write(root.path().join("etc"), "").unwrap();
        let filesystems = Filesystems::default();
        filesystems.freeze(Machine::Borrowed).await.unwrap();
        let write = async || {
            filesystems
                .write(root.path().to_owned(), resolvers(&["192.0.2.1"]))
                .await
        };
        write().await.unwrap();
        let thaw = filesystems.thaw(Machine::Borrowed, root.path().to_owned()).await;
        thaw.unwrap();
        assert!(matches!(write().await, Err(WriteError::Resolvers(_))), "still frozen");
    }

    #[test]
    fn while_frozen_identity_files_are_written_where_they_are_in_memory_alone() {
        let identity = || Files {
            identity: Some(identity::variables(Some("s-1"), None)),
            resolvers: None,
        };
        let mut frozen = Frozen::default();
        // Nothing can be made below it: writing there would fail.
        frozen.write(Path::new("/proc"), identity()).unwrap();
        assert_eq!(frozen.deferred, identity());
        if !is_in_memory(Path::new("/dev/shm")) {
            return;
        }
        let root = PathBuf::from(format!("/dev/shm/envd-identity-{}", std::process::id()));
        let mut frozen = Frozen::default();
        frozen.write(&root, identity()).unwrap();
        assert_eq!(frozen.deferred, Files::default());
        let written = fs::read_to_string(root.join("run/e2b/.E2B_SANDBOX_ID"));
        fs::remove_dir_all(&root).unwrap();
        assert_eq!(written.unwrap(), "s-1");
    }
}
