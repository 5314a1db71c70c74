//! How paused sandboxes are listed to a control plane: as paused, or for a while as alive.
//!
//! Every 15 s a control plane compares what it believes with ListSandboxes. While a host's heartbeat is older than 90 s it has the
//! host's running sandboxes for `missing`; once the host is there again it goes by the list:
//!
//! | it believes | listed as alive | listed as auto-paused | in neither list |
//! |---|---|---|---|
//! | running | nothing | paused | **stopped** |
//! | missing | running | **stopped, for good** | **stopped, for good** |
//! | paused, or anything else | nothing | nothing | nothing |
//!
//! So a sandbox that is paused must not be listed as such while it may be `missing` there, and it may be whenever the control plane
//! has not yet heard of the pause: it may have been paused before the gap, and the answer that said so been lost. Listed as alive it
//! is in no danger whatever is believed, and once it is `running` there the next list makes it `paused`. Hence:
//!
//! **Paused sandboxes are listed as paused only to a control plane that has read, since the last gap, an answer in which all of them
//! were listed as alive.** A gap is what began with the start of this agent, or with the last heartbeat that was acknowledged where
//! that is [`MAY_BE_MISSING`] ago. Times are those at which heartbeats were *sent*, so the control plane's own age of the last one is
//! never higher than ours. What is paused is not compared with the time of the gap: that would have to outlive restarts and changes
//! of the clock, and would be wrong for pauses before it.
//!
//! That an answer was read is not known from having given it: its reader may have hung up. It shows by the next poll coming over the
//! same HTTP/1.1 connection, which a client uses again only after it has read the answer before to its end; and a monitor that polls
//! again has done with what it read. Callers that make a connection for each call, as the command line does, show nothing.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use super::clock::Moment;

/// The age of the last acknowledged heartbeat from which on a control plane may have sandboxes for missing. That is 90 s; a third less,
/// for an answer that is on its way for long, and for clocks that do not go alike. Heartbeats are sent every 30 s, so one may be lost.
pub const MAY_BE_MISSING: Duration = Duration::from_secs(60);
/// Answers that must have been read. One would do, if everybody who reads one always managed to write down what it says.
const READ_ANSWERS: u32 = 3;
/// Most connections whose polls are remembered: more than a control plane keeps.
const MAX_CONNECTIONS: usize = 256;
/// A warning is due after so many answers of which nobody knows whether they were read: half an hour of them.
const WARN_AFTER: u32 = 120;

/// A connection over which one request comes after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Connection(pub u64);

/// How paused sandboxes are listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    /// Among those that live.
    AsAlive,
    /// Among the auto-paused ones.
    AsPaused,
}

/// What the control plane may believe.
#[derive(Debug, Default)]
pub struct Listing {
    /// `None`: there is no control plane.
    state: Option<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    /// When the last heartbeat was sent that was acknowledged.
    heard: Option<Moment>,
    belief: Belief,
}

#[derive(Debug)]
enum Belief {
    /// It may have sandboxes for missing that are not.
    Stale {
        /// Over which an answer was given since the gap.
        asked: HashSet<Connection>,
        /// Answers since the gap that were read.
        read: u32,
        /// Answers since the gap.
        given: u32,
    },
    /// It has none for missing.
    Current,
}

impl Default for Belief {
    fn default() -> Self {
        Self::Stale {
            asked: HashSet::new(),
            read: 0,
            given: 0,
        }
    }
}

impl Listing {
    /// For a host without a control plane: paused is paused.
    pub fn standalone() -> Self {
        Self::default()
    }

    /// For a host under a control plane of which an agent that starts knows nothing.
    pub fn under_control_plane() -> Self {
        Self {
            state: Some(Mutex::default()),
        }
    }

    /// A heartbeat was acknowledged just now.
    pub fn acknowledged(&self, sent: Moment, now: Moment) {
        let Some(mut state) = self.state() else { return };
        // Polls that were answered before now do not count, whatever their order was: only from here on is nothing taken for missing.
        if state.is_silent(now) {
            state.belief = Belief::default();
        }
        state.heard = Some(sent);
    }

    /// How to answer a poll that has come over a connection; `None` for one that shows nothing.
    pub fn shown(&self, connection: Option<Connection>, now: Moment) -> Shown {
        let Some(mut state) = self.state() else {
            return Shown::AsPaused;
        };
        if state.is_silent(now) {
            state.belief = Belief::default();
            return Shown::AsAlive;
        }
        state.belief.poll(connection)
    }

    /// Held for moments.
    fn state(&self) -> Option<MutexGuard<'_, State>> {
        let state = self.state.as_ref()?;
        Some(state.lock().expect("nothing panics while it holds this"))
    }
}

impl State {
    fn is_silent(&self, now: Moment) -> bool {
        self.heard.is_none_or(|heard| now.since(heard) >= MAY_BE_MISSING)
    }
}

impl Belief {
    fn poll(&mut self, connection: Option<Connection>) -> Shown {
        let Self::Stale { asked, read, given } = self else {
            return Shown::AsPaused;
        };
        *given += 1;
        if *given == WARN_AFTER {
            tracing::warn!(
                "paused sandboxes are still listed as alive: nobody has been seen to read the lists; does the control plane keep its \
                 connections open between two polls?"
            );
        }
        if let Some(connection) = connection {
            if asked.contains(&connection) {
                *read += 1;
            } else {
                if asked.len() >= MAX_CONNECTIONS {
                    asked.clear();
                }
                asked.insert(connection);
            }
        }
        if *read >= READ_ANSWERS {
            *self = Self::Current;
            return Shown::AsPaused;
        }
        Shown::AsAlive
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What happens, at which second.
    enum Step {
        /// A heartbeat that was sent then is acknowledged, so many seconds later.
        Heard(u64, u64),
        /// A poll over a connection, and how paused ones are to be shown to it.
        Poll(u64, Option<u64>, Shown),
    }
    use Shown::{AsAlive, AsPaused};
    use Step::{Heard, Poll};

    fn play(name: &str, steps: &[Step]) {
        let (listing, began) = (Listing::under_control_plane(), Moment::now());
        let at = |seconds| began.after(Duration::from_secs(seconds));
        for step in steps {
            match step {
                Heard(sent, took) => listing.acknowledged(at(*sent), at(sent + took)),
                Poll(second, connection, expected) => {
                    let shown = listing.shown(connection.map(Connection), at(*second));
                    assert_eq!(shown, *expected, "{name}, at {second} s");
                }
            }
        }
    }

    /// An agent that has had a heartbeat acknowledged at 0 and whose lists were read by 45.
    fn settled(then: Vec<Step>) -> Vec<Step> {
        let mut steps = vec![
            Heard(0, 0),
            Poll(0, Some(1), AsAlive),
            Poll(15, Some(1), AsAlive),
            Poll(30, Some(1), AsAlive),
            Heard(30, 0),
            Poll(45, Some(1), AsPaused),
            Heard(60, 0),
        ];
        steps.extend(then);
        steps
    }

    #[test]
    fn paused_is_listed_as_paused_once_the_lists_since_a_gap_were_read() {
        let table = [
            ("from the start", settled(vec![])),
            (
                "before any heartbeat polls do not count",
                vec![
                    Poll(0, Some(1), AsAlive),
                    Poll(15, Some(1), AsAlive),
                    Poll(30, Some(1), AsAlive),
                    Poll(45, Some(1), AsAlive),
                    Heard(50, 1),
                    Poll(60, Some(1), AsAlive),
                    Poll(75, Some(1), AsAlive),
                    Heard(80, 0),
                    Poll(90, Some(1), AsAlive),
                    Poll(105, Some(1), AsPaused),
                ],
            ),
            (
                "answers that nobody read do not count, and neither does who shows nothing",
                vec![
                    Heard(0, 0),
                    Poll(1, Some(1), AsAlive),
                    Poll(2, Some(2), AsAlive),
                    Poll(3, Some(3), AsAlive),
                    Poll(4, None, AsAlive),
                    Poll(5, None, AsAlive),
                    Poll(6, None, AsAlive),
                    Poll(7, Some(4), AsAlive),
                    Poll(8, Some(5), AsAlive),
                    Poll(9, Some(1), AsAlive),
                    Poll(10, Some(3), AsAlive),
                    Poll(11, Some(1), AsPaused),
                ],
            ),
            (
                "one heartbeat that is lost is no gap",
                settled(vec![
                    Poll(75, Some(1), AsPaused),
                    Poll(119, Some(1), AsPaused),
                    Heard(119, 0),
                    Poll(150, Some(1), AsPaused),
                ]),
            ),
            (
                "a gap that a poll falls into",
                settled(vec![
                    Poll(120, Some(1), AsAlive),
                    Poll(135, Some(1), AsAlive),
                    Poll(150, Some(1), AsAlive),
                    Poll(165, Some(1), AsAlive),
                    Heard(170, 9),
                    Poll(180, Some(1), AsAlive),
                    Poll(195, Some(1), AsAlive),
                    Heard(200, 0),
                    Poll(210, Some(1), AsAlive),
                    Poll(225, Some(1), AsPaused),
                ]),
            ),
            (
                "a gap that nobody asks in",
                settled(vec![Heard(120, 0), Poll(121, Some(1), AsAlive)]),
            ),
            (
                "a heartbeat that takes long counts from when it was sent",
                settled(vec![
                    Heard(90, 10),
                    Poll(149, Some(1), AsPaused),
                    Poll(150, Some(1), AsAlive),
                ]),
            ),
            (
                "a second gap before the first is over",
                settled(vec![
                    Heard(120, 0),
                    Poll(121, Some(1), AsAlive),
                    Poll(136, Some(1), AsAlive),
                    Poll(151, Some(1), AsAlive),
                    Heard(181, 0),
                    Poll(182, Some(1), AsAlive),
                    Poll(197, Some(1), AsAlive),
                    Poll(211, Some(1), AsAlive),
                    Poll(226, Some(1), AsPaused),
                ]),
            ),
        ];
        for (name, steps) in table {
            play(name, &steps);
        }
    }

    #[test]
    fn without_a_control_plane_paused_is_paused() {
        let now = Moment::now();
        assert_eq!(Listing::standalone().shown(None, now), AsPaused);
        Listing::standalone().acknowledged(now, now);
    }

    #[test]
    fn connections_that_are_remembered_are_bounded() {
        let (listing, now) = (Listing::under_control_plane(), Moment::now());
        listing.acknowledged(now, now);
        for number in 0..10_000 {
            assert_eq!(listing.shown(Some(Connection(number)), now), AsAlive);
        }
        let state = listing.state().expect("under a control plane");
        assert!(matches!(&state.belief, Belief::Stale { asked, .. } if asked.len() <= MAX_CONNECTIONS));
    }
}
