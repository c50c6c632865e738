//! A parsed document becomes a static pod: name, UID, annotations as the upstream's. The UID leaves resizable resources
//! out, so that an edit of them is an update and not another pod.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, Toleration};
use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::defaults::apply_defaults;
use super::parse::{ParsedPod, Problem};
use super::validate::validate_pod;
use crate::objects::Object;
use crate::pod;
use crate::resources::qos_class;

/// A pod of a file, complete.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StaticPod {
    /// The pod, defaulted and named for this node. The one copy that the source, the main loop and the worker read.
    #[serde(with = "shared")]
    pub pod: Arc<Pod>,
    /// Digest of the document without its resizable resources; the UID stays while it stays.
    pub identity: String,
}

/// What identity depends on besides the document.
#[derive(Clone, Copy, Debug)]
pub struct Origin<'a> {
    /// The file.
    pub path: &'a Path,
    /// The node's name in lower case.
    pub node_name: &'a str,
    /// When the document was seen.
    pub seen: Timestamp,
    /// Sysctls allowed besides the safe ones.
    pub allowed_unsafe_sysctls: &'a [String],
}

impl StaticPod {
    /// Namespace and name on this node.
    pub fn full_name(&self) -> pod::FullName {
        pod::FullName::of(&self.pod)
    }
}

/// Completes a parsed pod, or says what is wrong with it. `accepted` are the pods that this file stood for before: one
/// with the same document keeps its UID and time.
pub fn complete(parsed: ParsedPod, origin: &Origin<'_>, accepted: &[StaticPod]) -> Result<StaticPod, Vec<Problem>> {
    let ParsedPod { mut pod, document, lines } = parsed;
    apply_defaults(&mut pod);
    let invalid = validate_pod(&pod, origin.allowed_unsafe_sysctls);
    let own_uid = pod.metadata.uid.clone().filter(|uid| !uid.is_empty());
    let mut problems: Vec<Problem> =
        invalid.into_iter().map(|i| Problem { line: lines.of(&i.path), message: format!("{}: {}", i.path, i.message) }).collect();
    if own_uid.as_deref().is_some_and(|uid| pod::PodUid::new(uid).is_none()) {
        problems.push(Problem { line: lines.of("metadata.uid"), message: "metadata.uid: is not usable".to_owned() });
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    // Another QoS class is another cgroup, which a running pod cannot change to.
    let identity = digest(&[&canonical(&without_resizable(&document)), qos_class(&pod).as_str()]);
    let name = format!("{}-{}", pod::name(&pod), origin.node_name);
    let full_name = pod::FullName { namespace: pod::namespace(&pod).to_owned(), name };
    let before = accepted.iter().find(|a| a.full_name() == full_name && a.identity == identity);
    let path = origin.path.to_string_lossy();
    let uid = own_uid
        .or_else(|| before.and_then(|b| b.pod.metadata.uid.clone()))
        .unwrap_or_else(|| digest(&[origin.node_name, &path, &full_name.to_string(), &identity]));
    let seen = before
        .and_then(|b| pod::annotation(&b.pod, pod::CONFIG_SEEN).map(str::to_owned))
        .unwrap_or_else(|| origin.seen.to_string());
    pod.metadata.name = Some(full_name.name);
    pod.metadata.uid = Some(uid);
    let annotations = pod.metadata.annotations.get_or_insert_default();
    annotations.insert(pod::CONFIG_HASH.to_owned(), digest(&[&canonical(&document)]));
    annotations.insert(pod::CONFIG_SEEN.to_owned(), seen);
    annotations.insert(pod::CONFIG_SOURCE.to_owned(), "file".to_owned());
    if let Some(spec) = &mut pod.spec {
        spec.node_name = Some(origin.node_name.to_owned());
        let everything =
            Toleration { operator: Some("Exists".to_owned()), effect: Some("NoExecute".to_owned()), ..Toleration::default() };
        let tolerations = spec.tolerations.get_or_insert_default();
        if !tolerations.contains(&everything) {
            tolerations.push(everything);
        }
    }
    Ok(StaticPod { pod: Arc::new(pod), identity })
}

/// A shared pod is written as the pod that it is.
mod shared {
    use std::sync::Arc;

    use k8s_openapi::api::core::v1::Pod;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<S: Serializer>(pod: &Arc<Pod>, serializer: S) -> Result<S::Ok, S::Error> {
        pod.as_ref().serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<Pod>, D::Error> {
        Pod::deserialize(deserializer).map(Arc::new)
    }
}

/// 32 hex digits over the parts.
pub fn digest(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part.as_bytes());
    }
    hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// One text for documents that differ only in the order of keys.
fn canonical(value: &Value) -> String {
    fn sorted(value: &Value) -> Value {
        match value {
            Value::Object(map) => {
                let mut entries: Vec<_> = map.iter().filter(|(_, v)| !v.is_null()).collect();
                entries.sort_by_key(|(key, _)| key.as_str());
                Value::Object(entries.into_iter().map(|(k, v)| (k.clone(), sorted(v))).collect::<Map<_, _>>())
            }
            Value::Array(items) => Value::Array(items.iter().map(sorted).collect()),
            other => other.clone(),
        }
    }
    sorted(value).to_string()
}

/// The document without CPU and memory of its regular containers: what can change while they run.
fn without_resizable(document: &Value) -> Value {
    let mut document = document.clone();
    let containers = document.pointer_mut("/spec/containers").and_then(Value::as_array_mut);
    for container in containers.into_iter().flatten() {
        for list in ["requests", "limits"] {
            let resources = container.get_mut("resources").and_then(|r| r.get_mut(list));
            if let Some(map) = resources.and_then(Value::as_object_mut) {
                map.shift_remove("cpu");
                map.shift_remove("memory");
            }
        }
        drop_empty(container, "resources", &["requests", "limits"]);
    }
    document
}

/// Removes the given maps of `parent[key]` when they are empty, and `parent[key]` when nothing is left in it.
fn drop_empty(parent: &mut Value, key: &str, inner: &[&str]) {
    let is_empty = |value: &Value| value.as_object().is_some_and(Map::is_empty);
    let Some(parent) = parent.as_object_mut() else { return };
    if let Some(map) = parent.get_mut(key).and_then(Value::as_object_mut) {
        map.retain(|name, value| !(inner.contains(&name.as_str()) && is_empty(value)));
    }
    if parent.get(key).is_some_and(is_empty) {
        parent.shift_remove(key);
    }
}

/// The record of a file's accepted pods.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct AcceptedFile {
    /// Version of this format.
    pub version: u32,
    /// The manifest file.
    pub path: PathBuf,
    /// Its pods.
    pub pods: Vec<StaticPod>,
    /// Its objects; records of before have none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub objects: Vec<Object>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::parse::parse_manifest;

    const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: web\nspec:\n  containers:\n  - name: c\n    image: i\n    resources:\n      limits: {cpu: 1, memory: 1Gi, ephemeral-storage: 1Gi}\n";

    fn make(text: &str, path: &str, node: &str, accepted: &[StaticPod]) -> StaticPod {
        let parsed = parse_manifest(text).unwrap().pods.remove(0);
        let origin = Origin { path: Path::new(path), node_name: node, seen: Timestamp::UNIX_EPOCH, allowed_unsafe_sysctls: &[] };
        complete(parsed, &origin, accepted).unwrap()
    }

    #[test]
    fn names_annotations_and_tolerations_are_the_upstreams() {
        let pod = make(POD, "/m/web.yaml", "edge-1", &[]).pod;
        assert_eq!(pod::FullName::of(&pod).to_string(), "default/web-edge-1");
        assert_eq!(pod::annotation(&pod, pod::CONFIG_SOURCE), Some("file"));
        assert_eq!(pod::annotation(&pod, pod::CONFIG_SEEN), Some("1970-01-01T00:00:00Z"));
        assert_eq!(pod::annotation(&pod, pod::CONFIG_HASH).map(str::len), Some(32));
        assert_eq!(pod::uid(&pod).len(), 32);
        assert_eq!(pod::spec(&pod).node_name.as_deref(), Some("edge-1"));
        assert_eq!(pod::spec(&pod).tolerations.as_ref().map(Vec::len), Some(1));
        assert!(pod::is_static(&pod));
    }

    #[test]
    fn the_uid_follows_node_path_name_and_document_but_not_resizable_resources() {
        let uid = |text: &str, path: &str, node: &str| pod::uid(&make(text, path, node, &[]).pod).to_owned();
        let base = uid(POD, "/m/web.yaml", "n");
        assert_eq!(uid(POD, "/m/web.yaml", "n"), base);
        assert_eq!(uid(&format!("# comment\n{POD}"), "/m/web.yaml", "n"), base, "comments change nothing");
        assert_eq!(uid(&POD.replace("cpu: 1,", "cpu: 2,"), "/m/web.yaml", "n"), base, "resources are resizable");
        assert_ne!(uid(&POD.replace("cpu: 1,", ""), "/m/web.yaml", "n"), base, "another QoS class is another pod");
        assert_ne!(uid(&POD.replace("image: i", "image: j"), "/m/web.yaml", "n"), base);
        assert_ne!(uid(POD, "/m/other.yaml", "n"), base);
        assert_ne!(uid(POD, "/m/web.yaml", "m"), base);
        assert_eq!(uid(&POD.replace("name: web", "name: web\n  uid: mine"), "/m/web.yaml", "n"), "mine");
        let hash = |text: &str| pod::annotation(&make(text, "/m/w.yaml", "n", &[]).pod, pod::CONFIG_HASH).unwrap().to_owned();
        assert_ne!(hash(POD), hash(&POD.replace("cpu: 1,", "cpu: 2,")), "the hash is of the whole content");
    }

    #[test]
    fn an_accepted_pod_keeps_its_uid_and_time() {
        let mut old = make(POD, "/m/web.yaml", "n", &[]);
        Arc::make_mut(&mut old.pod).metadata.uid = Some("from-an-older-version".to_owned());
        let accepted = [old];
        let same = make(&POD.replace("memory: 1Gi,", "memory: 2Gi,"), "/m/web.yaml", "n", &accepted);
        assert_eq!(pod::uid(&same.pod), "from-an-older-version");
        let other = make(&POD.replace("image: i", "image: j"), "/m/web.yaml", "n", &accepted);
        assert_ne!(pod::uid(&other.pod), "from-an-older-version");
    }

    #[test]
    fn problems_carry_their_line() {
        let parsed = parse_manifest(&POD.replace("name: c", "name: C")).unwrap().pods.remove(0);
        let origin = Origin { path: Path::new("/x"), node_name: "n", seen: Timestamp::UNIX_EPOCH, allowed_unsafe_sysctls: &[] };
        let problems = complete(parsed, &origin, &[]).unwrap_err();
        assert_eq!(problems[0], Problem { line: 7, message: "spec.containers[0].name: \"C\" is not a DNS label".into() });
    }
}
