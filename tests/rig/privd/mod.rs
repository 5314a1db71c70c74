//! privd on a real kernel: disks, networks, and what it refuses. Each test starts a privd of its own for the uid it runs as, so
//! that it can kill it; the installed one, where there is one, is left alone.

mod disks;
mod figures;
mod hostile;
mod lifetimes;
mod networks;
mod random;

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Once;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, recv, send, socket};
use roost_common::ids::Slot;
use roost_common::ipc::PassedFd;
use roost_common::names;
use roost_common::net::{Cidr, GATEWAY, GATEWAY_MAC, GUEST, GUEST_MAC, MAX_CONNECTIONS, SlotAddresses};
use roost_common::privd::{
    DescriptorRole, Disk, EgressPolicy, Internet, InventoryCursor, InventoryRow, Network, NetworkCounters, OpenDisk,
    OpenNetwork, PrivdClient, PrivdClientTransport, PrivdError, ReadCounters, ResourceKind, Rule, RuleCounter,
    SetPolicy, SizeRefusal, Wanted,
};
use roost_common::units::{Mebibytes, Sectors};
use roost_tests::census::Census;
use roost_tests::eventually;
use roost_tests::internet::{self, run};
use tarpc::{client, context};
use tokio::runtime::Runtime;

/// A privd that a test runs for itself, a place for its files, and a connection.
struct Rig {
    child: Child,
    place: PathBuf,
    client: Option<(Runtime, PrivdClient)>,
}

/// [`roost_tests::in_rig`], on a host on which a privd has started before: its table stays.
fn in_rig(test: impl FnOnce()) {
    static TABLE: Once = Once::new();
    TABLE.call_once(|| drop(Rig::start()));
    roost_tests::in_rig(test);
}

const SOCKET: &str = "/run/roost-privd-test.sock";

impl Rig {
    /// Starts a privd for the uid that the test runs as, and connects.
    fn start() -> Self {
        let mut rig = Self::start_for(nix::unistd::getuid().as_raw());
        rig.connect();
        rig
    }

    fn start_for(uid: u32) -> Self {
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

    fn connect(&mut self) {
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
    fn kill_and_restart(&mut self) {
        self.client = None;
        self.child.kill().expect("killed");
        self.child.wait().expect("reaped");
        self.child = Self::spawn(nix::unistd::getuid().as_raw());
        self.connect();
    }

    fn runtime(&self) -> (&Runtime, &PrivdClient) {
        let (runtime, client) = self.client.as_ref().expect("connected");
        (runtime, client)
    }

    fn open_disk(&self, request: OpenDisk) -> Result<Disk, PrivdError> {
        let (runtime, client) = self.runtime();
        runtime
            .block_on(client.open_disk(patient(), request))
            .expect("answered")
    }

    fn open_network(&self, slot: u32, policy: EgressPolicy) -> Result<Network, PrivdError> {
        let (runtime, client) = self.runtime();
        let slot = Slot::try_from(slot).expect("a slot");
        let request = OpenNetwork { slot, policy };
        runtime
            .block_on(client.open_network(patient(), request))
            .expect("answered")
    }

    fn set_policy(&self, tap: &PassedFd, policy: EgressPolicy) -> Result<(), PrivdError> {
        let (runtime, client) = self.runtime();
        let request = SetPolicy {
            tap: tap.clone(),
            policy,
        };
        runtime
            .block_on(client.set_policy(patient(), request))
            .expect("answered")
    }

    fn try_counters(&self, tap: &PassedFd) -> Result<NetworkCounters, PrivdError> {
        let (runtime, client) = self.runtime();
        let request = ReadCounters { tap: tap.clone() };
        runtime
            .block_on(client.network_counters(patient(), request))
            .expect("answered")
    }

    /// Packets that a rule has counted.
    fn count(&self, tap: &PassedFd, rule: Rule) -> u64 {
        let rows = self.rows(tap, rule);
        assert!(!rows.is_empty(), "every rule has a row");
        rows.iter().map(|row| row.packets).sum()
    }

    /// What a rule has counted, by destination.
    fn rows(&self, tap: &PassedFd, rule: Rule) -> Vec<RuleCounter> {
        let counters = self.try_counters(tap).expect("our tap");
        counters.rules.into_iter().filter(|row| row.rule == rule).collect()
    }

    fn inventory(&self) -> Vec<InventoryRow> {
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
    fn image(&self, name: &str, length: u64, fill: u8) -> PathBuf {
        let path = self.place.join(name);
        let bytes = vec![fill; usize::try_from(length).expect("small")];
        fs::write(&path, bytes).expect("written");
        path
    }

    /// A new exception store for a disk of this size.
    fn cow(&self, name: &str, size: Sectors) -> PathBuf {
        let path = self.place.join(name);
        let file = File::create(&path).expect("created");
        file.set_len(size.cow_length().expect("a size").0).expect("sparse");
        path
    }

    fn request(&self, id: &str, image: &Path, cow: &Path, size: Sectors) -> OpenDisk {
        OpenDisk {
            sandbox: id.parse().expect("an id"),
            origin: opened(OpenOptions::new().read(true), image),
            cow: opened(OpenOptions::new().read(true).write(true), cow),
            size,
            owner: 61184,
        }
    }

    /// A disk of a new image of 4 MiB of `fill`.
    fn disk(&self, id: &str, fill: u8, size: Sectors) -> Disk {
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

fn patient() -> context::Context {
    let mut context = context::current();
    // As long as privd lets a call wait.
    context.deadline = Instant::now() + Duration::from_secs(120);
    context
}

fn opened(options: &OpenOptions, path: &Path) -> PassedFd {
    let file = options
        .open(path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    OwnedFd::from(file).into()
}

fn try_connect() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(SOCKET)?)?;
    Ok(socket)
}

fn device(disk: &Disk) -> File {
    disk.device.as_fd().try_clone_to_owned().expect("a copy").into()
}

fn read_at(file: &File, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0xEE; length];
    file.read_exact_at(&mut bytes, offset).expect("read");
    bytes
}

fn open_policy() -> EgressPolicy {
    EgressPolicy::of(Internet::Open)
}

fn closed_policy() -> EgressPolicy {
    EgressPolicy::of(Internet::Closed)
}
