//! Builds the pod shim as a static binary of its own, so that `berth` can embed it (docs/adr/0002): its own profile
//! (small, panic = abort), its own target folder, linked at a fixed address because relocated pages would be private memory.

use std::path::PathBuf;
use std::process::Command;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let workspace = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?).join("..");
    let target = std::env::var("TARGET")?;
    for watched in ["runtime/linux", "runtime/cgroup", "runtime/oci", "runtime/shim", "Cargo.lock", "Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", workspace.join(watched).display());
    }
    let folder = out.join("shim");
    let mut build = Command::new(std::env::var("CARGO")?);
    build
        .current_dir(&workspace)
        .args(["build", "-p", "berth-shim", "--bin", "berth-shim", "--profile", "shim", "--target", &target, "--target-dir"])
        .arg(&folder)
        // The flags of the outer build are not the shim's.
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env("RUSTFLAGS", "-C target-feature=+crt-static -C relocation-model=static");
    // In a debug build nobody counts the shim's pages, and linking it whole takes a minute of both cores.
    if std::env::var("PROFILE")? == "debug" {
        build.env("CARGO_PROFILE_SHIM_LTO", "off").env("CARGO_PROFILE_SHIM_CODEGEN_UNITS", "16");
    }
    let status = build.status()?;
    if !status.success() {
        return Err(format!("building the shim failed: {status}").into());
    }
    let built = folder.join(&target).join("shim").join("berth-shim");
    println!("cargo::rustc-env=BERTH_SHIM={}", built.display());
    println!("cargo::rustc-env=BERTH_TARGET={target}");
    Ok(())
}
