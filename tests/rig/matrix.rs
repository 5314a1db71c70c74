//! The kill matrix: every step of every operation × everything that can happen there. Each case arms a failpoint of the agent's,
//! starts the operation, does its harm while the agent waits at the step, lets go, and looks at what has become of it.
//!
//! Some of the cases run with all tests, spread over the whole; `cargo xtask faults` runs every one of them.

use std::io::Write as _;
use std::path::Path;
use std::process::Child;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use roost_tests::roost::{self, Sandbox, find, find_paused, kill_9_pid, pids, vmm_command, wait_for_agent};
use roost_tests::{eventually, in_rig};

const ARMED: &str = "/var/lib/roost/failpoint";
const REACHED: &str = "/var/lib/roost/failpoint.reached";
const GO: &str = "/var/lib/roost/failpoint.go";

/// Of an ordinary run: one case in so many.
const SAMPLE: usize = 23;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Create,
    Pause,
    Resume,
    Destroy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The step fails.
    Error,
    KillAgent,
    KillPrivd,
    KillShim,
    KillVmm,
    /// The shim stands still for a while.
    StopShim,
    /// The caller goes away.
    KillCaller,
}

const FAULTS: [Fault; 7] = [
    Fault::Error,
    Fault::KillAgent,
    Fault::KillPrivd,
    Fault::KillShim,
    Fault::KillVmm,
    Fault::StopShim,
    Fault::KillCaller,
];

/// The steps of each operation, and whether the agent can still turn back there.
const STEPS: &[(Operation, &str, bool)] = &[
    (Operation::Create, "create.files", true),
    (Operation::Create, "create.acquired", true),
    (Operation::Create, "create.launched", true),
    (Operation::Create, "create.up", true),
    (Operation::Create, "create.recorded", false),
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
    (Operation::Resume, "resume.recorded", false),
    (Operation::Resume, "resume.thawed", false),
    (Operation::Destroy, "destroy.begun", false),
    (Operation::Destroy, "destroy.killed", false),
    (Operation::Destroy, "destroy.removed", false),
];

const CANARY: &str =
    "mkdir -p /dev/shm; head -c 3000000 /dev/urandom > /dev/shm/canary; sha256sum < /dev/shm/canary > /root/memory.sum
    head -c 3000000 /dev/urandom > /root/disk; sha256sum < /root/disk > /root/disk.sum; sync";
const CHECK: &str = "sha256sum < /dev/shm/canary | diff - /root/memory.sum && sha256sum < /root/disk | diff - /root/disk.sum \
    && echo 1 > /root/written && sync && ! dmesg | grep -i 'ext4.*error' && echo whole";

/// A case's sandbox: the one of the case before, where that survived.
struct Subject(Option<Sandbox>);

impl Subject {
    fn running(&mut self) -> &Sandbox {
        let alive = self
            .0
            .as_ref()
            .is_some_and(|sandbox| find(&sandbox.id).is_some() || find_paused(&sandbox.id).is_some());
        if !alive {
            if let Some(gone) = self.0.take() {
                gone.forget();
            }
            let made = Sandbox::create(&["--memory", "128"]);
            made.sh(CANARY);
            self.0 = Some(made);
        }
        let sandbox = self.0.as_ref().expect("made just now");
        sandbox.resume();
        sandbox
    }
}

#[test]
fn whatever_happens_at_any_step_of_anything_nothing_is_lost_and_nothing_stays() {
    let all = std::env::var_os("ROOST_TESTS_ALL").is_some();
    let cases = STEPS.iter().flat_map(|step| FAULTS.map(|fault| (step, fault)));
    let cases: Vec<_> = cases
        .filter(|((_, _, back), fault)| *back || *fault != Fault::Error)
        .collect();
    let total = cases.len();
    let mut rows = 0;
    in_rig(|| {
        let mut subject = Subject(None);
        for (number, ((operation, step, back), fault)) in cases.into_iter().enumerate() {
            if !all && number % SAMPLE != 0 {
                continue;
            }
            let became = case(*operation, step, *back, fault, &mut subject);
            let row = format!("  {operation:?} | {step} | {fault:?} | {became}\n");
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
        Operation::Pause | Operation::Destroy => subject.running().id.clone(),
        Operation::Resume => {
            let sandbox = subject.running();
            sandbox.pause();
            sandbox.id.clone()
        }
    };
    arm(step, fault);
    let call: &[&str] = match operation {
        Operation::Create => &["create", "--memory", "128", "--id"],
        Operation::Pause => &["pause"],
        Operation::Resume => &["resume"],
        Operation::Destroy => &["rm"],
    };
    let mut caller = roost::start(&[call, &[&id]].concat());
    eventually(&format!("the step of {named}"), || {
        Path::new(REACHED).exists().then_some(())
    });
    harm(fault, &mut caller);
    std::fs::write(GO, "").expect("let go");
    if !matches!(fault, Fault::Error | Fault::KillAgent) {
        // Taken away too early, the word to go on would not be seen.
        eventually("the agent to go on", || (!Path::new(REACHED).exists()).then_some(()));
    }
    let output = caller.wait_with_output().expect("it ends");
    disarm();
    wait_for_agent();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let became = settled(&id);
    let vm_died = matches!(fault, Fault::KillShim | Fault::KillVmm);
    let acceptable: &[&str] = match operation {
        // What nobody was told of is gone, or it runs.
        Operation::Create => &["gone", "running"],
        Operation::Pause => match (back, vm_died) {
            (true, true) => &["gone"],
            (true, false) => &["running", "paused"],
            (false, _) => &["paused"],
        },
        Operation::Resume => match (back, vm_died) {
            (true, true) => &["paused", "running"],
            (true, false) => &["paused", "running"],
            (false, true) => &["gone"],
            (false, false) => &["running"],
        },
        // A destroy that was cut off is gone on with by whoever repeats it.
        Operation::Destroy => &["gone", "running", "stopping"],
    };
    assert!(acceptable.contains(&became), "{named}: {became}; {said}");
    if output.status.success() {
        let promised = match operation {
            Operation::Create => "running",
            Operation::Pause => "paused",
            Operation::Resume => "running",
            Operation::Destroy => "gone",
        };
        let fell = became == "gone" && vm_died;
        assert!(
            became == promised || fell,
            "{named}: answered with success, and it is {became}"
        );
    }
    match operation {
        Operation::Create | Operation::Destroy if became != "gone" => drop(roost::ok(&["rm", &id])),
        Operation::Create | Operation::Destroy => {}
        Operation::Pause | Operation::Resume if became != "gone" => {
            let sandbox = subject.running();
            assert_eq!(sandbox.sh(CHECK), "whole", "{named}");
        }
        Operation::Pause | Operation::Resume => {}
    }
    became
}

fn arm(step: &str, fault: Fault) {
    disarm();
    let wish = if fault == Fault::Error { "error" } else { "wait" };
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

fn harm(fault: Fault, caller: &mut Child) {
    let all = |name: &str| pids(name).into_iter().for_each(kill_9_pid);
    match fault {
        Fault::Error => {}
        Fault::KillAgent => all("roost-agent"),
        Fault::KillPrivd => all("roost-privd"),
        // None of them where none has been started yet.
        Fault::KillShim => all("roost-vmmshim"),
        Fault::KillVmm => all(vmm_command()),
        Fault::KillCaller => caller.kill().expect("killed"),
        Fault::StopShim => {
            let stopped = pids("roost-vmmshim");
            let signal = |signal| {
                for pid in &stopped {
                    // It may have ended.
                    kill(Pid::from_raw(*pid), signal).ok();
                }
            };
            signal(Signal::SIGSTOP);
            std::fs::write(GO, "").expect("let go");
            std::thread::sleep(Duration::from_secs(3));
            signal(Signal::SIGCONT);
        }
    }
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
