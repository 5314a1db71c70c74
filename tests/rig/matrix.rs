//! The kill matrix: every step of every operation × everything that can happen there. Each case arms a failpoint of the agent's,
//! starts the operation, does its harm while the agent waits at the step, lets go, and looks at what has become of it.
//!
//! Some of the cases run with all tests, spread over the whole; `cargo xtask faults` runs every one of them. `ROOST_MATRIX=40-60` runs
//! those of these numbers, `ROOST_MATRIX="pause.sealed KillVmm"` the one.

use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use roost_tests::census::Census;
use roost_tests::roost::{self, Sandbox, find, find_paused, kill_9_pid, pids, vmm_command, wait_for_agent};
use roost_tests::{eventually, in_rig};

const ARMED: &str = "/var/lib/roost/failpoint";
const REACHED: &str = "/var/lib/roost/failpoint.reached";
const GO: &str = "/var/lib/roost/failpoint.go";

/// Of an ordinary run: one case in so many. It has no common divisor with the number of faults, so all of them come up.
const SAMPLE: usize = 71;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Create,
    /// A create from a template with memory.
    Clone,
    Pause,
    Resume,
    Snapshot,
    Flatten,
    Destroy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The step fails.
    Error,
    /// It fails as on a full disk.
    Enospc,
    /// It fails as on a broken disk.
    Eio,
    /// It fails as on a device that somebody else holds.
    Ebusy,
    /// The agent may open nothing more for a while.
    Emfile,
    KillAgent,
    KillPrivd,
    KillShim,
    KillVmm,
    /// The shim stands still for a while.
    StopShim,
    /// The caller goes away.
    KillCaller,
    /// The caller never hears the answer, and asks again.
    LostReply,
    /// The host's clock jumps an hour ahead, and back when it is over.
    ClockAhead,
    ClockBehind,
}

const FAULTS: [Fault; 14] = [
    Fault::Error,
    Fault::Enospc,
    Fault::Eio,
    Fault::Ebusy,
    Fault::Emfile,
    Fault::KillAgent,
    Fault::KillPrivd,
    Fault::KillShim,
    Fault::KillVmm,
    Fault::StopShim,
    Fault::KillCaller,
    Fault::LostReply,
    Fault::ClockAhead,
    Fault::ClockBehind,
];

impl Fault {
    /// The number of the error that the step fails with, where that is the fault; 0 is one of no number.
    fn errno(self) -> Option<i32> {
        match self {
            Self::Error => Some(0),
            Self::Enospc => Some(nix::libc::ENOSPC),
            Self::Eio => Some(nix::libc::EIO),
            Self::Ebusy => Some(nix::libc::EBUSY),
            _ => None,
        }
    }
}

/// The steps of each operation, and whether the agent can still turn back there.
const STEPS: &[(Operation, &str, bool)] = &[
    (Operation::Create, "create.files", true),
    (Operation::Create, "create.acquired", true),
    (Operation::Create, "create.launched", true),
    (Operation::Create, "create.up", true),
    (Operation::Create, "create.recorded", false),
    (Operation::Clone, "clone.offered", true),
    (Operation::Clone, "clone.restored", true),
    (Operation::Clone, "clone.woken", true),
    (Operation::Clone, "clone.gated", true),
    (Operation::Clone, "create.recorded", false),
    (Operation::Pause, "pause.prepared", true),
    (Operation::Pause, "pause.frozen", true),
    (Operation::Pause, "pause.stopped", true),
    (Operation::Pause, "pause.synced", true),
    (Operation::Pause, "pause.written", true),
    (Operation::Pause, "pause.sealed", true),
    (Operation::Pause, "pause.recorded", false),
    (Operation::Resume, "resume.ready", true),
    (Operation::Resume, "resume.acquired", true),
    (Operation::Resume, "resume.offered", true),
    (Operation::Resume, "resume.launched", true),
    (Operation::Resume, "resume.restored", true),
    (Operation::Resume, "resume.woken", true),
    (Operation::Resume, "resume.gated", true),
    (Operation::Resume, "resume.recorded", true),
    (Operation::Resume, "resume.thawed", true),
    (Operation::Resume, "resume.running", false),
    (Operation::Snapshot, "snapshot.prepared", true),
    (Operation::Snapshot, "snapshot.frozen", true),
    (Operation::Snapshot, "snapshot.stopped", true),
    (Operation::Snapshot, "snapshot.synced", true),
    (Operation::Snapshot, "snapshot.written", true),
    (Operation::Snapshot, "snapshot.sealed", true),
    (Operation::Snapshot, "snapshot.flattened", true),
    (Operation::Snapshot, "snapshot.thawed", true),
    (Operation::Snapshot, "snapshot.copied", true),
    (Operation::Snapshot, "snapshot.finished", false),
    (Operation::Flatten, "flatten.prepared", true),
    (Operation::Flatten, "flatten.frozen", true),
    (Operation::Flatten, "flatten.stopped", true),
    (Operation::Flatten, "flatten.synced", true),
    (Operation::Flatten, "flatten.flattened", true),
    (Operation::Flatten, "flatten.thawed", true),
    (Operation::Flatten, "flatten.finished", false),
    (Operation::Destroy, "destroy.begun", false),
    (Operation::Destroy, "destroy.killed", false),
    (Operation::Destroy, "destroy.removed", false),
];

/// Steps behind which nothing is undone and nothing fails.
const NO_ERROR: &[&str] = &["resume.recorded", "resume.thawed"];

const TEAM: &str = "11111111-2222-3333-4444-666666666666";
/// What clones are made of.
const CLONED: &[&str] = &["--team", TEAM, "--template", "00000000-0000-0000-0000-000000000001"];
/// What captures make.
const MADE: &[&str] = &["--team", TEAM, "--template", "00000000-0000-0000-0000-000000000002"];

const CANARY: &str =
    "mkdir -p /dev/shm; head -c 3000000 /dev/urandom > /dev/shm/canary; sha256sum < /dev/shm/canary > /root/memory.sum
    head -c 3000000 /dev/urandom > /root/disk; sha256sum < /root/disk > /root/disk.sum; sync";
const CHECK: &str = "sha256sum < /dev/shm/canary | diff - /root/memory.sum && sha256sum < /root/disk | diff - /root/disk.sum \
    && echo 1 > /root/written && sync && ! dmesg | grep -i 'ext4.*error' && echo whole";

/// A case's sandbox: the one of the case before, where that survived; and the template of clones, once one was needed.
struct Subject {
    sandbox: Option<Sandbox>,
    is_template_made: bool,
}

impl Subject {
    fn running(&mut self) -> &Sandbox {
        let alive = self
            .sandbox
            .as_ref()
            .is_some_and(|sandbox| find(&sandbox.id).is_some() || find_paused(&sandbox.id).is_some());
        if !alive {
            if let Some(gone) = self.sandbox.take() {
                gone.forget();
            }
            let made = Sandbox::create(&["--memory", "128"]);
            made.sh(CANARY);
            self.sandbox = Some(made);
        }
        let sandbox = self.sandbox.as_ref().expect("made just now");
        sandbox.resume();
        sandbox
    }

    fn make_template(&mut self) {
        if !self.is_template_made {
            let id = self.running().id.clone();
            roost::ok(&[&["snapshot", &id], CLONED].concat());
            self.is_template_made = true;
        }
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        // A test that fails anyway says why itself.
        if self.is_template_made && !std::thread::panicking() {
            roost::ok(&[&["rmi"], CLONED].concat());
        }
    }
}

/// Which cases run.
fn is_chosen(number: usize, step: &str, fault: Fault) -> bool {
    match std::env::var("ROOST_MATRIX") {
        Ok(chosen) => match chosen.split_once('-') {
            Some((from, to)) => {
                let bound = |text: &str| {
                    text.parse::<usize>()
                        .expect("ROOST_MATRIX is FROM-TO or \"STEP FAULT\"")
                };
                (bound(from)..=bound(to)).contains(&number)
            }
            None => chosen == format!("{step} {fault:?}"),
        },
        Err(_) if std::env::var_os("ROOST_TESTS_ALL").is_some() => true,
        Err(_) => number.is_multiple_of(SAMPLE),
    }
}

#[test]
fn whatever_happens_at_any_step_of_anything_nothing_is_lost_and_nothing_stays() {
    let cases = STEPS.iter().flat_map(|step| FAULTS.map(|fault| (step, fault)));
    let cases: Vec<_> = cases
        .filter(|((_, step, back), fault)| fault.errno().is_none() || (*back && !NO_ERROR.contains(step)))
        .collect();
    let total = cases.len();
    let mut rows = 0;
    in_rig(|| {
        let mut subject = Subject {
            sandbox: None,
            is_template_made: false,
        };
        for (number, ((operation, step, back), fault)) in cases.into_iter().enumerate() {
            if !is_chosen(number, step, fault) {
                continue;
            }
            let became = case(*operation, step, *back, fault, &mut subject);
            let row = format!("  {number} | {operation:?} | {step} | {fault:?} | {became}\n");
            // Past libtest, which would keep it to itself until the end.
            std::io::stderr().write_all(row.as_bytes()).expect("written");
            rows += 1;
        }
    });
    let count = format!("NOTE: {rows} of {total} cases\n");
    std::io::stderr().write_all(count.as_bytes()).expect("written");
    assert!(rows > 0, "no case ran");
}

/// Runs one case; what became of the sandbox.
fn case(operation: Operation, step: &str, back: bool, fault: Fault, subject: &mut Subject) -> &'static str {
    let named = format!("{operation:?}, {step}, {fault:?}");
    let id = match operation {
        Operation::Create => "matrix".to_owned(),
        Operation::Clone => {
            subject.make_template();
            "matrix".to_owned()
        }
        Operation::Pause | Operation::Destroy | Operation::Snapshot | Operation::Flatten => {
            subject.running().id.clone()
        }
        Operation::Resume => {
            let sandbox = subject.running();
            sandbox.pause();
            sandbox.id.clone()
        }
    };
    let call = match operation {
        Operation::Create => vec!["create", "--memory", "128", "--id", &id],
        Operation::Clone => [&["create", "--id", &id], CLONED].concat(),
        Operation::Pause => vec!["pause", &id],
        Operation::Resume => vec!["resume", &id],
        Operation::Snapshot => [&["snapshot", &id], MADE].concat(),
        Operation::Flatten => [&["flatten", &id], MADE].concat(),
        Operation::Destroy => vec!["rm", &id],
    };
    arm(step, fault);
    let mut caller = roost::start(&call);
    eventually(&format!("the step of {named}"), || {
        Path::new(REACHED).exists().then_some(())
    });
    let harm = Harm::do_to(fault, &mut caller);
    std::fs::write(GO, "").expect("let go");
    if fault.errno().is_none() && fault != Fault::KillAgent {
        // Taken away too early, the word to go on would not be seen.
        eventually("the agent to go on", || (!Path::new(REACHED).exists()).then_some(()));
    }
    let is_heard = fault != Fault::LostReply;
    if !is_heard {
        settled(&id);
        caller.kill().expect("killed");
    }
    let output = caller.wait_with_output().expect("it ends");
    drop(harm);
    disarm();
    wait_for_agent();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let became = settled(&id);
    let vm_died = matches!(fault, Fault::KillShim | Fault::KillVmm);
    let acceptable: &[&str] = match operation {
        // What nobody was told of is gone, or it runs.
        Operation::Create | Operation::Clone => &["gone", "running"],
        Operation::Pause => match (back, vm_died) {
            (true, true) => &["gone"],
            (true, false) => &["running", "paused"],
            (false, _) => &["paused"],
        },
        Operation::Resume => match (back, vm_died) {
            (true, _) => &["paused", "running"],
            (false, true) => &["gone"],
            (false, false) => &["running"],
        },
        Operation::Snapshot | Operation::Flatten => match vm_died {
            true => &["gone"],
            false => &["running"],
        },
        // A destroy that was cut off is gone on with by whoever repeats it.
        Operation::Destroy => &["gone", "running"],
    };
    assert!(acceptable.contains(&became), "{named}: {became}; {said}");
    if is_heard && output.status.success() {
        let promised = match operation {
            Operation::Create | Operation::Clone | Operation::Resume => "running",
            Operation::Snapshot | Operation::Flatten => "running",
            Operation::Pause => "paused",
            Operation::Destroy => "gone",
        };
        let fell = became == "gone" && vm_died;
        assert!(
            became == promised || fell,
            "{named}: answered with success, and it is {became}"
        );
    }
    if !is_heard
        && matches!(
            operation,
            Operation::Pause | Operation::Resume | Operation::Snapshot | Operation::Flatten
        )
    {
        // It went on, and whoever asks again is told so.
        roost::ok(&call);
    }
    match operation {
        Operation::Create | Operation::Clone | Operation::Destroy => {
            if became != "gone" {
                if operation == Operation::Clone {
                    let clone = Sandbox { id: id.clone() };
                    assert_eq!(clone.sh(CHECK), "whole", "{named}");
                    clone.forget();
                }
                roost::ok(&["rm", &id]);
            }
        }
        Operation::Snapshot | Operation::Flatten => {
            template_is_whole_or_not_there(&named, is_heard && output.status.success());
            if became != "gone" {
                assert_eq!(subject.running().sh(CHECK), "whole", "{named}");
            }
        }
        Operation::Pause | Operation::Resume => {
            if became != "gone" {
                assert_eq!(subject.running().sh(CHECK), "whole", "{named}");
            }
        }
    }
    only_what_runs_is_in_the_kernel(&named);
    became
}

/// Looks at what a capture left, and removes it.
fn template_is_whole_or_not_there(named: &str, is_promised: bool) {
    let teams = std::fs::read_dir("/var/lib/roost/images/teams")
        .into_iter()
        .flatten()
        .flatten();
    let dirs = teams.flat_map(|team| std::fs::read_dir(team.path()).into_iter().flatten().flatten());
    let made: Vec<_> = dirs
        .filter(|dir| dir.file_name() == "2")
        .map(|dir| dir.path().join("rootfs.ext4"))
        .collect();
    assert!(
        !is_promised || !made.is_empty(),
        "{named}: answered with success, and there is no template"
    );
    for rootfs in &made {
        let fsck = Command::new("e2fsck")
            .args(["-f", "-n"])
            .arg(rootfs)
            .output()
            .expect("e2fsck runs");
        assert!(
            fsck.status.success(),
            "{named}: {}",
            String::from_utf8_lossy(&fsck.stdout)
        );
    }
    roost::ok(&[&["rmi"], MADE].concat());
    eventually(&format!("nothing of a template to be left after {named}"), || {
        let teams = std::fs::read_dir("/var/lib/roost/images/teams")
            .into_iter()
            .flatten()
            .flatten();
        let dirs = teams.flat_map(|team| std::fs::read_dir(team.path()).into_iter().flatten().flatten());
        let left: Vec<_> = dirs.filter(|dir| dir.file_name() != "1").collect();
        left.is_empty().then_some(())
    });
}

/// Whatever there is in the kernel belongs to a sandbox that runs.
fn only_what_runs_is_in_the_kernel(named: &str) {
    eventually(&format!("nothing to be left behind by {named}"), || {
        let listing: serde_json::Value = serde_json::from_str(&roost::ok(&["ls", "--json"])).expect("JSON");
        let running = listing["sandboxes"].as_array().map_or(0, Vec::len);
        let census = Census::take();
        let shims = census.count_of("process", "roost-vmmshim");
        let disks = census.count_of("dm device", "roost-s-");
        (census.count("veth") == running && shims == running && disks == running).then_some(())
    });
}

fn arm(step: &str, fault: Fault) {
    disarm();
    let wish = match fault.errno() {
        Some(errno) => format!("error {errno}"),
        None => "wait".to_owned(),
    };
    std::fs::write(ARMED, format!("{step} {wish}")).expect("armed");
    // The agent takes it away again.
    std::os::unix::fs::chown(ARMED, uid_of_roost(), None).expect("given");
}

fn disarm() {
    for file in [ARMED, REACHED, GO] {
        // Of most cases only some are there.
        drop(std::fs::remove_file(file));
    }
}

fn uid_of_roost() -> Option<u32> {
    let user = nix::unistd::User::from_name("roost").expect("users can be read");
    Some(user.expect("a user roost").uid.as_raw())
}

/// What was done to the host, until it is dropped.
enum Harm {
    Done,
    /// What the agent may open.
    Limit(Pid, u64),
    /// Seconds that the clock was set ahead.
    Clock(i64),
}

impl Harm {
    fn do_to(fault: Fault, caller: &mut Child) -> Self {
        let all = |name: &str| pids(name).into_iter().for_each(kill_9_pid);
        match fault {
            Fault::Error | Fault::Enospc | Fault::Eio | Fault::Ebusy => {}
            Fault::KillAgent => all("roost-agent"),
            Fault::KillPrivd => all("roost-privd"),
            // None of them where none has been started yet.
            Fault::KillShim => all("roost-vmmshim"),
            Fault::KillVmm => all(vmm_command()),
            Fault::KillCaller => caller.kill().expect("killed"),
            Fault::LostReply => {
                let pid = Pid::from_raw(caller.id().try_into().expect("a pid"));
                kill(pid, Signal::SIGSTOP).expect("stopped");
            }
            Fault::StopShim => {
                let seconds = if std::env::var_os("ROOST_TESTS_ALL").is_some() {
                    30
                } else {
                    3
                };
                let stopped = pids("roost-vmmshim");
                let signal = |signal| {
                    for pid in &stopped {
                        // It may have ended.
                        kill(Pid::from_raw(*pid), signal).ok();
                    }
                };
                signal(Signal::SIGSTOP);
                std::fs::write(GO, "").expect("let go");
                std::thread::sleep(Duration::from_secs(seconds));
                signal(Signal::SIGCONT);
            }
            Fault::Emfile => {
                let agent = Pid::from_raw(pids("roost-agent")[0]);
                let soft = limit(agent);
                let open = std::fs::read_dir(format!("/proc/{agent}/fd")).expect("read").count();
                set_limit(agent, open as u64);
                return Self::Limit(agent, soft);
            }
            Fault::ClockAhead => {
                turn(3600);
                return Self::Clock(3600);
            }
            Fault::ClockBehind => {
                turn(-3600);
                return Self::Clock(-3600);
            }
        }
        Self::Done
    }
}

impl Drop for Harm {
    fn drop(&mut self) {
        match self {
            Self::Done => {}
            Self::Limit(agent, soft) => set_limit(*agent, *soft),
            Self::Clock(ahead) => turn(-*ahead),
        }
    }
}

/// How many descriptors a process may have.
fn limit(pid: Pid) -> u64 {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).expect("read");
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .expect("a limit");
    let soft = line.split_whitespace().nth(3).expect("a number");
    soft.parse().expect("a number")
}

fn set_limit(pid: Pid, soft: u64) {
    let output = Command::new("prlimit")
        .args([format!("--pid={pid}"), format!("--nofile={soft}:")])
        .output()
        .expect("prlimit runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Sets the clock ahead.
fn turn(seconds: i64) {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("after 1970");
    let then = i64::try_from(now.as_secs()).expect("a time") + seconds;
    let output = Command::new("date")
        .arg("-s")
        .arg(format!("@{then}"))
        .output()
        .expect("date runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// What a sandbox has come to once nothing is under way.
fn settled(id: &str) -> &'static str {
    eventually("it to come to rest", || {
        if find_paused(id).is_some() {
            return Some("paused");
        }
        match find(id)
            .map(|listed| listed["status"].as_str().unwrap_or_default().to_owned())
            .as_deref()
        {
            None => Some("gone"),
            Some("running") => Some("running"),
            // A teardown that failed is tried again in half a minute.
            Some(_) => None,
        }
    })
}
