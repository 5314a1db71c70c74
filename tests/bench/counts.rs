//! `counts`: what operations ask of the host, in exact numbers. Their ceilings are a test's (`tests/rig/counts.rs`); this shows them.

use roost_common::privd::{EgressPolicy, Internet};
use roost_common::units::Mebibytes;
use roost_tests::counts::{Counts, system_calls, wakes_of_an_uncalled_privd};
use roost_tests::privd::Rig;
use roost_tests::roost::{Sandbox, pids, vmm_command};

use crate::figure::{Figure, Goal, Samples};
use crate::host::Bare;
use crate::{Bench, RIG_SLOTS};

pub(crate) fn run(_: &Bench) {
    drop(Sandbox::create(&["--memory", "256"]));
    let (sandbox, create) = Counts::of(|| Sandbox::create(&["--memory", "256"]));
    // The stand-in is two programs.
    let of_vm = if vmm_command() == "standin-vmm" { 2 } else { 1 };
    told(
        "counts.create.privd",
        "calls",
        create.privd.values().sum::<u64>() as f64,
        Goal::AtMost(2.0),
    );
    told("counts.create.syncs", "syncs", create.syncs as f64, Goal::AtMost(4.0));
    let others = create.programs.len().saturating_sub(1 + of_vm);
    told(
        "counts.create.programs",
        "beside shim and VMM",
        others as f64,
        Goal::AtMost(0.0),
    );
    let woken = wakes_of_an_uncalled_privd() as f64;
    told("counts.idle.privd", "wake-ups in 5 s", woken, Goal::AtMost(0.0));
    system_calls_of_privd();
    let agent = *pids("roost-agent").first().expect("it runs");
    let (another, calls) = system_calls(agent, || Sandbox::create(&["--memory", "256"]));
    told("counts.create.agent", "system calls", calls as f64, Goal::Seen);
    drop(another);
    let ((), pause) = Counts::of(|| sandbox.pause());
    let ((), resume) = Counts::of(|| sandbox.resume());
    let ((), destroy) = Counts::of(|| drop(sandbox));
    for (name, counts) in [("pause", pause), ("resume", resume), ("destroy", destroy)] {
        told(
            &format!("counts.{name}.privd"),
            "calls",
            counts.privd.values().sum::<u64>() as f64,
            Goal::Seen,
        );
        told(
            &format!("counts.{name}.syncs"),
            "syncs",
            counts.syncs as f64,
            Goal::Seen,
        );
    }
}

/// System calls of privd for a disk and for a network, beside those that the kernel needs in any case.
fn system_calls_of_privd() {
    let rig = Rig::start();
    let size = Mebibytes(1024).sectors();
    let image = rig.image("counts.img", 4 << 20, 1);
    let (_first, mut bare) = Bare::beside(&rig, &image, size);
    let privd = rig.child.id().cast_signed();
    let request = rig.request("counts", &image, &rig.cow("counts.cow", size), size);
    let (disk, of_disk) = system_calls(privd, || rig.open_disk(request).expect("opened"));
    let policy = EgressPolicy::of(Internet::Open);
    let (network, of_network) = system_calls(privd, || rig.open_network(RIG_SLOTS, policy).expect("opened"));
    drop((disk, network));
    let cow = rig.cow("bare.cow", size);
    let (_, of_bare) = system_calls(bare.child.id().cast_signed(), || {
        bare.make("bench-counts", &cow, size, RIG_SLOTS + 1)
    });
    bare.let_go();
    told("counts.open_disk", "system calls", of_disk as f64, Goal::Seen);
    told("counts.open_network", "system calls", of_network as f64, Goal::Seen);
    told("counts.bare", "system calls of both", of_bare as f64, Goal::Seen);
}

fn told(name: &str, unit: &'static str, value: f64, goal: Goal) {
    Figure {
        name,
        unit,
        subject: &Samples(vec![value]),
        baseline: None,
        goal,
        unmet: "an operation has come to ask for more than it did",
    }
    .tell();
}
