//! The pods that the kubelet knows, with their current status: written by the workers, read by the API.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::doing::Doing;
use crate::memory::Reason;
use crate::metrics::{Metrics, families, own};
use crate::pod::PodUid;

/// A shared table of pods.
#[derive(Clone, Debug, Default)]
pub struct PodTable {
    pods: Arc<Mutex<BTreeMap<PodUid, Entry>>>,
    troubles: Troubles,
    doing: Doing,
    /// Pods that are to end, whoever wants it.
    ending: Arc<Mutex<BTreeSet<PodUid>>>,
    /// Pods that have been seen and do not run yet, and since when.
    starting: Arc<Mutex<BTreeMap<PodUid, Instant>>>,
    /// Pods that were asked to go and of which nothing is left here.
    finished: Arc<Mutex<BTreeSet<PodUid>>>,
    changes: Arc<Changes>,
    metrics: Metrics,
}

/// Which pods have changed since somebody last asked, where anybody asks.
#[derive(Debug, Default)]
struct Changes {
    followed: AtomicBool,
    uids: Mutex<BTreeSet<PodUid>>,
    told: Notify,
}

impl Changes {
    fn add(&self, uid: &PodUid) {
        if self.followed.load(Ordering::Relaxed) {
            self.uids.lock().unwrap_or_else(PoisonError::into_inner).insert(uid.clone());
            self.told.notify_one();
        }
    }
}

/// A pod and its status as the table holds them.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    pub pod: Arc<Pod>,
    pub status: Arc<PodStatus>,
    /// It was asked to go, and nothing of it is left here.
    pub finished: bool,
}

/// A pod as its worker reads it, and its status: put together only for who asks, as one more copy of each spec is KiBs.
#[derive(Clone, Debug)]
struct Entry {
    pod: Arc<Pod>,
    status: Arc<PodStatus>,
}

impl Entry {
    fn whole(&self) -> Arc<Pod> {
        let Pod { metadata, spec, status: _ } = self.pod.as_ref();
        Arc::new(Pod { metadata: metadata.clone(), spec: spec.clone(), status: Some(PodStatus::clone(&self.status)) })
    }
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

    fn lock(&self) -> MutexGuard<'_, BTreeMap<PodUid, Entry>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores a pod with its status.
    pub fn set(&self, uid: &PodUid, pod: &Arc<Pod>, status: PodStatus) {
        self.measure_start(uid, status.phase.as_deref());
        {
            let mut pods = self.lock();
            if pods.get(uid).is_some_and(|known| Arc::ptr_eq(&known.pod, pod) && *known.status == status) {
                return;
            }
            pods.insert(uid.clone(), Entry { pod: pod.clone(), status: Arc::new(status) });
        }
        self.changes.add(uid);
    }

    /// From now on changes are kept for [`PodTable::changed`]: one asks for them.
    pub(crate) fn follow(&self) {
        self.changes.followed.store(true, Ordering::Relaxed);
    }

    /// The pods that have changed since this was last asked, once there are any.
    pub(crate) async fn changed(&self) -> BTreeSet<PodUid> {
        loop {
            let changed = std::mem::take(&mut *self.changes.uids.lock().unwrap_or_else(PoisonError::into_inner));
            if !changed.is_empty() {
                return changed;
            }
            self.changes.told.notified().await;
        }
    }

    /// A pod and its status, shared.
    pub(crate) fn known(&self, uid: &PodUid) -> Option<Known> {
        let Entry { pod, status } = self.lock().get(uid).cloned()?;
        let finished = self.finished.lock().unwrap_or_else(PoisonError::into_inner).contains(uid);
        Some(Known { pod, status, finished })
    }

    /// The UIDs of all pods.
    pub(crate) fn uids(&self) -> BTreeSet<PodUid> {
        self.lock().keys().cloned().collect()
    }

    /// Whether there is a pod for which this holds.
    pub(crate) fn any(&self, holds: impl Fn(&Pod) -> bool) -> bool {
        self.lock().values().any(|entry| holds(&entry.pod))
    }

    /// A pod that was asked to go has gone, but for its records and what is said of it.
    pub(crate) fn set_finished(&self, uid: &PodUid) {
        if self.finished.lock().unwrap_or_else(PoisonError::into_inner).insert(uid.clone()) {
            self.changes.add(uid);
        }
    }

    /// A pod's status.
    pub fn status(&self, uid: &PodUid) -> Option<PodStatus> {
        self.lock().get(uid).map(|entry| PodStatus::clone(&entry.status))
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
        self.finished.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
        self.doing.forget(uid);
        self.starting.lock().unwrap_or_else(PoisonError::into_inner).remove(uid);
        if self.lock().remove(uid).is_some() {
            self.changes.add(uid);
        }
        own::forget_probes(&self.metrics, &self.list());
    }

    /// All pods, by namespace and name.
    pub fn list(&self) -> Vec<Arc<Pod>> {
        self.each().collect()
    }

    /// The same, one after the other: whoever needs each for a moment only does not need room for all.
    pub fn each(&self) -> impl Iterator<Item = Arc<Pod>> + use<> {
        self.entries().map(|entry| entry.whole())
    }

    fn entries(&self) -> impl Iterator<Item = Entry> + use<> {
        let mut entries: Vec<_> = self.lock().values().cloned().collect();
        entries.sort_by(|a, b| {
            let key = |entry: &Entry| {
                let m = &entry.pod.metadata;
                (m.namespace.clone(), m.name.clone(), m.uid.clone())
            };
            key(a).cmp(&key(b))
        });
        entries.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::text::Text;

    #[test]
    fn a_pods_spec_is_held_once_and_shown_with_its_status_in_the_order_of_names() {
        let table = PodTable::default();
        let mut made = Vec::new();
        for (uid, name) in [("1", "b"), ("2", "a")] {
            let mut pod = Pod::default();
            pod.metadata.name = Some(name.to_owned());
            pod.metadata.uid = Some(uid.to_owned());
            let (pod, uid) = (Arc::new(pod), PodUid::new(uid).unwrap());
            let status = PodStatus { phase: Some("Running".to_owned()), ..PodStatus::default() };
            table.set(&uid, &pod, status);
            assert_eq!(Arc::strong_count(&pod), 2, "the table's is no copy");
            made.push(pod);
        }
        let listed = table.list();
        let names: Vec<_> = listed.iter().map(|pod| pod.metadata.name.as_deref().unwrap()).collect();
        assert_eq!(names, ["a", "b"]);
        assert!(listed.iter().all(|pod| pod.status.as_ref().unwrap().phase.as_deref() == Some("Running")));
        assert_eq!(table.each().count(), 2);
        table.remove(&PodUid::new("1").unwrap());
        assert_eq!(Arc::strong_count(&made[0]), 1);
        assert_eq!(table.status(&PodUid::new("1").unwrap()), None);
    }

    #[test]
    fn a_pods_probes_are_forgotten_with_it_though_nobody_reads_them() {
        let metrics = Metrics::default();
        let table = PodTable::counted(metrics.clone());
        let uids = ["old", "new"].map(|uid| PodUid::new(uid).unwrap());
        for uid in &uids {
            let mut pod = Pod::default();
            (pod.metadata.name, pod.metadata.namespace) = (Some("web".into()), Some("default".into()));
            pod.metadata.uid = Some(uid.to_string());
            table.set(uid, &Arc::new(pod), PodStatus::default());
            metrics.count(&families::PROBES, &["Liveness", "successful", "c", "web", "default", &uid.to_string()]);
        }
        table.remove(&uids[0]);
        let mut page = Text::whole();
        own::write_probes(&metrics, &mut page);
        let page = page.into_string();
        assert!(page.contains("pod_uid=\"new\"") && !page.contains("pod_uid=\"old\""), "{page}");
    }
}
