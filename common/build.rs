//! Compiles the guest agent's protocol, and only where it is wanted: privd and vmmshim build without protobuf.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "guest")]
    connectrpc_build::Config::new()
        .files(&["proto/process.proto", "proto/filesystem.proto"])
        .includes(&["proto/"])
        .include_file("guest_proto.rs")
        .compile()
        .expect("the .proto files of this crate compile (is protoc installed?)");
}
