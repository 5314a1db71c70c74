//! The state machine against every event in every state, and against long random histories.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use roost_common::shim::WaitStatus;

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

/// State and actions in words, as in the tables below.
fn words(next: &Next<Owned>) -> String {
    let state = match &next.0 {
        Sandbox::Creating(_) => "Creating",
        Sandbox::Running(_) => "Running",
        Sandbox::Destroying(Destroying { step: Step::Build, .. }) => "Destroying/build",
        Sandbox::Destroying(Destroying {
            step: Step::Teardown, ..
        }) => "Destroying/teardown",
        Sandbox::Destroying(Destroying { step: Step::Stuck, .. }) => "Destroying/stuck",
        Sandbox::Gone => "Gone",
    };
    let actions = next.1.iter().map(|action| match action {
        Action::CancelBuild => " cancel".to_owned(),
        Action::TearDown(Some(_)) => " teardown(vm)".to_owned(),
        Action::TearDown(None) => " teardown(files)".to_owned(),
        Action::Bury(_) => " bury".to_owned(),
        Action::AnswerCreate(_, Ok(())) => " created".to_owned(),
        Action::AnswerCreate(_, Err(CreateFailure::Failed(_))) => " create-failed".to_owned(),
        Action::AnswerCreate(_, Err(CreateFailure::Destroyed)) => " create-destroyed".to_owned(),
        Action::AnswerDestroys(replies, Ok(())) => format!(" destroyed:{}", replies.len()),
        Action::AnswerDestroys(replies, Err(_)) => format!(" destroy-failed:{}", replies.len()),
    });
    state.to_owned() + &actions.collect::<String>()
}

#[test]
fn every_event_in_every_state_has_its_answer() {
    let alive = Arc::new(AtomicUsize::new(0));
    let reply = || oneshot::channel().0;
    let state = |name: &str| -> Sandbox<Owned> {
        let destroying = |step, caller: bool, waiting: usize| {
            Sandbox::Destroying(Destroying {
                caller: caller.then(|| oneshot::channel().0),
                waiting: (0..waiting).map(|_| oneshot::channel().0).collect(),
                step,
            })
        };
        match name {
            "creating" => Sandbox::new(oneshot::channel().0),
            "running" => Sandbox::Running(Running { vm: Owned::new(&alive) }),
            "destroying/build" => destroying(Step::Build, true, 1),
            "destroying/teardown" => destroying(Step::Teardown, false, 1),
            "destroying/stuck" => destroying(Step::Stuck, false, 0),
            "gone" => Sandbox::Gone,
            other => panic!("no state {other}"),
        }
    };
    let event = |name: &str| -> Event<Owned> {
        match name {
            "built" => Event::Built(Ok(Owned::new(&alive))),
            "failed" => failed(false),
            "failed, left" => failed(true),
            "caller gone" => Event::CallerGone,
            "destroy" => Event::DestroyRequested(reply()),
            "vmm ended" => Event::VmmEnded(exit()),
            "torn down" => Event::TornDown(Ok(())),
            "not torn down" => Event::TornDown(Err(stuck())),
            "unclaimed" => Event::Unclaimed,
            "retry" => Event::RetryDue,
            other => panic!("no event {other}"),
        }
    };
    let table = [
        ("creating", "built", "Running created"),
        ("creating", "failed", "Gone create-failed"),
        (
            "creating",
            "failed, left",
            "Destroying/stuck create-failed destroy-failed:0",
        ),
        ("creating", "caller gone", "Destroying/build cancel"),
        ("creating", "destroy", "Destroying/build cancel"),
        ("creating", "vmm ended", "Creating"),
        ("creating", "torn down", "Creating"),
        ("creating", "not torn down", "Creating"),
        ("running", "built", "Running teardown(vm)"),
        ("running", "failed", "Running"),
        ("running", "failed, left", "Running"),
        ("running", "caller gone", "Running"),
        ("running", "destroy", "Destroying/teardown teardown(vm)"),
        ("running", "vmm ended", "Destroying/teardown bury teardown(vm)"),
        ("running", "torn down", "Running"),
        ("running", "not torn down", "Running"),
        ("destroying/build", "built", "Destroying/teardown teardown(vm)"),
        ("destroying/build", "failed", "Gone create-destroyed destroyed:1"),
        (
            "destroying/build",
            "failed, left",
            "Destroying/stuck create-destroyed destroy-failed:1",
        ),
        ("destroying/build", "caller gone", "Destroying/build"),
        ("destroying/build", "destroy", "Destroying/build"),
        ("destroying/build", "vmm ended", "Destroying/build"),
        ("destroying/teardown", "torn down", "Gone destroyed:1"),
        (
            "destroying/teardown",
            "not torn down",
            "Destroying/stuck destroy-failed:1",
        ),
        ("destroying/teardown", "destroy", "Destroying/teardown"),
        ("destroying/teardown", "caller gone", "Destroying/teardown"),
        ("destroying/teardown", "vmm ended", "Destroying/teardown"),
        ("destroying/stuck", "destroy", "Destroying/teardown teardown(files)"),
        ("destroying/stuck", "caller gone", "Destroying/stuck"),
        ("destroying/stuck", "vmm ended", "Destroying/stuck"),
        ("creating", "unclaimed", "Creating"),
        ("creating", "retry", "Creating"),
        ("running", "unclaimed", "Destroying/teardown teardown(vm)"),
        ("running", "retry", "Running"),
        ("destroying/build", "unclaimed", "Destroying/build"),
        ("destroying/build", "retry", "Destroying/build"),
        ("destroying/teardown", "unclaimed", "Destroying/teardown"),
        ("destroying/teardown", "retry", "Destroying/teardown"),
        ("destroying/stuck", "unclaimed", "Destroying/stuck"),
        ("destroying/stuck", "retry", "Destroying/teardown teardown(files)"),
        ("gone", "unclaimed", "Gone"),
        ("gone", "retry", "Gone"),
        ("gone", "built", "Gone teardown(vm)"),
        ("gone", "failed", "Gone"),
        ("gone", "caller gone", "Gone"),
        ("gone", "destroy", "Gone destroyed:1"),
        ("gone", "vmm ended", "Gone"),
        ("gone", "torn down", "Gone"),
    ];
    for (from, what, expected) in table {
        assert_eq!(words(&state(from).on(event(what))), expected, "{what} while {from}");
    }
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

/// Plays the driver: long steps end at random moments, callers come and go.
#[test]
fn no_history_loses_a_resource_or_a_caller() {
    for seed in 1..=3000 {
        let mut dice = Dice(u64::wrapping_mul(seed, 0x9E37_79B9_7F4A_7C15));
        let alive = Arc::new(AtomicUsize::new(0));
        let (caller, mut created) = oneshot::channel();
        let mut sandbox = Some(Sandbox::new(caller));
        let mut building = true;
        let mut tearing_down: Option<Option<Owned>> = None;
        let mut destroys: Vec<oneshot::Receiver<Result<(), Arc<TeardownError>>>> = Vec::new();
        let mut steps = 0;
        while !matches!(sandbox, Some(Sandbox::Gone)) {
            steps += 1;
            assert!(steps < 10_000, "seed {seed}: it does not end");
            let event = match dice.roll(7) {
                0 if building => {
                    building = false;
                    match dice.roll(4) {
                        0 => failed(false),
                        1 => failed(true),
                        _ => Event::Built(Ok(Owned::new(&alive))),
                    }
                }
                1 => match tearing_down.take() {
                    Some(vm) => {
                        drop(vm);
                        Event::TornDown(if dice.roll(3) == 0 { Err(stuck()) } else { Ok(()) })
                    }
                    None => continue,
                },
                2 => Event::CallerGone,
                3 if matches!(sandbox, Some(Sandbox::Running(_))) => Event::VmmEnded(exit()),
                5 => Event::RetryDue,
                4 => {
                    let (reply, answer) = oneshot::channel();
                    destroys.push(answer);
                    Event::DestroyRequested(reply)
                }
                _ => continue,
            };
            let (next, actions) = sandbox.take().expect("always one").on(event);
            for action in actions {
                match action {
                    // The build goes on to its end, which may also be success.
                    Action::CancelBuild => assert!(building, "seed {seed}: nothing to cancel"),
                    Action::TearDown(vm) => {
                        assert!(!building, "seed {seed}: taken down while it is built");
                        assert!(tearing_down.is_none(), "seed {seed}: two teardowns");
                        tearing_down = Some(vm);
                    }
                    Action::Bury(_) => {}
                    Action::AnswerCreate(reply, outcome) => drop(reply.send(outcome)),
                    Action::AnswerDestroys(replies, outcome) => {
                        let outcome = outcome.map_err(Arc::new);
                        for reply in replies {
                            drop(reply.send(outcome.clone()));
                        }
                    }
                }
            }
            sandbox = Some(next);
        }
        assert!(
            !building && tearing_down.is_none(),
            "seed {seed}: gone with work under way"
        );
        assert_eq!(alive.load(Ordering::SeqCst), 0, "seed {seed}: something has no owner");
        assert!(created.try_recv().is_ok(), "seed {seed}: the create was not answered");
        for mut destroy in destroys {
            assert!(destroy.try_recv().is_ok(), "seed {seed}: a destroy was not answered");
        }
    }
}
