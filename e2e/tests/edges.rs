//! The direction between crates: reads `cargo metadata` and refuses every edge that docs/adr/0007 does not allow.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

/// crate → the workspace crates it may link (development dependencies on testkit are free).
fn allowed() -> BTreeMap<&'static str, &'static [&'static str]> {
    BTreeMap::from([
        ("berth-linux", &[] as &[&str]),
        ("berth-cgroup", &["berth-linux"]),
        ("berth-oci", &["berth-linux", "berth-cgroup"]),
        ("berth-shim", &["berth-linux", "berth-cgroup", "berth-oci"]),
        ("berth-cni", &["berth-linux"]),
        ("berth-image", &["berth-linux"]),
        ("berth-nri", &["berth-linux"]),
        ("berth-cri-api", &[]),
        (
            "berth-cri-server",
            &["berth-cri-api", "berth-shim", "berth-cgroup", "berth-cni", "berth-image", "berth-nri", "berth-oci", "berth-linux"],
        ),
        ("berth-cluster", &[]),
        ("berth-kubelet", &["berth-cri-api", "berth-cgroup", "berth-linux"]),
        ("berth-testkit", &[]),
    ])
}

#[test]
fn crates_link_only_in_the_agreed_direction() {
    let out = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .output()
        .expect("cargo metadata runs");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&out.stdout).expect("cargo metadata is JSON");
    let packages = metadata["packages"].as_array().expect("a list of packages");
    let ours: BTreeSet<&str> = packages.iter().filter_map(|p| p["name"].as_str()).collect();
    let allowed = allowed();
    let mut wrong = Vec::new();
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        // The binary and the suites may see everything.
        if name == "berth" || name == "berth-e2e" {
            continue;
        }
        let may = allowed.get(name).unwrap_or_else(|| panic!("{name} is a new crate: add its edges here and to docs/adr/0007"));
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let to = dependency["name"].as_str().unwrap_or_default();
            let test_only = dependency["kind"].as_str() == Some("dev");
            if ours.contains(to) && !test_only && !may.contains(&to) {
                wrong.push(format!("{name} → {to}"));
            }
        }
    }
    assert!(wrong.is_empty(), "edges that the architecture does not allow: {wrong:?}");
}

#[test]
fn unsafe_code_lives_in_one_crate() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let out = Command::new("git")
        .arg("-C")
        .arg(&root)
        .args(["grep", "-lE", r"allow\(unsafe_code", "--", "*.rs"])
        .output()
        .expect("git grep runs");
    let files = String::from_utf8_lossy(&out.stdout);
    let strays: Vec<&str> =
        files.lines().filter(|f| !f.starts_with("runtime/linux/") && !f.starts_with("e2e/tests/edges.rs")).collect();
    assert!(strays.is_empty(), "files that allow unsafe code outside runtime/linux: {strays:?}");
}
