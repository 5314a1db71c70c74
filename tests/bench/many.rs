//! Many sandboxes: what each costs in memory (`density`), at once (`storm`), and what it costs that there are many (`scale`).

use std::fs;
use std::process::Command;
use std::thread;
use std::time::Instant;

use roost_common::privd::{EgressPolicy, Internet};
use roost_common::units::Mebibytes;
use roost_tests::eventually;
use roost_tests::internet::run;
use roost_tests::privd::Rig;
use roost_tests::roost::{pids, vmm_command, wait_for_agent};

use crate::figure::{Figure, Goal, Samples};
use crate::http::Http;
use crate::sandboxes::Sandbox;
use crate::{Bench, RIG_SLOTS};

/// Memory of a small guest, in MiB.
const SMALL: u32 = 128;

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
            &memory("roost-agent", "Pss"),
            agent_goal(size),
            "",
        );
        told(
            &format!("density.agent.rss.{size}"),
            &memory("roost-agent", "Rss"),
            Goal::Seen,
            "",
        );
        told(
            &format!("density.privd.{size}"),
            &memory("roost-privd", "Pss"),
            Goal::Seen,
            "",
        );
        told(
            &format!("density.shim.{size}"),
            &memory("roost-vmmshim", "Pss"),
            Goal::AtMost(1536.0),
            "of what its program maps the one shim of a host has all, and each of many a part",
        );
        told(
            &format!("density.shim.rss.{size}"),
            &memory("roost-vmmshim", "Rss"),
            Goal::Seen,
            "",
        );
        // The guest's memory is shared memory to the kernel; the rest is the VMM's own.
        let mut own = memory(vmm_command(), "Pss_Anon");
        for (own, file) in own.0.iter_mut().zip(memory(vmm_command(), "Pss_File").0) {
            *own += file;
        }
        told(&format!("density.vmm.{size}"), &own, Goal::Seen, "");
        let (size_first, pss_first) = *first.get_or_insert((size, agent_pss));
        if size > size_first {
            let each = Samples(vec![(agent_pss - pss_first) / (size - size_first) as f64]);
            told(
                &format!("density.agent.each.{size}"),
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

fn told(name: &str, subject: &Samples, goal: Goal, unmet: &str) {
    Figure {
        name,
        unit: "KiB",
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
    let creating: Vec<_> = (0..count)
        .map(|_| {
            thread::spawn(|| {
                let mut time = Samples::default();
                let sandbox = time.time(|| Sandbox::create(&mut Http::agent(), SMALL));
                (sandbox, time.0[0])
            })
        })
        .collect();
    let made: Vec<_> = creating.into_iter().map(|made| made.join().expect("made")).collect();
    let whole = Samples(vec![began.elapsed().as_secs_f64() * 1000.0]);
    let each = Samples(made.iter().map(|(_, time)| *time).collect());
    let sum = Samples(vec![alone.median() * f64::from(count)]);
    Figure {
        name: "storm",
        unit: "ms",
        subject: &whole,
        baseline: Some(("as many creates, one after the other", &sum)),
        goal: Goal::AtMostTimes(1.0),
        unmet: "guests that boot at once share the host's processors, and each waits for its timers meanwhile",
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
}

/// `scale`: networks and disks with few and with many of them alive, and the agent's start with many records.
pub(crate) fn scale(bench: &Bench) {
    host_objects(bench);
    records(bench);
}

fn host_objects(bench: &Bench) {
    let rig = Rig::start();
    let size = Mebibytes(64).sectors();
    let image = rig.image("scale.img", 4 << 20, 1);
    let policy = || EgressPolicy::of(Internet::Open);
    let mut alive = Vec::new();
    let mut first: Option<[Samples; 3]> = None;
    let sizes: &[usize] = if bench.smoke { &[1, 4] } else { &[1, 100, 1000, 5000] };
    for &count in sizes {
        while alive.len() < count {
            let n = alive.len();
            let name = format!("scale-{n}");
            let cow = rig.cow(&format!("{name}.cow"), size);
            let disk = rig.open_disk(rig.request(&name, &image, &cow, size)).expect("a disk");
            let slot = u32::try_from(n + 1).expect("few");
            let network = rig.open_network(slot, policy()).expect("a network");
            alive.push((disk, network));
        }
        let [mut disks, mut networks, mut removals] = <[Samples; 3]>::default();
        for n in 0..bench.samples(20) {
            let name = format!("more-{count}-{n}");
            let cow = rig.cow(&format!("{name}.cow"), size);
            let request = rig.request(&name, &image, &cow, size);
            let disk = disks.time(|| rig.open_disk(request).expect("a disk"));
            let network = networks.time(|| rig.open_network(RIG_SLOTS + n, policy()).expect("a network"));
            removals.time(|| drop((disk, network)));
        }
        for (index, (what, samples)) in [("disk", &disks), ("network", &networks), ("close", &removals)]
            .into_iter()
            .enumerate()
        {
            let baseline = first.as_ref().map(|first| ("with one alive", &first[index]));
            Figure {
                name: &format!("scale.{what}.{count}"),
                unit: "ms",
                subject: samples,
                goal: baseline.map_or(Goal::Seen, |_| Goal::AtMostTimes(1.2)),
                baseline,
                unmet: "the kernel's own lists: a loop's number is found by search, a namespace's start and a link's name are found among all. \
                        Next: measure the bare system calls with as many alive",
            }
            .tell();
        }
        first.get_or_insert([disks, networks, removals]);
    }
}

/// What recovery costs the agent for each record, of sandboxes that are paused.
fn records(bench: &Bench) {
    let (few, many) = if bench.smoke { (1, 10) } else { (1, 1000) };
    let mut agent = Http::agent();
    let sandbox = Sandbox::create(&mut agent, SMALL);
    agent.ask("PauseSandbox", &serde_json::json!({ "sandboxId": sandbox.id }));
    drop(agent);
    let starts = |copies: u32| {
        run("systemctl stop roost-agent.service");
        let script = format!(
            "cd /var/lib/roost/sandboxes && for n in $(seq {copies}); do
                 to=bench-copy-$n; [ -e $to ] && continue
                 cp -a --sparse=always {id} $to && sed -i s/{id}/$to/g $to/sandbox.json || exit 1
             done",
            id = sandbox.id
        );
        let copied = Command::new("bash").args(["-c", &script]).status().expect("bash runs");
        assert!(copied.success(), "not copied");
        run("systemctl start roost-agent.service");
        wait_for_agent();
        cpu_seconds(*pids("roost-agent").first().expect("it runs"))
    };
    let (alone, all) = (starts(few), starts(many));
    let listed = Http::agent().ask("ListSandboxes", &serde_json::json!({}));
    let listed = listed["pausedSandboxes"].as_array().map_or(0, Vec::len);
    assert!(listed > many as usize, "of {many} records {listed} are listed");
    let added = Samples(vec![(all - alone).max(0.0)]);
    Figure {
        name: "scale.recovery",
        unit: "s of CPU",
        subject: &added,
        baseline: Some(("a start with two records", &Samples(vec![alone]))),
        goal: Goal::AtMost(f64::from(many) / 1000.0),
        unmet: "emulated seconds are some twenty of a real processor's",
    }
    .tell();
    run("systemctl stop roost-agent.service");
    let removed = Command::new("bash")
        .args(["-c", "rm -r /var/lib/roost/sandboxes/bench-copy-*"])
        .status();
    assert!(removed.expect("bash runs").success());
    run("systemctl start roost-agent.service");
    wait_for_agent();
    eventually("the copies to be gone", || {
        let listed = Http::agent().ask("ListSandboxes", &serde_json::json!({}));
        (listed["pausedSandboxes"].as_array().map_or(0, Vec::len) == 1).then_some(())
    });
}

/// Seconds of processor time that a process has had.
fn cpu_seconds(pid: i32) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let fields: Vec<&str> = text.rsplit(')').next().expect("a name").split_whitespace().collect();
    // Fields 14 and 15 of the whole, in hundredths of a second.
    let ticks = |field: &str| field.parse::<f64>().expect("a number");
    (ticks(fields[11]) + ticks(fields[12])) / 100.0
}
