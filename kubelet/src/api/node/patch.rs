//! Pure: what is sent of a status, and whether. A strategic merge patch of what differs; times of heartbeats alone are no difference.

use k8s_openapi::api::core::v1::{Node, NodeStatus};
use serde_json::{Map, Value, json};

use super::conditions::OURS;
use super::object::{ATTACH_DETACH, PROVIDED_IP, is_extended};
use crate::quantity::Amount;

/// The patch of the object's status, if it is to be sent: something differs, or the time for a whole report has come (`due`).
pub fn plan_patch(wanted: &NodeStatus, observed: &NodeStatus, due: bool) -> Option<Value> {
    if !due && !differs(wanted, observed) {
        return None;
    }
    let (before, after) = (value(observed), value(wanted));
    let mut changes = difference("status", &before, &after).unwrap_or_default();
    // Merged by type: those of others stay. All of ours, since a report is their heartbeat.
    let ours = |condition: &&Value| OURS.iter().any(|ours| condition["type"] == *ours);
    let conditions: Vec<Value> = after["conditions"].as_array().into_iter().flatten().filter(ours).cloned().collect();
    changes.insert("conditions".to_owned(), Value::Array(conditions));
    Some(json!({ "status": changes }))
}

/// Whether anything but the times of heartbeats differs.
pub fn differs(wanted: &NodeStatus, observed: &NodeStatus) -> bool {
    let quiet = |status: &NodeStatus| {
        let mut status = status.clone();
        for condition in status.conditions.iter_mut().flatten() {
            condition.last_heartbeat_time = None;
        }
        value(&status)
    };
    difference("status", &quiet(observed), &quiet(wanted)).is_some()
}

fn value(status: &NodeStatus) -> Value {
    serde_json::to_value(status).unwrap_or_default()
}

/// What turns one object into another: maps by key, with null for what goes, lists as a whole. `None`: they are the same.
fn difference(name: &str, before: &Value, after: &Value) -> Option<Map<String, Value>> {
    let none = Map::new();
    let (before, after) = (before.as_object().unwrap_or(&none), after.as_object().unwrap_or(&none));
    let mut changes = Map::new();
    for (key, value) in after {
        let was = before.get(key).unwrap_or(&Value::Null);
        let change = match value {
            same if same == was => continue,
            // The API server writes quantities its own way.
            Value::String(text) if matches!(name, "capacity" | "allocatable") && is_amount(was, text) => continue,
            Value::Object(_) => match difference(key, was, value) {
                Some(changes) => Value::Object(changes),
                None => continue,
            },
            // Merged by type, addresses of a type that has several would stay: the whole list is replaced.
            Value::Array(items) if key == "addresses" => {
                let replace = std::iter::once(json!({"$patch": "replace"}));
                Value::Array(replace.chain(items.iter().cloned()).collect())
            }
            other => other.clone(),
        };
        changes.insert(key.clone(), change);
    }
    for key in before.keys().filter(|key| !after.contains_key(*key)) {
        changes.insert(key.clone(), Value::Null);
    }
    (!changes.is_empty()).then_some(changes)
}

fn is_amount(value: &Value, text: &str) -> bool {
    let amount = |text: &str| Amount::parse(text).ok();
    value.as_str().is_some_and(|value| amount(value).is_some() && amount(value) == amount(text))
}

/// Labels that an existing object gets anew when they differ, as the upstream; others of the command line are left alone.
const KEPT_LABELS: [&str; 11] = [
    "kubernetes.io/hostname",
    "kubernetes.io/os",
    "beta.kubernetes.io/os",
    "kubernetes.io/arch",
    "beta.kubernetes.io/arch",
    "topology.kubernetes.io/zone",
    "topology.kubernetes.io/region",
    "failure-domain.beta.kubernetes.io/zone",
    "failure-domain.beta.kubernetes.io/region",
    "node.kubernetes.io/instance-type",
    "beta.kubernetes.io/instance-type",
];

/// What an object that was there before us lacks of a `wanted` one. `fresh`: the machine has never had device plugins, so that no pod may
/// count on devices before they are there.
pub fn reconcile(wanted: &Node, existing: &Node, fresh: bool) -> Option<Value> {
    let (mut labels, mut annotations, mut status) = (Map::new(), Map::new(), Map::new());
    let is = |node: &Node, key: &str| node.metadata.labels.as_ref().and_then(|labels| labels.get(key)).cloned();
    for key in KEPT_LABELS {
        if let Some(value) = is(wanted, key)
            && is(existing, key).as_ref() != Some(&value)
        {
            labels.insert(key.to_owned(), value.into());
        }
    }
    let note = |node: &Node, key: &str| node.metadata.annotations.as_ref().and_then(|list| list.get(key)).cloned();
    for key in [ATTACH_DETACH, PROVIDED_IP] {
        if note(wanted, key) != note(existing, key) {
            annotations.insert(key.to_owned(), note(wanted, key).map_or(Value::Null, Value::String));
        }
    }
    let capacity = existing.status.as_ref().and_then(|status| status.capacity.as_ref());
    let devices: Map<String, Value> = capacity
        .into_iter()
        .flatten()
        .filter(|(name, quantity)| fresh && is_extended(name) && !Amount::of(quantity).is_zero())
        .map(|(name, _)| (name.clone(), "0".into()))
        .collect();
    if !devices.is_empty() {
        status.insert("capacity".to_owned(), Value::Object(devices.clone()));
        status.insert("allocatable".to_owned(), Value::Object(devices));
    }
    let mut patch = Map::new();
    let mut metadata = Map::new();
    for (key, map) in [("labels", labels), ("annotations", annotations)] {
        if !map.is_empty() {
            metadata.insert(key.to_owned(), Value::Object(map));
        }
    }
    for (key, map) in [("metadata", metadata), ("status", status)] {
        if !map.is_empty() {
            patch.insert(key.to_owned(), Value::Object(map));
        }
    }
    (!patch.is_empty()).then_some(Value::Object(patch))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(text: &str) -> NodeStatus {
        serde_json::from_str(text).unwrap()
    }

    fn node(text: &str) -> Node {
        serde_json::from_str(text).unwrap()
    }

    const READY: &str = r#"{"type":"Ready","status":"True","lastHeartbeatTime":"2020-01-01T00:00:00Z"}"#;
    const LATER: &str = r#"{"type":"Ready","status":"True","lastHeartbeatTime":"2020-01-01T00:00:10Z"}"#;

    #[test]
    fn a_heartbeat_alone_is_sent_only_when_its_time_has_come() {
        let observed = status(&format!(r#"{{"conditions":[{READY}]}}"#));
        let wanted = status(&format!(r#"{{"conditions":[{LATER}]}}"#));
        assert_eq!(plan_patch(&wanted, &observed, false), None);
        let patch = plan_patch(&wanted, &observed, true).unwrap();
        assert_eq!(patch["status"]["conditions"][0]["lastHeartbeatTime"], "2020-01-01T00:00:10Z");
    }

    #[test]
    fn a_patch_has_what_differs_and_our_conditions() {
        let other = r#"{"type":"KernelDeadlock","status":"False"}"#;
        let observed = status(&format!(
            r#"{{"capacity":{{"cpu":"2","memory":"16384Ki","gone.example/x":"1"}},"conditions":[{other},{READY}],"images":[{{"sizeBytes":1}}]}}"#
        ));
        let wanted = status(&format!(
            r#"{{"capacity":{{"cpu":"4","memory":"16Mi"}},"conditions":[{other},{LATER}],"images":[{{"sizeBytes":1}}]}}"#
        ));
        let patch = plan_patch(&wanted, &observed, false).unwrap();
        assert_eq!(patch["status"]["capacity"], json!({"cpu": "4", "gone.example/x": null}));
        assert_eq!(patch["status"]["conditions"].as_array().unwrap().len(), 1, "those of others are not repeated");
        assert_eq!(patch["status"].get("images"), None);
    }

    #[test]
    fn addresses_are_replaced_as_a_whole() {
        let observed = status(r#"{"addresses":[{"type":"InternalIP","address":"192.0.2.1"}]}"#);
        let wanted = status(r#"{"addresses":[{"type":"InternalIP","address":"192.0.2.2"}]}"#);
        let patch = plan_patch(&wanted, &observed, false).unwrap();
        let list = &patch["status"]["addresses"];
        assert_eq!((&list[0]["$patch"], &list[1]["address"]), (&json!("replace"), &json!("192.0.2.2")));
    }

    #[test]
    fn the_same_quantity_in_other_words_is_no_difference() {
        let observed = status(r#"{"capacity":{"memory":"16777216"},"allocatable":{"cpu":"1.9"}}"#);
        assert!(!differs(&status(r#"{"capacity":{"memory":"16Mi"},"allocatable":{"cpu":"1900m"}}"#), &observed));
        assert!(differs(&status(r#"{"capacity":{"memory":"17Mi"},"allocatable":{"cpu":"1900m"}}"#), &observed));
    }

    #[test]
    fn an_existing_object_gets_what_it_lacks_and_keeps_the_rest() {
        let wanted = node(
            r#"{"metadata":{"labels":{"kubernetes.io/hostname":"n","disk":"ssd"},
                "annotations":{"volumes.kubernetes.io/controller-managed-attach-detach":"true"}}}"#,
        );
        let existing = node(
            r#"{"metadata":{"labels":{"kubernetes.io/hostname":"old","disk":"hdd"},"annotations":{"alpha.kubernetes.io/provided-node-ip":"1.2.3.4"}},
                "status":{"capacity":{"cpu":"2","a.example/gpu":"4","b.example/none":"0"}}}"#,
        );
        let patch = reconcile(&wanted, &existing, true).unwrap();
        assert_eq!(patch["metadata"]["labels"], json!({"kubernetes.io/hostname": "n"}));
        assert_eq!(patch["metadata"]["annotations"]["alpha.kubernetes.io/provided-node-ip"], Value::Null);
        assert_eq!(patch["status"]["capacity"], json!({"a.example/gpu": "0"}));
        assert_eq!(reconcile(&wanted, &existing, false).unwrap().get("status"), None, "plugins of before will come again");
        assert_eq!(reconcile(&wanted, &wanted, true), None);
    }
}
