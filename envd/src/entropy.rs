//! Randomness from the host, for guests that woke from one snapshot and would draw the same numbers.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsFd as _;

use crate::sys;

/// Mixes `bytes` into the kernel's pool, credits them, and has the generator take a new key from it at once: without
/// that it would hand out the snapshot's stream for up to a minute more.
///
/// # Errors
/// EPERM without privilege; the pool may have been fed.
pub(crate) fn feed(bytes: &[u8]) -> io::Result<()> {
    let random = OpenOptions::new().write(true).open("/dev/urandom")?;
    sys::add_entropy(random.as_fd(), bytes)?;
    sys::reseed(random.as_fd())
}
