//! The rig's tests: the built binaries on a real kernel, from outside.
//!
//! `cargo xtask test` builds this program, boots the rig with this build installed and runs it there. What every test leaves on
//! the host is compared with what was there before it (`in_rig`).

mod api;
mod bad_input;
mod concurrency;
mod counts;
mod doctor;
mod egress;
mod faults;
mod full_disk;
mod guest_calls;
mod guide;
mod isolation;
mod lifecycle;
mod limits;
mod matrix;
mod misfit;
mod package;
mod pause;
mod power;
mod privd;
mod random;
mod ready;
mod recover;
mod shim;
mod templates;
mod units;
mod wake;
