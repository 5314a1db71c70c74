//! The generated messages and service of `proto/hostagent.proto`.
#![allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::let_underscore_must_use,
    reason = "generated code"
)]

connectrpc::include_generated!("hostagent_proto.rs");
