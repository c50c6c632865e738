//! What the runtime has of a pod, in the kubelet's own words. The place where CRI answers end.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use berth_cri_api::v1 as cri;
use k8s_openapi::jiff::Timestamp;

use crate::cri::{Runtime, keys};
use crate::{Result, termination};

/// A pod as the runtime has it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PodObserved {
    /// Newest first.
    pub sandboxes: Vec<Sandbox>,
    /// Newest first.
    pub containers: Vec<Container>,
}

/// One sandbox.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sandbox {
    /// Runtime's ID.
    pub id: String,
    /// Attempt, from 0.
    pub attempt: u32,
    /// READY.
    pub ready: bool,
    /// Nanoseconds since the epoch.
    pub created_at: i64,
    /// Addresses, primary first.
    pub ips: Vec<String>,
    /// Whether the runtime told about the network at all.
    pub has_network: bool,
    /// Whether it shares the host's network.
    pub host_network: bool,
}

/// State of a container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// Made, never started.
    Created,
    /// Running.
    Running,
    /// Ended.
    Exited,
    /// The runtime does not know.
    #[default]
    Unknown,
}

/// One container.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Container {
    /// Runtime's ID.
    pub id: String,
    /// Name in the pod.
    pub name: String,
    /// Attempt (restart count), from 0.
    pub attempt: u32,
    /// Its sandbox.
    pub sandbox_id: String,
    /// State.
    pub state: State,
    /// Nanoseconds since the epoch.
    pub created_at: i64,
    /// Nanoseconds since the epoch, 0 if never.
    pub started_at: i64,
    /// Nanoseconds since the epoch, 0 if not yet.
    pub finished_at: i64,
    /// Exit code.
    pub exit_code: i32,
    /// Runtime's reason of the state.
    pub reason: String,
    /// Runtime's message, with the termination message once it has ended.
    pub message: String,
    /// Image as asked for.
    pub image: String,
    /// Image as found.
    pub image_ref: String,
    /// Hash of the definition it was made from.
    pub hash: String,
    /// Limits in force, where the runtime tells.
    pub resources: Option<Limits>,
    /// The processors that it may run on, as a list; empty where the runtime does not tell.
    pub cpus: String,
    /// User of the first process, where the runtime tells.
    pub user: Option<User>,
    /// Log file.
    pub log_path: String,
    /// Its preStop hook, as the container itself tells it.
    pub pre_stop: Option<String>,
}

/// The resizable limits of a container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// CPU shares.
    pub cpu_shares: i64,
    /// CPU quota.
    pub cpu_quota: i64,
    /// Bytes of memory.
    pub memory: i64,
}

impl From<&cri::LinuxContainerResources> for Limits {
    fn from(linux: &cri::LinuxContainerResources) -> Limits {
        Limits { cpu_shares: linux.cpu_shares, cpu_quota: linux.cpu_quota.max(0), memory: linux.memory_limit_in_bytes }
    }
}

/// User of a container's first process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// User ID.
    pub uid: i64,
    /// Group ID.
    pub gid: i64,
    /// Further groups.
    pub groups: Vec<i64>,
}

impl PodObserved {
    /// The newest sandbox.
    pub fn sandbox(&self) -> Option<&Sandbox> {
        self.sandboxes.first()
    }

    /// The newest container of a name.
    pub fn newest(&self, name: &str) -> Option<&Container> {
        self.containers.iter().find(|c| c.name == name)
    }

    /// Whether containers were made in the sandbox that is ready: all volumes were there then.
    pub fn has_begun(&self) -> bool {
        self.sandbox().is_some_and(|s| s.ready && self.containers.iter().any(|c| c.sandbox_id == s.id))
    }

    /// Whether anything still runs or is ready.
    pub fn is_alive(&self) -> bool {
        self.sandboxes.iter().any(|s| s.ready) || self.containers.iter().any(Container::may_run)
    }
}

impl Container {
    /// Running, or not known to have stopped.
    pub fn may_run(&self) -> bool {
        matches!(self.state, State::Running | State::Unknown)
    }
}

/// Nanoseconds since the epoch as a timestamp of whole seconds, as statuses have it.
pub fn timestamp(nanoseconds: i64) -> Timestamp {
    Timestamp::from_second(nanoseconds.div_euclid(1_000_000_000)).unwrap_or(Timestamp::UNIX_EPOCH)
}

/// Without its fraction of a second.
pub fn whole_second(at: Timestamp) -> Timestamp {
    Timestamp::from_second(at.as_second()).unwrap_or(at)
}

/// Asks the runtime. `before` saves questions: what has ended does not change.
pub async fn observe(runtime: &Runtime, uid: &str, logs: &Path, before: &PodObserved) -> Result<PodObserved> {
    let mut sandboxes = Vec::new();
    for listed in runtime.list_pod_sandboxes(Some(uid)).await? {
        let ready = listed.state() == cri::PodSandboxState::SandboxReady;
        let known = before.sandboxes.iter().find(|s| s.id == listed.id && !s.ready && !ready);
        if let Some(known) = known {
            sandboxes.push(known.clone());
        } else if let Some(status) = runtime.pod_sandbox_status(&listed.id).await? {
            sandboxes.push(sandbox_from(status));
        }
    }
    sandboxes.sort_by(|a, b| (b.attempt, b.created_at, &b.id).cmp(&(a.attempt, a.created_at, &a.id)));
    let mut containers = Vec::new();
    for listed in runtime.list_containers(Some(uid)).await? {
        let exited = listed.state() == cri::ContainerState::ContainerExited;
        let known = before.containers.iter().find(|c| c.id == listed.id && c.state == State::Exited && exited);
        if let Some(known) = known {
            containers.push(known.clone());
        } else if let Some(status) = runtime.container_status(&listed.id).await? {
            containers.push(container_from(status, listed.pod_sandbox_id, logs).await);
        }
    }
    containers.sort_by(|a, b| (b.attempt, b.created_at, &b.id).cmp(&(a.attempt, a.created_at, &a.id)));
    Ok(PodObserved { sandboxes, containers })
}

fn sandbox_from(status: cri::PodSandboxStatus) -> Sandbox {
    let ready = status.state() == cri::PodSandboxState::SandboxReady;
    let options = status.linux.and_then(|l| l.namespaces).and_then(|n| n.options).unwrap_or_default();
    let has_network = status.network.is_some();
    let network = status.network.unwrap_or_default();
    let all = std::iter::once(network.ip).chain(network.additional_ips.into_iter().map(|ip| ip.ip));
    let ips: Vec<String> = all.filter(|ip| !ip.is_empty()).collect();
    let valid = ips.iter().all(|ip| ip.parse::<std::net::IpAddr>().is_ok());
    Sandbox {
        id: status.id,
        attempt: status.metadata.map_or(0, |m| m.attempt),
        ready,
        created_at: status.created_at,
        ips: if valid { ips } else { Vec::new() },
        has_network,
        host_network: options.network() == cri::NamespaceMode::Node,
    }
}

async fn container_from(status: cri::ContainerStatus, sandbox_id: String, logs: &Path) -> Container {
    let state = match status.state() {
        cri::ContainerState::ContainerCreated => State::Created,
        cri::ContainerState::ContainerRunning => State::Running,
        cri::ContainerState::ContainerExited => State::Exited,
        cri::ContainerState::ContainerUnknown => State::Unknown,
    };
    let mut message = status.message.clone();
    if state == State::Exited {
        let found = termination::read(&message_source(&status, logs)).await;
        if !found.is_empty() {
            if !message.is_empty() {
                message.push_str(": ");
            }
            message.push_str(&found);
        }
    }
    let annotation = |key: &str| status.annotations.get(key).cloned().unwrap_or_default();
    let metadata = status.metadata.clone().unwrap_or_default();
    let name = status.labels.get(keys::CONTAINER_NAME).cloned().unwrap_or(metadata.name);
    let linux = status.resources.as_ref().and_then(|r| r.linux.as_ref());
    let user = status.user.and_then(|u| u.linux);
    let image = status.image.unwrap_or_default();
    Container {
        name,
        attempt: annotation(keys::RESTART_COUNT).parse().unwrap_or(metadata.attempt),
        sandbox_id,
        state,
        created_at: status.created_at,
        started_at: status.started_at,
        finished_at: status.finished_at,
        exit_code: status.exit_code,
        reason: status.reason.clone(),
        message,
        image: if image.user_specified_image.is_empty() { image.image } else { image.user_specified_image },
        image_ref: if status.image_ref.is_empty() { status.image_id.clone() } else { status.image_ref.clone() },
        hash: annotation(keys::CONTAINER_HASH),
        pre_stop: status.annotations.get(keys::PRE_STOP).cloned(),
        resources: linux.map(Limits::from),
        cpus: linux.map(|linux| linux.cpuset_cpus.clone()).unwrap_or_default(),
        user: user.map(|u| User { uid: u.uid, gid: u.gid, groups: u.supplemental_groups }),
        log_path: status.log_path.clone(),
        id: status.id,
    }
}

fn message_source(status: &cri::ContainerStatus, logs: &Path) -> termination::Source {
    let path = status.annotations.get(keys::MESSAGE_PATH);
    let mount = path.and_then(|path| status.mounts.iter().find(|m| m.container_path == *path));
    let fallback = status.annotations.get(keys::MESSAGE_POLICY).is_some_and(|p| p == "FallbackToLogsOnError")
        && status.exit_code != 0
        && status.reason != "ContainerCannotRun";
    let log = Path::new(&status.log_path);
    // Only our own logs are read, whatever a runtime says.
    let log = (fallback && log.starts_with(logs)).then(|| log.to_owned());
    termination::Source { file: mount.map(|m| PathBuf::from(&m.host_path)), log }
}

/// What a cheap listing tells of all pods, by UID.
pub type Listing = BTreeMap<String, Listed>;

/// What a cheap listing tells of one pod: enough to see that something changed, and to end a pod that nobody wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listed {
    /// IDs and states of its sandboxes and containers, sorted.
    pub entries: Vec<(String, i32)>,
    /// It has a sandbox that is ready.
    pub is_ready: bool,
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// Where it came from.
    pub source: Option<String>,
    /// Its grace period, where a container tells it.
    pub grace: Option<i64>,
    /// Names of its containers.
    pub containers: BTreeSet<String>,
}

/// Lists everything that belongs to a pod.
pub async fn list_all(runtime: &Runtime) -> Result<Listing> {
    let mut listing = Listing::new();
    let entry = |listing: &mut Listing, labels: &std::collections::HashMap<String, String>, id: &str, state: i32| {
        let uid = labels.get(keys::POD_UID)?;
        let listed = listing.entry(uid.clone()).or_default();
        let label = |key: &str| labels.get(key).cloned().unwrap_or_default();
        listed.name = label(keys::POD_NAME);
        listed.namespace = label(keys::POD_NAMESPACE);
        listed.entries.push((id.to_owned(), state));
        Some(uid.clone())
    };
    for sandbox in runtime.list_pod_sandboxes(None).await? {
        let uid = entry(&mut listing, &sandbox.labels, &sandbox.id, sandbox.state);
        if let Some(listed) = uid.and_then(|uid| listing.get_mut(&uid)) {
            listed.is_ready |= sandbox.state() == cri::PodSandboxState::SandboxReady;
            listed.source = sandbox.annotations.get(crate::pod::CONFIG_SOURCE).cloned();
        }
    }
    for container in runtime.list_containers(None).await? {
        let uid = entry(&mut listing, &container.labels, &container.id, container.state);
        if let Some(listed) = uid.and_then(|uid| listing.get_mut(&uid)) {
            let grace = container.annotations.get(keys::GRACE).and_then(|g| g.parse().ok());
            listed.grace = listed.grace.max(grace);
            listed.containers.extend(container.metadata.map(|metadata| metadata.name));
        }
    }
    for listed in listing.values_mut() {
        listed.entries.sort();
    }
    Ok(listing)
}
