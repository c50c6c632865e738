//! What differs between a pod of a manifest and the pod that runs under its name, field by field. Pure.

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Map, Value};

/// What a manifest would change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// No pod of this name runs.
    New,
    /// Nothing.
    None,
    /// These fields, as `path: old → new`.
    Fields(Vec<String>),
}

/// Annotations that the kubelet writes itself.
const OWN_ANNOTATIONS: &str = "kubernetes.io/config.";
/// Fields that are filled in from a PriorityClass or RuntimeClass when a pod is accepted.
const FILLED_IN: [&str; 3] = ["priority", "preemptionPolicy", "overhead"];

/// Compares a pod of a manifest with the one that runs; both are defaulted.
pub fn compare(planned: &Pod, running: Option<&Pod>) -> Change {
    let Some(running) = running else { return Change::New };
    let mut fields = Vec::new();
    let (new, mut old) = (essence(planned), essence(running));
    for field in FILLED_IN {
        if new["spec"].get(field).is_none()
            && let Some(spec) = old["spec"].as_object_mut()
        {
            spec.shift_remove(field);
        }
    }
    walk(&old, &new, "", &mut fields);
    if fields.is_empty() { Change::None } else { Change::Fields(fields) }
}

/// What a manifest can say of a pod.
fn essence(pod: &Pod) -> Value {
    let mut annotations = pod.metadata.annotations.clone().unwrap_or_default();
    annotations.retain(|key, _| !key.starts_with(OWN_ANNOTATIONS));
    let labels = pod.metadata.labels.clone().unwrap_or_default();
    let spec = serde_json::to_value(&pod.spec).unwrap_or_default();
    serde_json::json!({"metadata": {"labels": labels, "annotations": annotations}, "spec": spec})
}

fn walk(old: &Value, new: &Value, path: &str, fields: &mut Vec<String>) {
    match (old, new) {
        (Value::Object(before), Value::Object(after)) => {
            let nothing = Value::Null;
            let keys = before.keys().chain(after.keys().filter(|key| !before.contains_key(*key)));
            for key in keys {
                let below = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                walk(before.get(key).unwrap_or(&nothing), after.get(key).unwrap_or(&nothing), &below, fields);
            }
        }
        (Value::Array(before), Value::Array(after)) if before.len() == after.len() => {
            for (i, (before, after)) in before.iter().zip(after).enumerate() {
                walk(before, after, &format!("{path}[{i}]"), fields);
            }
        }
        _ if old == new || is_empty(old) && is_empty(new) => {}
        _ => fields.push(format!("{path}: {} → {}", shown(old), shown(new))),
    }
}

fn is_empty(value: &Value) -> bool {
    value.is_null() || value.as_object().is_some_and(Map::is_empty) || value.as_array().is_some_and(Vec::is_empty)
}

fn shown(value: &Value) -> String {
    if value.is_null() { "(not set)".to_owned() } else { value.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{defaults::apply_defaults, parse::parse_manifest};

    fn pod(text: &str) -> Pod {
        let mut pod = parse_manifest(text).unwrap().pods.remove(0).pod;
        apply_defaults(&mut pod);
        pod
    }

    #[test]
    fn differences_are_told_by_field() {
        let text =
            "{apiVersion: v1, kind: Pod, metadata: {name: a, labels: {l: x}}, spec: {containers: [{name: c, image: 'i:1'}]}}";
        let old = pod(text);
        assert_eq!(compare(&old, None), Change::New);
        let mut running = old.clone();
        running.metadata.annotations.get_or_insert_default().insert("kubernetes.io/config.seen".into(), "now".into());
        running.spec.as_mut().unwrap().priority = Some(0);
        assert_eq!(compare(&old, Some(&running)), Change::None);
        let new = pod(&text.replace("i:1", "i:2").replace("{l: x}", "{}"));
        let Change::Fields(fields) = compare(&new, Some(&running)) else { panic!() };
        assert_eq!(fields, ["metadata.labels.l: \"x\" → (not set)", "spec.containers[0].image: \"i:1\" → \"i:2\""]);
    }
}
