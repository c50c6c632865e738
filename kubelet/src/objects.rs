//! The objects that pods refer to by name: ConfigMaps, Secrets, classes, service accounts and what volumes are claimed from. One
//! trait serves env, volumes and pulls; behind it are the documents beside the manifests now, and can be an API server's later.
//! Holds what it was given, reads no file.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolume, PersistentVolumeClaim, Pod, Secret, ServiceAccount};
use k8s_openapi::api::node::v1::RuntimeClass;
use k8s_openapi::api::scheduling::v1::PriorityClass;
use k8s_openapi::api::storage::v1::{CSIDriver, StorageClass};
use k8s_openapi::jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::volume::claim;

/// What a look-up finds; `None`: there is no such object. The error is the kubelet's message where that is not known yet.
pub type Found<T> = Result<Option<Arc<T>>, String>;

/// Where objects are looked up by namespace and name. No look-up waits.
pub trait Objects: Send + Sync + fmt::Debug {
    /// A ConfigMap.
    fn config_map(&self, namespace: &str, name: &str) -> Found<ConfigMap>;
    /// A Secret.
    fn secret(&self, namespace: &str, name: &str) -> Found<Secret>;
    /// A RuntimeClass, which has no namespace.
    fn runtime_class(&self, name: &str) -> Found<RuntimeClass>;
    /// A PriorityClass, which has no namespace.
    fn priority_class(&self, name: &str) -> Option<Arc<PriorityClass>>;
    /// A ServiceAccount.
    fn service_account(&self, namespace: &str, name: &str) -> Option<Arc<ServiceAccount>>;
    /// A PersistentVolumeClaim.
    fn claim(&self, namespace: &str, name: &str) -> Option<Arc<PersistentVolumeClaim>>;
    /// A PersistentVolume, which has no namespace.
    fn persistent_volume(&self, name: &str) -> Option<Arc<PersistentVolume>>;
    /// All PersistentVolumes, by name.
    fn persistent_volumes(&self) -> Vec<Arc<PersistentVolume>>;
    /// The StorageClass that claims without one have.
    fn default_storage_class(&self) -> Option<String>;
    /// What a cluster knows of a CSI driver.
    fn csi_driver(&self, name: &str) -> Found<CSIDriver>;
    /// The volume that a control plane has bound to a pod's claim; `None`: this node binds.
    fn bound_volume(&self, _pod: &Pod, _claim: &str) -> Option<Result<Arc<PersistentVolume>, String>> {
        None
    }
    /// The labels of this node.
    fn node_labels(&self, node: &str) -> BTreeMap<String, String> {
        claim::node_labels(node)
    }
    /// A token of the pod's service account, for this audience (empty: the API server's) and with this life.
    fn token(&self, _pod: &Pod, _audience: &str, _seconds: i64) -> Result<Arc<Token>, String> {
        Err("service account tokens need an API server".to_owned())
    }
    /// What the attacher of a driver's volume tells this node.
    fn publish_context(&self, _driver: &str, _handle: &str) -> BTreeMap<String, String> {
        BTreeMap::new()
    }
}

/// A service account's token.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// What is shown to whoever asks.
    pub text: String,
    /// When nobody takes it any more.
    pub expires: Timestamp,
}

/// Nobody's log line.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token(until {})", self.expires)
    }
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
    /// A ServiceAccount: its pull secrets.
    ServiceAccount(ServiceAccount),
    /// A PersistentVolume.
    PersistentVolume(Box<PersistentVolume>),
    /// A PersistentVolumeClaim.
    PersistentVolumeClaim(Box<PersistentVolumeClaim>),
    /// A StorageClass: which one is the default.
    StorageClass(StorageClass),
    /// A CSIDriver.
    CsiDriver(CSIDriver),
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
    /// Whether a variable can be taken from this key of it.
    pub fn has_key(&self, key: &str) -> bool {
        match self {
            Object::ConfigMap(map) => map.data.iter().flatten().any(|(held, _)| held == key),
            Object::Secret(secret) => secret.data.iter().flatten().any(|(held, _)| held == key),
            _ => false,
        }
    }

    /// The name it is found by.
    pub fn name(&self) -> ObjectName {
        let (kind, metadata, namespaced) = match self {
            Object::ConfigMap(object) => ("ConfigMap", &object.metadata, true),
            Object::Secret(object) => ("Secret", &object.metadata, true),
            Object::RuntimeClass(object) => ("RuntimeClass", &object.metadata, false),
            Object::PriorityClass(object) => ("PriorityClass", &object.metadata, false),
            Object::ServiceAccount(object) => ("ServiceAccount", &object.metadata, true),
            Object::PersistentVolume(object) => ("PersistentVolume", &object.metadata, false),
            Object::PersistentVolumeClaim(object) => ("PersistentVolumeClaim", &object.metadata, true),
            Object::StorageClass(object) => ("StorageClass", &object.metadata, false),
            Object::CsiDriver(object) => ("CSIDriver", &object.metadata, false),
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
    service_accounts: BTreeMap<Key, Arc<ServiceAccount>>,
    claims: BTreeMap<Key, Arc<PersistentVolumeClaim>>,
    volumes: BTreeMap<String, Arc<PersistentVolume>>,
    storage_classes: BTreeMap<String, StorageClass>,
    csi_drivers: BTreeMap<String, Arc<CSIDriver>>,
}

/// The annotation of the class that claims without one have.
const DEFAULT_CLASS: &str = "storageclass.kubernetes.io/is-default-class";

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
                Object::ServiceAccount(object) => _ = tables.service_accounts.insert((namespace, name), Arc::new(object)),
                Object::PersistentVolume(object) => _ = tables.volumes.insert(name, object.into()),
                Object::PersistentVolumeClaim(object) => _ = tables.claims.insert((namespace, name), object.into()),
                Object::StorageClass(object) => _ = tables.storage_classes.insert(name, object),
                Object::CsiDriver(object) => _ = tables.csi_drivers.insert(name, Arc::new(object)),
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
    fn config_map(&self, namespace: &str, name: &str) -> Found<ConfigMap> {
        Ok(self.read(|tables| tables.config_maps.get(&key(namespace, name)).cloned()))
    }

    fn secret(&self, namespace: &str, name: &str) -> Found<Secret> {
        Ok(self.read(|tables| tables.secrets.get(&key(namespace, name)).cloned()))
    }

    fn runtime_class(&self, name: &str) -> Found<RuntimeClass> {
        Ok(self.read(|tables| tables.runtime_classes.get(name).cloned()))
    }

    fn priority_class(&self, name: &str) -> Option<Arc<PriorityClass>> {
        self.read(|tables| tables.priority_classes.get(name).cloned())
    }

    fn service_account(&self, namespace: &str, name: &str) -> Option<Arc<ServiceAccount>> {
        self.read(|tables| tables.service_accounts.get(&key(namespace, name)).cloned())
    }

    fn claim(&self, namespace: &str, name: &str) -> Option<Arc<PersistentVolumeClaim>> {
        self.read(|tables| tables.claims.get(&key(namespace, name)).cloned())
    }

    fn persistent_volume(&self, name: &str) -> Option<Arc<PersistentVolume>> {
        self.read(|tables| tables.volumes.get(name).cloned())
    }

    fn persistent_volumes(&self) -> Vec<Arc<PersistentVolume>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).volumes.values().cloned().collect()
    }

    fn default_storage_class(&self) -> Option<String> {
        let is_default = |class: &StorageClass| {
            class.metadata.annotations.as_ref().and_then(|a| a.get(DEFAULT_CLASS)).is_some_and(|value| value == "true")
        };
        self.read(|tables| tables.storage_classes.iter().find(|(_, class)| is_default(class)).map(|(name, _)| name.clone()))
    }

    fn csi_driver(&self, name: &str) -> Found<CSIDriver> {
        Ok(self.read(|tables| tables.csi_drivers.get(name).cloned()))
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
        assert_eq!(objects.config_map("default", "settings").unwrap().as_deref(), Some(&map));
        assert!(
            objects.config_map("other", "settings").unwrap().is_none()
                && objects.secret("default", "settings").unwrap().is_none()
        );
        assert_eq!(Object::ConfigMap(map).name().to_string(), "ConfigMap default/settings");
        objects.replace(Vec::new());
        assert!(objects.config_map("default", "settings").unwrap().is_none());
    }

    #[test]
    fn a_secrets_data_is_not_printed() {
        let mut secret = Secret::default();
        secret.metadata.name = Some("s".into());
        secret.string_data = Some([("password".to_owned(), "hunter2".to_owned())].into());
        assert_eq!(format!("{:?}", Object::Secret(secret)), "Secret default/s");
    }
}
