//! Figures of this build's speed, each beside a baseline of the same run: `cargo xtask bench`.
//!
//! Subject and baseline take turns, so that what the machine does meanwhile hits both; ratios are of medians. Under emulation nothing but
//! ratios means anything. A figure is no verdict: no test depends on time.
//! Not here: the ceilings of counts, which are exact and therefore a test's (`tests/rig/counts.rs`).

mod counts;
mod figure;
mod host;
mod http;
mod many;
mod proxied;
mod sandboxes;
mod scale;
mod tools;
mod vm;

use std::process::Command;
use std::time::Duration;

use roost_tests::roost::AgentConfig;

/// Slots of networks that the bench makes itself; the agent's come from the other end.
const RIG_SLOTS: u32 = 20_000;

/// The agent as it is installed, where the rig's is not, and with a line in its log for each step.
const CONFIG: &str = "ready_sandboxes = 2\nlog_filter = \"info,roost_agent::step=debug\"\n";

/// A group's name, and what measures it.
type Group = (&'static str, fn(&Bench));

/// Every group, in the order in which they run.
const GROUPS: &[Group] = &[
    ("host", host::run),
    ("counts", counts::run),
    ("create", sandboxes::create),
    ("exec", sandboxes::exec),
    ("pause", sandboxes::pause),
    ("density", many::density),
    ("proxy", proxied::run),
    ("storm", many::storm),
    ("scale", scale::measure),
];

/// How much is measured.
struct Bench {
    /// As little as shows that all of it works.
    smoke: bool,
    /// A quarter of the samples.
    quick: bool,
}

impl Bench {
    /// How many samples, of a figure that is worth `usual`.
    fn samples(&self, usual: u32) -> u32 {
        match (self.smoke, self.quick) {
            (true, _) => 1,
            (false, true) => usual.div_ceil(4),
            (false, false) => usual,
        }
    }

    /// For how long something is watched that is worth `usual`.
    fn time(&self, usual: Duration) -> Duration {
        if self.smoke { usual / 20 } else { usual }
    }
}

fn main() {
    let mut bench = Bench {
        smoke: false,
        quick: false,
    };
    let mut wanted = Vec::new();
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--smoke" => bench.smoke = true,
            "--quick" => bench.quick = true,
            name if GROUPS.iter().any(|(group, _)| *group == name) => wanted.push(name.to_owned()),
            other => {
                let names: Vec<&str> = GROUPS.iter().map(|(name, _)| *name).collect();
                eprintln!("bench: there is no {other:?}; there are {}", names.join(", "));
                std::process::exit(2);
            }
        }
    }
    let _config = AgentConfig::with(CONFIG);
    let mut failed = false;
    for (name, run) in GROUPS {
        if wanted.is_empty() || wanted.iter().any(|wanted| wanted == name) {
            eprintln!("bench: {name}");
            // What one group cannot measure is no reason not to measure the others.
            if std::panic::catch_unwind(|| run(&bench)).is_err() {
                figure::not_measured(name, "it failed; why is in the program's output");
                let journal = "-u roost-agent -u roost-privd -n 100 -o cat --no-pager";
                let journal: Vec<&str> = journal.split(' ').collect();
                eprintln!("{}", output("journalctl", &journal));
                failed = true;
            }
        }
    }
    std::process::exit(i32::from(failed));
}

/// Standard output of a program that must succeed.
fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect("it runs");
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}
