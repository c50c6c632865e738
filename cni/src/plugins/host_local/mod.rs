//! The host-local IPAM plugin: addresses out of ranges on this host, by lease files.

mod ranges;
mod store;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::fields::Fields;
use crate::result::{CniResult, IpConfig, ResultDns, Route};
use crate::{Cidr, Error, Result};

use ranges::{Range, RangeSet};
pub(crate) use store::{Owner, Store, leases_in};

const PLUGIN: &str = "host-local";

/// The `ipam` part of a configuration, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostLocal {
    sets: Vec<RangeSet>,
    routes: Vec<Route>,
    dir: PathBuf,
    resolv_conf: Option<PathBuf>,
}

impl HostLocal {
    /// Reads the configuration of a plugin whose `ipam.type` is host-local. `data_dir` is where leases are when it does not say.
    pub(crate) fn parse(config: &Map<String, Value>, data_dir: &Path) -> Result<Self> {
        let network = config.get("name").and_then(Value::as_str).unwrap_or_default();
        if network.is_empty() || network.contains('/') || network.starts_with('.') {
            return Err(Error::invalid(PLUGIN, format!("invalid network name {network:?}")));
        }
        let ipam = config.get("ipam").and_then(Value::as_object).cloned().unwrap_or_default();
        let mut fields = Fields::nested(PLUGIN, "ipam.", ipam);
        fields.take::<String>("type")?;
        let mut sets = Vec::new();
        if let Some(range) = Range::take(&mut fields)? {
            sets.push(RangeSet(vec![range]));
        }
        let listed = fields.take::<Vec<Vec<Map<String, Value>>>>("ranges")?.unwrap_or_default();
        let runtime = config.get("runtimeConfig").and_then(|r| r.get("ipRanges")).cloned().unwrap_or(json!([]));
        let runtime: Vec<Vec<Map<String, Value>>> =
            serde_json::from_value(runtime).map_err(Error::decode("host-local: field runtimeConfig.ipRanges"))?;
        for set in runtime.into_iter().chain(listed) {
            sets.push(RangeSet(set.into_iter().map(Range::of_object).collect::<Result<_>>()?));
        }
        let routes = fields.take("routes")?.unwrap_or_default();
        let dir = fields.take::<PathBuf>("dataDir")?.filter(|d| !d.as_os_str().is_empty());
        let resolv_conf = fields.take::<PathBuf>("resolvConf")?.filter(|p| !p.as_os_str().is_empty());
        fields.finish()?;
        refuse_requested_ips(config)?;
        check_sets(&sets)?;
        let dir = dir.unwrap_or_else(|| data_dir.to_owned()).join(network);
        Ok(Self { sets, routes, dir, resolv_conf })
    }

    /// The folder of this network's leases.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Leases one address of each range set. `repeated`: the owner may hold addresses already, and then keeps them (this reads
    /// every lease, so callers that know better say false).
    pub(crate) fn add(&self, owner: &Owner, boot_id: &str, repeated: bool) -> Result<CniResult> {
        let store = Store::open(&self.dir, boot_id)?;
        let held = if repeated { store.leases()? } else { Vec::new() };
        let held: Vec<IpAddr> = held.into_iter().filter(|(_, o)| o == owner).map(|(ip, _)| ip).collect();
        let dns = self.resolv_conf.as_deref().map(read_dns).transpose()?.unwrap_or_default();
        let mut result = CniResult { routes: self.routes.clone(), dns, ..CniResult::default() };
        for (index, set) in self.sets.iter().enumerate() {
            let known = held.iter().find_map(|ip| Some((*ip, set.0.iter().find(|r| r.subnet.contains(*ip))?)));
            let (ip, range) = match known {
                Some(known) => known,
                None => store.allocate(set, index, owner).inspect_err(|_| {
                    // All or nothing; the error that counts is the one above.
                    let _ = store.release(&BTreeSet::from([owner.clone()]));
                })?,
            };
            let address = Cidr::new(ip, range.subnet.prefix()).unwrap_or(range.subnet);
            result.ips.push(IpConfig { interface: None, address, gateway: Some(range.gateway) });
        }
        Ok(result)
    }

    /// Frees the owner's addresses.
    pub(crate) fn delete(&self, owner: &Owner, boot_id: &str) -> Result<()> {
        release(&self.dir, &BTreeSet::from([owner.clone()]), boot_id)
    }

    /// Whether the owner holds an address.
    pub(crate) fn check(&self, owner: &Owner, boot_id: &str) -> Result<()> {
        let store = Store::open(&self.dir, boot_id)?;
        if store.leases()?.iter().any(|(_, o)| o == owner) {
            return Ok(());
        }
        Err(Error::Check { subject: PLUGIN.to_owned(), reason: format!("no address is leased to {}", owner.container_id) })
    }

    /// Frees the addresses of everybody else (GC).
    pub(crate) fn collect(&self, valid: &BTreeSet<Owner>, boot_id: &str) -> Result<()> {
        let store = Store::open(&self.dir, boot_id)?;
        for (ip, _) in store.leases()?.into_iter().filter(|(_, owner)| !valid.contains(owner)) {
            store.remove(ip)?;
        }
        Ok(())
    }
}

/// Frees the addresses of some owners in a folder of leases.
pub(crate) fn release(dir: &Path, owners: &BTreeSet<Owner>, boot_id: &str) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    Store::open(dir, boot_id)?.release(owners)
}

/// Requests for certain addresses are not served; asking for none is fine.
fn refuse_requested_ips(config: &Map<String, Value>) -> Result<()> {
    let asked = [("runtimeConfig", "ips"), ("args", "ips")].into_iter().find_map(|(outer, inner)| {
        let holder = config.get(outer)?;
        let holder = if outer == "args" { holder.get("cni")? } else { holder };
        holder.get(inner).filter(|ips| ips.as_array().is_none_or(|ips| !ips.is_empty())).map(|v| (outer, inner, v))
    });
    match asked {
        Some((outer, inner, value)) => Err(Error::UnsupportedField {
            plugin: PLUGIN.to_owned(),
            field: format!("{outer}.{inner}"),
            value: value.to_string(),
        }),
        None => Ok(()),
    }
}

fn check_sets(sets: &[RangeSet]) -> Result<()> {
    if sets.is_empty() {
        return Err(Error::invalid(PLUGIN, "no ranges are given"));
    }
    for (at, set) in sets.iter().enumerate() {
        set.check()?;
        if let Some(other) = sets[..at].iter().find(|other| other.overlaps(set)) {
            return Err(Error::invalid(PLUGIN, format!("range sets {other} and {set} overlap")));
        }
    }
    Ok(())
}

fn read_dns(path: &Path) -> Result<ResultDns> {
    let text = std::fs::read_to_string(path).map_err(Error::file("read", path))?;
    Ok(parse_dns(&text))
}

fn parse_dns(text: &str) -> ResultDns {
    let mut dns = ResultDns::default();
    for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with(['#', ';'])) {
        let mut words = line.split_whitespace().map(str::to_owned);
        match words.next().as_deref() {
            Some("nameserver") => dns.nameservers.extend(words.next()),
            Some("domain") => dns.domain = words.next().unwrap_or_default(),
            Some("search") => dns.search.extend(words),
            Some("options") => dns.options.extend(words),
            _ => {}
        }
    }
    dns
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(ipam: Value) -> Map<String, Value> {
        json!({"name": "net", "type": "bridge", "ipam": ipam}).as_object().cloned().unwrap()
    }

    fn parse(ipam: Value) -> Result<HostLocal> {
        HostLocal::parse(&config(ipam), Path::new("/data"))
    }

    #[test]
    fn both_forms_of_ranges_are_read() {
        let both = parse(json!({"type": "host-local", "subnet": "10.0.0.0/24", "ranges": [[{"subnet": "fd00::/64"}]],
            "routes": [{"dst": "0.0.0.0/0"}], "dataDir": "/x"}));
        let both = both.unwrap();
        assert_eq!(
            both.sets.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["10.0.0.1-10.0.0.254", "fd00::1-fd00::ffff:ffff:ffff:ffff"]
        );
        assert_eq!(both.dir, Path::new("/x/net"));
        assert_eq!(parse(json!({"type": "host-local", "subnet": "10.0.0.0/24"})).unwrap().dir, Path::new("/data/net"));
    }

    #[test]
    fn unknown_fields_and_overlaps_are_refused() {
        for ipam in [
            json!({"type": "host-local"}),
            json!({"type": "host-local", "subnet": "10.0.0.0/24", "surprise": 1}),
            json!({"type": "host-local", "subnet": "10.0.0.0/24", "ranges": [[{"subnet": "10.0.0.0/25"}]]}),
            json!({"type": "host-local", "ranges": [[{"subnet": "10.0.0.0/24", "color": "red"}]]}),
            json!({"type": "host-local", "subnet": "10.0.0.0/24", "routes": [{"dst": "0.0.0.0/0", "via": "x"}]}),
        ] {
            assert!(parse(ipam.clone()).is_err(), "{ipam}");
        }
        let mut config = config(json!({"type": "host-local", "subnet": "10.0.0.0/24"}));
        config.insert("runtimeConfig".into(), json!({"ips": ["10.0.0.9/24"]}));
        assert_eq!(HostLocal::parse(&config, Path::new("/data")).unwrap_err().cni_code(), 2);
    }

    #[test]
    fn a_repeated_add_yields_the_same_addresses_and_a_failed_one_keeps_none() {
        let dir = tempfile::tempdir().unwrap();
        let ipam = json!({"type": "host-local", "ranges": [[{"subnet": "10.0.0.0/24"}], [{"subnet": "fd00::/126"}]]});
        let plugin = HostLocal::parse(&config(ipam), dir.path()).unwrap();
        let owner = |id: &str| Owner { container_id: id.to_owned(), ifname: "eth0".to_owned() };
        let first = plugin.add(&owner("a"), "boot", true).unwrap();
        assert_eq!(plugin.add(&owner("a"), "boot", true).unwrap(), first);
        assert_eq!(first.ips.iter().map(|ip| ip.address.to_string()).collect::<Vec<_>>(), ["10.0.0.2/24", "fd00::2/126"]);
        plugin.add(&owner("b"), "boot", false).unwrap();
        assert!(matches!(plugin.add(&owner("c"), "boot", true), Err(Error::Exhausted { .. })));
        assert_eq!(Store::open(plugin.dir(), "boot").unwrap().leases().unwrap().len(), 4);
        plugin.collect(&BTreeSet::from([owner("a")]), "boot").unwrap();
        assert!(plugin.check(&owner("a"), "boot").is_ok());
        assert!(plugin.check(&owner("b"), "boot").is_err());
        plugin.delete(&owner("a"), "boot").unwrap();
        plugin.delete(&owner("a"), "boot").unwrap();
        assert!(Store::open(plugin.dir(), "boot").unwrap().leases().unwrap().is_empty());
    }

    #[test]
    fn resolv_conf_becomes_dns() {
        let dns = parse_dns("# x\nnameserver 10.0.0.1\nnameserver fd00::1\nsearch a b\noptions ndots:5\ndomain d\n");
        assert_eq!((dns.nameservers.len(), dns.search.len(), dns.options.len(), dns.domain.as_str()), (2, 2, 1, "d"));
    }
}
