//! Whether the guest's filesystems are frozen, and the files that envd writes.
//!
//! ```text
//!          freeze                      write while frozen: deferred, the newest counts
//! Thawed ----------> Frozen { held, deferred }
//!    ^                  |
//!    +------------------+  thaw, then the deferred files are written
//! ```
//!
//! Holds: while the guest is frozen, envd itself writes to no filesystem that may be, because it would wait until the thaw
//! that only it can make. Everything that envd writes to disk therefore goes through [`Filesystems::write`]. State changes
//! on threads that finish whatever becomes of the caller, so that it says what is so.
//!
//! Not here: how freezing works (`freeze`), what the files say (`identity`).

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};
use nix::unistd::sync;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::console::{chain, say};
use crate::freeze::{Attempt, FreezeError, Mounted, thaw_all};
use crate::guest::Machine;
use crate::identity;

/// How long a caller waits for the disk. Longer than a disk that works takes, shorter than the host's patience.
pub(crate) const LIMIT: Duration = Duration::from_secs(10);

/// `RAMFS_MAGIC` of linux/magic.h.
const RAMFS_MAGIC: FsType = FsType(0x8584_58f6);

/// The state, which one call at a time looks at or changes.
#[derive(Default)]
pub(crate) struct Filesystems(Arc<Mutex<State>>);

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
    /// Freezes all filesystems that are on disks. Where the machine is not ours, only envd behaves as if it had.
    ///
    /// # Errors
    /// None was frozen by this call; those that were before stay so.
    pub(crate) async fn freeze(&self, machine: Machine) -> Result<(), FreezeError> {
        let state = self.lock().await.ok_or(FreezeError::Late)?;
        // A task of its own: a caller that leaves must not leave it half done, nor the state behind it.
        tokio::spawn(freeze_in_time(state, machine))
            .await
            .expect("freezing does not panic")
    }

    /// Thaws all filesystems that are on disks, ours or not, and writes what was deferred.
    ///
    /// # Errors
    /// Some are still frozen, and the guest counts as frozen. [`FreezeError::Late`]: it goes on.
    pub(crate) async fn thaw(&self, machine: Machine, root: PathBuf) -> Result<(), FreezeError> {
        let state = self.lock().await.ok_or(FreezeError::Late)?;
        let work = spawn_blocking(move || thaw_now(state, machine, &root));
        let done = timeout(LIMIT, work).await.map_err(|_| FreezeError::Late)?;
        done.expect("thawing does not panic")
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
        timeout(LIMIT, Arc::clone(&self.0).lock_owned()).await.ok()
    }
}

async fn freeze_in_time(mut state: OwnedMutexGuard<State>, machine: Machine) -> Result<(), FreezeError> {
    let held = match machine {
        Machine::Own => freeze_own().await?,
        Machine::Borrowed => Vec::new(),
    };
    match &mut *state {
        State::Frozen(frozen) => frozen.held.extend(held),
        State::Thawed => {
            *state = State::Frozen(Frozen {
                held,
                deferred: Files::default(),
            });
        }
    }
    say!("filesystems frozen");
    Ok(())
}

async fn freeze_own() -> Result<Vec<Arc<Mounted>>, FreezeError> {
    let attempt = Arc::new(Attempt::new());
    let mut work = spawn_blocking({
        let attempt = Arc::clone(&attempt);
        move || {
            // Most of it before the first is frozen, so that each is so for as short a time as can be.
            sync();
            attempt.run(Mounted::all()?)
        }
    });
    if let Ok(done) = timeout(LIMIT, &mut work).await {
        return done.expect("freezing does not panic");
    }
    // Thaws, which writes: not on this thread.
    let undo = spawn_blocking(move || attempt.give_up());
    // With the state locked, so that no other call meets the rest of this one. Not for ever: a disk may be dead.
    timeout(LIMIT, async { (undo.await, work.await) }).await.ok();
    Err(FreezeError::Late)
}

fn thaw_now(mut state: OwnedMutexGuard<State>, machine: Machine, root: &Path) -> Result<(), FreezeError> {
    if machine == Machine::Own {
        let held: &[Arc<Mounted>] = match &*state {
            State::Frozen(frozen) => &frozen.held,
            State::Thawed => &[],
        };
        // What is mounted may be frozen without us; what we froze may be mounted no more.
        let thawed = thaw_all(held.iter().map(|held| &**held));
        thawed.and(thaw_all(Mounted::all()?.iter()))?;
    }
    if let State::Frozen(frozen) = std::mem::take(&mut *state) {
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
