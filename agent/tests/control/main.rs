//! The agent's part under a control plane, against one that is played: registration, credentials, heartbeats, events, and what its
//! monitor makes of the lists.
//!
//! ```text
//! registration, session, heartbeats, events: tests -> the client's own code --HTTP--> plane (fake)
//! swap, fleet:                               tests --HTTPS--> serve, service: the real ones
//! property:      chance -> host (stand-in: sandboxes that run, are paused, end) <--HTTP-- monitor (fake, its rules literally)
//!                            '-> heartbeats, refreshes, events, outbox, listing: the real ones --HTTP--> plane (fake)
//! ```
//!
//! Time is simulated where there is much of it: the clock jumps to the next timer once no task can run and no socket has anything.
//! `ROOST_CONTROL_HISTORIES` is how many histories the property test plays; with `ROOST_CONTROL_SEED` it is that one.

mod events;
mod fleet;
mod heartbeats;
mod monitor;
mod pki;
mod plane;
mod property;
mod registration;
mod session;
mod swap;
