//! The loopback plugin: `lo` up.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::fields::Fields;
use super::{Config, previous_result};
use crate::host::Host;
use crate::invocation::Invocation;
use crate::kernel::pod_socket;
use crate::netlink::link::{LOOPBACK, link_by_index, set_up};
use crate::result::{CniResult, Interface, IpConfig};
use crate::{Cidr, Error, Result, sysctl};

const PLUGIN: &str = "loopback";

pub(super) fn check_config(config: &Config) -> Result<()> {
    Fields::of_plugin(PLUGIN, config).finish()
}

fn netns(invocation: &Invocation) -> Result<Arc<OwnedFd>> {
    invocation.netns.clone().ok_or_else(|| Error::NetnsPathMissing { plugin: PLUGIN.to_owned() })
}

pub(super) async fn add(host: &Host, invocation: &Invocation, config: &Config) -> Result<CniResult> {
    check_config(config)?;
    if let Some(previous) = previous_result(config)? {
        set_loopback_up(host, invocation).await?;
        return Ok(previous);
    }
    let has_ipv6 = set_loopback_up(host, invocation).await?;
    let interface = Interface {
        name: "lo".to_owned(),
        mac: "00:00:00:00:00:00".to_owned(),
        sandbox: invocation.sandbox(),
        ..Interface::default()
    };
    let ip = |addr, prefix| Cidr::new(addr, prefix).map(|address| IpConfig { interface: Some(0), address, gateway: None });
    let v6 = has_ipv6.then(|| ip(IpAddr::V6(Ipv6Addr::LOCALHOST), 128)).flatten();
    let ips = ip(IpAddr::V4(Ipv4Addr::LOCALHOST), 8).into_iter().chain(v6).collect();
    Ok(CniResult { interfaces: vec![interface], ips, ..CniResult::default() })
}

/// Sets `lo` up; whether it has an IPv6 address then.
pub(crate) async fn set_loopback_up(host: &Host, invocation: &Invocation) -> Result<bool> {
    let (netns, id) = (netns(invocation)?, invocation.container_id.clone());
    host.worker
        .run(move |_| {
            let (mut socket, has_ipv6) =
                pod_socket(&*netns, &id, || Ok(sysctl::read("ipv6/conf/lo/disable_ipv6").as_deref() == Some("0")))?;
            socket.one(set_up(LOOPBACK)).map_err(Error::netlink("set up", "lo"))?;
            Ok(has_ipv6)
        })
        .await
}

pub(super) async fn check(host: &Host, invocation: &Invocation) -> Result<()> {
    let (netns, id) = (netns(invocation)?, invocation.container_id.clone());
    host.worker
        .run(move |_| {
            let (mut socket, ()) = pod_socket(&*netns, &id, || Ok(()))?;
            let link = link_by_index(&mut socket, LOOPBACK).map_err(Error::netlink("look at", "lo"))?;
            if link.is_some_and(|link| link.is_up()) {
                return Ok(());
            }
            Err(Error::Check { subject: "lo".to_owned(), reason: "it is down".to_owned() })
        })
        .await
}
