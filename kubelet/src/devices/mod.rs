//! Device plugins: which devices there are, and which container has which. Owns the folder `device-plugins` with its registration
//! socket and checkpoint. Knows of pods what they ask for; who is let in is the main loop's business.
//!
//! A pod whose resource a plugin has offered before waits for it: after a restart the order in which pods and plugins come is chance. A
//! resource that no plugin has ever offered is not the node's and is ignored, and what a plugin cannot give is refused, as upstream.

mod checkpoint;
mod choose;
mod container;
mod plugin;
mod registration;
mod state;
pub mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::core::v1::{Container, Pod, PodStatus, ResourceHealth, ResourceStatus};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::checkpoint::Checkpoint;
use self::choose::{Choice, Wish, check_kept, choose};
pub(crate) use self::container::Prepared;
use self::plugin::Plugin;
use self::state::State;
use crate::control::PodControl;
use crate::metrics::{Metrics, families};
use crate::pod;
use crate::resources::extended_resources;

/// Why a pod's devices are not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// A plugin is still to come; the text says for what.
    Waits(String),
    /// It cannot be done; the upstream's words.
    Fails(String),
}

impl Refusal {
    fn text(self) -> String {
        let (Refusal::Waits(text) | Refusal::Fails(text)) = self;
        text
    }
}

/// The devices of this node. Clones share them.
#[derive(Clone, Debug)]
pub struct Devices {
    state: Arc<Mutex<State>>,
    /// What the checkpoint has; the lock is held while it is written, so that the newest is written last.
    written: Arc<Mutex<Vec<u8>>>,
    folder: PathBuf,
    boot_id: String,
    control: PodControl,
    metrics: Metrics,
}

/// The folder of plugins' sockets.
pub(crate) fn folder(kubelet_root: &Path) -> PathBuf {
    kubelet_root.join("device-plugins")
}

/// Whether a kubelet has kept here who has which devices: plugins have registered before.
pub(crate) fn has_checkpoint(kubelet_root: &Path) -> bool {
    folder(kubelet_root).join(checkpoint::NAME).exists()
}

/// The devices that a pod's containers hand on to the containers that start after them.
type Reusable = BTreeMap<String, BTreeSet<String>>;

/// One container that asks for devices.
#[derive(Clone, Copy)]
struct Asking<'a> {
    uid: &'a str,
    container: &'a Container,
}

impl Devices {
    /// Goes on from what an earlier kubelet has kept.
    pub(crate) fn load(kubelet_root: &Path, control: PodControl, metrics: Metrics) -> Devices {
        let folder = folder(kubelet_root);
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned();
        let Checkpoint { allocations, registered } = checkpoint::load(&folder, &boot_id);
        let state = State::resume(allocations, registered.into_keys(), Instant::now());
        Devices { state: Arc::new(Mutex::new(state)), written: Arc::default(), folder, boot_id, control, metrics }
    }

    /// Serves registrations and follows the plugins until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        registration::run(self, stop).await;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many devices of each resource there are, and how many of them pods can have.
    pub fn capacity(&self) -> BTreeMap<String, (usize, usize)> {
        self.lock().capacity()
    }

    /// The healthy devices of each resource, with their NUMA nodes.
    pub(crate) fn allocatable(&self) -> Vec<(String, String, Vec<i64>)> {
        let state = self.lock();
        let pools = state.registered();
        let nodes = |name: &str, id: &str| state.resources[name].devices.get(id).map(|d| d.nodes.clone()).unwrap_or_default();
        let all = pools.iter().flat_map(|(name, ids)| ids.iter().map(move |id| (name, id)));
        all.map(|(name, id)| (name.clone(), id.clone(), nodes(name, id))).collect()
    }

    /// The devices of a container by resource and NUMA node, -1 for none.
    pub(crate) fn of(&self, uid: &str, container: &str) -> Vec<(String, BTreeMap<i64, Vec<String>>)> {
        let state = self.lock();
        let resources = state.allocations.get(uid).and_then(|containers| containers.get(container));
        resources.into_iter().flatten().map(|(name, allocation)| (name.clone(), allocation.by_node.clone())).collect()
    }

    /// Takes back the devices of pods that are over.
    pub(crate) fn retain(&self, keep: impl Fn(&str) -> bool) {
        let changed = {
            let mut state = self.lock();
            let forgotten = state.forget_lost(Instant::now());
            state.retain(keep) || forgotten
        };
        if changed {
            let this = self.clone();
            tokio::task::spawn_blocking(move || this.save());
        }
    }

    /// Writes the checkpoint, if it is another than the last. Blocking.
    fn save(&self) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let content = {
            let state = self.lock();
            let checkpoint = Checkpoint { allocations: state.allocations.clone(), registered: state.registered() };
            checkpoint::encode(&checkpoint, &self.boot_id)
        };
        if *written == content {
            return;
        }
        match checkpoint::store(&self.folder, &content) {
            Ok(()) => *written = content,
            Err(error) => tracing::warn!(path = %self.folder.display(), %error, "who has which devices is not kept"),
        }
    }

    async fn save_now(&self) {
        let this = self.clone();
        if let Err(error) = tokio::task::spawn_blocking(move || this.save()).await {
            tracing::warn!(%error, "who has which devices is not kept");
        }
    }

    /// Allocates what all containers of a pod ask for. All of it or nothing; what it has already stays as it is.
    pub(crate) async fn allocate(&self, pod: &Pod) -> Result<(), Refusal> {
        let uid = pod::uid(pod);
        let had = {
            let state = self.lock();
            // Before any plugin is asked for what the pod cannot use yet.
            let mut resources = pod::all_containers(pod).flat_map(extended_resources);
            if let Some((resource, _)) = resources.find(|(resource, _)| state.awaits(resource)) {
                return Err(Refusal::Waits(format!("cannot allocate unregistered device {resource}")));
            }
            state.allocations.get(uid).cloned()
        };
        let mut reusable = Reusable::new();
        for container in pod::all_containers(pod) {
            let init = pod::init_containers(pod).iter().any(|c| c.name == container.name);
            let hands_on = init && !pod::is_sidecar(container);
            if let Err(refusal) = self.allocate_container(Asking { uid, container }, &mut reusable, hands_on).await {
                self.put_back(uid, had);
                self.save_now().await;
                return Err(refusal);
            }
        }
        if self.lock().allocations.contains_key(uid) {
            self.save_now().await;
        }
        Ok(())
    }

    /// Undoes what has been given to a pod since it had this.
    fn put_back(&self, uid: &str, had: Option<BTreeMap<String, BTreeMap<String, state::Allocation>>>) {
        let mut state = self.lock();
        match had {
            Some(had) => _ = state.allocations.insert(uid.to_owned(), had),
            None => _ = state.allocations.remove(uid),
        }
    }

    async fn allocate_container(&self, asking: Asking<'_>, reusable: &mut Reusable, hands_on: bool) -> Result<(), Refusal> {
        for (resource, count) in extended_resources(asking.container) {
            if !self.lock().knows(resource) {
                let container = asking.container.name.as_str();
                tracing::warn!(pod = asking.uid, container, resource, "no plugin has ever offered this resource: it is ignored");
                continue;
            }
            let shared = reusable.entry(resource.to_owned()).or_default();
            let ids = self.allocate_resource(asking, resource, count, shared).await?;
            match hands_on {
                true => shared.extend(ids),
                false => shared.retain(|id| !ids.contains(id)),
            }
        }
        Ok(())
    }

    /// One resource of one container: what it has had, or devices that are chosen now.
    async fn allocate_resource(
        &self,
        asking: Asking<'_>,
        resource: &str,
        count: usize,
        reusable: &BTreeSet<String>,
    ) -> Result<BTreeSet<String>, Refusal> {
        let Asking { uid, container } = asking;
        let kept = {
            let state = self.lock();
            if state.awaits(resource) {
                return Err(Refusal::Waits(format!("cannot allocate unregistered device {resource}")));
            }
            let kept = state.allocation(uid, &container.name, resource).map(|allocation| (allocation.ids(), allocation.stale));
            if let Some((ids, _)) = &kept {
                check_kept(resource, ids, &state.pool(resource)).map_err(Refusal::Fails)?;
            }
            kept
        };
        let ids = match kept {
            Some((ids, false)) => return Ok(ids),
            Some((ids, true)) => ids,
            None => self.choose(resource, count, reusable).await.map_err(Refusal::Fails)?,
        };
        let plugin = self.plugin(resource).map_err(Refusal::Fails);
        let answer = match plugin {
            Ok(plugin) => {
                let begun = Instant::now();
                let answer = plugin.allocate(&ids).await.map_err(Refusal::Fails);
                self.metrics.observe(&families::DEVICE_ALLOCATION_SECONDS, &[resource], begun.elapsed());
                answer
            }
            Err(refusal) => Err(refusal),
        };
        let mut state = self.lock();
        match answer {
            Ok(response) => state.give((uid, &container.name, resource), &ids, response),
            Err(refusal) => {
                state.let_go(resource, &ids);
                return Err(refusal);
            }
        }
        tracing::info!(pod = uid, container = container.name, resource, devices = ?ids, "devices are allocated");
        Ok(ids)
    }

    fn plugin(&self, resource: &str) -> Result<Plugin, String> {
        let plugin = self.lock().plugin(resource);
        plugin.ok_or_else(|| format!("endpoint not found in cache for a registered resource: {resource}"))
    }

    /// Chooses devices and holds them, so that nobody else gets them while the plugin is asked.
    async fn choose(&self, resource: &str, count: usize, reusable: &BTreeSet<String>) -> Result<BTreeSet<String>, String> {
        let wish = Wish { resource, count, reusable };
        let first = {
            let mut state = self.lock();
            let choice = choose(wish, &state.pool(resource), None)?;
            if let Choice::Devices(ids) = &choice {
                state.hold(resource, ids);
            }
            choice
        };
        let (available, certain) = match first {
            Choice::Devices(ids) => return Ok(ids),
            Choice::Several { available, certain } => (available, certain),
        };
        let preferred = self.plugin(resource)?.preferred(&available, &certain, count).await?;
        let mut state = self.lock();
        // What others have taken meanwhile is not there any more.
        match choose(wish, &state.pool(resource), Some(&preferred))? {
            Choice::Devices(ids) => {
                state.hold(resource, &ids);
                Ok(ids)
            }
            Choice::Several { .. } => {
                Err(format!("unexpectedly allocated less resources than required. Requested: {count}, Got: 0"))
            }
        }
    }

    /// What a container that is about to start gets for its devices. Those of before a reboot are made ready again, and those that
    /// nobody knows of any more are chosen anew; the plugin is told of the start, where it wants to be.
    pub(crate) async fn prepare(&self, pod: &Pod, container: &Container) -> Result<Prepared, String> {
        let uid = pod::uid(pod);
        let mut prepared = Prepared::default();
        let mut changed = false;
        for (resource, count) in extended_resources(container) {
            if !self.lock().knows(resource) {
                continue;
            }
            let ready = self.lock().allocation(uid, &container.name, resource).filter(|a| !a.stale).map(state::Allocation::ids);
            let ids = match ready {
                Some(ids) => ids,
                None => {
                    changed = true;
                    let asking = Asking { uid, container };
                    let allocated = self.allocate_resource(asking, resource, count, &BTreeSet::new()).await;
                    allocated.map_err(Refusal::text)?
                }
            };
            // Without its plugin a container starts with what is known, as in the upstream.
            if let Ok(plugin) = self.plugin(resource) {
                plugin.pre_start(&ids).await?;
            }
            let response = self.lock().allocation(uid, &container.name, resource).map(|a| a.response.clone());
            prepared.add(response.unwrap_or_default());
        }
        if changed {
            self.save_now().await;
        }
        Ok(prepared)
    }

    /// Writes the health of the containers' devices into their statuses.
    pub(crate) fn add_health(&self, pod: &Pod, status: &mut PodStatus) {
        let state = self.lock();
        let Some(containers) = state.allocations.get(pod::uid(pod)) else { return };
        for status in status.container_statuses.iter_mut().flatten() {
            let Some(resources) = containers.get(&status.name) else { continue };
            let of_resource = |(name, allocation): (&String, &state::Allocation)| {
                let health = |id: String| ResourceHealth {
                    health: Some(state.health(name, &id).to_owned()),
                    resource_id: id,
                    ..ResourceHealth::default()
                };
                let resources = Some(allocation.ids().into_iter().map(health).collect());
                ResourceStatus { name: name.clone(), resources }
            };
            status.allocated_resources_status = Some(resources.iter().map(of_resource).collect());
        }
    }
}

#[cfg(test)]
mod tests;
