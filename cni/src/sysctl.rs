//! Network sysctls through /proc/sys of the calling thread's network namespace: written only when they differ.

use std::path::PathBuf;

use crate::{Error, Result};

fn path(name: &str) -> PathBuf {
    ["/proc/sys/net", name].iter().collect()
}

/// The value; none where the kernel does not have it (IPv6 absent, no bridge netfilter).
pub(crate) fn read(name: &str) -> Option<String> {
    std::fs::read_to_string(path(name)).ok().map(|text| text.trim().to_owned())
}

/// Makes the value so; true when it had to be changed. `name` is relative to `net` with slashes: interface names may hold dots.
pub(crate) fn ensure(name: &str, value: &str) -> Result<bool> {
    if read(name).as_deref() == Some(value) {
        return Ok(false);
    }
    let path = path(name);
    std::fs::write(&path, value).map_err(Error::file("write", &path))?;
    Ok(true)
}

/// Whether IPv6 can be used in this network namespace.
pub(crate) fn has_ipv6() -> bool {
    read("ipv6/conf/all/disable_ipv6").as_deref() == Some("0")
}

/// Turns on forwarding of IPv4.
pub(crate) fn ensure_forwarding_v4() -> Result<()> {
    ensure("ipv4/ip_forward", "1").map(drop)
}

/// Turns on forwarding of IPv6. The kernel then ignores router advertisements on interfaces with `accept_ra` 1, and a node
/// would lose the default route that it learned from one: those are set to 2 (accept although forwarding) first.
pub(crate) fn ensure_forwarding_v6() -> Result<()> {
    if read("ipv6/conf/all/forwarding").as_deref() == Some("1") {
        return Ok(());
    }
    let folder = path("ipv6/conf");
    let entries = std::fs::read_dir(&folder).map_err(Error::file("list", &folder))?;
    for name in entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()) {
        let accept = format!("ipv6/conf/{name}/accept_ra");
        if !matches!(name.as_str(), "all" | "lo") && read(&accept).as_deref() == Some("1") {
            ensure(&accept, "2")?;
        }
    }
    ensure("ipv6/conf/all/forwarding", "1").map(drop)
}
