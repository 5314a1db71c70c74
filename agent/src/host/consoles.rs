//! Hearing that a guest writes to its console: the first thing that it does once it is up, and so worth a question.
//!
//! Holds: what is written is not read here. How often a guest that writes all the time is asked has a bound where it is asked
//! ([`Guest::wait_until_up`](crate::guest::Guest::wait_until_up)), and where the kernel has no watch to give, nobody hears anything.

use std::collections::HashMap;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use tokio::sync::Notify;

/// The consoles that are listened to. One of the kernel's instances for all: a user has few.
#[derive(Debug, Default)]
pub struct Consoles(OnceLock<Option<Arc<Watches>>>);

#[derive(Debug)]
struct Watches {
    inotify: OwnedFd,
    /// By the kernel's number for each.
    listening: Mutex<HashMap<i32, Arc<Notify>>>,
}

/// Hears of one console, for as long as it lives.
#[derive(Debug)]
pub struct Console(Option<Watch>);

#[derive(Debug)]
struct Watch {
    watches: Arc<Watches>,
    number: i32,
    written: Arc<Notify>,
}

impl Consoles {
    /// Listens to a console, a [`roost_common::ring`] that a shim writes.
    pub fn listen(&self, file: &Path) -> Console {
        let watches = self.0.get_or_init(|| {
            let watches = Watches::start();
            watches
                .inspect_err(|error| tracing::info!(%error, "guests are asked now and then whether they are up"))
                .ok()
        });
        Console(watches.as_ref().and_then(|watches| watches.add(file)))
    }
}

impl Watches {
    fn start() -> std::io::Result<Arc<Self>> {
        let watches = Arc::new(Self {
            inotify: inotify::init(CreateFlags::CLOEXEC)?,
            listening: Mutex::default(),
        });
        let telling = watches.clone();
        std::thread::Builder::new()
            .name("consoles".into())
            .spawn(move || telling.tell())?;
        Ok(watches)
    }

    fn add(self: &Arc<Self>, file: &Path) -> Option<Watch> {
        // Together with the number, so that an event finds whom it is for.
        let mut listening = self.lock();
        let number = inotify::add_watch(&self.inotify, file, WatchFlags::MODIFY).ok()?;
        let written = listening.entry(number).or_default().clone();
        drop(listening);
        Some(Watch {
            watches: self.clone(),
            number,
            written,
        })
    }

    /// Tells whoever listens, until the process ends. Blocks.
    fn tell(&self) {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&self.inotify, &mut buffer);
        loop {
            match events.next() {
                Ok(event) => {
                    if let Some(written) = self.lock().get(&event.wd()) {
                        written.notify_one();
                    }
                }
                Err(Errno::INTR) => {}
                Err(error) => return tracing::error!(%error, "consoles are not heard any more"),
            }
        }
    }

    /// Held for moments.
    fn lock(&self) -> MutexGuard<'_, HashMap<i32, Arc<Notify>>> {
        self.listening.lock().expect("nothing panics while it holds this")
    }
}

impl Console {
    /// Hears nothing.
    #[cfg(test)]
    pub(crate) fn unheard() -> Self {
        Self(None)
    }

    /// Waits until it is written to, or has been since this was asked last. Safe to cancel.
    pub async fn written(&self) {
        match &self.0 {
            Some(watch) => watch.written.notified().await,
            None => std::future::pending().await,
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.watches.lock().remove(&self.number);
        // One whose file has gone has gone with it.
        inotify::remove_watch(&self.watches.inotify, self.number).ok();
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write as _;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn who_listens_hears_of_what_is_written_and_nobody_else_does() {
        let dir = tempfile::tempdir().expect("a directory");
        let [one, other] = ["one", "other"].map(|name| dir.path().join(name));
        let mut files = [&one, &other].map(|path| fs::File::create(path).expect("made"));
        let consoles = Consoles::default();
        let heard = [&one, &other].map(|path| consoles.listen(path));
        files[0].write_all(b"listening").expect("written");
        tokio::time::timeout(Duration::from_secs(60), heard[0].written())
            .await
            .expect("heard");
        let silent = tokio::time::timeout(Duration::from_millis(20), heard[1].written());
        silent.await.expect_err("nothing was written there");
        drop(heard);
        let watches = consoles
            .0
            .get()
            .expect("started")
            .as_ref()
            .expect("the kernel has some");
        assert!(watches.lock().is_empty());
        // Where there is nothing to listen to, nobody hears anything.
        let missing = consoles.listen(&dir.path().join("missing"));
        for silent in [missing, Console::unheard()] {
            let silent = tokio::time::timeout(Duration::from_millis(20), silent.written()).await;
            silent.expect_err("nobody writes there");
        }
    }
}
