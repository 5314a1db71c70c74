//! Room on the disk: some is kept for the memory of every running sandbox, so that all of them can be paused at any time.
//!
//! ```text
//! free space
//!   ^  above the reserve: all is well, a guest that is held runs again
//!   |------------------------------------- reserve: the memory of running sandboxes, and `disk_reserve_mb`
//!   |  creates and resumes are refused
//!   |------------------------------------- half of it
//!   |  the guest whose disk grows fastest is held: its processors are stopped, and it writes nothing more
//!   0
//! ```
//!
//! Why: the exception stores of disks are sparse, so guests together can fill the filesystem that they are on. A write that the host
//! has no room for makes dm-snapshot give up the whole disk, and that sandbox is lost; it must not come to that, and where it has, it
//! must be noticed. A paused sandbox is in no danger, for nothing writes to it.
//!
//! This looks every [`TICK`], for the whole host, at one `statvfs` and two small files for each running sandbox: the kernel has no
//! event for free space, and quotas, which have, are not on every filesystem. Guests fill a disk in minutes, not in seconds.
//!
//! Not here: stopping and resuming a VM (its task does that, [`crate::sandbox::hold`]), and what a caller is told ([`crate::api`]).

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use roost_common::ids::SandboxId;
use roost_common::names::DISK_PREFIX;
use roost_common::privd::InventoryRow;
use tokio::time::MissedTickBehavior;

use crate::errors::{Chain, FileError};
use crate::host::Host;
use crate::host::files::Layout;
use crate::registry::Registry;
use crate::sandbox::task::{Handle, View};
use crate::snapshot;

/// Time between two looks at the disk.
const TICK: Duration = Duration::from_secs(2);
/// Looks at the disk for each question whether a sandbox's disk is lost: every 30 s. In want of space it is asked at each of them.
const TICKS_A_QUESTION: u64 = 15;
/// Looks at a guest's disk over which its growth is measured: ten seconds, longer than a guest takes to write out what it has cached.
const WINDOW: usize = 6;
/// How long a guest may take to be held or released before the next look; its task goes on with it meanwhile.
const HOLD_LIMIT: Duration = Duration::from_secs(10);
/// Creates are taken again with this part of the reserve free on top of it, so that they are not refused and taken in turns.
const MARGIN: u64 = 8;

/// What a look at the host saw.
#[derive(Debug, Clone, Default)]
pub struct Look {
    /// Bytes that the agent may still use of the filesystem.
    pub free: u64,
    /// Bytes that are to stay free whatever runs.
    pub floor: u64,
    /// The sandboxes that run, or are about to.
    pub guests: Vec<GuestLook>,
}

/// What a look at one of them saw.
#[derive(Debug, Clone)]
pub struct GuestLook {
    /// The sandbox.
    pub id: SandboxId,
    /// Bytes of memory that a pause would write.
    pub memory: u64,
    /// Bytes that its exception store has allocated.
    pub disk: u64,
    /// Whether its processors are stopped for want of room.
    pub held: bool,
    /// Whether they could be: nothing else is being done with it.
    pub may_be_held: bool,
}

/// How much room there is, and how much is kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Space {
    /// Free bytes.
    pub free: u64,
    /// Bytes that are kept.
    pub reserve: u64,
}

/// What follows from a look.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Decision {
    /// What was seen.
    pub space: Space,
    /// Refuse creates and resumes.
    pub is_short: bool,
    /// Less than half of the reserve is free.
    pub urgent: bool,
    /// Stop this guest. At most one a look: the next one tells whether it was enough.
    pub hold: Option<SandboxId>,
    /// Let this guest run again. At most one a look: it may be what fills the disk.
    pub release: Option<SandboxId>,
}

/// Decides from look to look. Plain: it takes what was seen and does nothing.
#[derive(Debug, Default)]
pub struct Watermark {
    short: bool,
    /// The last sizes of each disk, oldest first, at most [`WINDOW`].
    disks: HashMap<SandboxId, VecDeque<u64>>,
    /// Who is held, longest first.
    held: Vec<SandboxId>,
    /// Who was to be held and is not, and for how many looks that is left at that.
    in_vain: HashMap<SandboxId, usize>,
}

impl Watermark {
    /// Takes a look, the next of those that come every [`TICK`].
    pub fn take(&mut self, look: &Look) -> Decision {
        self.remember(look);
        let memory = look.guests.iter().map(|guest| guest.memory);
        let reserve = memory.fold(look.floor, u64::saturating_add);
        let enough = if self.short {
            reserve.saturating_add(reserve / MARGIN)
        } else {
            reserve
        };
        self.short = look.free < enough;
        let urgent = look.free < reserve / 2;
        Decision {
            space: Space {
                free: look.free,
                reserve,
            },
            is_short: self.short,
            urgent,
            hold: if urgent { self.fastest(look) } else { None },
            release: if look.free >= reserve {
                self.longest_held()
            } else {
                None
            },
        }
    }

    fn remember(&mut self, look: &Look) {
        let seen = |id: &SandboxId| look.guests.iter().find(|guest| guest.id == *id);
        self.disks.retain(|id, _| seen(id).is_some());
        self.held.retain(|id| seen(id).is_some_and(|guest| guest.held));
        self.in_vain.retain(|id, looks| {
            *looks -= 1;
            *looks > 0 && seen(id).is_some_and(|guest| !guest.held)
        });
        for guest in &look.guests {
            let sizes = self.disks.entry(guest.id.clone()).or_default();
            if sizes.len() == WINDOW {
                sizes.pop_front();
            }
            sizes.push_back(guest.disk);
            if guest.held && !self.held.contains(&guest.id) {
                self.held.push(guest.id.clone());
            }
        }
    }

    /// The guest that has been held longest. It is the last one to be asked again, so that one that cannot be released keeps no other
    /// waiting.
    fn longest_held(&mut self) -> Option<SandboxId> {
        let id = self.held.first().cloned()?;
        self.held.rotate_left(1);
        Some(id)
    }

    /// The guest that runs and has grown most, where any has: stopping others would win nothing. One that cannot be held is not asked
    /// for again at once, so that it keeps no other from it.
    fn fastest(&mut self, look: &Look) -> Option<SandboxId> {
        let growth = |id: &SandboxId| {
            let sizes = self.disks.get(id)?;
            sizes.back()?.checked_sub(*sizes.front()?)
        };
        let candidates = look
            .guests
            .iter()
            .filter(|guest| guest.may_be_held && !guest.held && !self.in_vain.contains_key(&guest.id));
        let id = candidates
            .filter_map(|guest| Some((growth(&guest.id)?, &guest.id)))
            .filter(|(growth, _)| *growth > 0)
            .max_by_key(|(growth, _)| *growth)
            .map(|(_, id)| id.clone())?;
        self.in_vain.insert(id.clone(), WINDOW);
        Some(id)
    }
}

/// Looks once, so that what is answered from now on is right, and then for ever in a task of its own.
pub async fn start(registry: Arc<Registry>) {
    let mut watermark = Watermark::default();
    look_once(&registry, &mut watermark, 0).await;
    tokio::spawn(async move { go_on(&registry, watermark).await });
}

async fn go_on(registry: &Arc<Registry>, mut watermark: Watermark) -> Infallible {
    let mut ticks = tokio::time::interval(TICK);
    // One that came late makes the others late: growth is measured from look to look.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for number in 1.. {
        ticks.tick().await;
        look_once(registry, &mut watermark, number).await;
    }
    unreachable!("a u64 of ticks lasts longer than any host")
}

async fn look_once(registry: &Arc<Registry>, watermark: &mut Watermark, number: u64) {
    // Also those that are about to run, and those whose pause has not written all yet.
    let running = registry.those(|view| match view {
        View::Creating | View::Running(..) | View::Pausing | View::Resuming | View::Unreachable => true,
        View::Paused(_) | View::Destroying | View::Gone => false,
    });
    let seen = tokio::task::spawn_blocking({
        let (host, running) = (registry.host().clone(), running.clone());
        move || look(&host, &running)
    });
    let look = match seen.await.expect("file work does not panic") {
        Ok(look) => look,
        Err(error) => {
            tracing::error!(error = %Chain(&error), "the room on the disk is not known");
            return;
        }
    };
    let Decision {
        space,
        is_short,
        urgent,
        hold,
        release,
    } = watermark.take(&look);
    registry.room_is(space, is_short);
    let find = |id: Option<SandboxId>| id.and_then(|id| running.iter().find(|handle| handle.plan.id == id));
    if let Some(handle) = find(hold) {
        tracing::warn!(sandbox_id = %handle.plan.id, free = look.free, "held: the disk is nearly full, and this guest's grows fastest");
        drop(tokio::time::timeout(HOLD_LIMIT, handle.hold()).await);
    }
    if let Some(handle) = find(release) {
        tracing::info!(sandbox_id = %handle.plan.id, free = look.free, "runs again: there is room on the disk");
        drop(tokio::time::timeout(HOLD_LIMIT, handle.release()).await);
    }
    if (urgent || number % TICKS_A_QUESTION == 1) && !running.is_empty() {
        find_lost_disks(registry.host(), &running).await;
    }
}

/// Blocks, but for the disk at most as long as its metadata takes.
fn look(host: &Host, running: &[Handle]) -> Result<Look, FileError> {
    let dir = host.layout.sandboxes();
    let space = rustix::fs::statvfs(&dir).map_err(|errno| FileError::new("measuring", &dir, errno.into()))?;
    Ok(Look {
        free: space.f_bavail.saturating_mul(space.f_frsize),
        floor: u64::from(host.config().disk_reserve_mb) << 20,
        guests: running.iter().map(|handle| look_at(&host.layout, handle)).collect(),
    })
}

fn look_at(layout: &Layout, handle: &Handle) -> GuestLook {
    let id = handle.plan.id.clone();
    let all = u64::from(handle.plan.memory.0) << 20;
    let allocated = handle.hold_state().cgroup().and_then(memory_of);
    GuestLook {
        // The VMM's own and what its files have cached count too; more than all of the guest's a pause does not write.
        memory: allocated.map_or(all, |allocated| allocated.min(all)),
        // One that is not there any more has just been destroyed.
        disk: std::fs::metadata(layout.cow(&id)).map_or(0, |cow| snapshot::allocated(&cow).0),
        held: handle.hold_state().is_held(),
        may_be_held: matches!(handle.view(), View::Running(..)) && !handle.hold_state().is_busy(),
        id,
    }
}

/// Bytes that a cgroup has allocated.
fn memory_of(cgroup: PathBuf) -> Option<u64> {
    let text = std::fs::read_to_string(cgroup.join("memory.current")).ok()?;
    text.trim().parse().ok()
}

/// Asks privd for all disks, and ends the sandboxes of those that dm-snapshot has given up: their guests get errors for whatever they
/// read from now on, and nothing brings such a disk back.
async fn find_lost_disks(host: &Host, running: &[Handle]) {
    let rows = match host.privd.inventory().await {
        Ok(rows) => rows,
        Err(error) => {
            tracing::warn!(error = %Chain(&error), "whether a sandbox's disk is lost is not known");
            return;
        }
    };
    for id in lost_disks(&rows) {
        if let Some(handle) = running.iter().find(|handle| handle.plan.id.as_str() == id) {
            tracing::error!(sandbox_id = id, "its disk is lost, and it is ended");
            handle.disk_is_lost();
        }
    }
}

/// The ids of sandboxes whose snapshot can be used no more (`snapshot_status` in `drivers/md/dm-snap.c`): a write to the exception
/// store failed (`Invalid`), or it has no room left (`Overflow`).
fn lost_disks(rows: &[InventoryRow]) -> impl Iterator<Item = &str> {
    rows.iter().filter_map(|row| match row {
        InventoryRow::Device { name, status, .. } => {
            let lost = ["Invalid", "Overflow"].contains(&status.trim());
            name.strip_prefix(DISK_PREFIX).filter(|_| lost)
        }
        InventoryRow::Loop { .. } | InventoryRow::Veth { .. } => None,
    })
}

#[cfg(test)]
mod tests {
    use roost_common::privd::DiskNode;

    use super::*;

    fn id(name: &str) -> SandboxId {
        name.parse().expect("an id")
    }

    /// Guests of 100 bytes of memory each, by name and size of disk; those in capitals are held.
    fn look(free: u64, guests: &[(&str, u64)]) -> Look {
        Look {
            free,
            floor: 100,
            guests: guests
                .iter()
                .map(|(name, disk)| GuestLook {
                    id: id(&name.to_lowercase()),
                    memory: 100,
                    disk: *disk,
                    held: name.to_uppercase() == *name,
                    may_be_held: true,
                })
                .collect(),
        }
    }

    #[test]
    fn creates_are_refused_below_the_reserve_and_taken_again_somewhat_above_it() {
        let mut watermark = Watermark::default();
        // The reserve is 100 and twice 100.
        for (free, short) in [
            (301, false),
            (300, false),
            (299, true),
            (320, true),
            (336, true),
            (337, false),
            (300, false),
            (0, true),
        ] {
            let decision = watermark.take(&look(free, &[("a", 0), ("b", 0)]));
            assert_eq!(decision.space, Space { free, reserve: 300 });
            assert_eq!(decision.is_short, short, "{free} free");
            assert_eq!(decision.urgent, free < 150);
        }
        // With nobody running only the floor is kept.
        assert!(!watermark.take(&look(113, &[])).is_short);
        assert!(watermark.take(&look(99, &[])).is_short);
    }

    #[test]
    fn the_fastest_is_held_below_half_of_the_reserve_and_one_at_a_time() {
        let mut watermark = Watermark::default();
        let mut take = |free, guests: &[(&str, u64)]| watermark.take(&look(free, guests)).hold;
        assert_eq!(
            take(0, &[("a", 5), ("b", 50), ("c", 500)]),
            None,
            "nobody has grown yet"
        );
        assert_eq!(
            take(250, &[("a", 6), ("b", 60), ("c", 500)]),
            None,
            "not below half of 400"
        );
        assert_eq!(take(199, &[("a", 7), ("b", 70), ("c", 500)]), Some(id("b")));
        // Held, though it seems to have grown most over the window; so the next.
        assert_eq!(take(190, &[("a", 8), ("B", 75), ("c", 500)]), Some(id("a")));
        // Nobody who runs has grown: it is something else that fills the disk.
        assert_eq!(take(180, &[("A", 9), ("B", 75), ("c", 500)]), None);
    }

    #[test]
    fn one_that_cannot_be_held_or_released_keeps_no_other_from_it() {
        let mut watermark = Watermark::default();
        watermark.take(&look(900, &[("a", 0), ("b", 0)]));
        let both = [("a", 50), ("b", 5)];
        assert_eq!(watermark.take(&look(0, &both)).hold, Some(id("a")));
        // It runs on, and the next one is as good as any.
        assert_eq!(watermark.take(&look(0, &both)).hold, Some(id("b")));
        assert_eq!(watermark.take(&look(0, &both)).hold, None);
        for turn in 1..=WINDOW {
            let more = [("a", 50 + u64::try_from(turn).expect("small")), ("b", 5)];
            if let Some(again) = watermark.take(&look(0, &more)).hold {
                assert_eq!((again, turn >= WINDOW - 2), (id("a"), true), "asked again at once");
                break;
            }
            assert!(turn < WINDOW, "never asked again");
        }
        // What is busy is passed over.
        let mut watermark = Watermark::default();
        watermark.take(&look(900, &both));
        let mut busy = look(0, &[("a", 99), ("b", 6)]);
        busy.guests[0].may_be_held = false;
        assert_eq!(watermark.take(&busy).hold, Some(id("b")));
        let mut watermark = Watermark::default();
        let mut take = |free| watermark.take(&look(free, &[("A", 0), ("B", 0)])).release;
        assert_eq!(take(300), Some(id("a")));
        // Not obeyed: the other one is asked before it is asked again.
        assert_eq!((take(300), take(300)), (Some(id("b")), Some(id("a"))));
    }

    #[test]
    fn growth_is_that_of_the_last_looks_alone() {
        let mut watermark = Watermark::default();
        for size in [0, 1000] {
            watermark.take(&look(900, &[("a", size), ("b", 0)]));
        }
        for step in 1..=u64::try_from(WINDOW).expect("small") {
            watermark.take(&look(900, &[("a", 1000), ("b", step)]));
        }
        assert_eq!(watermark.take(&look(0, &[("a", 1000), ("b", 10)])).hold, Some(id("b")));
        // One that went and came back begins anew, and one whose file shrank has not grown.
        watermark.take(&look(900, &[]));
        assert_eq!(watermark.take(&look(0, &[("b", 500)])).hold, None);
        assert_eq!(watermark.take(&look(0, &[("b", 400)])).hold, None);
    }

    #[test]
    fn who_is_held_runs_again_with_the_reserve_free_longest_first_and_one_at_a_time() {
        let mut watermark = Watermark::default();
        let mut take = |free, guests: &[(&str, u64)]| watermark.take(&look(free, guests)).release;
        assert_eq!(take(10, &[("a", 0), ("B", 0)]), None);
        assert_eq!(take(10, &[("A", 0), ("B", 0)]), None);
        assert_eq!(
            take(299, &[("A", 0), ("B", 0)]),
            None,
            "held until there is room for all"
        );
        assert_eq!(take(300, &[("A", 0), ("B", 0)]), Some(id("b")));
        assert_eq!(take(300, &[("A", 0), ("b", 0)]), Some(id("a")));
        assert_eq!(take(300, &[("a", 0), ("b", 0)]), None);
    }

    #[test]
    fn a_disk_is_lost_when_its_snapshot_says_so() {
        let device = |name: &str, status: &str| InventoryRow::Device {
            name: name.into(),
            node: DiskNode { minor: 1 },
            open_count: 1,
            status: status.into(),
        };
        let rows = [
            device("roost-s-well", "128/2048 16"),
            device("roost-s-lost", "Invalid"),
            device("roost-s-full", "Overflow"),
            device("roost-o-1-2-3", ""),
            device("roost-o-9-2-3", "Invalid"),
            InventoryRow::Loop { number: 3 },
        ];
        assert_eq!(lost_disks(&rows).collect::<Vec<_>>(), ["lost", "full"]);
    }
}
