//! What operations ask of the host, in exact numbers: calls of privd, system calls, syncs, programs started, wake-ups, waits for locks.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use crate::eventually;
use crate::roost::{curl, pids};
use crate::trace::{Event, Trace};

/// Every way to wait for a disk, and programs that start.
const EVENTS: [&str; 4] = [
    "syscalls/sys_enter_fsync",
    "syscalls/sys_enter_fdatasync",
    "syscalls/sys_enter_syncfs",
    "sched/sched_process_exec",
];

/// What one operation asked for.
#[derive(Debug)]
pub struct Counts {
    /// Calls of privd, by verb.
    pub privd: BTreeMap<String, u64>,
    /// The agent's waits for the disk.
    pub syncs: usize,
    /// Programs that were started, by path.
    pub programs: Vec<String>,
}

impl Counts {
    /// Those of one operation.
    ///
    /// # Panics
    /// When the kernel or the agent does not tell.
    pub fn of<T>(operation: impl FnOnce() -> T) -> (T, Self) {
        let agent = *pids("roost-agent").first().expect("it runs");
        let before = privd_calls();
        let trace = Trace::of(&EVENTS);
        let value = operation();
        let events = trace.events();
        let mut privd = privd_calls();
        privd
            .iter_mut()
            .for_each(|(verb, calls)| *calls -= before.get(verb).copied().unwrap_or(0));
        // It looks around on its own time, twice a minute.
        privd.retain(|verb, calls| *calls > 0 && verb != "network_counters" && verb != "inventory");
        let counts = Self {
            privd,
            syncs: events
                .iter()
                .filter(|event| event.process == agent && event.what.contains("sync"))
                .count(),
            programs: events.iter().filter_map(program).collect(),
        };
        (value, counts)
    }
}

/// How many system calls a process makes during an operation.
///
/// # Panics
/// When the kernel does not tell.
pub fn system_calls<T>(process: i32, operation: impl FnOnce() -> T) -> (T, usize) {
    let trace = Trace::of_processes(&["raw_syscalls/sys_enter"], &[process]);
    let value = operation();
    (value, trace.events().len())
}

/// How threads of a process have waited for each other's locks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Contention {
    /// How often.
    pub waits: u32,
    /// For how long, all of them together.
    pub waited: Duration,
}

impl Contention {
    /// That of a process during an operation.
    ///
    /// # Panics
    /// When the kernel does not tell.
    pub fn of<T>(process: i32, operation: impl FnOnce() -> T) -> (T, Self) {
        let trace = Trace::of_processes(&["syscalls/sys_enter_futex", "syscalls/sys_exit_futex"], &[process]);
        let value = operation();
        (value, Self::among(&trace.events()))
    }

    /// A lock that somebody waits for has the value 2, in Rust's library and in C's, and a wait names the value that it has seen. So waits
    /// for anything else, such as work, are told apart, but for a condition variable's second wait.
    fn among(events: &[Event]) -> Self {
        let (mut found, mut waiting) = (Self::default(), BTreeMap::new());
        for event in events {
            if is_wait_for_a_lock(&event.what) {
                waiting.insert(event.thread, event.at);
            } else if let Some(since) = waiting.remove(&event.thread) {
                found.waits += 1;
                found.waited += event.at.saturating_sub(since);
            }
        }
        found
    }
}

/// `sys_futex(uaddr: 7f06b0000b80, op: 89, val: 2, utime: 0, uaddr2: 0, val3: ffffffff)`: `FUTEX_WAIT` or `FUTEX_WAIT_BITSET`, private.
fn is_wait_for_a_lock(what: &str) -> bool {
    let argument = |name: &str| what.split_once(name)?.1.split([',', ')']).next();
    what.starts_with("sys_futex(") && matches!(argument("op: "), Some("80" | "89")) && argument("val: ") == Some("2")
}

/// The path of a program that was started, other than by the test itself.
fn program(event: &Event) -> Option<String> {
    let (_, path) = event.what.split_once("sched_process_exec: filename=")?;
    let path = path.split(' ').next()?;
    // The command that the test gives, and the rig's sign of life.
    let ours = ["roost", "curl", "nproc", "taskset", "true", "sleep"];
    let name = path.rsplit('/').next()?;
    (!ours.contains(&name)).then(|| path.to_owned())
}

/// How often the agent has called privd, by verb.
fn privd_calls() -> BTreeMap<String, u64> {
    let page = curl(&["http://127.0.0.1:50052/metrics"]).text;
    let mut calls = BTreeMap::new();
    for line in page
        .lines()
        .filter_map(|line| line.strip_prefix("roost_privd_call_seconds_count{kind=\""))
    {
        let (verb, rest) = line.split_once('"').expect("a verb");
        let count: u64 = rest
            .rsplit(' ')
            .next()
            .and_then(|count| count.parse().ok())
            .expect("a count");
        *calls.entry(verb.to_owned()).or_default() += count;
    }
    calls
}

/// How often each of a process's threads has gone to sleep.
fn sleeps(pid: i32) -> BTreeMap<String, u64> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("it runs").flatten();
    let of = |thread: fs::DirEntry| {
        let status = fs::read_to_string(thread.path().join("status")).ok()?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        let count = line.and_then(|count| count.trim().parse().ok()).expect("a number");
        Some((thread.file_name().to_string_lossy().into_owned(), count))
    };
    threads.filter_map(of).collect()
}

/// How often privd has gone to sleep in five seconds in which the agent did not call it, which reads counters twice a minute, and in which
/// no thread of an earlier call ended.
///
/// # Panics
/// When there are no such seconds.
pub fn wakes_of_an_uncalled_privd() -> u64 {
    let privd = *pids("roost-privd").first().expect("it runs");
    eventually("five seconds in which the agent does not call", || {
        let (calls, before) = (privd_calls(), sleeps(privd));
        std::thread::sleep(Duration::from_secs(5));
        let after = sleeps(privd);
        let is_quiet = privd_calls() == calls && before.keys().eq(after.keys());
        is_quiet.then(|| after.values().sum::<u64>() - before.values().sum::<u64>())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_for_a_lock_is_told_from_a_wait_for_work() {
        let event = |thread, millis, what: &str| Event {
            process: 1,
            thread,
            at: Duration::from_millis(millis),
            what: what.to_owned(),
        };
        let found = Contention::among(&[
            event(
                1,
                10,
                "sys_futex(uaddr: 7f06b0000b80, op: 89, val: 2, utime: 0, uaddr2: 0, val3: ffffffff)",
            ),
            event(
                2,
                11,
                "sys_futex(uaddr: 7f06b0000b84, op: 89, val: 27, utime: 0, uaddr2: 0, val3: ffffffff)",
            ),
            event(
                3,
                12,
                "sys_futex(uaddr: 7f06b0000b80, op: 81, val: 1, utime: 0, uaddr2: 0, val3: 2)",
            ),
            event(3, 12, "sys_futex -> 0x1"),
            event(1, 15, "sys_futex -> 0x0"),
            event(2, 90, "sys_futex -> 0x0"),
        ]);
        let waited = Duration::from_millis(5);
        assert_eq!(found, Contention { waits: 1, waited });
    }
}
