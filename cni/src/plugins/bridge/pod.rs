//! The pod's side: the veth pair, addresses, routes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd};

use netlink_packet_route::link::InfoBridgePort;

use super::config::Bridge;
use super::gateway::{self, LOOK_AGAIN, is_usable, random_mac, usable_by};
use crate::invocation::Invocation;
use crate::kernel::{EnsuredBridge, Kernel, pod_socket};
use crate::netlink::link::{self, LOOPBACK, Mac, NewVeth};
use crate::netlink::{Failure, Socket, route};
use crate::result::{CniResult, Interface, IpConfig, Route};
use crate::{Cidr, Error, Result, sysctl};

/// Connects the pod to the bridge; the result, and a socket in the pod's namespace. What came to be when this fails is found and undone by DEL.
pub(super) fn connect(
    kernel: &mut Kernel,
    bridge: &Bridge,
    leased: CniResult,
    veth: &str,
    invocation: &Invocation,
    netns: &OwnedFd,
) -> Result<(CniResult, Socket)> {
    let mut result = leased;
    complete(bridge, &mut result);
    let mut ensured = gateway::ensure(kernel, bridge, &result.ips)?;
    if bridge.masquerade {
        let networks: Vec<Cidr> = result.ips.iter().map(|ip| ip.address.network()).collect();
        kernel.ensure_masquerade(&bridge.name, &networks)?;
    }
    let mac = match &bridge.mac {
        Some(text) => parse_mac(text)?,
        None => pod_mac(&result.ips)?,
    };
    let host_mac = random_mac()?;
    create(kernel, bridge, &mut ensured, veth, (host_mac, mac), invocation, netns, &result.ips)?;
    let socket = configure(invocation, netns, &result, bridge.detect_duplicates)?;
    let interface =
        |name: &str, mac: String, sandbox: String| Interface { name: name.to_owned(), mac, sandbox, ..Interface::default() };
    result.interfaces = vec![
        interface(&bridge.name, ensured.mac, String::new()),
        interface(veth, host_mac.to_string(), String::new()),
        interface(&invocation.ifname, mac.to_string(), invocation.sandbox()),
    ];
    for ip in &mut result.ips {
        ip.interface = Some(2);
    }
    Ok((result, socket))
}

/// Waits until the pod's IPv6 addresses can be used. The socket is the pod's.
pub(super) async fn until_usable(result: &CniResult, mut socket: Socket) -> Result<()> {
    let deadline = usable_by();
    for ip in result.ips.iter().filter(|ip| !ip.address.is_ipv4()) {
        while !is_usable(&mut socket, ip.address, deadline)? {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }
    Ok(())
}

/// Adds what the addresses imply: gateways and default routes.
fn complete(bridge: &Bridge, result: &mut CniResult) {
    for ip in &mut result.ips {
        if ip.gateway.is_none() && bridge.is_gateway {
            ip.gateway = crate::cidr::next_ip(ip.address.network().addr());
        }
        if bridge.is_default_gateway {
            let any = if ip.address.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
            let default = Cidr::new(any, 0).map(|dst| Route::new(dst, ip.gateway));
            let is_new = |route: &Route| !result.routes.iter().any(|known| known.dst == route.dst);
            result.routes.extend(default.filter(is_new));
        }
    }
}

/// From the IPv4 address: whoever remembers the address's last holder in its neighbour table is right about the next one too.
fn pod_mac(ips: &[IpConfig]) -> Result<Mac> {
    let v4 = ips.iter().find_map(|ip| match ip.address.addr() {
        IpAddr::V4(v4) => Some(v4.octets()),
        IpAddr::V6(_) => None,
    });
    let v6 = || ips.first().map(|ip| (crate::names::fnv(ip.address.addr().to_string().bytes()) as u32).to_be_bytes());
    match v4.or_else(v6) {
        Some([a, b, c, d]) => Ok(Mac([0x0a, 0x58, a, b, c, d])),
        None => random_mac(),
    }
}

fn parse_mac(text: &str) -> Result<Mac> {
    let bytes: Option<Vec<u8>> = text.split([':', '-']).map(|part| u8::from_str_radix(part, 16).ok()).collect();
    let mac = bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok()).filter(|mac| mac[0] & 1 == 0);
    mac.map(Mac).ok_or_else(|| Error::invalid("bridge", format!("invalid MAC address {text:?}")))
}

#[allow(clippy::too_many_arguments)]
fn create(
    kernel: &mut Kernel,
    bridge: &Bridge,
    ensured: &mut EnsuredBridge,
    veth: &str,
    (mac, peer_mac): (Mac, Mac),
    invocation: &Invocation,
    netns: &OwnedFd,
    ips: &[IpConfig],
) -> Result<()> {
    let mut port = Vec::new();
    if bridge.hairpin {
        port.push(InfoBridgePort::HairpinMode(true));
    }
    if bridge.isolated {
        port.push(InfoBridgePort::Isolated(true));
    }
    let try_create = |kernel: &mut Kernel, master: u32| -> Result<(), Failure> {
        let new = NewVeth {
            name: veth,
            mac,
            master: Some(master),
            mtu: bridge.mtu,
            peer_name: &invocation.ifname,
            peer_mac,
            peer_netns: netns.as_fd(),
            port: &port,
        };
        link::create_veth(&mut kernel.route, &new)
    };
    let mut tried = try_create(kernel, ensured.index);
    if let Err(failure) = &tried {
        let errno = failure.error.errno.map(rustix::io::Errno::from_raw_os_error);
        // Half of an earlier try of the same container: its name is nobody else's.
        if errno == Some(rustix::io::Errno::EXIST) && failure.index == Some(0) {
            link::delete(&mut kernel.route, veth).map_err(Error::netlink("delete", veth))?;
        } else {
            // Somebody removed the bridge (and maybe made it anew) since it was made sure of; what was made goes.
            link::delete(&mut kernel.route, veth).map_err(Error::netlink("delete", veth))?;
            kernel.bridges.remove(&bridge.name);
            *ensured = gateway::ensure(kernel, bridge, ips)?;
        }
        tried = try_create(kernel, ensured.index);
    }
    tried.map_err(|f| Error::netlink("create veth", format!("{veth} for {}", invocation.ifname))(f.error))
}

/// Loopback and the interface up, addresses, routes: one datagram.
fn configure(invocation: &Invocation, netns: &OwnedFd, result: &CniResult, detect_duplicates: bool) -> Result<Socket> {
    let ifname = &invocation.ifname;
    let wants_v6 = result.ips.iter().any(|ip| !ip.address.is_ipv4());
    let (mut socket, ()) = pod_socket(netns, &invocation.container_id, || {
        let disable = format!("ipv6/conf/{ifname}/disable_ipv6");
        if wants_v6 && sysctl::read(&disable).is_some() {
            sysctl::ensure(&disable, "0")?;
            if !detect_duplicates {
                sysctl::ensure(&format!("ipv6/conf/{ifname}/accept_dad"), "0")?;
            }
        }
        Ok(())
    })?;
    let index = index_of(&mut socket, ifname)?;
    let mut requests = vec![link::set_up(LOOPBACK), link::set_up(index)];
    let mut subjects = vec!["lo".to_owned(), ifname.clone()];
    for ip in &result.ips {
        requests.push(route::add_address(index, ip.address, detect_duplicates));
        subjects.push(format!("address {} of {ifname}", ip.address));
    }
    for route in &result.routes {
        let mut route = route.clone();
        let of_family = |ip: &&IpConfig| ip.address.is_ipv4() == route.dst.is_ipv4();
        route.gw = route.gw.or_else(|| result.ips.iter().find(of_family).and_then(|ip| ip.gateway));
        subjects.push(format!("route {} of {ifname}", route.dst));
        requests.push(route::add_route(index, &route));
    }
    match socket.run(&requests) {
        Ok(_) => Ok(socket),
        Err(failure) => {
            let subject = failure.index.and_then(|i| subjects.get(i)).unwrap_or(ifname).clone();
            Err(Error::netlink("set up", subject)(failure.error))
        }
    }
}

fn index_of(socket: &mut Socket, ifname: &str) -> Result<u32> {
    let found = link::link_by_name(socket, ifname).map_err(Error::netlink("look at", ifname))?;
    let absent = || Error::Check { subject: ifname.to_owned(), reason: "it is not in the pod's namespace".to_owned() };
    found.map(|link| link.index).ok_or_else(absent)
}

/// Compares the kernel with the result.
pub(super) fn check(
    kernel: &mut Kernel,
    bridge: &Bridge,
    previous: &CniResult,
    veth: &str,
    invocation: &Invocation,
    netns: &OwnedFd,
) -> Result<()> {
    let fail = |subject: &str, reason: &str| Error::Check { subject: subject.to_owned(), reason: reason.to_owned() };
    let look =
        |kernel: &mut Kernel, name: &str| link::link_by_name(&mut kernel.route, name).map_err(Error::netlink("look at", name));
    let master = look(kernel, &bridge.name)?.ok_or_else(|| fail(&bridge.name, "it is gone"))?;
    // Other implementations name the host's end otherwise: the result knows it.
    let named = previous.interfaces.iter().find(|i| i.sandbox.is_empty() && i.name != bridge.name).map(|i| i.name.clone());
    let name = named.unwrap_or_else(|| veth.to_owned());
    let host_end = look(kernel, &name)?.ok_or_else(|| fail(&name, "it is gone"))?;
    if host_end.master != master.index {
        return Err(fail(&name, "it is not a port of its bridge"));
    }
    if !host_end.is_up() {
        return Err(fail(&name, "it is down"));
    }
    let (mut socket, ()) = pod_socket(netns, &invocation.container_id, || Ok(()))?;
    let index = index_of(&mut socket, &invocation.ifname)?;
    let present = route::dump_addresses(&mut socket).map_err(Error::netlink("list addresses of", invocation.ifname.clone()))?;
    match previous.pod_ips().find(|ip| !present.contains(&(index, ip.address))) {
        Some(ip) => Err(fail(&invocation.ifname, &format!("it lacks address {}", ip.address))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mac_follows_the_address() {
        let ip = |text: &str| IpConfig { interface: None, address: text.parse().unwrap(), gateway: None };
        assert_eq!(pod_mac(&[ip("fd00::5/64"), ip("10.88.1.2/16")]).unwrap().to_string(), "0a:58:0a:58:01:02");
        assert_eq!(pod_mac(&[ip("fd00::5/64")]).unwrap(), pod_mac(&[ip("fd00::5/64")]).unwrap());
        assert_eq!(parse_mac("0a:58:00:00:00:01").unwrap().to_string(), "0a:58:00:00:00:01");
        for bad in ["", "0a:58", "01:00:00:00:00:00", "zz:00:00:00:00:00"] {
            assert!(parse_mac(bad).is_err(), "{bad}");
        }
    }
}
