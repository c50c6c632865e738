//! What the caller says about a pod's network, and what it gets back.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::Cidr;

/// Transport protocol of a host port.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP
    #[default]
    Tcp,
    /// UDP
    Udp,
    /// SCTP
    Sctp,
}

impl Protocol {
    /// The protocol's number in the IP header.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
            Self::Sctp => 132,
        }
    }

    /// The name as CNI writes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

/// One host port of a pod, in the shape of CNI's `portMappings` capability.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// Port on the host; entries with 0 are ignored.
    pub host_port: u16,
    /// Port in the pod.
    pub container_port: u16,
    /// Protocol.
    #[serde(default)]
    pub protocol: Protocol,
    /// Listen on this host address only; none or unspecified: on all.
    #[serde(rename = "hostIP", default, skip_serializing_if = "Option::is_none", deserialize_with = "empty_is_none")]
    pub host_ip: Option<IpAddr>,
}

fn empty_is_none<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<IpAddr>, D::Error> {
    match Option::<String>::deserialize(deserializer)?.as_deref() {
        None | Some("") => Ok(None),
        Some(text) => text.parse().map(Some).map_err(serde::de::Error::custom),
    }
}

/// Bandwidth limits, in bits per second and bits, in the shape of CNI's `bandwidth` capability.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Bandwidth {
    /// Traffic into the pod, bits per second; 0: no limit.
    #[serde(default)]
    pub ingress_rate: u64,
    /// Burst into the pod, bits.
    #[serde(default)]
    pub ingress_burst: u64,
    /// Traffic out of the pod, bits per second; 0: no limit.
    #[serde(default)]
    pub egress_rate: u64,
    /// Burst out of the pod, bits.
    #[serde(default)]
    pub egress_burst: u64,
}

/// DNS settings passed to plugins with the `dns` capability.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Name servers.
    #[serde(default)]
    pub servers: Vec<String>,
    /// Search domains.
    #[serde(default)]
    pub searches: Vec<String>,
    /// Resolver options.
    #[serde(default)]
    pub options: Vec<String>,
}

/// A sandbox as the network sees it. Detach takes the same value: what was cached at attach wins over it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNetwork {
    /// The sandbox's id: `CNI_CONTAINERID`.
    pub sandbox_id: String,
    /// The pod's namespace (`K8S_POD_NAMESPACE`).
    pub namespace: String,
    /// The pod's name (`K8S_POD_NAME`).
    pub name: String,
    /// The pod's UID (`K8S_POD_UID`).
    pub uid: String,
    /// Name of the interface in the pod, `eth0`.
    pub ifname: String,
    /// Host ports.
    pub port_mappings: Vec<PortMapping>,
    /// Bandwidth limits.
    pub bandwidth: Option<Bandwidth>,
    /// DNS settings.
    pub dns: Option<Dns>,
    /// The pod's cgroup, for plugins with the `cgroupPath` capability.
    pub cgroup_path: Option<String>,
    /// The pod's annotations, for plugins with `io.kubernetes.cri.pod-annotations`.
    pub annotations: BTreeMap<String, String>,
}

impl Default for PodNetwork {
    fn default() -> Self {
        Self {
            sandbox_id: String::new(),
            namespace: String::new(),
            name: String::new(),
            uid: String::new(),
            ifname: "eth0".to_owned(),
            port_mappings: Vec::new(),
            bandwidth: None,
            dns: None,
            cgroup_path: None,
            annotations: BTreeMap::new(),
        }
    }
}

/// A network namespace: always a descriptor, and a path in the host's mount namespace where an external plugin needs one
/// (see [`crate::Network::needs_netns_path`]).
#[derive(Debug)]
pub struct Netns {
    /// The namespace.
    pub fd: OwnedFd,
    /// Where it is bound in the host's mount namespace.
    pub path: Option<PathBuf>,
}

/// A sandbox that has its network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// Addresses of the pod's interface, in the result's order.
    pub ips: Vec<Cidr>,
    /// MAC address of the pod's interface.
    pub mac: Option<String>,
    /// The CNI result of the chain, in the configuration's version.
    pub result_json: String,
}

impl Attachment {
    /// The primary address (an IPv4 one by preference), then the others.
    pub fn pod_ips(&self) -> Vec<IpAddr> {
        let (mut first, rest): (Vec<IpAddr>, Vec<IpAddr>) = self.ips.iter().map(Cidr::addr).partition(IpAddr::is_ipv4);
        if first.len() > 1 {
            // Only the primary moves to the front; the others keep the result's order.
            let primary = first[0];
            let others = self.ips.iter().map(Cidr::addr).filter(|ip| *ip != primary);
            return std::iter::once(primary).chain(others).collect();
        }
        first.extend(rest);
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv4_address_is_primary() {
        let attachment = |ips: &[&str]| Attachment {
            ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            mac: None,
            result_json: String::new(),
        };
        let ips = |ips: &[&str]| attachment(ips).pod_ips().iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(ips(&["fd00::2/64", "10.0.0.2/24"]), ["10.0.0.2", "fd00::2"]);
        assert_eq!(ips(&["fd00::2/64"]), ["fd00::2"]);
        assert_eq!(
            ips(&["fd00::2/64", "10.0.0.2/24", "fd00::3/64", "10.0.0.3/24"]),
            ["10.0.0.2", "fd00::2", "fd00::3", "10.0.0.3"]
        );
        assert!(ips(&[]).is_empty());
    }

    #[test]
    fn port_mappings_read_and_write_the_capability_s_shape() {
        let text = r#"[{"hostPort":8080,"containerPort":80,"protocol":"tcp","hostIP":""},{"hostPort":53,"containerPort":53,"protocol":"udp","hostIP":"127.0.0.1"}]"#;
        let mappings: Vec<PortMapping> = serde_json::from_str(text).unwrap();
        assert_eq!(mappings[0].host_ip, None);
        assert_eq!(
            serde_json::to_string(&mappings).unwrap(),
            r#"[{"hostPort":8080,"containerPort":80,"protocol":"tcp"},{"hostPort":53,"containerPort":53,"protocol":"udp","hostIP":"127.0.0.1"}]"#
        );
    }
}
