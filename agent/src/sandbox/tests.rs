//! The state machine against every event in every state, and against long random histories.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::record::Memory;
use super::*;
use crate::host::images::TemplateRef;
use crate::templates::CaptureKind;
use roost_common::shim::{Exit, WaitStatus};
use tokio::sync::oneshot;

/// Stands for what a sandbox owns: counts those alive.
#[derive(Debug)]
struct Owned(Arc<AtomicUsize>);

impl Owned {
    fn new(alive: &Arc<AtomicUsize>) -> Self {
        alive.fetch_add(1, Ordering::SeqCst);
        Self(alive.clone())
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn failed(left: bool) -> Event<Owned> {
    let left = left.then(stuck);
    Event::Built(Err(BuildFailure {
        error: BuildError::Stopped,
        left,
    }))
}

fn stuck() -> TeardownError {
    TeardownError::Vmm(crate::host::shim::ShimFault::Timeout("end its VMM"))
}

fn exit() -> Ending {
    Ending::Reported(Box::new(Exit {
        wait: WaitStatus::Signaled(9),
        oom_kills: 0,
        console: Vec::new(),
        log: Vec::new(),
    }))
}

fn kept() -> Kept {
    Kept {
        generation: 2,
        memory: Memory::Whole,
        reason: PauseReason::Requested,
        told: false,
        paused_at_unix: 5,
        disk_written_at: 7,
    }
}

fn wish(kind: CaptureKind) -> CaptureWish {
    CaptureWish {
        kind,
        template: TemplateRef::default(),
        name: String::new(),
    }
}

/// State and actions in words, as in the table below.
fn words(next: &Next<Owned>) -> String {
    let state = match &next.0 {
        Sandbox::Creating(_) => "creating",
        Sandbox::Running(_) => "running",
        Sandbox::Pausing(Pausing { destroys, .. }) if !destroys.is_empty() => "pausing/destroy",
        Sandbox::Pausing(Pausing {
            reason: PauseReason::Idle,
            ..
        }) => "pausing/idle",
        Sandbox::Pausing(Pausing {
            reason: PauseReason::Drain,
            ..
        }) => "pausing/drain",
        Sandbox::Pausing(_) => "pausing",
        Sandbox::Capturing(Capturing { destroys, .. }) if !destroys.is_empty() => "capturing/destroy",
        Sandbox::Capturing(Capturing { pauses, .. }) if !pauses.is_empty() => "capturing/pause",
        Sandbox::Capturing(Capturing { resumes, .. }) if !resumes.is_empty() => "capturing/resume",
        Sandbox::Capturing(Capturing {
            from: Captured::Running,
            ..
        }) => "capturing",
        Sandbox::Capturing(Capturing {
            from: Captured::Paused, ..
        }) => "capturing/paused",
        Sandbox::Paused(_) => "paused",
        Sandbox::Resuming(Resuming { destroys, .. }) if !destroys.is_empty() => "resuming/destroy",
        Sandbox::Resuming(_) => "resuming",
        Sandbox::Unreachable(Unreachable { destroys, .. }) if !destroys.is_empty() => "unreachable/destroy",
        Sandbox::Unreachable(Unreachable { is_tried: true, .. }) => "unreachable/tried",
        Sandbox::Unreachable(_) => "unreachable",
        Sandbox::Destroying(Destroying { step: Step::Build, .. }) => "destroying/build",
        Sandbox::Destroying(Destroying {
            step: Step::Teardown, ..
        }) => "destroying/teardown",
        Sandbox::Destroying(Destroying { step: Step::Stuck, .. }) => "destroying/stuck",
        Sandbox::Gone => "gone",
    };
    let actions = next.1.iter().map(|action| match action {
        Action::CancelBuild => " cancel".to_owned(),
        Action::Pause(_, PauseReason::Requested) => " pause".to_owned(),
        Action::Pause(_, PauseReason::Idle) => " pause(idle)".to_owned(),
        Action::Pause(_, PauseReason::Drain) => " pause(drain)".to_owned(),
        Action::Capture(..) => " capture".to_owned(),
        Action::CaptureKept(..) => " capture(files)".to_owned(),
        Action::AnswerCaptures(_, replies, Ok(_)) => format!(" captured:{}", replies.len()),
        Action::AnswerCaptures(_, replies, Err(CaptureFailure::Failed(_))) => {
            format!(" capture-failed:{}", replies.len())
        }
        Action::AnswerCaptures(_, replies, Err(CaptureFailure::Refused(_) | CaptureFailure::Host(_))) => {
            format!(" capture-refused:{}", replies.len())
        }
        Action::Resume(..) => " resume".to_owned(),
        Action::CancelResume => " cancel-resume".to_owned(),
        Action::Reach => " reach".to_owned(),
        Action::TearDown(Some(_)) => " teardown(vm)".to_owned(),
        Action::TearDown(None) => " teardown(files)".to_owned(),
        Action::Kill(_) => " kill".to_owned(),
        Action::Bury(Ending::NotPaused(_)) => " bury(not-paused)".to_owned(),
        Action::Bury(_) => " bury".to_owned(),
        Action::TellAutoPaused => " tell(auto-paused)".to_owned(),
        Action::AnswerCreate(_, Ok(())) => " created".to_owned(),
        Action::AnswerCreate(_, Err(CreateFailure::Failed(_))) => " create-failed".to_owned(),
        Action::AnswerCreate(_, Err(CreateFailure::Destroyed)) => " create-destroyed".to_owned(),
        Action::AnswerPauses(replies, Ok(())) => format!(" paused:{}", replies.len()),
        Action::AnswerPauses(replies, Err(PauseFailure::Failed(_))) => format!(" pause-failed:{}", replies.len()),
        Action::AnswerPauses(replies, Err(PauseFailure::Refused(_))) => format!(" pause-refused:{}", replies.len()),
        Action::AnswerResumes(replies, Ok(())) => format!(" resumed:{}", replies.len()),
        Action::AnswerResumes(replies, Err(ResumeFailure::Failed(_))) => format!(" resume-failed:{}", replies.len()),
        Action::AnswerResumes(replies, Err(ResumeFailure::Refused(_) | ResumeFailure::Host(_))) => {
            format!(" resume-refused:{}", replies.len())
        }
        Action::AnswerDestroys(replies, Ok(())) => format!(" destroyed:{}", replies.len()),
        Action::AnswerDestroys(replies, Err(_)) => format!(" destroy-failed:{}", replies.len()),
    });
    state.to_owned() + &actions.collect::<String>()
}

const STATES: [&str; 21] = [
    "creating",
    "running",
    "pausing",
    "pausing/idle",
    "pausing/drain",
    "pausing/destroy",
    "capturing",
    "capturing/paused",
    "capturing/pause",
    "capturing/resume",
    "capturing/destroy",
    "paused",
    "resuming",
    "resuming/destroy",
    "destroying/build",
    "destroying/teardown",
    "destroying/stuck",
    "gone",
    "unreachable",
    "unreachable/tried",
    "unreachable/destroy",
];

const EVENTS: [&str; 32] = [
    "built",
    "failed",
    "failed, left",
    "caller gone",
    "destroy",
    "pause",
    "idle",
    "on disk",
    "not paused",
    "ended while pausing",
    "resume",
    "runs again",
    "not resumed",
    "vmm ended",
    "torn down",
    "not torn down",
    "unclaimed",
    "retry",
    "resume, disk only",
    "drain",
    "not paused, the host's fault",
    "capture",
    "capture something else",
    "captured",
    "not captured",
    "captured from files",
    "ended while capturing",
    "reached",
    "reached, paused",
    "reached, ended",
    "reached, gone",
    "not reached",
];

/// Every event in every state: what follows. One line for each pair.
const TABLE: &str = include_str!("table.txt");

#[test]
fn every_event_in_every_state_has_its_answer() {
    let alive = Arc::new(AtomicUsize::new(0));
    fn reply<T>() -> oneshot::Sender<T> {
        oneshot::channel().0
    }
    let state = |name: &str| -> Sandbox<Owned> {
        let destroying = |step, caller: bool, waiting: usize| {
            Sandbox::Destroying(Destroying {
                caller: caller.then(reply),
                waiting: (0..waiting).map(|_| reply()).collect(),
                step,
            })
        };
        let pausing = |reason, pauses: usize, destroys: usize| {
            Sandbox::Pausing(Pausing {
                reason,
                pauses: (0..pauses).map(|_| reply()).collect(),
                destroys: (0..destroys).map(|_| reply()).collect(),
            })
        };
        let capturing = |from, pauses: usize, resumes: usize, destroys: usize| {
            Sandbox::Capturing(Capturing {
                from,
                wish: wish(CaptureKind::Snapshot),
                captures: vec![reply()],
                pauses: (0..pauses).map(|_| reply()).collect(),
                reason: PauseReason::Requested,
                resumes: (0..resumes).map(|_| (ResumeWish::default(), reply())).collect(),
                destroys: (0..destroys).map(|_| reply()).collect(),
            })
        };
        let resuming = |destroys: usize| {
            Sandbox::Resuming(Resuming {
                resumes: vec![reply()],
                destroys: (0..destroys).map(|_| reply()).collect(),
            })
        };
        match name {
            "creating" => Sandbox::new(reply()),
            "running" => Sandbox::adopted(Owned::new(&alive)),
            "pausing" => pausing(PauseReason::Requested, 1, 0),
            "pausing/idle" => pausing(PauseReason::Idle, 0, 0),
            "pausing/drain" => pausing(PauseReason::Drain, 1, 0),
            "capturing" => capturing(Captured::Running, 0, 0, 0),
            "capturing/paused" => capturing(Captured::Paused, 0, 0, 0),
            "capturing/pause" => capturing(Captured::Running, 2, 0, 0),
            "capturing/resume" => capturing(Captured::Paused, 0, 2, 0),
            "capturing/destroy" => capturing(Captured::Running, 1, 0, 1),
            "pausing/destroy" => pausing(PauseReason::Requested, 1, 2),
            "paused" => Sandbox::kept(kept()),
            "resuming" => resuming(0),
            "resuming/destroy" => resuming(1),
            "unreachable" => Sandbox::unreachable(false),
            "unreachable/tried" => Sandbox::unreachable(true),
            "unreachable/destroy" => Sandbox::Unreachable(Unreachable {
                is_tried: true,
                destroys: vec![reply()],
            }),
            "destroying/build" => destroying(Step::Build, true, 1),
            "destroying/teardown" => destroying(Step::Teardown, false, 1),
            "destroying/stuck" => destroying(Step::Stuck, false, 0),
            "gone" => Sandbox::Gone,
            other => panic!("no state {other}"),
        }
    };
    let vm = || Owned::new(&alive);
    let event = |name: &str| -> Event<Owned> {
        match name {
            "built" => Event::Built(Ok(vm())),
            "failed" => failed(false),
            "failed, left" => failed(true),
            "caller gone" => Event::CallerGone,
            "destroy" => Event::DestroyRequested(reply()),
            "pause" => Event::PauseRequested(PauseReason::Requested, reply()),
            "drain" => Event::PauseRequested(PauseReason::Drain, reply()),
            "not paused, the host's fault" => {
                Event::PauseEnded(PauseEnd::Running(vm(), PauseError::SyncTimeout(Duration::ZERO)))
            }
            "capture" => Event::CaptureRequested(wish(CaptureKind::Snapshot), reply()),
            "capture something else" => Event::CaptureRequested(wish(CaptureKind::Rootfs), reply()),
            "captured" => Event::CaptureEnded(CaptureEnd::Running(vm(), Ok(Bytes(7)))),
            "not captured" => Event::CaptureEnded(CaptureEnd::Running(vm(), Err(CaptureError::VmmEnded))),
            "captured from files" => Event::CaptureEnded(CaptureEnd::Paused(kept(), Ok(Bytes(7)))),
            "ended while capturing" => Event::CaptureEnded(CaptureEnd::Ended(vm(), exit())),
            "idle" => Event::IdleDeadline,
            "on disk" => Event::PauseEnded(PauseEnd::Paused(kept())),
            "not paused" => Event::PauseEnded(PauseEnd::Running(vm(), PauseError::VmmEnded)),
            "ended while pausing" => Event::PauseEnded(PauseEnd::Ended(vm(), exit())),
            "resume" => Event::ResumeRequested(ResumeWish::default(), reply()),
            "resume, disk only" => {
                let wish = ResumeWish {
                    from: resume::From::Disk,
                    ..ResumeWish::default()
                };
                Event::ResumeRequested(wish, reply())
            }
            "runs again" => Event::ResumeEnded(ResumeEnd::Running(vm())),
            "not resumed" => Event::ResumeEnded(ResumeEnd::Paused(kept(), ResumeError::Stopped)),
            "vmm ended" => Event::VmmEnded(exit()),
            "torn down" => Event::TornDown(Ok(())),
            "not torn down" => Event::TornDown(Err(stuck())),
            "unclaimed" => Event::Unclaimed,
            "retry" => Event::RetryDue,
            "reached" => Event::Reached(ReachEnd::Running(vm())),
            "reached, paused" => Event::Reached(ReachEnd::Paused(kept())),
            "reached, ended" => Event::Reached(ReachEnd::Ended(vm(), exit())),
            "reached, gone" => Event::Reached(ReachEnd::Gone(None)),
            "not reached" => Event::Reached(ReachEnd::Unreachable),
            other => panic!("no event {other}"),
        }
    };
    let mut expected = TABLE.lines();
    let mut found = Vec::new();
    let mut wrong = false;
    for from in STATES {
        for what in EVENTS {
            let line = format!("{from} | {what} | {}", words(&state(from).on(event(what))));
            wrong |= expected.next() != Some(&line);
            found.push(line);
        }
    }
    let found = found.join("\n");
    assert!(
        !wrong && expected.next().is_none(),
        "table.txt does not say this:\n{found}"
    );
    assert_eq!(alive.load(Ordering::SeqCst), 0, "something was kept by nobody");
}

/// A small generator of our own: the seed is printed with a failure, and that is all that is needed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// The one long step that a driver has under way.
enum Work {
    None,
    Build,
    Pause(Owned),
    Resume {
        cancelled: bool,
    },
    Capture(Option<Owned>),
    /// What is there to be reached.
    Reach(Owned),
    TearDown(Option<Owned>),
}

/// Plays the driver: long steps end at random moments and in random ways, callers come and go.
#[test]
fn no_history_loses_a_resource_a_paused_sandbox_or_a_caller() {
    let mut seen = std::collections::BTreeSet::new();
    for seed in 1..=5000 {
        let mut dice = Dice(u64::wrapping_mul(seed, 0x9E37_79B9_7F4A_7C15));
        let alive = Arc::new(AtomicUsize::new(0));
        let (caller, mut created) = oneshot::channel();
        // Of this agent, or of an earlier one.
        let is_new = dice.roll(4) > 0;
        let (first, mut work) = if is_new {
            (Sandbox::new(caller), Work::Build)
        } else {
            (Sandbox::unreachable(true), Work::Reach(Owned::new(&alive)))
        };
        let mut sandbox = Some(first);
        // A VM that runs and is not reached: a teardown ends it by its socket.
        let mut unreached: Option<Owned> = None;
        let mut destroys: Vec<oneshot::Receiver<Result<(), Arc<TeardownError>>>> = Vec::new();
        let mut pauses: Vec<oneshot::Receiver<Result<(), PauseFailure>>> = Vec::new();
        let mut resumes: Vec<oneshot::Receiver<Result<(), ResumeFailure>>> = Vec::new();
        let mut captures: Vec<oneshot::Receiver<Result<Bytes, CaptureFailure>>> = Vec::new();
        // A paused sandbox goes by a destroy and by nothing else.
        let mut on_disk = false;
        let mut steps = 0;
        while !matches!(sandbox, Some(Sandbox::Gone)) {
            steps += 1;
            assert!(steps < 100_000, "seed {seed}: it does not end");
            let event = match dice.roll(11) {
                0 | 1 => match std::mem::replace(&mut work, Work::None) {
                    Work::None => continue,
                    Work::Build => match dice.roll(6) {
                        0 => failed(false),
                        1 => failed(true),
                        _ => Event::Built(Ok(Owned::new(&alive))),
                    },
                    Work::Pause(vm) => Event::PauseEnded(match dice.roll(4) {
                        0 => PauseEnd::Running(vm, PauseError::VmmEnded),
                        1 => PauseEnd::Ended(vm, exit()),
                        _ => {
                            drop(vm);
                            on_disk = true;
                            PauseEnd::Paused(kept())
                        }
                    }),
                    Work::Capture(None) => Event::CaptureEnded(CaptureEnd::Paused(
                        kept(),
                        match dice.roll(2) {
                            0 => Ok(Bytes(7)),
                            _ => Err(CaptureError::VmmEnded),
                        },
                    )),
                    Work::Capture(Some(vm)) => Event::CaptureEnded(match dice.roll(4) {
                        0 => CaptureEnd::Running(vm, Err(CaptureError::VmmEnded)),
                        1 => CaptureEnd::Ended(vm, exit()),
                        _ => CaptureEnd::Running(vm, Ok(Bytes(7))),
                    }),
                    Work::Resume { cancelled } => Event::ResumeEnded(match dice.roll(if cancelled { 3 } else { 2 }) {
                        0 => {
                            on_disk = false;
                            ResumeEnd::Running(Owned::new(&alive))
                        }
                        _ => ResumeEnd::Paused(kept(), ResumeError::Stopped),
                    }),
                    Work::Reach(vm) => Event::Reached(match dice.roll(6) {
                        0 => ReachEnd::Running(vm),
                        1 => ReachEnd::Ended(vm, exit()),
                        2 => {
                            drop(vm);
                            ReachEnd::Gone(None)
                        }
                        3 => {
                            drop(vm);
                            on_disk = true;
                            ReachEnd::Paused(kept())
                        }
                        _ => {
                            unreached = Some(vm);
                            ReachEnd::Unreachable
                        }
                    }),
                    Work::TearDown(vm) => {
                        drop(vm);
                        Event::TornDown(if dice.roll(3) == 0 { Err(stuck()) } else { Ok(()) })
                    }
                },
                2 => Event::CallerGone,
                3 if matches!(sandbox, Some(Sandbox::Running(_))) && dice.roll(4) == 0 => Event::VmmEnded(exit()),
                4 => Event::RetryDue,
                5 if dice.roll(8) == 0 => {
                    let (reply, answer) = oneshot::channel();
                    destroys.push(answer);
                    Event::DestroyRequested(reply)
                }
                6 => {
                    let (reply, answer) = oneshot::channel();
                    pauses.push(answer);
                    let reason = match dice.roll(3) {
                        0 => PauseReason::Drain,
                        _ => PauseReason::Requested,
                    };
                    Event::PauseRequested(reason, reply)
                }
                7 => {
                    let (reply, answer) = oneshot::channel();
                    resumes.push(answer);
                    Event::ResumeRequested(ResumeWish::default(), reply)
                }
                8 if dice.roll(8) == 0 => Event::IdleDeadline,
                9 if dice.roll(3) == 0 => {
                    let (reply, answer) = oneshot::channel();
                    captures.push(answer);
                    let kind = match dice.roll(3) {
                        0 => CaptureKind::Rootfs,
                        _ => CaptureKind::Snapshot,
                    };
                    Event::CaptureRequested(wish(kind), reply)
                }
                _ => continue,
            };
            let (next, actions) = sandbox.take().expect("always one").on(event);
            for action in actions {
                let idle = matches!(work, Work::None);
                match action {
                    // The build goes on to its end, which may also be success.
                    Action::CancelBuild => assert!(matches!(work, Work::Build), "seed {seed}: nothing to cancel"),
                    Action::CancelResume => match &mut work {
                        Work::Resume { cancelled } => *cancelled = true,
                        _ => panic!("seed {seed}: no resume to cancel"),
                    },
                    Action::Pause(vm, _) => {
                        assert!(idle, "seed {seed}: paused while something is under way");
                        work = Work::Pause(vm);
                    }
                    Action::Resume(..) => {
                        assert!(
                            idle && on_disk,
                            "seed {seed}: resumed while something is under way, or from nothing"
                        );
                        work = Work::Resume { cancelled: false };
                    }
                    Action::Capture(vm, _) => {
                        assert!(idle, "seed {seed}: captured while something is under way");
                        work = Work::Capture(Some(vm));
                    }
                    Action::CaptureKept(..) => {
                        assert!(
                            idle && on_disk,
                            "seed {seed}: captured while something is under way, or from nothing"
                        );
                        work = Work::Capture(None);
                    }
                    Action::AnswerCaptures(_, replies, outcome) => {
                        replies.into_iter().for_each(|reply| drop(reply.send(outcome.clone())));
                    }
                    Action::TearDown(vm) => {
                        assert!(idle, "seed {seed}: taken down while something is under way");
                        assert!(
                            !on_disk || !destroys.is_empty(),
                            "seed {seed}: a paused sandbox is removed and nobody asked for it"
                        );
                        on_disk = false;
                        work = Work::TearDown(vm.or(unreached.take()));
                    }
                    Action::Reach => {
                        assert!(idle, "seed {seed}: reached for while something is under way");
                        work = Work::Reach(unreached.take().expect("something to reach"));
                    }
                    Action::Kill(_) => panic!("seed {seed}: two VMs"),
                    Action::Bury(_) | Action::TellAutoPaused => {}
                    Action::AnswerCreate(reply, outcome) => drop(reply.send(outcome)),
                    Action::AnswerPauses(replies, outcome) => {
                        replies.into_iter().for_each(|reply| drop(reply.send(outcome.clone())));
                    }
                    Action::AnswerResumes(replies, outcome) => {
                        replies.into_iter().for_each(|reply| drop(reply.send(outcome.clone())));
                    }
                    Action::AnswerDestroys(replies, outcome) => {
                        let outcome = outcome.map_err(Arc::new);
                        replies.into_iter().for_each(|reply| drop(reply.send(outcome.clone())));
                    }
                }
            }
            seen.insert(next.name());
            sandbox = Some(next);
        }
        assert!(matches!(work, Work::None), "seed {seed}: gone with work under way");
        assert_eq!(alive.load(Ordering::SeqCst), 0, "seed {seed}: something has no owner");
        assert_eq!(
            created.try_recv().is_ok(),
            is_new,
            "seed {seed}: the create was not answered"
        );
        let unanswered = destroys.iter_mut().any(|answer| answer.try_recv().is_err())
            || pauses.iter_mut().any(|answer| answer.try_recv().is_err())
            || resumes.iter_mut().any(|answer| answer.try_recv().is_err())
            || captures.iter_mut().any(|answer| answer.try_recv().is_err());
        assert!(!unanswered, "seed {seed}: somebody was not answered");
    }
    assert_eq!(seen.len(), 9, "not all states were reached: {seen:?}");
}
