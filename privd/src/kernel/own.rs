//! The host's own IPv4 addresses, which no sandbox may reach.
//!
//! Each network has an address on the host too, so with thousands of them a list of all addresses is long, and most of it is of no use
//! here. So the list is remembered, beside a socket into which the kernel writes each change: who asks reads what is in it first, and lists
//! again where any of it is about an address that is no network's of ours, or may be. What is answered is therefore never older than the
//! question; nothing waits for the socket, so nothing wakes for it.

use std::io;
use std::net::Ipv4Addr;
use std::sync::{Mutex, PoisonError};

use roost_common::net::{Cidr, VETH_NET};

use super::link::{AddressEvents, Links};

/// What was listed last, and what has become of it since.
struct Known {
    addresses: Vec<Ipv4Addr>,
    changes: AddressEvents,
}

static KNOWN: Mutex<Option<Known>> = Mutex::new(None);

/// The addresses of the calling thread's network namespace, which must be the initial one, but for those of our networks.
///
/// # Errors
/// The kernel's; the next question is one of a start then.
pub(super) fn addresses() -> io::Result<Vec<Ipv4Addr>> {
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    // Taken out, so that an error leaves nothing behind that is half read.
    let mut kept = known.take();
    if let Some(before) = &mut kept
        && before.changes.any(counts)?
    {
        kept = None;
    }
    let up_to_date = match kept {
        Some(before) => before,
        None => {
            // First, so that no change falls between the two.
            let changes = AddressEvents::open()?;
            let mut addresses = Links::open()?.addresses()?;
            addresses.retain(|address| counts(*address));
            Known { addresses, changes }
        }
    };
    let addresses = up_to_date.addresses.clone();
    *known = Some(up_to_date);
    Ok(addresses)
}

/// Whether an address is none of our networks' ends.
fn counts(address: Ipv4Addr) -> bool {
    let (network, length) = VETH_NET;
    !Cidr { network, length }.contains(address)
}
