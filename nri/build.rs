//! Compiles `proto/nri.proto` in Rust (protox), so that a plain `cargo build` needs no protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto/nri.proto");
    let descriptors = protox::compile(["proto/nri.proto"], ["proto"])?;
    prost_build::Config::new().btree_map(["."]).compile_fds(descriptors)?;
    Ok(())
}
