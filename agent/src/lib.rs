//! roost's agent: sandbox lifecycles behind an HTTPS API, without privilege.
//!
//! ```text
//! control plane, roost CLI --mTLS--> api --> registry --> one task per sandbox (sandbox::task)
//!   control (heartbeats, events)                              |  one enum (sandbox::Sandbox), one message at a time
//!                                                            v
//!                          host: privd (disk, network), shim (VMM), images, files     guest: envd     vmm: REST
//! ```
//!
//! Invariants: no unsafe code and no capability; what exists on the host is held by descriptors in structs, so dropping a struct
//! frees it; what is left to reconcile is files, which [`recover`] does at every start; every byte from a guest or a VMM is
//! bounded in size and time.
#![forbid(unsafe_code)]

pub mod activity;
pub mod api;
pub mod cli;
pub mod config;
pub mod confine;
pub mod control;
pub mod doctor;
pub mod drain;
pub mod egress;
pub mod errors;
mod failpoint;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
pub mod guest;
pub mod host;
pub mod metrics;
pub mod outbox;
pub mod page;
pub mod pki;
pub mod proxy;
pub mod recover;
pub mod registry;
pub mod reload;
pub mod sandbox;
pub mod serve;
pub mod snapshot;
pub mod status;
pub mod templates;
pub mod throttle;
pub mod tls;
pub mod tombstone;
pub mod trace;
pub mod vmm;
pub mod watchdog;
pub mod watermark;
