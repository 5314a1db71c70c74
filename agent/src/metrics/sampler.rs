//! Takes the samples: every second of every sandbox that runs.
//!
//! CPU time is the VM's cgroup's, which no guest can lie about; memory and disk are what the guest says. It is asked every few seconds
//! only, because asking wakes it, and by a task of its own: one that does not answer holds no other up, and has what it said last.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use roost_common::guest::Metrics;
use roost_common::ids::SandboxId;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

use super::Point;
use crate::activity::read_cgroup;
use crate::guest::Guest;
use crate::registry::Registry;
use crate::sandbox::task::{Handle, View};
use crate::sandbox::unix_now;

/// Between two samples.
const PERIOD: Duration = Duration::from_secs(1);
/// Samples between two questions to a guest.
const GUEST_EVERY: u32 = 5;
/// Guests that are asked at a time.
const AT_A_TIME: usize = 64;

/// What is known of a sandbox from its samples before. Of one incarnation: counters begin anew with another.
struct Known {
    guest: Arc<Guest>,
    cpu: Option<(Instant, u64)>,
    said: Option<Metrics>,
    /// The question that it has not answered yet; dropped with this.
    asked: JoinSet<Option<Metrics>>,
    samples: u32,
}

impl Known {
    fn new(guest: Arc<Guest>) -> Self {
        Self {
            guest,
            cpu: None,
            said: None,
            asked: JoinSet::new(),
            samples: 0,
        }
    }

    /// Takes the answer that has come, and asks where it is time.
    fn ask(&mut self, places: &Arc<Semaphore>) {
        while let Some(answer) = self.asked.try_join_next() {
            // What it said before is better than nothing.
            self.said = answer.ok().flatten().or(self.said.take());
        }
        if self.samples.is_multiple_of(GUEST_EVERY) && self.asked.is_empty() {
            let (guest, places) = (self.guest.clone(), places.clone());
            self.asked.spawn(async move {
                let _place = places.acquire_owned().await.ok()?;
                guest.metrics().await.ok()
            });
        }
        self.samples = self.samples.wrapping_add(1);
    }
}

/// Samples for ever.
pub async fn run(registry: Arc<Registry>) {
    let places = Arc::new(Semaphore::new(AT_A_TIME));
    let mut known: HashMap<SandboxId, Known> = HashMap::new();
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        ticks.tick().await;
        let mut before = std::mem::take(&mut known);
        for handle in registry.those(|view| matches!(view, View::Running(..))) {
            // One that is held stands still, and its guest would not answer.
            let View::Running(guest, _) = handle.view() else {
                continue;
            };
            if handle.hold_state().is_held() {
                continue;
            }
            let earlier = before
                .remove(&handle.plan.id)
                .filter(|known| Arc::ptr_eq(&known.guest, &guest));
            let mut now = earlier.unwrap_or_else(|| Known::new(guest));
            now.ask(&places);
            sample(&handle, &mut now);
            known.insert(handle.plan.id.clone(), now);
        }
    }
}

fn sample(handle: &Handle, known: &mut Known) {
    let cgroup = handle.hold_state().cgroup();
    let usage = cgroup.and_then(|cgroup| read_cgroup(&cgroup).ok()?.cpu_usec);
    let now = Instant::now();
    let earlier = std::mem::replace(&mut known.cpu, usage.map(|usec| (now, usec)));
    if known.said.is_none() && known.samples <= GUEST_EVERY {
        // A point without its memory would be a lie; one that never answers has its CPU time all the same.
        return;
    }
    let said = known.said.as_ref();
    let cpu_percent = match (usage, earlier) {
        (Some(after), Some((then, before))) => percent(before, after, now - then, handle.plan.vcpus.0),
        // The first of this incarnation.
        (Some(_), None) => 0.0,
        // A host without a cgroup for each VM.
        (None, _) => said.map_or(0.0, |said| said.cpu_used_pct),
    };
    let bytes = |bytes: Option<u64>| i64::try_from(bytes.unwrap_or_default()).unwrap_or(i64::MAX);
    handle.metrics.add(Point {
        unix: unix_now(),
        cpu_percent: if cpu_percent.is_nan() {
            0.0
        } else {
            cpu_percent.clamp(0.0, 100.0)
        },
        memory: bytes(said.map(|said| said.mem_used)),
        disk: bytes(said.map(|said| said.disk_used)),
    });
}

/// Percent of all vCPUs between two readings of a counter in µs.
fn percent(before: u64, after: u64, time: Duration, vcpus: u8) -> f64 {
    let most = time.as_micros() as f64 * f64::from(vcpus);
    if most == 0.0 {
        return 0.0;
    }
    after.saturating_sub(before) as f64 / most * 100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percents_are_of_all_vcpus() {
        let second = Duration::from_secs(1);
        assert_eq!(percent(0, 500_000, second, 1), 50.0);
        assert_eq!(percent(100, 1_000_100, second, 4), 25.0);
        assert_eq!(percent(7, 3, second, 1), 0.0, "a counter that began anew");
        assert_eq!(percent(0, 5, Duration::ZERO, 1), 0.0);
    }
}
