//! The empty chain by which containers that carry both kinds of iptables find out which one their host uses: they look for it in the
//! table `mangle`. Owns that chain alone; what else is in the table is iptables'.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use berth_linux::netlink::NETFILTER;

use super::message::{NEW_CHAIN, NEW_TABLE, commit, create_in};
use crate::netlink::{Attributes, Socket};
use crate::{Error, Result, sysctl};

/// As the upstream's kubelet names them.
const TABLE: &str = "mangle";
const CHAIN: &str = "KUBE-IPTABLES-HINT";
const IPV4: u8 = 2;
const IPV6: u8 = 10;
/// The tables of the legacy iptables in this network namespace, one a line; the file is there once its module is.
const LEGACY_TABLES: &str = "/proc/self/net/ip_tables_names";

/// Makes the chain where it is missing, in nf_tables, which is what berth writes its own rules to. False, and nothing done, where the
/// host has rules of the legacy iptables: there the hint would be wrong.
///
/// # Errors
/// When the file of the legacy tables cannot be read, or the kernel refuses the table or the chain.
pub fn ensure_iptables_hint() -> Result<bool> {
    if has_legacy_tables(Path::new(LEGACY_TABLES))? {
        return Ok(false);
    }
    let mut socket = Socket::open(NETFILTER).map_err(|e| Error::netlink("open", "netlink socket")(e.into()))?;
    for family in [Some(IPV4), sysctl::has_ipv6().then_some(IPV6)].into_iter().flatten() {
        let table = create_in(family, NEW_TABLE, &Attributes::new().string(1, TABLE));
        let chain = create_in(family, NEW_CHAIN, &Attributes::new().string(1, TABLE).string(3, CHAIN));
        commit(&mut socket, vec![table, chain]).map_err(|f| Error::netlink("create chain", CHAIN)(f.error))?;
    }
    Ok(true)
}

fn has_legacy_tables(names: &Path) -> Result<bool> {
    match fs::read_to_string(names) {
        Ok(names) => Ok(!names.trim().is_empty()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::file("read", names)(error)),
    }
}
