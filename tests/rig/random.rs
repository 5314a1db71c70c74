//! Random operations on a few sandboxes, now and then two at a time or with a process killed meanwhile, against a model of what must
//! come of it.
//!
//! The seed is printed first; it is another one in each run at full size, and always the same in an ordinary one. `ROOST_SEED` plays the
//! same turns again: what a turn draws depends on the seed, its number and the state of its sandbox alone. When in an operation a kill
//! comes is up to the machine. `ROOST_OPERATIONS` says how many there are.

use std::process::{Child, Command, Output};
use std::time::Duration;

use roost_tests::census::Census;
use roost_tests::random::{Random, number, seed};
use roost_tests::roost::{self, AgentConfig, Sandbox, Template, kill_9, kill_9_pid, pids, vmm_command, wait_for_agent};
use roost_tests::{eventually, in_rig, is_full_size, show};
use serde_json::Value;

const SANDBOXES: usize = 6;
/// Operations of an ordinary run, and of one at full size.
const FEW: usize = 40;
const MANY: usize = 300;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Gone,
    Running,
    Paused,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Create,
    /// Writes a file to memory and to disk, which are looked at from then on.
    Write,
    Pause,
    Resume,
    Destroy,
    /// A snapshot, a sandbox made of it, and neither of them any more.
    Snapshot,
}

impl Act {
    /// What a sandbox is after it.
    fn promises(self, before: State) -> State {
        match self {
            Self::Create | Self::Resume => State::Running,
            Self::Write | Self::Snapshot => before,
            Self::Pause => State::Paused,
            Self::Destroy => State::Gone,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kill {
    Agent,
    Privd,
    /// Of one sandbox, if it has one.
    Shim,
    Vmm,
    /// No kill: the agent's unit is restarted.
    Restart,
}

/// Weighted by how often they stand there.
const OF_GONE: &[Act] = &[Act::Create];
const OF_RUNNING: &[Act] = &[
    Act::Write,
    Act::Write,
    Act::Write,
    Act::Pause,
    Act::Pause,
    Act::Pause,
    Act::Destroy,
    Act::Snapshot,
];
const OF_PAUSED: &[Act] = &[
    Act::Resume,
    Act::Resume,
    Act::Resume,
    Act::Resume,
    Act::Destroy,
    Act::Snapshot,
];
/// Beside another act on the same sandbox.
const BESIDE: &[Act] = &[
    Act::Pause,
    Act::Pause,
    Act::Resume,
    Act::Resume,
    Act::Write,
    Act::Destroy,
];
const KILLS: &[Kill] = &[
    Kill::Agent,
    Kill::Agent,
    Kill::Privd,
    Kill::Shim,
    Kill::Vmm,
    Kill::Restart,
];

/// A sandbox as the model has it.
struct Known {
    id: String,
    state: State,
    /// Lines of `sha256sum` for what is in it.
    sums: Vec<String>,
    /// Its memory has been on disk: what becomes of its guest is our affair.
    has_woken: bool,
    /// Its VM may have been lost just after the guest had been let go, so that its memory may be of no use.
    may_be_spent: bool,
}

impl Known {
    fn call(&self, act: Act, turn: usize, template: &Template) -> Vec<String> {
        let id = self.id.as_str();
        let script = format!(
            "mkdir -p /dev/shm && head -c 100000 /dev/urandom > /dev/shm/{turn} && head -c 100000 /dev/urandom > /root/{turn} && sync \
             && sha256sum /dev/shm/{turn} /root/{turn}"
        );
        let words: Vec<&str> = match act {
            Act::Create => vec!["create", "--memory", "128", "--id", id],
            Act::Write => vec!["exec", "--timeout", "400", id, "--", "/bin/bash", "-c", &script],
            Act::Pause => vec!["pause", id],
            Act::Resume => vec!["resume", id],
            Act::Destroy => vec!["rm", id],
            Act::Snapshot => [&["snapshot", id], &template.arguments()[..]].concat(),
        };
        words.into_iter().map(str::to_owned).collect()
    }
}

/// All sandboxes; destroyed with this value.
struct World(Vec<Known>);

impl Drop for World {
    fn drop(&mut self) {
        let outputs: Vec<Output> = self.0.iter().map(|known| roost::roost(&["rm", &known.id])).collect();
        // A test that fails anyway says why itself.
        if !std::thread::panicking() {
            for output in outputs {
                let said = String::from_utf8_lossy(&output.stderr);
                // Some are gone already.
                assert!(output.status.success() || said.contains("no sandbox"), "{said}");
            }
        }
    }
}

#[test]
fn whatever_is_done_in_whatever_order_every_sandbox_is_what_it_must_be() {
    let is_all = is_full_size();
    let seed = seed();
    let wanted = number("ROOST_OPERATIONS").map(|wanted| usize::try_from(wanted).expect("a count"));
    let operations = wanted.unwrap_or(if is_all { MANY } else { FEW });
    show(&format!("NOTE: ROOST_SEED={seed} ROOST_OPERATIONS={operations}"));
    in_rig(|| {
        // So that kills hit what is made ahead, too.
        let _ready = AgentConfig::with("ready_sandboxes = 1\n");
        let mut world = World(
            (0..SANDBOXES)
                .map(|n| Known {
                    id: format!("random-{n}"),
                    state: State::Gone,
                    sums: Vec::new(),
                    has_woken: false,
                    may_be_spent: false,
                })
                .collect(),
        );
        let (mut done, mut turn) = (0, 0);
        while done < operations {
            done += world.play(turn, seed);
            turn += 1;
        }
        // What is paused is worth what comes back of it.
        for known in &mut world.0 {
            if known.state == State::Paused {
                let output = roost::roost(&["resume", &known.id]);
                let output = or_from_disk(known, output);
                assert!(
                    output.status.success(),
                    "{}: {}",
                    known.id,
                    String::from_utf8_lossy(&output.stderr)
                );
                known.state = State::Running;
            }
            known.look();
        }
    });
}

impl World {
    /// Plays a turn; how many operations it was.
    fn play(&mut self, turn: usize, seed: u64) -> usize {
        let mut random = Random::of_turn(seed, turn);
        let target = random.below(SANDBOXES);
        let before = self.0[target].state;
        let mut acts = vec![random.one_of(match before {
            State::Gone => OF_GONE,
            State::Running => OF_RUNNING,
            State::Paused => OF_PAUSED,
        })];
        if random.below(4) == 0 && before != State::Gone {
            acts.push(random.one_of(BESIDE));
        }
        let kill = (random.below(4) == 0).then(|| random.one_of(KILLS));
        let moment = Duration::from_millis(u64::try_from(random.below(4000)).expect("small"));
        let victim = if random.below(2) == 0 {
            target
        } else {
            random.below(SANDBOXES)
        };

        // Another one each time: the agent answers for the last one that nobody has heard of.
        let template = Template::named(u8::try_from(turn % 200).expect("less than 200"));
        let known = &self.0[target];
        let calls: Vec<(Act, Child)> = acts
            .iter()
            .map(|act| {
                let words = known.call(*act, turn, &template);
                let words: Vec<&str> = words.iter().map(String::as_str).collect();
                (*act, roost::start(&words))
            })
            .collect();
        let mut hit = None;
        if let Some(kill) = kill {
            std::thread::sleep(moment);
            hit = self.strike(kill, victim);
        }
        let mut outputs: Vec<(Act, Output)> = calls
            .into_iter()
            .map(|(act, call)| (act, call.wait_with_output().expect("it ends")))
            .collect();
        wait_for_agent();
        if let [(Act::Resume, _)] = &outputs[..] {
            outputs = outputs
                .into_iter()
                .map(|(act, output)| (act, or_from_disk(&mut self.0[target], output)))
                .collect();
        }
        let states = self.at_rest();
        let told = format!(
            "turn {turn}: {} {acts:?}{} {before:?} -> {:?}",
            self.0[target].id,
            kill.map(|kill| format!(
                " with {kill:?}{} after {} ms,",
                hit.map(|hit| format!(" of {}", self.0[hit].id)).unwrap_or_default(),
                moment.as_millis()
            ))
            .unwrap_or_default(),
            states[target]
        );
        show(&told);
        let is_cut_off = matches!(kill, Some(Kill::Agent | Kill::Restart)) || hit == Some(target);
        for (n, state) in states.iter().copied().enumerate() {
            let known = &mut self.0[n];
            if n != target && hit != Some(n) && state == State::Gone && known.was_lost() {
                known.is_gone();
                continue;
            }
            if n == target {
                let may_be = acceptable(before, &outputs, is_cut_off, hit == Some(target));
                assert!(
                    may_be.contains(&state),
                    "{told}: one of {may_be:?} was due; {}",
                    said(&outputs)
                );
            } else if hit == Some(n) {
                let due = if known.state == State::Running {
                    State::Gone
                } else {
                    known.state
                };
                assert_eq!(state, due, "{told}: of {}, whose VM was lost", known.id);
            } else {
                assert_eq!(state, known.state, "{told}: of {}, which nobody touched", known.id);
            }
            if state == State::Gone {
                known.is_gone();
            }
            known.has_woken |= state == State::Paused;
            known.state = state;
        }
        let known = &mut self.0[target];
        // What has been resumed since has memory of its own again.
        known.may_be_spent = known.state == State::Paused && (known.may_be_spent || hit == Some(target));
        for (act, output) in &outputs {
            if *act == Act::Write && output.status.success() && known.state != State::Gone {
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                known.sums.extend(text.lines().map(str::to_owned));
            }
        }
        known.look();
        if let [(Act::Snapshot, output)] = &outputs[..]
            && output.status.success()
        {
            known.clone_of(&template);
        }
        // A capture whose agent was killed is undone by the next one; any other has been answered.
        eventually("the template to be made, or not", || {
            (!Census::take().lists("template", "/.making-")).then_some(())
        });
        drop(template);
        acts.len()
    }

    /// Kills; whose VM that was.
    fn strike(&self, kill: Kill, victim: usize) -> Option<usize> {
        match kill {
            Kill::Agent => kill_9("roost-agent"),
            // Systemd starts it when somebody calls, and so there may be none.
            Kill::Privd => pids("roost-privd").into_iter().for_each(kill_9_pid),
            Kill::Restart => {
                let status = Command::new("systemctl")
                    .args(["restart", "roost-agent.service"])
                    .status()
                    .expect("systemctl runs");
                assert!(status.success());
            }
            Kill::Shim | Kill::Vmm => {
                let vmm = vmm_of(&self.0[victim].id)?;
                kill_9_pid(if kill == Kill::Vmm { vmm } else { parent_of(vmm)? });
                return Some(victim);
            }
        }
        None
    }

    /// What they all are once nothing is under way.
    fn at_rest(&self) -> Vec<State> {
        eventually("all to come to rest", || {
            let listing: Value = serde_json::from_str(&roost::ok(&["ls", "--json"])).expect("JSON");
            let of = |list: &str, id: &str| {
                let listed = listing[list]
                    .as_array()?
                    .iter()
                    .find(|listed| listed["sandboxId"] == id)?;
                Some(listed["status"].as_str()?.to_owned())
            };
            let state = |known: &Known| {
                let status = of("sandboxes", &known.id).or_else(|| of("pausedSandboxes", &known.id));
                match status.as_deref() {
                    None => Some(State::Gone),
                    Some("running") => Some(State::Running),
                    Some("paused") => Some(State::Paused),
                    Some(_) => None,
                }
            };
            self.0.iter().map(state).collect()
        })
    }
}

/// What a sandbox may be after some operations on it.
fn acceptable(before: State, outputs: &[(Act, Output)], is_cut_off: bool, has_lost_vm: bool) -> Vec<State> {
    let promised = outputs.iter().map(|(act, _)| act.promises(before));
    let succeeded = |wanted: Act| {
        outputs
            .iter()
            .any(|(act, output)| *act == wanted && output.status.success())
    };
    if succeeded(Act::Destroy) {
        return vec![State::Gone];
    }
    let mut may_be: Vec<State> = match outputs {
        [(act, output)] if output.status.success() => vec![act.promises(before)],
        // Nothing was in its way.
        [_] if !is_cut_off => Vec::new(),
        _ => promised.chain([before]).collect(),
    };
    if has_lost_vm {
        may_be.push(State::Gone);
        // A resume that is undone.
        if before == State::Paused {
            may_be.push(State::Paused);
        }
    }
    may_be
}

fn said(outputs: &[(Act, Output)]) -> String {
    let one = |(act, output): &(Act, Output)| {
        format!(
            "{act:?} ended with {} and said {:?}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        )
    };
    outputs.iter().map(one).collect::<Vec<_>>().join("; ")
}

/// A resume's outcome; where it failed because the memory could not be used, and that may be so, the outcome of one from its disk alone.
fn or_from_disk(known: &mut Known, output: Output) -> Output {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() || !known.may_be_spent || !said.contains("from its disk alone") {
        return output;
    }
    known.sums.retain(|line| !line.contains("/dev/shm/"));
    roost::roost(&["resume", "--disk-only", &known.id])
}

impl Known {
    /// Where it runs: everything that was written is there.
    fn look(&mut self) {
        if self.state != State::Running {
            return;
        }
        if let Err(said) = look_for(&self.sums, &self.id) {
            assert!(self.was_lost(), "{} has lost something: {said}", self.id);
            self.is_gone();
        }
    }

    fn is_gone(&mut self) {
        self.state = State::Gone;
        self.sums.clear();
        self.has_woken = false;
        self.may_be_spent = false;
    }

    /// Whether the emulation lost its guest, which it may once in a run, of those that were booted and never paused.
    fn was_lost(&self) -> bool {
        if self.state != State::Running || self.has_woken {
            return false;
        }
        let why = roost::roost(&["why", &self.id]);
        let why = String::from_utf8_lossy(&why.stdout).into_owned();
        if !why.contains("guest_reset") {
            return false;
        }
        eventually("it to be gone", || roost::find(&self.id).is_none().then_some(()));
        roost::excuse_a_lost_guest(&why);
        true
    }

    /// A sandbox that is made of a template of this one has what this one has.
    fn clone_of(&self, template: &Template) {
        let made = roost::ok(&[&["create", "--json"], &template.arguments()[..]].concat());
        let made: Value = serde_json::from_str(&made).expect("JSON");
        let clone = Sandbox {
            id: made["sandboxId"].as_str().expect("an id").to_owned(),
        };
        let is_restored = made["metadata"]["restored"] == "true";
        let sums: Vec<String> = self
            .sums
            .iter()
            .filter(|line| is_restored || !line.contains("/dev/shm/"))
            .cloned()
            .collect();
        if let Err(said) = look_for(&sums, &clone.id) {
            panic!("a sandbox made of {} has lost something: {said}", self.id);
        }
    }
}

/// Finds what was written.
fn look_for(sums: &[String], id: &str) -> Result<(), String> {
    let script = format!(
        "sha256sum --check --quiet <<'END' && ! dmesg | grep -i 'ext4.*error'\n{}\nEND",
        sums.join("\n")
    );
    let script = if sums.is_empty() { "true" } else { &script };
    let output = roost::roost(&["exec", "--timeout", "400", id, "--", "/bin/bash", "-c", script]);
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    ))
}

/// The process of a sandbox's VMM: the one that was given its disk.
fn vmm_of(id: &str) -> Option<i32> {
    let device = roost::disk_of(id)?;
    let signs = [format!("/dev/{device},"), format!("/sandboxes/{id}/")];
    pids(vmm_command()).into_iter().find(|pid| {
        let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let words = String::from_utf8_lossy(&words).into_owned();
        signs.iter().any(|sign| words.contains(sign.as_str()))
    })
}

fn parent_of(pid: i32) -> Option<i32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("PPid:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
