//! The objects that pods of the API refer to: each is followed once for all pods that name it, from the first pass that needs it until
//! the last of the pods is gone. What was read last is served while the API server is away. Writes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures::future::join_all;
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolume, PersistentVolumeClaim, Pod, Secret, ServiceAccount};
use k8s_openapi::api::node::v1::RuntimeClass;
use k8s_openapi::api::scheduling::v1::PriorityClass;
use k8s_openapi::api::storage::v1::CSIDriver;
use kube::Client;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::attach::{self, Attachments};
use super::claims::{self, Claim};
use super::follow::{Held, follow};
use super::node::OwnNode;
use super::offline::{Kept, KeptPod};
use super::services::{Known, Services};
use super::tokens::Tokens;
use super::wanted;
use crate::config::Config;
use crate::control::PodControl;
use crate::env::Variable;
use crate::objects::{Found, ObjectName, Objects, Token};
use crate::pod::{self, PodUid};
use crate::pod_objects::Need;
use crate::status::is_terminal_phase;
use crate::volume::{self, persistent};

/// How long a step waits for the first answer about an object, as the upstream does.
const FIRST_ANSWER: Duration = Duration::from_secs(1);

/// An object that is followed.
struct Entry {
    users: BTreeSet<PodUid>,
    /// What the API server says; `None`: nothing yet.
    answer: Option<Option<Held>>,
    /// A step has given up waiting for the first answer.
    late: bool,
    _following: AbortOnDropHandle<()>,
}

/// What is held for one pod.
#[derive(Default)]
struct Registered {
    /// The objects that its spec names.
    named: BTreeSet<ObjectName>,
    /// Those that its volumes name.
    of_volumes: BTreeSet<ObjectName>,
    /// The volumes of its claims, or why there is none.
    claims: BTreeMap<String, Result<Arc<PersistentVolume>, String>>,
}

#[derive(Default)]
struct Table {
    followed: BTreeMap<ObjectName, Entry>,
    pods: BTreeMap<PodUid, Registered>,
}

/// The objects of an API server, as far as this node's pods refer to them. Clones share them.
#[derive(Clone)]
pub struct ApiObjects(Arc<Shared>);

struct Shared {
    client: Client,
    own: OwnNode,
    control: PodControl,
    table: Mutex<Table>,
    /// Something was answered for the first time.
    answered: watch::Sender<()>,
    tokens: Tokens,
    services: Services,
    attachments: Attachments,
    /// What is on record, while the API server has not been there.
    remembered: Mutex<Option<Arc<Kept>>>,
    /// Told when something is known that was not.
    changed: Notify,
}

impl std::fmt::Debug for ApiObjects {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ApiObjects({} followed)", self.0.table().followed.len())
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in what is said of an object; the workers of pods that use it look again where that changes anything for them.
    fn take(&self, name: &ObjectName, state: Option<Held>) -> ControlFlow<()> {
        let over = state.as_ref().is_some_and(Held::is_immutable);
        let mut table = self.table();
        // Followed by nobody any more: its task is being ended.
        let Some(entry) = table.followed.get_mut(name) else { return ControlFlow::Break(()) };
        let changed = match &entry.answer {
            None => std::mem::take(&mut entry.late),
            Some(before) => *before != state,
        };
        entry.answer = Some(state);
        self.changed.notify_one();
        let users = if changed { entry.users.clone() } else { BTreeSet::new() };
        drop(table);
        self.answered.send_replace(());
        if changed {
            self.control.objects_changed(users);
        }
        if over { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

/// Follows an object for as long as its table is there.
fn start(shared: &Arc<Shared>, name: &ObjectName) -> AbortOnDropHandle<()> {
    let (weak, client, own): (Weak<Shared>, _, _) = (Arc::downgrade(shared), shared.client.clone(), name.clone());
    let tell = move |state| weak.upgrade().map_or(ControlFlow::Break(()), |shared| shared.take(&own, state));
    AbortOnDropHandle::new(tokio::spawn(follow(client, name.clone(), tell)))
}

impl ApiObjects {
    /// Nothing is followed yet but the services; `stop` ends that.
    pub(crate) fn start(
        config: &Config,
        client: Client,
        own: OwnNode,
        control: PodControl,
        stop: &CancellationToken,
    ) -> ApiObjects {
        let mounted = volume::csi::mounted(&config.kubelet_root);
        let attachments = Attachments::new(&config.node_name, own.clone(), mounted);
        let shared = Arc::new(Shared {
            client: client.clone(),
            own,
            control: control.clone(),
            table: Mutex::default(),
            answered: watch::Sender::new(()),
            tokens: Tokens::new(config.clock.clone()),
            services: Services::default(),
            attachments,
            remembered: Mutex::default(),
            changed: Notify::new(),
        });
        let all = Arc::downgrade(&shared);
        let told = control.clone();
        let first = move || {
            // Containers that were not started for want of services are tried again at once.
            let pods = all.upgrade().map(|shared| shared.table().pods.keys().cloned().collect());
            told.objects_changed(pods.unwrap_or_default());
        };
        tokio::spawn(stop.clone().run_until_cancelled_owned(shared.services.clone().run(client, first)));
        let tell = move |pods| control.objects_changed(pods);
        tokio::spawn(stop.clone().run_until_cancelled_owned(shared.tokens.clone().run(tell)));
        ApiObjects(shared)
    }

    /// Of pods that nobody knows, volumes are in use for as long as their folders are there.
    pub(crate) fn forget_strays(&self, known: &[PodUid], kubelet_root: &Path) {
        let strays = self.0.attachments.users().into_iter().filter(|uid| !known.contains(uid));
        for uid in strays.filter(|uid| !volume::pod_dir(kubelet_root, uid.as_str()).exists()) {
            self.0.attachments.release(&uid);
        }
    }

    /// Waits, for a bounded time, until what a step looks up can be looked up.
    pub(crate) async fn ready(&self, pod: &Pod, need: Need<'_>, cancel: &CancellationToken) {
        let Some(uid) = PodUid::of(pod) else { return };
        self.register(&uid, |registered| registered.named = wanted::followed(pod));
        let _ = cancel.run_until_cancelled(self.prepare(&uid, pod, need)).await;
    }

    async fn prepare(&self, uid: &PodUid, pod: &Pod, need: Need<'_>) {
        let names = wanted::needed(pod, need);
        match need {
            Need::Volumes | Need::VolumesAgain => {
                let patience = if matches!(need, Need::Volumes) { attach::PATIENCE } else { Duration::ZERO };
                tokio::join!(self.answers(names), self.prepare_claims(uid, pod, patience));
                let tokens = self.tokens_of(pod);
                self.0.tokens.ensure(&self.0.client, pod, tokens).await;
                self.0.changed.notify_one();
            }
            Need::Environment(_) => {
                let _ = tokio::join!(self.answers(names), tokio::time::timeout(FIRST_ANSWER, self.0.services.listed()));
            }
            Need::RuntimeClass | Need::PullSecrets => self.answers(names).await,
        }
    }

    /// Changes what is held for a pod, and follows what is named from then on and nothing else.
    fn register(&self, uid: &PodUid, change: impl FnOnce(&mut Registered)) {
        let mut table = self.0.table();
        let Table { followed, pods, .. } = &mut *table;
        let registered = pods.entry(uid.clone()).or_default();
        change(registered);
        let wanted: BTreeSet<&ObjectName> = registered.named.union(&registered.of_volumes).collect();
        followed.retain(|name, entry| {
            if !wanted.contains(name) {
                entry.users.remove(uid);
            }
            !entry.users.is_empty()
        });
        let remembered = self.remembered();
        for name in wanted {
            let entry = followed.entry(name.clone()).or_insert_with(|| Entry {
                users: BTreeSet::new(),
                answer: remembered.as_ref().and_then(|kept| kept.objects.get(name).cloned()),
                late: false,
                _following: start(&self.0, name),
            });
            entry.users.insert(uid.clone());
        }
    }

    /// Waits until there is an answer about each, and no longer than is usual.
    async fn answers(&self, names: BTreeSet<ObjectName>) {
        let mut changes = self.0.answered.subscribe();
        let all = async {
            while self.waits_for(&names) {
                if changes.changed().await.is_err() {
                    return;
                }
            }
        };
        if tokio::time::timeout(FIRST_ANSWER, all).await.is_err() {
            let mut table = self.0.table();
            for (_, entry) in table.followed.iter_mut().filter(|(name, entry)| names.contains(name) && entry.answer.is_none()) {
                entry.late = true;
            }
        }
    }

    fn waits_for(&self, names: &BTreeSet<ObjectName>) -> bool {
        let table = self.0.table();
        names.iter().any(|name| table.followed.get(name).is_some_and(|entry| entry.answer.is_none()))
    }

    /// Finds the volumes of the pod's claims, their drivers, and waits until those are attached that have to be.
    async fn prepare_claims(&self, uid: &PodUid, pod: &Pod, patience: Duration) {
        let claims: Vec<Claim> = volume::used(pod)
            .into_iter()
            .filter_map(|volume| {
                let name = persistent::claim_name(pod, volume)?;
                Some(Claim { name, generated: volume.persistent_volume_claim.is_none() })
            })
            .collect();
        if let Some(kept) = self.remembered().as_ref().and_then(|kept| kept.pods.get(uid)) {
            let volumes =
                claims.iter().filter_map(|claim| Some((claim.name.clone(), Ok(kept.volumes.get(&claim.name)?.clone()))));
            self.register(uid, |registered| {
                registered.of_volumes.extend(kept.volumes.values().flat_map(|volume| wanted::of_volume(volume)));
                volumes.for_each(|(claim, volume)| _ = registered.claims.entry(claim).or_insert(volume));
            });
        }
        let known =
            |claim: &Claim| self.0.table().pods.get(uid).is_some_and(|pod| matches!(pod.claims.get(&claim.name), Some(Ok(_))));
        join_all(claims.iter().filter(|claim| !known(claim)).map(|claim| self.find_volume(uid, pod, claim, patience))).await;
    }

    async fn find_volume(&self, uid: &PodUid, pod: &Pod, claim: &Claim, patience: Duration) {
        let found = match claims::bound(&self.0.client, pod, claim).await {
            Ok(volume) => self.usable(uid, volume, patience).await,
            Err(why) => Err(why),
        };
        self.register(uid, |registered| _ = registered.claims.insert(claim.name.clone(), found));
        self.0.changed.notify_one();
    }

    /// The volume when it can be mounted here and now.
    async fn usable(
        &self,
        uid: &PodUid,
        volume: Arc<PersistentVolume>,
        patience: Duration,
    ) -> Result<Arc<PersistentVolume>, String> {
        let Some(handle) = volume::csi::Handle::of(&volume) else { return Ok(volume) };
        let names = wanted::of_volume(&volume);
        self.register(uid, |registered| registered.of_volumes.extend(names.iter().cloned()));
        self.answers(names).await;
        if attach::is_attached(self.csi_driver(&handle.driver)?.as_deref()) {
            let name = volume.metadata.name.as_deref().unwrap_or_default();
            let attached = self.0.attachments.wait(&self.0.client, uid, &handle, patience).await;
            attached.map_err(|why| format!("WaitForAttach failed for volume {name:?} : {why}"))?;
        }
        Ok(volume)
    }

    /// The tokens that the pod's volumes show, and those that the drivers of its volumes ask for.
    fn tokens_of(&self, pod: &Pod) -> BTreeSet<(String, i64)> {
        let mut wanted = wanted::tokens(pod);
        for volume in volume::used(pod) {
            let inline = volume.csi.as_ref().map(|source| source.driver.clone());
            let claimed = || {
                let bound = self.bound_volume(pod, &persistent::claim_name(pod, volume)?)?.ok()?;
                Some(volume::csi::Handle::of(&bound)?.driver)
            };
            let driver = inline.or_else(claimed).and_then(|driver| self.csi_driver(&driver).ok()?);
            let requests = driver.iter().flat_map(|driver| volume::csi::token_requests(driver));
            wanted.extend(requests.map(|(audience, seconds)| (audience.to_owned(), seconds)));
        }
        wanted
    }

    /// The variables of the services that the pod can see.
    pub(crate) fn service_variables(&self, pod: &Pod) -> Result<Vec<Variable>, String> {
        match self.0.services.variables(pod) {
            // The node's own pods do not wait for the API server.
            Err(_) if pod::is_static(pod) => Ok(Vec::new()),
            found => found,
        }
    }

    /// The pod is gone: what only it refers to is not followed any more.
    pub(crate) fn release(&self, uid: &PodUid) {
        let mut table = self.0.table();
        table.pods.remove(uid);
        table.followed.retain(|_, entry| {
            entry.users.remove(uid);
            !entry.users.is_empty()
        });
        drop(table);
        self.0.tokens.release(uid);
        self.0.attachments.release(uid);
    }

    fn remembered(&self) -> Option<Arc<Kept>> {
        self.0.remembered.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The API server is not there: what is on record counts, until it says something else.
    pub(super) fn remember(&self, kept: Arc<Kept>) {
        for (uid, pod) in &kept.pods {
            self.0.tokens.remember(uid, &pod.tokens);
        }
        if let Some(services) = kept.services.clone() {
            self.0.services.remember(services);
        }
        *self.0.remembered.lock().unwrap_or_else(PoisonError::into_inner) = Some(kept);
    }

    /// The API server is there: what it has not said yet is waited for.
    pub(super) fn forget_remembered(&self) {
        let before = self.0.remembered.lock().unwrap_or_else(PoisonError::into_inner).take();
        if before.is_some() {
            let pods: BTreeSet<PodUid> = self.0.table().pods.keys().cloned().collect();
            self.0.tokens.renew(|uid| pods.contains(uid));
        }
    }

    /// Comes back when something may be known that was not.
    pub(super) async fn changed(&self) {
        tokio::select! {
            () = self.0.changed.notified() => {}
            () = self.0.services.changed() => {}
        }
    }

    /// What is known of an object by now; `None`: nothing.
    pub(super) fn known(&self, name: &ObjectName) -> Option<Option<Held>> {
        self.0.table().followed.get(name)?.answer.clone()
    }

    /// The services that pods of these namespaces see.
    pub(super) fn services_seen_from(&self, namespaces: &BTreeSet<&str>) -> Option<Known> {
        self.0.services.seen_from(namespaces)
    }

    /// What is to be kept of a pod: what it has now, and of what it has not asked for yet what it had before.
    pub(super) fn kept_of(&self, uid: &PodUid, pod: &Arc<Pod>, before: Option<&KeptPod>) -> KeptPod {
        let mut kept = KeptPod { pod: pod.clone(), ..KeptPod::default() };
        if is_terminal_phase(pod.status.as_ref().and_then(|status| status.phase.as_deref())) {
            // It needs nothing any more.
            return kept;
        }
        kept.names = wanted::followed(pod);
        let claims = || volume::used(pod).into_iter().filter_map(|volume| persistent::claim_name(pod, volume));
        let table = self.0.table();
        let registered = table.pods.get(uid);
        for claim in claims() {
            let now = registered.and_then(|registered| registered.claims.get(&claim)?.clone().ok());
            if let Some(volume) = now.or_else(|| before?.volumes.get(&claim).cloned()) {
                kept.names.extend(wanted::of_volume(&volume));
                kept.volumes.insert(claim, volume);
            }
        }
        drop(table);
        kept.tokens = before.map(|before| before.tokens.clone()).unwrap_or_default();
        let wanted = wanted::tokens(pod);
        kept.tokens.extend(self.0.tokens.of(uid));
        if kept.volumes.is_empty() && volume::used(pod).into_iter().all(|volume| volume.csi.is_none()) {
            // No driver asks for any.
            kept.tokens.retain(|token, _| wanted.contains(token));
        }
        kept
    }

    /// What is known of an object that is followed.
    fn held(&self, name: &ObjectName) -> Result<Option<Held>, String> {
        let table = self.0.table();
        let Some(entry) = table.followed.get(name) else {
            return Err(format!("object {:?}/{:?} not registered", name.namespace, name.name));
        };
        let unknown = || format!("failed to sync {} cache: timed out waiting for the condition", name.kind.to_lowercase());
        entry.answer.clone().ok_or_else(unknown)
    }
}

impl Objects for ApiObjects {
    fn config_map(&self, namespace: &str, name: &str) -> Found<ConfigMap> {
        let name = ObjectName { kind: "ConfigMap", namespace: namespace.to_owned(), name: name.to_owned() };
        Ok(self.held(&name)?.and_then(|held| if let Held::ConfigMap(map) = held { Some(map) } else { None }))
    }

    fn secret(&self, namespace: &str, name: &str) -> Found<Secret> {
        let name = ObjectName { kind: "Secret", namespace: namespace.to_owned(), name: name.to_owned() };
        Ok(self.held(&name)?.and_then(|held| if let Held::Secret(secret) = held { Some(secret) } else { None }))
    }

    fn runtime_class(&self, name: &str) -> Found<RuntimeClass> {
        let name = ObjectName { kind: "RuntimeClass", namespace: String::new(), name: name.to_owned() };
        Ok(self.held(&name)?.and_then(|held| if let Held::RuntimeClass(class) = held { Some(class) } else { None }))
    }

    /// The API server's admission has put into the pod what it gives.
    fn priority_class(&self, _name: &str) -> Option<Arc<PriorityClass>> {
        None
    }

    /// The API server's admission has put its pull secrets into the pod.
    fn service_account(&self, _namespace: &str, _name: &str) -> Option<Arc<ServiceAccount>> {
        None
    }

    fn claim(&self, _namespace: &str, _name: &str) -> Option<Arc<PersistentVolumeClaim>> {
        None
    }

    fn persistent_volume(&self, _name: &str) -> Option<Arc<PersistentVolume>> {
        None
    }

    fn persistent_volumes(&self) -> Vec<Arc<PersistentVolume>> {
        Vec::new()
    }

    fn default_storage_class(&self) -> Option<String> {
        None
    }

    fn csi_driver(&self, name: &str) -> Found<CSIDriver> {
        let name = wanted::csi_driver(name);
        Ok(self.held(&name)?.and_then(|held| if let Held::CsiDriver(driver) = held { Some(driver) } else { None }))
    }

    fn bound_volume(&self, pod: &Pod, claim: &str) -> Option<Result<Arc<PersistentVolume>, String>> {
        let table = self.0.table();
        let known = PodUid::of(pod).and_then(|uid| table.pods.get(&uid)?.claims.get(claim).cloned());
        let unknown = || Err(format!("error processing PVC {}/{claim}: it has not been asked for", pod::namespace(pod)));
        Some(known.unwrap_or_else(unknown))
    }

    fn node_labels(&self, node: &str) -> BTreeMap<String, String> {
        self.0.own.labels(node)
    }

    fn token(&self, pod: &Pod, audience: &str, seconds: i64) -> Result<Arc<Token>, String> {
        self.0.tokens.get(pod, audience, seconds)
    }

    fn publish_context(&self, driver: &str, handle: &str) -> BTreeMap<String, String> {
        self.0.attachments.publish_context(&volume::csi::Handle { driver: driver.to_owned(), handle: handle.to_owned() })
    }
}

#[cfg(test)]
mod tests;
