//! What there is outside the agent: disks, networks, shims with their VMs. Plain data, so that it outlives the runtime in which an agent
//! and the fakes run, as a host outlives an agent that is killed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use roost_agent::guest::GuestNet;
use roost_common::ids::{SandboxId, Slot};
use roost_common::privd::EgressPolicy;
use rustix::fs::{FlockOperation, flock};
use tokio::sync::{Notify, watch};

use crate::dice::{Dice, Fault};
use crate::shim::Shim;

/// Slots of the network plan that have guests; the others are taken.
pub(crate) const SLOTS: u32 = 5;

/// A descriptor that was handed out: a lock is on what it has open, and goes with its last copy.
#[derive(Debug)]
pub(crate) struct Lent {
    /// The same file, opened apart from it.
    file: File,
    inode: u64,
}

impl Lent {
    /// A new one, and what is handed out.
    fn new(dir: &Path, length: u64) -> (Self, OwnedFd) {
        let path = dir.join("lent");
        let open = || {
            let mut options = File::options();
            let file = options.create(true).truncate(false).read(true).write(true).open(&path);
            file.expect("opened")
        };
        let (file, out) = (open(), open());
        std::fs::remove_file(&path).expect("removed");
        file.set_len(length).expect("extended");
        flock(&out, FlockOperation::NonBlockingLockExclusive).expect("new, so nobody has it locked");
        let inode = file.metadata().expect("metadata").ino();
        (Self { file, inode }, out.into())
    }

    /// Whether a copy of what was handed out is open anywhere.
    fn is_held(&self) -> bool {
        match flock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                flock(&self.file, FlockOperation::Unlock).expect("unlocked");
                false
            }
            Err(_) => true,
        }
    }
}

/// A sandbox's disk, as dm-snapshot has it: for as long as it is open.
#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) id: SandboxId,
    pub(crate) minor: u32,
    lent: Lent,
    cow: File,
}

impl Disk {
    /// The guest writes: what is on it is of another moment from here on. Returns which.
    pub(crate) fn write(&self) -> u64 {
        let moment = self.moment() + 1;
        let (at, bytes) = (0, moment.to_le_bytes());
        self.lent.file.write_all_at(&bytes, at).expect("written");
        let before = self.cow.metadata().and_then(|metadata| metadata.modified());
        self.cow.write_all_at(&bytes, at).expect("written");
        // A clock that is as coarse as a tick would show two writes as one.
        let after = before.expect("a time") + Duration::from_millis(1);
        self.cow.set_modified(after).expect("set");
        moment
    }

    /// How often it has been written, with what it was cut from.
    pub(crate) fn moment(&self) -> u64 {
        moment_of(&self.lent.file)
    }
}

/// What is at the beginning of a disk, its image or its exception store.
pub(crate) fn moment_of(file: &File) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, 0).expect("it is longer than that");
    u64::from_le_bytes(bytes)
}

/// A slot's network, for as long as its tap is open.
#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) slot: Slot,
    /// What its guest may reach.
    pub(crate) policy: EgressPolicy,
    lent: Lent,
}

/// Everything there is.
pub(crate) struct World {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) privd: UnixListener,
    pub(crate) shims: UnixListener,
    /// Of the guests in each slot.
    pub(crate) guests: Vec<(Slot, TcpListener)>,
    pub(crate) guest_net: GuestNet,
    /// Whether nothing goes wrong any more.
    pub(crate) calm: watch::Sender<bool>,
    /// The agent is to be killed.
    pub(crate) crash: Notify,
    inner: Mutex<Inner>,
}

/// What changes.
pub(crate) struct Inner {
    pub(crate) dice: Dice,
    /// How many calls of a thousand go wrong.
    pub(crate) faults: u64,
    /// Calls until the agent is killed.
    pub(crate) crash_in: Option<u64>,
    pub(crate) disks: Vec<Disk>,
    pub(crate) networks: Vec<Network>,
    pub(crate) shims: BTreeMap<u64, Shim>,
    /// Sandboxes a shim of which has not listened, or long not ended its VM.
    pub(crate) stubborn: BTreeSet<SandboxId>,
    /// Numbers that have been given out.
    pub(crate) numbers: u64,
    pub(crate) wrong: Vec<String>,
}

impl World {
    pub(crate) fn new(seed: u64) -> Arc<Self> {
        let mut dice = Dice::new(seed);
        // What is brought to disk every so often is cheap there.
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() {
            memory.into()
        } else {
            std::env::temp_dir()
        };
        let dir = tempfile::Builder::new()
            .prefix("roost-")
            .tempdir_in(parent)
            .expect("a directory");
        for name in [
            "run",
            "tmp",
            "lib/kernels",
            "lib/images/minimal",
            "lib/sandboxes",
            "lib/tombstones",
        ] {
            std::fs::create_dir_all(dir.path().join(name)).expect("made");
        }
        std::fs::write(dir.path().join("lib/images/minimal/rootfs.ext4"), vec![0; 16 << 10]).expect("written");
        std::fs::write(dir.path().join("lib/kernels/vmlinux-6.1"), "").expect("written");
        let (guest_net, guests) = std::iter::repeat_with(|| listen_as_guests(&mut dice))
            .flatten()
            .next()
            .expect("one of them is free");
        let listener = |name| bind_packets(&dir.path().join(name)).expect("bound");
        Arc::new(Self {
            privd: listener("privd.sock"),
            shims: listener("shim.sock"),
            dir,
            guests,
            guest_net,
            calm: watch::Sender::new(true),
            crash: Notify::new(),
            inner: Mutex::new(Inner {
                dice,
                faults: 0,
                crash_in: None,
                disks: Vec::new(),
                networks: Vec::new(),
                shims: BTreeMap::new(),
                stubborn: BTreeSet::new(),
                numbers: 0,
                wrong: Vec::new(),
            }),
        })
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Held for moments.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("nothing panics while it holds this")
    }

    pub(crate) fn dice<T>(&self, roll: impl FnOnce(&mut Dice) -> T) -> T {
        roll(&mut self.lock().dice)
    }

    /// From now on so many calls of a thousand go wrong.
    pub(crate) fn set_faults(&self, in_a_thousand: u64) {
        self.lock().faults = in_a_thousand;
        self.calm.send_replace(in_a_thousand == 0);
    }

    /// What must not be has been seen.
    pub(crate) fn wrong(&self, what: String) {
        self.lock().wrong.push(what);
    }

    /// The agent has been killed: its connections are gone, and with them the shims that had nothing yet.
    pub(crate) fn agent_is_gone(&self) {
        let mut inner = self.lock();
        inner.crash_in = None;
        inner.shims.retain(|_, shim| shim.vm.is_some());
        inner.collect();
    }

    /// The host has lost its power and has it again: files are there, and nothing else.
    pub(crate) fn reboot(&self) {
        self.lock().shims.clear();
        std::fs::remove_dir_all(self.path("run")).expect("removed");
        std::fs::create_dir(self.path("run")).expect("made");
    }

    /// What has just been asked for lets a guest run: where most depends on what the agent has written down. A fault that comes instead of
    /// none, and the agent's end.
    pub(crate) fn decisive(&self, fault: Fault) -> Fault {
        let mut inner = self.lock();
        if inner.crash_in.is_some() && inner.dice.chance(40) {
            inner.crash_in = None;
            self.crash.notify_one();
        }
        let dies = inner.faults > 0 && fault == Fault::None && inner.dice.chance(40);
        if dies { Fault::Die } else { fault }
    }

    /// A call has come to a fake: takes a moment, and decides what becomes of it.
    pub(crate) async fn called(&self) -> Fault {
        let (fault, pause) = {
            let mut inner = self.lock();
            if let Some(calls) = &mut inner.crash_in {
                *calls = calls.saturating_sub(1);
                if *calls == 0 {
                    inner.crash_in = None;
                    self.crash.notify_one();
                }
            }
            let in_a_thousand = inner.faults;
            let fault = if inner.dice.chance(in_a_thousand) {
                inner.dice.one_of(&Fault::ALL)
            } else {
                Fault::None
            };
            let slow = inner.dice.chance(in_a_thousand);
            let pause = inner.dice.millis(if slow { 2000 } else { 3 });
            (fault, pause)
        };
        tokio::time::sleep(pause).await;
        fault
    }
}

impl Inner {
    pub(crate) fn number(&mut self) -> u64 {
        self.numbers += 1;
        self.numbers
    }

    /// Forgets what nobody holds any more, as the kernel does.
    pub(crate) fn collect(&mut self) {
        self.disks.retain(|disk| disk.lent.is_held());
        self.networks.retain(|network| network.lent.is_held());
    }

    /// Makes a sandbox's disk; `None` while there is one.
    pub(crate) fn make_disk(
        &mut self,
        dir: &Path,
        id: &SandboxId,
        files: (File, File),
        size: u64,
    ) -> Option<(u32, OwnedFd)> {
        self.collect();
        if self.disks.iter().any(|disk| disk.id == *id) {
            return None;
        }
        let (origin, cow) = files;
        let (lent, out) = Lent::new(dir, size);
        let moment = [&cow, &origin].map(moment_of).into_iter().find(|moment| *moment > 0);
        lent.file
            .write_all_at(&moment.unwrap_or(0).to_le_bytes(), 0)
            .expect("written");
        let minor = u32::try_from(self.number()).expect("a minor number");
        self.disks.push(Disk {
            id: id.clone(),
            minor,
            lent,
            cow,
        });
        Some((minor, out))
    }

    /// Makes a slot's network; `None` while there is one.
    pub(crate) fn make_network(&mut self, dir: &Path, slot: Slot, policy: EgressPolicy) -> Option<OwnedFd> {
        self.collect();
        if self.networks.iter().any(|network| network.slot == slot) {
            return None;
        }
        let (lent, out) = Lent::new(dir, 0);
        self.networks.push(Network { slot, policy, lent });
        Some(out)
    }

    /// The disk behind a descriptor.
    pub(crate) fn disk_of(&self, descriptor: &File) -> Option<&Disk> {
        let inode = descriptor.metadata().expect("metadata").ino();
        self.disks.iter().find(|disk| disk.lent.inode == inode)
    }

    /// The network behind a descriptor.
    pub(crate) fn network_of(&mut self, descriptor: &File) -> Option<&mut Network> {
        let inode = descriptor.metadata().expect("metadata").ino();
        self.networks.iter_mut().find(|network| network.lent.inode == inode)
    }

    /// The policy of the network in a slot; `None` where there is none.
    pub(crate) fn policy_in(&self, slot: Slot) -> Option<&EgressPolicy> {
        let network = self.networks.iter().find(|network| network.slot == slot);
        network.map(|network| &network.policy)
    }
}

/// Tries to listen where guests of all slots would: at addresses of the loopback network, on one port.
fn listen_as_guests(dice: &mut Dice) -> Option<(GuestNet, Vec<(Slot, TcpListener)>)> {
    let mut net = GuestNet {
        base: Ipv4Addr::new(127, 1 + byte(dice), byte(dice), 0),
        port: 0,
    };
    let mut guests = Vec::new();
    for number in 1..=SLOTS {
        let slot = Slot::try_from(number).expect("a slot");
        let listener = TcpListener::bind(net.address_of(slot)).ok()?;
        listener.set_nonblocking(true).ok()?;
        // The first one's is everybody's.
        net.port = listener.local_addr().ok()?.port();
        guests.push((slot, listener));
    }
    Some((net, guests))
}

fn byte(dice: &mut Dice) -> u8 {
    u8::try_from(dice.roll(250)).expect("a byte")
}

/// Listens for packets. As a listener of the standard library, which knows streams alone but accepts all the same.
pub(crate) fn bind_packets(path: &Path) -> std::io::Result<UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    bind(std::os::fd::AsRawFd::as_raw_fd(&listener), &UnixAddr::new(path)?)?;
    listen(&listener, Backlog::new(64)?)?;
    Ok(listener.into())
}

/// A listener in the runtime that runs now.
pub(crate) fn listening(listener: &UnixListener) -> tokio::net::UnixListener {
    let copy = listener.try_clone().expect("duplicated");
    tokio::net::UnixListener::from_std(copy).expect("registered")
}

/// Waits until a process has ended; how is in what is watched.
pub(crate) async fn ended<T: Clone>(end: &mut watch::Receiver<Option<T>>) -> Option<T> {
    // One whose sender has gone has ended without a word.
    end.wait_for(Option::is_some).await.ok().and_then(|how| how.clone())
}
