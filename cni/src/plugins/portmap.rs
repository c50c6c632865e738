//! The portmap plugin: host ports by elements of the instance's nf_tables maps. Both families; 127.0.0.1 works, ::1 cannot
//! (IPv6 has no `route_localnet`).

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde_json::{Value, json};

use super::fields::Fields;
use super::host_local::Owner;
use super::{Config, previous_result, required_previous_result};
use crate::host::Host;
use crate::invocation::Invocation;
use crate::nft::HostPort;
use crate::result::CniResult;
use crate::{Cidr, Error, PortMapping, Result};

const PLUGIN: &str = "portmap";
/// The reference plugin's default.
const MARK_BIT: u32 = 13;

/// The plugin's configuration, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Portmap {
    mark_bit: u32,
    mappings: Vec<PortMapping>,
}

impl Portmap {
    pub(crate) fn parse(config: &Config) -> Result<Self> {
        let mut fields = Fields::of_plugin(PLUGIN, config);
        // Without masquerading, 127.0.0.1 and a pod's own host port would silently not work.
        fields.only("snat", &[json!(true)])?;
        fields.only("backend", &[json!("nftables"), json!("")])?;
        fields.only("masqAll", &[json!(false)])?;
        fields.only("externalSetMarkChain", &[json!("")])?;
        fields.only("conditionsV4", &[json!([])])?;
        fields.only("conditionsV6", &[json!([])])?;
        let mark_bit = fields.take("markMasqBit")?.unwrap_or(MARK_BIT);
        fields.finish()?;
        if mark_bit > 31 {
            return Err(Error::invalid(PLUGIN, format!("markMasqBit {mark_bit} is not between 0 and 31")));
        }
        let mappings = config.get("runtimeConfig").and_then(|r| r.get("portMappings")).filter(|v| !v.is_null());
        let mappings = mappings.cloned().unwrap_or_else(|| json!([]));
        let mappings = serde_json::from_value(mappings).map_err(Error::decode("portmap: runtimeConfig.portMappings"))?;
        Ok(Self { mark_bit, mappings })
    }
}

/// The host ports of mappings for a pod with these addresses: the first of each family.
pub(crate) fn host_ports(mappings: &[PortMapping], result: &CniResult) -> Result<Vec<HostPort>> {
    let pod = |v4: bool| result.pod_ips().map(|ip| ip.address.addr()).find(|ip| ip.is_ipv4() == v4);
    let mut ports = Vec::new();
    for mapping in mappings.iter().filter(|m| m.host_port != 0) {
        if mapping.container_port == 0 {
            return Err(Error::invalid(PLUGIN, format!("host port {} has no container port", mapping.host_port)));
        }
        let families = [true, false].into_iter().filter(|v4| mapping.host_ip.is_none_or(|ip| ip.is_ipv4() == *v4));
        let pods: Vec<IpAddr> = families.filter_map(pod).collect();
        if let (Some(host), true) = (mapping.host_ip, pods.is_empty()) {
            return Err(Error::NoPodAddress { host });
        }
        let host = mapping.host_ip.filter(|ip| !ip.is_unspecified());
        ports.extend(pods.into_iter().map(|pod| HostPort {
            host,
            protocol: mapping.protocol,
            host_port: mapping.host_port,
            pod,
            pod_port: mapping.container_port,
        }));
    }
    Ok(ports)
}

/// The element's owner: a container may have several interfaces, but the usual one needs no name.
pub(crate) fn owner_text(owner: &Owner) -> String {
    if owner.ifname == "eth0" { owner.container_id.clone() } else { format!("{}/{}", owner.container_id, owner.ifname) }
}

/// The subnets whose pods reach each other without the host's routing.
fn networks(result: &CniResult) -> Vec<Cidr> {
    let is_subnet = |c: &Cidr| c.prefix() < if c.is_ipv4() { 32 } else { 128 };
    result.pod_ips().map(|ip| ip.address.network()).filter(is_subnet).collect()
}

pub(super) async fn add(host: &Host, invocation: &Invocation, config: &Config) -> Result<CniResult> {
    let portmap = Portmap::parse(config)?;
    let result = required_previous_result(PLUGIN, config)?;
    let ports = host_ports(&portmap.mappings, &result)?;
    if !ports.is_empty() {
        let (owner, networks) = (owner_text(&invocation.owner()), networks(&result));
        host.worker.run(move |kernel| kernel.open_host_ports(&owner, ports, &networks, portmap.mark_bit)).await?;
    }
    Ok(result)
}

pub(super) async fn delete(host: &Host, invocation: &Invocation, config: &Config) -> Result<()> {
    let portmap = Portmap::parse(config);
    // The agent's own record of an attachment says for certain that there are none.
    let recorded = host.is_agent() && matches!(previous_result(config), Ok(Some(_)));
    if recorded && matches!(&portmap, Ok(portmap) if portmap.mappings.is_empty()) {
        return Ok(());
    }
    // Whatever has become of the configuration, the owner's ports are closed; the kernel knows which they are.
    let owner = owner_text(&invocation.owner());
    let mut closed = host.worker.run(move |kernel| kernel.close_host_ports(&owner)).await?;
    // A repeated call has no elements to tell it where flows may still lead.
    if let (Ok(portmap), Ok(Some(result))) = (portmap, previous_result(config)) {
        closed.extend(host_ports(&portmap.mappings, &result).unwrap_or_default());
    }
    host.worker.forget_flows(closed).await
}

pub(super) async fn check(host: &Host, invocation: &Invocation, config: &Config) -> Result<()> {
    let portmap = Portmap::parse(config)?;
    let result = required_previous_result(PLUGIN, config)?;
    let ports = host_ports(&portmap.mappings, &result)?;
    let owner = owner_text(&invocation.owner());
    let elements = host.worker.run(move |kernel| kernel.elements_of(|other| other == owner)).await?;
    match ports.iter().find(|port| !elements.iter().any(|element| port.is(element))) {
        Some(port) => Err(Error::Check {
            subject: format!("host port {}/{}", port.host_port, port.protocol.name()),
            reason: "it is not in the nf_tables map".to_owned(),
        }),
        None => Ok(()),
    }
}

pub(super) async fn collect(host: &Host, valid: &BTreeSet<Owner>) -> Result<()> {
    let valid: BTreeSet<String> = valid.iter().map(owner_text).collect();
    host.worker.run(move |kernel| kernel.retain_host_ports(|owner| valid.contains(owner))).await
}

/// The mappings in a cached result's capability arguments.
pub(crate) fn cached_mappings(capabilities: &Config) -> Vec<PortMapping> {
    let mappings = capabilities.get("portMappings").cloned().unwrap_or(Value::Null);
    serde_json::from_value(mappings).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(value: Value) -> Config {
        value.as_object().cloned().unwrap()
    }

    fn result(ips: &[&str]) -> CniResult {
        let ips: Vec<Value> = ips.iter().map(|ip| json!({"address": ip})).collect();
        CniResult::parse(&json!({"cniVersion": "1.0.0", "ips": ips}), crate::result::CniVersion::V1_0_0, "test").unwrap()
    }

    #[test]
    fn the_usual_configurations_are_read_and_others_are_refused_by_name() {
        for config in [
            json!({"type": "portmap", "capabilities": {"portMappings": true}}),
            json!({"type": "portmap", "snat": true, "markMasqBit": 14, "backend": "nftables", "conditionsV4": null}),
        ] {
            Portmap::parse(&object(config)).unwrap();
        }
        for (config, field) in [
            (json!({"snat": false}), "snat"),
            (json!({"backend": "iptables"}), "backend"),
            (json!({"conditionsV4": ["-s", "x"]}), "conditionsV4"),
            (json!({"masqAll": true}), "masqAll"),
            (json!({"color": 1}), "color"),
        ] {
            match Portmap::parse(&object(config)).unwrap_err() {
                Error::UnsupportedField { field: found, .. } => assert_eq!(found, field),
                other => panic!("{other}"),
            }
        }
        assert!(Portmap::parse(&object(json!({"markMasqBit": 32}))).is_err());
    }

    #[test]
    fn mappings_become_one_host_port_per_family() {
        let mapping = |host_ip: &str, host_port: u16| -> PortMapping {
            serde_json::from_value(json!({"hostPort": host_port, "containerPort": 80, "hostIP": host_ip})).unwrap()
        };
        let both = result(&["10.0.0.2/24", "fd00::2/64"]);
        assert_eq!(host_ports(&[mapping("", 8080), mapping("", 0)], &both).unwrap().len(), 2);
        let v4 = host_ports(&[mapping("127.0.0.1", 8080)], &both).unwrap();
        assert_eq!((v4.len(), v4[0].host), (1, Some("127.0.0.1".parse().unwrap())));
        assert_eq!(host_ports(&[mapping("0.0.0.0", 8080)], &both).unwrap()[0].host, None);
        assert!(host_ports(&[mapping("::1", 8080)], &result(&["10.0.0.2/24"])).is_err());
    }
}
