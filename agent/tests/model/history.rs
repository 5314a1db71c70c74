//! One history: some lives of an agent, in each of which callers ask for this and that.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use roost_agent::config::Config;
use roost_agent::drain::drain;
use roost_agent::errors::Chain;
use roost_agent::host::Host;
use roost_agent::host::files::Layout;
use roost_agent::host::slots::SlotLease;
use roost_agent::outbox::{self, Outbox};
use roost_agent::recover::recover;
use roost_agent::registry::Registry;
use roost_agent::sandbox::resume::From;
use roost_agent::sandbox::task::{Handle, View};
use roost_agent::sandbox::{Kept, ResumeWish, record};
use roost_agent::{templates, watermark};
use roost_common::ids::{SandboxId, Slot};
use tokio::runtime::{Builder, Runtime};

use crate::caller::{Caller, templates as all_templates};
use crate::dice::Dice;
use crate::oracle::Oracle;
use crate::world::{SLOTS, World, moment_of};
use crate::{check, guest, privd, shim, vmm};

/// One more than there are slots.
const IDS: u32 = SLOTS + 1;
/// Callers at a time.
const CALLERS: u64 = 4;
/// How long it may take until nothing is under way any more.
const REST_LIMIT: Duration = Duration::from_secs(4 * 3600);

/// What is decided before a history begins.
struct History {
    world: Arc<World>,
    oracle: Arc<Oracle>,
    ids: Vec<SandboxId>,
    dice: Dice,
    /// How many calls of a thousand go wrong.
    faults: u64,
}

/// A runtime in simulated time: the clock jumps to the next timer once no task can run, no socket has anything for one, and no work is
/// under way on another thread.
fn runtime() -> Runtime {
    Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        // In the order in which it was asked for, so that a history can be played again.
        .max_blocking_threads(1)
        .build()
        .expect("a runtime")
}

/// Plays a history. What was wrong with it.
pub(crate) fn play(seed: u64) -> Vec<String> {
    let mut dice = Dice::new(seed);
    let faults = dice.one_of(&[0, 3, 10, 30, 80]);
    let lives = 1 + dice.roll(3);
    let mut history = History {
        world: World::new(seed),
        oracle: Arc::default(),
        ids: (1..=IDS).map(|n| format!("s{n}").parse().expect("an id")).collect(),
        dice,
        faults,
    };
    for life in 1..=lives {
        history.live(life == lives);
        let wrong = std::mem::take(&mut history.world.lock().wrong);
        if !wrong.is_empty() {
            return wrong;
        }
    }
    Vec::new()
}

impl History {
    fn live(&mut self, is_last: bool) {
        let world = self.world.clone();
        let crash_in = (!is_last && self.dice.chance(700)).then(|| 1 + self.dice.roll(400));
        // A start that finds nothing wrong finds everything.
        let start_faults = if is_last { 0 } else { self.faults };
        world.set_faults(start_faults);
        world.lock().crash_in = crash_in;
        // Asked for by a life that ended before it came to that.
        world.crash.notified().now_or_never();
        let runtime = runtime();
        runtime.block_on(async {
            tokio::spawn(privd::serve(world.clone()));
            tokio::spawn(shim::serve(world.clone()));
            for (slot, listener) in &world.guests {
                let listener = listener.try_clone().expect("duplicated");
                tokio::spawn(guest::serve(world.clone(), *slot, listener));
            }
            tokio::select! {
                () = self.go_on(is_last) => {}
                () = world.crash.notified() => {}
            }
        });
        // Everything that the agent was about to do ends here.
        drop(runtime);
        world.agent_is_gone();
        if !is_last && self.dice.chance(150) {
            world.reboot();
            self.oracle.rebooted();
        }
    }

    async fn go_on(&mut self, is_last: bool) {
        let world = self.world.clone();
        self.oracle
            .begins(&world, &Layout::new(&world.path("lib"), &world.path("run")));
        let agent = Agent::start(&world, self.dice.chance(250)).await;
        agent.rest(&world).await;
        self.oracle.look(&world, &agent.registry, false);
        if is_last {
            check::policies(&world, &agent.registry);
        }
        for _ in 0..1 + self.dice.roll(2) {
            world.set_faults(self.faults);
            let mut callers = tokio::task::JoinSet::new();
            for _ in 0..CALLERS {
                let caller = Caller {
                    world: world.clone(),
                    oracle: self.oracle.clone(),
                    registry: agent.registry.clone(),
                    ids: self.ids.clone(),
                    dice: Dice::new(self.dice.roll(1 << 40)),
                    is_calm: self.faults == 0,
                };
                callers.spawn(caller.call(2 + self.dice.roll(8)));
            }
            callers.join_all().await;
            agent.rest(&world).await;
            check::owners(&world, &agent.registry);
            self.oracle.look(&world, &agent.registry, self.faults == 0);
        }
        if self.faults == 0 {
            tokio::time::sleep(Duration::from_secs(3600)).await;
            check::idleness(&world, &agent.registry);
            check::policies(&world, &agent.registry);
        }
        if is_last {
            let with_drain = self.dice.chance(300);
            agent.end_all(&world, &self.oracle, with_drain).await;
        } else if self.dice.chance(200) {
            drop(drain(&agent.registry).await);
            agent.rest(&world).await;
            check::owners(&world, &agent.registry);
        }
    }
}

/// The agent, but for its API.
struct Agent {
    registry: Arc<Registry>,
    /// Those of the network plan that have no guests here.
    _taken: Vec<SlotLease>,
}

impl Agent {
    async fn start(world: &Arc<World>, with_watermark: bool) -> Self {
        let config = Config {
            dir: world.path("lib"),
            vm_run_dir: world.path("run"),
            privd_socket: world.path("privd.sock"),
            shim_socket: world.path("shim.sock"),
            dns: Some(Vec::new()),
            disk_reserve_mb: 0,
            guests: world.guest_net,
            ..Config::default()
        };
        let host = Host::new(config);
        let outbox = Outbox::open(&host.layout.outbox(), outbox::Limits::default()).expect("an outbox");
        let host = Arc::new(host.with_outbox(outbox));
        let taken = (SLOTS + 1..=u32::from(Slot::MAX))
            .filter_map(|number| host.slots.lease_this(Slot::try_from(number).expect("a slot")))
            .collect();
        let registry = Registry::new(host);
        recover(&registry).await.expect("recovered");
        if with_watermark {
            watermark::start(registry.clone()).await;
        }
        Self {
            registry,
            _taken: taken,
        }
    }

    /// Waits until nothing is under way. What cannot be reached need not be for as long as something may go wrong.
    async fn rest(&self, world: &World) {
        let is_at_rest = |handle: &Handle| match handle.view() {
            View::Running(..) | View::Paused(_) => !handle.hold_state().is_busy(),
            View::Unreachable => !*world.calm.borrow(),
            _ => false,
        };
        let came = async {
            let mut times = 0;
            // More than once, for what has just been let go of is closed on another thread.
            while times < 3 {
                tokio::time::sleep(Duration::from_secs(1)).await;
                let all = self.registry.list().iter().all(is_at_rest);
                times = if all { times + 1 } else { 0 };
            }
        };
        if tokio::time::timeout(REST_LIMIT, came).await.is_err() {
            let left = self.registry.list();
            let left = left.iter().filter(|handle| !is_at_rest(handle));
            let left: Vec<_> = left
                .map(|handle| (handle.plan.id.as_str().to_owned(), handle.view().name()))
                .collect();
            world.wrong(format!("never at rest: {left:?}"));
        }
    }

    /// Nothing goes wrong any more: what is paused resumes, and what is destroyed leaves nothing.
    async fn end_all(&self, world: &Arc<World>, oracle: &Arc<Oracle>, with_drain: bool) {
        world.set_faults(0);
        // A VM that has been told to end does so in this time.
        tokio::time::sleep(Duration::from_secs(600)).await;
        self.rest(world).await;
        oracle.look(world, &self.registry, false);
        if with_drain {
            let drained = drain(&self.registry).await;
            if !drained.failed.is_empty() {
                world.wrong(format!("not drained: {:?}", drained.failed));
            }
        } else {
            for handle in self.registry.list() {
                if let View::Paused(kept) = handle.view() {
                    self.resume(world, &handle, kept).await;
                }
            }
        }
        self.rest(world).await;
        check::owners(world, &self.registry);
        for template in all_templates() {
            templates::delete(&self.registry.host().layout.images(), template).expect("deleted");
        }
        // Those that are deleted go with the last sandbox that needs one.
        let goes = |handle: &Handle| !handle.plan.template.is_minimal();
        let with_templates = self.registry.list().iter().any(goes);
        for handle in self.registry.list() {
            if let Err(error) = handle.destroy().await {
                world.wrong(format!(
                    "{} is not destroyed: {}",
                    handle.plan.id,
                    Chain(error.as_ref())
                ));
            }
        }
        self.rest(world).await;
        // A slot is free once nobody looks at its sandbox any more, such as the watermark, which may wait for privd.
        tokio::time::sleep(Duration::from_secs(120)).await;
        check::nothing_is_left(world, &self.registry, with_templates);
    }

    async fn resume(&self, world: &World, handle: &Handle, kept: Kept) {
        let id = &handle.plan.id;
        // Two whole ones of one moment wake; anything else boots.
        let layout = &self.registry.host().layout;
        let memory = vmm::read_memory(&layout.generation(id, kept.generation));
        let disk = File::open(layout.cow(id)).map(|cow| moment_of(&cow)).ok();
        let must_wake = kept.memory == record::Memory::Whole && memory.map(|memory| memory.moment) == disk;
        let woken = handle.resume(ResumeWish::default()).await;
        let Err(error) = woken else { return };
        if must_wake {
            world.wrong(format!("{id} does not wake: {}", Chain(&error)));
        }
        let wish = ResumeWish {
            from: From::Disk,
            ..ResumeWish::default()
        };
        if let Err(error) = handle.resume(wish).await {
            world.wrong(format!("{id} is lost: {}", Chain(&error)));
        }
    }
}
