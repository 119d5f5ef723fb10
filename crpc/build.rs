//! Compiles the few etcd calls that the registry makes with protox, so that no protoc is needed. (The crate etcd-client
//! needs protoc, and Google's `.proto` files, wherever it is built.)

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=etcd.proto");
    let set = protox::compile(["etcd.proto"], ["."])?;
    tonic_prost_build::configure().build_server(false).compile_fds(set)?;
    Ok(())
}
