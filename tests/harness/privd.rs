//! A privd of a test's or a bench's own, with a place for its files and a connection: it can be killed, and the installed one, where there
//! is one, is left alone.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use roost_common::ids::Slot;
use roost_common::ipc::PassedFd;
use roost_common::privd::{
    Disk, EgressPolicy, InventoryCursor, InventoryRow, Network, NetworkCounters, OpenDisk, OpenNetwork, PrivdClient,
    PrivdClientTransport, PrivdError, ReadCounters, Rule, RuleCounter, SetPolicy,
};
use roost_common::units::Sectors;
use tarpc::{client, context};
use tokio::runtime::Runtime;

use crate::eventually;

/// A privd that a test runs for itself, a place for its files, and a connection.
#[derive(Debug)]
pub struct Rig {
    /// The daemon.
    pub child: Child,
    /// Images and exception stores are here.
    pub place: PathBuf,
    /// None while it is not connected.
    pub client: Option<(Runtime, PrivdClient)>,
}

/// Where it listens.
pub const SOCKET: &str = "/run/roost-privd-test.sock";

impl Rig {
    /// Starts a privd for the uid that the test runs as, and connects.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start() -> Self {
        let mut rig = Self::start_for(nix::unistd::getuid().as_raw());
        rig.connect();
        rig
    }

    /// Starts one for another user's calls; it is not connected to.
    ///
    /// # Panics
    /// When it does not start.
    pub fn start_for(uid: u32) -> Self {
        // Images and sandboxes are here, on a disk of their own.
        let place = PathBuf::from(format!("/var/lib/roost/privd-test-{}", std::process::id()));
        fs::create_dir_all(&place).expect("a place");
        Self {
            child: Self::spawn(uid),
            place,
            client: None,
        }
    }

    fn spawn(uid: u32) -> Child {
        let program = ["/usr/bin/roost-privd", "/root/roost-privd"];
        let program = program
            .iter()
            .find(|path| Path::new(path).exists())
            .expect("roost-privd in the rig");
        // What an earlier one left would look like ours.
        drop(fs::remove_file(SOCKET));
        // Udev out of sight, as in its unit.
        let hidden = format!("mount -t tmpfs none /run/udev && exec {program} --socket {SOCKET} --peer-uid {uid}");
        let child = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", &hidden])
            .stderr(Stdio::inherit())
            .spawn()
            .expect("privd starts");
        eventually("privd's socket", || try_connect().ok());
        child
    }

    /// Connects.
    ///
    /// # Panics
    /// When it cannot be reached.
    pub fn connect(&mut self) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let client = {
            let _inside = runtime.enter();
            let transport = PrivdClientTransport::new(try_connect().expect("connected")).expect("registered");
            PrivdClient::new(client::Config::default(), transport).spawn()
        };
        self.client = Some((runtime, client));
    }

    /// Ends privd at once, and starts the next one.
    ///
    /// # Panics
    /// When the next one does not start.
    pub fn kill_and_restart(&mut self) {
        self.client = None;
        self.child.kill().expect("killed");
        self.child.wait().expect("reaped");
        self.child = Self::spawn(nix::unistd::getuid().as_raw());
        self.connect();
    }

    /// What calls are made with.
    ///
    /// # Panics
    /// When it is not connected.
    pub fn runtime(&self) -> (&Runtime, &PrivdClient) {
        let (runtime, client) = self.client.as_ref().expect("connected");
        (runtime, client)
    }

    /// Opens a disk.
    ///
    /// # Panics
    /// When there is no answer.
    pub fn open_disk(&self, request: OpenDisk) -> Result<Disk, PrivdError> {
        let (runtime, client) = self.runtime();
        runtime
            .block_on(client.open_disk(patient(), request))
            .expect("answered")
    }

    /// Opens a slot's network.
    ///
    /// # Panics
    /// When there is no answer.
    pub fn open_network(&self, slot: u32, policy: EgressPolicy) -> Result<Network, PrivdError> {
        let (runtime, client) = self.runtime();
        let slot = Slot::try_from(slot).expect("a slot");
        let request = OpenNetwork { slot, policy };
        runtime
            .block_on(client.open_network(patient(), request))
            .expect("answered")
    }

    /// Replaces a policy.
    ///
    /// # Panics
    /// When there is no answer.
    pub fn set_policy(&self, tap: &PassedFd, policy: EgressPolicy) -> Result<(), PrivdError> {
        let (runtime, client) = self.runtime();
        let request = SetPolicy {
            tap: tap.clone(),
            policy,
        };
        runtime
            .block_on(client.set_policy(patient(), request))
            .expect("answered")
    }

    /// Reads a network's counters.
    ///
    /// # Panics
    /// When there is no answer.
    pub fn try_counters(&self, tap: &PassedFd) -> Result<NetworkCounters, PrivdError> {
        let (runtime, client) = self.runtime();
        let request = ReadCounters { tap: tap.clone() };
        runtime
            .block_on(client.network_counters(patient(), request))
            .expect("answered")
    }

    /// Packets that a rule has counted.
    ///
    /// # Panics
    /// When it is no tap of ours.
    pub fn count(&self, tap: &PassedFd, rule: Rule) -> u64 {
        let rows = self.rows(tap, rule);
        assert!(!rows.is_empty(), "every rule has a row");
        rows.iter().map(|row| row.packets).sum()
    }

    /// What a rule has counted, by destination.
    ///
    /// # Panics
    /// When it is no tap of ours.
    pub fn rows(&self, tap: &PassedFd, rule: Rule) -> Vec<RuleCounter> {
        let counters = self.try_counters(tap).expect("our tap");
        counters.rules.into_iter().filter(|row| row.rule == rule).collect()
    }

    /// Everything of ours that is in the kernel.
    ///
    /// # Panics
    /// When there is no answer.
    pub fn inventory(&self) -> Vec<InventoryRow> {
        let (runtime, client) = self.runtime();
        let (mut rows, mut cursor) = (Vec::new(), Some(InventoryCursor::default()));
        while let Some(at) = cursor {
            let page = runtime
                .block_on(client.inventory(patient(), at))
                .expect("answered")
                .expect("listed");
            rows.extend(page.rows);
            cursor = page.next;
        }
        rows
    }

    /// A file of `length` bytes, all of them `fill`.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn image(&self, name: &str, length: u64, fill: u8) -> PathBuf {
        let path = self.place.join(name);
        let bytes = vec![fill; usize::try_from(length).expect("small")];
        fs::write(&path, bytes).expect("written");
        path
    }

    /// A new exception store for a disk of this size.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn cow(&self, name: &str, size: Sectors) -> PathBuf {
        let path = self.place.join(name);
        let file = File::create(&path).expect("created");
        file.set_len(size.cow_length().expect("a size").0).expect("sparse");
        path
    }

    /// A call for a disk of an image over an exception store.
    ///
    /// # Panics
    /// When a file cannot be opened.
    pub fn request(&self, id: &str, image: &Path, cow: &Path, size: Sectors) -> OpenDisk {
        OpenDisk {
            sandbox: id.parse().expect("an id"),
            origin: opened(OpenOptions::new().read(true), image),
            cow: opened(OpenOptions::new().read(true).write(true), cow),
            size,
            owner: 61184,
        }
    }

    /// A disk of a new image of 4 MiB of `fill`.
    ///
    /// # Panics
    /// When it is refused.
    pub fn disk(&self, id: &str, fill: u8, size: Sectors) -> Disk {
        let image = self.image(&format!("{id}.img"), 4 << 20, fill);
        let cow = self.cow(&format!("{id}.cow"), size);
        self.open_disk(self.request(id, &image, &cow, size)).expect("opened")
    }
}

impl Drop for Rig {
    /// Ends privd as its unit does: by SIGTERM, which lets calls at work end. Killed in the middle of one, it may leave a device that
    /// nobody has opened yet, which only its next start removes, and that is what [`Rig::kill_and_restart`] is for.
    fn drop(&mut self) {
        self.client = None;
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).ok();
        drop(self.child.wait());
        drop(fs::remove_file(SOCKET));
        drop(fs::remove_dir_all(&self.place));
    }
}

/// A call that may take its time.
pub fn patient() -> context::Context {
    let mut context = context::current();
    // As long as privd lets a call wait.
    context.deadline = Instant::now() + Duration::from_secs(120);
    context
}

/// A file, to be passed.
///
/// # Panics
/// When it is not there.
pub fn opened(options: &OpenOptions, path: &Path) -> PassedFd {
    let file = options
        .open(path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    OwnedFd::from(file).into()
}

/// A connection, if anybody listens.
///
/// # Errors
/// The kernel's.
pub fn try_connect() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(SOCKET)?)?;
    Ok(socket)
}
