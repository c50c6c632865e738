//! The rules of one container: names, ports, resources, mounts, security, probes. Its variables are in [`super::env`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, ContainerPort, HTTPGetAction, PodSpec, Probe, ResourceRequirements, VolumeMount};

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::env::validate_env;
use super::{Problems, is_dns_label, validate_amount, validate_apparmor, validate_id, validate_seccomp};
use crate::quantity::Amount;

/// One container of a pod.
pub(super) fn validate_container(
    path: &str,
    container: &Container,
    spec: &PodSpec,
    volumes: &BTreeSet<&str>,
    problems: &mut Problems,
) {
    if !is_dns_label(&container.name) {
        problems.add(format!("{path}.name"), format!("{:?} is not a DNS label", container.name));
    }
    match container.image.as_deref() {
        None | Some("") => problems.add(format!("{path}.image"), "is required"),
        Some(image) if image.trim() != image => {
            problems.add(format!("{path}.image"), "must not have leading or trailing whitespace");
        }
        Some(_) => {}
    }
    let policy = container.image_pull_policy.as_deref();
    problems.one_of(&format!("{path}.imagePullPolicy"), policy, &["Always", "IfNotPresent", "Never"]);
    problems.one_of(
        &format!("{path}.terminationMessagePolicy"),
        container.termination_message_policy.as_deref(),
        &["File", "FallbackToLogsOnError"],
    );
    validate_restarts(path, container, problems);
    validate_lifecycle(path, container, spec, problems);
    validate_calls(path, container, problems);
    validate_env(path, container, spec, problems);
    validate_resize_policy(path, container, spec, problems);
    validate_ports(path, container.ports.as_deref().unwrap_or_default(), spec, problems);
    validate_resources(&format!("{path}.resources"), container.resources.as_ref(), problems);
    validate_mounts(path, container, volumes, problems);
    validate_container_security(path, container, spec, problems);
    for (name, probe) in [
        ("livenessProbe", &container.liveness_probe),
        ("readinessProbe", &container.readiness_probe),
        ("startupProbe", &container.startup_probe),
    ] {
        if let Some(probe) = probe {
            validate_probe(&format!("{path}.{name}"), probe, name != "readinessProbe", problems);
        }
    }
}

/// Policy and rules of the container's own. An init container that always restarts is a sidecar; others have no part in
/// the life that probes and hooks watch.
fn validate_restarts(path: &str, container: &Container, problems: &mut Problems) {
    let is_init = path.starts_with("spec.initContainers");
    let policy = container.restart_policy.as_deref();
    problems.one_of(&format!("{path}.restartPolicy"), policy, &["Always", "OnFailure", "Never"]);
    let rules = container.restart_policy_rules.as_deref().unwrap_or_default();
    if !rules.is_empty() && policy.is_none() {
        problems.add(format!("{path}.restartPolicy"), "is required with restartPolicyRules");
    }
    if !rules.is_empty() && is_init && policy == Some("Always") {
        problems.add(format!("{path}.restartPolicyRules"), "may not be set for a sidecar");
    }
    if rules.len() > 20 {
        problems.add(format!("{path}.restartPolicyRules"), "must not hold more than 20 rules");
    }
    for (i, rule) in rules.iter().enumerate() {
        let path = format!("{path}.restartPolicyRules[{i}]");
        problems.one_of(&format!("{path}.action"), Some(&rule.action), &["Restart", "RestartAllContainers"]);
        let Some(codes) = &rule.exit_codes else {
            problems.add(format!("{path}.exitCodes"), "is required");
            continue;
        };
        problems.one_of(&format!("{path}.exitCodes.operator"), Some(&codes.operator), &["In", "NotIn"]);
        if codes.values.as_ref().is_none_or(|values| values.is_empty() || values.len() > 255) {
            problems.add(format!("{path}.exitCodes.values"), "must hold 1 to 255 exit codes");
        }
    }
    let has_probe =
        [&container.liveness_probe, &container.readiness_probe, &container.startup_probe].into_iter().any(Option::is_some);
    if is_init && policy != Some("Always") && (has_probe || container.lifecycle.is_some()) {
        problems.add(path, "probes and lifecycle may not be set for init containers without restartPolicy: Always");
    }
}

fn validate_lifecycle(path: &str, container: &Container, spec: &PodSpec, problems: &mut Problems) {
    let Some(lifecycle) = &container.lifecycle else { return };
    let path = format!("{path}.lifecycle");
    if let Some(signal) = &lifecycle.stop_signal {
        if spec.os.is_none() {
            problems.add(format!("{path}.stopSignal"), "needs spec.os.name");
        }
        if berth_cri_api::v1::Signal::from_str_name(signal).is_none() {
            problems.add(format!("{path}.stopSignal"), format!("{signal:?} is not a signal"));
        }
    }
    for (name, handler) in [("postStart", &lifecycle.post_start), ("preStop", &lifecycle.pre_stop)] {
        let Some(handler) = handler else { continue };
        let path = format!("{path}.{name}");
        let kinds = [handler.exec.is_some(), handler.http_get.is_some(), handler.tcp_socket.is_some(), handler.sleep.is_some()];
        exactly_one(&path, &kinds, "exec, httpGet, tcpSocket and sleep", problems);
        let tcp_host = handler.tcp_socket.as_ref().and_then(|tcp| tcp.host.as_deref());
        let http_host = handler.http_get.as_ref().and_then(|get| get.host.as_deref());
        for (kind, host) in [("tcpSocket", tcp_host), ("httpGet", http_host)] {
            if host.is_some_and(|host| !host.is_empty() && host.parse::<IpAddr>().is_err()) {
                problems.add(format!("{path}.{kind}.host"), "must be an IP address");
            }
        }
        if handler.exec.as_ref().is_some_and(|e| e.command.as_ref().is_none_or(Vec::is_empty)) {
            problems.add(format!("{path}.exec.command"), "is required");
        }
        let scheme = handler.http_get.as_ref().and_then(|get| get.scheme.as_deref());
        problems.one_of(&format!("{path}.httpGet.scheme"), scheme, &["HTTP", "HTTPS"]);
        if let Some(sleep) = &handler.sleep {
            let grace = spec.termination_grace_period_seconds.unwrap_or(30);
            if !(0..=grace).contains(&sleep.seconds) {
                problems.add(format!("{path}.sleep.seconds"), format!("must be between 0 and the grace of {grace}"));
            }
        }
    }
}

/// Of several ways one is to be chosen.
pub(super) fn exactly_one(path: &str, set: &[bool], ways: &str, problems: &mut Problems) {
    match set.iter().filter(|set| **set).count() {
        1 => {}
        0 => problems.add(path, format!("must have one of {ways}")),
        _ => problems.add(path, format!("may have only one of {ways}")),
    }
}

fn validate_probe(path: &str, probe: &Probe, once: bool, problems: &mut Problems) {
    let handlers = [probe.exec.is_some(), probe.http_get.is_some(), probe.tcp_socket.is_some(), probe.grpc.is_some()];
    exactly_one(path, &handlers, "exec, httpGet, tcpSocket and grpc", problems);
    if probe.grpc.as_ref().is_some_and(|grpc| !(1..=65535).contains(&grpc.port)) {
        problems.add(format!("{path}.grpc.port"), "must be between 1 and 65535");
    }
    if probe.exec.as_ref().is_some_and(|e| e.command.as_ref().is_none_or(Vec::is_empty)) {
        problems.add(format!("{path}.exec.command"), "is required");
    }
    if let Some(get) = &probe.http_get {
        problems.one_of(&format!("{path}.httpGet.scheme"), get.scheme.as_deref(), &["HTTP", "HTTPS"]);
    }
    let hosts = [
        ("httpGet", probe.http_get.as_ref().and_then(|g| g.host.as_deref())),
        ("tcpSocket", probe.tcp_socket.as_ref().and_then(|t| t.host.as_deref())),
    ];
    for (handler, host) in hosts {
        if host.is_some_and(|h| !h.is_empty() && h.parse::<IpAddr>().is_err()) {
            problems.add(format!("{path}.{handler}.host"), "must be an IP address");
        }
    }
    for (field, value) in [
        ("initialDelaySeconds", probe.initial_delay_seconds),
        ("timeoutSeconds", probe.timeout_seconds),
        ("periodSeconds", probe.period_seconds),
        ("successThreshold", probe.success_threshold),
        ("failureThreshold", probe.failure_threshold),
    ] {
        if value.is_some_and(|v| v < 0) {
            problems.add(format!("{path}.{field}"), "must not be negative");
        }
    }
    if once && probe.success_threshold.is_some_and(|n| n != 1) {
        problems.add(format!("{path}.successThreshold"), "must be 1");
    }
    if !once && probe.termination_grace_period_seconds.is_some() {
        problems.add(format!("{path}.terminationGracePeriodSeconds"), "must not be set for readinessProbes");
    }
}

fn validate_ports(path: &str, ports: &[ContainerPort], spec: &PodSpec, problems: &mut Problems) {
    let mut names = BTreeSet::new();
    for (i, port) in ports.iter().enumerate() {
        let path = format!("{path}.ports[{i}]");
        let in_range = |n: i32| (1..=65535).contains(&n);
        if !in_range(port.container_port) {
            problems.add(format!("{path}.containerPort"), "must be between 1 and 65535");
        }
        let host_port = port.host_port.unwrap_or(0);
        if host_port != 0 && !in_range(host_port) {
            problems.add(format!("{path}.hostPort"), "must be between 1 and 65535");
        }
        if spec.host_network == Some(true) && host_port != port.container_port {
            problems.add(format!("{path}.hostPort"), "must equal containerPort when hostNetwork is true");
        }
        problems.one_of(&format!("{path}.protocol"), port.protocol.as_deref(), &["TCP", "UDP", "SCTP"]);
        if let Some(ip) = port.host_ip.as_deref().filter(|ip| !ip.is_empty())
            && ip.parse::<IpAddr>().is_err()
        {
            problems.add(format!("{path}.hostIP"), format!("{ip:?} is not an IP address"));
        }
        if let Some(name) = &port.name {
            if !is_port_name(name) {
                problems.add(format!("{path}.name"), format!("{name:?} is not a port name (at most 15 characters)"));
            }
            if !names.insert(name) {
                problems.add(format!("{path}.name"), format!("{name:?} is used twice"));
            }
        }
    }
}

fn validate_resources(path: &str, resources: Option<&ResourceRequirements>, problems: &mut Problems) {
    let Some(resources) = resources else { return };
    let limits = resources.limits.clone().unwrap_or_default();
    let requests = resources.requests.clone().unwrap_or_default();
    for (kind, list) in [("limits", &limits), ("requests", &requests)] {
        for (name, quantity) in list {
            let path = format!("{path}.{kind}.{name}");
            validate_amount(&path, &quantity.0, problems);
            let known = matches!(name.as_str(), "cpu" | "memory" | "ephemeral-storage") || name.starts_with("hugepages-");
            if crate::resources::is_extended(name) {
                if Amount::of(quantity).millis() % 1000 != 0 {
                    problems.add(path, "must be an integer");
                } else if kind == "requests" && !limits.contains_key(name) {
                    problems.add(path, "must have a limit: devices are not shared");
                }
            } else if !known {
                problems.add(
                    path,
                    "is neither a resource that the kubelet knows nor the name of an extended one (example.com/thing)",
                );
            } else if name.starts_with("hugepages-") && kind == "requests" && !limits.contains_key(name) {
                problems.add(path, "must have a limit: huge pages are not shared");
            }
        }
    }
    let asked = |list: &BTreeMap<String, Quantity>, named: fn(&str) -> bool| list.keys().any(|name| named(name));
    let others = |name: &str| matches!(name, "cpu" | "memory");
    if asked(&limits, |name| name.starts_with("hugepages-")) && !asked(&requests, others) && !asked(&limits, others) {
        problems.add(path, "huge pages need cpu or memory beside them");
    }
    for (name, limit) in &limits {
        if let Some(request) = requests.get(name) {
            let (request_amount, limit_amount) = (Amount::of(request), Amount::of(limit));
            let huge = name.starts_with("hugepages-") || crate::resources::is_extended(name);
            if request_amount > limit_amount || huge && request_amount != limit_amount {
                let relation = if huge { "equal" } else { "not exceed" };
                let message = format!("{} must {relation} the limit of {}", request.0, limit.0);
                problems.add(format!("{path}.requests.{name}"), message);
            }
        }
    }
}

/// Which resources may change in the running container. One that is never started again cannot be restarted for it.
fn validate_resize_policy(path: &str, container: &Container, spec: &PodSpec, problems: &mut Problems) {
    let mut resources = BTreeSet::new();
    let own = container.restart_policy.as_deref().or(spec.restart_policy.as_deref());
    for (i, policy) in container.resize_policy.iter().flatten().enumerate() {
        let path = format!("{path}.resizePolicy[{i}]");
        let (name, restart) = (policy.resource_name.as_str(), policy.restart_policy.as_str());
        problems.required_one_of(&format!("{path}.resourceName"), name, &["cpu", "memory"]);
        problems.required_one_of(&format!("{path}.restartPolicy"), restart, &["NotRequired", "RestartContainer"]);
        if !resources.insert(name) {
            problems.add(format!("{path}.resourceName"), format!("{name:?} is used twice"));
        }
        if restart == "RestartContainer" && own == Some("Never") {
            problems.add(format!("{path}.restartPolicy"), "must be NotRequired where restartPolicy is Never");
        }
    }
}

/// What probes and hooks call: ports and headers.
fn validate_calls(path: &str, container: &Container, problems: &mut Problems) {
    let probes = [
        ("livenessProbe", &container.liveness_probe),
        ("readinessProbe", &container.readiness_probe),
        ("startupProbe", &container.startup_probe),
    ];
    for (name, probe) in probes.into_iter().filter_map(|(name, probe)| Some((name, probe.as_ref()?))) {
        if let Some(tcp) = &probe.tcp_socket {
            validate_port(&format!("{path}.{name}.tcpSocket.port"), &tcp.port, problems);
        }
        if let Some(get) = &probe.http_get {
            validate_http_get(&format!("{path}.{name}.httpGet"), get, problems);
        }
    }
    let hooks = container.lifecycle.iter().flat_map(|l| [("postStart", &l.post_start), ("preStop", &l.pre_stop)]);
    for (name, get) in hooks.filter_map(|(name, hook)| Some((name, hook.as_ref()?.http_get.as_ref()?))) {
        validate_http_get(&format!("{path}.lifecycle.{name}.httpGet"), get, problems);
    }
}

fn validate_http_get(path: &str, get: &HTTPGetAction, problems: &mut Problems) {
    validate_port(&format!("{path}.port"), &get.port, problems);
    for (i, header) in get.http_headers.iter().flatten().enumerate() {
        let token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
        if header.name.is_empty() || !header.name.chars().all(token) {
            problems.add(format!("{path}.httpHeaders[{i}].name"), format!("{:?} is not the name of a header", header.name));
        }
    }
}

fn validate_port(path: &str, port: &IntOrString, problems: &mut Problems) {
    match port {
        IntOrString::Int(number) if !(1..=65535).contains(number) => problems.add(path, "must be between 1 and 65535"),
        IntOrString::String(name) if !is_port_name(name) => problems.add(path, format!("{name:?} is not a port name")),
        _ => {}
    }
}

fn is_port_name(name: &str) -> bool {
    let letters = name.chars().any(|c| c.is_ascii_lowercase());
    name.len() <= 15 && is_dns_label(name) && letters && !name.contains("--")
}

fn validate_mounts(path: &str, container: &Container, volumes: &BTreeSet<&str>, problems: &mut Problems) {
    let privileged = container.security_context.as_ref().and_then(|s| s.privileged) == Some(true);
    let mut targets = BTreeSet::new();
    for (i, mount) in container.volume_mounts.iter().flatten().enumerate() {
        let path = format!("{path}.volumeMounts[{i}]");
        if !volumes.contains(mount.name.as_str()) {
            problems.add(format!("{path}.name"), format!("no volume is called {:?}", mount.name));
        }
        if mount.mount_path.is_empty() {
            problems.add(format!("{path}.mountPath"), "is required");
        }
        if mount.mount_path.contains(':') {
            problems.add(format!("{path}.mountPath"), "must not contain ':'");
        }
        let (sub_path, expr) =
            (mount.sub_path.as_deref().unwrap_or_default(), mount.sub_path_expr.as_deref().unwrap_or_default());
        if !sub_path.is_empty() && !expr.is_empty() {
            problems.add(format!("{path}.subPathExpr"), "cannot be used with subPath");
        }
        for (field, text) in [("subPath", sub_path), ("subPathExpr", expr)] {
            if !crate::volume::sub_path::is_sub_path(text) {
                problems.add(format!("{path}.{field}"), "must be a relative path without '..'");
            }
        }
        if !targets.insert(&mount.mount_path) {
            problems.add(format!("{path}.mountPath"), format!("{:?} is used twice", mount.mount_path));
        }
        validate_propagation(&path, mount, privileged, problems);
    }
}

fn validate_propagation(path: &str, mount: &VolumeMount, privileged: bool, problems: &mut Problems) {
    let propagation = mount.mount_propagation.as_deref();
    let allowed = ["None", "HostToContainer", "Bidirectional"];
    problems.one_of(&format!("{path}.mountPropagation"), propagation, &allowed);
    if propagation == Some("Bidirectional") && !privileged {
        problems.add(format!("{path}.mountPropagation"), "Bidirectional needs a privileged container");
    }
    let recursive = mount.recursive_read_only.as_deref();
    problems.one_of(&format!("{path}.recursiveReadOnly"), recursive, &["Disabled", "IfPossible", "Enabled"]);
    if matches!(recursive, Some("IfPossible" | "Enabled")) {
        if mount.read_only != Some(true) {
            problems.add(format!("{path}.recursiveReadOnly"), "needs readOnly: true");
        }
        if propagation.is_some_and(|p| p != "None") {
            problems.add(format!("{path}.recursiveReadOnly"), "needs mountPropagation None");
        }
    }
}

fn validate_container_security(path: &str, container: &Container, spec: &PodSpec, problems: &mut Problems) {
    let Some(context) = &container.security_context else { return };
    let base = format!("{path}.securityContext");
    validate_id(&format!("{base}.runAsUser"), context.run_as_user, problems);
    validate_id(&format!("{base}.runAsGroup"), context.run_as_group, problems);
    problems.one_of(&format!("{base}.procMount"), context.proc_mount.as_deref(), &["Default", "Unmasked"]);
    if context.proc_mount.as_deref() == Some("Unmasked") && spec.host_users != Some(false) {
        problems.add(format!("{base}.procMount"), "Unmasked needs hostUsers: false");
    }
    validate_seccomp(&format!("{base}.seccompProfile"), context.seccomp_profile.as_ref(), problems);
    validate_apparmor(&format!("{base}.appArmorProfile"), context.app_armor_profile.as_ref(), problems);
    if context.allow_privilege_escalation == Some(false) {
        if context.privileged == Some(true) {
            problems.add(format!("{base}.allowPrivilegeEscalation"), "cannot be false when privileged is true");
        }
        let added = context.capabilities.iter().flat_map(|c| c.add.iter().flatten());
        if added.into_iter().any(|c| c == "SYS_ADMIN" || c == "CAP_SYS_ADMIN" || c == "ALL") {
            problems.add(format!("{base}.allowPrivilegeEscalation"), "cannot be false when CAP_SYS_ADMIN is added");
        }
    }
}
