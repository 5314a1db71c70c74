//! Takes the samples: every second of every sandbox that runs, a bounded number at a time.
//!
//! CPU time is the VM's cgroup's, which no guest can lie about; memory and disk are what the guest says. It is asked every few seconds
//! only, because asking wakes it. One that does not answer has what it said last.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{self, StreamExt as _};
use roost_common::guest::Metrics;
use roost_common::ids::SandboxId;
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
    age: u32,
}

impl Known {
    fn new(guest: Arc<Guest>) -> Self {
        Self {
            guest,
            cpu: None,
            said: None,
            age: 0,
        }
    }
}

/// Samples for ever.
pub async fn run(registry: Arc<Registry>) {
    let mut known: HashMap<SandboxId, Known> = HashMap::new();
    let mut ticks = tokio::time::interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        ticks.tick().await;
        let running = registry.list().into_iter().filter_map(|handle| match handle.view() {
            // One that is held stands still, and its guest would not answer.
            View::Running(guest, _) if !handle.hold_state().is_held() => Some((handle, guest)),
            _ => None,
        });
        let mut before = std::mem::take(&mut known);
        let samples = running.map(|(handle, guest)| {
            let earlier = before
                .remove(&handle.plan.id)
                .filter(|known| Arc::ptr_eq(&known.guest, &guest));
            sample(handle, earlier.unwrap_or_else(|| Known::new(guest)))
        });
        known = stream::iter(samples).buffer_unordered(AT_A_TIME).collect().await;
    }
}

async fn sample(handle: Handle, mut known: Known) -> (SandboxId, Known) {
    if known.age == 0 {
        // What it said before is better than nothing.
        known.said = known.guest.metrics().await.ok().or(known.said);
    }
    known.age = (known.age + 1) % GUEST_EVERY;
    let cgroup = handle.hold_state().cgroup();
    let usage = cgroup.and_then(|cgroup| read_cgroup(&cgroup).ok()?.cpu_usec);
    let now = Instant::now();
    let earlier = std::mem::replace(&mut known.cpu, usage.map(|usec| (now, usec)));
    let cpu_percent = match (usage, earlier) {
        (Some(after), Some((then, before))) => percent(before, after, now - then, handle.plan.vcpus.0),
        // The first of this incarnation.
        (Some(_), None) => 0.0,
        // A host without a cgroup for each VM.
        (None, _) => known.said.as_ref().map_or(0.0, |said| said.cpu_used_pct),
    };
    let said = known.said.as_ref();
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
    (handle.plan.id.clone(), known)
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
