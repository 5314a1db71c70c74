//! Who holds what: a killed privd, a caller that gives up, a start after either.

use super::*;

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
        // It listens before it has looked around, and answers after.
        rig.inventory();
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
        // What was begun ends by itself, here while privd lives and otherwise at its end.
        eventually("an empty inventory", || rig.inventory().is_empty().then_some(()));
    });
}
