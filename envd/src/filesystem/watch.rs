//! What changes in a directory, as inotify(7) tells it: one thread for each watch, with the rights of its user.
//!
//! ```text
//! kernel queue --thread--> a queue of QUEUE changes --> the client's stream, or GetWatcherEvents
//! ```
//!
//! Holds: memory is bounded, and nothing is lost silently. A client that takes nothing fills its queue, then the kernel's;
//! when that overflows, the watch ends with [`WatchEnd::Lost`] after all that came before. A recursive watch reports what it
//! finds in a directory that is new as created: some of that may be told twice, none is missed.
//!
//! Directories that the user may not read are not watched. A directory that moves within the tree keeps its watches under
//! its new name.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use nix::unistd::pipe2;
use roost_common::guest::filesystem::{EventType, FilesystemEvent};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::entry::entry;
use super::operations::{check_watchable, children, unreadable};
use super::{FileError, Step, errno_at, rights};
use crate::users::{Names, User};

/// Changes that wait for the client.
const QUEUE: usize = 1024;

/// Directories of one watch. The kernel has a limit too, for each user.
const MAX_DIRECTORIES: usize = 65_536;

/// What is to be watched, and how.
pub(super) struct Plan {
    pub(super) path: PathBuf,
    pub(super) recursive: bool,
    /// Whether changes carry the entry they are about.
    pub(super) with_entry: bool,
    pub(super) allow_network: bool,
    /// Where `/etc/passwd` is.
    pub(super) root: PathBuf,
}

/// Why no more changes come.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum WatchEnd {
    #[error("changes came faster than they were taken, and some are lost")]
    Lost,
    #[error("a new directory cannot be watched: {0}")]
    Failed(Arc<FileError>),
}

/// A watch, which lives until this is dropped.
pub(super) struct Watch {
    /// Ends when the directory is gone.
    pub(super) changes: mpsc::Receiver<Result<FilesystemEvent, WatchEnd>>,
    /// Closing it wakes the thread.
    _stop: OwnedFd,
}

/// Begins to watch; whatever changes after the answer is told. `room` goes with the watch.
///
/// # Errors
/// Nothing is watched.
pub(super) async fn watch(room: OwnedSemaphorePermit, user: &User, plan: Plan) -> Result<Watch, FileError> {
    let (stopped, stop) = pipe2(OFlag::O_CLOEXEC).map_err(errno_at(Step::Watch, &plan.path))?;
    let (sender, changes) = mpsc::channel(QUEUE);
    let (begun, has_begun) = tokio::sync::oneshot::channel();
    let work = move || {
        match Tree::new(plan) {
            Ok(tree) => {
                // A caller that has left has closed the queue too.
                begun.send(Ok(())).ok();
                tree.serve(&stopped, &sender);
            }
            Err(error) => {
                begun.send(Err(error)).ok();
            }
        }
        Ok(())
    };
    let work = rights::start(room, user, work)?;
    match has_begun.await {
        Ok(begun) => begun?,
        // It has not come as far; then it says why.
        Err(_) => work.await.map_err(|_| FileError::Panicked)??,
    }
    Ok(Watch { changes, _stop: stop })
}

/// The directories that are watched.
struct Tree {
    plan: Plan,
    names: Names,
    inotify: Inotify,
    /// Their paths below the one that was asked for.
    directories: HashMap<WatchDescriptor, PathBuf>,
    top: WatchDescriptor,
    /// A directory that has left its place: its cookie and its old path, until the next event says whether it has a new one here.
    moving: Option<(u32, PathBuf)>,
}

/// Whether changes still come.
enum Next {
    More,
    Gone,
}

impl Tree {
    fn new(plan: Plan) -> Result<Self, FileError> {
        check_watchable(&plan.path, plan.allow_network)?;
        let failed = |errno| errno_at(Step::Watch, &plan.path)(errno);
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).map_err(failed)?;
        let top = add(&inotify, &plan.path)?;
        let mut tree = Self {
            names: Names::read(&plan.root),
            inotify,
            directories: HashMap::from([(top, PathBuf::new())]),
            top,
            moving: None,
            plan,
        };
        if tree.plan.recursive {
            tree.descend(PathBuf::new(), &mut |_| {})?;
        }
        Ok(tree)
    }

    /// Watches what is below a directory that is watched; tells what it finds.
    fn descend(&mut self, from: PathBuf, found: &mut dyn FnMut(&Path)) -> Result<(), FileError> {
        let mut ahead = vec![from];
        while let Some(directory) = ahead.pop() {
            let children = match children(&self.plan.path.join(&directory)) {
                Ok(children) => children,
                Err(error) if unreadable(&error) => continue,
                Err(error) => return Err(error),
            };
            for child in children.iter().rev() {
                let below = directory.join(child.file_name().unwrap_or_default());
                found(&below);
                if fs::symlink_metadata(child).is_ok_and(|own| own.is_dir()) && self.add(&below)? {
                    ahead.push(below);
                }
            }
        }
        Ok(())
    }

    /// Whether it did: a directory may be gone, or closed to the user.
    fn add(&mut self, below: &Path) -> Result<bool, FileError> {
        if self.directories.len() >= MAX_DIRECTORIES {
            return Err(FileError::TooManyEntries { max: MAX_DIRECTORIES });
        }
        match add(&self.inotify, &self.plan.path.join(below)) {
            Ok(descriptor) => {
                self.directories.insert(descriptor, below.to_owned());
                Ok(true)
            }
            Err(error) if unreadable(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Tells what changes until nobody listens, or nothing more can come.
    fn serve(mut self, stopped: &OwnedFd, sender: &mpsc::Sender<Result<FilesystemEvent, WatchEnd>>) {
        loop {
            let mut ready = [
                PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN),
                PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut ready, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(_) => return,
            }
            if ready[1].revents().is_some_and(|events| !events.is_empty()) {
                return;
            }
            let mut told = Vec::new();
            let next = match self.inotify.read_events() {
                Ok(events) => events.into_iter().try_fold(Next::More, |next, event| match next {
                    Next::More => self.take(event, &mut told),
                    Next::Gone => Ok(Next::Gone),
                }),
                Err(Errno::EAGAIN | Errno::EINTR) => continue,
                Err(_) => Err(WatchEnd::Lost),
            };
            for event in told {
                if sender.blocking_send(Ok(event)).is_err() {
                    return;
                }
            }
            match next {
                Ok(Next::More) => {}
                Ok(Next::Gone) => return,
                Err(end) => {
                    // Nobody listens any more.
                    sender.blocking_send(Err(end)).ok();
                    return;
                }
            }
        }
    }

    fn take(&mut self, event: InotifyEvent, told: &mut Vec<FilesystemEvent>) -> Result<Next, WatchEnd> {
        let mask = event.mask;
        let has = |flag| mask.contains(flag);
        if has(AddWatchFlags::IN_Q_OVERFLOW) {
            return Err(WatchEnd::Lost);
        }
        if has(AddWatchFlags::IN_IGNORED) {
            self.directories.remove(&event.wd);
            return Ok(if event.wd == self.top { Next::Gone } else { Next::More });
        }
        let arrives = |(cookie, _): &(u32, PathBuf)| has(AddWatchFlags::IN_MOVED_TO) && *cookie == event.cookie;
        if !self.moving.as_ref().is_some_and(arrives) {
            self.settle();
        }
        let Some(directory) = self.directories.get(&event.wd).cloned() else {
            // It has left the tree.
            return Ok(Next::More);
        };
        let Some(name) = event.name else {
            // Of the directory itself. Those below are also told as entries of the one above them.
            if event.wd == self.top {
                for kind in kinds(mask) {
                    told.push(self.event(Path::new("."), kind));
                }
            }
            return Ok(Next::More);
        };
        let path = directory.join(&name);
        let may_be_unnamed = mask.intersects(AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_ATTRIB) && is_unnamed(&name);
        if may_be_unnamed && !self.plan.path.join(&path).exists() {
            return Ok(Next::More);
        }
        for kind in kinds(mask) {
            told.push(self.event(&path, kind));
        }
        if self.plan.recursive && has(AddWatchFlags::IN_ISDIR) {
            self.follow(mask, event.cookie, path, told)
                .map_err(|error| WatchEnd::Failed(Arc::new(error)))?;
        }
        Ok(Next::More)
    }

    /// Keeps the watches below a directory that has come or gone.
    fn follow(
        &mut self,
        mask: AddWatchFlags,
        cookie: u32,
        path: PathBuf,
        told: &mut Vec<FilesystemEvent>,
    ) -> Result<(), FileError> {
        if mask.contains(AddWatchFlags::IN_MOVED_FROM) {
            self.moving = Some((cookie, path));
            return Ok(());
        }
        if mask.intersects(AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO) {
            if let Some((_, old)) = self.moving.take() {
                for directory in self.directories.values_mut() {
                    if let Ok(rest) = directory.strip_prefix(&old) {
                        *directory = path.join(rest).components().collect();
                    }
                }
                return Ok(());
            }
            if self.add(&path)? {
                let mut found = Vec::new();
                self.descend(path, &mut |path| found.push(path.to_owned()))?;
                told.extend(found.iter().map(|path| self.event(path, EventType::EVENT_TYPE_CREATE)));
            }
        }
        Ok(())
    }

    /// A directory whose new place was not told has left the tree.
    fn settle(&mut self) {
        let Some((_, old)) = self.moving.take() else { return };
        let gone: Vec<_> = self
            .directories
            .iter()
            .filter(|(_, path)| path.starts_with(&old))
            .collect();
        let gone: Vec<_> = gone.into_iter().map(|(descriptor, _)| *descriptor).collect();
        for descriptor in gone {
            self.directories.remove(&descriptor);
            // An error: the kernel has removed it already.
            self.inotify.rm_watch(descriptor).ok();
        }
    }

    fn event(&self, below: &Path, kind: EventType) -> FilesystemEvent {
        // Of what is gone there may be another at its place.
        let is_there = !matches!(kind, EventType::EVENT_TYPE_REMOVE | EventType::EVENT_TYPE_RENAME);
        let entry = (self.plan.with_entry && is_there)
            .then(|| entry(&self.plan.path.join(below), &self.names).ok())
            .flatten();
        FilesystemEvent {
            name: OsString::from(below).to_string_lossy().into_owned(),
            r#type: kind.into(),
            entry: entry.into(),
            ..Default::default()
        }
    }
}

/// Whether a name is what the kernel calls a file without one, such as those that uploads go to (`d_tmpfile`, fs/dcache.c): changes of it
/// are told with this name, and concern nobody before it has another.
fn is_unnamed(name: &OsStr) -> bool {
    let number = name.as_encoded_bytes().strip_prefix(b"#");
    number.is_some_and(|number| !number.is_empty() && number.iter().all(u8::is_ascii_digit))
}

fn add(inotify: &Inotify, path: &Path) -> Result<WatchDescriptor, FileError> {
    let flags = AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_MODIFY
        | AddWatchFlags::IN_ATTRIB
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_DELETE_SELF
        | AddWatchFlags::IN_MOVE_SELF
        | AddWatchFlags::IN_ONLYDIR;
    inotify.add_watch(path, flags).map_err(errno_at(Step::Watch, path))
}

/// What a mask tells: the kernel may join several in one.
fn kinds(mask: AddWatchFlags) -> impl Iterator<Item = EventType> {
    let told = [
        (
            AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO,
            EventType::EVENT_TYPE_CREATE,
        ),
        (
            AddWatchFlags::IN_MOVED_FROM | AddWatchFlags::IN_MOVE_SELF,
            EventType::EVENT_TYPE_RENAME,
        ),
        (AddWatchFlags::IN_ATTRIB, EventType::EVENT_TYPE_CHMOD),
        (AddWatchFlags::IN_MODIFY, EventType::EVENT_TYPE_WRITE),
        (
            AddWatchFlags::IN_DELETE | AddWatchFlags::IN_DELETE_SELF,
            EventType::EVENT_TYPE_REMOVE,
        ),
    ];
    told.into_iter()
        .filter_map(move |(flags, kind)| mask.intersects(flags).then_some(kind))
}
