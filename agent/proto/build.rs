//! Generates the API's messages and service from `hostagent.proto`.

fn main() {
    connectrpc_build::Config::new()
        .files(&["hostagent.proto"])
        .includes(&["."])
        .include_file("hostagent_proto.rs")
        .compile()
        .expect("hostagent.proto compiles (protoc is Debian's protobuf-compiler)");
}
