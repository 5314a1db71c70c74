//! What envd knows about the machine it is in, shared by all calls: settings from `/init`, readiness, whether the machine
//! is ours to change, whether its programs are held and its filesystems frozen, and which connections are to end.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, RwLock, RwLockReadGuard};

use nix::unistd::geteuid;
use tokio::sync::watch;

use crate::connections::Connections;
use crate::filesystem::rights::Threads;
use crate::filesystems::Filesystems;
use crate::hold::Hold;
use crate::ports;
use crate::users::{self, User, UserError};

/// Whether the machine is a sandbox's, with envd as PID 1, or one that envd is a guest of (tests, development).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Machine {
    /// Clock, random pool and files are ours to set.
    Own,
    /// Nothing outside [`Guest::root`] is touched, and nothing at all where that is `/`.
    Borrowed,
}

/// How far the machine's set-up is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Readiness {
    Starting,
    Ready,
    Failed(String),
}

/// Whether the root filesystem has its final size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Disk {
    Growing,
    Settled,
}

/// What `/init` set, and stays until it sets something else.
#[derive(Debug, Clone, Default)]
pub(crate) struct Settings {
    pub(crate) variables: BTreeMap<String, String>,
    /// `E2B_SANDBOX` and the like.
    pub(crate) identity: BTreeMap<String, String>,
    pub(crate) token: Option<String>,
    pub(crate) user: Option<String>,
    pub(crate) workdir: Option<String>,
}

/// The state that calls share.
pub(crate) struct Guest {
    /// Where `/etc` and `/run` are: `/`, unless a test says otherwise.
    pub(crate) root: PathBuf,
    pub(crate) machine: Machine,
    pub(crate) readiness: watch::Sender<Readiness>,
    pub(crate) disk: watch::Sender<Disk>,
    pub(crate) hold: Arc<Hold>,
    pub(crate) filesystems: Filesystems,
    pub(crate) connections: Connections,
    pub(crate) ports: ports::Switch,
    /// Those that touch files as their users.
    pub(crate) threads: Threads,
    settings: RwLock<Settings>,
}

impl Guest {
    pub(crate) fn new(root: PathBuf, machine: Machine) -> Self {
        let (readiness, disk) = match machine {
            Machine::Own => (Readiness::Starting, Disk::Growing),
            Machine::Borrowed => (Readiness::Ready, Disk::Settled),
        };
        let settings = Settings {
            identity: crate::identity::variables(None, None),
            ..Default::default()
        };
        let hold = Arc::new(Hold::of(machine));
        Self {
            root,
            machine,
            readiness: watch::Sender::new(readiness),
            disk: watch::Sender::new(disk),
            filesystems: Filesystems::new(Arc::clone(&hold)),
            hold,
            connections: Connections::default(),
            ports: ports::Switch::default(),
            threads: Threads::default(),
            settings: RwLock::new(settings),
        }
    }

    /// Whether files below [`Guest::root`] are ours to write.
    pub(crate) fn owns_files(&self) -> bool {
        self.machine == Machine::Own || self.root.as_os_str() != "/"
    }

    /// Returns when the root filesystem has its final size.
    pub(crate) async fn disk_settled(&self) {
        let mut disk = self.disk.subscribe();
        // The sender lives as long as the guest, so this only ends when the disk is settled.
        disk.wait_for(|disk| *disk == Disk::Settled).await.ok();
    }

    /// A copy: what is set meanwhile is for later calls.
    pub(crate) fn settings(&self) -> Settings {
        self.read().clone()
    }

    /// Whether `token` opens what the token protects; all is open until one is set.
    pub(crate) fn admits(&self, token: Option<&[u8]>) -> bool {
        match (&self.read().token, token) {
            (None, _) => true,
            (Some(expected), Some(token)) => equal_in_constant_time(expected.as_bytes(), token),
            (Some(_), None) => false,
        }
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut Settings)) {
        change(&mut self.settings.write().expect("no change of settings panics"));
    }

    /// The user that a call runs as: the one it names, else the default of `/init`, else the one that envd runs as.
    pub(crate) fn user(&self, name: Option<&str>, settings: &Settings) -> Result<User, UserError> {
        match name.or(settings.user.as_deref()) {
            Some(name) => users::by_name(&self.root, name),
            None => users::by_uid(&self.root, geteuid().as_raw()),
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Settings> {
        self.settings.read().expect("no change of settings panics")
    }
}

impl Settings {
    /// The default environment: who the sandbox is, and over it what the host asked for.
    pub(crate) fn environment(&self) -> BTreeMap<String, String> {
        let mut environment = self.identity.clone();
        environment.extend(self.variables.clone());
        environment
    }
}

/// How long it takes tells a guesser the length, nothing else.
pub(crate) fn equal_in_constant_time(left: &[u8], right: &[u8]) -> bool {
    left.len() == right.len() && left.iter().zip(right).fold(0, |differs, (a, b)| differs | (a ^ b)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_admits_itself_alone() {
        let guest = Guest::new("/".into(), Machine::Borrowed);
        assert!(guest.admits(None) && guest.admits(Some(b"anything")));
        guest.change(|settings| settings.token = Some("token".to_owned()));
        assert!(guest.admits(Some(b"token")));
        for wrong in [
            None,
            Some(b"".as_slice()),
            Some(b"toke"),
            Some(b"tokens"),
            Some(b"Token"),
        ] {
            assert!(!guest.admits(wrong), "{wrong:?}");
        }
    }

    #[test]
    fn what_the_host_asks_for_goes_over_the_identity() {
        let mut settings = Guest::new("/".into(), Machine::Borrowed).settings();
        assert_eq!(settings.environment()["E2B_SANDBOX"], "true");
        settings.variables.insert("E2B_SANDBOX".to_owned(), "no".to_owned());
        assert_eq!(settings.environment()["E2B_SANDBOX"], "no");
    }
}
