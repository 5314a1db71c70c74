//! The agent's own code, all of it behind the API, against fakes of everything that it talks to, for as long as several callers can think
//! of something: no resource without an owner, no paused sandbox lost, no two sandboxes in one slot, every call answered.
//!
//! ```text
//! callers (history) --> Registry, tasks, recovery, drain: the real ones
//!                          |  packets with descriptors     |  HTTP, Unix           |  HTTP, TCP
//!                          v                               v                       v
//!                        privd, shim                      vmm                    guest            (fakes, one task each, in the same runtime)
//!                          '-------------------------------'-----------------------'
//!                                                        world: disks, networks, VMs; plain data
//! ```
//!
//! Time is simulated, so that a call that hangs costs nothing. Each call that comes to a fake may be refused, hang, be done and
//! not answered, or be the end of whoever was to answer it; a VM may end at any time. An agent's life ends by its runtime being dropped
//! in the middle of whatever it does: its descriptors are closed and no more of its code runs that anybody could hear, as after a `kill
//! -9`. The next life recovers from what it finds, and the last one from everything, with nothing going wrong any more.
//!
//! `ROOST_MODEL_HISTORIES` is how many histories are played. With `ROOST_MODEL_SEED` it is that one, so many times, and `RUST_LOG` has what
//! the agent says to it: the choices of a seed are always the same, but the agent has a thread for its files and a runtime with chances of
//! its own, so that what was seen may need a few times to be seen again.
//!
//! Not here: access lists and cgroups, since all VMs have our own uid; what is inside a guest; power cuts in the middle of a write. Those
//! are the rig's.

mod caller;
mod check;
mod dice;
mod guest;
mod history;
mod oracle;
mod privd;
mod shim;
mod vmm;
mod world;

use std::sync::atomic::{AtomicU64, Ordering};

/// Histories of an ordinary run, which takes some seconds on two processors.
const HISTORIES: u64 = 32;

fn from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name} is a number, not {text}")),
    )
}

#[test]
fn no_history_loses_a_resource_a_paused_sandbox_or_a_caller() {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .without_time()
        .init();
    let one = from_environment("ROOST_MODEL_SEED");
    let histories = from_environment("ROOST_MODEL_HISTORIES").unwrap_or(if one.is_some() { 1 } else { HISTORIES });
    let next = AtomicU64::new(1);
    let play = || loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        if number > histories {
            return;
        }
        let seed = one.unwrap_or(number);
        let wrong = history::play(seed);
        if !wrong.is_empty() {
            // The other thread begins no more.
            next.store(histories + 1, Ordering::Relaxed);
            panic!(
                "history {seed} (ROOST_MODEL_SEED={seed} plays it again):\n{}",
                wrong.join("\n")
            );
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(play);
        play();
    });
}
