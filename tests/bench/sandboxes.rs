//! Sandboxes of the agent, and the figures of their lives against bare VMs: `create`, `exec`, `stream`, `pause`, `restore`.

use std::process::Command;
use std::time::{Duration, Instant};

use roost_tests::privd::Rig;
use roost_tests::roost::Template;
use serde_json::json;

use crate::figure::{Figure, Goal, Samples};
use crate::http::Http;
use crate::vm::{BareVm, Guest, Parts, Restore};
use crate::{Bench, RIG_SLOTS, output};

/// The guests' memory, in MiB.
const MEMORY: u32 = 256;
/// What is run where it is of no matter what.
const TRUE: &str = "/bin/true";
/// How many bytes a stream has.
const STREAMED: u32 = 32 << 20;
/// How long the kernel has to take down what a VM had, a network above all, before anything else is measured: nobody resumes what was paused
/// at that moment.
const AFTERMATH: Duration = Duration::from_secs(1);
/// Fills a guest's page cache, as a guest at work has it.
const WORK: &str = "find /usr -xdev -type f -size -200k | head -n 3000 | xargs cat > /dev/null; head -c 24M /dev/urandom > /root/work; sync";

/// A sandbox of the agent's; it is destroyed with this value.
pub(crate) struct Sandbox {
    pub(crate) id: String,
    pub(crate) host: String,
}

impl Sandbox {
    pub(crate) fn create(agent: &mut Http, memory: u32) -> Self {
        Self::of(agent, &json!({ "memoryMb": memory, "vcpus": 1 }))
    }

    fn of(agent: &mut Http, wish: &serde_json::Value) -> Self {
        let made = agent.ask("CreateSandbox", wish);
        let text = |name: &str| made[name].as_str().expect("a text").to_owned();
        Self {
            id: text("sandboxId"),
            host: text("hostIp"),
        }
    }

    pub(crate) fn exec(&self, agent: &mut Http, program: &str, arguments: &[&str]) {
        let request = json!({"sandboxId": self.id, "cmd": program, "args": arguments, "timeoutSec": 400});
        let answer = agent.ask("Exec", &request);
        assert!(answer.get("exitCode").is_none(), "{program}: {answer}");
    }

    fn call(&self, agent: &mut Http, procedure: &str) {
        agent.ask(procedure, &json!({ "sandboxId": self.id }));
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.call(&mut Http::agent(), "DestroySandbox");
        }
    }
}

/// `create`: until the first command has run, against the bare VMM.
pub(crate) fn create(bench: &Bench) {
    let rig = Rig::start();
    let mut agent = Http::agent();
    // The first one of a host has the shim ask the VMM its version.
    drop(Sandbox::create(&mut agent, MEMORY));
    let [mut whole, mut bare, mut made, mut booted] = <[Samples; 4]>::default();
    let mut chart = Chart::default();
    let since = journal_now();
    for n in 0..bench.samples(8) {
        let began = Instant::now();
        let sandbox = made.time(|| Sandbox::create(&mut agent, MEMORY));
        sandbox.exec(&mut agent, TRUE, &[]);
        whole.add_time(began.elapsed());
        chart.add(&sandbox.id);
        drop(sandbox);

        let parts = Parts::make(&rig, &format!("bare-{n}"), RIG_SLOTS + n);
        let began = Instant::now();
        let vm = parts.boot(MEMORY);
        let mut guest = booted.time(|| vm.guest());
        guest.run(TRUE, &[]);
        bare.add_time(began.elapsed());
    }
    Figure {
        name: "create",
        unit: "ms",
        subject: &whole,
        baseline: Some(("a bare boot to the first command", &bare)),
        goal: Goal::AtMostTimes(1.1),
        unmet: "beside the boot a create makes a disk and a cage, writes its record twice and tells the guest who it is: the steps are below",
    }
    .tell();
    seen("create.answered", &made);
    seen("create.bare.health", &booted);
    steps("create", &since, None);
    chart.tell();
}

/// Where the time of a guest's boot goes, in milliseconds of its own clock.
#[derive(Default)]
struct Chart([Samples; 3]);

impl Chart {
    /// Adds the boot of a sandbox that has just come up.
    fn add(&mut self, id: &str) {
        let kernel = output("roost", &["exec", "--timeout", "400", id, "--", "dmesg"]);
        let at = |what: &str| {
            let line = kernel.lines().find(|line| line.contains(what));
            let time = line.and_then(|line| line.trim_start_matches(['[', ' ']).split(']').next());
            let seconds: f64 = time
                .and_then(|time| time.parse().ok())
                .unwrap_or_else(|| panic!("{what:?} in\n{kernel}"));
            seconds * 1000.0
        };
        let console = output("roost", &["logs", id]);
        let up = console
            .split("listening on ")
            .nth(1)
            .and_then(|rest| rest.split(" after ").nth(1));
        let up = up.and_then(|rest| rest.split(' ').next()?.parse::<f64>().ok());
        let up = up.unwrap_or_else(|| panic!("envd says when it listens: {console}")) * 1000.0;
        let (init, mounted) = (at("Run /init as init process"), at("mounted filesystem"));
        for (samples, time) in self.0.iter_mut().zip([init, mounted - init, up - mounted]) {
            samples.add(time);
        }
    }

    fn tell(&self) {
        for (part, samples) in ["kernel", "modules_and_root", "envd"].into_iter().zip(&self.0) {
            seen(&format!("create.boot.{part}"), samples);
        }
    }
}

/// This moment, as journalctl takes it.
fn journal_now() -> String {
    output("date", &["+@%s.%N"])
}

/// The times of an operation's steps from one moment to another, or now, in the order in which they end: lines of the journal like
/// `step="boot" elapsed_us=411200`. Some are beside others, so they are no sum.
fn steps(of: &str, since: &str, until: Option<&str>) {
    let mut arguments = vec!["-u", "roost-agent", "-o", "cat", "--no-pager", "--since", since];
    arguments.extend(until.iter().flat_map(|until| ["--until", until]));
    let journal = output("journalctl", &arguments);
    let mut steps: Vec<(&str, Samples)> = Vec::new();
    for line in journal.lines().filter(|line| line.contains("elapsed_us=")) {
        let value = |key: &str| line.split(key).nth(1).and_then(|rest| rest.split_whitespace().next());
        let step = value(" step=").expect("a name").trim_matches('"');
        let micros: f64 = value("elapsed_us=").and_then(|time| time.parse().ok()).expect("a time");
        let known = steps.iter().position(|(name, _)| *name == step);
        let at = known.unwrap_or_else(|| {
            steps.push((step, Samples::default()));
            steps.len() - 1
        });
        steps[at].1.add(micros / 1000.0);
    }
    if steps.is_empty() {
        return crate::figure::not_measured(&format!("{of}.step"), "the journal has no line of one");
    }
    for (step, times) in steps {
        seen(&format!("{of}.step.{step}"), &times);
    }
}

fn seen(name: &str, subject: &Samples) {
    Figure {
        name,
        unit: "ms",
        subject,
        baseline: None,
        goal: Goal::Seen,
        unmet: "",
    }
    .tell();
}

/// `exec` and `stream`: through the agent, against envd itself.
pub(crate) fn exec(bench: &Bench) {
    let mut agent = Http::agent();
    let sandbox = Sandbox::create(&mut agent, MEMORY);
    let mut envd = Guest::of_sandbox(&sandbox.id, &sandbox.host);
    let [mut through, mut direct, mut rate, mut rate_direct] = <[Samples; 4]>::default();
    // The guest reads the program off its disk once.
    sandbox.exec(&mut agent, TRUE, &[]);
    for _ in 0..bench.samples(50) {
        through.time(|| sandbox.exec(&mut agent, TRUE, &[]));
        direct.time(|| envd.run(TRUE, &[]));
    }
    let length = STREAMED.to_string();
    let arguments = ["-c", &length, "/dev/zero"];
    let rate_of = |began: Instant| f64::from(STREAMED) / f64::from(1 << 20) / began.elapsed().as_secs_f64();
    for _ in 0..bench.samples(5) {
        let request = json!({"sandboxId": sandbox.id, "cmd": "/usr/bin/head", "args": arguments});
        let began = Instant::now();
        let bytes = agent.follow("/hostagent.v1.HostAgentService/ExecStream", &request);
        rate.add(rate_of(began));
        assert!(bytes > STREAMED as usize, "{bytes} bytes came");
        let began = Instant::now();
        let bytes = envd.run("/usr/bin/head", &arguments);
        rate_direct.add(rate_of(began));
        assert!(bytes > STREAMED as usize, "{bytes} bytes came");
    }
    Figure {
        name: "exec",
        unit: "ms",
        subject: &through,
        baseline: Some(("envd itself", &direct)),
        goal: Goal::AtMostTimes(1.3),
        unmet: "TLS, a request parsed and one made, and two more wake-ups. Next: look at the agent's time in a profile",
    }
    .tell();
    Figure {
        name: "stream",
        unit: "MiB/s",
        subject: &rate,
        baseline: Some(("envd itself", &rate_direct)),
        goal: Goal::AtLeastTimes(0.8),
        unmet: "each piece is decoded, encoded again and encrypted. Next: pieces handed on larger than they come",
    }
    .tell();
}

/// `pause` and `restore`: against the VMM's own calls on a guest that has done the same work.
pub(crate) fn pause(bench: &Bench) {
    let rig = Rig::start();
    let mut agent = Http::agent();
    let [
        mut time,
        mut time_bare,
        mut bytes,
        mut bytes_bare,
        mut back,
        mut back_bare,
        mut answered,
        mut loaded,
        mut health,
    ] = <[Samples; 9]>::default();
    let sandbox = Sandbox::create(&mut agent, MEMORY);
    sandbox.exec(&mut agent, "/bin/sh", &["-c", WORK]);
    let parts = Parts::make(&rig, "bare-pause", RIG_SLOTS);
    let mut vm = parts.boot(MEMORY);
    let mut guest = vm.guest();
    guest.run("/bin/sh", &["-c", WORK]);
    let since = journal_now();
    for _ in 0..bench.samples(8) {
        sandbox.exec(&mut agent, "/bin/sh", &["-c", WORK]);
        time.time(|| sandbox.call(&mut agent, "PauseSandbox"));
        bytes.add(allocated(&format!("/var/lib/roost/sandboxes/{}/vm", sandbox.id)));
        std::thread::sleep(AFTERMATH);
        back.time(|| {
            answered.time(|| sandbox.call(&mut agent, "ResumeSandbox"));
            sandbox.exec(&mut agent, TRUE, &[]);
        });

        guest.run("/bin/sh", &["-c", WORK]);
        let dir = parts.snapshot_dir();
        time_bare.time(|| vm.snapshot(&dir));
        output("sync", &["-f", dir.to_str().expect("a path of ours")]);
        bytes_bare.add(allocated(dir.to_str().expect("a path of ours")));
        drop(vm);
        std::thread::sleep(AFTERMATH);
        let began = Instant::now();
        vm = loaded.time(|| parts.restore(&dir, Restore::Copied));
        guest = health.time(|| vm.guest());
        guest.run(TRUE, &[]);
        back_bare.add_time(began.elapsed());
    }
    let pauses = journal_now();
    sandbox.exec(&mut agent, "/bin/sh", &["-c", WORK]);
    guest.run("/bin/sh", &["-c", WORK]);
    let (made, ways) = from_template(&mut agent, &sandbox, &parts, vm, bench.samples(8));
    Figure {
        name: "pause.bytes",
        unit: "MiB",
        subject: &bytes,
        baseline: Some(("vm.pause and vm.snapshot", &bytes_bare)),
        goal: Goal::AtMostTimes(0.5),
        unmet: "what the guest uses is in it, and what it had freed before its caches were dropped. Next: look at what is in a snapshot, page by \
                page",
    }
    .tell();
    Figure {
        name: "pause.time",
        unit: "ms",
        subject: &time,
        baseline: Some(("vm.pause and vm.snapshot", &time_bare)),
        goal: Goal::Seen,
        unmet: "",
    }
    .tell();
    Figure {
        name: "restore",
        unit: "ms",
        subject: &back,
        baseline: Some(("a bare --restore to the first command", &back_bare)),
        goal: Goal::AtMostTimes(1.15),
        unmet: "beside the restore a resume makes disk, network and cage, syncs three times, tells the guest its clock and thaws it, and the \
                command finds the guest's cache empty: the steps are below. Next: one connection for what envd is asked in a row",
    }
    .tell();
    Figure {
        name: "restore.template",
        unit: "ms",
        subject: &made,
        baseline: Some(("a bare --restore to the first command", &ways[0].1)),
        goal: Goal::AtMostTimes(1.15),
        unmet: "as restore, and it makes the sandbox's files: the steps are below. Next: files and record beside the launch",
    }
    .tell();
    seen("restore.answered", &answered);
    seen("restore.bare.loaded", &loaded);
    seen("restore.bare.health", &health);
    for (way, samples) in &ways {
        seen(&format!("restore.bare.{}", way.name()), samples);
    }
    steps("pause_and_resume", &since, Some(&pauses));
    steps("restore.template", &pauses, None);
}

/// Creates from a template with memory, beside what a VMM alone can do with a snapshot, each to the first command. It is always the same
/// snapshot, so what the bare guests write to their disk is none of their memory's, and they are of no use for anything else.
fn from_template(
    agent: &mut Http,
    sandbox: &Sandbox,
    parts: &Parts,
    vm: BareVm,
    count: u32,
) -> (Samples, [(Restore, Samples); 3]) {
    let template = Template::named(9);
    let [_, team, _, name] = template.arguments();
    let (team, name) = (team.to_owned(), name.to_owned());
    agent.ask(
        "CreateSnapshot",
        &json!({"sandboxId": sandbox.id, "name": "bench", "teamId": team, "templateId": name}),
    );
    let dir = parts.snapshot_dir();
    vm.snapshot(&dir);
    drop(vm);
    let mut made = Samples::default();
    let mut ways = [Restore::Copied, Restore::Prefaulted, Restore::OnDemand].map(|way| (way, Samples::default()));
    for _ in 0..count {
        std::thread::sleep(AFTERMATH);
        let began = Instant::now();
        let clone = Sandbox::of(agent, &json!({"teamId": team, "templateId": name}));
        clone.exec(agent, TRUE, &[]);
        made.add_time(began.elapsed());
        drop(clone);
        for (way, samples) in &mut ways {
            std::thread::sleep(AFTERMATH);
            samples.time(|| {
                let vm = parts.restore(&dir, *way);
                vm.guest().run(TRUE, &[]);
            });
        }
    }
    (made, ways)
}

/// What a directory takes on disk, in MiB.
fn allocated(dir: &str) -> f64 {
    let said = Command::new("du")
        .args(["-s", "-B1", dir])
        .output()
        .expect("du runs")
        .stdout;
    let said = String::from_utf8_lossy(&said);
    let bytes = said
        .split_whitespace()
        .next()
        .and_then(|bytes| bytes.parse::<f64>().ok());
    bytes.expect("a number") / f64::from(1 << 20)
}
