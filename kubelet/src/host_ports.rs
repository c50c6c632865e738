//! Ports of the host that pods ask for: which two pods cannot run at once. Pure.

use k8s_openapi::api::core::v1::{ContainerPort, Pod, PodStatus};

use crate::admission::Rejection;
use crate::pod::{self, FullName};
use crate::resources::qos_class;

/// The reason in the status of a pod that waits for a port, as the upstream's admission names it.
pub const REASON: &str = "NodePorts";

fn wanted(pod: &Pod) -> impl Iterator<Item = &ContainerPort> {
    let ports = pod::spec(pod).containers.iter().flat_map(|c| c.ports.iter().flatten());
    ports.filter(|port| port.host_port.is_some_and(|p| p != 0))
}

fn protocol(port: &ContainerPort) -> &str {
    port.protocol.as_deref().filter(|p| !p.is_empty()).unwrap_or("TCP")
}

fn overlap(a: &ContainerPort, b: &ContainerPort) -> bool {
    let address = |port: &ContainerPort| port.host_ip.clone().filter(|ip| !matches!(ip.as_str(), "" | "0.0.0.0" | "::"));
    let addresses = match (address(a), address(b)) {
        (Some(a), Some(b)) => a == b,
        _ => true,
    };
    addresses && a.host_port == b.host_port && protocol(a) == protocol(b)
}

/// What keeps `pod` from running beside `others`: the port and the pod that has it.
pub fn conflict<'a>(pod: &Pod, others: impl IntoIterator<Item = &'a Pod>) -> Option<String> {
    others.into_iter().find_map(|other| {
        let taken = wanted(pod).find(|port| wanted(other).any(|theirs| overlap(port, theirs)))?;
        let (number, name) = (taken.host_port.unwrap_or_default(), FullName::of(other));
        Some(format!("hostPort {number}/{} is taken by pod {name}", protocol(taken)))
    })
}

/// Whether a pod with this status has given its ports back.
pub fn is_over(status: Option<&PodStatus>) -> bool {
    matches!(status.and_then(|s| s.phase.as_deref()), Some("Succeeded" | "Failed"))
}

/// The upstream's rejection of a pod whose port another one has; behind its words the port and the pod.
pub fn rejection(message: &str) -> Rejection {
    let text = "Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports";
    Rejection::new(REASON, format!("{text}: {message}"))
}

/// The status of a pod that waits for a port of one that ends: it starts when the port is free.
pub fn waiting(pod: &Pod, message: String) -> PodStatus {
    PodStatus {
        phase: Some("Pending".to_owned()),
        reason: Some(REASON.to_owned()),
        message: Some(message),
        qos_class: Some(qos_class(pod).as_str().to_owned()),
        ..PodStatus::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{defaults::apply_defaults, parse::parse_manifest};

    fn pod(name: &str, port: &str) -> Pod {
        let text = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}, spec: {{containers: \
             [{{name: c, image: i, ports: [{{containerPort: 80, {port}}}]}}]}}}}"
        );
        let mut pod = parse_manifest(&text).unwrap().pods.remove(0).pod;
        apply_defaults(&mut pod);
        pod
    }

    #[test]
    fn two_pods_with_one_port_are_told_apart_by_address_and_protocol() {
        let cases = [
            ("hostPort: 80", "hostPort: 80", true),
            ("hostPort: 80", "hostPort: 81", false),
            ("containerPort: 80", "hostPort: 80", false),
            ("hostPort: 80", "hostPort: 80, protocol: UDP", false),
            ("hostPort: 80, hostIP: 10.0.0.1", "hostPort: 80, hostIP: 10.0.0.2", false),
            ("hostPort: 80, hostIP: 10.0.0.1", "hostPort: 80, hostIP: 0.0.0.0", true),
        ];
        for (a, b, clash) in cases {
            let a = a.strip_prefix("containerPort: 80").map_or(a, |_| "name: x");
            let found = conflict(&pod("a", a), [&pod("b", b)]);
            assert_eq!(found.is_some(), clash, "{a} / {b}");
            if let Some(text) = found {
                assert_eq!(text, "hostPort 80/TCP is taken by pod default/b");
            }
        }
    }

    #[test]
    fn ended_pods_have_no_ports() {
        let status = |phase: &str| PodStatus { phase: Some(phase.to_owned()), ..PodStatus::default() };
        assert!(is_over(Some(&status("Failed"))) && is_over(Some(&status("Succeeded"))));
        assert!(!is_over(Some(&status("Running"))) && !is_over(None));
    }
}
