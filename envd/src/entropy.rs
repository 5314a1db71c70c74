//! Randomness from the host, for guests that woke from one snapshot and would draw the same numbers.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::AsFd as _;

use crate::sys;

/// Mixes `bytes` into the kernel's pool, credits them, and has the generator take a new key from it at once. Both are
/// needed: mixing alone changes the pool but not the key in use, so for up to a minute more the kernel would hand out the
/// snapshot's stream. When this returns, every number drawn depends on `bytes`.
///
/// # Errors
/// EPERM without privilege; ENODATA where `bytes` are few and the generator has never been seeded. The pool may have been
/// fed.
pub(crate) fn feed(bytes: &[u8]) -> io::Result<()> {
    let random = OpenOptions::new().write(true).open("/dev/urandom")?;
    sys::add_entropy(random.as_fd(), bytes)?;
    sys::reseed(random.as_fd())
}
