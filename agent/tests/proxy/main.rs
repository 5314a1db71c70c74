//! The proxy from outside, over real TLS and real sockets, to sandboxes that the model's fakes bring to run, are paused, and end.
//!
//! What listens in a guest is a task of the test's own, at the guest's address and a port that the kernel chooses. Time is real, so
//! nothing here depends on how much of it passes: what must come is waited for, with a deadline that only a hang reaches.

#[path = "../model/dice.rs"]
#[allow(dead_code, reason = "the model needs more of it")]
mod dice;
#[path = "../model/guest.rs"]
#[allow(dead_code, reason = "the model needs more of it")]
mod guest;
mod guests;
mod hostile;
mod http;
mod lifecycle;
#[path = "../model/privd.rs"]
#[allow(dead_code, reason = "the model needs more of it")]
mod privd;
#[path = "../model/shim.rs"]
#[allow(dead_code, reason = "the model needs more of it")]
mod shim;
mod tunnels;
mod upstream;
#[path = "../model/vmm.rs"]
#[allow(dead_code, reason = "the model needs more of it")]
mod vmm;
#[path = "../model/world.rs"]
#[allow(dead_code, reason = "the model needs more of it")]
mod world;
