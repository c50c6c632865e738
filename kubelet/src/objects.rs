//! The objects that pods refer to by name: ConfigMaps, Secrets and classes. One trait serves env, volumes and pulls; behind it
//! are the documents beside the manifests now, and can be an API server's later. Holds what it was given, reads no file.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::api::node::v1::RuntimeClass;
use k8s_openapi::api::scheduling::v1::PriorityClass;
use serde::{Deserialize, Serialize};

/// Where objects are looked up by namespace and name.
pub trait Objects: Send + Sync + fmt::Debug {
    /// A ConfigMap.
    fn config_map(&self, namespace: &str, name: &str) -> Option<Arc<ConfigMap>>;
    /// A Secret.
    fn secret(&self, namespace: &str, name: &str) -> Option<Arc<Secret>>;
    /// A RuntimeClass, which has no namespace.
    fn runtime_class(&self, name: &str) -> Option<Arc<RuntimeClass>>;
    /// A PriorityClass, which has no namespace.
    fn priority_class(&self, name: &str) -> Option<Arc<PriorityClass>>;
}

/// One object of a manifest file.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Object {
    /// A ConfigMap.
    ConfigMap(ConfigMap),
    /// A Secret; `stringData` has become data.
    Secret(Secret),
    /// A RuntimeClass.
    RuntimeClass(RuntimeClass),
    /// A PriorityClass.
    PriorityClass(PriorityClass),
}

/// What names an object: kind, namespace (empty where the kind has none) and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectName {
    /// `ConfigMap`, `Secret`…
    pub kind: &'static str,
    /// The namespace.
    pub namespace: String,
    /// The name.
    pub name: String,
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.namespace.as_str() {
            "" => write!(f, "{} {}", self.kind, self.name),
            namespace => write!(f, "{} {namespace}/{}", self.kind, self.name),
        }
    }
}

/// Names only: a Secret's data is nobody's log line.
impl fmt::Debug for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.name())
    }
}

impl Object {
    /// The name it is found by.
    pub fn name(&self) -> ObjectName {
        let (kind, metadata, namespaced) = match self {
            Object::ConfigMap(object) => ("ConfigMap", &object.metadata, true),
            Object::Secret(object) => ("Secret", &object.metadata, true),
            Object::RuntimeClass(object) => ("RuntimeClass", &object.metadata, false),
            Object::PriorityClass(object) => ("PriorityClass", &object.metadata, false),
        };
        let namespace = if namespaced { metadata.namespace.as_deref().unwrap_or("default") } else { "" };
        ObjectName { kind, namespace: namespace.to_owned(), name: metadata.name.clone().unwrap_or_default() }
    }
}

type Key = (String, String);

#[derive(Default)]
struct Tables {
    config_maps: BTreeMap<Key, Arc<ConfigMap>>,
    secrets: BTreeMap<Key, Arc<Secret>>,
    runtime_classes: BTreeMap<String, Arc<RuntimeClass>>,
    priority_classes: BTreeMap<String, Arc<PriorityClass>>,
}

/// The objects of this node's manifest files. Clones share them.
#[derive(Clone, Default)]
pub struct LocalObjects(Arc<RwLock<Tables>>);

impl fmt::Debug for LocalObjects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tables = self.0.read().unwrap_or_else(PoisonError::into_inner);
        write!(f, "LocalObjects({} ConfigMaps, {} Secrets)", tables.config_maps.len(), tables.secrets.len())
    }
}

impl LocalObjects {
    /// Holds these objects and no others.
    pub fn replace(&self, objects: Vec<Object>) {
        let mut tables = Tables::default();
        for object in objects {
            let ObjectName { namespace, name, .. } = object.name();
            match object {
                Object::ConfigMap(object) => _ = tables.config_maps.insert((namespace, name), Arc::new(object)),
                Object::Secret(object) => _ = tables.secrets.insert((namespace, name), Arc::new(object)),
                Object::RuntimeClass(object) => _ = tables.runtime_classes.insert(name, Arc::new(object)),
                Object::PriorityClass(object) => _ = tables.priority_classes.insert(name, Arc::new(object)),
            }
        }
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = tables;
    }

    fn read<T>(&self, look: impl FnOnce(&Tables) -> Option<T>) -> Option<T> {
        look(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

fn key(namespace: &str, name: &str) -> Key {
    (namespace.to_owned(), name.to_owned())
}

impl Objects for LocalObjects {
    fn config_map(&self, namespace: &str, name: &str) -> Option<Arc<ConfigMap>> {
        self.read(|tables| tables.config_maps.get(&key(namespace, name)).cloned())
    }

    fn secret(&self, namespace: &str, name: &str) -> Option<Arc<Secret>> {
        self.read(|tables| tables.secrets.get(&key(namespace, name)).cloned())
    }

    fn runtime_class(&self, name: &str) -> Option<Arc<RuntimeClass>> {
        self.read(|tables| tables.runtime_classes.get(name).cloned())
    }

    fn priority_class(&self, name: &str) -> Option<Arc<PriorityClass>> {
        self.read(|tables| tables.priority_classes.get(name).cloned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_are_found_in_their_namespace_and_go_with_the_next_set() {
        let mut map = ConfigMap::default();
        map.metadata.name = Some("settings".into());
        let objects = LocalObjects::default();
        objects.replace(vec![Object::ConfigMap(map.clone())]);
        assert_eq!(objects.config_map("default", "settings").as_deref(), Some(&map));
        assert!(objects.config_map("other", "settings").is_none() && objects.secret("default", "settings").is_none());
        assert_eq!(Object::ConfigMap(map).name().to_string(), "ConfigMap default/settings");
        objects.replace(Vec::new());
        assert!(objects.config_map("default", "settings").is_none());
    }

    #[test]
    fn a_secrets_data_is_not_printed() {
        let mut secret = Secret::default();
        secret.metadata.name = Some("s".into());
        secret.string_data = Some([("password".to_owned(), "hunter2".to_owned())].into());
        assert_eq!(format!("{:?}", Object::Secret(secret)), "Secret default/s");
    }
}
