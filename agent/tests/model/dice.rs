//! Chance, from a seed; and what goes wrong by it.

use std::time::Duration;

/// A small generator of our own: the seed is printed with a failure, and that is all that is needed.
#[derive(Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self((seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15))
    }

    pub(crate) fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }

    /// True so many times in a thousand.
    pub(crate) fn chance(&mut self, in_a_thousand: u64) -> bool {
        self.roll(1000) < in_a_thousand
    }

    pub(crate) fn millis(&mut self, below: u64) -> Duration {
        Duration::from_millis(self.roll(below))
    }

    pub(crate) fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[usize::try_from(self.roll(all.len() as u64)).expect("an index")]
    }
}

/// What becomes of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It is answered.
    None,
    /// It is refused, and nothing is done.
    Refuse,
    /// Nothing is done, and nothing answered.
    Hang,
    /// It is done, and nothing answered.
    DoAndHang,
    /// It is done, and the connection ends instead of an answer; for a shim, which has no other end of a connection, it ends itself.
    Lose,
    /// Whoever was to do it ends, perhaps when it has been done.
    Die,
}

impl Fault {
    pub(crate) const ALL: [Self; 5] = [Self::Refuse, Self::Hang, Self::DoAndHang, Self::Lose, Self::Die];
}
