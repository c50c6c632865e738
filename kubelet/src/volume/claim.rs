//! Which PersistentVolume a claim gets: the rules of a cluster's binding for volumes that are there already. Pure.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{
    NodeSelector, NodeSelectorRequirement, NodeSelectorTerm, PersistentVolume, PersistentVolumeClaim, PersistentVolumeSpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde::{Deserialize, Serialize};

use crate::quantity::Amount;

/// A claim's namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ClaimName {
    /// The namespace.
    pub namespace: String,
    /// The name.
    pub name: String,
}

/// Who has which volume, by the volume's name.
pub type Bound = BTreeMap<String, ClaimName>;

/// What the choice looks at besides the claim.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'a> {
    /// All volumes.
    pub volumes: &'a [Arc<PersistentVolume>],
    /// Those that have been given away.
    pub bound: &'a Bound,
    /// The class of claims that name none.
    pub default_class: Option<&'a str>,
    /// The node's labels.
    pub labels: &'a BTreeMap<String, String>,
    /// The node's name.
    pub node: &'a str,
}

/// The labels that every node has.
pub fn node_labels(node: &str) -> BTreeMap<String, String> {
    let arch = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    [("kubernetes.io/hostname", node), ("kubernetes.io/os", "linux"), ("kubernetes.io/arch", arch)]
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

fn name(volume: &PersistentVolume) -> &str {
    volume.metadata.name.as_deref().unwrap_or_default()
}

fn capacity(spec: &PersistentVolumeSpec) -> Amount {
    spec.capacity.as_ref().and_then(|c| c.get("storage")).map(Amount::of).unwrap_or_default()
}

/// The volume for a claim that has none yet: the one it names, else the one that names it, else the smallest that fits. The
/// error says for each volume why not.
pub fn choose(claim: &PersistentVolumeClaim, who: &ClaimName, choice: &Choice<'_>) -> Result<Arc<PersistentVolume>, String> {
    let wanted = claim.spec.as_ref().and_then(|s| s.volume_name.as_deref()).unwrap_or_default();
    if !wanted.is_empty() {
        let Some(volume) = choice.volumes.iter().find(|v| name(v) == wanted) else {
            return Err(format!("PersistentVolume {wanted:?} not found"));
        };
        return match obstacle(volume, claim, who, choice, true) {
            None => Ok(volume.clone()),
            Some(why) => Err(format!("PersistentVolume {wanted:?}: {why}")),
        };
    }
    let mut why_not = String::new();
    let mut fitting: Vec<(bool, Amount, &Arc<PersistentVolume>)> = Vec::new();
    for volume in choice.volumes {
        let names_us = is_reserved_for(volume, who);
        match obstacle(volume, claim, who, choice, names_us) {
            None => fitting.push((!names_us, volume.spec.as_ref().map(capacity).unwrap_or_default(), volume)),
            Some(why) => _ = write!(why_not, "; {}: {why}", name(volume)),
        }
    }
    fitting.sort_by(|a, b| (a.0, a.1, name(a.2)).cmp(&(b.0, b.1, name(b.2))));
    match fitting.first() {
        Some((_, _, volume)) => Ok(Arc::clone(volume)),
        None => Err(format!("no persistent volumes available for this claim{why_not}")),
    }
}

fn is_reserved_for(volume: &PersistentVolume, who: &ClaimName) -> bool {
    let reference = volume.spec.as_ref().and_then(|s| s.claim_ref.as_ref());
    reference.is_some_and(|r| r.name.as_deref() == Some(&who.name) && r.namespace.as_deref() == Some(&who.namespace))
}

/// Why the volume is not for the claim. One that names the claim, or that the claim names, need not fit its selector.
fn obstacle(
    volume: &PersistentVolume,
    claim: &PersistentVolumeClaim,
    who: &ClaimName,
    choice: &Choice<'_>,
    named: bool,
) -> Option<String> {
    let (Some(has), Some(wants)) = (&volume.spec, &claim.spec) else { return Some("has no spec".to_owned()) };
    if let Some(other) = choice.bound.get(name(volume)).filter(|other| *other != who) {
        return Some(format!("is bound to claim {}/{}", other.namespace, other.name));
    }
    if let Some(reference) = has.claim_ref.as_ref().filter(|_| !is_reserved_for(volume, who)) {
        let text = |field: &Option<String>| field.clone().unwrap_or_default();
        return Some(format!("is reserved for claim {}/{}", text(&reference.namespace), text(&reference.name)));
    }
    let requests = wants.resources.as_ref().and_then(|r| r.requests.as_ref());
    let request = requests.and_then(|r| r.get("storage"));
    if request.map(Amount::of).unwrap_or_default() > capacity(has) {
        let own = has.capacity.as_ref().and_then(|c| c.get("storage")).map_or("0", |q| q.0.as_str());
        return Some(format!("its capacity of {own} is less than {}", request.map_or("0", |q| q.0.as_str())));
    }
    let modes = has.access_modes.as_deref().unwrap_or_default();
    if let Some(mode) = wants.access_modes.iter().flatten().find(|mode| !modes.contains(mode)) {
        return Some(format!("has no access mode {mode}"));
    }
    let mode = |mode: &Option<String>| mode.clone().unwrap_or_else(|| "Filesystem".to_owned());
    if mode(&has.volume_mode) != mode(&wants.volume_mode) {
        return Some("has another volumeMode".to_owned());
    }
    let class = wants.storage_class_name.as_deref().or(choice.default_class).unwrap_or_default();
    let own_class = has.storage_class_name.as_deref().unwrap_or_default();
    if class != own_class && !is_reserved_for(volume, who) {
        return Some(format!("its storageClassName is {own_class:?}, not {class:?}"));
    }
    if !named && wants.selector.as_ref().is_some_and(|selector| !selects(selector, volume)) {
        return Some("the claim's selector does not match".to_owned());
    }
    (!fits_node(has, choice.labels, choice.node)).then(|| "its node affinity does not match this node".to_owned())
}

fn selects(selector: &LabelSelector, volume: &PersistentVolume) -> bool {
    let labels = volume.metadata.labels.clone().unwrap_or_default();
    let equal = selector.match_labels.iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
    let fits = selector.match_expressions.iter().flatten().all(|item| {
        compare(labels.get(&item.key).map(String::as_str), &item.operator, item.values.as_deref().unwrap_or_default())
    });
    equal && fits
}

/// Whether the volume can be used on the node.
pub fn fits_node(spec: &PersistentVolumeSpec, labels: &BTreeMap<String, String>, node: &str) -> bool {
    let Some(required) = spec.node_affinity.as_ref().and_then(|a| a.required.as_ref()) else { return true };
    selects_node(required, labels, node)
}

/// Whether one of the selector's terms fits the node.
pub fn selects_node(selector: &NodeSelector, labels: &BTreeMap<String, String>, node: &str) -> bool {
    selector.node_selector_terms.iter().any(|term| fits_term(term, labels, node))
}

/// A term without any requirement fits nothing.
fn fits_term(term: &NodeSelectorTerm, labels: &BTreeMap<String, String>, node: &str) -> bool {
    let test = |item: &NodeSelectorRequirement, value: Option<&str>| {
        compare(value, &item.operator, item.values.as_deref().unwrap_or_default())
    };
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    !(expressions.is_empty() && fields.is_empty())
        && expressions.iter().all(|item| test(item, labels.get(&item.key).map(String::as_str)))
        && fields.iter().all(|item| test(item, (item.key == "metadata.name").then_some(node)))
}

fn compare(value: Option<&str>, operator: &str, values: &[String]) -> bool {
    let is_in = || value.is_some_and(|value| values.iter().any(|other| other == value));
    let number = |text: &str| text.parse::<i64>().ok();
    let pair = || Some((number(value?)?, number(values.first()?)?));
    match operator {
        "In" => is_in(),
        "NotIn" => !is_in(),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => pair().is_some_and(|(own, other)| own > other),
        "Lt" => pair().is_some_and(|(own, other)| own < other),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(name: &str, size: &str, extra: serde_json::Value) -> Arc<PersistentVolume> {
        let mut value = serde_json::json!({"metadata": {"name": name, "labels": {"disk": name}}, "spec": {
            "capacity": {"storage": size}, "accessModes": ["ReadWriteOnce"], "storageClassName": "local", "hostPath": {"path": "/x"}}});
        value["spec"].as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        Arc::new(serde_json::from_value(value).unwrap())
    }

    fn claim(extra: serde_json::Value) -> PersistentVolumeClaim {
        let mut value = serde_json::json!({"metadata": {"name": "c"}, "spec": {"accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": "2Gi"}}, "storageClassName": "local"}});
        value["spec"].as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        serde_json::from_value(value).unwrap()
    }

    fn who(name: &str) -> ClaimName {
        ClaimName { namespace: "default".into(), name: name.into() }
    }

    fn chosen(claim: &PersistentVolumeClaim, volumes: &[Arc<PersistentVolume>], bound: &Bound) -> Result<String, String> {
        let labels = node_labels("n1");
        let choice = Choice { volumes, bound, default_class: Some("local"), labels: &labels, node: "n1" };
        choose(claim, &who("c"), &choice).map(|v| name(&v).to_owned())
    }

    #[test]
    fn the_smallest_that_fits_is_taken_unless_one_names_the_claim_or_the_claim_names_one() {
        let none = serde_json::json!({});
        let volumes = [
            volume("small", "1Gi", none.clone()),
            volume("large", "10Gi", none.clone()),
            volume("right", "2Gi", none.clone()),
            volume(
                "reserved",
                "50Gi",
                serde_json::json!({"claimRef": {"namespace": "default", "name": "c"}, "storageClassName": "other"}),
            ),
            volume("theirs", "2Gi", serde_json::json!({"claimRef": {"namespace": "default", "name": "d"}})),
        ];
        let bound = Bound::new();
        let ours = claim(none.clone());
        assert_eq!(chosen(&ours, &volumes, &bound).unwrap(), "reserved");
        assert_eq!(chosen(&ours, &volumes[..3], &bound).unwrap(), "right");
        assert_eq!(chosen(&ours, &volumes[..3], &[("right".to_owned(), who("d"))].into()).unwrap(), "large");
        assert_eq!(chosen(&claim(serde_json::json!({"volumeName": "large"})), &volumes, &bound).unwrap(), "large");
        let by_label = claim(serde_json::json!({"selector": {"matchLabels": {"disk": "large"}}}));
        assert_eq!(chosen(&by_label, &volumes[..3], &bound).unwrap(), "large");
        let not = claim(
            serde_json::json!({"selector": {"matchExpressions": [{"key": "disk", "operator": "NotIn", "values": ["right"]}]}}),
        );
        assert_eq!(chosen(&not, &volumes[..3], &bound).unwrap(), "large");
        let without_class = serde_json::from_value::<PersistentVolumeClaim>(serde_json::json!({"spec": {
            "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}}));
        assert_eq!(chosen(&without_class.unwrap(), &volumes[..3], &bound).unwrap(), "small", "the default class is its class");
    }

    #[test]
    fn what_does_not_fit_is_told_volume_by_volume() {
        let elsewhere = serde_json::json!({"nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [
            {"key": "kubernetes.io/hostname", "operator": "In", "values": ["n2"]}]}]}}});
        let volumes = [
            volume("a", "1Gi", serde_json::json!({})),
            volume("b", "9Gi", serde_json::json!({"accessModes": ["ReadOnlyMany"]})),
            volume("c", "9Gi", serde_json::json!({"storageClassName": "fast"})),
            volume("d", "9Gi", elsewhere),
        ];
        assert_eq!(
            chosen(&claim(serde_json::json!({})), &volumes, &Bound::new()).unwrap_err(),
            "no persistent volumes available for this claim; a: its capacity of 1Gi is less than 2Gi; \
             b: has no access mode ReadWriteOnce; c: its storageClassName is \"fast\", not \"local\"; \
             d: its node affinity does not match this node"
        );
        assert_eq!(
            chosen(&claim(serde_json::json!({"volumeName": "none"})), &volumes, &Bound::new()).unwrap_err(),
            "PersistentVolume \"none\" not found"
        );
    }
}
