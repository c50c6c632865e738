//! The defaults that the API server gives to a pod on create. Idempotent; validates nothing.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Container, DownwardAPIVolumeFile, EmptyDirVolumeSource, Pod, PodSecurityContext, PodSpec, Probe, ResourceRequirements, Volume,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::image_name;
use crate::volume::payload::DEFAULT_MODE;

/// Fills in what was left out.
pub fn apply_defaults(pod: &mut Pod) {
    default_metadata(&mut pod.metadata);
    let Some(spec) = &mut pod.spec else { return };
    default(&mut spec.restart_policy, "Always");
    default(&mut spec.dns_policy, "ClusterFirst");
    default(&mut spec.scheduler_name, "default-scheduler");
    spec.termination_grace_period_seconds.get_or_insert(30);
    spec.enable_service_links.get_or_insert(true);
    // The old name of the field and the new one stand for each other.
    let account = spec.service_account_name.clone().or_else(|| spec.service_account.clone()).filter(|name| !name.is_empty());
    (spec.service_account_name, spec.service_account) = (account.clone(), account);
    spec.security_context.get_or_insert_with(PodSecurityContext::default);
    let host_network = spec.host_network == Some(true);
    default_containers(spec, host_network);
    for volume in spec.volumes.iter_mut().flatten() {
        default_volume(volume);
    }
}

fn default_metadata(metadata: &mut ObjectMeta) {
    if metadata.namespace.as_deref().is_none_or(str::is_empty) {
        metadata.namespace = Some("default".to_owned());
    }
    metadata.creation_timestamp = None;
}

fn default(field: &mut Option<String>, value: &str) {
    if field.as_deref().is_none_or(str::is_empty) {
        *field = Some(value.to_owned());
    }
}

fn default_containers(spec: &mut PodSpec, host_network: bool) {
    for container in spec.init_containers.iter_mut().flatten().chain(&mut spec.containers) {
        default_container(container, host_network);
    }
}

fn default_container(container: &mut Container, host_network: bool) {
    default(&mut container.termination_message_path, "/dev/termination-log");
    default(&mut container.termination_message_policy, "File");
    let image = container.image.clone().unwrap_or_default();
    default(&mut container.image_pull_policy, image_name::default_pull_policy(&image));
    for port in container.ports.iter_mut().flatten() {
        default(&mut port.protocol, "TCP");
        if host_network && port.host_port.unwrap_or(0) == 0 {
            port.host_port = Some(port.container_port);
        }
    }
    for env in container.env.iter_mut().flatten() {
        if let Some(field) = env.value_from.as_mut().and_then(|v| v.field_ref.as_mut()) {
            default(&mut field.api_version, "v1");
        }
    }
    let probes = [&mut container.liveness_probe, &mut container.readiness_probe, &mut container.startup_probe];
    probes.into_iter().flatten().for_each(default_probe);
    let hooks = container.lifecycle.as_mut().map(|l| [&mut l.post_start, &mut l.pre_stop]);
    for get in hooks.into_iter().flatten().flatten().filter_map(|hook| hook.http_get.as_mut()) {
        default(&mut get.path, "/");
        default(&mut get.scheme, "HTTP");
    }
    if let Some(context) = &mut container.security_context {
        default(&mut context.proc_mount, "Default");
    }
    requests_from_limits(container.resources.get_or_insert_with(ResourceRequirements::default));
}

/// A limit without a request is a request too.
fn requests_from_limits(resources: &mut ResourceRequirements) {
    let limits = resources.limits.clone().unwrap_or_default();
    if limits.is_empty() {
        return;
    }
    let requests = resources.requests.get_or_insert_with(BTreeMap::new);
    for (name, limit) in limits {
        requests.entry(name).or_insert(limit);
    }
}

fn default_probe(probe: &mut Probe) {
    let fill = |field: &mut Option<i32>, value: i32| {
        if field.unwrap_or(0) == 0 {
            *field = Some(value);
        }
    };
    fill(&mut probe.timeout_seconds, 1);
    fill(&mut probe.period_seconds, 10);
    fill(&mut probe.success_threshold, 1);
    fill(&mut probe.failure_threshold, 3);
    if let Some(http) = &mut probe.http_get {
        default(&mut http.path, "/");
        default(&mut http.scheme, "HTTP");
    }
    if let Some(grpc) = &mut probe.grpc {
        grpc.service.get_or_insert_with(String::new);
    }
}

fn default_volume(volume: &mut Volume) {
    let without_source = Volume { name: volume.name.clone(), ..Volume::default() } == *volume;
    if without_source {
        volume.empty_dir = Some(EmptyDirVolumeSource::default());
    }
    let mode = |mode: &mut Option<i32>| _ = mode.get_or_insert(DEFAULT_MODE);
    let fields = |items: &mut Option<Vec<DownwardAPIVolumeFile>>| {
        for field in items.iter_mut().flatten().filter_map(|item| item.field_ref.as_mut()) {
            default(&mut field.api_version, "v1");
        }
    };
    if let Some(image) = &mut volume.image {
        let reference = image.reference.clone().unwrap_or_default();
        default(&mut image.pull_policy, image_name::default_pull_policy(&reference));
    }
    if let Some(source) = &mut volume.config_map {
        mode(&mut source.default_mode);
    }
    if let Some(source) = &mut volume.secret {
        mode(&mut source.default_mode);
    }
    if let Some(source) = &mut volume.downward_api {
        mode(&mut source.default_mode);
        fields(&mut source.items);
    }
    if let Some(source) = &mut volume.projected {
        mode(&mut source.default_mode);
        for part in source.sources.iter_mut().flatten().filter_map(|part| part.downward_api.as_mut()) {
            fields(&mut part.items);
        }
    }
    if let Some(host_path) = &mut volume.host_path {
        host_path.type_.get_or_insert_with(String::new);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::parse::parse_manifest;

    fn defaulted(text: &str) -> Pod {
        let mut pod = parse_manifest(text).unwrap().pods.remove(0).pod;
        apply_defaults(&mut pod);
        let once = pod.clone();
        apply_defaults(&mut pod);
        assert_eq!(pod, once, "defaults are idempotent");
        pod
    }

    #[test]
    fn a_bare_pod_gets_the_defaults_of_the_api_server() {
        let pod = defaulted(
            "{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: {containers: [{name: c, image: i}], volumes: [{name: v}, {name: h, hostPath: {path: /x}}]}}",
        );
        let spec = pod.spec.unwrap();
        assert_eq!(pod.metadata.namespace.as_deref(), Some("default"));
        assert_eq!(spec.restart_policy.as_deref(), Some("Always"));
        assert_eq!(spec.dns_policy.as_deref(), Some("ClusterFirst"));
        assert_eq!(spec.termination_grace_period_seconds, Some(30));
        assert_eq!(spec.enable_service_links, Some(true));
        let c = &spec.containers[0];
        assert_eq!(c.image_pull_policy.as_deref(), Some("Always"));
        assert_eq!(c.termination_message_path.as_deref(), Some("/dev/termination-log"));
        assert_eq!(c.termination_message_policy.as_deref(), Some("File"));
        let volumes = spec.volumes.unwrap();
        assert!(volumes[0].empty_dir.is_some());
        assert_eq!(volumes[1].host_path.as_ref().unwrap().type_.as_deref(), Some(""));
        assert!(volumes[1].empty_dir.is_none());
    }

    #[test]
    fn limits_become_requests_and_host_network_ports_are_host_ports() {
        let pod = defaulted(
            "{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: {hostNetwork: true, containers: [{name: c, image: 'i:1', ports: [{containerPort: 80}], resources: {limits: {cpu: 1, memory: 1Gi}, requests: {cpu: 100m}}}]}}",
        );
        let c = &pod.spec.unwrap().containers[0];
        assert_eq!(c.image_pull_policy.as_deref(), Some("IfNotPresent"));
        let port = &c.ports.as_ref().unwrap()[0];
        assert_eq!((port.host_port, port.protocol.as_deref()), (Some(80), Some("TCP")));
        let requests = c.resources.as_ref().unwrap().requests.as_ref().unwrap();
        assert_eq!((requests["cpu"].0.as_str(), requests["memory"].0.as_str()), ("100m", "1Gi"));
    }
}
