//! The CSINode object: which CSI drivers this node has, for the scheduler and the controller that attaches volumes. Also the node's
//! annotation and labels that say so.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::storage::v1::{CSINode, CSINodeDriver, VolumeNodeResources};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::{Map, Value, json};

use super::{Answer, CALL, NodeAgent, limited, pauses};
use crate::volume::csi::drivers::Driver;

/// Which drivers know this node by which name, on the Node.
const NODE_ID: &str = "csi.volume.kubernetes.io/nodeid";
/// Kinds of volumes whose work CSI drivers have taken over, on the CSINode: those of clouds have no other here, as upstream.
const MIGRATED: &str = "storage.alpha.kubernetes.io/migrated-plugins";
const MIGRATED_PLUGINS: &str = "kubernetes.io/aws-ebs,kubernetes.io/azure-disk,kubernetes.io/azure-file,kubernetes.io/cinder,\
     kubernetes.io/gce-pd,kubernetes.io/portworx-volume,kubernetes.io/vsphere-volume";

fn entry(driver: &Driver) -> CSINodeDriver {
    let keys: Vec<String> = driver.topology.keys().cloned().collect();
    CSINodeDriver {
        name: driver.name.clone(),
        node_id: driver.node_id.clone(),
        topology_keys: (!keys.is_empty()).then_some(keys),
        allocatable: (driver.max_volumes > 0)
            .then(|| VolumeNodeResources { count: Some(i32::try_from(driver.max_volumes).unwrap_or(i32::MAX)) }),
    }
}

/// The object as it should be: the drivers that are here, and those of before that have not been seen to go (`gone`): they may be on
/// their way. `None`: it is so already.
fn wanted(node: &Node, existing: Option<&CSINode>, drivers: &[Driver], gone: &BTreeSet<String>) -> Option<CSINode> {
    let mut object = existing.cloned().unwrap_or_default();
    object.metadata.name.clone_from(&node.metadata.name);
    object.metadata.managed_fields = None;
    object.metadata.annotations.get_or_insert_default().insert(MIGRATED.to_owned(), MIGRATED_PLUGINS.to_owned());
    let owner = OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: node.metadata.name.clone().unwrap_or_default(),
        uid: node.metadata.uid.clone().unwrap_or_default(),
        ..OwnerReference::default()
    };
    object.metadata.owner_references = Some(vec![owner]);
    let mut entries: BTreeMap<String, CSINodeDriver> =
        object.spec.drivers.drain(..).filter(|driver| !gone.contains(&driver.name)).map(|d| (d.name.clone(), d)).collect();
    entries.extend(drivers.iter().map(|driver| (driver.name.clone(), entry(driver))));
    object.spec.drivers = entries.into_values().collect();
    let mut before = existing.cloned();
    if let Some(before) = &mut before {
        before.metadata.managed_fields = None;
        before.spec.drivers.sort_by(|a, b| a.name.cmp(&b.name));
    }
    (before.as_ref() != Some(&object)).then_some(object)
}

/// What the Node has to say of the drivers, where it does not: the annotation with their names for it, and their topology as labels.
fn node_patch(node: &Node, drivers: &[Driver], gone: &BTreeSet<String>) -> Option<Value> {
    let text = node.metadata.annotations.as_ref().and_then(|list| list.get(NODE_ID));
    let mut ids: Map<String, Value> = text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    let before = ids.clone();
    ids.retain(|name, _| !gone.contains(name));
    ids.extend(drivers.iter().map(|driver| (driver.name.clone(), driver.node_id.clone().into())));
    let has = |key: &String| node.metadata.labels.as_ref().and_then(|labels| labels.get(key));
    let labels: Map<String, Value> = drivers
        .iter()
        .flat_map(|driver| &driver.topology)
        .filter(|(key, value)| has(key) != Some(*value))
        .map(|(key, value)| (key.clone(), value.clone().into()))
        .collect();
    let mut metadata = Map::new();
    if ids != before {
        let text = if ids.is_empty() { Value::Null } else { Value::Object(ids).to_string().into() };
        metadata.insert("annotations".to_owned(), json!({ NODE_ID: text }));
    }
    if !labels.is_empty() {
        metadata.insert("labels".to_owned(), Value::Object(labels));
    }
    (!metadata.is_empty()).then(|| json!({ "metadata": metadata }))
}

/// Keeps both in line with the drivers. Never returns.
pub(super) async fn run(agent: NodeAgent) {
    let (mut known, mut gone) = (BTreeSet::new(), BTreeSet::new());
    let mut object = agent.own.follow();
    let mut pause = pauses();
    let mut told: Option<(String, Vec<Driver>)> = None;
    loop {
        let drivers = agent.drivers.all();
        let names: BTreeSet<String> = drivers.iter().map(|driver| driver.name.clone()).collect();
        gone.extend(known.difference(&names).cloned());
        gone.retain(|name| !names.contains(name));
        known.extend(names);
        let node = object.borrow_and_update().clone();
        let uid = node.as_ref().and_then(|node| node.metadata.uid.clone()).unwrap_or_default();
        let mut again = None;
        if let Some(node) = node.filter(|_| told.as_ref() != Some(&(uid.clone(), drivers.clone()))) {
            match keep(&agent, &node, &drivers, &gone).await {
                Ok(()) => {
                    told = Some((uid, drivers));
                    pause = pauses();
                    agent.csi_ready();
                }
                Err(error) => {
                    tracing::warn!(%error, "the CSINode object does not have this node's drivers yet");
                    again = pause.next();
                }
            }
        }
        let later = async {
            match again {
                Some(pause) => tokio::time::sleep(pause).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = later => {}
            () = agent.drivers.changed() => {}
            changed = object.changed(), if again.is_none() => if changed.is_err() { return },
        }
    }
}

async fn keep(agent: &NodeAgent, node: &Node, drivers: &[Driver], gone: &BTreeSet<String>) -> Answer<()> {
    let name = agent.config.node_name.as_str();
    let nodes: Api<Node> = Api::all(agent.api.client.clone());
    if let Some(changes) = node_patch(node, drivers, gone) {
        let patched = limited(CALL, nodes.patch_status(name, &PatchParams::default(), &Patch::Strategic(changes))).await?;
        agent.own.set(patched);
    }
    let objects: Api<CSINode> = Api::all(agent.api.client.clone());
    let existing = limited(CALL, objects.get_opt(name)).await?;
    let Some(object) = wanted(node, existing.as_ref(), drivers, gone) else { return Ok(()) };
    match existing {
        None => limited(CALL, objects.create(&PostParams::default(), &object)).await.map(drop),
        Some(_) => limited(CALL, objects.replace(name, &PostParams::default(), &object)).await.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn driver(name: &str) -> Driver {
        Driver {
            name: name.to_owned(),
            node_id: format!("{name}-n"),
            topology: [("topology.a/zone".to_owned(), "z1".to_owned())].into(),
            max_volumes: 7,
            ..Driver::default()
        }
    }

    fn node() -> Node {
        let mut node = Node::default();
        node.metadata.name = Some("n".to_owned());
        node.metadata.uid = Some("u".to_owned());
        node
    }

    #[test]
    fn drivers_are_entered_kept_and_taken_out() {
        let none = BTreeSet::new();
        let empty = wanted(&node(), None, &[], &none).unwrap();
        assert!(empty.spec.drivers.is_empty() && empty.metadata.owner_references.as_ref().unwrap()[0].uid == "u");
        assert_eq!(wanted(&node(), Some(&empty), &[], &none), None);
        let one = wanted(&node(), Some(&empty), &[driver("b")], &none).unwrap();
        let entry = &one.spec.drivers[0];
        assert_eq!((entry.node_id.as_str(), entry.allocatable.as_ref().unwrap().count), ("b-n", Some(7)));
        assert_eq!(entry.topology_keys.as_deref(), Some(["topology.a/zone".to_owned()].as_slice()));
        assert_eq!(wanted(&node(), Some(&one), &[], &none), None, "a driver of before may be on its way");
        let left = wanted(&node(), Some(&one), &[driver("a")], &["b".to_owned()].into()).unwrap();
        assert_eq!(left.spec.drivers.iter().map(|d| d.name.as_str()).collect::<Vec<_>>(), ["a"]);
    }

    #[test]
    fn the_node_says_what_drivers_call_it_and_where_it_is() {
        let none = BTreeSet::new();
        assert_eq!(node_patch(&node(), &[], &none), None);
        let patch = node_patch(&node(), &[driver("a")], &none).unwrap();
        assert_eq!(patch["metadata"]["annotations"][NODE_ID], "{\"a\":\"a-n\"}");
        assert_eq!(patch["metadata"]["labels"], json!({"topology.a/zone": "z1"}));
        let mut told = node();
        told.metadata.annotations = Some([(NODE_ID.to_owned(), "{\"a\":\"a-n\"}".to_owned())].into());
        told.metadata.labels = Some([("topology.a/zone".to_owned(), "z1".to_owned())].into());
        assert_eq!(node_patch(&told, &[driver("a")], &none), None);
        let patch = node_patch(&told, &[], &["a".to_owned()].into()).unwrap();
        assert_eq!(patch["metadata"]["annotations"][NODE_ID], Value::Null);
    }
}
