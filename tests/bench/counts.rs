//! `counts`: what operations ask of the host, in exact numbers. Their ceilings are a test's (`tests/rig/counts.rs`); this shows them.

use roost_tests::counts::{Counts, wakes_of_an_uncalled_privd};
use roost_tests::roost::{Sandbox, vmm_command};

use crate::Bench;
use crate::figure::{Figure, Goal, Samples};

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
