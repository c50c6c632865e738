//! The maps of host ports: (address,) protocol, port → pod address, port. The comment of an element names its owner.

use std::net::IpAddr;

use super::expression::{Family, ip_bytes};
use super::message::{DEL_ELEMENT, GET_ELEMENT, LIST_ELEMENT, NEW_ELEMENT, commit, create, delete, get, is_absent, parse};
use crate::netlink::attributes::{as_ip, as_string, find};
use crate::netlink::{Attributes, Failure, Socket, attributes};
use crate::{Error, Protocol, Result};

const MAP_FLAG: u32 = 8;
/// Numbers of nft's data types, by which it prints a map; the kernel does not look at them.
const TYPE_IP4: u32 = 7;
const TYPE_IP6: u32 = 8;
const TYPE_PROTOCOL: u32 = 12;
const TYPE_PORT: u32 = 13;
const TYPE_BITS: u32 = 6;
const COMMENT: u8 = 0;

/// One of the four maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Map {
    pub family: Family,
    /// Whether the key begins with the host's address.
    pub by_address: bool,
}

impl Map {
    /// Those of one address first: they win over those of all addresses.
    pub(super) const ALL: [Self; 4] = [
        Self { family: Family::V4, by_address: true },
        Self { family: Family::V6, by_address: true },
        Self { family: Family::V4, by_address: false },
        Self { family: Family::V6, by_address: false },
    ];

    pub(super) fn name(self) -> &'static str {
        match (self.family, self.by_address) {
            (Family::V4, false) => "hostports4",
            (Family::V4, true) => "hostports4-ip",
            (Family::V6, false) => "hostports6",
            (Family::V6, true) => "hostports6-ip",
        }
    }

    pub(super) fn definition(self, table: &str, id: u32) -> Attributes {
        let ip_type = if self.family == Family::V4 { TYPE_IP4 } else { TYPE_IP6 };
        let key = TYPE_PROTOCOL << TYPE_BITS | TYPE_PORT;
        let (key, length) = if self.by_address { (ip_type << (2 * TYPE_BITS) | key, self.family.length() + 8) } else { (key, 8) };
        Attributes::new()
            .string(1, table)
            .string(2, self.name())
            .be32(3, MAP_FLAG)
            .be32(4, key)
            .be32(5, length)
            .be32(6, ip_type << TYPE_BITS | TYPE_PORT)
            .be32(7, self.family.length() + 4)
            .be32(10, id)
    }
}

/// A host port and where it leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostPort {
    /// The host's address; none: all addresses of the pod address's family.
    pub host: Option<IpAddr>,
    pub protocol: Protocol,
    pub host_port: u16,
    pub pod: IpAddr,
    pub pod_port: u16,
}

impl HostPort {
    fn map(&self) -> Map {
        Map { family: Family::of(self.pod), by_address: self.host.is_some() }
    }

    fn key(&self) -> Vec<u8> {
        let mut key = self.host.map(ip_bytes).unwrap_or_default();
        key.extend_from_slice(&[self.protocol.number(), 0, 0, 0]);
        key.extend_from_slice(&port_word(self.host_port));
        key
    }

    fn data(&self) -> Vec<u8> {
        let mut data = ip_bytes(self.pod);
        data.extend_from_slice(&port_word(self.pod_port));
        data
    }

    /// Whether this element is this host port.
    pub(crate) fn is(&self, element: &Element) -> bool {
        element.map == self.map() && element.key == self.key() && element.data == self.data()
    }
}

fn port_word(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
}

/// An element found in a map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Element {
    map: Map,
    key: Vec<u8>,
    data: Vec<u8>,
    pub owner: String,
}

impl Element {
    /// The host port that the element is; none if it is none of ours.
    pub(crate) fn host_port(&self) -> Option<HostPort> {
        let (host, rest) = self.key.split_at_checked(self.key.len().checked_sub(8)?)?;
        let (pod, pod_port) = self.data.split_at_checked(self.data.len().checked_sub(4)?)?;
        let port = |at: &[u8]| Some(u16::from_be_bytes([*at.first()?, *at.get(1)?]));
        let protocol = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp].into_iter().find(|p| Some(&p.number()) == rest.first())?;
        Some(HostPort { host: as_ip(host), protocol, host_port: port(&rest[4..])?, pod: as_ip(pod)?, pod_port: port(pod_port)? })
    }

    /// `tcp 8080` or `127.0.0.1 tcp 8080`.
    pub(crate) fn describe(&self) -> String {
        match self.host_port() {
            Some(HostPort { host: Some(ip), protocol, host_port, .. }) => format!("{ip} {} {host_port}", protocol.name()),
            Some(HostPort { protocol, host_port, .. }) => format!("{} {host_port}", protocol.name()),
            None => "unknown".to_owned(),
        }
    }
}

fn list(table: &str, map: Map, elements: Attributes) -> Attributes {
    Attributes::new().string(1, table).string(2, map.name()).nest(3, elements)
}

fn comment(owner: &str) -> Vec<u8> {
    let owner = &owner.as_bytes()[..owner.len().min(200)];
    // At most 200 bytes and the terminating zero.
    let mut bytes = vec![COMMENT, owner.len() as u8 + 1];
    bytes.extend_from_slice(owner);
    bytes.push(0);
    bytes
}

/// Adds all host ports or none. The kernel finds two pods that want the same one.
pub(crate) fn add_host_ports(socket: &mut Socket, table: &str, owner: &str, ports: &[HostPort]) -> Result<()> {
    let requests = ports
        .iter()
        .map(|port| {
            let element = Attributes::new()
                .nest(1, Attributes::new().bytes(1, &port.key()))
                .nest(2, Attributes::new().bytes(1, &port.data()))
                .bytes(6, &comment(owner));
            create(NEW_ELEMENT, &list(table, port.map(), Attributes::new().nest(LIST_ELEMENT, element)))
        })
        .collect();
    commit(socket, requests).map_err(|failure| add_error(&failure, table, ports))
}

fn add_error(failure: &Failure, table: &str, ports: &[HostPort]) -> Error {
    let taken = [rustix::io::Errno::EXIST, rustix::io::Errno::BUSY].map(|e| Some(e.raw_os_error()));
    match failure.index.and_then(|index| ports.get(index)) {
        Some(port) if taken.contains(&failure.error.errno) => Error::HostPortInUse {
            host: port.host.map_or_else(|| "any address".to_owned(), |ip| ip.to_string()),
            protocol: port.protocol,
            port: port.host_port,
        },
        _ => Error::netlink("add host ports to nf_tables table", table)(failure.error.clone()),
    }
}

/// All elements of all maps; none where the table does not exist.
pub(crate) fn dump_elements(socket: &mut Socket, table: &str) -> Result<Vec<Element>> {
    let mut elements = Vec::new();
    for map in Map::ALL {
        let request = get(GET_ELEMENT, &Attributes::new().string(1, table).string(2, map.name()));
        match socket.dump(request) {
            Ok(messages) => {
                for message in &messages {
                    if let Some((NEW_ELEMENT, body)) = parse(message) {
                        elements.extend(find(body, 3).into_iter().flat_map(attributes).filter_map(|(_, e)| element(map, e)));
                    }
                }
            }
            Err(error) if is_absent(&error) => {}
            Err(error) => return Err(Error::netlink("list host ports of nf_tables table", table)(error)),
        }
    }
    Ok(elements)
}

fn element(map: Map, bytes: &[u8]) -> Option<Element> {
    let value = |number| find(bytes, number).and_then(|data| find(data, 1)).map(<[u8]>::to_vec);
    let owner = find(bytes, 6).and_then(|user| user.get(2..).filter(|_| user[0] == COMMENT)).map(as_string);
    Some(Element { map, key: value(1)?, data: value(2)?, owner: owner.unwrap_or_default() })
}

/// Deletes elements that a dump has shown; those that went meanwhile are no error.
pub(crate) fn delete_elements(socket: &mut Socket, table: &str, elements: &[Element]) -> Result<()> {
    if elements.is_empty() {
        return Ok(());
    }
    let request = |element: &Element| {
        let key = Attributes::new().nest(1, Attributes::new().bytes(1, &element.key));
        delete(DEL_ELEMENT, &list(table, element.map, Attributes::new().nest(LIST_ELEMENT, key)))
    };
    match commit(socket, elements.iter().map(request).collect()) {
        Ok(()) => Ok(()),
        Err(failure) if is_absent(&failure.error) => {
            for element in elements {
                match commit(socket, vec![request(element)]) {
                    Err(failure) if !is_absent(&failure.error) => return Err(delete_error(table, failure)),
                    _ => {}
                }
            }
            Ok(())
        }
        Err(failure) => Err(delete_error(table, failure)),
    }
}

fn delete_error(table: &str, failure: Failure) -> Error {
    Error::netlink("delete host ports from nf_tables table", table)(failure.error)
}

/// Whether an event of this kind means that a map has lost something.
pub(super) fn is_loss(kind: u8) -> bool {
    kind == DEL_ELEMENT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_data_fill_whole_words() {
        let port = HostPort {
            host: Some("127.0.0.1".parse().unwrap()),
            protocol: Protocol::Udp,
            host_port: 0x1234,
            pod: "10.0.0.2".parse().unwrap(),
            pod_port: 53,
        };
        assert_eq!(port.key(), [127, 0, 0, 1, 17, 0, 0, 0, 0x12, 0x34, 0, 0]);
        assert_eq!(port.data(), [10, 0, 0, 2, 0, 53, 0, 0]);
        let element = Element { map: port.map(), key: port.key(), data: port.data(), owner: String::new() };
        assert_eq!(element.describe(), "127.0.0.1 udp 4660");
        assert!(port.is(&element));
        assert_eq!(element.host_port(), Some(port));
    }

    #[test]
    fn an_owner_s_comment_is_what_nft_prints() {
        assert_eq!(comment("ab"), [0, 3, b'a', b'b', 0]);
        assert_eq!(comment(&"x".repeat(300)).len(), 203);
    }
}
