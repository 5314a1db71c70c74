//! The processes that callers started: which there are, who reads their output, how they are fed, signalled and ended.
//!
//! | module | holds |
//! |---|---|
//! | [`service`] | the Connect service: requests checked, errors given their codes |
//! | [`spawn`], [`child`] | from a request to a running program; what runs between fork and exec |
//! | [`drive`] | pipes, deadline and exit of one process |
//! | [`output`] | what it wrote, and how far each client has read |
//! | [`input`], [`terminal`] | its input; its terminal |
//! | [`descriptor`] | our ends of its pipes and its terminal |
//! | [`reaper`] | the only waitpid of envd |
//!
//! Holds: what is kept of processes that have ended is bounded, in number, memory and time.

pub(crate) mod child;
mod descriptor;
mod drive;
mod input;
mod output;
pub(crate) mod reaper;
pub(crate) mod service;
pub(crate) mod spawn;
pub(crate) mod terminal;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use roost_common::guest::process::process_selector::Selector;
use roost_common::guest::process::{ProcessConfig, ProcessInfo};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use self::descriptor::Descriptor;
use self::drive::{Ends, drive};
use self::input::{Stdin, Way};
use self::output::{Client, Kind, Output};
use self::reaper::Reaper;
use self::spawn::{Plan, SpawnError, SpawnedEnds, spawn};
use self::terminal::Size;
use crate::sys;

/// Processes that callers may have at a time. What these start themselves is the guest's own affair.
const MAX_PROCESSES: usize = 1024;

/// Processes that have ended and can still be asked for their output and end: the newest, for a while. Together they keep
/// so much output; of the older ones only the end is left then, and clients are told what is cut.
const MAX_ENDED: usize = 64;
const MAX_ENDED_OUTPUT: usize = 4 << 20;
const ENDED_FOR: Duration = Duration::from_secs(600);

/// The processes that callers know.
pub(crate) struct Processes {
    reaper: Arc<Reaper>,
    room: Arc<Semaphore>,
    table: Mutex<Table>,
}

/// Processes are numbered in the order in which they started: pids and tags can come again, and then the newest is meant.
#[derive(Default)]
struct Table {
    next: u64,
    live: BTreeMap<u64, Arc<Process>>,
    /// In the order in which they ended.
    ended: VecDeque<Ended>,
}

/// A process that has not ended.
struct Process {
    pid: u32,
    config: ProcessConfig,
    tag: Option<String>,
    stdin: Stdin,
    /// Until the process ends.
    terminal: Mutex<Option<Arc<Descriptor>>>,
    output: Arc<Output>,
}

/// Why a terminal has the size that it had.
enum ResizeError {
    /// The process has pipes, or has just ended.
    NoTerminal,
    Kernel(Errno),
}

/// What is left of one that has. Its last output may still be on its way.
struct Ended {
    number: u64,
    pid: u32,
    tag: Option<String>,
    output: Arc<Output>,
    at: Instant,
}

impl Processes {
    pub(crate) fn new(reaper: Arc<Reaper>) -> Self {
        Self {
            reaper,
            room: Arc::new(Semaphore::new(MAX_PROCESSES)),
            table: Mutex::default(),
        }
    }

    /// Starts a process, and accompanies it on the runtime until it ends, whatever becomes of the caller. Blocks for a
    /// fork and an exec.
    ///
    /// # Errors
    /// Nothing was started, or it has been reaped.
    fn start(
        self: &Arc<Self>,
        plan: &Plan,
        config: ProcessConfig,
        tag: Option<String>,
        deadline: Option<Instant>,
    ) -> Result<Client, SpawnError> {
        let room = Arc::clone(&self.room)
            .try_acquire_owned()
            .map_err(|_| SpawnError::TooMany(MAX_PROCESSES))?;
        let spawned = spawn(&self.reaper, plan)?;
        // Cannot fail: the kernel can wait for them, and we are on a runtime.
        let end = |fd| Arc::new(Descriptor::new(fd).expect("pipes and terminals can be waited for"));
        let (stdin, terminal, outputs) = match spawned.ends {
            SpawnedEnds::Pipes { stdin, stdout, stderr } => (
                Stdin::new(Way::Pipe, stdin.map(end)),
                None,
                vec![(Kind::Stdout, end(stdout)), (Kind::Stderr, end(stderr))],
            ),
            SpawnedEnds::Terminal(terminal) => {
                let terminal = end(terminal);
                (
                    Stdin::new(Way::Terminal, Some(Arc::clone(&terminal))),
                    Some(Arc::clone(&terminal)),
                    vec![(Kind::Terminal, terminal)],
                )
            }
        };
        let output = Arc::new(Output::default());
        let client = output
            .attach(spawned.pid, None)
            .expect("a new output has room for a client");
        let process = Arc::new(Process {
            pid: spawned.pid,
            config,
            tag,
            stdin,
            terminal: Mutex::new(terminal),
            output,
        });
        let ends = Ends {
            outputs,
            exit: spawned.exit,
            deadline,
        };
        let number = self.table().add(Arc::clone(&process));
        let processes = Arc::clone(self);
        Handle::current().spawn(async move {
            let on_exit = || {
                processes.table().end(number, Instant::now());
                process.stdin.close();
                process.terminal().take();
                drop(room);
            };
            drive(&process, &processes.reaper, ends, on_exit).await;
            // The last of the output may have come after the process was counted among those that have ended.
            processes.table().tidy(Instant::now());
        });
        Ok(client)
    }

    /// The process that `selector` names, unless it has ended; of several with one tag, the newest.
    fn find(&self, selector: &Selector) -> Option<Arc<Process>> {
        let table = self.table();
        let found = table.live.values().rev().find(|process| process.is(selector));
        found.cloned()
    }

    /// Pid and output of the process that `selector` names, also where it has ended; of several, the newest.
    fn find_output(&self, selector: &Selector) -> Option<(u32, Arc<Output>)> {
        self.table().find_output(selector, Instant::now())
    }

    fn list(&self) -> Vec<ProcessInfo> {
        let info = |process: &Arc<Process>| ProcessInfo {
            config: process.config.clone().into(),
            pid: process.pid,
            tag: process.tag.clone(),
            ..Default::default()
        };
        self.table().live.values().map(info).collect()
    }

    /// Signals the process and what is in its process group. `false` when it has ended.
    fn signal(&self, process: &Process, signal: Signal) -> bool {
        self.reaper.signal_group(process.pid, signal)
    }

    /// Kills all of them.
    pub(crate) fn kill_all(&self) {
        for process in self.table().live.values() {
            self.signal(process, Signal::SIGKILL);
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().expect("no holder of the process table panics")
    }
}

impl Table {
    fn add(&mut self, process: Arc<Process>) -> u64 {
        let number = self.next;
        self.next += 1;
        self.live.insert(number, process);
        number
    }

    fn end(&mut self, number: u64, now: Instant) {
        if let Some(process) = self.live.remove(&number) {
            self.ended.push_back(Ended {
                number,
                pid: process.pid,
                tag: process.tag.clone(),
                output: Arc::clone(&process.output),
                at: now,
            });
        }
        self.tidy(now);
    }

    fn find_output(&mut self, selector: &Selector, now: Instant) -> Option<(u32, Arc<Output>)> {
        self.tidy(now);
        let live = self.live.iter().rev().find(|(_, process)| process.is(selector));
        let ended = self.ended.iter().filter(|ended| ended.is(selector));
        let ended = ended.max_by_key(|ended| ended.number);
        match (live, ended) {
            (Some((number, process)), ended) if ended.is_none_or(|ended| ended.number < *number) => {
                Some((process.pid, Arc::clone(&process.output)))
            }
            (_, ended) => ended.map(|ended| (ended.pid, Arc::clone(&ended.output))),
        }
    }

    /// Lets go of what exceeds the bounds on ended processes.
    fn tidy(&mut self, now: Instant) {
        while let Some(oldest) = self.ended.front()
            && (self.ended.len() > MAX_ENDED || now.duration_since(oldest.at) >= ENDED_FOR)
        {
            self.ended.pop_front();
        }
        let mut kept = 0;
        for ended in self.ended.iter().rev() {
            kept += ended.output.kept();
            if kept > MAX_ENDED_OUTPUT {
                ended.output.forget();
            }
        }
    }
}

impl Process {
    /// Sets the size of its terminal.
    fn resize(&self, size: Size) -> Result<(), ResizeError> {
        let terminal = self.terminal();
        let terminal = terminal.as_ref().ok_or(ResizeError::NoTerminal)?;
        sys::set_terminal_size(terminal.as_fd(), size.columns, size.rows).map_err(ResizeError::Kernel)
    }

    fn terminal(&self) -> MutexGuard<'_, Option<Arc<Descriptor>>> {
        self.terminal.lock().expect("no holder of a terminal panics")
    }

    fn is(&self, selector: &Selector) -> bool {
        is_meant(selector, self.pid, self.tag.as_ref())
    }
}

impl Ended {
    fn is(&self, selector: &Selector) -> bool {
        is_meant(selector, self.pid, self.tag.as_ref())
    }
}

fn is_meant(selector: &Selector, pid: u32, tag: Option<&String>) -> bool {
    match selector {
        Selector::Pid(wanted) => pid == *wanted,
        Selector::Tag(wanted) => tag == Some(wanted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: u32, tag: &str) -> Arc<Process> {
        Arc::new(Process {
            pid,
            config: ProcessConfig::default(),
            tag: Some(tag.to_owned()),
            stdin: Stdin::new(Way::Pipe, None),
            terminal: Mutex::default(),
            output: Arc::default(),
        })
    }

    fn tag(tag: &str) -> Selector {
        Selector::Tag(tag.to_owned())
    }

    #[tokio::test]
    async fn of_processes_with_one_tag_or_pid_the_newest_is_meant_whether_it_has_ended_or_not() {
        let (mut table, now) = (Table::default(), Instant::now());
        let first = table.add(process(1, "a"));
        let second = table.add(process(2, "a"));
        let pid = |table: &mut Table, selector| table.find_output(&selector, now).map(|(pid, _)| pid);
        table.end(first, now);
        assert_eq!(pid(&mut table, tag("a")), Some(2));
        assert_eq!(pid(&mut table, Selector::Pid(1)), Some(1));
        let third = table.add(process(1, "a"));
        table.end(second, now);
        assert_eq!(pid(&mut table, tag("a")), Some(1));
        table.end(third, now);
        assert_eq!(pid(&mut table, tag("a")), Some(1));
        assert_eq!(pid(&mut table, tag("b")), None);
    }

    #[tokio::test]
    async fn ended_processes_are_kept_within_bounds() {
        let (mut table, now) = (Table::default(), Instant::now());
        for pid in 0..100 {
            let process = process(pid, "t");
            let fill = vec![0; output::RING];
            process.output.append(Kind::Stdout, &fill).await;
            let number = table.add(process);
            table.end(number, now);
        }
        assert_eq!(table.ended.len(), MAX_ENDED);
        assert!(table.find_output(&Selector::Pid(35), now).is_none());
        let kept: usize = table.ended.iter().map(|ended| ended.output.kept()).sum();
        assert_eq!(kept, MAX_ENDED_OUTPUT);
        assert_eq!(table.ended.back().unwrap().output.kept(), output::RING);
        assert!(table.find_output(&Selector::Pid(36), now).is_some());
        assert!(table.find_output(&Selector::Pid(36), now + ENDED_FOR).is_none());
    }
}
