//! The HTTPS API: `hostagent.v1` over Connect.
//!
//! [`service`] maps calls to the registry, [`errors`] maps every error to its Connect code in one place. Transport and
//! certificates are in [`crate::serve`] and [`crate::tls`].

pub mod errors;
pub mod operator;
pub mod service;
