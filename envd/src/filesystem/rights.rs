//! Work on files with the rights of a user: one thread for each piece of work, which becomes the user and then ends.
//!
//! Holds: what such a thread touches, the kernel checks as if the user's own program did: files that it makes are the
//! user's, and no capability helps it past a mode, a quota or the blocks that are kept for root. A thread that has become
//! somebody is never used for anybody else: it ends with its work, so there is nothing to be restored.
//!
//! Only the filesystem ids change (setfsuid(2)), not the real and effective ones: those would let the user's programs
//! signal the thread, and a signal that kills a thread kills all of envd.

use std::sync::Arc;

use nix::errno::Errno;
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::{FileError, Step};
use crate::process::child::Credentials;
use crate::process::spawn::credentials;
use crate::sys;
use crate::users::User;

/// Such threads at a time; more wait, on no thread. Each costs some pages of stack, and an upload has one for as long as it
/// takes.
const MAX_THREADS: usize = 256;

/// The room for such threads.
pub(crate) struct Threads(Arc<Semaphore>);

impl Default for Threads {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MAX_THREADS)))
    }
}

impl Threads {
    /// Does `work` as `user`, to its end, also if the caller leaves.
    ///
    /// # Errors
    /// The work's own; otherwise it was not begun.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        user: &User,
        work: impl FnOnce() -> Result<T, FileError> + Send + 'static,
    ) -> Result<T, FileError> {
        let result = self.start(user, work).await?;
        result.await.map_err(|_| FileError::Panicked)?
    }

    /// As [`Threads::run`], but returns once the thread runs.
    pub(crate) async fn start<T: Send + 'static>(
        &self,
        user: &User,
        work: impl FnOnce() -> Result<T, FileError> + Send + 'static,
    ) -> Result<oneshot::Receiver<Result<T, FileError>>, FileError> {
        let room = Arc::clone(&self.0).acquire_owned().await;
        start(room.expect("the semaphore is never closed"), user, work)
    }
}

/// Does `work` as `user` on a thread of its own, for as long as `room` allows.
pub(super) fn start<T: Send + 'static>(
    room: OwnedSemaphorePermit,
    user: &User,
    work: impl FnOnce() -> Result<T, FileError> + Send + 'static,
) -> Result<oneshot::Receiver<Result<T, FileError>>, FileError> {
    let (sender, receiver) = oneshot::channel();
    let (credentials, name) = (credentials(user), user.name.clone());
    let body = move || {
        let result = match credentials.as_ref().map_or(Ok(()), become_user) {
            Ok(()) => work(),
            Err(errno) => Err(FileError::Identity { user: name, errno }),
        };
        // A caller that has left wants no result.
        sender.send(result).ok();
        drop(room);
    };
    let spawned = std::thread::Builder::new().name("envd-files".to_owned()).spawn(body);
    spawned.map(|_| receiver).map_err(|error| FileError::Kernel {
        step: Step::Thread,
        path: "/".into(),
        errno: Errno::from_raw(error.raw_os_error().unwrap_or_default()),
    })
}

/// The calling thread touches files as the user does from now on. The groups and ids first: they need a capability.
fn become_user(credentials: &Credentials) -> Result<(), Errno> {
    let Credentials { uid, gid, groups } = credentials;
    sys::set_thread_groups(groups)?;
    setfsgid(*gid);
    setfsuid(*uid);
    // These two answer with the id that was set before, and not whether they have set theirs. No id is -1.
    if setfsgid(Gid::from_raw(u32::MAX)) != *gid || setfsuid(Uid::from_raw(u32::MAX)) != *uid {
        return Err(Errno::EPERM);
    }
    if !uid.is_root() {
        // The kernel has taken those that concern files; here go the others, as that to fill a disk to its last block.
        sys::drop_thread_capabilities()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use nix::unistd::geteuid;

    use super::*;
    use crate::testing::Dir;
    use crate::users;

    #[tokio::test]
    async fn what_a_user_makes_is_the_user_s_and_what_is_closed_to_it_stays_closed() {
        if !geteuid().is_root() {
            return;
        }
        let dir = Dir::new("rights");
        let nobody = users::User {
            uid: 65534,
            gid: 65533,
            groups: vec![65533, 100],
            ..users::by_name(dir.path(), "root").unwrap()
        };
        std::fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        let closed = dir.path().join("closed");
        std::fs::create_dir(&closed).unwrap();
        std::fs::set_permissions(&closed, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let shared = dir.path().join("shared");
        std::fs::create_dir(&shared).unwrap();
        std::os::unix::fs::chown(&shared, Some(0), Some(100)).unwrap();
        std::fs::set_permissions(&shared, std::os::unix::fs::PermissionsExt::from_mode(0o770)).unwrap();
        let threads = Threads::default();
        let path = dir.path().to_owned();
        let made = threads.run(&nobody, move || {
            std::fs::write(path.join("file"), "x").unwrap();
            std::fs::write(path.join("shared/file"), "x").unwrap();
            let refused = std::fs::read_dir(path.join("closed")).unwrap_err();
            let capabilities = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            Ok((refused.kind(), capabilities))
        });
        let (refused, status) = made.await.unwrap();
        assert_eq!(refused, std::io::ErrorKind::PermissionDenied);
        for line in ["CapPrm:\t0000000000000000", "CapEff:\t0000000000000000"] {
            assert!(status.contains(line), "{status}");
        }
        let made = std::fs::metadata(dir.path().join("file")).unwrap();
        assert_eq!((made.uid(), made.gid()), (65534, 65533));
        // The threads that were there are who they were.
        assert_eq!(geteuid(), setfsuid(Uid::from_raw(u32::MAX)));
        assert!(std::fs::read_dir(&closed).is_ok());
    }

    #[tokio::test]
    async fn work_that_panics_is_an_error_and_takes_no_room_for_ever() {
        let threads = Threads(Arc::new(Semaphore::new(1)));
        let dir = Dir::new("rights-panic");
        let user = users::by_uid(Dir::new("none").path(), 0).unwrap();
        if !geteuid().is_root() {
            return;
        }
        let failed = threads.run(&user, || -> Result<(), _> { panic!("on purpose") }).await;
        assert!(matches!(failed, Err(FileError::Panicked)));
        threads.run(&user, || Ok(())).await.unwrap();
        drop(dir);
    }
}
