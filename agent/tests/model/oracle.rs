//! What callers may rely on, from what they were told and by nobody else's word.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use roost_agent::egress::Egress;
use roost_agent::host::files::Layout;
use roost_agent::registry::Registry;
use roost_agent::sandbox::record::{Phase, Record};
use roost_agent::sandbox::task::{Handle, View};
use roost_common::ids::SandboxId;

use crate::world::World;

/// What is known of a sandbox.
#[derive(Debug, Default, Clone)]
struct Fate {
    /// It has been seen or said to be paused, and nobody has asked for anything else since.
    is_paused: bool,
    /// It was made, and nobody has asked for its end.
    is_there: bool,
    /// It was made, and whoever wanted it went away before there was an answer.
    is_abandoned: bool,
    /// Calls that may change that, ever and under way.
    disturbances: u64,
    under_way: u32,
    /// Such a call was not answered, or with an error: it may go on by itself.
    lingers: bool,
    /// What it may reach, and whether its network has kept to that; `None` where somebody may have changed it.
    egress: Option<(Egress, bool)>,
    /// Calls that change that, ever, and those that were not answered.
    egress_changes: u64,
    egress_under_way: u32,
}

impl Fate {
    /// Whether nothing that may change it is under way.
    fn is_alone(&self) -> bool {
        self.under_way == 0 && !self.lingers
    }
}

/// What is known of all sandboxes. Outlives an agent.
#[derive(Debug, Default)]
pub(crate) struct Oracle(Mutex<BTreeMap<SandboxId, Fate>>);

/// A call that may bring a sandbox out of its state; it is under way for as long as this lives.
#[derive(Debug)]
pub(crate) struct Disturbance {
    oracle: Arc<Oracle>,
    id: SandboxId,
    was_paused: bool,
    number: u64,
    alone: bool,
    is_over: bool,
}

impl Drop for Disturbance {
    fn drop(&mut self) {
        let lingers = !self.is_over;
        self.oracle.fate(&self.id, |fate| {
            fate.under_way -= 1;
            fate.lingers |= lingers;
        });
    }
}

impl Disturbance {
    /// It was answered that it was done.
    pub(crate) fn was_done(mut self) {
        self.is_over = true;
    }

    /// It was answered that it has changed nothing.
    pub(crate) fn was_in_vain(mut self) {
        self.is_over = true;
        let (number, was_paused) = (self.number, self.was_paused && self.alone);
        self.oracle.fate(&self.id, |fate| {
            fate.is_paused |= was_paused && fate.disturbances == number && !fate.lingers;
        });
    }
}

/// What was going on when something was asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Before(Option<u64>);

impl Oracle {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<SandboxId, Fate>> {
        self.0.lock().expect("nothing panics while it holds this")
    }

    fn fate<T>(&self, id: &SandboxId, change: impl FnOnce(&mut Fate) -> T) -> T {
        change(self.lock().entry(id.clone()).or_default())
    }

    /// Somebody asks for a resume.
    pub(crate) fn disturb(self: &Arc<Self>, id: &SandboxId) -> Disturbance {
        let (was_paused, number, alone) = self.fate(id, |fate| {
            let alone = fate.is_alone();
            fate.disturbances += 1;
            fate.under_way += 1;
            (std::mem::take(&mut fate.is_paused), fate.disturbances, alone)
        });
        Disturbance {
            oracle: self.clone(),
            id: id.clone(),
            was_paused,
            number,
            alone,
            is_over: false,
        }
    }

    /// Somebody asks for its end.
    pub(crate) fn end(self: &Arc<Self>, id: &SandboxId) -> Disturbance {
        self.fate(id, |fate| {
            fate.is_there = false;
            fate.egress = None;
        });
        self.disturb(id)
    }

    /// A create was accepted. Whether that can be.
    pub(crate) fn may_be_made(&self, id: &SandboxId) -> bool {
        self.fate(id, |fate| {
            fate.is_abandoned = false;
            fate.egress = None;
            fate.egress_changes += 1;
            !fate.is_paused
        })
    }

    /// Somebody asks for another policy. Whether nobody else has, and how many have.
    pub(crate) fn egress_changes(&self, id: &SandboxId) -> Before {
        self.fate(id, |fate| {
            let alone = fate.egress_under_way == 0 && fate.is_alone();
            fate.egress = None;
            fate.egress_under_way += 1;
            fate.egress_changes += 1;
            Before(alone.then_some(fate.egress_changes + fate.disturbances))
        })
    }

    /// It was answered: that it is so from now on, or with an error.
    pub(crate) fn egress_changed(&self, id: &SandboxId, before: Before, egress: Option<Egress>) {
        self.fate(id, |fate| {
            fate.egress_under_way -= 1;
            if before.0 == Some(fate.egress_changes + fate.disturbances) {
                fate.egress = egress.map(|egress| (egress, true));
            }
        });
    }

    /// Nobody waits for its create any more.
    pub(crate) fn was_abandoned(&self, id: &SandboxId) {
        self.fate(id, |fate| fate.is_abandoned = true);
    }

    /// Somebody asks for a pause, or a create.
    pub(crate) fn before(&self, id: &SandboxId) -> Before {
        self.fate(id, |fate| Before(fate.is_alone().then_some(fate.disturbances)))
    }

    /// A create was answered: it runs.
    pub(crate) fn was_made(&self, id: &SandboxId, before: Before) {
        self.fate(id, |fate| fate.is_there |= before.0 == Some(fate.disturbances));
    }

    /// The host was started anew: nothing runs.
    pub(crate) fn rebooted(&self) {
        self.lock().values_mut().for_each(|fate| fate.is_there = false);
    }

    /// A pause was answered: it is paused.
    pub(crate) fn was_paused(&self, id: &SandboxId, before: Before) {
        self.fate(id, |fate| fate.is_paused |= before.0 == Some(fate.disturbances));
    }

    /// An agent begins. What a record says is on disk, and no VM runs that could be taken over, is paused whatever its predecessor was
    /// about to do with it.
    pub(crate) fn begins(&self, world: &World, layout: &Layout) {
        for (id, fate) in self.lock().iter_mut() {
            fate.lingers = false;
            // What was under way is done or not.
            if std::mem::take(&mut fate.egress_under_way) > 0 {
                fate.egress = None;
            }
            let runs = world
                .lock()
                .shims
                .values()
                .any(|shim| shim.vm.as_ref().is_some_and(|vm| vm.spec.sandbox == *id));
            fate.is_paused |= match Record::read(layout, id).map(|record| record.phase) {
                Ok(Phase::Paused(_) | Phase::Resuming(_)) => true,
                Ok(Phase::Thawing(_)) => !runs,
                Ok(Phase::Creating | Phase::Running) | Err(_) => false,
            };
        }
    }

    /// Compares what there is with what was said, while nobody calls. `all`: no VM has ended by itself, nor was anything else wrong.
    pub(crate) fn look(&self, world: &World, registry: &Registry, all: bool) {
        let ids: Vec<SandboxId> = self.lock().keys().cloned().collect();
        for id in ids {
            let handle = registry.find(&id);
            let view = handle.as_ref().map(|handle| handle.view());
            let (is_paused, is_running) = (
                matches!(view, Some(View::Paused(_))),
                matches!(view, Some(View::Running(..))),
            );
            let seen = view.as_ref().map_or("gone", View::name);
            let is_gone = view.is_none();
            let fate = self.fate(&id, |fate| {
                let before = fate.clone();
                fate.lingers = false;
                fate.is_paused |= is_paused;
                fate.egress_under_way = 0;
                before
            });
            if let Some(handle) = &handle
                && (is_paused || is_running)
            {
                self.look_at_egress(world, handle, fate.egress.as_ref(), is_running);
            }
            if fate.is_abandoned && !is_gone {
                world.wrong(format!(
                    "{id} was made for somebody who has gone away, and it is {seen}"
                ));
            }
            if fate.is_paused && !is_paused {
                world.wrong(format!(
                    "{id} was paused, nobody has asked for anything else, and it is {seen}"
                ));
            } else if all && fate.is_there && !is_paused && !is_running {
                world.wrong(format!(
                    "{id} was made, nobody has destroyed it, nothing has failed, and it is {seen}"
                ));
            }
        }
    }

    /// Compares what a sandbox may reach with what was said; from here on what is seen is known.
    fn look_at_egress(&self, world: &World, handle: &Handle, known: Option<&(Egress, bool)>, is_running: bool) {
        let id = &handle.plan.id;
        let (egress, policy) = (handle.egress(), world.lock().policy_in(handle.slot.slot()).cloned());
        // A sandbox that is paused has no network, and gets one that keeps to it.
        let is_kept = !is_running || policy == Some(egress.policy(&[]));
        if let Some((told, was_kept)) = known {
            if *told != *egress {
                world.wrong(format!("{id} may reach {egress:?}, and was to reach {told:?}"));
            } else if *was_kept && !is_kept {
                world.wrong(format!("{id} is let through to {policy:?}, and may reach {egress:?}"));
            }
        }
        self.fate(id, |fate| fate.egress = Some(((*egress).clone(), is_kept)));
    }
}
