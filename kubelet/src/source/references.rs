//! Which objects a pod refers to by name, and where in it. Pure; looks nothing up.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;

use crate::objects::ObjectName;
use crate::pod;

/// One name in a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// The field that holds it, `spec.volumes[0].configMap.name`.
    pub path: String,
    /// What it names.
    pub object: ObjectName,
    /// The key of it that is asked for, where one is.
    pub key: Option<String>,
    /// Whether a container waits for it: pulls do without a secret, and who says `optional` without an object.
    pub needed: bool,
}

/// Priority classes that every cluster has.
const BUILT_IN_CLASSES: [&str; 2] = ["system-node-critical", "system-cluster-critical"];

/// Every reference of a pod, in the order of its fields.
pub fn references(pod: &Pod) -> Vec<Reference> {
    let mut found = Vec::new();
    let spec = pod.spec.as_ref().and_then(|spec| serde_json::to_value(spec).ok()).unwrap_or_default();
    let namespace = pod::namespace(pod);
    walk(&spec, "spec", namespace, &mut found);
    // Volumes that no container mounts are not made, so nothing waits for what they name.
    let mounts = pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten().chain(&spec.containers));
    let mounted: BTreeSet<&str> =
        mounts.flat_map(|c| c.volume_mounts.iter().flatten().map(|mount| mount.name.as_str())).collect();
    for (i, volume) in pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()).enumerate() {
        let prefix = format!("spec.volumes[{i}].");
        let unused = !mounted.contains(volume.name.as_str());
        found.iter_mut().filter(|r| unused && r.path.starts_with(&prefix)).for_each(|r| r.needed = false);
    }
    let text = |key: &str| spec.get(key).and_then(Value::as_str).filter(|name| !name.is_empty()).map(str::to_owned);
    let mut class = |key: &str, kind: &'static str, name: String| {
        let object = ObjectName { kind, namespace: String::new(), name };
        found.push(Reference { path: format!("spec.{key}"), object, key: None, needed: true });
    };
    if let Some(name) = text("runtimeClassName") {
        class("runtimeClassName", "RuntimeClass", name);
    }
    if let Some(name) = text("priorityClassName").filter(|name| !BUILT_IN_CLASSES.contains(&name.as_str())) {
        class("priorityClassName", "PriorityClass", name);
    }
    found
}

/// The fields that hold a reference: the field, the key of the name in it, the kind.
const HOLDERS: [(&str, &str, &str); 8] = [
    ("configMapRef", "name", "ConfigMap"),
    ("configMapKeyRef", "name", "ConfigMap"),
    ("configMap", "name", "ConfigMap"),
    ("secretRef", "name", "Secret"),
    ("secretKeyRef", "name", "Secret"),
    ("secret", "secretName", "Secret"),
    ("secret", "name", "Secret"),
    ("persistentVolumeClaim", "claimName", "PersistentVolumeClaim"),
];

fn walk(value: &Value, path: &str, namespace: &str, found: &mut Vec<Reference>) {
    match value {
        Value::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                let below = format!("{path}[{i}]");
                // The one list whose items are references themselves.
                if path == "spec.imagePullSecrets"
                    && let Some(name) = item.get("name").and_then(Value::as_str)
                {
                    let object = ObjectName { kind: "Secret", namespace: namespace.to_owned(), name: name.to_owned() };
                    found.push(Reference { path: format!("{below}.name"), object, key: None, needed: false });
                }
                walk(item, &below, namespace, found);
            }
        }
        Value::Object(map) => {
            for (key, value) in map {
                let below = format!("{path}.{key}");
                for (_, name_key, kind) in HOLDERS.iter().filter(|(holder, _, _)| holder == key) {
                    let Some(name) = value.get(name_key).and_then(Value::as_str).filter(|name| !name.is_empty()) else {
                        continue;
                    };
                    let object = ObjectName { kind, namespace: namespace.to_owned(), name: name.to_owned() };
                    let needed = value.get("optional") != Some(&Value::Bool(true));
                    let key = value.get("key").and_then(Value::as_str).map(str::to_owned);
                    found.push(Reference { path: format!("{below}.{name_key}"), object, key, needed });
                }
                walk(value, &below, namespace, found);
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::parse::parse_manifest;

    #[test]
    fn every_kind_of_reference_is_found_with_its_field() {
        let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: ns}\nspec:\n  runtimeClassName: r\n  priorityClassName: p\n\
            \x20 imagePullSecrets: [{name: pull}]\n\
            \x20 containers:\n  - name: c\n    image: i\n    envFrom: [{configMapRef: {name: m1, optional: true}}, {secretRef: {name: s1}}]\n\
            \x20   env: [{name: A, valueFrom: {configMapKeyRef: {name: m2, key: k}}}]\n    volumeMounts: [{name: v, mountPath: /v}]\n\
            \x20 volumes: [{name: v, secret: {secretName: s2}}, {name: w, projected: {sources: [{secret: {name: s3}}, {configMap: {name: m3}}]}}]\n";
        let pod = parse_manifest(text).unwrap().pods.remove(0).pod;
        let found: Vec<String> = references(&pod)
            .iter()
            .map(|r| {
                format!(
                    "{} {}{} {}",
                    r.path,
                    r.object,
                    r.key.as_deref().unwrap_or_default(),
                    if r.needed { "needed" } else { "-" }
                )
            })
            .collect();
        let mut sorted = found.clone();
        sorted.sort();
        assert_eq!(
            sorted,
            [
                "spec.containers[0].envFrom[0].configMapRef.name ConfigMap ns/m1 -",
                "spec.containers[0].envFrom[1].secretRef.name Secret ns/s1 needed",
                "spec.containers[0].env[0].valueFrom.configMapKeyRef.name ConfigMap ns/m2k needed",
                "spec.imagePullSecrets[0].name Secret ns/pull -",
                "spec.priorityClassName PriorityClass p needed",
                "spec.runtimeClassName RuntimeClass r needed",
                "spec.volumes[0].secret.secretName Secret ns/s2 needed",
                "spec.volumes[1].projected.sources[0].secret.name Secret ns/s3 -",
                "spec.volumes[1].projected.sources[1].configMap.name ConfigMap ns/m3 -",
            ]
        );
    }
}
