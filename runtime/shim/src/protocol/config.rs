//! What the agent gives a shim at its start: the sandbox's configuration and the numbers of the inherited descriptors.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Inherited descriptor with the [`SandboxConfig`] as JSON (a sealed memfd).
pub const CONFIG_FD: i32 = 3;
/// Inherited descriptor of the listening stream socket. The agent binds it, so that it knows the path.
pub const LISTEN_FD: i32 = 4;
/// Inherited descriptor of the ready pipe: the shim writes one [`Ready`] as JSON and closes it. An end of the pipe
/// without text means that the shim died.
pub const READY_FD: i32 = 5;
/// Inherited descriptor of the network namespace when [`SandboxConfig::net`] is [`NetMode::Given`].
pub const NETNS_FD: i32 = 6;

/// The first and only text on the ready pipe. Namespaces, hostname, sysctls, `/dev/shm` and pause are done then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ready {
    /// The shim accepts connections.
    Ok,
    /// The shim has ended, nothing of it is left; the text is for the user.
    Failed(String),
}

/// Where the pod's network comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NetMode {
    /// A new network namespace (with `lo` down: the network's set-up brings it up).
    #[default]
    New,
    /// The host's.
    Host,
    /// The one behind [`NETNS_FD`].
    Given,
}

/// Where another namespace of the pod comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NsMode {
    /// A new one for the pod.
    #[default]
    New,
    /// The host's.
    Host,
}

/// One line of a uid or gid map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMapping {
    /// First id inside the user namespace.
    pub container_id: u32,
    /// First id on the host.
    pub host_id: u32,
    /// How many.
    pub size: u32,
}

/// Maps of the pod's user namespace.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct UserNamespace {
    /// User ids.
    pub uid_mappings: Vec<IdMapping>,
    /// Group ids.
    pub gid_mappings: Vec<IdMapping>,
}

/// Everything a shim must know of its sandbox. Fields unknown to a shim are ignored, missing ones take their default.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SandboxConfig {
    /// [`super::VERSION`] of the writer.
    pub version: u32,
    /// 64 lower-case hex digits.
    pub sandbox_id: String,
    /// The sandbox's folder on tmpfs; exists, only the shim writes `<container id>.exit` into it. The shim also makes the
    /// empty folder `shm` in it, as mount point in its private mount namespace.
    pub runtime_dir: PathBuf,
    /// Leaf cgroup of the shim and pause, as text (`/kubepods/…/<sandbox id>`); made when missing, empty = stay where the
    /// agent put us. Who removes the sandbox removes it.
    pub cgroup: String,
    /// Hostname of the pod's UTS namespace; ignored with the host's.
    pub hostname: String,
    /// Sysctls as `net.ipv4.ip_local_port_range` → `1024 65000`. Those of `net.` need a network namespace of the pod's own,
    /// the others an IPC namespace; else the shim fails.
    pub sysctls: BTreeMap<String, String>,
    /// Network namespace.
    pub net: NetMode,
    /// IPC namespace.
    pub ipc: NsMode,
    /// UTS namespace.
    pub uts: NsMode,
    /// The pod shares one PID namespace: the shim starts a pause process as its PID 1.
    pub share_pid: bool,
    /// The pod has a user namespace; net (new), ipc, uts and pid then belong to it.
    pub user: Option<UserNamespace>,
    /// Size of the pod's `/dev/shm` in bytes; 0 = none is made. Needs [`NsMode::New`] for ipc.
    pub shm_size: u64,
    /// SELinux label of the files in `/dev/shm`; empty = the kernel's choice.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub mount_label: String,
}
