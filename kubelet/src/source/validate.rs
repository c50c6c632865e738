//! What a kubelet refuses in a pod from its own sources: the API server's rules as far as they touch fields that berth
//! carries out. Pure; returns every problem with the path of its field.

use std::collections::BTreeSet;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{
    Container, ContainerPort, Pod, PodSpec, Probe, ResourceRequirements, SeccompProfile, Volume, VolumeMount,
};

use crate::quantity::Amount;
use crate::sysctl;

/// A refused field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    /// The field's path, `spec.containers[0].name`.
    pub path: String,
    /// Why.
    pub message: String,
}

/// Collects the problems of one pod.
#[derive(Default)]
struct Problems(Vec<Invalid>);

impl Problems {
    fn add(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.0.push(Invalid { path: path.into(), message: message.into() });
    }

    fn one_of(&mut self, path: &str, value: Option<&str>, allowed: &[&str]) {
        if let Some(value) = value
            && !allowed.contains(&value)
        {
            self.add(path, format!("{value:?} is not one of {}", allowed.join(", ")));
        }
    }
}

/// All problems of a defaulted pod; none means that it may run.
pub fn validate_pod(pod: &Pod, allowed_unsafe_sysctls: &[String]) -> Vec<Invalid> {
    let mut problems = Problems::default();
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    if name.is_empty() {
        problems.add("metadata.name", "is required");
    } else if !is_dns_subdomain(name) {
        problems.add("metadata.name", format!("{name:?} is not a DNS subdomain (lower-case letters, digits, '-', '.')"));
    }
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    if !is_dns_label(namespace) {
        problems.add("metadata.namespace", format!("{namespace:?} is not a DNS label"));
    }
    match &pod.spec {
        None => problems.add("spec", "is required"),
        Some(spec) => validate_spec(spec, allowed_unsafe_sysctls, &mut problems),
    }
    problems.0
}

fn validate_spec(spec: &PodSpec, allowed_unsafe_sysctls: &[String], problems: &mut Problems) {
    problems.one_of("spec.restartPolicy", spec.restart_policy.as_deref(), &["Always", "OnFailure", "Never"]);
    problems.one_of(
        "spec.dnsPolicy",
        spec.dns_policy.as_deref(),
        &["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"],
    );
    problems.one_of("spec.os.name", spec.os.as_ref().map(|os| os.name.as_str()), &["linux"]);
    if spec.termination_grace_period_seconds.is_some_and(|s| s < 0) {
        problems.add("spec.terminationGracePeriodSeconds", "must not be negative");
    }
    if spec.active_deadline_seconds.is_some_and(|s| s < 1) {
        problems.add("spec.activeDeadlineSeconds", "must be at least 1");
    }
    if spec.host_users == Some(false) {
        problems.add("spec.hostUsers", "user namespaces of pods are not supported by berth yet");
    }
    if spec.runtime_class_name.is_some() {
        problems.add("spec.runtimeClassName", "static pods may not reference runtimeclasses yet");
    }
    validate_names(spec, problems);
    validate_dns(spec, problems);
    validate_pod_security(spec, allowed_unsafe_sysctls, problems);
    let volumes = validate_volumes(spec, problems);
    if spec.containers.is_empty() {
        problems.add("spec.containers", "at least one container is required");
    }
    let mut names = BTreeSet::new();
    let inits = spec.init_containers.as_deref().unwrap_or_default();
    let init = inits.iter().enumerate().map(|(i, c)| (format!("spec.initContainers[{i}]"), c));
    let regular = spec.containers.iter().enumerate().map(|(i, c)| (format!("spec.containers[{i}]"), c));
    for (path, container) in init.chain(regular) {
        if !names.insert(container.name.clone()) {
            problems.add(format!("{path}.name"), format!("{:?} is used twice", container.name));
        }
        validate_container(&path, container, spec, &volumes, problems);
    }
    validate_host_ports(spec, problems);
}

fn validate_names(spec: &PodSpec, problems: &mut Problems) {
    for (path, value) in [("spec.hostname", &spec.hostname), ("spec.subdomain", &spec.subdomain)] {
        if let Some(value) = value
            && !is_dns_label(value)
        {
            problems.add(path, format!("{value:?} is not a DNS label"));
        }
    }
    if let Some(hostname) = &spec.hostname_override {
        if hostname.len() > 64 || !is_dns_subdomain(hostname) {
            problems.add("spec.hostnameOverride", format!("{hostname:?} is not a DNS name of at most 64 characters"));
        }
        if spec.set_hostname_as_fqdn == Some(true) || spec.host_network == Some(true) {
            problems.add("spec.hostnameOverride", "cannot be used with setHostnameAsFQDN or hostNetwork");
        }
    }
    for (i, alias) in spec.host_aliases.iter().flatten().enumerate() {
        if alias.ip.parse::<IpAddr>().is_err() {
            problems.add(format!("spec.hostAliases[{i}].ip"), format!("{:?} is not an IP address", alias.ip));
        }
        for (j, name) in alias.hostnames.iter().flatten().enumerate() {
            if !is_dns_subdomain(name) {
                problems.add(format!("spec.hostAliases[{i}].hostnames[{j}]"), format!("{name:?} is not a DNS name"));
            }
        }
    }
    if spec.share_process_namespace == Some(true) && spec.host_pid == Some(true) {
        problems.add("spec.shareProcessNamespace", "cannot be used with hostPID");
    }
}

fn validate_dns(spec: &PodSpec, problems: &mut Problems) {
    let config = spec.dns_config.clone().unwrap_or_default();
    let servers = config.nameservers.unwrap_or_default();
    if spec.dns_policy.as_deref() == Some("None") && servers.is_empty() {
        problems.add("spec.dnsConfig.nameservers", "must hold a server when dnsPolicy is None");
    }
    if servers.len() > 3 {
        problems.add("spec.dnsConfig.nameservers", "must not hold more than 3 servers");
    }
    for (i, server) in servers.iter().enumerate() {
        if server.parse::<IpAddr>().is_err() {
            problems.add(format!("spec.dnsConfig.nameservers[{i}]"), format!("{server:?} is not an IP address"));
        }
    }
    if config.searches.is_some_and(|s| s.len() > 32) {
        problems.add("spec.dnsConfig.searches", "must not hold more than 32 domains");
    }
    for (i, option) in config.options.iter().flatten().enumerate() {
        if option.name.as_deref().is_none_or(str::is_empty) {
            problems.add(format!("spec.dnsConfig.options[{i}].name"), "is required");
        }
    }
}

fn validate_pod_security(spec: &PodSpec, allowed_unsafe_sysctls: &[String], problems: &mut Problems) {
    let Some(context) = &spec.security_context else { return };
    let base = "spec.securityContext";
    for (field, id) in [("runAsUser", context.run_as_user), ("runAsGroup", context.run_as_group), ("fsGroup", context.fs_group)] {
        validate_id(&format!("{base}.{field}"), id, problems);
    }
    for (i, group) in context.supplemental_groups.iter().flatten().enumerate() {
        validate_id(&format!("{base}.supplementalGroups[{i}]"), Some(*group), problems);
    }
    problems.one_of(
        &format!("{base}.supplementalGroupsPolicy"),
        context.supplemental_groups_policy.as_deref(),
        &["Merge", "Strict"],
    );
    problems.one_of(
        &format!("{base}.fsGroupChangePolicy"),
        context.fs_group_change_policy.as_deref(),
        &["Always", "OnRootMismatch"],
    );
    validate_seccomp(&format!("{base}.seccompProfile"), context.seccomp_profile.as_ref(), problems);
    for (i, item) in context.sysctls.iter().flatten().enumerate() {
        let path = format!("{base}.sysctls[{i}].name");
        let host_network = spec.host_network == Some(true);
        if let Err(why) = sysctl::check(&item.name, host_network, spec.host_ipc == Some(true), allowed_unsafe_sysctls) {
            problems.add(path, why);
        }
    }
}

fn validate_id(path: &str, id: Option<i64>, problems: &mut Problems) {
    if id.is_some_and(|id| !(0..=i64::from(i32::MAX)).contains(&id)) {
        problems.add(path, "must be between 0 and 2147483647");
    }
}

fn validate_seccomp(path: &str, profile: Option<&SeccompProfile>, problems: &mut Problems) {
    let Some(profile) = profile else { return };
    let type_path = format!("{path}.type");
    problems.one_of(&type_path, Some(&profile.type_), &["RuntimeDefault", "Unconfined", "Localhost"]);
    let local = profile.localhost_profile.as_deref();
    match (profile.type_.as_str(), local) {
        ("Localhost", None | Some("")) => problems.add(format!("{path}.localhostProfile"), "is required for Localhost"),
        ("Localhost", Some(name)) if name.starts_with('/') || name.split('/').any(|part| part == "..") => {
            problems.add(format!("{path}.localhostProfile"), "must be a relative path without '..'");
        }
        ("Localhost", Some(_)) | (_, None) => {}
        _ => problems.add(format!("{path}.localhostProfile"), "may be set only for type Localhost"),
    }
}

fn validate_volumes<'a>(spec: &'a PodSpec, problems: &mut Problems) -> BTreeSet<&'a str> {
    let mut names = BTreeSet::new();
    for (i, volume) in spec.volumes.iter().flatten().enumerate() {
        let path = format!("spec.volumes[{i}]");
        if !is_dns_label(&volume.name) {
            problems.add(format!("{path}.name"), format!("{:?} is not a DNS label", volume.name));
        }
        if !names.insert(volume.name.as_str()) {
            problems.add(format!("{path}.name"), format!("{:?} is used twice", volume.name));
        }
        validate_volume(&path, volume, problems);
    }
    names
}

fn validate_volume(path: &str, volume: &Volume, problems: &mut Problems) {
    if volume.empty_dir.is_some() && volume.host_path.is_some() {
        problems.add(path, "may not specify more than one volume type");
    }
    if let Some(empty_dir) = &volume.empty_dir {
        problems.one_of(&format!("{path}.emptyDir.medium"), empty_dir.medium.as_deref(), &["", "Memory"]);
        if let Some(limit) = &empty_dir.size_limit {
            validate_amount(&format!("{path}.emptyDir.sizeLimit"), &limit.0, problems);
        }
    }
    if let Some(host_path) = &volume.host_path {
        let path = format!("{path}.hostPath");
        if !host_path.path.starts_with('/') {
            problems.add(format!("{path}.path"), "must be an absolute path");
        }
        if host_path.path.split('/').any(|part| part == "..") {
            problems.add(format!("{path}.path"), "must not contain '..'");
        }
        let types = ["", "DirectoryOrCreate", "Directory", "FileOrCreate", "File", "Socket", "CharDevice", "BlockDevice"];
        problems.one_of(&format!("{path}.type"), host_path.type_.as_deref(), &types);
    }
}

fn validate_amount(path: &str, text: &str, problems: &mut Problems) -> Amount {
    match Amount::parse(text) {
        Ok(amount) if amount.is_negative() => problems.add(path, "must not be negative"),
        Ok(amount) => return amount,
        Err(e) => problems.add(path, e.to_string()),
    }
    Amount::default()
}

fn validate_container(path: &str, container: &Container, spec: &PodSpec, volumes: &BTreeSet<&str>, problems: &mut Problems) {
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
    if container.restart_policy.is_some() {
        problems.one_of(&format!("{path}.restartPolicy"), container.restart_policy.as_deref(), &["Always"]);
    }
    for (i, env) in container.env.iter().flatten().enumerate() {
        if env.name.is_empty() || env.name.contains('=') || env.name.chars().any(|c| !(' '..='~').contains(&c)) {
            problems.add(format!("{path}.env[{i}].name"), format!("{:?} is not an environment variable name", env.name));
        }
        if let Some(field) = env.value_from.as_ref().and_then(|v| v.field_ref.as_ref())
            && !crate::env::is_env_field(&field.field_path)
        {
            let message = format!("{:?} is not a field that an environment variable can take", field.field_path);
            problems.add(format!("{path}.env[{i}].valueFrom.fieldRef.fieldPath"), message);
        }
        let value = env.value.as_deref().unwrap_or_default();
        if env.value_from.is_some() && !value.is_empty() {
            problems.add(format!("{path}.env[{i}]"), "may not have both value and valueFrom");
        }
    }
    validate_ports(path, container.ports.as_deref().unwrap_or_default(), spec, problems);
    validate_resources(&format!("{path}.resources"), container.resources.as_ref(), problems);
    validate_mounts(path, container, volumes, problems);
    validate_container_security(path, container, problems);
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

fn validate_probe(path: &str, probe: &Probe, once: bool, problems: &mut Problems) {
    let handlers = [probe.exec.is_some(), probe.http_get.is_some(), probe.tcp_socket.is_some()];
    if handlers.iter().filter(|set| **set).count() != 1 {
        problems.add(path, "must have one of exec, httpGet and tcpSocket");
    }
    if probe.exec.as_ref().is_some_and(|e| e.command.as_ref().is_none_or(Vec::is_empty)) {
        problems.add(format!("{path}.exec.command"), "is required");
    }
    if let Some(get) = &probe.http_get {
        let scheme = get.scheme.as_deref();
        problems.one_of(&format!("{path}.httpGet.scheme"), scheme, &["HTTP", "HTTPS"]);
        if scheme == Some("HTTPS") {
            problems.add(format!("{path}.httpGet.scheme"), "HTTPS is not supported by berth yet");
        }
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
            let letters = name.chars().any(|c| c.is_ascii_lowercase());
            if name.len() > 15 || !is_dns_label(name) || !letters || name.contains("--") {
                problems.add(format!("{path}.name"), format!("{name:?} is not a port name (at most 15 characters)"));
            }
            if !names.insert(name) {
                problems.add(format!("{path}.name"), format!("{name:?} is used twice"));
            }
        }
    }
}

fn validate_host_ports(spec: &PodSpec, problems: &mut Problems) {
    let mut taken = BTreeSet::new();
    for (c, container) in spec.containers.iter().enumerate() {
        for (i, port) in container.ports.iter().flatten().enumerate() {
            let Some(host_port) = port.host_port.filter(|p| *p != 0) else { continue };
            let key = (host_port, port.protocol.clone(), port.host_ip.clone().unwrap_or_default());
            if !taken.insert(key) {
                let path = format!("spec.containers[{c}].ports[{i}].hostPort");
                problems.add(path, format!("{host_port} is used twice"));
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
            if !known {
                problems.add(path, "extended resources are not supported by berth yet");
            } else if name == "ephemeral-storage" && kind == "limits" {
                problems.add(path, "limits of ephemeral storage are not supported by berth yet");
            }
        }
    }
    for (name, limit) in &limits {
        if let Some(request) = requests.get(name) {
            let (request_amount, limit_amount) = (Amount::of(request), Amount::of(limit));
            let huge = name.starts_with("hugepages-");
            if request_amount > limit_amount || huge && request_amount != limit_amount {
                let relation = if huge { "equal" } else { "not exceed" };
                let message = format!("{} must {relation} the limit of {}", request.0, limit.0);
                problems.add(format!("{path}.requests.{name}"), message);
            }
        }
    }
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

fn validate_container_security(path: &str, container: &Container, problems: &mut Problems) {
    let Some(context) = &container.security_context else { return };
    let base = format!("{path}.securityContext");
    validate_id(&format!("{base}.runAsUser"), context.run_as_user, problems);
    validate_id(&format!("{base}.runAsGroup"), context.run_as_group, problems);
    problems.one_of(&format!("{base}.procMount"), context.proc_mount.as_deref(), &["Default", "Unmasked"]);
    if context.proc_mount.as_deref() == Some("Unmasked") {
        problems.add(format!("{base}.procMount"), "Unmasked needs hostUsers: false, which berth does not support yet");
    }
    validate_seccomp(&format!("{base}.seccompProfile"), context.seccomp_profile.as_ref(), problems);
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

/// Lower-case letters, digits and '-', at most 63, beginning and ending with a letter or digit.
pub fn is_dns_label(text: &str) -> bool {
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    text.len() <= 63
        && edge(text.chars().next())
        && edge(text.chars().last())
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
}

/// DNS labels joined by dots, at most 253 characters.
pub fn is_dns_subdomain(text: &str) -> bool {
    let long_label = |label: &str| {
        let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        edge(label.chars().next())
            && edge(label.chars().last())
            && label.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
    };
    text.len() <= 253 && text.split('.').all(long_label)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{defaults::apply_defaults, parse::parse_manifest};

    fn problems(spec: &str) -> Vec<(String, String)> {
        let text = format!("{{apiVersion: v1, kind: Pod, metadata: {{name: a}}, spec: {spec}}}");
        let mut pod = parse_manifest(&text).unwrap().pods.remove(0).pod;
        apply_defaults(&mut pod);
        validate_pod(&pod, &[]).into_iter().map(|i| (i.path, i.message)).collect()
    }

    #[test]
    fn a_good_pod_has_no_problems() {
        let spec = "{hostNetwork: true, volumes: [{name: v}, {name: h, hostPath: {path: /x, type: File}}], \
            initContainers: [{name: i, image: i}], containers: [{name: c, image: i, ports: [{containerPort: 80, name: http}], \
            resources: {limits: {cpu: 1, memory: 1Gi, hugepages-2Mi: 4Mi}}, volumeMounts: [{name: v, mountPath: /v}], \
            securityContext: {seccompProfile: {type: RuntimeDefault}, privileged: true}}], \
            securityContext: {sysctls: [{name: kernel.shm_rmid_forced, value: '1'}]}}";
        assert_eq!(problems(spec), []);
    }

    #[test]
    fn each_rule_names_its_field() {
        let container = |extra: &str| format!("{{containers: [{{name: c, image: i, {extra}}}]}}");
        let cases = [
            ("{containers: []}".to_owned(), "spec.containers"),
            ("{containers: [{name: C_x, image: i}]}".to_owned(), "spec.containers[0].name"),
            ("{containers: [{name: c, image: ' i'}]}".to_owned(), "spec.containers[0].image"),
            ("{containers: [{name: c}]}".to_owned(), "spec.containers[0].image"),
            ("{containers: [{name: c, image: i}, {name: c, image: i}]}".to_owned(), "spec.containers[1].name"),
            ("{restartPolicy: Sometimes, containers: [{name: c, image: i}]}".to_owned(), "spec.restartPolicy"),
            ("{dnsPolicy: None, containers: [{name: c, image: i}]}".to_owned(), "spec.dnsConfig.nameservers"),
            ("{hostUsers: false, containers: [{name: c, image: i}]}".to_owned(), "spec.hostUsers"),
            ("{hostname: A.b, containers: [{name: c, image: i}]}".to_owned(), "spec.hostname"),
            (container("volumeMounts: [{name: absent, mountPath: /x}]"), "spec.containers[0].volumeMounts[0].name"),
            (container("livenessProbe: {periodSeconds: 1}"), "spec.containers[0].livenessProbe"),
            (
                container("livenessProbe: {tcpSocket: {port: 1}, successThreshold: 2}"),
                "spec.containers[0].livenessProbe.successThreshold",
            ),
            (container("startupProbe: {httpGet: {port: 1, scheme: HTTPS}}"), "spec.containers[0].startupProbe.httpGet.scheme"),
            (container("env: [{name: 'A=B', value: x}]"), "spec.containers[0].env[0].name"),
            (
                container("env: [{name: A, valueFrom: {fieldRef: {fieldPath: spec.containers}}}]"),
                "spec.containers[0].env[0].valueFrom.fieldRef.fieldPath",
            ),
            (container("ports: [{containerPort: 70000}]"), "spec.containers[0].ports[0].containerPort"),
            (
                container("ports: [{containerPort: 1, hostPort: 5}, {containerPort: 2, hostPort: 5}]"),
                "spec.containers[0].ports[1].hostPort",
            ),
            (container("resources: {limits: {cpu: 1}, requests: {cpu: 2}}"), "spec.containers[0].resources.requests.cpu"),
            (container("resources: {limits: {cpu: one}}"), "spec.containers[0].resources.limits.cpu"),
            (container("resources: {limits: {nvidia.com/gpu: 1}}"), "spec.containers[0].resources.limits.nvidia.com/gpu"),
            (container("securityContext: {runAsUser: -1}"), "spec.containers[0].securityContext.runAsUser"),
            (
                container("securityContext: {privileged: true, allowPrivilegeEscalation: false}"),
                "spec.containers[0].securityContext.allowPrivilegeEscalation",
            ),
            (
                container("securityContext: {seccompProfile: {type: Localhost}}"),
                "spec.containers[0].securityContext.seccompProfile.localhostProfile",
            ),
            (
                "{volumes: [{name: v, hostPath: {path: ../x}}], containers: [{name: c, image: i}]}".to_owned(),
                "spec.volumes[0].hostPath.path",
            ),
            (
                "{volumes: [{name: v, emptyDir: {medium: HugePages}}], containers: [{name: c, image: i}]}".to_owned(),
                "spec.volumes[0].emptyDir.medium",
            ),
            (
                "{securityContext: {sysctls: [{name: vm.swappiness, value: '1'}]}, containers: [{name: c, image: i}]}".to_owned(),
                "spec.securityContext.sysctls[0].name",
            ),
        ];
        for (spec, field) in cases {
            let found = problems(&spec);
            assert!(found.iter().any(|(path, _)| path == field), "{spec}\nwanted {field}, got {found:?}");
        }
    }

    #[test]
    fn a_pod_without_a_name_or_with_a_bad_one_is_refused() {
        for (name, ok) in [("web", true), ("web.example-1", true), ("Web", false), ("", false), ("-a", false)] {
            let mut pod = Pod::default();
            pod.metadata.name = Some(name.to_owned());
            apply_defaults(&mut pod);
            let bad = validate_pod(&pod, &[]).iter().any(|i| i.path == "metadata.name");
            assert_eq!(bad, !ok, "{name:?}");
        }
    }
}
