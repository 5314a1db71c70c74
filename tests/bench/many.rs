//! Many sandboxes: what each costs in memory (`density`), and at once (`storm`).

use std::fs;
use std::thread;
use std::time::Instant;

use roost_tests::counts::Contention;
use roost_tests::roost::{pids, vmm_command};

use crate::Bench;
use crate::figure::{Figure, Goal, Samples};
use crate::http::Http;
use crate::sandboxes::Sandbox;

/// Memory of a small guest, in MiB.
pub(crate) const SMALL: u32 = 128;

/// `density`: memory of the daemons and of each sandbox.
pub(crate) fn density(bench: &Bench) {
    let mut agent = Http::agent();
    let mut alive = Vec::new();
    let sizes: &[usize] = if bench.smoke { &[1] } else { &[1, 5, 20] };
    let mut first = None;
    for &size in sizes {
        while alive.len() < size {
            alive.push(Sandbox::create(&mut agent, SMALL));
        }
        let agent_pss = memory("roost-agent", "Pss").0[0];
        told(
            &format!("density.agent.{size}"),
            "KiB",
            &memory("roost-agent", "Pss"),
            agent_goal(size),
            "",
        );
        told(
            &format!("density.agent.rss.{size}"),
            "KiB",
            &memory("roost-agent", "Rss"),
            Goal::Seen,
            "",
        );
        told(
            &format!("density.privd.{size}"),
            "KiB",
            &memory("roost-privd", "Pss"),
            Goal::Seen,
            "",
        );
        told(
            &format!("density.shim.{size}"),
            "KiB",
            &memory("roost-vmmshim", "Pss"),
            Goal::AtMost(1536.0),
            "of what its program maps the one shim of a host has all, and each of many a part",
        );
        told(
            &format!("density.shim.rss.{size}"),
            "KiB",
            &memory("roost-vmmshim", "Rss"),
            Goal::Seen,
            "",
        );
        // The guest's memory is shared memory to the kernel; the rest is the VMM's own.
        let mut own = memory(vmm_command(), "Pss_Anon");
        for (own, file) in own.0.iter_mut().zip(memory(vmm_command(), "Pss_File").0) {
            *own += file;
        }
        told(&format!("density.vmm.{size}"), "KiB", &own, Goal::Seen, "");
        let (size_first, pss_first) = *first.get_or_insert((size, agent_pss));
        if size > size_first {
            let each = Samples(vec![(agent_pss - pss_first) / (size - size_first) as f64]);
            told(
                &format!("density.agent.each.{size}"),
                "KiB",
                &each,
                Goal::AtMost(64.0),
                "buffers of connections that are kept to each guest. \
                 Next: a heap profile at 1 and at 20",
            );
        }
    }
}

fn agent_goal(sandboxes: usize) -> Goal {
    Goal::AtMost((30 * 1024 + 64 * sandboxes) as f64)
}

fn told(name: &str, unit: &'static str, subject: &Samples, goal: Goal, unmet: &str) {
    Figure {
        name,
        unit,
        subject,
        baseline: None,
        goal,
        unmet,
    }
    .tell();
}

/// A line of `smaps_rollup` of every process of a name, in KiB.
fn memory(command: &str, line: &str) -> Samples {
    let of = |pid: i32| {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("it runs");
        let mut lines = text.lines().filter_map(|text| text.strip_prefix(&format!("{line}:")));
        let value = lines
            .next()
            .and_then(|value| value.trim().trim_end_matches(" kB").parse().ok());
        value.unwrap_or_else(|| panic!("{line} of {command}"))
    };
    let pids = pids(command);
    assert!(!pids.is_empty(), "no {command} runs");
    Samples(pids.into_iter().map(of).collect())
}

/// `storm`: many creates at once, against as many of them one after the other.
pub(crate) fn storm(bench: &Bench) {
    let count = bench.samples(50);
    let mut agent = Http::agent();
    drop(Sandbox::create(&mut agent, SMALL));
    let mut alone = Samples::default();
    for _ in 0..bench.samples(8) {
        let sandbox = alone.time(|| Sandbox::create(&mut agent, SMALL));
        drop(sandbox);
    }
    let began = Instant::now();
    let (made, waits) = Contention::of(*pids("roost-agent").first().expect("it runs"), || {
        let creating: Vec<_> = (0..count)
            .map(|_| {
                thread::spawn(|| {
                    let mut time = Samples::default();
                    let sandbox = time.time(|| Sandbox::create(&mut Http::agent(), SMALL));
                    (sandbox, time.0[0])
                })
            })
            .collect();
        let made = creating.into_iter().map(|made| made.join().expect("made"));
        made.collect::<Vec<_>>()
    });
    let whole = Samples(vec![began.elapsed().as_secs_f64() * 1000.0]);
    let each = Samples(made.iter().map(|(_, time)| *time).collect());
    let sum = Samples(vec![alone.median() * f64::from(count)]);
    Figure {
        name: "storm",
        unit: "ms",
        subject: &whole,
        baseline: Some(("as many creates, one after the other", &sum)),
        goal: Goal::AtMostTimes(1.0),
        unmet: "guests that boot at once share the host's processors, and each waits for its timers meanwhile; storm.locks says what of it is the \
                agent's. Next: with KVM, where guests do not wait for an emulator",
    }
    .tell();
    Figure {
        name: "storm.each",
        unit: "ms",
        subject: &each,
        baseline: Some(("a create alone", &alone)),
        goal: Goal::Seen,
        unmet: "",
    }
    .tell();
    // Of all that creates took, what threads of the agent have spent on waiting for each other's locks.
    let waited = waits.waited.as_secs_f64() * 1000.0 / f64::from(count);
    Figure {
        name: "storm.locks",
        unit: "ms of waits each",
        subject: &Samples(vec![waited]),
        baseline: Some(("a create alone", &alone)),
        goal: Goal::AtMostTimes(0.01),
        unmet: "a lock is held across something that waits",
    }
    .tell();
    let waits = Samples(vec![f64::from(waits.waits) / f64::from(count)]);
    told("storm.lock_waits", "waits each", &waits, Goal::Seen, "");
}
