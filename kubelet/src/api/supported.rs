//! What a pod of the API server asks for that this node cannot do, by field: such a pod is rejected, nothing in it is ignored. Pure.

use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;

use crate::admission::Rejection;
use crate::pod;
use crate::source::fields::{is_supported, meaningless};
use crate::sysctl;

/// What a new version of a running pod asks for that the old one did not, and that this node cannot do: an added container's, for one.
pub(crate) fn news(before: &Pod, now: &Pod) -> Option<String> {
    let all = |pod: &Pod| -> Vec<String> { lacking(pod).into_iter().chain(added(pod)).collect() };
    let known = all(before);
    let found: Vec<String> = all(now).into_iter().filter(|path| !known.contains(path)).collect();
    (!found.is_empty()).then(|| text(&found))
}

fn lacking(pod: &Pod) -> Vec<String> {
    let mut found = Vec::new();
    walk(&serde_json::to_value(pod::spec(pod)).unwrap_or_default(), "spec", &mut found);
    found
}

/// The same of its added containers. They are judged when they come; a pod that starts again is not rejected for one.
fn added(pod: &Pod) -> Vec<String> {
    let mut found = Vec::new();
    for (i, container) in pod::spec(pod).ephemeral_containers.iter().flatten().enumerate() {
        let mut fields = serde_json::to_value(container).unwrap_or_default();
        if let Some(fields) = fields.as_object_mut() {
            fields.shift_remove("targetContainerName");
        }
        // Else they have the fields of the others.
        let mut of_container = Vec::new();
        walk(&fields, "spec.containers[0]", &mut of_container);
        let place = |path: String| path.replacen("spec.containers[0]", &format!("spec.ephemeralContainers[{i}]"), 1);
        found.extend(of_container.into_iter().map(place));
    }
    found
}

fn text(found: &[String]) -> String {
    format!("Pod requires node features that are not available: {}", found.join(", "))
}

/// What a cluster gives pods and manifests do not have. Volumes are not judged by field: one of a kind that is not there fails to be
/// mounted, by name.
const OF_CLUSTERS: [&str; 5] =
    ["spec.ephemeralContainers", "spec.schedulingGates", "spec.tolerations", "spec.volumes", "spec.workloadRef"];

/// Fields that have a value which changes nothing.
const PLAIN: [(&str, &str); 1] = [("spec.securityContext.seLinuxChangePolicy", "Recursive")];

/// Why the node does not take the pod; `None`: it can do all that the pod asks for.
pub(crate) fn refusal(pod: &Pod, allowed_unsafe_sysctls: &[String]) -> Option<Rejection> {
    let spec = pod::spec(pod);
    let sysctls = spec.security_context.iter().flat_map(|context| context.sysctls.iter().flatten());
    let (network, ipc) = (spec.host_network == Some(true), spec.host_ipc == Some(true));
    for sysctl in sysctls {
        if let Err(message) = sysctl::check(&sysctl.name, network, ipc, allowed_unsafe_sysctls) {
            return Some(Rejection::new("SysctlForbidden", message));
        }
    }
    let found = lacking(pod);
    (!found.is_empty()).then(|| Rejection::new("PodFeatureUnsupported", text(&found)))
}

fn walk(value: &Value, path: &str, found: &mut Vec<String>) {
    let plain = |(field, plain): &(&str, &str)| *field == path && value == plain;
    if OF_CLUSTERS.contains(&path) || meaningless(path).is_some() || PLAIN.iter().any(plain) {
        return;
    }
    match value {
        Value::Null => {}
        // The outermost field that nothing is known of is named, not what is in it.
        value if path != "spec" && !is_empty(value) && !is_supported(path) => found.push(path.to_owned()),
        Value::Object(fields) => fields.iter().for_each(|(key, value)| walk(value, &format!("{path}.{key}"), found)),
        Value::Array(items) => items.iter().enumerate().for_each(|(i, item)| walk(item, &format!("{path}[{i}]"), found)),
        _ => {}
    }
}

fn is_empty(value: &Value) -> bool {
    value.as_object().is_some_and(serde_json::Map::is_empty) || value.as_array().is_some_and(Vec::is_empty)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_node_cannot_do_is_refused_by_name() {
        let cases = [
            (
                "serviceAccountName: default, enableServiceLinks: true, nodeName: node, schedulerName: x, tolerations: [{operator: Exists}]",
                "",
            ),
            ("volumes: [{name: t, projected: {sources: [{serviceAccountToken: {path: token}}]}}]", ""),
            ("ephemeralContainers: [{name: e, image: i, targetContainerName: c}]", ""),
            ("affinity: {podAntiAffinity: {requiredDuringSchedulingIgnoredDuringExecution: []}}, securityContext: {}", ""),
            ("securityContext: {seLinuxChangePolicy: Recursive}", ""),
            ("resourceClaims: [{name: gpu, resourceClaimName: g}]", "spec.resourceClaims"),
            (
                "initContainers: [{name: x, image: i, volumeDevices: [{name: v, devicePath: /dev/x}]}]",
                "spec.initContainers[0].volumeDevices",
            ),
            ("securityContext: {sysctls: [{name: kernel.shm_rmid_forced, value: '1'}]}", ""),
            (
                "securityContext: {sysctls: [{name: kernel.msgmax, value: '1'}]}",
                "forbidden sysctl: \"kernel.msgmax\" not allowlisted",
            ),
        ];
        for (fields, wanted) in cases {
            let text = format!("{{metadata: {{name: a}}, spec: {{containers: [{{name: c, image: i}}], {fields}}}}}");
            let value = crate::source::yaml::parse_documents(&text).unwrap().remove(0).value;
            let pod: Pod = serde_json::from_value(value).unwrap();
            let found = refusal(&pod, &[]).map(|r| r.message).unwrap_or_default();
            let found = found.strip_prefix("Pod requires node features that are not available: ").unwrap_or(&found);
            assert_eq!(found, wanted, "{fields}");
        }
    }

    #[test]
    fn what_an_update_brings_and_the_node_cannot_do_is_named_once() {
        let pod = |fields: &str| -> Pod {
            let text = format!("{{metadata: {{name: a}}, spec: {{containers: [{{name: c, image: i}}], {fields}}}}}");
            serde_json::from_value(crate::source::yaml::parse_documents(&text).unwrap().remove(0).value).unwrap()
        };
        let plain = pod("ephemeralContainers: [{name: e, image: i, targetContainerName: c, stdin: true}]");
        let device = pod("ephemeralContainers: [{name: e, image: i, volumeDevices: [{name: v, devicePath: /dev/x}]}]");
        assert_eq!(news(&pod(""), &plain), None);
        let wanted = "Pod requires node features that are not available: spec.ephemeralContainers[0].volumeDevices";
        assert_eq!(news(&plain, &device).as_deref(), Some(wanted));
        assert_eq!(news(&device, &device), None);
    }
}
