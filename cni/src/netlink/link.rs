//! Verbs on links: veth pairs, bridges, ports, groups. One message each where the kernel allows it.

use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::NetlinkSerializable;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoPortKind, InfoVeth, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo,
    LinkMessage,
};

use super::attributes::{as_string, as_u32, attributes, find};
use super::{Failure, Message, Request, Socket, flags};
use crate::error::KernelError;

const NEW_LINK: u16 = 16;
const HEADER: usize = 16;
const ADDRESS: u16 = 1;
const NAME: u16 = 3;
const MTU: u16 = 4;
const MASTER: u16 = 10;
const LINK_INFO: u16 = 18;
const GROUP: u16 = 27;
const INFO_KIND: u16 = 1;
pub(crate) const UP: u32 = 1;
/// Loopback's index in every network namespace.
pub(crate) const LOOPBACK: u32 = 1;

/// A hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mac(pub [u8; 6]);

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// A link as a dump or a query shows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Link {
    pub index: u32,
    pub flags: u32,
    pub name: String,
    pub mac: Vec<u8>,
    pub mtu: u32,
    pub master: u32,
    pub group: u32,
    pub kind: String,
}

impl Link {
    fn parse(message: &Message) -> Option<Self> {
        if message.kind != NEW_LINK {
            return None;
        }
        let (header, rest) = message.body.split_at_checked(HEADER)?;
        let mut link = Self { index: as_u32(&header[4..])?, flags: as_u32(&header[8..])?, ..Self::default() };
        for (number, value) in attributes(rest) {
            match number {
                ADDRESS => link.mac = value.to_vec(),
                NAME => link.name = as_string(value),
                MTU => link.mtu = as_u32(value).unwrap_or_default(),
                MASTER => link.master = as_u32(value).unwrap_or_default(),
                GROUP => link.group = as_u32(value).unwrap_or_default(),
                LINK_INFO => link.kind = find(value, INFO_KIND).map(as_string).unwrap_or_default(),
                _ => {}
            }
        }
        Some(link)
    }

    pub(crate) fn mac_text(&self) -> String {
        <[u8; 6]>::try_from(self.mac.as_slice()).map(|mac| Mac(mac).to_string()).unwrap_or_default()
    }

    pub(crate) fn is_up(&self) -> bool {
        self.flags & UP != 0
    }
}

/// A route-family message as a request.
pub(super) fn request(message: &RouteNetlinkMessage, flags: u16) -> Request {
    let mut body = vec![0; message.buffer_len()];
    message.serialize(&mut body);
    Request { kind: message.message_type(), flags, body }
}

fn message(index: u32, attributes: Vec<LinkAttribute>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = attributes;
    message
}

fn up(mut message: LinkMessage, up: bool) -> LinkMessage {
    message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
    message.header.change_mask = LinkFlags::Up;
    message
}

/// A pair of links, one end here on a bridge and up, the other in another network namespace.
#[derive(Debug)]
pub(crate) struct NewVeth<'a> {
    pub name: &'a str,
    pub mac: Mac,
    pub master: Option<u32>,
    pub mtu: Option<u32>,
    pub peer_name: &'a str,
    pub peer_mac: Mac,
    pub peer_netns: BorrowedFd<'a>,
    pub port: &'a [InfoBridgePort],
}

/// Creates a veth pair. A pair that came to be before a later part failed is left for the caller to delete by name.
pub(crate) fn create_veth(socket: &mut Socket, new: &NewVeth<'_>) -> Result<(), Failure> {
    let mut peer = vec![
        LinkAttribute::IfName(new.peer_name.to_owned()),
        LinkAttribute::Address(new.peer_mac.0.to_vec()),
        LinkAttribute::NetNsFd(new.peer_netns.as_raw_fd()),
    ];
    let mut own = vec![LinkAttribute::IfName(new.name.to_owned()), LinkAttribute::Address(new.mac.0.to_vec())];
    if let Some(mtu) = new.mtu {
        peer.push(LinkAttribute::Mtu(mtu));
        own.push(LinkAttribute::Mtu(mtu));
    }
    own.extend(new.master.map(LinkAttribute::Controller));
    // The peer cannot be set up here: a veth whose other end does not exist yet refuses it, after an expensive rollback.
    own.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(message(0, peer)))),
    ]));
    let create = RouteNetlinkMessage::NewLink(up(message(0, own), true));
    let mut batch = vec![request(&create, flags::ACK | flags::CREATE | flags::EXCL)];
    if new.master.is_some() && !new.port.is_empty() {
        batch.push(port_request(new.name, new.port));
    }
    socket.run(&batch).map(drop)
}

/// Sets options of a bridge port. The kernel takes them only once the link is a port, so never in the creating message.
fn port_request(name: &str, options: &[InfoBridgePort]) -> Request {
    let attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::PortKind(InfoPortKind::Bridge),
            LinkInfo::PortData(InfoPortData::BridgePort(options.to_vec())),
        ]),
    ];
    request(&RouteNetlinkMessage::NewLink(message(0, attributes)), flags::ACK)
}

/// Creates a bridge that is up.
pub(crate) fn create_bridge(
    socket: &mut Socket,
    name: &str,
    mac: Mac,
    mtu: Option<u32>,
    promiscuous: bool,
) -> Result<(), KernelError> {
    let mut attributes = vec![LinkAttribute::IfName(name.to_owned()), LinkAttribute::Address(mac.0.to_vec())];
    attributes.extend(mtu.map(LinkAttribute::Mtu));
    attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]));
    let mut message = up(message(0, attributes), true);
    if promiscuous {
        message.header.flags |= LinkFlags::Promisc;
        message.header.change_mask |= LinkFlags::Promisc;
    }
    socket.one(request(&RouteNetlinkMessage::NewLink(message), flags::ACK | flags::CREATE | flags::EXCL))
}

/// The link with this name; none if there is none.
pub(crate) fn link_by_name(socket: &mut Socket, name: &str) -> Result<Option<Link>, KernelError> {
    let get = RouteNetlinkMessage::GetLink(message(0, vec![LinkAttribute::IfName(name.to_owned())]));
    match socket.get(request(&get, flags::ACK)) {
        Ok(reply) => Ok(reply.as_ref().and_then(Link::parse)),
        Err(error) if error.errno == Some(rustix::io::Errno::NODEV.raw_os_error()) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The link with this index; none if there is none.
pub(crate) fn link_by_index(socket: &mut Socket, index: u32) -> Result<Option<Link>, KernelError> {
    let get = RouteNetlinkMessage::GetLink(message(index, Vec::new()));
    match socket.get(request(&get, flags::ACK)) {
        Ok(reply) => Ok(reply.as_ref().and_then(Link::parse)),
        Err(error) if error.errno == Some(rustix::io::Errno::NODEV.raw_os_error()) => Ok(None),
        Err(error) => Err(error),
    }
}

/// All links of the namespace.
pub(crate) fn dump_links(socket: &mut Socket) -> Result<Vec<Link>, KernelError> {
    let dump = RouteNetlinkMessage::GetLink(message(0, vec![LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])]));
    Ok(socket.dump(request(&dump, 0))?.iter().filter_map(Link::parse).collect())
}

/// Request: the link up.
pub(crate) fn set_up(index: u32) -> Request {
    request(&RouteNetlinkMessage::SetLink(up(message(index, Vec::new()), true)), flags::ACK)
}

/// Request: the link with this name off its bridge and down.
pub(crate) fn set_detached(name: &str) -> Request {
    let attributes = vec![LinkAttribute::IfName(name.to_owned()), LinkAttribute::Controller(0)];
    request(&RouteNetlinkMessage::SetLink(up(message(0, attributes), false)), flags::ACK)
}

/// Request: the link with this name into a group.
pub(crate) fn set_group(name: &str, group: u32) -> Request {
    let attributes = vec![LinkAttribute::IfName(name.to_owned()), LinkAttribute::Group(group)];
    request(&RouteNetlinkMessage::SetLink(message(0, attributes)), flags::ACK)
}

/// Request: all links of a group gone, whoever made them. The caller has shown that the group holds none but its own.
pub(crate) fn delete_group(group: u32) -> Request {
    request(&RouteNetlinkMessage::DelLink(message(0, vec![LinkAttribute::Group(group)])), flags::ACK)
}

/// Deletes a link and waits for the kernel's barriers (tens of milliseconds). One that is gone is no error.
pub(crate) fn delete(socket: &mut Socket, name: &str) -> Result<(), KernelError> {
    let delete = RouteNetlinkMessage::DelLink(message(0, vec![LinkAttribute::IfName(name.to_owned())]));
    match socket.one(request(&delete, flags::ACK)) {
        Err(error) if error.errno == Some(rustix::io::Errno::NODEV.raw_os_error()) => Ok(()),
        other => other,
    }
}
