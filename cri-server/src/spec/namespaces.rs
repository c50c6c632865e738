//! Which namespaces a pod or container has of its own, and how ids are mapped.

use serde::{Deserialize, Serialize};

/// Whose namespace is used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NamespaceMode {
    /// One for the pod.
    #[default]
    Pod,
    /// One for each container.
    Container,
    /// The host's.
    Node,
    /// That of another container.
    Target,
}

/// One line of an id map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMap {
    /// First id inside.
    pub container: u32,
    /// First id outside.
    pub host: u32,
    /// How many.
    pub length: u32,
}

/// User namespace as asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserNamespace {
    /// POD or NODE.
    pub mode: NamespaceMode,
    /// User ids.
    pub uids: Vec<IdMap>,
    /// Group ids.
    pub gids: Vec<IdMap>,
}

impl UserNamespace {
    /// Whether the pod has a user namespace of its own.
    pub fn own(&self) -> bool {
        self.mode == NamespaceMode::Pod
    }
}

/// The namespaces of a pod or container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespaces {
    /// Network.
    pub network: NamespaceMode,
    /// Processes.
    pub pid: NamespaceMode,
    /// System V IPC, POSIX queues and /dev/shm.
    pub ipc: NamespaceMode,
    /// For TARGET: the container.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub target_id: String,
    /// User namespace; none = the host's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub users: Option<UserNamespace>,
}

impl Namespaces {
    /// The pod's own user namespace, when it has one.
    pub fn own_users(&self) -> Option<&UserNamespace> {
        self.users.as_ref().filter(|u| u.own())
    }
}
