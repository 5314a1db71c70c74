//! The HTTPS API: `hostagent.v1` over Connect.
//!
//! [`service`] maps calls to the registry, [`process`] and [`files`] those that the guest answers; [`operator`] is our own `roost.v1`, with
//! [`templates`]; [`errors`] maps every error to its Connect code in one place. Transport and
//! certificates are in [`crate::serve`] and [`crate::tls`].

pub mod errors;
pub(crate) mod files;
pub mod operator;
mod policy;
mod process;
pub mod service;
mod templates;
