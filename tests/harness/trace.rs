//! What programs ask of the kernel, counted by the kernel: its trace events, with the process that caused each. Nothing is slowed down
//! or attached to, and nothing is lost unseen: a buffer that ran over is an error.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

const TRACING: &str = "/sys/kernel/tracing";

/// Room for each processor's events, in KiB.
const BUFFER_KIB: u32 = 8192;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The process, whichever of its threads it was.
    pub process: i32,
    /// Which.
    pub thread: i32,
    /// When, since some moment of the kernel's.
    pub at: Duration,
    /// What happened, such as `sys_fsync(fd: 9)` or `sched_process_exec: filename=/bin/true pid=7 old_pid=7`.
    pub what: String,
}

/// Events that are being counted, until this is dropped.
#[derive(Debug)]
pub struct Trace {
    instance: PathBuf,
}

impl Trace {
    /// Counts events from now on, each named as its directory below `events` is, such as `sched/sched_process_exec`.
    ///
    /// # Panics
    /// When the kernel has no such event.
    pub fn of(events: &[&str]) -> Self {
        Self::start(events, &[])
    }

    /// As [`of`](Trace::of), of these processes alone: their threads, those that they start meanwhile, and the processes.
    ///
    /// # Panics
    /// When the kernel has no such event.
    pub fn of_processes(events: &[&str], processes: &[i32]) -> Self {
        let threads = processes.iter().flat_map(|process| {
            let threads = fs::read_dir(format!("/proc/{process}/task"))
                .expect("it runs")
                .flatten();
            threads.map(|thread| thread.file_name().to_string_lossy().into_owned())
        });
        Self::start(events, &threads.collect::<Vec<_>>())
    }

    fn start(events: &[&str], threads: &[String]) -> Self {
        if !Path::new(TRACING).join("instances").exists() {
            let mounted = Command::new("mount").args(["-t", "tracefs", "none", TRACING]).status();
            assert!(mounted.expect("mount runs").success(), "no tracefs");
        }
        let instance = Path::new(TRACING).join(format!("instances/roost-{}", std::process::id()));
        fs::create_dir(&instance).unwrap_or_else(|error| panic!("{}: {error}", instance.display()));
        let trace = Self { instance };
        trace.set("buffer_size_kb", &BUFFER_KIB.to_string());
        trace.set("options/record-tgid", "1");
        if !threads.is_empty() {
            trace.set("options/event-fork", "1");
            trace.set("set_event_pid", &threads.join(" "));
        }
        for event in events {
            trace.set(&format!("events/{event}/enable"), "1");
        }
        trace
    }

    /// The events until now, oldest first.
    ///
    /// # Panics
    /// When some were lost.
    pub fn events(&self) -> Vec<Event> {
        self.set("tracing_on", "0");
        let text = fs::read_to_string(self.instance.join("trace")).expect("a trace");
        assert!(!text.contains("LOST"), "events were lost");
        let found: Vec<_> = text.lines().filter_map(parse).collect();
        // A kernel that writes lines in another way would count nothing, and every ceiling would hold.
        let written = text
            .lines()
            .filter(|line| !line.starts_with('#') && !line.trim().is_empty());
        assert_eq!(found.len(), written.count(), "lines that are no events:\n{text}");
        found
    }

    fn set(&self, name: &str, value: &str) {
        let path = self.instance.join(name);
        fs::write(&path, value).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        drop(fs::remove_dir(&self.instance));
    }
}

/// `  tokio-rt-worker-712     (    700) [000] .....    58.123456: sys_fsync(fd: 9)`
fn parse(line: &str) -> Option<Event> {
    if line.starts_with('#') {
        return None;
    }
    // A thread's name may hold anything, so from the processor's number on.
    let (task, rest) = line.split_once(") [")?;
    let (thread, process) = task.rsplit_once('(')?;
    let (_, thread) = thread.rsplit_once('-')?;
    let (at, what) = rest.split_once(": ")?;
    let at = at.split_whitespace().next_back()?.parse().ok()?;
    Some(Event {
        // The kernel writes dashes for a thread that it knows no process of any more.
        process: process.trim().parse().unwrap_or(-1),
        thread: thread.trim().parse().ok()?,
        at: Duration::try_from_secs_f64(at).ok()?,
        what: what.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_kernel_is_an_event_of_its_process() {
        let event = |line| parse(line).map(|event| (event.process, event.thread, event.at.as_millis(), event.what));
        assert_eq!(
            event("   tokio-rt (x)-712     (    700) [000] .....    58.123456: sys_fsync(fd: 9)"),
            Some((700, 712, 58_123, "sys_fsync(fd: 9)".to_owned()))
        );
        assert_eq!(
            event("  sh-8   (-------) [001] d..1.  8.1: sched_process_exec: filename=/bin/true pid=8 old_pid=8"),
            Some((
                -1,
                8,
                8_100,
                "sched_process_exec: filename=/bin/true pid=8 old_pid=8".to_owned()
            ))
        );
        assert_eq!(event("# tracer: nop"), None);
        assert_eq!(event("nonsense"), None);
    }
}
