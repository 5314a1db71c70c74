//! How many calls a client may make in a second (`max_calls_per_sec`): a caller that has gone wrong must not keep the agent from the others.
//!
//! Of each client only the time is kept at which all that it was given would have been used up at the permitted pace; so a client that was
//! quiet for two seconds has two seconds' worth at once, and never more.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustls_pki_types::CertificateDer;

/// What may be used up at once.
const BURST: Duration = Duration::from_secs(2);
/// Clients of which more than nothing is kept, before those that were quiet are forgotten.
const MANY: usize = 1024;

/// A client: the SHA-256 of its certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Client([u8; 32]);

impl Client {
    /// Who holds a certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        let digest = ring::digest::digest(&ring::digest::SHA256, certificate);
        Self(digest.as_ref().try_into().expect("32 bytes"))
    }
}

/// The calls of all clients.
#[derive(Debug)]
pub struct Throttle {
    per_call: Duration,
    used_up_at: Mutex<HashMap<Client, Instant>>,
}

impl Throttle {
    /// So many calls a second for each client.
    pub fn new(per_sec: NonZeroU32) -> Self {
        Self {
            per_call: Duration::from_secs(1) / per_sec.get(),
            used_up_at: Mutex::default(),
        }
    }

    /// Takes a call.
    ///
    /// # Errors
    /// How long it takes until there is room for one.
    pub fn take(&self, client: Client, now: Instant) -> Result<(), Duration> {
        let mut clients = self.used_up_at.lock().expect("nothing panics while it holds this");
        if clients.len() >= MANY {
            clients.retain(|_, used_up_at| *used_up_at > now);
        }
        let used_up_at = clients.entry(client).or_insert(now);
        let next = (*used_up_at).max(now) + self.per_call;
        match next.saturating_duration_since(now).checked_sub(BURST) {
            Some(wait) if !wait.is_zero() => Err(wait),
            _ => {
                *used_up_at = next;
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Client = Client([0; 32]);
    const B: Client = Client([1; 32]);

    fn throttle(per_sec: u32) -> Throttle {
        Throttle::new(NonZeroU32::new(per_sec).expect("not zero"))
    }

    #[test]
    fn two_seconds_worth_may_come_at_once_and_then_one_after_another() {
        let (throttle, now) = (throttle(10), Instant::now());
        let taken = (0..100).filter(|_| throttle.take(A, now).is_ok()).count();
        assert_eq!(taken, 20);
        let wait = throttle.take(A, now).expect_err("used up");
        assert_eq!(wait, Duration::from_millis(100));
        assert!(throttle.take(A, now + wait).is_ok());
        assert!(throttle.take(A, now + wait).is_err());
        // In ten seconds a hundred more than at first, however they are spread.
        let later = (1..=1000).map(|n| now + wait + Duration::from_millis(10 * n));
        assert_eq!(later.filter(|at| throttle.take(A, *at).is_ok()).count(), 100);
    }

    #[test]
    fn one_client_takes_nothing_from_another() {
        let (throttle, now) = (throttle(1), Instant::now());
        assert!(throttle.take(A, now).is_ok() && throttle.take(A, now).is_ok());
        assert!(throttle.take(A, now).is_err());
        assert!(throttle.take(B, now).is_ok());
    }

    #[test]
    fn what_is_kept_of_clients_does_not_grow() {
        let (throttle, mut now) = (throttle(1), Instant::now());
        for n in 0..5000_u32 {
            let mut name = [0; 32];
            name[..4].copy_from_slice(&n.to_be_bytes());
            assert!(throttle.take(Client(name), now).is_ok());
            now += Duration::from_millis(10);
        }
        assert!(throttle.used_up_at.lock().expect("unharmed").len() <= MANY);
    }
}
