//! What is refused: descriptors, sizes, uids, peers, junk.

use super::*;

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
        // An exception store of 16-sector chunks, and none at all.
        let coarse = rig.cow("coarse.cow", size);
        let junk = rig.cow("junk.cow", size);
        let begin_with = |path: &Path, fields: [u32; 4]| {
            let store = OpenOptions::new().write(true).open(path).expect("opened");
            let header = fields.map(u32::to_le_bytes).concat();
            store.write_all_at(&header, 0).expect("written");
        };
        begin_with(&coarse, [0x7041_6e53, 1, 1, 16]);
        begin_with(&junk, [7; 4]);
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
            (Cow, Wanted::ExceptionStore, opened(&both(), &coarse)),
            (Cow, Wanted::ExceptionStore, opened(&both(), &junk)),
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

#[test]
fn objects_of_others_with_our_names_are_neither_used_nor_removed() {
    in_rig(|| {
        let rig = Rig::start();
        let before = Census::take();
        let size = Mebibytes(8).sectors();
        let image = rig.image("theirs.img", 4 << 20, 7);
        let cow = rig.cow("theirs.cow", size);
        let about = fs::metadata(&image).expect("the image");
        let origin = names::origin(about.dev(), about.ino(), size);
        let shell = |script: &str| {
            let output = Command::new("sh").args(["-c", script]).output().expect("sh runs");
            assert!(output.status.success(), "{script}: {output:?}");
            String::from_utf8(output.stdout).expect("text")
        };
        let request = || rig.request("theirs", &image, &cow, size);
        let is_theirs = |name: &str| shell(&format!("dmsetup info -c --noheadings -o uuid {name}")).trim() == "theirs";
        let busy = |what| PrivdError::Busy { what };

        // An origin as ours is, but for its uuid, and one without a table, as a privd leaves it that was killed.
        let length = (4 << 20) / 512;
        let table = format!("0 {length} linear $(cat /sys/block/$(basename $loop)/dev) 0\\n{length} {length} zero");
        shell(&format!(
            "loop=$(losetup --find --show --read-only {}) && printf \"{table}\\n\" |
             dmsetup create {origin} --uuid theirs --readonly && losetup --detach $loop",
            image.display()
        ));
        for next in ["--notable", ""] {
            let refused = rig.open_disk(request()).expect_err("shared with a stranger");
            assert_eq!(refused, busy(ResourceKind::Disk));
            assert!(is_theirs(&origin));
            shell(&format!("dmsetup remove --retry {origin}"));
            if !next.is_empty() {
                shell(&format!("dmsetup create {origin} --uuid theirs {next}"));
            }
        }

        shell("dmsetup create roost-s-theirs --uuid theirs --notable && ip link add roost-v9 type dummy");
        let (runtime, client) = rig.runtime();
        let slot = Slot::try_from(9).expect("a slot");
        let policy = open_policy();
        // At once: either waits for its name to become free.
        let (disk, network) = runtime.block_on(async {
            let disk = client.open_disk(patient(), request());
            let network = client.open_network(patient(), OpenNetwork { slot, policy });
            tokio::join!(disk, network)
        });
        assert_eq!(disk.expect("answered").expect_err("taken"), busy(ResourceKind::Disk));
        assert_eq!(
            network.expect("answered").expect_err("taken"),
            busy(ResourceKind::Network)
        );
        assert!(is_theirs("roost-s-theirs"));
        assert!(shell("ip -details link show roost-v9").contains("dummy"));
        shell("dmsetup remove --retry roost-s-theirs && ip link delete roost-v9");

        drop(rig.open_disk(request()).expect("the names are free"));
        eventually("what was ours to be gone", || rig.inventory().is_empty().then_some(()));
        assert_eq!(Census::take().differences(&before), [""; 0]);
    });
}

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
