//! The host API: messages, clients and service traits of `hostagent.v1` and of our own `roost.v1`, generated and nothing else.
//!
//! A crate of its own because it is larger than the agent and changes more rarely: it is compiled once where the agent is compiled
//! a dozen times.
#![allow(
    missing_docs,
    unreachable_pub,
    unused_qualifications,
    clippy::all,
    clippy::let_underscore_must_use,
    reason = "generated code"
)]

connectrpc::include_generated!("hostagent_proto.rs");

/// Both files as protobuf's compiler describes them, a `google.protobuf.FileDescriptorSet`: for clients that ask what there is.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
