//! What a start makes sure of: the host's static table is there, and what a killed privd left half-made is not.

use std::io;

use roost_common::names::PREFIX;

use crate::kernel::{dm, netns};

/// Prepares the host. Both halves may be repeated, and leave what is in use alone.
///
/// # Errors
/// When the host's table cannot be loaded: without it sandboxes would reach the host.
pub(crate) fn prepare() -> io::Result<()> {
    netns::ensure_host_table()?;
    warn_unless_forwarding();
    // A host that cannot make disks can still make networks, and each call says what it lacks.
    match remove_leftovers() {
        Ok(0) => {}
        Ok(removed) => tracing::warn!(removed, "removed devices that an earlier run had left half-made"),
        Err(error) => tracing::warn!(%error, "cannot look for devices that an earlier run left half-made"),
    }
    Ok(())
}

/// Removes own devices that nobody has open: a privd was killed after it had created them and before it had opened them. All
/// others are held by a descriptor, or by a device that is, and marked to go with it.
fn remove_leftovers() -> io::Result<usize> {
    let kernel = dm::RealKernel::open()?;
    let mut removed = 0;
    // An origin is in use until the snapshot over it is gone, so until a round finds nothing. Each round removes one at least.
    loop {
        let unused: Vec<_> = kernel
            .list(PREFIX)?
            .into_iter()
            .filter(|device| device.open_count == 0)
            .collect();
        let before = removed;
        for device in unused {
            match kernel.remove(&device.name) {
                Ok(()) => removed += 1,
                Err(error) => tracing::warn!(device = device.name, %error, "cannot remove a device left half-made"),
            }
        }
        if removed == before {
            return Ok(removed);
        }
    }
}

/// Namespaces inherit forwarding from here, and privd writes no sysctl: where it is off, networks would lead nowhere.
fn warn_unless_forwarding() {
    let setting = crate::confine::FORWARDING;
    if std::fs::read_to_string(setting).is_ok_and(|value| value.trim() == "0") {
        tracing::warn!(
            setting,
            "forwarding is off: sandboxes will reach nothing and not be reached"
        );
    }
}
