//! Life without the API server: what it last said of this node's pods is on disk, with the objects they refer to, and is what the node
//! goes by when it starts and the server does not answer. Decides when that is; what a pod needs is its worker's business as ever.

mod keep;
mod key;
mod plan;
mod record;
mod seal;
mod store;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use self::key::KeyPlaces;
pub(super) use self::record::{Kept, KeptPod};
pub use self::seal::{SealingKey, new_key};
use self::store::{Loaded, Store};
use super::node::OwnNode;
use super::objects::ApiObjects;
use crate::Result;
use crate::clock::Clock;
use crate::config::Config;
use crate::pod::PodUid;
use crate::source::{SourceName, SourceUpdate, Withheld};

/// How the node lives without its API server.
#[derive(Clone, Debug)]
pub struct OfflineSettings {
    /// Without one nothing secret is kept, and pods that need it do not start.
    pub key: Option<SealingKey>,
    /// How long after the last contact with the API server pods may still be started; `None`: however long.
    pub max_age: Option<Duration>,
    /// How long the API server is waited for at the start.
    pub patience: Duration,
}

impl Default for OfflineSettings {
    fn default() -> Self {
        // An API server that is there tells a node's pods within a second.
        OfflineSettings { key: None, max_age: None, patience: Duration::from_secs(3) }
    }
}

type Pods = BTreeMap<PodUid, Arc<Pod>>;

/// What is on record, and how it comes there.
#[derive(Clone, Debug)]
pub(super) struct Offline {
    settings: OfflineSettings,
    store: Store,
    objects: ApiObjects,
    own: OwnNode,
    clock: Clock,
    /// Who keeps the records: the source ends after it.
    keeper: TaskTracker,
    /// The pods that the API server has, once it has told all of them.
    pods: watch::Sender<Option<Arc<Pods>>>,
}

impl Offline {
    pub(super) fn new(config: &Config, objects: ApiObjects, own: OwnNode) -> Offline {
        let settings = config.offline.clone();
        let store = Store::below(&config.kubelet_root, settings.key.clone());
        Offline {
            settings,
            store,
            objects,
            own,
            clock: config.clock.clone(),
            keeper: TaskTracker::new(),
            pods: watch::Sender::new(None),
        }
    }

    /// Until the records are as they should be, after `stop`.
    pub(super) async fn kept(&self) {
        self.keeper.close();
        self.keeper.wait().await;
    }

    /// The pods that start without the API server, and those that do not.
    fn offer(&self, loaded: &Loaded) -> (Vec<Arc<Pod>>, Vec<Withheld>) {
        let judge = plan::Judge { has_key: self.store.has_key(), max_age: self.settings.max_age, now: self.clock.now() };
        let (mut offered, mut withheld) = (Vec::new(), Vec::new());
        for (uid, kept) in &loaded.kept.pods {
            match plan::withhold(loaded, uid, kept, judge) {
                None => offered.push(kept.pod.clone()),
                Some(one) => withheld.push(one),
            }
        }
        self.objects.remember(Arc::new(loaded.kept.clone()));
        (offered, withheld)
    }
}

/// Forgets what a cluster last said: the node is none of it any more.
///
/// # Errors
/// When a record cannot be removed.
pub fn forget(kubelet_root: &Path) -> Result<()> {
    Store::below(kubelet_root, None).remove()
}

/// What was on record when the node started, until the API server has told what there is.
#[derive(Debug)]
pub(super) struct Records {
    offline: Offline,
    loaded: Option<Loaded>,
    offer_at: Option<Instant>,
}

impl Records {
    /// Reads them.
    pub(super) async fn load(offline: Offline) -> Records {
        let offer_at = Instant::now() + offline.settings.patience;
        let store = offline.store.clone();
        let loaded = tokio::task::spawn_blocking(move || store.load()).await.unwrap_or_default();
        if let Some(node) = loaded.kept.node.clone() {
            offline.own.remember(node);
        }
        let offer_at = Some(offer_at).filter(|_| !loaded.kept.pods.is_empty());
        Records { offline, loaded: Some(loaded), offer_at }
    }

    /// The pods as they were last accepted.
    pub(super) fn pods(&self) -> Pods {
        let kept = self.loaded.iter().flat_map(|loaded| &loaded.kept.pods);
        kept.map(|(uid, kept)| (uid.clone(), kept.pod.clone())).collect()
    }

    /// When the API server has been waited for long enough.
    pub(super) fn offer_at(&self) -> Option<Instant> {
        self.offer_at
    }

    /// The API server is telling its pods just now: it is waited for from this moment.
    pub(super) fn put_off(&mut self) {
        let patience = self.offline.settings.patience;
        self.offer_at = self.offer_at.map(|_| Instant::now() + patience);
    }

    /// What the node goes by until the API server is there.
    pub(super) fn offer(&mut self) -> Option<SourceUpdate> {
        self.offer_at = None;
        let (pods, withheld) = self.offline.offer(self.loaded.as_ref()?);
        tracing::warn!(
            pods = pods.len(),
            withheld = withheld.len(),
            "the API server has not answered: the node goes by what it last said"
        );
        Some(SourceUpdate {
            source: SourceName::Api,
            pods,
            fresh: BTreeSet::new(),
            objects: Vec::new(),
            problems: Vec::new(),
            rejected: Vec::new(),
            is_remembered: true,
            withheld,
        })
    }

    /// These are all the pods that the API server has; from the first time on the records follow what it says.
    pub(super) fn set_pods(&mut self, pods: &Pods, stop: &CancellationToken) {
        self.offer_at = None;
        if let Some(loaded) = self.loaded.take() {
            self.offline.objects.forget_remembered();
            let keeper = keep::Keeper::new(self.offline.clone(), loaded.kept);
            self.offline.keeper.spawn(keeper.run(stop.clone()));
        }
        self.offline.pods.send_replace(Some(Arc::new(pods.clone())));
    }
}
