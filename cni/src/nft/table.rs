//! The instance's table: chains, maps and static rules, written as a whole in one transaction.
//!
//! ```text
//! prerouting, output (nat): to a local address → hostports
//! hostports:      from 127.0.0.0/8 or a pod subnet → hostports-masq; then the maps: dnat
//! hostports-masq: the maps: mark, dnat
//! postrouting:    marked: masquerade; from a masqueraded subnet to outside it: masquerade
//! guard (raw):    to 127.0.0.0/8 but not from lo: drop (route_localnet opens 127.0.0.1 to the bridge)
//! ```
//! Pods change only elements of the maps. The mark is needed because a pod that reaches a pod of its own subnet through the
//! host, or a process on 127.0.0.1, must get its answers back through the host; other people's DNAT is left alone.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::elements::Map;
use super::expression::{Family, Rule, Side};
use super::message::{
    DEL_CHAIN, DEL_RULE, DEL_SET, DEL_TABLE, GET_RULE, NEW_CHAIN, NEW_RULE, NEW_SET, NEW_TABLE, append, commit, create, delete,
    get, is_absent, parse,
};
use crate::netlink::attributes::{as_string, find};
use crate::netlink::{Attributes, Request, Socket};
use crate::{Cidr, Error, Result};

const PREROUTING: u32 = 0;
const OUTPUT: u32 = 3;
const POSTROUTING: u32 = 4;
const DNAT_PRIORITY: i32 = -100;
const SNAT_PRIORITY: i32 = 100;
const RAW_PRIORITY: i32 = -300;
const ACCEPT: u32 = 1;
/// `portmap`'s own default: bit 13.
const MARK_BIT: u32 = 13;

/// A pods' subnet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Subnet {
    pub network: Cidr,
    pub masquerade: bool,
}

/// What the static rules depend on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Nat {
    pub subnets: Vec<Subnet>,
    pub mark_bit: u32,
    /// Bridges of ours whose pods must pass where the host forwards nothing by default.
    #[serde(default)]
    pub bridges: BTreeSet<String>,
}

impl Default for Nat {
    fn default() -> Self {
        Self { subnets: Vec::new(), mark_bit: MARK_BIT, bridges: BTreeSet::new() }
    }
}

impl Nat {
    /// Adds a subnet; true when something changed. Masquerading, once asked for, stays.
    pub(crate) fn add(&mut self, network: Cidr, masquerade: bool) -> bool {
        let network = network.network();
        match self.subnets.iter_mut().find(|s| s.network == network) {
            Some(known) if known.masquerade || !masquerade => false,
            Some(known) => {
                known.masquerade = true;
                true
            }
            None => {
                self.subnets.push(Subnet { network, masquerade });
                self.subnets.sort_unstable();
                true
            }
        }
    }

    fn mark(&self) -> u32 {
        1u32.checked_shl(self.mark_bit).unwrap_or(1 << MARK_BIT)
    }
}

/// Creates the table or brings its rules up to date. The maps' elements stay.
pub(crate) fn ensure_table(socket: &mut Socket, table: &str, nat: &Nat) -> Result<()> {
    match commit(socket, requests(table, nat)) {
        Ok(()) => Ok(()),
        // A table of another version of us, whose chains or maps have another shape: ours alone, so it is replaced.
        Err(failure) if matches!(failure.error.errno, Some(code) if code == exist() || code == unsupported()) => {
            delete_table(socket, table)?;
            commit(socket, requests(table, nat)).map_err(|f| Error::netlink("create nf_tables table", table)(f.error))
        }
        Err(failure) => Err(Error::netlink("create nf_tables table", table)(failure.error)),
    }
}

/// Whether every map is there and every chain has as many rules as it should.
pub(crate) fn is_intact(socket: &mut Socket, table: &str, nat: &Nat) -> Result<bool> {
    let mut missing: BTreeMap<String, usize> = BTreeMap::new();
    for (chain, _) in rules(nat) {
        *missing.entry(chain.to_owned()).or_default() += 1;
    }
    let found = match socket.dump(get(GET_RULE, &Attributes::new().string(1, table))) {
        Ok(messages) => messages,
        Err(error) if is_absent(&error) => return Ok(false),
        Err(error) => return Err(Error::netlink("list rules of nf_tables table", table)(error)),
    };
    for message in &found {
        let Some((NEW_RULE, body)) = parse(message) else { continue };
        // Kernels that do not filter a dump by table show all of them.
        if find(body, 1).map(as_string).as_deref() == Some(table) {
            let chain = find(body, 2).map(as_string).unwrap_or_default();
            match missing.get_mut(&chain) {
                Some(count) if *count > 0 => *count -= 1,
                _ => return Ok(false),
            }
        }
    }
    // Rules name the maps, so the kernel lets no map go before them.
    Ok(missing.values().all(|count| *count == 0))
}

fn exist() -> i32 {
    rustix::io::Errno::EXIST.raw_os_error()
}

fn unsupported() -> i32 {
    rustix::io::Errno::OPNOTSUPP.raw_os_error()
}

/// Removes the table with everything in it; one that is gone is no error.
pub(crate) fn delete_table(socket: &mut Socket, table: &str) -> Result<()> {
    match commit(socket, vec![delete(DEL_TABLE, &Attributes::new().string(1, table))]) {
        Err(failure) if !is_absent(&failure.error) => Err(Error::netlink("delete nf_tables table", table)(failure.error)),
        _ => Ok(()),
    }
}

fn requests(table: &str, nat: &Nat) -> Vec<Request> {
    let mut requests = vec![create(NEW_TABLE, &Attributes::new().string(1, table))];
    for (id, map) in (1..).zip(Map::ALL) {
        requests.push(create(NEW_SET, &map.definition(table, id)));
    }
    let base = [
        ("prerouting", "nat", PREROUTING, DNAT_PRIORITY),
        ("output", "nat", OUTPUT, DNAT_PRIORITY),
        ("postrouting", "nat", POSTROUTING, SNAT_PRIORITY),
        ("guard", "filter", PREROUTING, RAW_PRIORITY),
    ];
    for (name, kind, hook, priority) in base {
        let hook = Attributes::new().be32(1, hook).bytes(2, &priority.to_be_bytes());
        let chain = Attributes::new().string(1, table).string(3, name).nest(4, hook).be32(5, ACCEPT).string(7, kind);
        requests.push(create(NEW_CHAIN, &chain));
    }
    for name in ["hostports", "hostports-masq"] {
        requests.push(create(NEW_CHAIN, &Attributes::new().string(1, table).string(3, name)));
    }
    for name in ["prerouting", "output", "postrouting", "guard", "hostports", "hostports-masq"] {
        requests.push(delete(DEL_RULE, &Attributes::new().string(1, table).string(2, name)));
    }
    for (chain, rule) in rules(nat) {
        let rule = Attributes::new().string(1, table).string(2, chain).nest(4, rule.attributes());
        requests.push(append(NEW_RULE, &rule));
    }
    requests
}

fn cidr(text: &str) -> Option<Cidr> {
    text.parse().ok()
}

fn rules(nat: &Nat) -> Vec<(&'static str, Rule)> {
    let mut rules = Vec::new();
    for hook in ["prerouting", "output"] {
        rules.push((hook, Rule::new().destination_is_local().jump("hostports")));
    }
    let loopback = cidr("127.0.0.0/8");
    let sources = loopback.into_iter().chain(nat.subnets.iter().map(|s| s.network));
    for source in sources {
        let rule = Rule::new().family(Family::of(source.addr())).address(Side::Source, source, true);
        rules.push(("hostports", rule.jump("hostports-masq")));
    }
    for map in Map::ALL {
        let look_up = || Rule::new().family(map.family).look_up_host_port(map.family, map.by_address, map.name());
        rules.push(("hostports", look_up().dnat(map.family)));
        rules.push(("hostports-masq", look_up().mark(nat.mark()).dnat(map.family)));
    }
    rules.push(("postrouting", Rule::new().marked(nat.mark()).masquerade()));
    for subnet in nat.subnets.iter().filter(|s| s.masquerade) {
        rules.extend(masquerade(subnet.network).map(|rule| ("postrouting", rule)));
    }
    rules.extend(loopback.map(|network| {
        let to_loopback = Rule::new().family(Family::V4).not_from("lo").address(Side::Destination, network, true);
        ("guard", to_loopback.drop())
    }));
    rules
}

/// What leaves a subnet, multicast excepted, gets the host's address.
fn masquerade(network: Cidr) -> Option<Rule> {
    let multicast = cidr(if network.is_ipv4() { "224.0.0.0/4" } else { "ff00::/8" })?;
    let rule = Rule::new()
        .family(Family::of(network.addr()))
        .address(Side::Source, network, true)
        .address(Side::Destination, network, false)
        .address(Side::Destination, multicast, false)
        .masquerade();
    Some(rule)
}

/// Whether an event of this kind means that the table has lost something.
pub(super) fn is_loss(kind: u8) -> bool {
    matches!(kind, DEL_TABLE | DEL_CHAIN | DEL_RULE | DEL_SET)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subnet_is_added_once_and_keeps_its_masquerade() {
        let mut nat = Nat::default();
        let network = "10.88.0.1/16".parse().unwrap();
        assert!(nat.add(network, false));
        assert!(nat.add(network, true));
        assert!(!nat.add(network, false));
        assert_eq!(nat.subnets, [Subnet { network: "10.88.0.0/16".parse().unwrap(), masquerade: true }]);
    }

    #[test]
    fn the_state_reads_what_it_writes() {
        let mut nat = Nat::default();
        nat.add("fd00::/64".parse().unwrap(), true);
        let text = serde_json::to_string(&nat).unwrap();
        assert_eq!(text, r#"{"subnets":[{"network":"fd00::/64","masquerade":true}],"mark_bit":13,"bridges":[]}"#);
        assert_eq!(serde_json::from_str::<Nat>(&text).unwrap(), nat);
    }
}
