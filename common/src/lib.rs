//! What roost's processes exchange, and what more than one of them must compute identically.
//!
//! | module | feature | holds |
//! |---|---|---|
//! | [`ids`], [`units`] | always | sandbox ids, slots; sectors, mebibytes, vCPUs: checked once, where they enter |
//! | [`names`], [`net`] | always | kernel names and addresses derived from ids and slots |
//! | `ipc` | `ipc` | packets that carry descriptors, synchronous; as a tarpc transport with `privd` |
//! | `privd` | `privd` | privd's five verbs |
//! | `shim`, `ring` | `shim` | the messages between agent and vmmshim; the bounded files of what a VMM writes |
//! | `guest` | `guest` | the guest agent's protocol |
//!
//! Not here: policy, clocks, kernel calls. Something belongs here when two processes exchange it or must compute it alike.

#[cfg(feature = "guest")]
pub mod guest;
pub mod ids;
#[cfg(feature = "ipc")]
pub mod ipc;
pub mod names;
pub mod net;
#[cfg(feature = "privd")]
pub mod privd;
#[cfg(feature = "shim")]
pub mod ring;
#[cfg(feature = "shim")]
pub mod shim;
pub mod units;
