//! Disks: what is read and written through them, what they share, when they come and go.

use super::*;

fn devices() -> usize {
    Census::take().count("dm device")
}

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
        // Udev has its own ideas of a disk's owner, and all the time it likes; our rule keeps them from it.
        run("udevadm settle");
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
        // A guest that writes every block of its disk, twice: its store has room for each.
        let disk = rig.open_disk(rig.request("again", &image, &cow, size)).expect("opened");
        let length = usize::try_from(size.bytes().0).expect("small");
        for fill in [4, 5] {
            device(&disk).write_all_at(&vec![fill; length], 0).expect("written");
            device(&disk).sync_all().expect("synced");
        }
        assert!(device(&disk).write_at(&[6], size.bytes().0).is_err(), "behind its end");
        let status = Command::new("dmsetup").args(["status", "roost-s-again"]).output();
        let status = String::from_utf8(status.expect("it runs").stdout).expect("text");
        assert!(status.contains(" snapshot ") && !status.contains("Invalid"), "{status}");
        drop(disk);
        let disk = rig.open_disk(rig.request("again", &image, &cow, size)).expect("opened");
        assert_eq!(read_at(&device(&disk), 0, length), vec![5; length]);
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
