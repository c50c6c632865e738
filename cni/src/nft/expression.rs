//! The expressions that our rules are made of. Registers are 32-bit words; a value longer than one goes on in the next.

use std::net::IpAddr;

use super::message::LIST_ELEMENT;
use crate::Cidr;
use crate::netlink::Attributes;

/// The word where keys and map data begin (`NFT_REG_1`).
const FIRST: u32 = 1;
/// The same word counted in 32-bit registers (`NFT_REG32_00`): the next words are this plus n.
const FIRST_WORD: u32 = 8;
/// A word that neither keys nor data reach.
const SCRATCH: u32 = 18;
const VERDICT: u32 = 0;

const META_MARK: u32 = 3;
const META_IN_NAME: u32 = 6;
const META_OUT_NAME: u32 = 7;
const META_FAMILY: u32 = 15;
const META_PROTOCOL: u32 = 16;
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
const FIB_ADDRESS_TYPE: u32 = 3;
const FIB_DESTINATION: u32 = 2;
const ADDRESS_TYPE_LOCAL: u32 = 2;
const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;
const DNAT: u32 = 1;
const DROP: i32 = 0;
const ACCEPT: i32 = 1;
const JUMP: i32 = -3;
const NAME_SIZE: usize = 16;
/// `struct xt_conntrack_mtinfo3`: its size as the kernel aligns it, and the places of two of its fields.
const CONNTRACK_INFO: usize = 168;
const CONNTRACK_MATCH: usize = 146;
const CONNTRACK_STATES: usize = 150;
const CONNTRACK_REVISION: u32 = 3;
/// ESTABLISHED, RELATED and DNAT in its state mask.
const CONNTRACK_WANTED: u16 = 0x02 | 0x04 | 0x80;

/// An IP family in a rule of the inet table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    fn number(self) -> u8 {
        match self {
            Self::V4 => 2,
            Self::V6 => 10,
        }
    }

    /// Length of an address in bytes.
    pub(super) fn length(self) -> u32 {
        match self {
            Self::V4 => 4,
            Self::V6 => 16,
        }
    }

    fn source_offset(self) -> u32 {
        match self {
            Self::V4 => 12,
            Self::V6 => 8,
        }
    }

    fn destination_offset(self) -> u32 {
        self.source_offset() + self.length()
    }
}

/// Which address of a packet.
#[derive(Debug, Clone, Copy)]
pub(super) enum Side {
    Source,
    Destination,
}

/// The expressions of a rule, in order.
#[derive(Debug, Default)]
pub(super) struct Rule(Attributes);

impl Rule {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn attributes(self) -> Attributes {
        self.0
    }

    fn push(self, name: &str, data: Attributes) -> Self {
        Self(self.0.nest(LIST_ELEMENT, Attributes::new().string(1, name).nest(2, data)))
    }

    fn meta(self, key: u32, register: u32) -> Self {
        self.push("meta", Attributes::new().be32(1, register).be32(2, key))
    }

    fn payload(self, base: u32, offset: u32, length: u32, register: u32) -> Self {
        self.push("payload", Attributes::new().be32(1, register).be32(2, base).be32(3, offset).be32(4, length))
    }

    fn compare(self, register: u32, operation: u32, value: &[u8]) -> Self {
        let value = Attributes::new().bytes(1, value);
        self.push("cmp", Attributes::new().be32(1, register).be32(2, operation).nest(3, value))
    }

    /// register = (register & mask) ^ xor
    fn bitwise(self, register: u32, mask: &[u8], xor: &[u8]) -> Self {
        let length = u32::try_from(mask.len()).unwrap_or(4);
        let data = Attributes::new()
            .be32(1, register)
            .be32(2, register)
            .be32(3, length)
            .nest(4, Attributes::new().bytes(1, mask))
            .nest(5, Attributes::new().bytes(1, xor));
        self.push("bitwise", data)
    }

    /// Only packets of this family.
    pub(super) fn family(self, family: Family) -> Self {
        self.meta(META_FAMILY, FIRST).compare(FIRST, EQUAL, &[family.number()])
    }

    /// Only packets whose destination is an address of this host.
    pub(super) fn destination_is_local(self) -> Self {
        let fib = Attributes::new().be32(1, FIRST).be32(2, FIB_ADDRESS_TYPE).be32(3, FIB_DESTINATION);
        self.push("fib", fib).compare(FIRST, EQUAL, &ADDRESS_TYPE_LOCAL.to_ne_bytes())
    }

    /// Only packets that came in by another interface than this.
    pub(super) fn not_from(self, interface: &str) -> Self {
        self.meta(META_IN_NAME, FIRST).compare(FIRST, NOT_EQUAL, &whole_name(interface))
    }

    /// Only packets that came in by this interface.
    pub(super) fn from(self, interface: &str) -> Self {
        self.meta(META_IN_NAME, FIRST).compare(FIRST, EQUAL, &whole_name(interface))
    }

    /// Only packets that leave by this interface.
    pub(super) fn to(self, interface: &str) -> Self {
        self.meta(META_OUT_NAME, FIRST).compare(FIRST, EQUAL, &whole_name(interface))
    }

    /// Only packets of a known flow, of one related to it, or of one whose destination was rewritten. In the form of iptables'
    /// `-m conntrack --ctstate RELATED,ESTABLISHED,DNAT`, for rules in tables that iptables lists.
    pub(super) fn known_or_dnat(self) -> Self {
        let mut info = [0; CONNTRACK_INFO];
        info[CONNTRACK_MATCH..][..2].copy_from_slice(&1u16.to_ne_bytes());
        info[CONNTRACK_STATES..][..2].copy_from_slice(&CONNTRACK_WANTED.to_ne_bytes());
        self.push("match", Attributes::new().string(1, "conntrack").be32(2, CONNTRACK_REVISION).bytes(3, &info))
    }

    /// Only packets with an address inside, or outside, the network. The family has been matched before.
    pub(super) fn address(self, side: Side, network: Cidr, inside: bool) -> Self {
        let family = Family::of(network.addr());
        let offset = match side {
            Side::Source => family.source_offset(),
            Side::Destination => family.destination_offset(),
        };
        let (mask, value) = (mask_bytes(network), ip_bytes(network.network().addr()));
        let zero = vec![0; mask.len()];
        self.payload(NETWORK_HEADER, offset, family.length(), FIRST).bitwise(FIRST, &mask, &zero).compare(
            FIRST,
            if inside { EQUAL } else { NOT_EQUAL },
            &value,
        )
    }

    /// Only packets that have this bit in their mark.
    pub(super) fn marked(self, bit: u32) -> Self {
        self.meta(META_MARK, FIRST).bitwise(FIRST, &bit.to_ne_bytes(), &[0; 4]).compare(FIRST, NOT_EQUAL, &[0; 4])
    }

    /// Looks (destination,) protocol and destination port up in a map of host ports; ends the rule where there is no entry.
    pub(super) fn look_up_host_port(self, family: Family, by_address: bool, map: &str) -> Self {
        let words = if by_address { family.length() / 4 } else { 0 };
        let rule =
            if by_address { self.payload(NETWORK_HEADER, family.destination_offset(), family.length(), FIRST) } else { self };
        rule.meta(META_PROTOCOL, FIRST_WORD + words)
            .payload(TRANSPORT_HEADER, 2, 2, FIRST_WORD + words + 1)
            .push("lookup", Attributes::new().string(1, map).be32(2, FIRST).be32(3, FIRST))
    }

    /// Sets this bit in the packet's mark.
    pub(super) fn mark(self, bit: u32) -> Self {
        self.meta(META_MARK, SCRATCH)
            .bitwise(SCRATCH, &(!bit).to_ne_bytes(), &bit.to_ne_bytes())
            .push("meta", Attributes::new().be32(2, META_MARK).be32(3, SCRATCH))
    }

    /// Rewrites the destination to the address and port that were looked up.
    pub(super) fn dnat(self, family: Family) -> Self {
        let port = FIRST_WORD + family.length() / 4;
        let data = Attributes::new().be32(1, DNAT).be32(2, u32::from(family.number())).be32(3, FIRST).be32(5, port);
        self.push("nat", data)
    }

    /// Rewrites the source to the address of the interface that the packet leaves by.
    pub(super) fn masquerade(self) -> Self {
        self.push("masq", Attributes::new())
    }

    /// Goes to another chain and comes back.
    pub(super) fn jump(self, chain: &str) -> Self {
        self.verdict(Attributes::new().bytes(1, &JUMP.to_be_bytes()).string(2, chain))
    }

    /// Lets the packet pass this table.
    pub(super) fn accept(self) -> Self {
        self.verdict(Attributes::new().bytes(1, &ACCEPT.to_be_bytes()))
    }

    /// Drops the packet.
    pub(super) fn drop(self) -> Self {
        self.verdict(Attributes::new().bytes(1, &DROP.to_be_bytes()))
    }

    fn verdict(self, verdict: Attributes) -> Self {
        let data = Attributes::new().nest(2, verdict);
        self.push("immediate", Attributes::new().be32(1, VERDICT).nest(2, data))
    }
}

/// A name as the kernel compares it: to its end, not as a prefix.
fn whole_name(interface: &str) -> [u8; NAME_SIZE] {
    let mut name = [0; NAME_SIZE];
    for (to, from) in name.iter_mut().zip(interface.bytes()) {
        *to = from;
    }
    name
}

/// An address as it stands in a packet.
pub(super) fn ip_bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn mask_bytes(network: Cidr) -> Vec<u8> {
    let length = if network.is_ipv4() { 4 } else { 16 };
    (0..length)
        .map(|at| {
            let bits = u32::from(network.prefix()).saturating_sub(at * 8).min(8);
            // The shift is at most 8 in 16 bits; the low byte is the mask.
            (0xff00u16 >> bits & 0xff) as u8
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_has_as_many_bits_as_its_prefix() {
        let mask = |text: &str| mask_bytes(text.parse().unwrap());
        assert_eq!(mask("10.88.0.0/16"), [255, 255, 0, 0]);
        assert_eq!(mask("10.0.0.0/12"), [255, 240, 0, 0]);
        assert_eq!(mask("0.0.0.0/0"), [0, 0, 0, 0]);
        assert_eq!(mask("10.0.0.1/32"), [255; 4]);
        assert_eq!(mask("fd00::/60")[6..9], [255, 240, 0]);
    }
}
