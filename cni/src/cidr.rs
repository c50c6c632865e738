//! An address with its prefix length, as CNI writes it (`10.88.0.5/16`).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An IP address and a prefix length. The host bits may be set: it is an interface's address as well as a subnet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cidr {
    addr: IpAddr,
    prefix: u8,
}

/// Text that is not an address with a prefix length.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid CIDR {0:?}")]
pub struct InvalidCidr(String);

impl Cidr {
    /// None when the prefix is longer than the address.
    pub fn new(addr: IpAddr, prefix: u8) -> Option<Self> {
        (prefix <= bits(addr)).then_some(Self { addr, prefix })
    }

    /// The address alone.
    pub fn addr(&self) -> IpAddr {
        self.addr
    }

    /// The prefix length.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Whether the address is an IPv4 one.
    pub fn is_ipv4(&self) -> bool {
        self.addr.is_ipv4()
    }

    /// The same network with all host bits zero.
    pub fn network(&self) -> Self {
        let addr = from_number(to_number(self.addr) & self.mask(), self.is_ipv4());
        Self { addr, prefix: self.prefix }
    }

    /// The address with all host bits set (the broadcast address in IPv4).
    pub fn last(&self) -> IpAddr {
        from_number(to_number(self.addr) | self.host_bits(), self.is_ipv4())
    }

    /// Whether `addr` is inside the network.
    pub fn contains(&self, addr: IpAddr) -> bool {
        addr.is_ipv4() == self.is_ipv4() && to_number(addr) & self.mask() == to_number(self.addr) & self.mask()
    }

    /// Whether the two networks share an address.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.contains(other.network().addr) || other.contains(self.network().addr)
    }

    fn host_bits(&self) -> u128 {
        let host = u32::from(bits(self.addr) - self.prefix);
        1u128.checked_shl(host).map_or(u128::MAX, |v| v - 1)
    }

    fn mask(&self) -> u128 {
        let all = if self.is_ipv4() { u128::from(u32::MAX) } else { u128::MAX };
        all & !self.host_bits()
    }
}

/// The address after `addr`; none after the last of its family.
pub(crate) fn next_ip(addr: IpAddr) -> Option<IpAddr> {
    match addr {
        IpAddr::V4(v4) => u32::from(v4).checked_add(1).map(|n| IpAddr::V4(n.into())),
        IpAddr::V6(v6) => u128::from(v6).checked_add(1).map(|n| IpAddr::V6(n.into())),
    }
}

/// The address before `addr`; none before the first of its family.
pub(crate) fn previous_ip(addr: IpAddr) -> Option<IpAddr> {
    match addr {
        IpAddr::V4(v4) => u32::from(v4).checked_sub(1).map(|n| IpAddr::V4(n.into())),
        IpAddr::V6(v6) => u128::from(v6).checked_sub(1).map(|n| IpAddr::V6(n.into())),
    }
}

fn bits(addr: IpAddr) -> u8 {
    if addr.is_ipv4() { 32 } else { 128 }
}

fn to_number(addr: IpAddr) -> u128 {
    match addr {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

fn from_number(number: u128, v4: bool) -> IpAddr {
    if v4 {
        // The number was masked from 32 bits.
        IpAddr::V4(Ipv4Addr::from((number & u128::from(u32::MAX)) as u32))
    } else {
        IpAddr::V6(Ipv6Addr::from(number))
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.prefix)
    }
}

impl FromStr for Cidr {
    type Err = InvalidCidr;

    fn from_str(text: &str) -> Result<Self, InvalidCidr> {
        let invalid = || InvalidCidr(text.to_owned());
        let (addr, prefix) = text.split_once('/').ok_or_else(invalid)?;
        let addr: IpAddr = addr.parse().map_err(|_| invalid())?;
        if prefix.is_empty() || !prefix.bytes().all(|b| b.is_ascii_digit()) {
            return Err(invalid());
        }
        let prefix: u8 = prefix.parse().map_err(|_| invalid())?;
        Self::new(addr, prefix).ok_or_else(invalid)
    }
}

impl Serialize for Cidr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Cidr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cidr(text: &str) -> Cidr {
        text.parse().unwrap()
    }

    #[test]
    fn parses_both_families_and_keeps_host_bits() {
        for text in ["10.88.0.5/16", "0.0.0.0/0", "fd00::5/64", "::/0", "10.0.0.1/32", "fd00::1/128"] {
            assert_eq!(cidr(text).to_string(), text);
        }
        for text in ["10.88.0.5", "10.88.0.5/33", "fd00::/129", "a/8", "10.0.0.0/", "10.0.0.0/+8", ""] {
            assert!(text.parse::<Cidr>().is_err(), "{text}");
        }
    }

    #[test]
    fn knows_its_first_and_last_address() {
        assert_eq!(cidr("10.88.3.5/16").network(), cidr("10.88.0.0/16"));
        assert_eq!(cidr("10.88.3.5/16").last().to_string(), "10.88.255.255");
        assert_eq!(cidr("0.0.0.0/0").last().to_string(), "255.255.255.255");
        assert_eq!(cidr("::/0").last().to_string(), "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff");
        assert_eq!(cidr("fd00::5/64").last().to_string(), "fd00::ffff:ffff:ffff:ffff");
        assert_eq!(cidr("10.0.0.1/32").last().to_string(), "10.0.0.1");
    }

    #[test]
    fn contains_and_overlaps_within_one_family() {
        assert!(cidr("10.88.0.0/16").contains("10.88.255.1".parse().unwrap()));
        assert!(!cidr("10.88.0.0/16").contains("10.89.0.1".parse().unwrap()));
        assert!(!cidr("0.0.0.0/0").contains("fd00::1".parse().unwrap()));
        assert!(cidr("10.88.0.0/16").overlaps(&cidr("10.88.4.0/24")));
        assert!(cidr("10.88.4.0/24").overlaps(&cidr("10.88.0.0/16")));
        assert!(!cidr("10.88.4.0/24").overlaps(&cidr("10.88.5.0/24")));
    }
}
