//! The events that nobody has taken yet, in memory: whose turn it is, and which go when there are too many.
//!
//! Each sandbox with events has a line of them and one turn. A turn is due or taken; only the first event of the line of a taken
//! turn is on its way, so the events of a sandbox cannot overtake each other. Turns are taken in the order in which they came due.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use roost_common::ids::SandboxId;

use super::{Event, Limits};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Backlog {
    /// By number: the order in which they were put.
    events: BTreeMap<u64, Kept>,
    /// What they take in the log.
    bytes: u64,
    lines: HashMap<SandboxId, Line>,
    /// The due turns, by number.
    turns: BTreeMap<u64, SandboxId>,
    next_turn: u64,
    /// Events whose sandbox has a later one that says how it ended: the least loss.
    superseded: BTreeSet<u64>,
}

#[derive(Debug)]
struct Kept {
    event: Arc<Event>,
    bytes: u64,
}

#[derive(Debug)]
struct Line {
    /// Never empty while the turn is due.
    events: VecDeque<u64>,
    turn: Turn,
}

#[derive(Debug, Clone, Copy)]
enum Turn {
    Due(u64),
    Taken,
}

impl Backlog {
    /// Adds an event, behind all others of its sandbox; `number` is higher than any before.
    pub(super) fn insert(&mut self, number: u64, event: Arc<Event>, bytes: u64) {
        let id = &event.sandbox_id;
        if !self.lines.contains_key(id) {
            let turn = Turn::Due(self.turn_of(id.clone()));
            let events = VecDeque::new();
            self.lines.insert(id.clone(), Line { events, turn });
        }
        let line = self.lines.get_mut(id).expect("it was made just now");
        if event.event.is_terminal() {
            self.superseded.extend(&line.events);
        }
        line.events.push_back(number);
        self.bytes += bytes;
        self.events.insert(number, Kept { event, bytes });
    }

    /// Takes an event out. Whether it was there.
    pub(super) fn remove(&mut self, number: u64) -> bool {
        let Some(Kept { event, bytes }) = self.events.remove(&number) else {
            return false;
        };
        self.bytes -= bytes;
        self.superseded.remove(&number);
        let id = &event.sandbox_id;
        let line = self.lines.get_mut(id).expect("every event is in a line");
        line.events.retain(|other| *other != number);
        if let (true, Turn::Due(turn)) = (line.events.is_empty(), line.turn) {
            self.turns.remove(&turn);
            self.lines.remove(id);
        }
        true
    }

    /// Takes the turn that has been due for longest, with the first event of its line. [`Self::end_turn`] gives it back.
    pub(super) fn take_turn(&mut self) -> Option<(u64, Arc<Event>)> {
        let (_, id) = self.turns.pop_first()?;
        let line = self.lines.get_mut(&id).expect("a due turn has a line");
        line.turn = Turn::Taken;
        let number = *line.events.front().expect("the line of a due turn is not empty");
        Some((number, self.events[&number].event.clone()))
    }

    /// Gives a taken turn back; it is due again, behind the others, where its line is not empty.
    pub(super) fn end_turn(&mut self, id: &SandboxId) {
        let line = self.lines.get(id).expect("the line of a taken turn stays");
        if line.events.is_empty() {
            self.lines.remove(id);
            return;
        }
        let turn = Turn::Due(self.turn_of(id.clone()));
        self.lines.get_mut(id).expect("found just now").turn = turn;
    }

    /// The event to drop where there are more than `limits` allow: the oldest of those whose sandbox has a later one that says how
    /// it ended, else the oldest.
    pub(super) fn surplus(&self, limits: &Limits) -> Option<u64> {
        if self.events.len() <= limits.events && self.bytes <= limits.bytes {
            return None;
        }
        let oldest = || self.events.first_key_value().map(|(number, _)| number);
        self.superseded.first().or_else(oldest).copied()
    }

    /// Whether there is room for as much again.
    pub(super) fn is_half_empty(&self, limits: &Limits) -> bool {
        self.events.len() <= limits.events / 2 && self.bytes <= limits.bytes / 2
    }

    /// How many events there are.
    pub(super) fn len(&self) -> usize {
        self.events.len()
    }

    /// What they take in the log.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// All of them, in the order in which they were put.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &Event)> {
        self.events.iter().map(|(number, kept)| (*number, &*kept.event))
    }

    fn turn_of(&mut self, id: SandboxId) -> u64 {
        let turn = self.next_turn;
        self.next_turn += 1;
        self.turns.insert(turn, id);
        turn
    }
}

#[cfg(test)]
mod tests {
    use super::super::EventKind;
    use super::*;

    fn backlog(events: &[(&str, EventKind)]) -> Backlog {
        let mut backlog = Backlog::default();
        for (number, (id, kind)) in (1..).zip(events) {
            let event = Event::new(*kind, id.parse().expect("an id"), 0);
            backlog.insert(number, Arc::new(event), 10);
        }
        backlog
    }

    fn dropped(backlog: &mut Backlog, limits: Limits) -> Vec<u64> {
        std::iter::from_fn(|| {
            backlog
                .surplus(&limits)
                .inspect(|number| assert!(backlog.remove(*number)))
        })
        .collect()
    }

    #[test]
    fn what_a_later_end_has_overtaken_is_dropped_first_and_then_the_oldest() {
        use EventKind::{AutoPaused, Error, Resumed, Stopped};
        let events = [
            ("a", AutoPaused),
            ("b", AutoPaused),
            ("b", Resumed),
            ("c", AutoPaused),
            ("b", Stopped),
            ("c", Error),
        ];
        for (kept, bytes, expected) in [
            (6, 60, vec![]),
            (5, 60, vec![2]),
            (6, 59, vec![2]),
            (3, 60, vec![2, 3, 4]),
            (2, 60, vec![2, 3, 4, 1]),
            (6, 10, vec![2, 3, 4, 1, 5]),
            (0, 60, vec![2, 3, 4, 1, 5, 6]),
        ] {
            let limits = Limits { events: kept, bytes };
            assert_eq!(dropped(&mut backlog(&events), limits), expected, "{limits:?}");
        }
    }

    #[test]
    fn a_sandbox_has_one_turn_and_keeps_its_order() {
        use EventKind::{AutoPaused, Stopped};
        let mut backlog = backlog(&[("a", AutoPaused), ("a", Stopped), ("b", Stopped)]);
        let next = |backlog: &mut Backlog| backlog.take_turn().map(|(number, _)| number);
        assert_eq!(next(&mut backlog), Some(1));
        assert_eq!(next(&mut backlog), Some(3));
        assert_eq!(next(&mut backlog), None, "the second event of a waits for the first");
        let (a, b): (SandboxId, SandboxId) = ("a".parse().expect("an id"), "b".parse().expect("an id"));
        backlog.end_turn(&a);
        assert_eq!(next(&mut backlog), Some(1), "it was not removed");
        assert!(backlog.remove(1));
        backlog.end_turn(&a);
        assert_eq!(next(&mut backlog), Some(2));
        // Dropped while they were on their way.
        assert!(backlog.remove(2) && backlog.remove(3));
        assert!(!backlog.remove(3));
        backlog.end_turn(&a);
        backlog.end_turn(&b);
        assert_eq!((backlog.len(), backlog.bytes()), (0, 0));
        assert!(backlog.lines.is_empty() && backlog.turns.is_empty() && backlog.superseded.is_empty());
    }
}
