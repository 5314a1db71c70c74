//! Generates the API's messages and service from `proto/`.

fn main() {
    connectrpc_build::Config::new()
        .files(&["proto/hostagent.proto"])
        .includes(&["proto/"])
        .include_file("hostagent_proto.rs")
        .compile()
        .expect("proto/hostagent.proto compiles (protoc is Debian's protobuf-compiler)");
}
