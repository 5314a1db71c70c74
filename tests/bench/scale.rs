//! `scale`: what it costs that there are many. Disks and networks with few and with thousands of them alive, beside the bare system calls with
//! as many, which say how much of it is the kernel's; and the agent with thousands of records of paused sandboxes.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use roost_common::privd::{EgressPolicy, Internet};
use roost_common::units::Mebibytes;
use roost_tests::internet::run;
use roost_tests::privd::Rig;
use roost_tests::roost::{pids, wait_for_agent};
use serde_json::{Value, json};

use crate::figure::{Figure, Goal, Samples};
use crate::host::{Bare, gone};
use crate::http::Http;
use crate::many::SMALL;
use crate::sandboxes::Sandbox;
use crate::{Bench, RIG_SLOTS};

/// First slot of the networks that stay.
const FIRST_SLOT: u32 = RIG_SLOTS + 1000;
/// How many of them are made at a time, and their disks.
const MAKERS: usize = 4;
/// The agent's sandboxes.
const SANDBOXES: &str = "/var/lib/roost/sandboxes";
/// How long an agent is watched that nobody asks for anything.
const IDLE: Duration = Duration::from_secs(20);

/// Both halves.
pub(crate) fn measure(bench: &Bench) {
    host_objects(bench);
    records(bench);
}

/// Times with so many alive: privd's, and those of the bare system calls.
#[derive(Default)]
struct Times {
    disks: Samples,
    networks: Samples,
    closes: Samples,
    bare_disks: Samples,
    bare_networks: Samples,
}

fn host_objects(bench: &Bench) {
    let rig = Rig::start();
    // Small, as the kernel has memory for each that grows with it.
    let size = Mebibytes(16).sectors();
    let image = rig.image("scale.img", 4 << 20, 1);
    let policy = || EgressPolicy::of(Internet::Open);
    let (first_disk, mut bare) = Bare::beside(&rig, &image, size);
    let mut alive = Vec::new();
    let mut first: Option<Times> = None;
    let sizes: &[usize] = if bench.smoke { &[1, 4] } else { &[1, 100, 1000, 5000] };
    for &count in sizes {
        // Of those that stay no time is taken, so they are made at once.
        let from = alive.len();
        let make = |n: usize| {
            let name = format!("scale-{n}");
            let cow = rig.cow(&format!("{name}.cow"), size);
            let disk = rig.open_disk(rig.request(&name, &image, &cow, size)).expect("a disk");
            let slot = FIRST_SLOT + u32::try_from(n).expect("few");
            let network = rig.open_network(slot, policy()).expect("a network");
            if n % 500 == 499 {
                eprintln!("bench: scale: {} disks and networks", n + 1);
            }
            (disk, network)
        };
        thread::scope(|scope| {
            let makers: Vec<_> = (0..MAKERS)
                .map(|maker| {
                    let own = (from..count).skip(maker).step_by(MAKERS);
                    let make = &make;
                    scope.spawn(move || own.map(make).collect::<Vec<_>>())
                })
                .collect();
            alive.extend(makers.into_iter().flat_map(|maker| maker.join().expect("made")));
        });
        let mut times = Times::default();
        for n in 0..bench.samples(20) {
            let name = format!("more-{count}-{n}");
            let request = rig.request(&name, &image, &rig.cow(&format!("{name}.cow"), size), size);
            let disk = times.disks.time(|| rig.open_disk(request).expect("a disk"));
            let network = times
                .networks
                .time(|| rig.open_network(RIG_SLOTS + n, policy()).expect("a network"));
            let minor = disk.node.minor;
            times.closes.time(|| {
                drop((disk, network));
                gone(minor, &format!("roost-v{}", RIG_SLOTS + n));
            });
            let name = format!("bare-{count}-{n}");
            let took = bare.make(&name, &rig.cow(&format!("{name}.cow"), size), size, RIG_SLOTS + n);
            times.bare_disks.add_time(took.disk);
            times.bare_networks.add_time(took.network);
            bare.let_go();
        }
        tell(count, &times, first.as_ref());
        first.get_or_insert(times);
    }
    drop(bare);
    let many = alive.len();
    let mut ends = Samples::default();
    ends.time(|| {
        drop((alive, first_disk));
        for n in 0..many {
            let link = format!("/sys/class/net/roost-v{}", FIRST_SLOT as usize + n);
            let began = Instant::now();
            while Path::new(&link).exists() {
                assert!(began.elapsed() < Duration::from_secs(600), "{link} is still there");
                thread::sleep(Duration::from_millis(10));
            }
        }
    });
    let each = Samples(vec![ends.median() / many as f64]);
    seen(&format!("scale.end.{many}"), "ms each", &each);
}

fn tell(count: usize, times: &Times, first: Option<&Times>) {
    type Of = fn(&Times) -> &Samples;
    let of: [(&str, Of, Goal); 3] = [
        ("disk", |times| &times.disks, Goal::AtMostTimes(1.2)),
        ("network", |times| &times.networks, Goal::AtMostTimes(1.2)),
        ("close", |times| &times.closes, Goal::Seen),
    ];
    for (what, of, goal) in of {
        let baseline = first.map(|first| ("with one alive", of(first)));
        Figure {
            name: &format!("scale.{what}.{count}"),
            unit: "ms",
            subject: of(times),
            goal: baseline.map_or(Goal::Seen, |_| goal),
            baseline,
            unmet: "where the ratio to the bare system calls is what it is with one alive, the kernel's own work has grown. Next: fewer system \
                    calls, or networks made ahead of the sandboxes that take them",
        }
        .tell();
    }
    for (what, subject, bare) in [
        ("disk", &times.disks, &times.bare_disks),
        ("network", &times.networks, &times.bare_networks),
    ] {
        Figure {
            name: &format!("scale.{what}.bare.{count}"),
            unit: "ms",
            subject,
            baseline: Some(("the bare system calls with as many alive, in C", bare)),
            goal: Goal::AtMostTimes(2.0),
            unmet: "something of privd's walks through all that there is. Next: strace -c of privd with one and with as many",
        }
        .tell();
    }
}

/// What the agent does with many records, of sandboxes that are paused: recover them, list them, and see to one of them.
fn records(bench: &Bench) {
    let sizes: &[u32] = if bench.smoke { &[1, 10] } else { &[1, 1000, 10_000] };
    let mut agent = Http::agent();
    let sandbox = Sandbox::create(&mut agent, SMALL);
    agent.ask("PauseSandbox", &json!({ "sandboxId": sandbox.id }));
    drop(agent);
    let mut first: Option<Records> = None;
    for &count in sizes {
        run("systemctl stop roost-agent.service");
        // Those that the last round has destroyed are made again.
        for n in 0..count {
            copy(&sandbox.id, n);
        }
        run("systemctl start roost-agent.service");
        wait_for_agent();
        let records = Records::with(bench, count);
        if let Some(first) = &first {
            records.tell(count, first);
        }
        first.get_or_insert(records);
    }
    run("systemctl stop roost-agent.service");
    for n in 0..*sizes.last().expect("some") {
        // Some have been destroyed.
        drop(fs::remove_dir_all(Path::new(SANDBOXES).join(name_of(n))));
    }
    run("systemctl start roost-agent.service");
    wait_for_agent();
}

/// An agent with so many records.
struct Records {
    /// Processor time from its start until it serves, in seconds.
    start: Samples,
    /// A list of all of them.
    list: Samples,
    /// A question that is about one.
    one: Samples,
    /// A paused sandbox's end.
    destroy: Samples,
    /// Processor time of a second in which nobody asks for anything, in milliseconds.
    idle: Samples,
}

impl Records {
    fn with(bench: &Bench, count: u32) -> Self {
        let pid = *pids("roost-agent").first().expect("it runs");
        let start = Samples(vec![cpu_seconds(pid)]);
        let before = cpu_seconds(pid);
        let idle = bench.time(IDLE);
        thread::sleep(idle);
        let idle = Samples(vec![(cpu_seconds(pid) - before) * 1000.0 / idle.as_secs_f64()]);
        let [mut list, mut one, mut destroy] = <[Samples; 3]>::default();
        let mut agent = Http::agent();
        for n in 0..bench.samples(20) {
            let listed = list.time(|| agent.ask("ListSandboxes", &json!({})));
            let listed = listed["pausedSandboxes"].as_array().map_or(0, Vec::len);
            assert!(
                listed >= (count.saturating_sub(n)) as usize,
                "of {count} records {listed} are listed"
            );
            let id = name_of(n);
            if n < count {
                one.time(|| agent.ask("GetSandboxMetrics", &json!({ "sandboxId": id, "range": "10m" })));
                destroy.time(|| agent.ask("DestroySandbox", &json!({ "sandboxId": id })));
            }
        }
        Self {
            start,
            list,
            one,
            destroy,
            idle,
        }
    }

    fn tell(&self, count: u32, first: &Self) {
        let added = Samples(vec![(self.start.median() - first.start.median()).max(0.0)]);
        Figure {
            name: &format!("scale.recovery.{count}"),
            unit: "s of CPU",
            subject: &added,
            baseline: Some(("a start with two records", &first.start)),
            goal: Goal::AtMost(f64::from(count) / 1000.0),
            unmet: "emulated seconds are some twenty of a real processor's, where 1,000 records take a tenth of a second. Next: a profile there",
        }
        .tell();
        let each = |list: &Samples| Samples(list.0.iter().map(|time| time / f64::from(count)).collect());
        seen(&format!("scale.list.{count}"), "ms for each", &each(&self.list));
        for (what, subject, first) in [
            ("one", &self.one, &first.one),
            ("destroy", &self.destroy, &first.destroy),
        ] {
            Figure {
                name: &format!("scale.{what}.{count}"),
                unit: "ms",
                subject,
                baseline: Some(("with two records", first)),
                goal: Goal::AtMostTimes(1.2),
                unmet: "something of the agent's walks through all sandboxes",
            }
            .tell();
        }
        Figure {
            name: &format!("scale.idle.{count}"),
            unit: "ms of CPU a second",
            subject: &self.idle,
            baseline: Some(("with two records", &first.idle)),
            goal: Goal::Seen,
            unmet: "",
        }
        .tell();
    }
}

fn name_of(n: u32) -> String {
    format!("bench-copy-{n}")
}

/// Makes the n-th copy of a paused sandbox: its files by a second name, and a record of its own.
fn copy(id: &str, n: u32) {
    let (from, name) = (Path::new(SANDBOXES).join(id), name_of(n));
    let to = Path::new(SANDBOXES).join(&name);
    if to.exists() {
        return;
    }
    let mut directories = vec![PathBuf::new()];
    while let Some(directory) = directories.pop() {
        let (from, to) = (from.join(&directory), to.join(&directory));
        let made = fs::create_dir(&to).and_then(|()| own_as(&from, &to));
        made.unwrap_or_else(|error| panic!("{}: {error}", to.display()));
        for entry in fs::read_dir(&from).expect("a sandbox's files") {
            let entry = entry.expect("listed");
            if entry.file_type().expect("known").is_dir() {
                directories.push(directory.join(entry.file_name()));
            } else if entry.file_name() != "sandbox.json" {
                fs::hard_link(entry.path(), to.join(entry.file_name())).expect("linked");
            }
        }
    }
    let record = from.join("sandbox.json");
    let mut content: Value = serde_json::from_slice(&fs::read(&record).expect("a record")).expect("JSON");
    content["plan"]["id"] = json!(name);
    content["slot"] = json!(10_000 + n);
    let copy = to.join("sandbox.json");
    fs::write(&copy, content.to_string()).expect("written");
    own_as(&record, &copy).expect("the agent's");
}

/// Gives a file owner and mode of another.
fn own_as(like: &Path, path: &Path) -> std::io::Result<()> {
    let like = fs::metadata(like)?;
    chown(path, Some(like.uid()), Some(like.gid()))?;
    fs::set_permissions(path, like.permissions())
}

fn seen(name: &str, unit: &'static str, subject: &Samples) {
    Figure {
        name,
        unit,
        subject,
        baseline: None,
        goal: Goal::Seen,
        unmet: "",
    }
    .tell();
}

/// Seconds of processor time that a process has had.
pub(crate) fn cpu_seconds(pid: i32) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let fields: Vec<&str> = text.rsplit(')').next().expect("a name").split_whitespace().collect();
    // Fields 14 and 15 of the whole, in hundredths of a second.
    let ticks = |field: &str| field.parse::<f64>().expect("a number");
    (ticks(fields[11]) + ticks(fields[12])) / 100.0
}
