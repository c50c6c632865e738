//! The CPU manager's static policy: containers of Guaranteed pods that ask for whole processors get some for themselves, all others
//! share the rest. Owns `cpu_manager_state`. That running containers follow is for their workers to see to.

mod state;
mod take;
mod topology;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::core::v1::{Container, Pod};

use self::state::{CpuState, NAME};
use self::take::take;
use self::topology::{CpuSet, Topology, format_cpu_list};
use crate::admission::Rejection;
use crate::config::{Config, CpuPolicy};
use crate::control::PodControl;
use crate::metrics::{Metrics, families};
use crate::pod;
use crate::resources::exclusive_cpus;
use crate::{Error, Result, atomic_file};

/// The processors of this node, as the static policy gives them out; with the policy `none` nothing. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Cpus(Option<Arc<Inner>>);

#[derive(Debug)]
struct Inner {
    topology: Topology,
    reserved: CpuSet,
    full_cores: bool,
    state: Mutex<CpuState>,
    /// Held while the file is written, so that the newest is written last.
    written: Mutex<Vec<u8>>,
    path: PathBuf,
    control: PodControl,
    metrics: Metrics,
}

impl Cpus {
    /// Goes on from what an earlier kubelet has kept.
    ///
    /// # Errors
    /// A file or a reservation that does not fit the machine or the policy.
    pub(crate) fn load(config: &Config, control: PodControl, metrics: Metrics) -> Result<Cpus> {
        let path = config.kubelet_root.join(NAME);
        let failed = |problem: String| Error::CpuManager { path: path.clone(), problem };
        let policy = if config.cpu_manager.policy == CpuPolicy::Static { "static" } else { "none" };
        let kept = match fs::read(&path) {
            Ok(text) => CpuState::decode(&text, policy).map_err(failed)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(Error::ReadFile { path, source }),
        };
        if config.cpu_manager.policy == CpuPolicy::None {
            return Ok(Cpus(None));
        }
        let topology = Topology::read(&config.sys_devices).map_err(failed)?;
        let reserved = reserved(config, &topology).map_err(|problem| Error::Config { field: "reservations", problem })?;
        let state = kept.unwrap_or_else(|| CpuState { shared: topology.all(), ..CpuState::default() });
        state.check(&topology.all(), &reserved).map_err(failed)?;
        tracing::info!(
            reserved = format_cpu_list(&reserved),
            shared = format_cpu_list(&state.shared),
            threads = topology.threads(),
            "processors are given to containers for themselves"
        );
        let cpus = Cpus(Some(Arc::new(Inner {
            topology,
            reserved,
            full_cores: config.cpu_manager.full_cores,
            state: Mutex::new(state),
            written: Mutex::default(),
            path,
            control,
            metrics,
        })));
        cpus.save();
        Ok(cpus)
    }

    /// What a container is to run on, as a list; `None` where processors are not managed.
    pub(crate) fn list_of(&self, uid: &str, container: &str) -> Option<String> {
        let inner = self.0.as_ref()?;
        let state = inner.lock();
        Some(format_cpu_list(state.own(uid, container).unwrap_or(&state.shared)))
    }

    /// What each container of a pod is to run on; nothing where processors are not managed.
    pub(crate) fn lists_of(&self, pod: &Pod) -> BTreeMap<String, String> {
        let list = |c: &Container| Some((c.name.clone(), self.list_of(pod::uid(pod), &c.name)?));
        pod::all_containers(pod).filter_map(list).collect()
    }

    /// What a container has for itself.
    pub(crate) fn own(&self, uid: &str, container: &str) -> Vec<u32> {
        let Some(inner) = &self.0 else { return Vec::new() };
        inner.lock().own(uid, container).into_iter().flatten().copied().collect()
    }

    /// What containers could have for themselves.
    pub(crate) fn allocatable(&self) -> Vec<u32> {
        let Some(inner) = &self.0 else { return Vec::new() };
        inner.topology.all().difference(&inner.reserved).copied().collect()
    }

    /// Whether a container of the pod is to get processors for itself and has none.
    pub(crate) fn lacks(&self, pod: &Pod) -> bool {
        let Some(inner) = &self.0 else { return false };
        let state = inner.lock();
        pod::all_containers(pod).any(|c| exclusive_cpus(pod, c) > 0 && state.own(pod::uid(pod), &c.name).is_none())
    }

    /// Whether a container's processors are as many as it asks for now: they do not change while it runs.
    pub(crate) fn fits(&self, pod: &Pod, container: &Container) -> bool {
        self.0.is_none() || self.own(pod::uid(pod), &container.name).len() == exclusive_cpus(pod, container)
    }

    /// Gives the pod's containers what they ask for, all of it or nothing, and keeps it on disk. Blocking.
    pub(crate) fn allocate(&self, pod: &Pod) -> std::result::Result<(), Rejection> {
        let Some(inner) = &self.0 else { return Ok(()) };
        {
            let mut state = inner.lock();
            let next = inner.plan(&state, pod)?;
            if next == *state {
                return Ok(());
            }
            *state = next;
        }
        self.save();
        inner.control.cpus_changed();
        Ok(())
    }

    /// Takes back the processors of pods that are over.
    pub(crate) fn retain(&self, keep: impl Fn(&str) -> bool) {
        let Some(inner) = &self.0 else { return };
        if inner.lock().retain(keep) {
            let this = self.clone();
            tokio::task::spawn_blocking(move || this.save());
            inner.control.cpus_changed();
        }
    }

    /// Writes the file, if it is another than the last. Blocking.
    fn save(&self) {
        let Some(inner) = &self.0 else { return };
        let mut written = inner.written.lock().unwrap_or_else(PoisonError::into_inner);
        let content = {
            let state = inner.lock();
            inner.measure(&state);
            state.encode()
        };
        if *written == content {
            return;
        }
        match atomic_file::replace(&inner.path, &content, 0o600) {
            Ok(()) => *written = content,
            Err(error) => tracing::warn!(path = %inner.path.display(), %error, "who has which processors is not kept"),
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, CpuState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells how many processors are free and how many are given away.
    fn measure(&self, state: &CpuState) {
        let own: CpuSet = state.entries.values().flat_map(BTreeMap::values).flatten().copied().collect();
        let free = state.shared.difference(&self.reserved).count();
        self.metrics.set(&families::SHARED_POOL, &[], free as u64 * 1000);
        self.metrics.set(&families::EXCLUSIVE_CPUS, &[], own.len() as u64);
    }

    /// The state with what the pod's containers ask for; init containers hand theirs on to those that come after them.
    fn plan(&self, state: &CpuState, pod: &Pod) -> std::result::Result<CpuState, Rejection> {
        let mut next = state.clone();
        let mut reusable = CpuSet::new();
        for container in pod::all_containers(pod) {
            let count = exclusive_cpus(pod, container);
            if count == 0 {
                continue;
            }
            let own = match next.own(pod::uid(pod), &container.name) {
                Some(own) => own.clone(),
                None => {
                    self.metrics.count(&families::PINNING_REQUESTS, &[]);
                    let chosen = self.choose(&next, &reusable, count);
                    chosen.inspect_err(|_| self.metrics.count(&families::PINNING_ERRORS, &[]))?
                }
            };
            let init = pod::init_containers(pod).iter().any(|c| c.name == container.name);
            match init && !pod::is_sidecar(container) {
                true => reusable.extend(&own),
                false => reusable.retain(|cpu| !own.contains(cpu)),
            }
            next.shared.retain(|cpu| !own.contains(cpu));
            next.entries.entry(pod::uid(pod).to_owned()).or_default().insert(container.name.clone(), own);
        }
        Ok(next)
    }

    fn choose(&self, state: &CpuState, reusable: &CpuSet, count: usize) -> std::result::Result<CpuSet, Rejection> {
        let available: CpuSet = state.shared.difference(&self.reserved).chain(reusable).copied().collect();
        if self.full_cores {
            let threads = self.topology.threads();
            if !count.is_multiple_of(threads) {
                let text = format!("SMT Alignment Error: requested {count} cpus not multiple cpus per core = {threads}");
                return Err(Rejection::new("SMTAlignmentError", text));
            }
            let broken = self.topology.whole_cores(&self.reserved);
            let whole = state.shared.difference(&broken).chain(reusable).collect::<std::collections::BTreeSet<_>>().len();
            if count > whole {
                let text = format!(
                    "SMT Alignment Error: not enough free physical CPUs: available physical CPUs = {whole}, requested CPUs = {count}, CPUs per core = {threads}"
                );
                return Err(Rejection::new("SMTAlignmentError", text));
            }
        }
        take(&self.topology, &available, count).map_err(|why| {
            Rejection::new("UnexpectedAdmissionError", format!("Allocate failed due to {why}, which is unexpected"))
        })
    }
}

/// The processors that no container gets for itself: those of `reservedSystemCPUs`, else as many as are reserved, rounded up.
fn reserved(config: &Config, topology: &Topology) -> std::result::Result<CpuSet, String> {
    if let Some(cpus) = &config.reservations.cpus {
        let (wanted, there) = (format_cpu_list(cpus), format_cpu_list(&topology.all()));
        let known = cpus.is_subset(&topology.all());
        return known
            .then(|| cpus.clone())
            .ok_or_else(|| format!("reservedSystemCPUs {wanted} are not all among the machine's {there}"));
    }
    let count = usize::try_from(config.reservations.of("cpu").units()).unwrap_or(0);
    if count == 0 {
        return Err("the static policy requires systemreserved.cpu + kubereserved.cpu to be greater than zero".to_owned());
    }
    take(topology, &topology.all(), count).map_err(|why| format!("unable to reserve the required amount of CPUs: {why}"))
}

#[cfg(test)]
mod tests;
