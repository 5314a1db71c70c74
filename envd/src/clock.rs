//! The guest's clock: it stops while the VM is paused, and only the host can say by how much.
//!
//! The decision is a plain function of times that come as arguments; [`step`] is the effect.

use std::time::{Duration, SystemTime};

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

/// Behind the host by more than this is stepped: the message's own way takes less.
const BEHIND: Duration = Duration::from_millis(50);

/// Ahead of the host by more than this is stepped: less may be the host's message having waited, and clocks that go
/// back break programs.
const AHEAD: Duration = Duration::from_secs(5);

/// What the host said before.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    last: Option<SystemTime>,
    lifecycle: Option<String>,
}

/// What a message from the host asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Near enough.
    Keep,
    /// Older than what the host said before: it overtook nothing, it was late.
    Stale,
    Step,
}

impl Clock {
    /// Takes note of what the host says while the guest's clock shows `now`, and decides.
    pub(crate) fn hear(&mut self, now: SystemTime, host: SystemTime, lifecycle: Option<&str>) -> Decision {
        let woken = lifecycle.is_some() && lifecycle != self.lifecycle.as_deref();
        if !woken && self.last.is_some_and(|last| host < last) {
            return Decision::Stale;
        }
        self.last = Some(host);
        if woken {
            self.lifecycle = lifecycle.map(str::to_owned);
        }
        let ahead = if woken { BEHIND } else { AHEAD };
        let off = match host.duration_since(now) {
            Ok(behind) => behind > BEHIND,
            Err(error) => error.duration() > ahead,
        };
        if off { Decision::Step } else { Decision::Keep }
    }
}

/// Sets the machine's clock.
///
/// # Errors
/// EPERM without CAP_SYS_TIME; EINVAL for a time before 1970.
pub(crate) fn step(to: SystemTime) -> nix::Result<()> {
    let since = to
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_err(|_| nix::Error::EINVAL)?;
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(since))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(1_000_000 + millis)
    }

    #[test]
    fn a_clock_is_stepped_when_it_is_behind_by_50_ms_or_ahead_by_5_s() {
        let decide = |now, host| Clock::default().hear(at(now), at(host), None);
        assert_eq!(decide(0, 50), Decision::Keep);
        assert_eq!(decide(0, 51), Decision::Step);
        assert_eq!(decide(5000, 0), Decision::Keep);
        assert_eq!(decide(5001, 0), Decision::Step);
    }

    #[test]
    fn a_late_message_is_ignored_unless_the_guest_has_woken_since() {
        let mut clock = Clock::default();
        assert_eq!(clock.hear(at(100_000), at(100_000), Some("first")), Decision::Keep);
        assert_eq!(clock.hear(at(100_000), at(50_000), Some("first")), Decision::Stale);
        assert_eq!(clock.hear(at(100_000), at(50_000), None), Decision::Stale);
        assert_eq!(clock.hear(at(100_000), at(50_000), Some("second")), Decision::Step);
        assert_eq!(clock.hear(at(50_000), at(60_000), Some("second")), Decision::Step);
    }

    #[test]
    fn a_guest_that_woke_is_stepped_back_at_50_ms_too() {
        let mut clock = Clock::default();
        assert_eq!(clock.hear(at(50), at(0), Some("first")), Decision::Keep);
        assert_eq!(clock.hear(at(51), at(0), Some("second")), Decision::Step);
        assert_eq!(clock.hear(at(51), at(0), Some("second")), Decision::Keep);
    }
}
