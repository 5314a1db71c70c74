//! What is done at a step, and how it is undone.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};
use nix::unistd::Pid;
use roost_common::names;
use roost_tests::disk::Filler;
use roost_tests::eventually;
use roost_tests::roost::{disk_of, kill_9_pid, pids, vmm_command};

/// Something that happens while the agent is at a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// The step fails with EIO. Disks that really fail are in `full_disk.rs`.
    Eio,
    KillAgent,
    KillPrivd,
    KillShim,
    KillVmm,
    /// The shim stands still.
    StopShim,
    /// The VMM stands still, and its guest with it.
    StopVmm,
    /// privd stands still.
    StopPrivd,
    /// The caller goes away.
    KillCaller,
    /// What privd, shim, VMM or guest do next is done, and its answer never comes: a broken connection of privd or guest, an answer
    /// of shim or VMM that is not there in time.
    LostReply,
    /// The filesystem of `/var/lib/roost` has not a byte left.
    Enospc,
    /// The agent cannot open anything more.
    Emfile,
    /// The sandbox's disk is held open by somebody else, or its name is taken.
    Ebusy,
    /// The host's clock is an hour ahead.
    ClockAhead,
    /// The host's clock is an hour behind.
    ClockBehind,
}

impl Fault {
    pub(super) const ALL: [Self; 15] = [
        Self::Eio,
        Self::KillAgent,
        Self::KillPrivd,
        Self::KillShim,
        Self::KillVmm,
        Self::StopShim,
        Self::StopVmm,
        Self::StopPrivd,
        Self::KillCaller,
        Self::LostReply,
        Self::Enospc,
        Self::Emfile,
        Self::Ebusy,
        Self::ClockAhead,
        Self::ClockBehind,
    ];

    /// What the agent's failpoint is told.
    pub(super) fn wish(self) -> String {
        match self {
            Self::Eio => format!("error {}", libc::EIO),
            Self::LostReply => "lose".to_owned(),
            _ => "wait".to_owned(),
        }
    }

    /// Whether the step fails by it, so that there is no such case where no step can fail.
    pub(super) fn fails_the_step(self) -> bool {
        self == Self::Eio
    }

    /// Whether the VM does not survive it.
    pub(super) fn ends_the_vm(self) -> bool {
        matches!(self, Self::KillShim | Self::KillVmm)
    }

    /// Whether the one who called hears nothing of how the operation ended, or not the last of it.
    pub(super) fn cuts_the_answer_off(self) -> bool {
        matches!(self, Self::KillAgent | Self::KillCaller)
    }

    /// Whether the operation has nothing to do with it, and succeeds.
    pub(super) fn is_no_matter(self) -> bool {
        matches!(self, Self::ClockAhead | Self::ClockBehind)
    }

    /// Whether it takes half a minute.
    pub(super) fn is_slow(self) -> bool {
        matches!(self, Self::StopShim | Self::StopVmm | Self::StopPrivd)
    }

    /// How long it lasts, where the operation does not end before. What an agent waits for with patience, such as a guest that does not
    /// run on, must come to be before its patience ends.
    fn lasts(self) -> Duration {
        Duration::from_secs(match self {
            Self::StopShim | Self::StopVmm | Self::StopPrivd => 30,
            // Of shells and clients that call the agent meanwhile none would get through.
            Self::Emfile => 5,
            Self::ClockAhead | Self::ClockBehind => 120,
            _ => 20,
        })
    }

    /// Strikes, while the agent waits at a step of an operation on the sandbox.
    pub(super) fn strike(self, id: &str, caller: &mut Child) -> Harm {
        let undo: Box<dyn FnOnce()> = match self {
            // The agent has done these itself, or does so with the next answer.
            Self::Eio | Self::LostReply => Box::new(|| ()),
            Self::KillAgent | Self::KillPrivd | Self::KillShim | Self::KillVmm => {
                // None of some where none has been started yet.
                let killed = pids(match self {
                    Self::KillAgent => "roost-agent",
                    Self::KillPrivd => "roost-privd",
                    Self::KillShim => "roost-vmmshim",
                    _ => vmm_command(),
                });
                killed.iter().copied().for_each(kill_9_pid);
                // It must have happened before the agent goes on.
                eventually("what was killed to be gone", || {
                    killed.iter().all(|pid| has_ended(*pid)).then_some(())
                });
                Box::new(|| ())
            }
            Self::KillCaller => {
                caller.kill().expect("killed");
                Box::new(|| ())
            }
            Self::StopShim => stop(&["roost-vmmshim"]),
            Self::StopPrivd => stop(&["roost-privd"]),
            // The stand-in's guest is another process of its.
            Self::StopVmm => stop(&[vmm_command(), "qemu-system-x86"]),
            Self::Enospc => {
                let filler = Filler::fill(Path::new("/var/lib/roost"));
                Box::new(move || drop(filler))
            }
            Self::Emfile => use_up_descriptors(),
            Self::Ebusy => occupy_disk(id),
            Self::ClockAhead => shift_clock(3600),
            Self::ClockBehind => shift_clock(-3600),
        };
        Harm {
            undo: Some(undo),
            until: Instant::now() + self.lasts(),
        }
    }
}

/// Harm that is done, until it is dropped.
pub(super) struct Harm {
    undo: Option<Box<dyn FnOnce()>>,
    until: Instant,
}

impl Harm {
    /// Lets it last for as long as it does, or until the caller has its answer.
    pub(super) fn last(self, caller: &mut Child) {
        while Instant::now() < self.until && caller.try_wait().expect("it can be waited for").is_none() {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Harm {
    fn drop(&mut self) {
        if let Some(undo) = self.undo.take() {
            undo();
        }
    }
}

/// Stops all processes of some names until it is called.
fn stop(names: &[&str]) -> Box<dyn FnOnce()> {
    let stopped: Vec<i32> = names.iter().flat_map(|name| pids(name)).collect();
    let signal = |pids: &[i32], signal| {
        for pid in pids {
            // It may have ended.
            kill(Pid::from_raw(*pid), signal).ok();
        }
    };
    signal(&stopped, Signal::SIGSTOP);
    Box::new(move || signal(&stopped, Signal::SIGCONT))
}

/// Lowers the agent's limit to the lowest number that is free, so that it gets none at all.
fn use_up_descriptors() -> Box<dyn FnOnce()> {
    let agent = *pids("roost-agent").first().expect("it runs");
    let limits = std::fs::read_to_string(format!("/proc/{agent}/limits")).expect("it runs");
    let limit = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .and_then(|line| line.split_whitespace().nth(3)?.parse::<u32>().ok())
        .expect("every process has such a limit");
    let used: Vec<u32> = std::fs::read_dir(format!("/proc/{agent}/fd"))
        .expect("root may look")
        .flatten()
        .filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
        .collect();
    let free = (0..)
        .find(|number| !used.contains(number))
        .expect("there are more numbers than descriptors");
    // Nobody raises it again where the agent has ended.
    let set = move |limit: u32| {
        Command::new("prlimit")
            .args(["--pid", &agent.to_string(), &format!("--nofile={limit}:")])
            .output()
            .expect("prlimit runs")
            .status
            .success()
    };
    assert!(set(free), "no limit could be set");
    Box::new(move || {
        set(limit);
    })
}

/// Holds the sandbox's disk open, or takes its name where there is none yet.
fn occupy_disk(id: &str) -> Box<dyn FnOnce()> {
    let name = names::disk(&id.parse().expect("a sandbox id"));
    if let Some(device) = disk_of(id) {
        let held = File::open(format!("/dev/{device}")).expect("opened");
        return Box::new(move || drop(held));
    }
    let dmsetup = |arguments: &[&str]| {
        let output = Command::new("dmsetup").args(arguments).output().expect("dmsetup runs");
        assert!(
            output.status.success(),
            "dmsetup {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    dmsetup(&["create", &name, "--notable"]);
    Box::new(move || dmsetup(&["remove", "--retry", &name]))
}

/// Sets the host's clock, until it is called.
fn shift_clock(seconds: i64) -> Box<dyn FnOnce()> {
    let shift = |seconds| {
        let time = clock_gettime(ClockId::CLOCK_REALTIME).expect("there is a clock");
        let time = TimeSpec::new(time.tv_sec() + seconds, time.tv_nsec());
        clock_settime(ClockId::CLOCK_REALTIME, time).expect("root may set it");
    };
    shift(seconds);
    Box::new(move || shift(-seconds))
}

/// Whether a process is gone, or there for its parent to count alone.
fn has_ended(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_none_or(|(_, rest)| rest.starts_with(['Z', 'X']))
}
