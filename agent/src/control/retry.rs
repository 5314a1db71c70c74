//! Pauses between attempts: they double, and are spread so that hosts that failed together do not come back together.

use std::time::Duration;

use crate::sandbox::build::fill_random;

/// The pause after so many failures in a row, 1 and up: half of it by chance, from 1 to 2 s and doubling, at most `longest`.
pub(super) fn pause(failures: u32, longest: Duration) -> Duration {
    spread(failures, longest, chance())
}

/// A number of [0, 1].
pub(super) fn chance() -> f64 {
    let mut bytes = [0; 4];
    fill_random(&mut bytes);
    f64::from(u32::from_ne_bytes(bytes)) / f64::from(u32::MAX)
}

fn spread(failures: u32, longest: Duration, chance: f64) -> Duration {
    let whole = Duration::from_secs(1 << failures.min(16)).min(longest);
    whole / 2 + (whole / 2).mul_f64(chance)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_half_of_each_is_chance() {
        let longest = Duration::from_secs(30);
        for (failures, whole) in [(1, 2), (2, 4), (3, 8), (4, 16), (5, 30), (u32::MAX, 30)] {
            let whole = Duration::from_secs(whole);
            assert_eq!(spread(failures, longest, 0.0), whole / 2, "{failures}");
            assert_eq!(spread(failures, longest, 1.0), whole, "{failures}");
        }
    }
}
