//! Delivery: a few events at a time, one of a sandbox at most, and a pause for all of them while the receiver takes none.
//!
//! All events have one destination, so one that it could not take says something about all: nothing is tried during a pause, and
//! one event is tried after it. An event that the receiver never can take, and does not refuse, costs the others such a pause each
//! time that it has its turn, and no more: turns go round.

use std::convert::Infallible;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use super::{Event, Outbox, Shared};
use crate::sandbox::build::fill_random;

/// Most deliveries at a time: enough to hide a slow answer, few enough to be no burden after a long absence.
const PLACES: usize = 4;
/// How long a delivery may take. Receivers have shorter limits of their own; this one keeps a forgotten one from holding a place.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(60);
/// The longest pause.
const MAX_PAUSE: Duration = Duration::from_secs(60);

/// What became of a delivery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delivery {
    /// It was taken.
    Delivered,
    /// It was not taken, and may be at another time.
    Later,
    /// It was not taken, and never will be: why. The event is logged, counted and forgotten.
    Refused(String),
}

/// Takes events to where they belong.
pub trait Deliver: Send + Sync + 'static {
    /// Delivers one event. Called for several events at a time, of different sandboxes; an event may come twice. Cancelled after a
    /// minute, which is as [`Delivery::Later`].
    fn deliver(&self, event: &Event) -> impl Future<Output = Delivery> + Send;
}

/// Delivers what is put, for ever. Dropping it stops deliveries that are under way; those events stay, and another run goes on
/// with them.
pub async fn run(outbox: Outbox, deliver: impl Deliver) -> Infallible {
    let deliver = Arc::new(deliver);
    let mut backoff = Backoff::default();
    let mut under_way = JoinSet::new();
    loop {
        while under_way.len() < backoff.places(Instant::now())
            && let Some(turn) = Turn::take(&outbox)
        {
            under_way.spawn(attempt(turn, deliver.clone(), backoff.round));
        }
        let pause = backoff.pause_until;
        tokio::select! {
            Some(attempt) = under_way.join_next() => {
                let (turn, round, answer) = attempt.expect("a delivery does not panic");
                match answer {
                    Answer::Taken => backoff.answered(round),
                    Answer::Later => backoff.failed(round, Instant::now(), random()),
                }
                // Only now, or the same event would be tried again before the pause.
                drop(turn);
            }
            () = sleep_until(pause.unwrap_or_else(Instant::now)), if backoff.is_pausing(Instant::now()) => {}
            () = outbox.shared.changed.notified() => {}
        }
    }
}

/// Whether the receiver answered.
enum Answer {
    Taken,
    Later,
}

async fn attempt(turn: Turn, deliver: Arc<impl Deliver>, round: u64) -> (Turn, u64, Answer) {
    let event = turn.event.clone();
    let delivery = timeout(ATTEMPT_LIMIT, deliver.deliver(&event)).await;
    let answer = match delivery.unwrap_or(Delivery::Later) {
        Delivery::Delivered => {
            turn.shared.settle(turn.number);
            Answer::Taken
        }
        Delivery::Refused(reason) => {
            tracing::error!(
                sandbox_id = %event.sandbox_id, event = ?event.event, reason = super::shown(&reason),
                "a lifecycle event was refused and is forgotten"
            );
            turn.shared.refuse(turn.number);
            Answer::Taken
        }
        Delivery::Later => Answer::Later,
    };
    (turn, round, answer)
}

/// The turn of a sandbox, taken; dropping it gives it back.
struct Turn {
    shared: Arc<Shared>,
    number: u64,
    event: Arc<Event>,
}

impl Turn {
    fn take(outbox: &Outbox) -> Option<Self> {
        let shared = outbox.shared.clone();
        let (number, event) = shared.state().backlog.take_turn()?;
        Some(Self { shared, number, event })
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.shared.state().backlog.end_turn(&self.event.sandbox_id);
        self.shared.changed.notify_one();
    }
}

/// When the receiver is tried again that took nothing.
#[derive(Debug, Default)]
struct Backoff {
    /// In a row.
    failures: u32,
    pause_until: Option<Instant>,
    /// Counts pauses: an attempt from before a pause says nothing about what comes after it.
    round: u64,
}

impl Backoff {
    /// How many deliveries there may be at a time.
    fn places(&self, now: Instant) -> usize {
        match self.pause_until {
            None => PLACES,
            Some(end) if now >= end => 1,
            Some(_) => 0,
        }
    }

    fn is_pausing(&self, now: Instant) -> bool {
        self.pause_until.is_some_and(|end| now < end)
    }

    /// An attempt of `round` had no answer. `random` spreads hosts that were refused together.
    fn failed(&mut self, round: u64, now: Instant, random: u32) {
        if round != self.round {
            return;
        }
        if self.failures == 0 {
            tracing::warn!("lifecycle events cannot be delivered; they are kept");
        }
        self.failures += 1;
        self.round += 1;
        self.pause_until = Some(now + pause(self.failures, random));
    }

    /// An attempt of `round` had one.
    fn answered(&mut self, round: u64) {
        if round != self.round {
            return;
        }
        if self.failures > 0 {
            tracing::info!(failures = self.failures, "lifecycle events are delivered again");
        }
        self.failures = 0;
        self.pause_until = None;
    }
}

/// The pause after so many failures in a row: 1 to 2 s, 2 to 4 s, and so on to 30 to 60 s.
fn pause(failures: u32, random: u32) -> Duration {
    let longest = Duration::from_secs(1 << failures.min(6)).min(MAX_PAUSE);
    longest / 2 + (longest / 2).mul_f64(f64::from(random) / f64::from(u32::MAX))
}

fn random() -> u32 {
    let mut bytes = [0; 4];
    fill_random(&mut bytes);
    u32::from_ne_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_from_a_second_to_a_minute_and_are_spread_over_half_of_themselves() {
        for (failures, shortest, longest) in [
            (1, 1, 2),
            (2, 2, 4),
            (5, 16, 32),
            (6, 30, 60),
            (7, 30, 60),
            (u32::MAX, 30, 60),
        ] {
            assert_eq!(pause(failures, 0), Duration::from_secs(shortest), "{failures}");
            assert_eq!(pause(failures, u32::MAX), Duration::from_secs(longest), "{failures}");
        }
    }

    #[test]
    fn attempts_that_fail_together_are_one_failure() {
        let now = Instant::now();
        let mut backoff = Backoff::default();
        for _ in 0..PLACES {
            backoff.failed(0, now, 0);
        }
        let end = now + Duration::from_secs(1);
        assert_eq!((backoff.places(now), backoff.pause_until), (0, Some(end)));
        backoff.answered(0);
        assert_eq!(backoff.places(now), 0, "an attempt from before the pause has ended it");
        assert_eq!(backoff.places(end), 1);
        backoff.failed(1, end, 0);
        assert_eq!(backoff.pause_until, Some(end + Duration::from_secs(2)));
        backoff.answered(2);
        assert_eq!(backoff.places(end), PLACES);
    }
}
