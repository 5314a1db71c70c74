//! What privd makes in the kernel. Plain functions, none of them async; each undoes itself when it fails.
//!
//! | module | makes |
//! |---|---|
//! | [`loopdev`] | loops: a file as a block device |
//! | [`dm`] | disks: origin and snapshot |
//! | [`netns`] | networks: namespace, tap, veth pair; entering the namespace of a tap |
//! | [`tap`] | taps, and telling ours from other descriptors |
//! | [`link`] | addresses, routes, neighbours, by rtnetlink |
//! | [`own`] | nothing: the host's addresses |
//! | [`nft`] | packet filter rules and their counters |
//! | [`netlink`] | the socket under the last three |
//! | [`sys`] | system calls without a safe wrapper; the only unsafe code |

pub(crate) mod dm;
pub(crate) mod link;
pub(crate) mod loopdev;
pub(crate) mod netlink;
pub(crate) mod netns;
pub(crate) mod nft;
mod own;
pub(crate) mod sys;
pub(crate) mod tap;

use std::io;
use std::time::Duration;

use roost_common::privd::{PrivdError, Step};

/// How long an object of the same name is given to go away. The kernel removes in work queues: 0.3 s for a disk with unwritten
/// data, some 40 ms for a network.
pub(crate) const BUSY: Duration = Duration::from_secs(5);

/// Turns the kernel's error at `step` into the answer.
pub(crate) fn at(step: Step) -> impl Fn(io::Error) -> PrivdError {
    move |error| PrivdError::Kernel {
        step,
        errno: error.raw_os_error().unwrap_or(libc::EIO),
    }
}
