//! The bridge plugin: a veth pair between the pod and a Linux bridge, with addresses from an IPAM plugin.

mod config;
mod gateway;
mod pod;

pub(crate) use config::Bridge;

use std::collections::BTreeSet;

use serde_json::Value;

use self::config::Ipam;
use super::Config;
use super::host_local::Owner;
use super::required_previous_result;
use crate::host::{Deletion, Host};
use crate::invocation::{Invocation, Verb};
use crate::kernel::{Kernel, pod_socket};
use crate::netlink::link;
use crate::reaper::Pending;
use crate::result::{CniResult, CniVersion};
use crate::{Error, Result};

const PLUGIN: &str = "bridge";

pub(super) async fn add(host: &Host, invocation: &Invocation, config: &Config) -> Result<CniResult> {
    let bridge = Bridge::parse(config, &host.lease_dir)?;
    let netns = invocation.netns.clone().ok_or_else(|| Error::NetnsPathMissing { plugin: PLUGIN.to_owned() })?;
    let leased = match &bridge.ipam {
        Ipam::External(plugin) => {
            let output = host.binaries.call(plugin, Verb::Add, Some(invocation), &Value::Object(config.clone())).await?;
            let what = format!("result of {plugin}");
            let value = serde_json::from_slice(&output).map_err(Error::decode(what.clone()))?;
            Some(CniResult::parse(&value, CniVersion::V1_1_0, &what)?)
        }
        _ => None,
    };
    let veth = host.names.veth(&invocation.container_id, &invocation.ifname);
    let (invocation, boot_id) = (invocation.clone(), host.boot_id.clone());
    let repeated = !host.is_agent();
    let connected = host
        .worker
        .run(move |kernel| {
            let leased = match (&bridge.ipam, leased) {
                (_, Some(leased)) => leased,
                (Ipam::HostLocal(plugin), None) => plugin.add(&invocation.owner(), &boot_id, repeated)?,
                (_, None) => CniResult::default(),
            };
            pod::connect(kernel, &bridge, leased, &veth, &invocation, &netns)
        })
        .await;
    let (result, socket) = connected?;
    pod::until_usable(&result, socket).await?;
    Ok(result)
}

pub(super) async fn delete(host: &Host, invocation: &Invocation, config: &Config) -> Result<()> {
    let ipam = Bridge::parse_ipam(config, &host.lease_dir)?;
    let owner = invocation.owner();
    let veth = host.names.veth(&invocation.container_id, &invocation.ifname);
    match (&host.deletion, &ipam) {
        (Deletion::Deferred(reaper), Ipam::None | Ipam::HostLocal(_)) => {
            let leases = if let Ipam::HostLocal(plugin) = &ipam { Some(plugin.dir().to_owned()) } else { None };
            let pending = Pending { owner, link: veth.clone(), leases };
            reaper.record(&pending)?;
            host.worker.run(move |kernel| silence(kernel, &veth)).await?;
            reaper.push(pending)
        }
        // Another plugin's addresses may be given out again as soon as it has been told: the link goes first.
        _ => {
            let call = invocation.clone();
            host.worker.run(move |kernel| delete_now(kernel, &veth, &call)).await?;
            match &ipam {
                Ipam::None => Ok(()),
                Ipam::HostLocal(plugin) => plugin.delete(&owner, &host.boot_id),
                Ipam::External(plugin) => {
                    host.binaries.call(plugin, Verb::Del, Some(invocation), &Value::Object(config.clone())).await.map(drop)
                }
            }
        }
    }
}

/// Down and off the bridge: what is left of the pod can answer nobody. A link that is gone is no error.
fn silence(kernel: &mut Kernel, veth: &str) -> Result<()> {
    match kernel.route.one(link::set_detached(veth)) {
        Err(error) if error.errno != Some(rustix::io::Errno::NODEV.raw_os_error()) => {
            Err(Error::netlink("take down", veth)(error))
        }
        _ => Ok(()),
    }
}

/// Deletes the link by the pod's end, whoever named the host's, or else by the host's.
fn delete_now(kernel: &mut Kernel, veth: &str, invocation: &Invocation) -> Result<()> {
    if let Some(netns) = &invocation.netns {
        let (mut socket, ()) = pod_socket(&**netns, &invocation.container_id, || Ok(()))?;
        link::delete(&mut socket, &invocation.ifname).map_err(Error::netlink("delete", invocation.ifname.clone()))?;
    }
    link::delete(&mut kernel.route, veth).map_err(Error::netlink("delete", veth))
}

pub(super) async fn check(host: &Host, invocation: &Invocation, config: &Config) -> Result<()> {
    let bridge = Bridge::parse(config, &host.lease_dir)?;
    let previous = required_previous_result(PLUGIN, config)?;
    match &bridge.ipam {
        Ipam::None => {}
        Ipam::HostLocal(plugin) => plugin.check(&invocation.owner(), &host.boot_id)?,
        Ipam::External(plugin) => {
            host.binaries.call(plugin, Verb::Check, Some(invocation), &Value::Object(config.clone())).await?;
        }
    }
    let netns = invocation.netns.clone().ok_or_else(|| Error::NetnsPathMissing { plugin: PLUGIN.to_owned() })?;
    let (veth, invocation) = (host.names.veth(&invocation.container_id, &invocation.ifname), invocation.clone());
    host.worker.run(move |kernel| pod::check(kernel, &bridge, &previous, &veth, &invocation, &netns)).await
}

/// Frees addresses and deletes links that belong to no valid attachment.
pub(super) async fn collect(host: &Host, config: &Config, valid: &BTreeSet<Owner>) -> Result<()> {
    match Bridge::parse_ipam(config, &host.lease_dir)? {
        Ipam::None => Ok(()),
        // A folder that the configuration names may be shared with other instances and runtimes, whose pods the agent does not
        // know: leases of another boot go there, and those of this one when their pods are detached.
        Ipam::HostLocal(plugin) if host.is_agent() && !plugin.dir().starts_with(&host.lease_dir) => Ok(()),
        Ipam::HostLocal(plugin) => plugin.collect(valid, &host.boot_id),
        Ipam::External(plugin) => host.binaries.call(&plugin, Verb::Gc, None, &Value::Object(config.clone())).await.map(drop),
    }
}
