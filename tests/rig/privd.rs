//! privd on a real kernel: disks, networks, and what it refuses. Each test starts a privd of its own for the uid it runs as, so
//! that it can kill it; the installed one, where there is one, is left alone.

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
use roost_common::net::{GATEWAY, GATEWAY_MAC, GUEST, GUEST_MAC, SlotAddresses};
use roost_common::privd::{
    DescriptorRole, Disk, EgressPolicy, Internet, InventoryCursor, InventoryRow, Network, OpenDisk, OpenNetwork,
    PrivdClient, PrivdClientTransport, PrivdError, ReadCounters, ResourceKind, Rule, SetPolicy, SizeRefusal, Wanted,
};
use roost_common::units::{Mebibytes, Sectors};
use roost_tests::census::Census;
use roost_tests::internet::{self, run};
use roost_tests::{PATIENCE, eventually};
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

    fn try_counters(&self, tap: &PassedFd) -> Result<Vec<(Rule, u64)>, PrivdError> {
        let (runtime, client) = self.runtime();
        let request = ReadCounters { tap: tap.clone() };
        let counters = runtime
            .block_on(client.network_counters(patient(), request))
            .expect("answered")?;
        Ok(counters.rules.into_iter().map(|row| (row.rule, row.packets)).collect())
    }

    /// Packets that a rule has counted.
    fn count(&self, tap: &PassedFd, rule: Rule) -> u64 {
        let counters = self.try_counters(tap).expect("our tap");
        counters
            .iter()
            .find(|(counted, _)| *counted == rule)
            .expect("every rule has a row")
            .1
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
    fn drop(&mut self) {
        self.client = None;
        drop(self.child.kill());
        drop(self.child.wait());
        drop(fs::remove_file(SOCKET));
        drop(fs::remove_dir_all(&self.place));
    }
}

fn patient() -> context::Context {
    let mut context = context::current();
    context.deadline = Instant::now() + PATIENCE;
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

fn devices() -> usize {
    Census::take().count("dm device")
}

// -- disks

#[test]
fn a_disk_larger_than_its_image_reads_zeros_behind_it_and_is_usable_to_its_end() {
    in_rig(|| {
        let rig = Rig::start();
        let size = Mebibytes(64).sectors();
        let image = rig.image("a.img", 4 << 20, 0xA5);
        let cow = rig.cow("a.cow", size);
        let disk = rig.open_disk(rig.request("large", &image, &cow, size)).expect("opened");
        let file = device(&disk);
        assert_eq!(
            read_at(&file, (4 << 20) - 4096, 8192),
            [vec![0xA5; 4096], vec![0; 4096]].concat()
        );
        let end = size.bytes().0;
        assert_eq!(read_at(&file, end - 4096, 4096), vec![0; 4096]);
        for offset in [0, (4 << 20) - 4096, 4 << 20, 32 << 20, end - 4096] {
            file.write_all_at(&[0x5A; 4096], offset).expect("written");
        }
        file.sync_all().expect("synced");
        assert_eq!(read_at(&file, end - 4096, 4096), vec![0x5A; 4096]);
        assert_eq!(read_at(&file, (4 << 20) - 4096, 4096), vec![0x5A; 4096]);
        assert!(file.write_at(&[1], end).is_err(), "written behind the end");
        assert!(
            fs::read(&image).expect("read").iter().all(|byte| *byte == 0xA5),
            "the image was written"
        );
    });
}

#[test]
fn the_node_is_its_owners_alone() {
    in_rig(|| {
        let rig = Rig::start();
        let disk = rig.disk("owned", 1, Mebibytes(4).sectors());
        let status = fs::metadata(disk.node.to_string()).expect("the node");
        assert_eq!((status.uid(), status.gid(), status.mode() & 0o7777), (61184, 0, 0o600));
        assert_eq!(device(&disk).metadata().expect("the device").rdev(), status.rdev());
    });
}

#[test]
fn disks_of_one_image_share_its_origin_and_see_nothing_of_each_other() {
    in_rig(|| {
        let rig = Rig::start();
        let size = Mebibytes(8).sectors();
        let image = rig.image("shared.img", 4 << 20, 7);
        let open = |id: &str| {
            let cow = rig.cow(&format!("{id}.cow"), size);
            rig.open_disk(rig.request(id, &image, &cow, size)).expect("opened")
        };
        let (one, two) = (open("one"), open("two"));
        assert_eq!(devices(), 3, "two snapshots and one origin");
        assert_eq!(Census::take().count("loop"), 3);
        device(&one).write_all_at(&[1; 4096], 0).expect("written");
        device(&two).write_all_at(&[2; 4096], 0).expect("written");
        assert_eq!(read_at(&device(&one), 0, 4096), vec![1; 4096]);
        assert_eq!(read_at(&device(&two), 0, 4096), vec![2; 4096]);
        drop(one);
        eventually("the first to be gone", || (devices() == 2).then_some(()));
        assert_eq!(
            read_at(&device(&two), 4096, 4096),
            vec![7; 4096],
            "the origin went with the first"
        );
        let three = open("three");
        assert_eq!(devices(), 3);
        assert_eq!(read_at(&device(&three), 0, 4096), vec![7; 4096]);
    });
}

#[test]
fn an_existing_store_goes_on_where_it_was() {
    in_rig(|| {
        let rig = Rig::start();
        let size = Mebibytes(8).sectors();
        let image = rig.image("again.img", 4 << 20, 7);
        let cow = rig.cow("again.cow", size);
        for round in 1..=3u8 {
            let disk = rig.open_disk(rig.request("again", &image, &cow, size)).expect("opened");
            let file = device(&disk);
            for before in 1..round {
                assert_eq!(read_at(&file, u64::from(before) << 12, 4096), vec![before; 4096]);
            }
            file.write_all_at(&vec![round; 4096], u64::from(round) << 12)
                .expect("written");
            file.sync_all().expect("synced");
        }
    });
}

#[test]
fn a_disk_that_is_in_use_is_busy_and_one_on_its_way_out_is_waited_for() {
    in_rig(|| {
        let rig = Rig::start();
        let size = Mebibytes(8).sectors();
        let image = rig.image("busy.img", 4 << 20, 7);
        let cow = rig.cow("busy.cow", size);
        let disk = rig.open_disk(rig.request("busy", &image, &cow, size)).expect("opened");
        let started = Instant::now();
        let second = rig.open_disk(rig.request("busy", &image, &cow, size));
        let what = ResourceKind::Disk;
        assert_eq!(second.expect_err("two of them"), PrivdError::Busy { what });
        assert!(started.elapsed() >= Duration::from_secs(5), "it was not waited for");
        // Unwritten data makes the close, and with it the removal, take a while.
        let file = device(&disk);
        for chunk in 0..1024 {
            file.write_all_at(&[9; 8192], chunk << 13).expect("written");
        }
        drop(disk);
        let closing = std::thread::spawn(move || drop(file));
        let started = Instant::now();
        let third = rig
            .open_disk(rig.request("busy", &image, &cow, size))
            .expect("opened at last");
        println!("opened {} ms after it began to close", started.elapsed().as_millis());
        closing.join().expect("closed");
        assert_eq!(read_at(&device(&third), 0, 8192), vec![9; 8192]);
    });
}

#[test]
fn many_disks_opened_at_once_are_all_there_and_all_go() {
    in_rig(|| {
        let rig = Rig::start();
        let size = Mebibytes(8).sectors();
        let image = rig.image("many.img", 4 << 20, 7);
        let requests: Vec<_> = (0..8)
            .map(|n| {
                rig.request(
                    &format!("many-{n}"),
                    &image,
                    &rig.cow(&format!("many-{n}.cow"), size),
                    size,
                )
            })
            .collect();
        let (runtime, client) = rig.runtime();
        let started = Instant::now();
        let disks = runtime.block_on(async {
            let calls = requests.into_iter().map(|request| {
                let client = client.clone();
                tokio::spawn(async move { client.open_disk(patient(), request).await })
            });
            let mut disks = Vec::new();
            for call in calls.collect::<Vec<_>>() {
                disks.push(call.await.expect("no panic").expect("answered").expect("opened"));
            }
            disks
        });
        println!("8 disks at once: {} ms", started.elapsed().as_millis());
        assert_eq!(devices(), 9, "eight snapshots and one origin");
        drop(disks);
    });
}

#[test]
fn a_call_that_is_given_up_leaves_nothing() {
    in_rig(|| {
        let rig = Rig::start();
        let size = Mebibytes(8).sectors();
        let image = rig.image("given-up.img", 4 << 20, 7);
        for after in [0, 1, 5, 20, 60] {
            let id = format!("given-up-{after}");
            let cow = rig.cow(&format!("{id}.cow"), size);
            let (runtime, client) = rig.runtime();
            let slot = Slot::try_from(40 + after).expect("a slot");
            let policy = open_policy();
            runtime.block_on(async {
                let disk = client.open_disk(patient(), rig.request(&id, &image, &cow, size));
                let network = client.open_network(patient(), OpenNetwork { slot, policy });
                let limit = Duration::from_millis(u64::from(after));
                drop(tokio::time::timeout(limit, async { tokio::join!(disk, network) }).await);
            });
        }
    });
}

#[test]
fn hostile_descriptors_are_refused_and_change_nothing() {
    in_rig(|| {
        let rig = Rig::start();
        let size = Mebibytes(8).sectors();
        let image = rig.image("good.img", 4 << 20, 7);
        let cow = rig.cow("good.cow", size);
        let before = Census::take();
        let place = |name: &str| rig.place.join(name);
        let read = || OpenOptions::new().read(true).to_owned();
        let both = || OpenOptions::new().read(true).write(true).to_owned();

        run(&format!("mkfifo {}", place("fifo").display()));
        symlink(&image, place("link")).expect("a link");
        fs::hard_link(&cow, place("hard.cow")).expect("a second link");
        let alone = rig.cow("alone.cow", size);
        let foreign = rig.cow("foreign.cow", size);
        chown(&foreign, Some(1), Some(1)).expect("given away");
        let writable = rig.image("writable.img", 4 << 20, 7);
        run(&format!("chmod 0666 {}", writable.display()));
        let foreign_image = rig.image("foreign.img", 4 << 20, 7);
        chown(&foreign_image, Some(1), Some(1)).expect("given away");
        let odd = rig.image("odd.img", 4097, 7);
        let empty = rig.image("empty.img", 0, 7);
        let short = rig.cow("short.cow", Mebibytes(4).sectors());
        fs::write("/dev/shm/privd-test.img", vec![0; 1 << 20]).expect("written");

        use DescriptorRole::{Cow, Origin};
        let path_only = || read().custom_flags(nix::libc::O_PATH).to_owned();
        let wrong: Vec<(DescriptorRole, Wanted, PassedFd)> = vec![
            (Origin, Wanted::RegularFile, opened(&read(), &rig.place)),
            (Origin, Wanted::RegularFile, opened(&read(), Path::new("/dev/null"))),
            (Origin, Wanted::RegularFile, opened(&read(), Path::new("/dev/loop0"))),
            (Origin, Wanted::ReadOnly, opened(&both(), &place("fifo"))),
            (Origin, Wanted::ReadOnly, opened(&both(), &image)),
            (Origin, Wanted::ReadOnly, opened(OpenOptions::new().write(true), &image)),
            (Origin, Wanted::ReadOnly, opened(&path_only(), &image)),
            (Origin, Wanted::NotWritableByOthers, opened(&read(), &writable)),
            (Origin, Wanted::CallersOwn, opened(&read(), &foreign_image)),
            (Origin, Wanted::ProperLength, opened(&read(), &odd)),
            (Origin, Wanted::ProperLength, opened(&read(), &empty)),
            (
                Origin,
                Wanted::BackedByDisk,
                opened(&read(), Path::new("/dev/shm/privd-test.img")),
            ),
            (
                Origin,
                Wanted::BackedByDisk,
                opened(&read(), Path::new("/proc/self/maps")),
            ),
            (Cow, Wanted::ReadWrite, opened(&read(), &alone)),
            (Cow, Wanted::ReadWrite, opened(OpenOptions::new().write(true), &alone)),
            (Cow, Wanted::ReadWrite, opened(&path_only(), &alone)),
            (Cow, Wanted::RegularFile, opened(&both(), &place("fifo"))),
            (Cow, Wanted::RegularFile, opened(&both(), Path::new("/dev/null"))),
            (Cow, Wanted::SingleLink, opened(&both(), &cow)),
            (Cow, Wanted::CallersOwn, opened(&both(), &foreign)),
            (
                Cow,
                Wanted::BackedByDisk,
                opened(&both(), Path::new("/dev/shm/privd-test.img")),
            ),
        ];
        for (what, wanted, descriptor) in wrong {
            let mut request = rig.request("hostile", &image, &alone, size);
            match what {
                Origin => request.origin = descriptor,
                Cow | DescriptorRole::Tap => request.cow = descriptor,
            }
            let refused = rig.open_disk(request).expect_err("accepted");
            assert_eq!(refused, PrivdError::WrongDescriptor { what, wanted });
        }

        for (size, cow, reason) in [
            (Sectors(0), &alone, SizeRefusal::NotWholeChunks),
            (Sectors(8193), &alone, SizeRefusal::NotWholeChunks),
            (Sectors(u64::MAX), &alone, SizeRefusal::TooLarge),
            (Sectors((1 << 32) + 8), &alone, SizeRefusal::TooLarge),
            (Sectors(8), &alone, SizeRefusal::SmallerThanOrigin),
            (Mebibytes(8).sectors(), &short, SizeRefusal::CowTooShort),
        ] {
            let refused = rig
                .open_disk(rig.request("hostile", &image, cow, size))
                .expect_err("accepted");
            assert_eq!(refused, PrivdError::WrongSize { size, reason });
        }
        for uid in [1, 1000, 61183, 65520, 65534, u32::MAX] {
            let mut request = rig.request("hostile", &image, &alone, size);
            request.owner = uid;
            assert_eq!(
                rig.open_disk(request).expect_err("accepted"),
                PrivdError::WrongOwner { uid }
            );
        }

        let not_ours = PrivdError::WrongDescriptor {
            what: DescriptorRole::Tap,
            wanted: Wanted::OurTap,
        };
        for path in [
            "/dev/null",
            "/dev/net/tun",
            "/dev/loop0",
            "/proc/self/ns/net",
            "/dev/ptmx",
        ] {
            let options = if path.starts_with("/proc") { read() } else { both() };
            let descriptor = opened(&options, Path::new(path));
            assert_eq!(rig.try_counters(&descriptor).expect_err(path), not_ours, "{path}");
            assert_eq!(
                rig.set_policy(&descriptor, open_policy()).expect_err(path),
                not_ours,
                "{path}"
            );
        }
        let fifo = opened(&both(), &place("fifo"));
        assert_eq!(rig.try_counters(&fifo).expect_err("a fifo"), not_ours);
        let path_only = opened(&path_only(), Path::new("/dev/net/tun"));
        assert_eq!(rig.try_counters(&path_only).expect_err("O_PATH"), not_ours);

        fs::remove_file("/dev/shm/privd-test.img").expect("removed");
        assert_eq!(
            Census::take().differences(&before),
            [""; 0],
            "a refused call left something"
        );
        assert!(rig.inventory().is_empty());
    });
}

#[test]
fn what_a_killed_privd_made_stays_with_its_holders_and_goes_with_them() {
    in_rig(|| {
        let mut rig = Rig::start();
        let disk = rig.disk("orphan", 3, Mebibytes(8).sectors());
        let network = rig.open_network(9, open_policy()).expect("opened");
        let before = Census::take();
        rig.kill_and_restart();
        assert_eq!(Census::take().differences(&before), [""; 0]);
        assert_eq!(read_at(&device(&disk), 0, 4096), vec![3; 4096]);
        assert!(rig.try_counters(&network.tap).is_ok(), "the next privd knows the tap");
        let rows = rig.inventory();
        let names: Vec<_> = rows
            .iter()
            .map(|row| match row {
                InventoryRow::Device { name, open_count, .. } => {
                    assert!(*open_count > 0, "{name} is held by nobody");
                    name.split('-').take(2).collect::<Vec<_>>().join("-")
                }
                InventoryRow::Loop { .. } => "loop".into(),
                InventoryRow::Veth { slot } => format!("veth {slot}"),
            })
            .collect();
        for (kind, count) in [("roost-s", 1), ("roost-o", 1), ("loop", 2), ("veth 9", 1)] {
            assert_eq!(
                names.iter().filter(|name| *name == kind).count(),
                count,
                "{kind} in {names:?}"
            );
        }
        drop((disk, network));
        eventually("an empty inventory", || rig.inventory().is_empty().then_some(()));
    });
}

#[test]
fn a_start_removes_what_was_left_half_made_and_nothing_else() {
    in_rig(|| {
        let mut rig = Rig::start();
        let disk = rig.disk("kept", 3, Mebibytes(8).sectors());
        // As a privd leaves them that is killed right after creating, loading or activating a device.
        run("dmsetup create roost-s-created --uuid roost-s-created --notable");
        let zero = [
            "create",
            "roost-o-1-2-8",
            "--uuid",
            "roost-o-1-2-8",
            "--readonly",
            "--table",
            "0 8 zero",
        ];
        assert!(
            Command::new("dmsetup")
                .args(zero)
                .status()
                .expect("dmsetup runs")
                .success()
        );
        run("dmsetup create roost-s-foreign --uuid somebody-elses --notable");
        rig.kill_and_restart();
        let left = Command::new("dmsetup").args(["ls"]).output().expect("dmsetup runs");
        let left = String::from_utf8_lossy(&left.stdout).into_owned();
        assert!(
            left.contains("roost-s-kept") && left.contains("roost-s-foreign"),
            "{left}"
        );
        assert!(
            !left.contains("roost-s-created") && !left.contains("roost-o-1-2-8"),
            "{left}"
        );
        assert_eq!(read_at(&device(&disk), 0, 16), vec![3; 16]);
        run("dmsetup remove roost-s-foreign");
    });
}

// -- the socket

#[test]
fn a_peer_of_another_uid_is_refused_unheard() {
    in_rig(|| {
        let rig = Rig::start_for(12345);
        for _ in 0..20 {
            let socket = try_connect().expect("the socket itself is open to all");
            // Sent or not: it may be closed already.
            let _sent = send(socket.as_raw_fd(), &[0xFF; 64], MsgFlags::MSG_NOSIGNAL);
            assert_closed(&socket);
        }
        drop(rig);
    });
}

#[test]
fn junk_ends_its_connection_and_harms_nobody_elses() {
    in_rig(|| {
        let rig = Rig::start();
        for junk in [
            &[0xFF; 60_000][..],
            &[0],
            &[0, 1, 2, 3],
            &[1],
            b"GET / HTTP/1.1\r\n\r\n",
        ] {
            let socket = try_connect().expect("connected");
            send(socket.as_raw_fd(), junk, MsgFlags::MSG_NOSIGNAL).expect("sent");
            if junk != [1] {
                assert_closed(&socket);
            }
        }
        // More connections than are allowed: the surplus is closed, the first ones stay.
        let many: Vec<_> = (0..40).map(|_| try_connect().expect("connected")).collect();
        eventually("the surplus to be closed", || {
            let closed = many.iter().filter(|socket| is_closed(socket)).count();
            (closed >= 40 - 16).then_some(())
        });
        assert!(rig.inventory().is_empty(), "the old connection is still served");
    });
}

fn is_closed(socket: &OwnedFd) -> bool {
    match recv(
        socket.as_raw_fd(),
        &mut [0; 16],
        MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK,
    ) {
        Ok(0) | Err(nix::Error::ECONNRESET) => true,
        Ok(length) => panic!("{length} bytes of an answer"),
        Err(_) => false,
    }
}

fn assert_closed(socket: &OwnedFd) {
    eventually("the connection to be closed", || is_closed(socket).then_some(()));
}

// -- networks

fn open_policy() -> EgressPolicy {
    EgressPolicy {
        internet: Internet::Open,
        resolvers: vec![],
    }
}

fn closed_policy() -> EgressPolicy {
    EgressPolicy {
        internet: Internet::Closed,
        resolvers: vec![],
    }
}

/// A guest that is nothing but frames on the tap.
struct Guest {
    tap: File,
}

/// A UDP or ICMP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Packet {
    source: Ipv4Addr,
    destination: Ipv4Addr,
    /// `None` is ICMP.
    ports: Option<(u16, u16)>,
    /// The first byte of what it carries, for ICMP the type.
    first: u8,
}

/// `struct virtio_net_hdr`, which every frame of this tap begins with.
const VNET: usize = 10;

impl Guest {
    fn on(network: &Network) -> Self {
        let tap = network.tap.as_fd().try_clone_to_owned().expect("a copy");
        Self { tap: tap.into() }
    }

    fn send(&mut self, packet: Packet) {
        self.send_from(GUEST_MAC, packet);
    }

    fn send_from(&mut self, mac: [u8; 6], packet: Packet) {
        let (protocol, payload) = match packet.ports {
            Some((from, to)) => {
                let mut udp = [from.to_be_bytes(), to.to_be_bytes(), 9u16.to_be_bytes(), [0; 2]].concat();
                udp.push(packet.first);
                (17, udp)
            }
            None => {
                let mut icmp = vec![packet.first, 0, 0, 0, 0, 1, 0, 1];
                let sum = checksum(&icmp).to_be_bytes();
                icmp[2..4].copy_from_slice(&sum);
                (1, icmp)
            }
        };
        let length = u16::try_from(20 + payload.len()).expect("small").to_be_bytes();
        let mut ip = vec![0x45, 0, length[0], length[1], 0, 1, 0x40, 0, 64, protocol, 0, 0];
        ip.extend(packet.source.octets());
        ip.extend(packet.destination.octets());
        let sum = checksum(&ip).to_be_bytes();
        ip[10..12].copy_from_slice(&sum);
        self.send_frame(mac, 0x0800, &[ip, payload].concat());
    }

    fn send_frame(&mut self, mac: [u8; 6], ether_type: u16, payload: &[u8]) {
        let mut frame = vec![0; VNET];
        frame.extend(GATEWAY_MAC);
        frame.extend(mac);
        frame.extend(ether_type.to_be_bytes());
        frame.extend(payload);
        assert_eq!(self.tap.write(&frame).expect("sent"), frame.len());
    }

    /// The next packet that `wanted` holds for; others are passed over.
    fn receive(&mut self, wanted: impl Fn(&Packet) -> bool) -> Packet {
        eventually("a packet for the guest", || self.next().filter(|packet| wanted(packet)))
    }

    fn next(&mut self) -> Option<Packet> {
        let mut frame = [0; 2048];
        let length = match self.tap.read(&mut frame) {
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
            Err(error) => panic!("{error}"),
        };
        let frame = &frame[VNET..length];
        if frame[12..14] != [8, 0] {
            return None;
        }
        let (ip, payload) = frame[14..].split_at(20);
        let address = |at: usize| Ipv4Addr::new(ip[at], ip[at + 1], ip[at + 2], ip[at + 3]);
        let port = |at: usize| u16::from_be_bytes([payload[at], payload[at + 1]]);
        let udp = ip[9] == 17;
        Some(Packet {
            source: address(12),
            destination: address(16),
            ports: udp.then(|| (port(0), port(2))),
            first: payload[if udp { 8 } else { 0 }],
        })
    }
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded")
}

fn to(destination: Ipv4Addr, port: u16) -> Packet {
    Packet {
        source: GUEST,
        destination,
        ports: Some((5000, port)),
        first: b'x',
    }
}

fn server() -> Ipv4Addr {
    internet::SERVER.parse().expect("an address")
}

fn udp(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap_or_else(|error| panic!("{address}: {error}"));
    socket
        .set_read_timeout(Some(Duration::from_millis(300)))
        .expect("a limit");
    socket
}

/// A socket bound in the internet's namespace.
fn udp_in_the_internet(port: u16) -> UdpSocket {
    std::thread::spawn(move || {
        let namespace = File::open("/run/netns/internet").expect("the namespace");
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).expect("entered");
        udp(&format!("0.0.0.0:{port}"))
    })
    .join()
    .expect("bound")
}

fn received(socket: &UdpSocket) -> io::Result<(u8, Ipv4Addr, u16)> {
    let mut byte = [0; 16];
    let (_, from) = socket.recv_from(&mut byte)?;
    match from.ip() {
        std::net::IpAddr::V4(address) => Ok((byte[0], address, from.port())),
        std::net::IpAddr::V6(_) => panic!("IPv6"),
    }
}

#[test]
fn the_host_reaches_the_guest_at_its_slots_address_and_gets_answers() {
    in_rig(|| {
        let rig = Rig::start();
        let network = rig.open_network(7, closed_policy()).expect("opened");
        let addresses = SlotAddresses::of(Slot::try_from(7).expect("a slot"));
        assert_eq!(network.addresses, addresses);
        let mut guest = Guest::on(&network);
        let socket = udp("0.0.0.0:0");
        // The very first packet: nothing waits for ARP.
        socket.send_to(b"h", (addresses.host, 49983)).expect("sent");
        let packet = guest.receive(|packet| packet.ports.is_some());
        assert_eq!((packet.source, packet.destination), (addresses.veth_host, GUEST));
        let (from, to) = packet.ports.expect("UDP");
        assert_eq!((to, packet.first), (49983, b'h'));
        guest.send(Packet {
            source: GUEST,
            destination: packet.source,
            ports: Some((to, from)),
            first: b'g',
        });
        assert_eq!(received(&socket).expect("an answer"), (b'g', addresses.host, 49983));
        assert_eq!(rig.count(&network.tap, Rule::FromHost), 1);
        assert_eq!(rig.count(&network.tap, Rule::Established), 1);
        assert_eq!(rig.count(&network.tap, Rule::NoInternet), 0);

        // Ping to the gateway is answered; that it is not ARP that answers shows in the type.
        let ping = Packet {
            source: GUEST,
            destination: GATEWAY,
            ports: None,
            first: 8,
        };
        guest.send(ping);
        let pong = guest.receive(|packet| packet.ports.is_none());
        assert_eq!((pong.source, pong.destination, pong.first), (GATEWAY, GUEST, 0));
        assert_eq!(rig.count(&network.tap, Rule::Gateway), 1);
    });
}

#[test]
fn an_open_policy_lets_the_guest_reach_the_internet_and_nothing_else() {
    in_rig(|| {
        let rig = Rig::start();
        let _internet = internet::Internet::connect();
        let (one, two) = (
            rig.open_network(1, open_policy()).expect("opened"),
            rig.open_network(2, open_policy()).expect("opened"),
        );
        let (mut guest, mut other) = (Guest::on(&one), Guest::on(&two));
        let world = udp_in_the_internet(7000);
        guest.send(to(server(), 7000));
        let (byte, from, port) = received(&world).expect("it arrived");
        assert_eq!(
            (byte, from),
            (b'x', internet::HOST.parse().expect("an address")),
            "masqueraded as the host"
        );
        world.send_to(b"w", (from, port)).expect("sent");
        let answer = guest.receive(|packet| packet.ports.is_some());
        assert_eq!(
            (answer.source, answer.destination, answer.first),
            (server(), GUEST, b'w')
        );
        assert_eq!(rig.count(&one.tap, Rule::Internet), 1);

        // The host by each of its addresses, the other sandbox by each of its, private ranges, link-local, itself.
        let host = udp("0.0.0.0:7001");
        let (mine, others) = (one.addresses, two.addresses);
        let closed = [
            internet::HOST.parse().expect("an address"),
            mine.veth_host,
            mine.veth_namespace,
            mine.host,
            others.host,
            others.veth_host,
            others.veth_namespace,
            GATEWAY,
            Ipv4Addr::new(169, 254, 169, 254),
            Ipv4Addr::new(10, 0, 0, 1),
            Ipv4Addr::new(172, 16, 0, 1),
            Ipv4Addr::new(192, 168, 1, 1),
            Ipv4Addr::new(100, 64, 0, 1),
            Ipv4Addr::new(198, 18, 0, 1),
            Ipv4Addr::new(240, 0, 0, 1),
        ];
        for (n, destination) in (1..).zip(closed) {
            guest.send(to(destination, 7001));
            assert_eq!(rig.count(&one.tap, Rule::ClosedRange), n, "{destination} is open");
        }
        assert!(received(&host).is_err(), "the host was reached");
        assert_eq!(other.next(), None, "the other sandbox was reached");
        assert_eq!(rig.count(&two.tap, Rule::FromElsewhere), 0);

        // Martians never get as far as the policy.
        for destination in [Ipv4Addr::LOCALHOST, Ipv4Addr::BROADCAST, Ipv4Addr::UNSPECIFIED] {
            guest.send(to(destination, 7001));
        }
        assert!(received(&host).is_err(), "the host was reached");

        // Neither does what another sandbox sends as somebody else, nor IPv6.
        let spoofed = Packet {
            source: others.veth_host,
            ..to(server(), 7000)
        };
        guest.send(spoofed);
        guest.send_from([2, 0, 0, 0, 0, 9], to(server(), 7000));
        assert_eq!(rig.count(&one.tap, Rule::Spoofed), 2);
        let mut ipv6 = vec![0x60, 0, 0, 0, 0, 0, 59, 64];
        ipv6.extend([0x20; 32]);
        guest.send_frame(GUEST_MAC, 0x86DD, &ipv6);
        assert_eq!(rig.count(&one.tap, Rule::Ipv6), 1);
        assert!(received(&world).is_err(), "a spoofed packet got out");
    });
}

#[test]
fn nobody_but_the_host_opens_connections_to_a_guest() {
    in_rig(|| {
        let rig = Rig::start();
        let _internet = internet::Internet::connect();
        let network = rig.open_network(3, open_policy()).expect("opened");
        let mut guest = Guest::on(&network);
        // The neighbour routes to the guest through the host, once as itself and once as the host's end.
        run("ip -n internet route add 10.8.0.0/13 via 203.0.113.1");
        let world = udp_in_the_internet(7000);
        world.send_to(b"w", (network.addresses.host, 49983)).expect("sent");
        world
            .send_to(b"w", (network.addresses.veth_namespace, 49983))
            .expect("sent");
        run(&format!(
            "ip -n internet addr add {}/32 dev lo",
            network.addresses.veth_host
        ));
        let bound = network.addresses.veth_host;
        let forged = std::thread::spawn(move || {
            let namespace = File::open("/run/netns/internet").expect("the namespace");
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).expect("entered");
            udp(&format!("{bound}:7002"))
        });
        let forged = forged.join().expect("bound");
        forged.send_to(b"f", (network.addresses.host, 49983)).expect("sent");
        // The host itself still gets through, and by then the others would have.
        udp("0.0.0.0:0")
            .send_to(b"h", (network.addresses.host, 49983))
            .expect("sent");
        let first = guest.receive(|packet| packet.ports.is_some());
        assert_eq!(first.first, b'h', "somebody else got through: {first:?}");
        assert_eq!(guest.next(), None);
    });
}

#[test]
fn closing_the_internet_ends_what_was_open_and_keeps_the_host() {
    in_rig(|| {
        let rig = Rig::start();
        let _internet = internet::Internet::connect();
        let network = rig.open_network(4, open_policy()).expect("opened");
        let mut guest = Guest::on(&network);
        let world = udp_in_the_internet(7000);
        guest.send(to(server(), 7000));
        let (_, from, port) = received(&world).expect("it arrived");
        world.send_to(b"w", (from, port)).expect("sent");
        guest.receive(|packet| packet.first == b'w');

        rig.set_policy(&network.tap, closed_policy()).expect("replaced");
        guest.send(to(server(), 7000));
        assert_eq!(rig.count(&network.tap, Rule::NoInternet), 1);
        assert!(received(&world).is_err(), "an open flow went on");
        let socket = udp("0.0.0.0:0");
        socket.send_to(b"h", (network.addresses.host, 49983)).expect("sent");
        let packet = guest.receive(|packet| packet.first == b'h');
        let (from, to_port) = packet.ports.expect("UDP");
        guest.send(Packet {
            source: GUEST,
            destination: packet.source,
            ports: Some((to_port, from)),
            first: b'g',
        });
        assert_eq!(received(&socket).expect("an answer").0, b'g');

        rig.set_policy(&network.tap, open_policy()).expect("replaced");
        guest.send(to(server(), 7000));
        assert!(received(&world).is_ok(), "open again");
    });
}

#[test]
fn a_resolver_is_reached_on_port_53_alone_even_in_a_closed_range() {
    in_rig(|| {
        let rig = Rig::start();
        let _internet = internet::Internet::connect();
        let resolver = Ipv4Addr::new(192, 168, 53, 53);
        run("ip -n internet addr add 192.168.53.53/32 dev lo");
        let policy = |internet| EgressPolicy {
            internet,
            resolvers: vec![resolver],
        };
        let network = rig.open_network(5, policy(Internet::Open)).expect("opened");
        let mut guest = Guest::on(&network);
        let (dns, other) = (udp_in_the_internet(53), udp_in_the_internet(54));
        guest.send(to(resolver, 53));
        assert!(received(&dns).is_ok());
        guest.send(to(resolver, 54));
        assert!(received(&other).is_err());
        assert_eq!(
            (
                rig.count(&network.tap, Rule::Resolver),
                rig.count(&network.tap, Rule::ClosedRange)
            ),
            (1, 1)
        );
        rig.set_policy(&network.tap, policy(Internet::Closed))
            .expect("replaced");
        guest.send(to(resolver, 53));
        assert!(received(&dns).is_err(), "name servers are reachable without internet");
        let many = EgressPolicy {
            internet: Internet::Open,
            resolvers: vec![resolver; 9],
        };
        let refused = rig.set_policy(&network.tap, many).expect_err("nine resolvers");
        let what = ResourceKind::Resolvers;
        assert_eq!(refused, PrivdError::TooMany { what, max: 8 });
    });
}

#[test]
fn a_slot_that_is_in_use_is_busy_and_one_on_its_way_out_is_waited_for() {
    in_rig(|| {
        let rig = Rig::start();
        let network = rig.open_network(6, open_policy()).expect("opened");
        let started = Instant::now();
        let what = ResourceKind::Network;
        assert_eq!(
            rig.open_network(6, open_policy()).expect_err("two of them"),
            PrivdError::Busy { what }
        );
        assert!(started.elapsed() >= Duration::from_secs(5), "it was not waited for");
        drop(network);
        let started = Instant::now();
        let again = rig.open_network(6, open_policy()).expect("opened at last");
        println!("opened {} ms after it was closed", started.elapsed().as_millis());
        drop(again);
        let started = Instant::now();
        eventually("the veth to be gone", || {
            (!Path::new("/sys/class/net/roost-v6").exists()).then_some(())
        });
        println!("gone {} ms after it was closed", started.elapsed().as_millis());
    });
}

#[test]
fn a_tap_of_somebody_elses_making_is_refused() {
    in_rig(|| {
        let rig = Rig::start();
        // A tap of the right name: in the initial namespace, and in one of its maker's.
        let foreign = || -> PassedFd {
            run("ip tuntap add dev tap0 mode tap vnet_hdr");
            let tun = opened(OpenOptions::new().read(true).write(true), Path::new("/dev/net/tun"));
            attach(&tun, "tap0");
            tun
        };
        let not_ours = PrivdError::WrongDescriptor {
            what: DescriptorRole::Tap,
            wanted: Wanted::OurTap,
        };
        let here = foreign();
        assert_eq!(rig.try_counters(&here).expect_err("in the initial namespace"), not_ours);
        assert_eq!(
            rig.set_policy(&here, closed_policy())
                .expect_err("in the initial namespace"),
            not_ours
        );
        drop(here);
        run("ip tuntap del dev tap0 mode tap");
        let elsewhere = std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a namespace");
            foreign()
        });
        let elsewhere = elsewhere.join().expect("made");
        assert_eq!(rig.try_counters(&elsewhere).expect_err("without our rules"), not_ours);
        assert_eq!(
            rig.set_policy(&elsewhere, closed_policy())
                .expect_err("without our rules"),
            not_ours
        );
    });
}

#[expect(unsafe_code, reason = "TUNSETIFF has no safe wrapper")]
fn attach(tun: &PassedFd, name: &str) {
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    let flags = i16::try_from(libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR).expect("flags fit");
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: `request` has the size of an ifreq, which is what the kernel reads and writes there.
    let done = unsafe { libc::ioctl(tun.as_fd().as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

// -- figures

#[test]
fn what_calls_cost() {
    in_rig(|| {
        let rig = Rig::start();
        let size = Mebibytes(64).sectors();
        let image = rig.image("cost.img", 4 << 20, 1);
        let timed = |what: &str, mut call: Box<dyn FnMut(u32) + '_>| {
            let mut taken: Vec<_> = (0..20)
                .map(|n| {
                    let started = Instant::now();
                    call(n);
                    started.elapsed().as_secs_f64() * 1000.0
                })
                .collect();
            taken.sort_by(f64::total_cmp);
            println!(
                "{what}: median {:.1} ms, least {:.1}, most {:.1}",
                taken[10], taken[0], taken[19]
            );
        };
        let requests: Vec<_> = (0..20)
            .map(|n| {
                rig.request(
                    &format!("cost-{n}"),
                    &image,
                    &rig.cow(&format!("cost-{n}.cow"), size),
                    size,
                )
            })
            .collect();
        let (mut requests, mut disks, mut networks) = (requests.into_iter(), Vec::new(), Vec::new());
        timed(
            "open_disk",
            Box::new(|_| disks.push(rig.open_disk(requests.next().expect("twenty")).expect("opened"))),
        );
        timed(
            "open_network",
            Box::new(|n| networks.push(rig.open_network(n + 1, open_policy()).expect("opened"))),
        );
        timed(
            "set_policy",
            Box::new(|_| rig.set_policy(&networks[0].tap, closed_policy()).expect("replaced")),
        );
        timed(
            "network_counters",
            Box::new(|_| drop(rig.try_counters(&networks[0].tap).expect("read"))),
        );
        timed(
            "inventory",
            Box::new(|_| assert_eq!(rig.inventory().len(), 21 + 21 + 20)),
        );
        let started = Instant::now();
        drop(networks);
        println!("closing 20 taps: {} ms", started.elapsed().as_millis());
        drop(disks);
        eventually("an empty inventory", || rig.inventory().is_empty().then_some(()));
        println!("everything gone after {} ms", started.elapsed().as_millis());
    });
}
