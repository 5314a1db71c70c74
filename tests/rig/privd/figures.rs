//! What calls cost. Under emulation only ratios within one run mean anything.

use super::*;

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
