//! The host's side: the bridge itself, its addresses, forwarding, masquerade.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::config::Bridge;
use crate::kernel::{EnsuredBridge, Kernel};
use crate::netlink::link::{self, Link, Mac};
use crate::netlink::{Socket, route};
use crate::reaper::random;
use crate::result::IpConfig;
use crate::{Cidr, Error, Result, sysctl};

/// The bridge's own addresses: the gateways of the pod's addresses.
pub(super) fn gateways(bridge: &Bridge, ips: &[IpConfig]) -> Vec<Cidr> {
    if !bridge.is_gateway {
        return Vec::new();
    }
    ips.iter().filter_map(|ip| Cidr::new(ip.gateway?, ip.address.prefix())).collect()
}

/// The bridge exists, is up, has the gateways' addresses; the host forwards. Remembered, so that the next pod costs nothing.
pub(super) fn ensure(kernel: &mut Kernel, bridge: &Bridge, ips: &[IpConfig]) -> Result<EnsuredBridge> {
    let gateways = gateways(bridge, ips);
    if let Some(known) = kernel.bridges.get(&bridge.name)
        && gateways.iter().all(|gateway| known.gateways.contains(gateway))
    {
        return Ok(known.clone());
    }
    let link = ensure_link(kernel, bridge)?;
    if !gateways.is_empty() {
        ensure_addresses(kernel, bridge, &link, &gateways)?;
        if gateways.iter().any(Cidr::is_ipv4) {
            sysctl::ensure_forwarding_v4()?;
        }
        if gateways.iter().any(|g| !g.is_ipv4()) {
            sysctl::ensure_forwarding_v6()?;
        }
    }
    let mut ensured = EnsuredBridge { index: link.index, mac: link.mac_text(), gateways };
    if let Some(known) = kernel.bridges.get(&bridge.name).filter(|known| known.index == ensured.index) {
        ensured.gateways.extend(known.gateways.iter().copied());
    }
    kernel.bridges.insert(bridge.name.clone(), ensured.clone());
    Ok(ensured)
}

fn ensure_link(kernel: &mut Kernel, bridge: &Bridge) -> Result<Link> {
    let look = |kernel: &mut Kernel| {
        link::link_by_name(&mut kernel.route, &bridge.name).map_err(Error::netlink("look at", bridge.name.clone()))
    };
    let found = match look(kernel)? {
        Some(found) => Some(found),
        None => {
            create(kernel, bridge)?;
            look(kernel)?
        }
    };
    let gone = || Error::Check { subject: bridge.name.clone(), reason: "it went as soon as it was made".to_owned() };
    let found = found.ok_or_else(gone)?;
    if found.kind != "bridge" {
        return Err(Error::NotABridge { link: bridge.name.clone() });
    }
    if !found.is_up() {
        kernel.route.one(link::set_up(found.index)).map_err(Error::netlink("set up", bridge.name.clone()))?;
    }
    Ok(found)
}

/// With a MAC address of its own: otherwise it would take the lowest of its ports', and change with them.
fn create(kernel: &mut Kernel, bridge: &Bridge) -> Result<()> {
    let mac = random_mac()?;
    match link::create_bridge(&mut kernel.route, &bridge.name, mac, bridge.mtu, bridge.promiscuous) {
        Err(error) if error.errno == Some(rustix::io::Errno::EXIST.raw_os_error()) => Ok(()),
        other => other.map_err(Error::netlink("create bridge", bridge.name.clone())),
    }
}

/// A random unicast address of the kind that nobody sells.
pub(super) fn random_mac() -> Result<Mac> {
    let mut bytes = random::<6>()?;
    bytes[0] = bytes[0] & 0xfe | 0x02;
    Ok(Mac(bytes))
}

fn ensure_addresses(kernel: &mut Kernel, bridge: &Bridge, link: &Link, gateways: &[Cidr]) -> Result<()> {
    let all = route::dump_addresses(&mut kernel.route).map_err(Error::netlink("list addresses of", bridge.name.clone()))?;
    let present: Vec<Cidr> = all.into_iter().filter(|(index, _)| *index == link.index).map(|(_, cidr)| cidr).collect();
    if gateways.iter().any(|g| !g.is_ipv4()) {
        let disable = format!("ipv6/conf/{}/disable_ipv6", bridge.name);
        if sysctl::read(&disable).is_some() {
            sysctl::ensure(&disable, "0")?;
            // Without this the bridge's link-local address is tentative when the first pod comes, and as long as it is, the kernel
            // cannot look for the pod on behalf of anybody who has no address on the bridge.
            if !bridge.detect_duplicates {
                sysctl::ensure(&format!("ipv6/conf/{}/accept_dad", bridge.name), "0")?;
            }
        }
    }
    for gateway in gateways.iter().filter(|gateway| !present.contains(gateway)) {
        let is_rival =
            |found: &&Cidr| found.is_ipv4() == gateway.is_ipv4() && !is_link_local(found.addr()) && !gateways.contains(found);
        if let Some(found) = present.iter().find(is_rival)
            && (gateway.is_ipv4() || found.overlaps(gateway))
        {
            replace(kernel, bridge, link, *found, *gateway)?;
        }
        match kernel.route.one(route::add_address(link.index, *gateway, false)) {
            Err(error) if error.errno != Some(rustix::io::Errno::EXIST.raw_os_error()) => {
                return Err(Error::netlink("add address to", format!("{} ({gateway})", bridge.name))(error));
            }
            _ => {}
        }
    }
    let deadline = usable_by();
    for gateway in gateways.iter().filter(|gateway| !gateway.is_ipv4()) {
        while !is_usable(&mut kernel.route, *gateway, deadline)? {
            std::thread::sleep(LOOK_AGAIN);
        }
    }
    Ok(())
}

/// How long an IPv6 address may take until it can be used, and how often to look.
const USABLE: Duration = Duration::from_secs(5);
pub(super) const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// When to give up on an address that was added now.
pub(super) fn usable_by() -> Instant {
    Instant::now() + USABLE
}

/// Whether the kernel answers on an address of its own; an error after the deadline.
pub(super) fn is_usable(socket: &mut Socket, address: Cidr, deadline: Instant) -> Result<bool> {
    let local = route::is_local(socket, address.addr()).map_err(Error::netlink("look for", address.to_string()))?;
    if !local && Instant::now() > deadline {
        return Err(Error::Check { subject: address.to_string(), reason: format!("it could not be used after {USABLE:?}") });
    }
    Ok(local)
}

fn replace(kernel: &mut Kernel, bridge: &Bridge, link: &Link, found: Cidr, wanted: Cidr) -> Result<()> {
    if !bridge.force_address {
        return Err(Error::BridgeAddress { bridge: bridge.name.clone(), found, wanted });
    }
    kernel
        .route
        .one(route::delete_address(link.index, found))
        .map_err(Error::netlink("delete address of", format!("{} ({found})", bridge.name)))
}

fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(_) => false,
        IpAddr::V6(v6) => v6.segments()[0] & 0xffc0 == 0xfe80,
    }
}
