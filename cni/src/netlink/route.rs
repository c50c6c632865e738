//! Verbs on addresses and routes.

use std::net::IpAddr;

use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::attributes::{as_ip, as_u32, attributes};
use super::link::request;
use super::{Message, Request, Socket, flags};
use crate::Cidr;
use crate::error::KernelError;
use crate::result::Route;

const NEW_ADDRESS: u16 = 20;
const NEW_ROUTE: u16 = 24;
const ADDRESS_HEADER: usize = 8;
const ROUTE_HEADER: usize = 12;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const UNICAST: u8 = 1;
const LOCAL: u8 = 2;

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

fn address_message(index: u32, cidr: Cidr) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(cidr.addr());
    message.header.prefix_len = cidr.prefix();
    message.header.index = index;
    message.attributes.push(AddressAttribute::Local(cidr.addr()));
    message.attributes.push(AddressAttribute::Address(cidr.addr()));
    match cidr.last() {
        IpAddr::V4(last) if cidr.prefix() < 31 => message.attributes.push(AddressAttribute::Broadcast(last)),
        IpAddr::V4(_) => {}
        // Usable at once: we are the ones who hand addresses out, so nobody else can have this one.
        IpAddr::V6(_) => message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad)),
    }
    message
}

/// Request: an address on a link. With `detect_duplicates` an IPv6 address is tentative at first.
pub(crate) fn add_address(index: u32, cidr: Cidr, detect_duplicates: bool) -> Request {
    let mut message = address_message(index, cidr);
    if detect_duplicates {
        message.attributes.retain(|attribute| !matches!(attribute, AddressAttribute::Flags(_)));
    }
    request(&RouteNetlinkMessage::NewAddress(message), flags::ACK | flags::CREATE | flags::EXCL)
}

/// Request: an address off a link.
pub(crate) fn delete_address(index: u32, cidr: Cidr) -> Request {
    request(&RouteNetlinkMessage::DelAddress(address_message(index, cidr)), flags::ACK)
}

/// Request: a route through a link.
pub(crate) fn add_route(index: u32, route: &Route) -> Request {
    let mut message = RouteMessage::default();
    message.header.address_family = family(route.dst.addr());
    message.header.destination_prefix_length = route.dst.prefix();
    message.header.protocol = RouteProtocol::Boot;
    message.header.kind = RouteType::Unicast;
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    let default_scope = if route.gw.is_some() || !route.dst.is_ipv4() { RouteScope::Universe } else { RouteScope::Link };
    message.header.scope = route.scope.map_or(default_scope, RouteScope::from);
    if let Some(table) = route.table {
        message.header.table = RouteHeader::RT_TABLE_UNSPEC;
        message.attributes.push(RouteAttribute::Table(table));
    }
    if route.dst.prefix() > 0 {
        message.attributes.push(RouteAttribute::Destination(RouteAddress::from(route.dst.network().addr())));
    }
    message.attributes.push(RouteAttribute::Oif(index));
    message.attributes.extend(route.gw.map(|gw| RouteAttribute::Gateway(RouteAddress::from(gw))));
    if route.priority > 0 {
        message.attributes.push(RouteAttribute::Priority(route.priority));
    }
    let mut metrics = Vec::new();
    if route.mtu > 0 {
        metrics.push(RouteMetric::Mtu(route.mtu));
    }
    if route.advmss > 0 {
        metrics.push(RouteMetric::Advmss(route.advmss));
    }
    if !metrics.is_empty() {
        message.attributes.push(RouteAttribute::Metrics(metrics));
    }
    request(&RouteNetlinkMessage::NewRoute(message), flags::ACK | flags::CREATE | flags::EXCL)
}

/// An address of this namespace: the index of its link, and the address.
pub(crate) fn dump_addresses(socket: &mut Socket) -> Result<Vec<(u32, Cidr)>, KernelError> {
    let dump = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    Ok(socket.dump(request(&dump, 0))?.iter().filter_map(parse_address).collect())
}

fn parse_address(message: &Message) -> Option<(u32, Cidr)> {
    let (header, rest) = message.body.split_at_checked(ADDRESS_HEADER).filter(|_| message.kind == NEW_ADDRESS)?;
    let value = |wanted| attributes(rest).find_map(|(n, value)| (n == wanted).then(|| as_ip(value)).flatten());
    let addr = value(IFA_LOCAL).or_else(|| value(IFA_ADDRESS))?;
    Some((as_u32(&header[4..])?, Cidr::new(addr, header[1])?))
}

/// Destinations of all unicast routes, with the index of the link: default routes excepted.
pub(crate) fn dump_destinations(socket: &mut Socket) -> Result<Vec<(u32, Cidr)>, KernelError> {
    let dump = RouteNetlinkMessage::GetRoute(RouteMessage::default());
    Ok(socket.dump(request(&dump, 0))?.iter().filter_map(parse_route).collect())
}

fn parse_route(message: &Message) -> Option<(u32, Cidr)> {
    let (header, rest) = message.body.split_at_checked(ROUTE_HEADER).filter(|_| message.kind == NEW_ROUTE)?;
    let (prefix, kind) = (header[1], header[7]);
    if kind != UNICAST || prefix == 0 {
        return None;
    }
    let value = |wanted| attributes(rest).find_map(|(n, value)| (n == wanted).then_some(value));
    let link = value(RTA_OIF).and_then(as_u32).unwrap_or_default();
    Some((link, Cidr::new(as_ip(value(RTA_DST)?)?, prefix)?))
}

/// Whether the kernel takes packets to this IPv6 address as its own. It begins to some time after the address was added, without
/// duplicate detection too: the route to oneself is made by a kernel worker.
pub(crate) fn is_local(socket: &mut Socket, ip: IpAddr) -> Result<bool, KernelError> {
    let reply = socket.get(request(&RouteNetlinkMessage::GetRoute(towards(ip)), flags::ACK))?;
    Ok(reply.and_then(|reply| reply.body.get(7).copied()) == Some(LOCAL))
}

fn towards(ip: IpAddr) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(ip);
    message.header.destination_prefix_length = if ip.is_ipv4() { 32 } else { 128 };
    message.attributes.push(RouteAttribute::Destination(RouteAddress::from(ip)));
    message
}

/// The index of the link through which an address is reached; none if it is not reachable.
pub(crate) fn link_towards(socket: &mut Socket, ip: IpAddr) -> Result<Option<u32>, KernelError> {
    let unreachable = [rustix::io::Errno::NETUNREACH, rustix::io::Errno::HOSTUNREACH].map(|e| Some(e.raw_os_error()));
    match socket.get(request(&RouteNetlinkMessage::GetRoute(towards(ip)), flags::ACK)) {
        Ok(reply) => Ok(reply.and_then(|reply| {
            let rest = reply.body.get(ROUTE_HEADER..)?;
            attributes(rest).find_map(|(n, value)| (n == RTA_OIF).then(|| as_u32(value)).flatten())
        })),
        Err(error) if unreachable.contains(&error.errno) => Ok(None),
        Err(error) => Err(error),
    }
}
