//! Scenarios as data: a manifest, what must be seen of it, and the fields that it proves. Runs nothing.
//!
//! A file holds several: each begins with a document that has a `scenario` key and goes on with the documents of its manifest, one
//! of which is a Pod (one without a kind). In all of them `${NAME}` is the pod's name, `${DIR}` a folder of its own on the node,
//! `${PORT}` a port of its own, `${NODE_IP}` the node's address, `${REGISTRY}` a registry's, `${NS}` the node's namespaces,
//! `${PROBED}` the program demo-probed on the node.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};

use super::model::Model;

/// The first document of a scenario.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Scenario {
    /// Its name, which is the pod's too.
    pub scenario: String,
    /// Paths in the Pod whose removal must break the expectation.
    #[serde(default)]
    pub proves: Vec<String>,
    /// Paths in the Pod without which the manifest is refused.
    #[serde(default)]
    pub required: Vec<String>,
    /// What must hold.
    pub expect: Expect,
    /// What of the status says that nothing more will happen; without it: the pod has ended.
    #[serde(default)]
    pub settled: BTreeMap<String, Value>,
    /// Words for a container's standard input, by an attach that then ends.
    #[serde(default)]
    pub attach: Option<Attach>,
    /// A shell command for the node, before the pod is there.
    #[serde(default)]
    pub prepare: Option<String>,
    /// What is changed in the Pod once it is running, by path.
    #[serde(default)]
    pub edit: BTreeMap<String, Value>,
    /// What of the guest of `e2e/vm.sh` it needs; it is not run elsewhere.
    #[serde(default)]
    pub guest: Option<String>,
    /// Why it cannot hold over a stock containerd.
    #[serde(default)]
    pub containerd: Option<String>,
    /// The documents of its manifest, before the names are filled in.
    #[serde(skip)]
    pub documents: Vec<Value>,
}

/// What a user attaches to a container with.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Attach {
    /// The container.
    pub container: String,
    /// What is typed.
    pub input: String,
}

/// What must be seen.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
pub struct Expect {
    /// The whole log of a container's last run, by the container's name.
    #[serde(default)]
    pub log: BTreeMap<String, String>,
    /// Values in the pod's status, by path; `~text` is a part of one, null that there is none.
    #[serde(default)]
    pub status: BTreeMap<String, Value>,
    /// Contents of files on the node.
    #[serde(default)]
    pub host: BTreeMap<String, String>,
    /// What the runtime was told, by container (empty: the sandbox) and path in what `crictl inspect` prints.
    #[serde(default)]
    pub cri: BTreeMap<String, BTreeMap<String, Value>>,
}

impl Scenario {
    /// All scenarios of a folder's files, by file name.
    ///
    /// # Panics
    /// When a file is not as described above.
    #[must_use]
    pub fn load(folder: &Path) -> Vec<Self> {
        let mut files: Vec<_> = fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path()).collect();
        files.sort();
        let mut all: Vec<Self> = Vec::new();
        for file in files {
            let text = fs::read_to_string(&file).unwrap();
            for document in serde_yaml_ng::Deserializer::from_str(&text) {
                let mut value = Value::deserialize(document).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
                if value.get("spec").is_some() && value.get("kind").is_none() {
                    let spec = value["spec"].take();
                    value = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {}, "spec": spec});
                }
                if value.get("scenario").is_some() {
                    let header = serde_json::from_value(value.clone());
                    all.push(header.unwrap_or_else(|e| panic!("{}: {}: {e}", file.display(), value["scenario"])));
                } else if !value.is_null() {
                    let current = all.last_mut().unwrap_or_else(|| panic!("{}: no scenario before {value}", file.display()));
                    current.documents.push(value);
                }
            }
        }
        for scenario in &all {
            let pods = scenario.documents.iter().filter(|d| d["kind"] == "Pod").count();
            assert_eq!(pods, 1, "{}: one Pod is wanted", scenario.scenario);
        }
        all
    }

    /// The fields that it proves, as `Type.field`, each with its path.
    ///
    /// # Panics
    /// When a path is not in the manifest or not one of the model.
    #[must_use]
    pub fn fields(&self, model: &Model) -> Vec<(String, String)> {
        let pod = self.documents.iter().find(|d| d["kind"] == "Pod").cloned().unwrap_or_default();
        let of = |path: &String| {
            assert!(at(&pod, path).is_some_and(|v| !v.is_null()), "{}: the manifest has no {path}", self.scenario);
            let field = field_of(model, path).unwrap_or_else(|| panic!("{}: {path} is no field of a pod", self.scenario));
            (field, path.clone())
        };
        self.proves.iter().chain(&self.required).map(of).collect()
    }

    /// The manifest under this name, with the field at `without` taken out of the Pod, and with the edit where it is `edited`.
    ///
    /// # Panics
    /// When the edit changes what the Pod does not have.
    #[must_use]
    pub fn manifest(&self, names: &Names, without: Option<&str>, edited: bool) -> String {
        let mut text = String::new();
        for document in &self.documents {
            let mut document = document.clone();
            if document["kind"] == "Pod" {
                document["metadata"]["name"] = Value::from(names.name.as_str());
                for (path, value) in self.edit.iter().filter(|_| edited) {
                    let place = document.pointer_mut(&pointer(path));
                    *place.unwrap_or_else(|| panic!("{}: the manifest has no {path} to edit", self.scenario)) = value.clone();
                }
                if let Some(path) = without {
                    take_out(&mut document, path);
                }
            }
            text.push_str("---\n");
            text.push_str(&document.to_string());
            text.push('\n');
        }
        names.fill_in(&text)
    }
}

/// What stands in the places of a scenario's variables.
#[derive(Debug, Clone, Default)]
pub struct Names {
    /// The pod.
    pub name: String,
    /// Its folder.
    pub dir: PathBuf,
    /// Its port.
    pub port: u16,
    /// The node's address.
    pub node_ip: String,
    /// A registry that wants a password.
    pub registry: String,
    /// The node's PID, IPC and network namespace, one a line.
    pub namespaces: String,
    /// The program demo-probed.
    pub probed: PathBuf,
}

impl Names {
    /// Puts the names in their places.
    #[must_use]
    pub fn fill_in(&self, text: &str) -> String {
        let port = self.port.to_string();
        let text = text.replace("\"${PORT}\"", &port).replace("${PORT}", &port).replace("${NAME}", &self.name);
        let text = text.replace("${DIR}", &self.dir.to_string_lossy()).replace("${NODE_IP}", &self.node_ip);
        let text = text.replace("${REGISTRY}", &self.registry).replace("${NS}", &self.namespaces);
        text.replace("${PROBED}", &self.probed.to_string_lossy())
    }
}

/// `spec.containers[0].env` as `Container.env`.
#[must_use]
pub fn field_of(model: &Model, path: &str) -> Option<String> {
    let mut parent = "PodSpec".to_owned();
    let mut segments = path.strip_prefix("spec.")?.split('.').map(|s| s.split('[').next().unwrap_or(s)).peekable();
    while let Some(field) = segments.next() {
        let name = format!("{parent}.{field}");
        if !model.types.get(&parent)?.contains_key(field) {
            return None;
        }
        if segments.peek().is_none() {
            return Some(name);
        }
        parent = model.child(&name)?.to_owned();
    }
    None
}

/// The value at a path.
#[must_use]
pub fn at<'v>(value: &'v Value, path: &str) -> Option<&'v Value> {
    value.pointer(&pointer(path))
}

/// A path as a JSON pointer; a key that holds dots is written in parentheses.
fn pointer(path: &str) -> String {
    let mut out = String::new();
    let mut quoted = false;
    for c in format!(".{path}").chars() {
        match c {
            '(' => quoted = true,
            ')' => quoted = false,
            '.' | '[' if !quoted => out.push('/'),
            ']' if !quoted => {}
            '/' => out.push_str("~1"),
            other => out.push(other),
        }
    }
    out
}

fn take_out(document: &mut Value, path: &str) {
    let pointer = pointer(path);
    let (parent, key) = pointer.rsplit_once('/').unwrap_or_default();
    match document.pointer_mut(parent) {
        Some(Value::Object(map)) => _ = map.remove(&key.replace("~1", "/")),
        Some(Value::Array(list)) => _ = key.parse().ok().filter(|i: &usize| *i < list.len()).map(|i| list.remove(i)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_taken_out_of_the_pod_only() {
        let scenario = Scenario {
            documents: vec![
                json!({"kind": "ConfigMap", "metadata": {"name": "${NAME}"}}),
                json!({"kind": "Pod", "metadata": {}, "spec": {"a": [{"b": 1, "c": 2}]}}),
            ],
            ..Scenario::default()
        };
        let names = Names { name: "x".into(), ..Names::default() };
        let text = scenario.manifest(&names, Some("spec.a[0].b"), false);
        assert_eq!(
            text,
            "---\n{\"kind\":\"ConfigMap\",\"metadata\":{\"name\":\"x\"}}\n---\n{\"kind\":\"Pod\",\"metadata\":{\"name\":\"x\"},\"spec\":{\"a\":[{\"c\":2}]}}\n"
        );
        let edited = Scenario { edit: BTreeMap::from([("spec.a[0].c".to_owned(), json!(3))]), ..scenario };
        assert!(edited.manifest(&names, Some("spec.a[0].b"), true).contains("{\"a\":[{\"c\":3}]}"));
    }
}
