//! Connection tracking entries: a UDP flow goes on to where its first datagram was sent until its entry is deleted.

use std::collections::HashSet;
use std::net::IpAddr;

use crate::netlink::attributes::{as_ip, attributes, find};
use crate::netlink::{Message, Request, Socket, flags};
use crate::nft::HostPort;
use crate::{Error, Protocol, Result};

const SUBSYSTEM: u16 = 1;
const GET: u16 = 1;
const DELETE: u16 = 2;
const HEADER: usize = 4;
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
const ID: u16 = 12;
const ZONE: u16 = 18;
const INET: u8 = 2;
const UNSPECIFIED: u8 = 0;

/// A tracked flow, as far as host ports need it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Flow {
    protocol: u8,
    /// Where the first packet was sent to.
    destination: IpAddr,
    port: u16,
    /// Who answers.
    answers: IpAddr,
    delete: Request,
}

fn request(kind: u16, family: u8, attributes: &[u8]) -> Request {
    let mut body = vec![family, 0, 0, 0];
    body.extend_from_slice(attributes);
    Request { kind: SUBSYSTEM << 8 | kind, flags: flags::ACK, body }
}

/// All flows of both families. The kernel walks its whole table for this (milliseconds), so nobody should ask more than once.
fn dump(socket: &mut Socket) -> Result<Vec<Flow>> {
    let mut get = request(GET, UNSPECIFIED, &[]);
    get.flags = 0;
    match socket.dump(get) {
        Ok(messages) => Ok(messages.iter().filter_map(flow).collect()),
        // A kernel without connection tracking has no entries.
        Err(error) if matches!(error.errno, Some(code) if no_conntrack().contains(&code)) => Ok(Vec::new()),
        Err(error) => Err(Error::netlink("list", "conntrack entries")(error)),
    }
}

fn no_conntrack() -> [i32; 3] {
    use rustix::io::Errno;
    [Errno::OPNOTSUPP, Errno::INVAL, Errno::PROTONOSUPPORT].map(Errno::raw_os_error)
}

fn flow(message: &Message) -> Option<Flow> {
    let family = *message.body.first()?;
    let bytes = message.body.get(HEADER..)?;
    let original = find(bytes, ORIGINAL)?;
    let address = |tuple, v4, v6| {
        let ip = find(tuple, TUPLE_IP)?;
        find(ip, if family == INET { v4 } else { v6 }).and_then(as_ip)
    };
    let protocol = find(original, TUPLE_PROTOCOL)?;
    let port = find(protocol, 3).and_then(|p| p.try_into().ok()).map(u16::from_be_bytes);
    let mut own = crate::netlink::Attributes::new();
    for (number, value) in attributes(bytes) {
        own = match number {
            ORIGINAL => own.bytes(ORIGINAL | 0x8000, value),
            ID | ZONE => own.bytes(number, value),
            _ => own,
        };
    }
    Some(Flow {
        protocol: *find(protocol, 1)?.first()?,
        destination: address(original, 2, 4)?,
        port: port?,
        answers: address(find(bytes, REPLY)?, 1, 3)?,
        delete: request(DELETE, family, own.as_bytes()),
    })
}

fn delete(socket: &mut Socket, flows: &[Flow]) -> Result<()> {
    for flow in flows {
        match socket.one(flow.delete.clone()) {
            Err(error) if error.errno != Some(rustix::io::Errno::NOENT.raw_os_error()) => {
                return Err(Error::netlink("delete conntrack entry of", flow.destination.to_string())(error));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Whether a flow was sent to this host port.
fn is_to(flow: &Flow, port: &HostPort) -> bool {
    flow.protocol == port.protocol.number()
        && flow.port == port.host_port
        && flow.destination.is_ipv4() == port.pod.is_ipv4()
        && port.host.is_none_or(|host| host == flow.destination)
}

/// After host ports were added: forgets connectionless flows to them that lead elsewhere, so that their next datagram reaches the
/// pod. `local` are the host's addresses: flows that the host only forwards are left alone.
pub(crate) fn forget_old(socket: &mut Socket, ports: &[HostPort], local: &HashSet<IpAddr>) -> Result<()> {
    let udp: Vec<&HostPort> = ports.iter().filter(|p| p.protocol == Protocol::Udp).collect();
    if udp.is_empty() {
        return Ok(());
    }
    let is_stale =
        |flow: &Flow| is_local(flow.destination, local) && udp.iter().any(|port| is_to(flow, port) && flow.answers != port.pod);
    let stale: Vec<Flow> = dump(socket)?.into_iter().filter(is_stale).collect();
    delete(socket, &stale)
}

fn is_local(ip: IpAddr, local: &HashSet<IpAddr>) -> bool {
    ip.is_loopback() || local.contains(&ip)
}

/// After host ports were removed: forgets every flow through them to their pods.
pub(crate) fn forget_pods(socket: &mut Socket, ports: &[HostPort]) -> Result<()> {
    if ports.is_empty() {
        return Ok(());
    }
    let is_dead = |flow: &Flow| ports.iter().any(|port| is_to(flow, port) && flow.answers == port.pod);
    let dead: Vec<Flow> = dump(socket)?.into_iter().filter(is_dead).collect();
    delete(socket, &dead)
}
