//! What a kubelet refuses in a pod from its own sources: the API server's rules as far as they touch fields that berth
//! carries out. Pure; returns every problem with the path of its field.

mod container;
mod env;
mod volume;

use std::collections::BTreeSet;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{AppArmorProfile, Container, Pod, PodSpec, SeccompProfile};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use self::container::validate_container;
use self::volume::validate_volumes;
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

    fn required_one_of(&mut self, path: &str, value: &str, allowed: &[&str]) {
        match value {
            "" => self.add(path, "is required"),
            value => self.one_of(path, Some(value), allowed),
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
    validate_metadata(&pod.metadata, &mut problems);
    match &pod.spec {
        None => problems.add("spec", "is required"),
        Some(spec) => validate_spec(spec, allowed_unsafe_sysctls, &mut problems),
    }
    problems.0
}

/// Most that a pod's annotations may hold together: the API's limit.
const MAX_ANNOTATIONS: usize = 256 * 1024;

/// Labels and annotations, by the API's rules.
fn validate_metadata(metadata: &ObjectMeta, problems: &mut Problems) {
    const KEY: &str = "letters, digits, '-', '_' and '.', at most 63, with a letter or digit at both ends, behind a DNS subdomain and '/' \
                       where there is one";
    for (key, value) in metadata.labels.iter().flatten() {
        if !is_qualified_name(key) {
            problems.add(format!("metadata.labels.{key}"), format!("{key:?} is not the name of a label: {KEY}"));
        }
        if !value.is_empty() && !is_name_part(value) {
            let message =
                "is not a label's value: letters, digits, '-', '_' and '.', at most 63, with a letter or digit at both ends";
            problems.add(format!("metadata.labels.{key}"), format!("{value:?} {message}"));
        }
    }
    let mut size = 0;
    for (key, value) in metadata.annotations.iter().flatten() {
        size += key.len() + value.len();
        if !is_qualified_name(&key.to_lowercase()) {
            problems.add(format!("metadata.annotations.{key}"), format!("{key:?} is not the name of an annotation: {KEY}"));
        }
    }
    if size > MAX_ANNOTATIONS {
        problems.add("metadata.annotations", format!("hold {size} bytes: at most {MAX_ANNOTATIONS} are allowed"));
    }
}

/// What a label may be called: a name, behind a DNS subdomain where there is one.
pub(crate) fn is_qualified_name(text: &str) -> bool {
    match text.split_once('/') {
        Some((prefix, name)) => is_dns_subdomain(prefix) && is_name_part(name),
        None => is_name_part(text),
    }
}

fn is_name_part(text: &str) -> bool {
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    text.len() <= 63
        && edge(text.chars().next())
        && edge(text.chars().last())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
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
    let host = [("hostNetwork", spec.host_network), ("hostPID", spec.host_pid), ("hostIPC", spec.host_ipc)];
    for (name, _) in host.into_iter().filter(|(_, set)| spec.host_users == Some(false) && *set == Some(true)) {
        problems.add("spec.hostUsers", format!("cannot be false when {name} is true"));
    }
    if spec.runtime_class_name.as_deref().is_some_and(|name| !is_dns_subdomain(name)) {
        problems.add("spec.runtimeClassName", "is not a DNS subdomain");
    }
    for (i, secret) in spec.image_pull_secrets.iter().flatten().enumerate() {
        if !is_dns_subdomain(&secret.name) {
            problems.add(format!("spec.imagePullSecrets[{i}].name"), format!("{:?} is not a DNS subdomain", secret.name));
        }
    }
    validate_pod_resources(spec, problems);
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

/// Resources of the pod as a whole: only what its cgroup can hold, and enough for what its containers ask for.
fn validate_pod_resources(spec: &PodSpec, problems: &mut Problems) {
    for (name, amount) in spec.overhead.iter().flatten() {
        validate_amount(&format!("spec.overhead.{name}"), &amount.0, problems);
    }
    let Some(resources) = &spec.resources else { return };
    let lists = [("limits", &resources.limits), ("requests", &resources.requests)];
    for (list, amounts) in lists {
        for (name, amount) in amounts.iter().flatten() {
            let path = format!("spec.resources.{list}.{name}");
            if !matches!(name.as_str(), "cpu" | "memory") && !name.starts_with("hugepages-") {
                problems.add(&path, "a pod has only cpu, memory and huge pages as a whole");
            }
            validate_amount(&path, &amount.0, problems);
        }
    }
    for (name, request) in resources.requests.iter().flatten() {
        let (request, of) = (Amount::of(request), |c: &Container| crate::resources::request(c, name).unwrap_or_default());
        if spec.containers.iter().map(of).sum::<Amount>() > request {
            problems.add(format!("spec.resources.requests.{name}"), "must not be less than what the containers ask for together");
        }
        let limit = resources.limits.as_ref().and_then(|limits| limits.get(name)).map(Amount::of);
        if limit.is_some_and(|limit| request > limit) {
            problems.add(format!("spec.resources.requests.{name}"), "must not be more than the limit");
        }
    }
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
    validate_apparmor(&format!("{base}.appArmorProfile"), context.app_armor_profile.as_ref(), problems);
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

fn validate_apparmor(path: &str, profile: Option<&AppArmorProfile>, problems: &mut Problems) {
    let Some(profile) = profile else { return };
    problems.required_one_of(&format!("{path}.type"), &profile.type_, &["RuntimeDefault", "Unconfined", "Localhost"]);
    let path = format!("{path}.localhostProfile");
    match (profile.type_.as_str(), profile.localhost_profile.as_deref()) {
        ("Localhost", None | Some("")) => problems.add(path, "is required for Localhost"),
        ("Localhost", Some(name)) if name.trim() != name => {
            problems.add(path, "must not have leading or trailing whitespace");
        }
        ("Localhost", Some(_)) | (_, None) => {}
        _ => problems.add(path, "may be set only for type Localhost"),
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
            resources: {limits: {cpu: 1, memory: 1Gi, ephemeral-storage: 1Gi, hugepages-2Mi: 4Mi}}, volumeMounts: [{name: v, mountPath: /v}], \
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
            ("{hostUsers: false, hostNetwork: true, containers: [{name: c, image: i}]}".to_owned(), "spec.hostUsers"),
            ("{hostname: A.b, containers: [{name: c, image: i}]}".to_owned(), "spec.hostname"),
            (container("volumeMounts: [{name: absent, mountPath: /x}]"), "spec.containers[0].volumeMounts[0].name"),
            (container("volumeMounts: [{name: v, mountPath: 'b:c'}]"), "spec.containers[0].volumeMounts[0].mountPath"),
            (
                container("resources: {requests: {cpu: 1, hugepages-2Mi: 4Mi}}"),
                "spec.containers[0].resources.requests.hugepages-2Mi",
            ),
            (container("resources: {limits: {hugepages-2Mi: 4Mi}}"), "spec.containers[0].resources"),
            (container("livenessProbe: {periodSeconds: 1}"), "spec.containers[0].livenessProbe"),
            (
                container("livenessProbe: {tcpSocket: {port: 1}, successThreshold: 2}"),
                "spec.containers[0].livenessProbe.successThreshold",
            ),
            (container("startupProbe: {httpGet: {port: 1, scheme: GOPHER}}"), "spec.containers[0].startupProbe.httpGet.scheme"),
            (container("env: [{name: 'A=B', value: x}]"), "spec.containers[0].env[0].name"),
            (
                container("env: [{name: A, valueFrom: {fieldRef: {fieldPath: spec.containers}}}]"),
                "spec.containers[0].env[0].valueFrom.fieldRef.fieldPath",
            ),
            (
                container("env: [{name: A, valueFrom: {fileKeyRef: {volumeName: none, path: p, key: K}}}]"),
                "spec.containers[0].env[0].valueFrom.fileKeyRef.volumeName",
            ),
            (
                container("env: [{name: A, valueFrom: {resourceFieldRef: {resource: limits.memory, divisor: 1m}}}]"),
                "spec.containers[0].env[0].valueFrom.resourceFieldRef.divisor",
            ),
            (
                container("env: [{name: A, valueFrom: {resourceFieldRef: {resource: limits.gpu}}}]"),
                "spec.containers[0].env[0].valueFrom.resourceFieldRef.resource",
            ),
            (
                container("env: [{name: A, valueFrom: {fieldRef: {apiVersion: v2, fieldPath: metadata.name}}}]"),
                "spec.containers[0].env[0].valueFrom.fieldRef.apiVersion",
            ),
            (
                "{volumes: [{name: v, downwardAPI: {items: [{path: p, fieldRef: {apiVersion: v2, fieldPath: metadata.name}}]}}], \
                    containers: [{name: c, image: i}]}"
                    .to_owned(),
                "spec.volumes[0].downwardAPI.items[0].fieldRef.apiVersion",
            ),
            (container("resizePolicy: [{restartPolicy: NotRequired}]"), "spec.containers[0].resizePolicy[0].resourceName"),
            (container("resizePolicy: [{resourceName: memory}]"), "spec.containers[0].resizePolicy[0].restartPolicy"),
            (
                container("resizePolicy: [{resourceName: hugepages-2Mi, restartPolicy: NotRequired}]"),
                "spec.containers[0].resizePolicy[0].resourceName",
            ),
            (
                container("resizePolicy: [{resourceName: cpu, restartPolicy: Sometimes}]"),
                "spec.containers[0].resizePolicy[0].restartPolicy",
            ),
            (
                container(
                    "resizePolicy: [{resourceName: cpu, restartPolicy: NotRequired}, {resourceName: cpu, restartPolicy: NotRequired}]",
                ),
                "spec.containers[0].resizePolicy[1].resourceName",
            ),
            (
                container("restartPolicy: Never, resizePolicy: [{resourceName: cpu, restartPolicy: RestartContainer}]"),
                "spec.containers[0].resizePolicy[0].restartPolicy",
            ),
            (container("ports: [{containerPort: 70000}]"), "spec.containers[0].ports[0].containerPort"),
            (
                container("ports: [{containerPort: 1, hostPort: 5}, {containerPort: 2, hostPort: 5}]"),
                "spec.containers[0].ports[1].hostPort",
            ),
            (
                "{resources: {requests: {ephemeral-storage: 1}}, containers: [{name: c, image: i}]}".to_owned(),
                "spec.resources.requests.ephemeral-storage",
            ),
            (
                "{resources: {requests: {cpu: 1}}, containers: [{name: c, image: i, resources: {requests: {cpu: 2}}}]}"
                    .to_owned(),
                "spec.resources.requests.cpu",
            ),
            (container("resources: {limits: {cpu: 1}, requests: {cpu: 2}}"), "spec.containers[0].resources.requests.cpu"),
            (container("resources: {limits: {cpu: one}}"), "spec.containers[0].resources.limits.cpu"),
            (container("resources: {limits: {gpu: 1}}"), "spec.containers[0].resources.limits.gpu"),
            (container("resources: {limits: {nvidia.com/gpu: 500m}}"), "spec.containers[0].resources.limits.nvidia.com/gpu"),
            (container("resources: {requests: {nvidia.com/gpu: 1}}"), "spec.containers[0].resources.requests.nvidia.com/gpu"),
            (
                container("resources: {limits: {nvidia.com/gpu: 2}, requests: {nvidia.com/gpu: 1}}"),
                "spec.containers[0].resources.requests.nvidia.com/gpu",
            ),
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
                container("securityContext: {appArmorProfile: {localhostProfile: p}}"),
                "spec.containers[0].securityContext.appArmorProfile.type",
            ),
            (
                container("securityContext: {appArmorProfile: {type: Localhost}}"),
                "spec.containers[0].securityContext.appArmorProfile.localhostProfile",
            ),
            (
                "{securityContext: {appArmorProfile: {type: RuntimeDefault, localhostProfile: p}}, containers: [{name: c, image: i}]}"
                    .to_owned(),
                "spec.securityContext.appArmorProfile.localhostProfile",
            ),
            (
                "{volumes: [{name: v, hostPath: {path: ../x}}], containers: [{name: c, image: i}]}".to_owned(),
                "spec.volumes[0].hostPath.path",
            ),
            (
                "{volumes: [{name: v, emptyDir: {medium: Disk}}], containers: [{name: c, image: i}]}".to_owned(),
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
    fn labels_and_annotations_are_held_to_the_apis_rules() {
        let mut pod = Pod::default();
        pod.metadata.name = Some("a".to_owned());
        apply_defaults(&mut pod);
        let long = "x".repeat(64);
        for (key, value, label, annotation) in [
            ("app.kubernetes.io/Name_1", "Shop-1.x_y", true, true),
            ("empty", "", true, true),
            ("bad label!", "x", false, false),
            ("app", "x y", false, true),
            ("app", "-x", false, true),
            (long.as_str(), "x", false, false),
            ("app", long.as_str(), false, true),
            ("Upper.case/x", "x", false, true),
            ("a/b/c", "x", false, false),
            ("/x", "x", false, false),
        ] {
            let map = Some([(key.to_owned(), value.to_owned())].into());
            (pod.metadata.labels, pod.metadata.annotations) = (map.clone(), map);
            let found = validate_pod(&pod, &[]);
            let of = |field: &str| !found.iter().any(|i| i.path == format!("metadata.{field}.{key}"));
            assert_eq!((of("labels"), of("annotations")), (label, annotation), "{key:?}: {value:?}");
        }
        pod.metadata.annotations = Some([("a".to_owned(), "x".repeat(MAX_ANNOTATIONS))].into());
        assert!(validate_pod(&pod, &[]).iter().any(|i| i.path == "metadata.annotations"));
    }

    #[test]
    fn two_handlers_are_too_many_and_none_too_few() {
        let container = |extra: &str| format!("{{containers: [{{name: c, image: i, livenessProbe: {{{extra}}}}}]}}");
        for (probe, message) in [("", "must have one of"), ("exec: {command: [x]}, tcpSocket: {port: 1}", "may have only one of")]
        {
            let found = problems(&container(probe));
            assert!(found[0].1.starts_with(message), "{found:?}");
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
