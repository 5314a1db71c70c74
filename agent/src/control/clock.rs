//! Moments, and how long ago they were: by the longer of two clocks, neither of which anybody can set.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tokio::time::Instant;

/// A moment on the clock of our timers, and on the kernel's clock that goes on while the host sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    timers: Instant,
    boot: Duration,
}

impl Moment {
    /// Now.
    pub fn now() -> Self {
        let boot = clock_gettime(ClockId::Boottime);
        let nanos = u32::try_from(boot.tv_nsec).expect("less than a second");
        Self {
            timers: Instant::now(),
            boot: Duration::new(u64::try_from(boot.tv_sec).expect("counts from zero"), nanos),
        }
    }

    /// How long `earlier` was before this, at most: the clock of our timers stands still while a host sleeps, and where time is
    /// simulated it is the one that goes.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        let timers = self.timers.saturating_duration_since(earlier.timers);
        timers.max(self.boot.saturating_sub(earlier.boot))
    }

    /// So much later.
    #[must_use]
    pub fn after(self, time: Duration) -> Self {
        Self {
            timers: self.timers + time,
            boot: self.boot + time,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longer_clock_counts() {
        let now = Moment::now();
        let (short, long) = (Duration::from_secs(1), Duration::from_secs(100));
        let slept = Moment {
            timers: now.timers + short,
            boot: now.boot + long,
        };
        let simulated = Moment {
            timers: now.timers + long,
            boot: now.boot + short,
        };
        assert_eq!([slept.since(now), simulated.since(now)], [long; 2]);
        assert_eq!(now.since(slept), Duration::ZERO);
    }
}
