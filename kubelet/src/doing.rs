//! What the kubelet is doing for containers, and has done to them, that no field of a status has: pulls under way, and which probe
//! had a run stopped. Written by who does it, read by `/problems`. Decides nothing.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

use crate::observed::whole_second;
use crate::pod::PodUid;

/// By pod and container: the image, and since when it is pulled.
type Pulls = BTreeMap<(PodUid, String), (String, Timestamp)>;

#[derive(Debug, Default)]
struct Known {
    pulls: Pulls,
    /// By pod: containers' ids, with the probe (or `postStart`) that had them stopped.
    condemned: BTreeMap<PodUid, BTreeMap<String, &'static str>>,
}

/// What is being done. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Doing(Arc<Mutex<Known>>);

/// A pull under way: dropped, it is over, whatever became of it.
#[derive(Debug)]
pub(crate) struct Pulling {
    doing: Doing,
    key: (PodUid, String),
}

impl Drop for Pulling {
    fn drop(&mut self) {
        self.doing.lock().pulls.remove(&self.key);
    }
}

impl Doing {
    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A container's image is being pulled until what is returned is dropped. A container pulls one image at a time.
    pub(crate) fn pull(&self, uid: &PodUid, container: &str, image: &str, since: Timestamp) -> Pulling {
        let key = (uid.clone(), container.to_owned());
        self.lock().pulls.insert(key.clone(), (image.to_owned(), whole_second(since)));
        Pulling { doing: self.clone(), key }
    }

    /// Which of the pod's containers a probe had stopped.
    pub(crate) fn set_condemned(&self, uid: &PodUid, condemned: &BTreeMap<String, &'static str>) {
        let mut known = self.lock();
        match condemned.is_empty() {
            true => _ = known.condemned.remove(uid),
            false => _ = known.condemned.insert(uid.clone(), condemned.clone()),
        }
    }

    /// Forgets a pod that is gone; its pulls end by themselves.
    pub(crate) fn forget(&self, uid: &PodUid) {
        self.lock().condemned.remove(uid);
    }

    /// `{UID: {"pulling": {CONTAINER: {"image", "since"}}, "condemned": {CONTAINER ID: PROBE}}}`
    pub(crate) fn as_json(&self) -> Value {
        let known = self.lock();
        let mut pods = serde_json::Map::new();
        for ((uid, container), (image, since)) in &known.pulls {
            let pod = pods.entry(uid.as_str()).or_insert_with(|| json!({}));
            pod["pulling"][container] = json!({"image": image, "since": since.to_string()});
        }
        for (uid, condemned) in &known.condemned {
            let pod = pods.entry(uid.as_str()).or_insert_with(|| json!({}));
            pod["condemned"] = json!(condemned);
        }
        Value::Object(pods)
    }
}
