//! Whether the kernel has what the built-in network is made of: tried in a network namespace that ends with its thread.

use std::os::fd::AsFd;

use berth_linux::netlink::{NETFILTER, ROUTE};
use berth_linux::ns::{self, NamespaceKind};
use berth_linux::process::CloneFlags;

use crate::netlink::Socket;
use crate::netlink::link::{Mac, NewVeth, create_bridge, create_veth};
use crate::nft::{Nat, ensure_table};

/// One thing that was tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// `bridge`, `veth` or `nf_tables`.
    pub name: &'static str,
    /// What the kernel said where it cannot be made.
    pub error: Option<String>,
}

fn try_all() -> Vec<Probe> {
    let probe = |name, outcome: Result<(), String>| Probe { name, error: outcome.err() };
    let mac = |last| Mac([2, 0, 0, 0, 0, last]);
    let bridge = || {
        let mut socket = Socket::open(ROUTE).map_err(|e| e.to_string())?;
        create_bridge(&mut socket, "probe-br", mac(1), None, false).map_err(|e| e.to_string())
    };
    let veth = || {
        let mut socket = Socket::open(ROUTE).map_err(|e| e.to_string())?;
        let here = ns::open_ns(None, NamespaceKind::Net).map_err(|e| e.to_string())?;
        let new = NewVeth {
            name: "probe-a",
            mac: mac(2),
            master: None,
            mtu: None,
            peer_name: "probe-b",
            peer_mac: mac(3),
            peer_netns: here.as_fd(),
            port: &[],
        };
        create_veth(&mut socket, &new).map_err(|e| e.error.to_string())
    };
    let nf_tables = || {
        let mut socket = Socket::open(NETFILTER).map_err(|e| e.to_string())?;
        ensure_table(&mut socket, "berth-probe", &Nat::default()).map_err(|e| e.to_string())
    };
    vec![probe("bridge", bridge()), probe("veth", veth()), probe("nf_tables", nf_tables())]
}

/// Tries a bridge, a veth pair and an nf_tables table of ours. Nothing of it remains.
#[must_use]
pub fn probe() -> Vec<Probe> {
    let tried = std::thread::Builder::new().name("probe".to_owned()).spawn(|| {
        ns::unshare(CloneFlags::NEWNET).map_err(|e| format!("a network namespace: {e}"))?;
        Ok(try_all())
    });
    let outcome = match tried.map(|thread| thread.join()) {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(_)) => Err("the probe broke off".to_owned()),
        Err(error) => Err(error.to_string()),
    };
    outcome.unwrap_or_else(|error| ["bridge", "veth", "nf_tables"].map(|name| Probe { name, error: Some(error.clone()) }).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_changes_nothing_here() {
        let links = || std::fs::read_to_string("/proc/net/dev").map(|text| text.lines().count());
        let before = links().unwrap();
        let names: Vec<&str> = probe().iter().map(|p| p.name).collect();
        assert_eq!(names, ["bridge", "veth", "nf_tables"]);
        assert_eq!(links().unwrap(), before);
    }
}
