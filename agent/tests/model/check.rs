//! Whether everything has an owner: what there is on the host against what the agent lists, while nothing is under way.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use roost_agent::errors::Chain;
use roost_agent::registry::Registry;
use roost_agent::sandbox::record::{PauseReason, Phase, Record};
use roost_agent::sandbox::task::{Handle, View};
use roost_common::ids::{SandboxId, Slot};

use crate::vmm::State;
use crate::world::{Inner, World};

fn names(dir: &Path) -> BTreeSet<String> {
    let Ok(entries) = std::fs::read_dir(dir) else {
        return BTreeSet::new();
    };
    entries
        .map(|entry| entry.expect("read").file_name().to_string_lossy().into_owned())
        .collect()
}

/// Compares all there is with what is listed.
pub(crate) fn owners(world: &World, registry: &Registry) {
    let listed: BTreeMap<SandboxId, (Slot, View, bool)> = registry
        .list()
        .iter()
        .map(|handle| {
            let is_held = handle.hold_state().is_held();
            (handle.plan.id.clone(), (handle.slot.slot(), handle.view(), is_held))
        })
        .collect();
    let slots: BTreeSet<Slot> = listed.values().map(|(slot, ..)| *slot).collect();
    let mut wrong = Vec::new();
    if slots.len() < listed.len() {
        wrong.push(format!("two sandboxes have one slot: {slots:?}"));
    }
    let (files, runs) = (names(&world.path("lib/sandboxes")), names(&world.path("run")));
    wrong.extend(registry.list().iter().filter_map(|handle| record(registry, handle)));
    let mut inner = world.lock();
    inner.collect();
    for (id, (slot, view, is_held)) in &listed {
        let there = There::of(&inner, id, *slot);
        match view {
            View::Running(..)
                if there.vms == (1, 0) && there.stands_still == *is_held && there.disks == 1 && there.networks == 1 => {
            }
            View::Paused(_) if there == There::default() && !runs.contains(id.as_str()) => {}
            // It could not be ended in time, and its run directory, through which it can be, is there.
            View::Paused(_) if inner.stubborn.contains(id) && there.vms.0 == 0 && runs.contains(id.as_str()) => {}
            // Its shim has not answered this agent yet.
            View::Unreachable if there.vms.0 + there.vms.1 <= 1 => {}
            view => wrong.push(format!("{id} in slot {slot} is {}, and has {there:?}", view.name())),
        }
        if !files.contains(id.as_str()) {
            wrong.push(format!("{id} is listed, and has no files"));
        }
    }
    let is_listed = |name: &String| name.parse().is_ok_and(|id| listed.contains_key(&id));
    for name in files.union(&runs).filter(|name| !is_listed(name)) {
        wrong.push(format!("{name} is not listed, and has files"));
    }
    for shim in inner.shims.values() {
        match &shim.vm {
            None => wrong.push("a shim waits for a launch that nobody asks for".into()),
            Some(vm) if is_listed(&vm.spec.sandbox.to_string()) || vm.is_dying => {}
            Some(vm) => wrong.push(format!("{} is not listed, and has a VM", vm.spec.sandbox)),
        }
    }
    let vms = inner.shims.len();
    let (disks, networks) = (inner.disks.len(), inner.networks.len());
    if (disks, networks) != (vms, vms) {
        wrong.push(format!("{vms} VMs have {disks} disks and {networks} networks"));
    }
    inner.wrong.extend(wrong);
}

/// What a sandbox's record says that it is not.
fn record(registry: &Registry, handle: &Handle) -> Option<String> {
    let id = &handle.plan.id;
    let record = match Record::read(&registry.host().layout, id) {
        Ok(record) => record,
        Err(error) => return Some(format!("{id} has no record: {}", Chain(&error))),
    };
    let as_it_should_be = match (handle.view(), record.phase) {
        (View::Running(..), Phase::Running) => true,
        // Whoever did not ask for it has been told.
        (View::Paused(_), Phase::Paused(kept)) => kept.told || kept.reason == PauseReason::Requested,
        (View::Unreachable, Phase::Running | Phase::Thawing(_)) => true,
        _ => false,
    };
    if record.plan.egress != *handle.egress() {
        return Some(format!(
            "{id} may reach {:?}, and its record says {:?}",
            handle.egress(),
            record.plan.egress
        ));
    }
    let name = handle.view().name();
    (!as_it_should_be).then(|| format!("{id} is {name}, and its record says {:?}", record.phase))
}

/// Says which sandboxes that run are let through to something else than they may reach, where nothing has failed.
pub(crate) fn policies(world: &World, registry: &Registry) {
    for handle in registry.list() {
        let may = handle.egress().policy(&registry.host().resolvers());
        let is = world.lock().policy_in(handle.slot.slot()).cloned();
        if matches!(handle.view(), View::Running(..)) && is.as_ref() != Some(&may) {
            let id = &handle.plan.id;
            world.wrong(format!("{id} may reach {may:?}, and is let through to {is:?}"));
        }
    }
}

/// What there is of one sandbox.
#[derive(Debug, Default, PartialEq, Eq)]
struct There {
    /// Those that run, and those that were told to end.
    vms: (usize, usize),
    /// Whether the processors of one of those that run stand still.
    stands_still: bool,
    disks: usize,
    networks: usize,
}

impl There {
    fn of(inner: &Inner, id: &SandboxId, slot: Slot) -> Self {
        let vms = inner.shims.values().filter_map(|shim| shim.vm.as_ref());
        let (ending, running): (Vec<_>, Vec<_>) = vms
            .filter(|vm| vm.spec.sandbox == *id)
            .partition(|vm| vm.is_dying || vm.is_deaf);
        Self {
            vms: (running.len(), ending.len()),
            stands_still: running.iter().any(|vm| vm.vmm.state != State::Running),
            disks: inner.disks.iter().filter(|disk| disk.id == *id).count(),
            networks: inner.networks.iter().filter(|network| network.slot == slot).count(),
        }
    }
}

/// Says which guests stand still, or run on, although nothing has failed and nobody has used them for an hour.
pub(crate) fn idleness(world: &World, registry: &Registry) {
    let mut inner = world.lock();
    let frozen = inner.shims.values().filter_map(|shim| shim.vm.as_ref());
    let frozen = frozen.filter(|vm| vm.vmm.memory.is_frozen);
    let mut wrong: Vec<String> = frozen.map(|vm| format!("{} is frozen", vm.spec.sandbox)).collect();
    for handle in registry.list() {
        if handle.timeout_sec() > 0 && matches!(handle.view(), View::Running(..)) {
            wrong.push(format!("{} is not paused for want of use", handle.plan.id));
        }
    }
    inner.wrong.extend(wrong);
}

/// Says what is left where nothing may be; `with_templates`: nor of templates that were deleted.
pub(crate) fn nothing_is_left(world: &World, registry: &Registry, with_templates: bool) {
    owners(world, registry);
    let mut left = Vec::new();
    left.extend(
        registry
            .list()
            .iter()
            .map(|handle| format!("{} is listed", handle.plan.id)),
    );
    let teams = world.path("lib/images/teams");
    for team in names(&teams) {
        let there = names(&teams.join(team)).into_iter();
        let there = there.filter(|name| with_templates || !name.starts_with(".deleted-"));
        left.extend(there.map(|name| format!("the template {name} is there")));
    }
    for slot in world.guests.iter().map(|(slot, _)| *slot) {
        if registry.host().slots.lease_this(slot).is_none() {
            left.push(format!("slot {slot} is taken"));
        }
    }
    let mut inner = world.lock();
    if !inner.shims.is_empty() {
        left.push(format!("{} shims run", inner.shims.len()));
    }
    inner
        .wrong
        .extend(left.into_iter().map(|what| format!("all was destroyed, and {what}")));
}
