//! This host under a control plane: how it gets and keeps its credentials there, says that it is alive, and tells what happened.
//!
//! ```text
//! roost-agent --register --> register --(token)--------------------> control plane: /v1/hosts/register
//!                                |                                         ^    ^
//!                                v                                         |    |
//!   credentials/credentials.json <-- session -- refresh, at 2/3 of life ---+    |
//!                                        |  \                                   |
//!              tls::Identities <- swap --+   +-- heartbeat, every 30 s --------+
//!                                        +------ events <- outbox -------------+
//!   ListSandboxes (api) <-- listing: is a paused one listed as paused, or as alive? <-- heartbeat: acknowledged
//! ```
//!
//! Holds: no sandbox is touched because the control plane cannot be reached or refuses us; only its own word that this host was
//! deleted, given again and again, has them paused ([`heartbeat`]). A credential is on disk before it is used. No paused sandbox is
//! listed as such to a control plane that may have it for missing ([`listing`]). Every call and every answer is bounded in time and
//! size. Secrets are never logged.
//!
//! Not here: what a control plane asks of us ([`crate::api`]); which events are worth telling (the sandboxes' tasks).

pub mod client;
pub mod clock;
pub mod credentials;
pub mod events;
pub mod heartbeat;
pub mod listing;
pub mod register;
mod retry;
pub mod session;
pub mod standing;
pub mod url;
