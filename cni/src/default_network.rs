//! The network that works without any configuration: our bridge, host-local and portmap, on subnets that this host does not use.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::{Value, json};

use crate::conf::NetworkConf;
use crate::names::{Names, fnv};
use crate::{Cidr, Error, Result};

/// The name of the network.
pub(crate) const NAME: &str = "berth";
/// Candidates are 10.64.0.0/16 to 10.127.0.0/16: away from the ranges that people and other runtimes choose first.
const FIRST_OCTET: u8 = 64;
const CANDIDATES: u8 = 64;

/// The list of plugins.
pub(crate) fn conf(names: &Names, subnets: &[Cidr]) -> Result<NetworkConf> {
    let ranges: Vec<Value> = subnets.iter().map(|subnet| json!([{"subnet": subnet.network()}])).collect();
    let list = json!({
        "cniVersion": "1.1.0",
        "name": NAME,
        "plugins": [
            {
                "type": "bridge",
                "bridge": names.bridge,
                "isGateway": true,
                "isDefaultGateway": true,
                "forceAddress": true,
                "ipMasq": true,
                "hairpinMode": true,
                "ipam": {"type": "host-local", "ranges": ranges},
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    });
    let bytes = serde_json::to_vec(&list).map_err(Error::decode("the built-in network"))?;
    NetworkConf::parse(&bytes, "the built-in network", None)
}

/// An IPv4 subnet that overlaps with none in use, the same for the same instance where possible; and a unique local IPv6 subnet where
/// the host has IPv6.
pub(crate) fn choose_subnets(instance: &str, in_use: &[Cidr], ipv6: bool) -> Result<Vec<Cidr>> {
    let hash = fnv(instance.bytes());
    let candidate = |step: u8| {
        let octet = FIRST_OCTET + ((hash % u64::from(CANDIDATES)) as u8).wrapping_add(step) % CANDIDATES;
        Cidr::new(IpAddr::V4(Ipv4Addr::new(10, octet, 0, 0)), 16)
    };
    let is_free = |cidr: &Cidr| !in_use.iter().any(|used| used.overlaps(cidr));
    let v4 = (0..CANDIDATES).filter_map(candidate).find(is_free);
    let v4 = v4.ok_or_else(|| Error::NoFreeSubnet {
        example: in_use.iter().find(|used| used.is_ipv4()).map(ToString::to_string).unwrap_or_default(),
    })?;
    let [.., a, b, c, d, e] = hash.to_be_bytes();
    let part = |high: u8, low: u8| u16::from_be_bytes([high, low]);
    let v6 = Ipv6Addr::new(part(0xfd, a), part(b, c), part(d, e), 0, 0, 0, 0, 0);
    let v6 = Cidr::new(IpAddr::V6(v6), 64).filter(|cidr| ipv6 && is_free(cidr));
    Ok([Some(v4), v6].into_iter().flatten().collect())
}

/// Refuses subnets in which the node has an address, or that overlap with the network of one. Pure; `in_use` are addresses with the
/// names of their interfaces.
pub(crate) fn refuse_taken(subnets: &[Cidr], in_use: &[(String, Cidr)]) -> Result<()> {
    for cidr in subnets {
        if let Some((link, address)) = in_use.iter().find(|(_, address)| address.overlaps(cidr)) {
            return Err(Error::SubnetTaken { cidr: *cidr, address: *address, link: link.clone() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_are_stable_and_avoid_those_in_use() {
        let first = choose_subnets("a1b2c3", &[], true).unwrap();
        assert_eq!(first, choose_subnets("a1b2c3", &[], true).unwrap());
        assert_eq!(first.len(), 2);
        assert!(first[1].to_string().starts_with("fd"), "{}", first[1]);
        assert_eq!(choose_subnets("a1b2c3", &[], false).unwrap().len(), 1);
        let other = choose_subnets("a1b2c3", &first[..1], true).unwrap();
        assert_ne!(other[0], first[0]);
        assert!(choose_subnets("a1b2c3", &["10.0.0.0/8".parse().unwrap()], true).is_err());
    }

    #[test]
    fn a_subnet_that_has_an_address_of_the_node_or_of_its_network_is_refused_by_name() {
        let in_use: Vec<(String, Cidr)> =
            [("lo", "127.0.0.1/8"), ("eth0", "10.9.3.4/24"), ("wg0", "10.7.0.1/32"), ("eth0", "fd00::5/64")]
                .map(|(link, address)| (link.to_owned(), address.parse().unwrap()))
                .into();
        let taken = |cidr: &str| refuse_taken(&[cidr.parse().unwrap()], &in_use).map_err(|error| error.to_string());
        for free in ["10.9.0.0/24", "10.9.4.0/22", "10.8.0.0/16", "fd00:1::/64"] {
            assert_eq!(taken(free), Ok(()), "{free}");
        }
        for (cidr, with) in [
            ("10.9.0.0/16", "10.9.3.4/24 of interface eth0"),
            ("10.9.3.128/25", "10.9.3.4/24 of interface eth0"),
            ("10.7.0.0/24", "10.7.0.1/32 of interface wg0"),
            ("fd00::/48", "fd00::5/64 of interface eth0"),
        ] {
            let error = taken(cidr).unwrap_err();
            assert!(error.starts_with(&format!("pod CIDR {cidr} overlaps with {with}")), "{error}");
        }
    }

    #[test]
    fn the_configuration_is_one_that_we_accept() {
        let names = Names::of_instance("a1b2c3").unwrap();
        let conf = conf(&names, &["10.64.0.0/16".parse().unwrap(), "fd00::/64".parse().unwrap()]).unwrap();
        assert_eq!(conf.plugins.len(), 2);
    }
}
