//! Compiles the contracts of plugins in Rust (protox), so that a plain `cargo build` needs no protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let files = ["proto/csi.proto", "proto/device_plugin.proto", "proto/plugin_registration.proto", "proto/pod_resources.proto"];
    for file in files {
        println!("cargo::rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["proto"])?;
    tonic_prost_build::configure().build_server(true).build_client(true).compile_fds(descriptors)?;
    Ok(())
}
