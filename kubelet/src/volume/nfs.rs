//! NFS 4 by the kernel's own client, without `mount.nfs`: what that program does is here: the server's address and the version.

use std::fs;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use berth_linux::mount::{MountAttrs, fs_context};
use k8s_openapi::api::core::v1::NFSVolumeSource;

use super::persistent::attach;
use crate::execute::with_causes;

/// What is tried where the options name no version, in the order of `mount.nfs`. The kernel asks for none of 4 by itself.
const VERSIONS: [&str; 3] = ["4.2", "4.1", "4.0"];
/// The options that say which version is wanted.
const VERSION_OPTIONS: [&str; 3] = ["vers", "nfsvers", "minorversion"];

/// Mounts an export at `target`.
pub(super) fn mount(source: &NFSVolumeSource, options: &[String], target: &Path, read_only: bool) -> Result<(), String> {
    let hosts = fs::read_to_string("/etc/hosts").unwrap_or_default();
    let address = address_of(&source.server, &hosts)
        .ok_or_else(|| format!("nfs server {:?} is neither an address nor in /etc/hosts", source.server))?;
    let failed = |e: &dyn std::error::Error| {
        let text = with_causes(e);
        let none = !fs::read_to_string("/proc/filesystems").unwrap_or_default().lines().any(|l| l.ends_with("\tnfs4"));
        let hint = if none { " (this kernel has no NFS client: module nfsv4)" } else { "" };
        format!("mount nfs {}:{}: {text}{hint}", source.server, source.path)
    };
    let options: Vec<&str> = options.iter().flat_map(|o| o.split(',')).filter(|o| !o.is_empty()).collect();
    let mut versions = versions(&options).into_iter().peekable();
    while let Some(version) = versions.next() {
        match connect(address, &source.path, &options, version) {
            Ok(mount) => return attach(mount.as_fd(), target, read_only).map_err(|e| failed(&e)),
            Err(e) if versions.peek().is_some() && is_other_version(&e) => {}
            Err(e) => return Err(failed(&e)),
        }
    }
    Ok(())
}

/// The versions to try; `None` leaves it to the options.
fn versions(options: &[&str]) -> Vec<Option<&'static str>> {
    let named = |option: &str| {
        let key = option.split('=').next().unwrap_or_default();
        VERSION_OPTIONS.contains(&key) || option.strip_prefix('v').is_some_and(|v| v.starts_with(|c: char| c.is_ascii_digit()))
    };
    if options.iter().any(|option| named(option)) { vec![None] } else { VERSIONS.map(Some).to_vec() }
}

/// Whether the server, or the kernel, does not speak the version.
fn is_other_version(error: &berth_linux::Error) -> bool {
    error.raw_errno() == Some(rustix::io::Errno::PROTONOSUPPORT.raw_os_error())
}

fn connect(address: IpAddr, path: &str, options: &[&str], version: Option<&str>) -> berth_linux::Result<OwnedFd> {
    let context = fs_context("nfs4")?;
    let host = if address.is_ipv6() { format!("[{address}]") } else { address.to_string() };
    let any = if address.is_ipv6() { "::" } else { "0.0.0.0" };
    context.set_string("source", format!("{host}:{path}"))?;
    context.set_string("addr", address.to_string())?;
    context.set_string("clientaddr", any)?;
    if let Some(version) = version {
        context.set_string("vers", version)?;
    }
    for option in options {
        match option.split_once('=') {
            Some((key, value)) => context.set_string(key, value)?,
            None => context.set_flag(option)?,
        };
    }
    context.create()?;
    context.mount(MountAttrs::empty())
}

/// An address, or a name that the hosts file knows.
fn address_of(server: &str, hosts: &str) -> Option<IpAddr> {
    let bare = server.trim_start_matches('[').trim_end_matches(']');
    let named = || {
        hosts.lines().find_map(|line| {
            let mut words = line.split('#').next()?.split_whitespace();
            let address = words.next()?.parse().ok()?;
            words.any(|name| name == server).then_some(address)
        })
    };
    bare.parse().ok().or_else(named)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_addresses_or_names_of_the_hosts_file() {
        let hosts = "127.0.0.1 localhost # nas\n192.0.2.9 other nas\n";
        for (server, address) in
            [("10.0.0.1", Some("10.0.0.1")), ("[fd00::1]", Some("fd00::1")), ("nas", Some("192.0.2.9")), ("no.such", None)]
        {
            assert_eq!(address_of(server, hosts).map(|a| a.to_string()).as_deref(), address, "{server}");
        }
    }

    #[test]
    fn a_version_is_chosen_where_the_options_name_none() {
        assert_eq!(versions(&["noatime", "versatile"]), [Some("4.2"), Some("4.1"), Some("4.0")]);
        for named in ["vers=4.1", "nfsvers=4", "minorversion=1", "v4.2"] {
            assert_eq!(versions(&["ro", named]), [None], "{named}");
        }
    }
}
