//! Randomness that can be played again.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::is_full_size;

const ORDINARY_SEED: u64 = 1;

/// A number from the environment, where it is there.
///
/// # Panics
/// When it is none.
pub fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text:?} is no number")))
}

/// `ROOST_SEED`; else another one in each run at full size, and always the same in an ordinary one, which tells of a change and not of luck.
///
/// # Panics
/// When `ROOST_SEED` is no number.
pub fn seed() -> u64 {
    number("ROOST_SEED").unwrap_or_else(|| {
        if !is_full_size() {
            return ORDINARY_SEED;
        }
        let age = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
        u64::from(age.subsec_nanos()) ^ (age.as_secs() << 20)
    })
}

/// Splitmix64: small, and the same everywhere.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// The draws of one turn.
    ///
    /// # Panics
    /// Never: no run has more turns than 64 bits count.
    pub fn of_turn(seed: u64, turn: usize) -> Self {
        let turn = u64::try_from(turn).expect("no run is that long");
        Self(seed ^ turn.wrapping_add(1).wrapping_mul(0xd134_2543_de82_ef95))
    }

    /// Any number.
    pub fn any(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below a bound.
    ///
    /// # Panics
    /// When the bound is 0.
    pub fn below(&mut self, bound: usize) -> usize {
        let bound = u64::try_from(bound).expect("small");
        usize::try_from(self.any() % bound).expect("below a usize")
    }

    /// One of several.
    ///
    /// # Panics
    /// When there are none.
    pub fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}
