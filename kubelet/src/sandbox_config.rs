//! A pod as the runtime's sandbox configuration. Pure.

use std::path::Path;

use berth_cri_api::v1 as cri;
use k8s_openapi::api::core::v1::{ContainerPort, Pod};

use crate::cri::keys;
use crate::dns::{NodeDns, dns_config};
use crate::hosts::Hostname;
use crate::logs::pod_log_dir;
use crate::node::Capacity;
use crate::pod;
use crate::resources::pod_limits;
use crate::security::sandbox_security;
use crate::sysctl;

/// What the node contributes to a sandbox.
#[derive(Clone, Copy, Debug)]
pub struct SandboxContext<'a> {
    /// The pod's cgroup, empty where the runtime decides.
    pub cgroup_parent: &'a str,
    /// Root of the pods' logs.
    pub logs: &'a Path,
    /// Resolver data.
    pub dns: &'a NodeDns,
    /// The machine.
    pub capacity: &'a Capacity,
}

/// The configuration of a pod's sandbox.
pub fn sandbox_config(pod: &Pod, attempt: u32, context: &SandboxContext<'_>) -> Result<cri::PodSandboxConfig, String> {
    // What is left out is told once a sandbox, by whoever makes it.
    let (dns, _) = dns_config(pod, context.dns);
    let hostname = match pod::is_host_network(pod) {
        true => String::new(),
        false => Hostname::of(pod, &context.dns.cluster_domain).kernel(pod)?,
    };
    let mut labels: std::collections::HashMap<String, String> =
        pod.metadata.labels.iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
    labels.extend(identity_labels(pod));
    let limits = pod_limits(pod, context.capacity);
    let security = pod::spec(pod).security_context.clone().unwrap_or_default();
    Ok(cri::PodSandboxConfig {
        metadata: Some(cri::PodSandboxMetadata {
            name: pod::name(pod).to_owned(),
            uid: pod::uid(pod).to_owned(),
            namespace: pod::namespace(pod).to_owned(),
            attempt,
        }),
        hostname,
        log_directory: pod_log_dir(context.logs, pod).to_string_lossy().into_owned(),
        dns_config: Some(dns),
        port_mappings: port_mappings(pod),
        labels,
        annotations: pod.metadata.annotations.iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect(),
        linux: Some(cri::LinuxPodSandboxConfig {
            cgroup_parent: context.cgroup_parent.to_owned(),
            security_context: Some(sandbox_security(pod)),
            sysctls: security.sysctls.iter().flatten().map(|s| (sysctl::normalize(&s.name), s.value.clone())).collect(),
            overhead: Some(cri::LinuxContainerResources::default()),
            resources: Some(cri::LinuxContainerResources {
                cpu_period: limits.cpu_period,
                cpu_quota: limits.cpu_quota.unwrap_or(0),
                cpu_shares: limits.cpu_shares,
                memory_limit_in_bytes: limits.memory.unwrap_or(0),
                ..Default::default()
            }),
        }),
        windows: None,
    })
}

/// The labels by which the kubelet finds its sandboxes and containers again.
pub fn identity_labels(pod: &Pod) -> [(String, String); 3] {
    [
        (keys::POD_NAME.to_owned(), pod::name(pod).to_owned()),
        (keys::POD_NAMESPACE.to_owned(), pod::namespace(pod).to_owned()),
        (keys::POD_UID.to_owned(), pod::uid(pod).to_owned()),
    ]
}

/// Every port of the regular containers, those without a host port too; duplicates within a container are dropped.
fn port_mappings(pod: &Pod) -> Vec<cri::PortMapping> {
    let mut mappings = Vec::new();
    for container in &pod::spec(pod).containers {
        let mut seen: Vec<String> = Vec::new();
        for port in container.ports.iter().flatten() {
            let mapping = port_mapping(port);
            let key = match port.name.as_deref().filter(|n| !n.is_empty()) {
                Some(name) => name.to_owned(),
                None => {
                    let v6 = mapping.host_ip.contains(':');
                    let cri::PortMapping { protocol, container_port, host_port, host_ip } = &mapping;
                    format!("{v6}-{protocol}-{host_ip}-{container_port}-{host_port}")
                }
            };
            if !seen.contains(&key) {
                seen.push(key);
                mappings.push(mapping);
            }
        }
    }
    mappings
}

fn port_mapping(port: &ContainerPort) -> cri::PortMapping {
    let protocol = match port.protocol.as_deref() {
        Some("UDP") => cri::Protocol::Udp,
        Some("SCTP") => cri::Protocol::Sctp,
        _ => cri::Protocol::Tcp,
    };
    cri::PortMapping {
        protocol: protocol.into(),
        container_port: port.container_port,
        host_port: port.host_port.unwrap_or(0),
        host_ip: port.host_ip.clone().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{defaults::apply_defaults, parse::parse_manifest};

    #[test]
    fn the_configuration_is_the_contracts() {
        let text = "
apiVersion: v1
kind: Pod
metadata: {name: web-n1, namespace: shop, uid: u1, labels: {app: x}, annotations: {a: b}}
spec:
  hostname: h
  securityContext: {sysctls: [{name: net/ipv4/tcp_syncookies, value: '1'}], runAsGroup: 5}
  containers:
  - name: c
    image: i
    resources: {limits: {cpu: 1, memory: 1Gi}}
    ports:
    - {containerPort: 80, hostPort: 8080}
    - {containerPort: 80, hostPort: 8080}
    - {containerPort: 53, protocol: UDP}
  - {name: d, image: i, resources: {limits: {cpu: 1, memory: 1Gi}}, ports: [{containerPort: 80}]}
";
        let mut pod = parse_manifest(text).unwrap().pods.remove(0).pod;
        apply_defaults(&mut pod);
        let dns = NodeDns { host: Some("nameserver 9.9.9.9\n".into()), ..NodeDns::default() };
        let capacity = Capacity::default();
        let context =
            SandboxContext { cgroup_parent: "/kubepods/podu1", logs: Path::new("/var/log/pods"), dns: &dns, capacity: &capacity };
        let config = sandbox_config(&pod, 3, &context).unwrap();
        let metadata = config.metadata.unwrap();
        assert_eq!((metadata.name.as_str(), metadata.namespace.as_str(), metadata.attempt), ("web-n1", "shop", 3));
        assert_eq!(config.hostname, "h");
        assert_eq!(config.log_directory, "/var/log/pods/shop_web-n1_u1");
        assert_eq!(config.labels[keys::POD_UID], "u1");
        assert_eq!(config.labels["app"], "x");
        assert_eq!(config.annotations["a"], "b");
        let ports: Vec<_> = config.port_mappings.iter().map(|p| (p.container_port, p.host_port, p.protocol)).collect();
        assert_eq!(ports, [(80, 8080, 0), (53, 0, 1), (80, 0, 0)]);
        let linux = config.linux.unwrap();
        assert_eq!(linux.cgroup_parent, "/kubepods/podu1");
        assert_eq!(linux.sysctls["net.ipv4.tcp_syncookies"], "1");
        assert_eq!(linux.resources.unwrap().memory_limit_in_bytes, 2 << 30);
        let security = linux.security_context.unwrap();
        assert!(security.run_as_group.is_none(), "a group without a user is refused by runtimes");
    }
}
