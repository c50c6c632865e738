//! The network of a sandbox, by rtnetlink, so that a sandbox needs no program of the machine: `lo` up, and one interface with
//! an address and a default route.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::libc;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

use super::NODE_IP;

// linux/rtnetlink.h, linux/if_link.h, linux/veth.h
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const REQUEST_ACK: u16 = 1 | 4;
const CREATE_EXCLUSIVE: u16 = 0x400 | 0x200;

const GATEWAY: [u8; 4] = [10, 77, 0, 254];

/// Configures the network namespace of the calling thread: a veth pair with both ends here (unlike a dummy interface every
/// kernel that runs pods has it, and it has a carrier).
pub fn configure() -> io::Result<()> {
    let route = Route::open()?;
    let own: [u8; 4] = NODE_IP.parse::<std::net::Ipv4Addr>().map_err(io::Error::other)?.octets();
    route.ask("lo up", RTM_NEWLINK, 0, &link_up(1))?;

    let mut peer = link(0, false);
    attribute(&mut peer, IFLA_IFNAME, b"uplink0-far\0");
    let mut data = Vec::new();
    attribute(&mut data, VETH_INFO_PEER, &peer);
    let mut info = Vec::new();
    attribute(&mut info, IFLA_INFO_KIND, b"veth");
    attribute(&mut info, IFLA_INFO_DATA, &data);
    let mut pair = link(0, false);
    attribute(&mut pair, IFLA_IFNAME, b"uplink0\0");
    attribute(&mut pair, IFLA_LINKINFO, &info);
    route.ask("make uplink0", RTM_NEWLINK, CREATE_EXCLUSIVE, &pair)?;

    let index = |name| nix::net::if_::if_nametoindex(name).map_err(io::Error::from);
    let uplink = index("uplink0")?;
    for interface in [uplink, index("uplink0-far")?] {
        route.ask("uplink0 up", RTM_NEWLINK, 0, &link_up(interface))?;
    }
    // family, prefix length, flags, scope, index
    let mut address = vec![libc::AF_INET as u8, 24, 0, 0];
    address.extend(uplink.to_ne_bytes());
    attribute(&mut address, IFA_LOCAL, &own);
    attribute(&mut address, IFA_ADDRESS, &own);
    route.ask("address of uplink0", RTM_NEWADDR, CREATE_EXCLUSIVE, &address)?;
    // family, two prefix lengths, tos, table main, protocol static, scope universe, type unicast, flags
    let mut default = vec![libc::AF_INET as u8, 0, 0, 0, 254, 4, 0, 1, 0, 0, 0, 0];
    attribute(&mut default, RTA_GATEWAY, &GATEWAY);
    attribute(&mut default, RTA_OIF, &uplink.to_ne_bytes());
    route.ask("default route", RTM_NEWROUTE, CREATE_EXCLUSIVE, &default)
}

/// struct ifinfomsg
fn link(index: u32, up: bool) -> Vec<u8> {
    let flags = if up { libc::IFF_UP as u32 } else { 0 };
    let mut message = vec![libc::AF_UNSPEC as u8, 0, 0, 0];
    for field in [index, flags, flags] {
        message.extend(field.to_ne_bytes());
    }
    message
}

fn link_up(index: u32) -> Vec<u8> {
    link(index, true)
}

fn attribute(message: &mut Vec<u8>, kind: u16, data: &[u8]) {
    message.extend(((data.len() + 4) as u16).to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(data);
    message.resize(message.len().next_multiple_of(4), 0);
}

struct Route(OwnedFd);

impl Route {
    fn open() -> io::Result<Self> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute)?;
        Ok(Self(fd))
    }

    /// Sends one request and reads its acknowledgement.
    fn ask(&self, what: &str, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        let mut message = ((body.len() + 16) as u32).to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend((REQUEST_ACK | flags).to_ne_bytes());
        message.extend([0; 8]);
        message.extend(body);
        send(self.0.as_raw_fd(), &message, MsgFlags::empty())?;
        let mut reply = [0_u8; 4096];
        let length = recv(self.0.as_raw_fd(), &mut reply, MsgFlags::empty())?;
        // The errno of struct nlmsgerr follows the header; zero is the acknowledgement.
        let errno = reply[..length].get(16..20).and_then(|b| b.try_into().ok()).map_or(0, i32::from_ne_bytes);
        if errno == 0 {
            return Ok(());
        }
        Err(io::Error::other(format!("{what}: {}", io::Error::from_raw_os_error(-errno))))
    }
}
