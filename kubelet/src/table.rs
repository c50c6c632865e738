//! The pods that the kubelet knows, with their current status: written by the workers, read by the API.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::time::Instant;

use crate::doing::Doing;
use crate::memory::Reason;
use crate::metrics::{Metrics, families};
use crate::pod::PodUid;

/// A shared table of pods.
#[derive(Clone, Debug, Default)]
pub struct PodTable {
    pods: Arc<Mutex<BTreeMap<PodUid, Arc<Pod>>>>,
    troubles: Troubles,
    doing: Doing,
    /// Pods that are to end, whoever wants it.
    ending: Arc<Mutex<BTreeSet<PodUid>>>,
    /// Pods that have been seen and do not run yet, and since when.
    starting: Arc<Mutex<BTreeMap<PodUid, Instant>>>,
    metrics: Metrics,
}

/// What keeps whole pods from going on and is in no field of their statuses: upstream tells it by events alone.
type Troubles = Arc<Mutex<BTreeMap<PodUid, Reason>>>;

impl PodTable {
    /// A table whose pods' starts are counted there.
    pub fn counted(metrics: Metrics) -> PodTable {
        PodTable { metrics, ..PodTable::default() }
    }

    /// A pod that ran when it was first seen has not been started by this kubelet.
    fn measure_start(&self, uid: &PodUid, phase: Option<&str>) {
        let mut starting = self.starting.lock().unwrap_or_else(PoisonError::into_inner);
        if phase == Some("Pending") {
            starting.entry(uid.clone()).or_insert_with(Instant::now);
        } else if let Some(since) = starting.remove(uid)
            && phase == Some("Running")
        {
            self.metrics.observe(&families::POD_START_SECONDS, &[], since.elapsed());
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PodUid, Arc<Pod>>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores a pod with its status.
    pub fn set(&self, uid: &PodUid, pod: &Pod, status: PodStatus) {
        self.measure_start(uid, status.phase.as_deref());
        let pod = Pod { status: Some(status), ..pod.clone() };
        self.lock().insert(uid.clone(), Arc::new(pod));
    }

    /// A pod's status.
    pub fn status(&self, uid: &PodUid) -> Option<PodStatus> {
        self.lock().get(uid).and_then(|pod| pod.status.clone())
    }

    /// Says what keeps a pod from going on; none: nothing does.
    pub fn set_trouble(&self, uid: &PodUid, trouble: Option<&Reason>) {
        let mut troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        match trouble {
            Some(trouble) => _ = troubles.insert(uid.clone(), trouble.clone()),
            None => _ = troubles.remove(uid),
        }
    }

    /// What keeps pods from going on.
    pub fn troubles(&self) -> BTreeMap<PodUid, Reason> {
        self.troubles.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Says whether a pod is to end.
    pub fn set_ending(&self, uid: &PodUid, ends: bool) {
        let mut ending = self.ending.lock().unwrap_or_else(PoisonError::into_inner);
        match ends {
            true => _ = ending.insert(uid.clone()),
            false => _ = ending.remove(uid),
        }
    }

    /// Whether a pod is to end.
    pub fn is_ending(&self, uid: &PodUid) -> bool {
        self.ending.lock().unwrap_or_else(PoisonError::into_inner).contains(uid)
    }

    /// What is being done for the pods' containers.
    pub fn doing(&self) -> Doing {
        self.doing.clone()
    }

    /// Forgets a pod.
    pub fn remove(&self, uid: &PodUid) {
        self.set_trouble(uid, None);
        self.set_ending(uid, false);
        self.doing.forget(uid);
        self.starting.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
        self.lock().remove(uid);
    }

    /// All pods, by namespace and name.
    pub fn list(&self) -> Vec<Arc<Pod>> {
        let mut pods: Vec<_> = self.lock().values().cloned().collect();
        pods.sort_by(|a, b| {
            let key = |p: &Pod| (p.metadata.namespace.clone(), p.metadata.name.clone(), p.metadata.uid.clone());
            key(a).cmp(&key(b))
        });
        pods
    }
}
