//! Generates the API's messages and services.

fn main() {
    connectrpc_build::Config::new()
        .files(&["hostagent.proto", "roost.proto"])
        .includes(&["."])
        .emit_descriptor_set("descriptors.bin")
        .include_file("hostagent_proto.rs")
        .compile()
        .expect("the .proto files of this crate compile (protoc is Debian's protobuf-compiler)");
}
