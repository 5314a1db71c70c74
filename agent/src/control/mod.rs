//! This host under a control plane.
//!
//! Holds: no paused sandbox is listed as such to a control plane that may have it for missing ([`listing`]).

pub mod clock;
pub mod listing;
