//! What a client asked for, in our words: sandbox and container specs. They are kept in the records (serde, versioned there)
//! and know neither protobuf nor the OCI spec.

mod namespaces;
mod resources;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use namespaces::{IdMap, NamespaceMode, Namespaces, UserNamespace};
pub use resources::Resources;

/// Labels, annotations, sysctls.
pub type Map = BTreeMap<String, String>;

/// The name of a pod sandbox; unique among the sandboxes that are not removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SandboxMetadata {
    /// Pod name.
    pub name: String,
    /// Pod UID.
    pub uid: String,
    /// Pod namespace.
    pub namespace: String,
    /// Counts the sandboxes of one pod.
    pub attempt: u32,
}

/// Resolver configuration of a pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dns {
    /// Name servers.
    pub servers: Vec<String>,
    /// Search domains.
    pub searches: Vec<String>,
    /// Options.
    pub options: Vec<String>,
}

impl Dns {
    /// Nothing in it: the host's configuration is used.
    pub fn is_empty(&self) -> bool {
        self.servers.is_empty() && self.searches.is_empty() && self.options.is_empty()
    }
}

/// A port of the pod made reachable on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// "tcp", "udp" or "sctp".
    pub protocol: String,
    /// In the pod.
    pub container_port: u16,
    /// On the host.
    pub host_port: u16,
    /// Host address; empty = all.
    pub host_ip: String,
}

/// Seccomp or AppArmor profile.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Profile {
    /// The runtime's own.
    RuntimeDefault,
    /// None.
    #[default]
    Unconfined,
    /// A file (seccomp) or a loaded profile (AppArmor).
    Localhost(String),
}

/// Parts of an SELinux label; an empty one is the default's.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SeLinux {
    /// User.
    pub user: String,
    /// Role.
    pub role: String,
    /// Type.
    pub kind: String,
    /// Level, e.g. `s0:c1,c2`.
    pub level: String,
}

/// SELinux labels; empty where SELinux is not active.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Labels {
    /// Of processes.
    pub process: String,
    /// Of files.
    pub mount: String,
}

impl Labels {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// A pod sandbox as asked for.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SandboxSpec {
    /// Its name.
    pub metadata: SandboxMetadata,
    /// Hostname; empty for the host's (host network) or the pod's name.
    pub hostname: String,
    /// Folder of the pod's logs.
    pub log_directory: String,
    /// Resolver configuration.
    pub dns: Option<Dns>,
    /// Port mappings with a host port.
    pub port_mappings: Vec<PortMapping>,
    /// Labels.
    pub labels: Map,
    /// Annotations.
    pub annotations: Map,
    /// Runtime handler as given.
    pub runtime_handler: String,
    /// Parent cgroup, in the driver's form; may be empty.
    pub cgroup_parent: String,
    /// Sysctls with dots.
    pub sysctls: Map,
    /// Namespaces.
    pub namespaces: Namespaces,
    /// Whether privileged containers are allowed.
    pub privileged: bool,
    /// Whether the files the runtime adds are read-only.
    pub readonly_rootfs: bool,
    /// The pod's whole limits, informational.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// The sandbox's own overhead, informational.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overhead: Option<Resources>,
    /// SELinux label as asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selinux: Option<SeLinux>,
    /// SELinux labels of the pod, which its containers have too unless they ask for others.
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub labels_of_pod: Labels,
}

impl SandboxSpec {
    /// Whether the pod uses the host's network.
    pub fn host_network(&self) -> bool {
        self.namespaces.network == NamespaceMode::Node
    }
}

/// The image a container was asked to run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRequest {
    /// Id or name.
    pub image: String,
    /// The text of the pod spec.
    pub user_specified: String,
    /// Annotations.
    pub annotations: Map,
    /// Handler the image is for.
    pub runtime_handler: String,
}

/// How mounts travel between host and container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Propagation {
    /// rprivate
    #[default]
    Private,
    /// rslave
    HostToContainer,
    /// rshared
    Bidirectional,
}

/// A volume.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountSpec {
    /// Where the container sees it.
    pub container_path: String,
    /// What it is on the host, as given.
    pub host_path: String,
    /// Read-only, the mount itself.
    pub readonly: bool,
    /// Read-only with everything below.
    pub recursive_readonly: bool,
    /// SELinux relabel wish.
    pub selinux_relabel: bool,
    /// Propagation.
    pub propagation: Propagation,
    /// Id-mapped mount: users.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub uids: Vec<IdMap>,
    /// Id-mapped mount: groups.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gids: Vec<IdMap>,
    /// An image instead of a host path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageVolume>,
}

/// An image as a volume.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageVolume {
    /// As asked for.
    pub image: String,
    /// The part of it to mount; empty is all of it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub sub_path: String,
    /// The image's ID. Empty until it is looked up.
    pub id: String,
}

/// A host device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSpec {
    /// In the container.
    pub container_path: String,
    /// On the host; a folder means all devices in it.
    pub host_path: String,
    /// Subset of "rwm".
    pub permissions: String,
}

/// One environment variable; the value may be any bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnvVar {
    /// Name.
    pub name: String,
    /// Value.
    pub value: EnvValue,
}

/// A value as text where it is text, else as bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum EnvValue {
    /// UTF-8.
    Text(String),
    /// Anything else.
    Bytes(Vec<u8>),
}

impl EnvValue {
    /// From the wire.
    pub fn new(bytes: Vec<u8>) -> Self {
        String::from_utf8(bytes).map_or_else(|e| Self::Bytes(e.into_bytes()), Self::Text)
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Text(text) => text.as_bytes(),
            Self::Bytes(bytes) => bytes,
        }
    }
}

/// Security context of a container.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Security {
    /// All doors open.
    pub privileged: bool,
    /// Capabilities to add, as given.
    pub add_capabilities: Vec<String>,
    /// Capabilities to drop, as given.
    pub drop_capabilities: Vec<String>,
    /// Capabilities to add to the ambient set.
    pub ambient_capabilities: Vec<String>,
    /// Namespaces.
    pub namespaces: Namespaces,
    /// Numeric user.
    pub run_as_user: Option<u32>,
    /// Numeric group.
    pub run_as_group: Option<u32>,
    /// User name to look up in the image.
    pub run_as_username: String,
    /// More groups.
    pub supplemental_groups: Vec<u32>,
    /// Only the given groups (policy Strict).
    pub strict_groups: bool,
    /// Root file system read-only.
    pub readonly_rootfs: bool,
    /// No new privileges.
    pub no_new_privs: bool,
    /// Exactly these are masked.
    pub masked_paths: Vec<String>,
    /// Exactly these are read-only.
    pub readonly_paths: Vec<String>,
    /// Seccomp; nothing = unconfined.
    pub seccomp: Option<Profile>,
    /// AppArmor; nothing = default.
    pub apparmor: Option<Profile>,
    /// SELinux; nothing = the pod's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selinux: Option<SeLinux>,
}

/// A container as asked for.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// Name in the pod.
    pub name: String,
    /// Restart count.
    pub attempt: u32,
    /// Image.
    pub image: ImageRequest,
    /// Replaces the image's entrypoint.
    pub command: Vec<String>,
    /// Replaces the image's command.
    pub args: Vec<String>,
    /// Working directory.
    pub working_dir: String,
    /// Environment.
    pub envs: Vec<EnvVar>,
    /// Volumes.
    pub mounts: Vec<MountSpec>,
    /// Devices.
    pub devices: Vec<DeviceSpec>,
    /// Devices by their CDI names.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cdi_devices: Vec<String>,
    /// Labels.
    pub labels: Map,
    /// Annotations.
    pub annotations: Map,
    /// Relative to the pod's log folder.
    pub log_path: String,
    /// Keep stdin open for attach.
    pub stdin: bool,
    /// Close stdin after the first attach.
    pub stdin_once: bool,
    /// Terminal.
    pub tty: bool,
    /// Limits.
    pub resources: Option<Resources>,
    /// Security context.
    pub security: Security,
    /// Stop signal in the CRI's own numbering; 0 = default.
    pub stop_signal: i32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn env_values_that_are_not_text_survive_a_record() {
        for bytes in [b"plain".to_vec(), vec![0xff, 0xfe, b'x']] {
            let var = EnvVar { name: "A".into(), value: EnvValue::new(bytes.clone()) };
            let back: EnvVar = serde_json::from_str(&serde_json::to_string(&var).unwrap()).unwrap();
            assert_eq!(back.value.as_bytes(), bytes);
        }
    }
}
