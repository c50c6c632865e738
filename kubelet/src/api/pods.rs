//! The source of pods that the API server has for this node: one watch, kept as a whole set. Pods come as the server has them, but for
//! what is of no use here. Also what the server was last seen to have of each (its status, whether it is a mirror), for those who write
//! there. Decides nothing about pods, writes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::runtime::watcher::{self, Event, watcher};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::node::OwnNode;
use super::offline::{Offline, Records};
use crate::clock::Clock;
use crate::pod::{self, CONFIG_HASH, CONFIG_MIRROR, CONFIG_SEEN, CONFIG_SOURCE, FullName, PodUid};
use crate::source::{SourceName, SourceUpdate};
use crate::status::is_terminal_phase;

/// The first pause after a failure; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// The longest: a server that comes back is noticed within this, and one that is away is not asked more often.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Pods for each answer of a list: whole ones are some 10 KiB while they are read.
const PAGE: u32 = 50;

/// What the server has of a pod, besides what the pod is.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    pub name: FullName,
    pub resource_version: String,
    /// Somebody has asked for its deletion.
    pub deleting: bool,
    /// The hash of the static pod that it mirrors.
    pub mirror: Option<String>,
    pub status: Arc<PodStatus>,
}

#[derive(Debug, Default)]
struct State {
    /// A whole list has come.
    complete: bool,
    held: BTreeMap<PodUid, Held>,
    /// What is to have mirrors there; `None` until the node's own sources have said it.
    static_pods: Option<Vec<Arc<Pod>>>,
}

impl State {
    /// Takes a pod's object unless a later one is known; whether a mirror has come or changed.
    fn take(&mut self, uid: &PodUid, new: Held) -> bool {
        let before = self.held.get(uid);
        let is_known = |before: &Held| !is_newer(&new.resource_version, &before.resource_version);
        if before.is_some_and(is_known) {
            return false;
        }
        let mirror = |held: &Held| (held.mirror.clone(), held.deleting);
        let changed = new.mirror.is_some() && before.map(mirror) != Some(mirror(&new));
        self.held.insert(uid.clone(), new);
        changed
    }
}

/// What the server was last seen to have for this node. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct ApiPods {
    state: Arc<Mutex<State>>,
    /// Told when a list has come, and when mirrors have come or gone.
    changed: watch::Sender<()>,
}

impl Default for ApiPods {
    fn default() -> Self {
        ApiPods { state: Arc::default(), changed: watch::Sender::new(()) }
    }
}

impl ApiPods {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the server has of this pod.
    pub fn held(&self, uid: &PodUid) -> Option<Held> {
        self.lock().held.get(uid).cloned()
    }

    /// The mirror of a name, with its UID.
    pub fn mirror(&self, name: &FullName) -> Option<(PodUid, Held)> {
        let state = self.lock();
        let found = state.held.iter().find(|(_, held)| held.mirror.is_some() && held.name == *name);
        found.map(|(uid, held)| (uid.clone(), held.clone()))
    }

    /// Every mirror; `None` until a whole list has come.
    pub fn mirrors(&self) -> Option<Vec<(PodUid, Held)>> {
        let state = self.lock();
        let mirrors = state.held.iter().filter(|(_, held)| held.mirror.is_some());
        state.complete.then(|| mirrors.map(|(uid, held)| (uid.clone(), held.clone())).collect())
    }

    /// The pods of the node's own sources are these.
    pub fn set_static(&self, pods: Vec<Arc<Pod>>) {
        self.lock().static_pods = Some(pods);
        self.tell();
    }

    /// The pods of the node's own sources, once they have said them.
    pub fn static_pods(&self) -> Option<Vec<Arc<Pod>>> {
        self.lock().static_pods.clone()
    }

    /// Told when a whole list has come, and when mirrors or what they stand for change.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Takes what the server answered to a change of ours, so that nobody waits for the watch to say it too. All of it: the answer may be the
    /// first to say that the pod is to be deleted, and what the watch says of that later is old then.
    pub fn note(&self, pod: &Pod) {
        let Some(uid) = PodUid::of(pod) else { return };
        let mut state = self.lock();
        let mirror_changed = state.held.contains_key(&uid) && state.take(&uid, Held::of(pod));
        drop(state);
        if mirror_changed {
            self.tell();
        }
    }

    /// Takes what the server has of a pod; whether a mirror has come or changed.
    pub(super) fn insert(&self, uid: &PodUid, pod: &Pod) -> bool {
        self.lock().take(uid, Held::of(pod))
    }

    fn remove(&self, uid: &PodUid) -> bool {
        self.lock().held.remove(uid).is_some_and(|held| held.mirror.is_some())
    }

    fn complete(&self, held: BTreeMap<PodUid, Held>) {
        let mut state = self.lock();
        (state.complete, state.held) = (true, held);
    }

    /// Has those who follow look again.
    pub fn tell(&self) {
        self.changed.send_replace(());
    }
}

impl Held {
    fn of(pod: &Pod) -> Held {
        Held {
            name: FullName::of(pod),
            resource_version: pod.metadata.resource_version.clone().unwrap_or_default(),
            deleting: pod.metadata.deletion_timestamp.is_some(),
            mirror: pod::annotation(pod, CONFIG_MIRROR).map(str::to_owned),
            status: Arc::new(pod.status.clone().unwrap_or_default()),
        }
    }
}

/// Whether one version of an object came after another. Versions of one object are numbers that grow; what is none is taken as newer.
fn is_newer(version: &str, than: &str) -> bool {
    match (version.parse::<u128>(), than.parse::<u128>()) {
        (Ok(version), Ok(than)) => version > than,
        _ => version != than,
    }
}

/// The pod without what nobody here reads: who wrote which field, and of its status all but what others decide.
fn take_up(mut pod: Pod, seen: Timestamp, before: Option<&Arc<Pod>>) -> Arc<Pod> {
    pod.metadata.managed_fields = None;
    let known = before.and_then(|before| pod::annotation(before, CONFIG_SEEN)).map(str::to_owned);
    let annotations = pod.metadata.annotations.get_or_insert_default();
    annotations.remove(CONFIG_HASH);
    annotations.insert(CONFIG_SOURCE.to_owned(), SourceName::Api.as_str().to_owned());
    annotations.insert(CONFIG_SEEN.to_owned(), known.unwrap_or_else(|| seen.to_string()));
    pod.status = foreign_status(&pod);
    match before.filter(|before| is_same(before, &pod)) {
        Some(before) => before.clone(),
        None => Arc::new(pod),
    }
}

/// What of a status others decide and a worker goes by: the conditions that the pod's readiness waits for, and that it is over.
fn foreign_status(pod: &Pod) -> Option<PodStatus> {
    let status = pod.status.as_ref()?;
    let gates = || pod::spec(pod).readiness_gates.iter().flatten();
    let is_gate = |type_: &str| gates().any(|gate| gate.condition_type == type_);
    let conditions: Vec<_> = status.conditions.iter().flatten().filter(|c| is_gate(&c.type_)).cloned().collect();
    let phase = status.phase.clone().filter(|phase| is_terminal_phase(Some(phase)));
    if conditions.is_empty() && phase.is_none() {
        return None;
    }
    let conditions = (!conditions.is_empty()).then_some(conditions);
    Some(PodStatus { phase, conditions, ..PodStatus::default() })
}

/// Whether two versions of a pod are the same to a worker.
fn is_same(one: &Pod, other: &Pod) -> bool {
    let (a, b) = (&one.metadata, &other.metadata);
    a.labels == b.labels
        && a.annotations == b.annotations
        && a.deletion_timestamp == b.deletion_timestamp
        && a.deletion_grace_period_seconds == b.deletion_grace_period_seconds
        && a.generation == b.generation
        && one.spec == other.spec
        && one.status == other.status
}

/// The set that the watch's events add up to.
#[derive(Debug, Default)]
struct PodSet {
    api: ApiPods,
    pods: BTreeMap<PodUid, Arc<Pod>>,
    /// A list that is coming: until it is whole the old set counts.
    listing: Option<Listing>,
    /// A whole list has come.
    complete: bool,
    /// What has no UID that can be a folder, by name: each is told once.
    nameless: BTreeSet<String>,
}

#[derive(Debug, Default)]
struct Listing {
    pods: BTreeMap<PodUid, Arc<Pod>>,
    held: BTreeMap<PodUid, Held>,
}

impl PodSet {
    /// Takes an event; whether the set of pods is another one now, or is whole for the first time.
    fn apply(&mut self, event: Event<Pod>, now: Timestamp) -> bool {
        match event {
            Event::Init => self.listing = Some(Listing::default()),
            Event::InitApply(pod) => {
                let Some(uid) = self.uid_of(&pod) else { return false };
                let Some(listing) = &mut self.listing else { return false };
                let held = Held::of(&pod);
                if held.mirror.is_none() {
                    listing.pods.insert(uid.clone(), take_up(pod, now, self.pods.get(&uid)));
                }
                listing.held.insert(uid, held);
            }
            Event::InitDone => {
                let Some(Listing { pods, held }) = self.listing.take() else { return false };
                self.api.complete(held);
                self.api.tell();
                let changed = !is_same_set(&self.pods, &pods) || !self.complete;
                (self.pods, self.complete) = (pods, true);
                return changed;
            }
            Event::Apply(pod) => return self.put(pod, now),
            Event::Delete(pod) => {
                let Some(uid) = self.uid_of(&pod) else { return false };
                if self.api.remove(&uid) {
                    self.api.tell();
                }
                return self.pods.remove(&uid).is_some();
            }
        }
        false
    }

    fn put(&mut self, pod: Pod, now: Timestamp) -> bool {
        let Some(uid) = self.uid_of(&pod) else { return false };
        if self.api.insert(&uid, &pod) {
            self.api.tell();
        }
        if pod::annotation(&pod, CONFIG_MIRROR).is_some() {
            // What it stands for runs already; it runs nothing itself.
            return self.pods.remove(&uid).is_some();
        }
        let before = self.pods.get(&uid);
        let taken = take_up(pod, now, before);
        if before.is_some_and(|before| Arc::ptr_eq(before, &taken)) {
            return false;
        }
        self.pods.insert(uid, taken);
        true
    }

    fn uid_of(&mut self, pod: &Pod) -> Option<PodUid> {
        let uid = PodUid::of(pod);
        if uid.is_none() && self.nameless.insert(FullName::of(pod).to_string()) {
            tracing::error!(pod = %pod::format_pod(pod), "its UID cannot be the name of a folder: it does not run");
        }
        uid
    }

    fn update(&self) -> SourceUpdate {
        SourceUpdate {
            source: SourceName::Api,
            pods: self.pods.values().cloned().collect(),
            // Each has a UID of its own: none begins another's life again.
            fresh: BTreeSet::new(),
            objects: Vec::new(),
            problems: Vec::new(),
            rejected: Vec::new(),
            is_remembered: false,
            withheld: Vec::new(),
        }
    }
}

fn is_same_set(one: &BTreeMap<PodUid, Arc<Pod>>, other: &BTreeMap<PodUid, Arc<Pod>>) -> bool {
    one.len() == other.len() && one.iter().zip(other).all(|((a, one), (b, other))| a == b && Arc::ptr_eq(one, other))
}

/// What the source needs to know.
#[derive(Clone)]
pub(crate) struct PodSource {
    pub client: kube::Client,
    pub node_name: String,
    pub clock: Clock,
    /// Pods are judged by its labels and taints.
    pub node: OwnNode,
    pub api: ApiPods,
    /// What is on record for when the server is away.
    pub offline: Option<Offline>,
}

/// How long the node's own object is waited for: without it pods are judged by what every node has.
const NODE_PATIENCE: Duration = Duration::from_secs(10);

/// Follows the server until `stop`; what it has is published when a whole list has come, and after each change. Where none comes soon,
/// what is on record is published.
pub(crate) async fn run(source: PodSource, updates: mpsc::Sender<SourceUpdate>, stop: CancellationToken) {
    let (following, offline) = (stop.clone(), source.offline.clone());
    // Who waits for the end of this source waits for the records too.
    let is_open = updates.clone();
    stop.run_until_cancelled(follow(source, updates, following)).await;
    if let Some(offline) = offline {
        offline.kept().await;
    }
    drop(is_open);
}

#[expect(clippy::large_enum_variant, reason = "one at a time, on the stack of its loop")]
enum Action {
    Event(Result<Event<Pod>, watcher::Error>),
    /// The server has been waited for long enough.
    Offer,
}

async fn follow(source: PodSource, updates: mpsc::Sender<SourceUpdate>, stop: CancellationToken) {
    let PodSource { client, node_name, clock, node, api, offline } = source;
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node_name}")).page_size(PAGE);
    let mut own = node.follow();
    let known = tokio::time::timeout(NODE_PATIENCE, async move { own.wait_for(Option::is_some).await.is_ok() });
    let events = watcher(Api::<Pod>::all(client), config);
    let mut events = pin!(futures::stream::once(known).filter_map(|_| std::future::ready(None)).chain(events));
    let mut set = PodSet { api, ..PodSet::default() };
    let mut records = None;
    if let Some(offline) = offline {
        let loaded = Records::load(offline).await;
        set.pods = loaded.pods();
        records = Some(loaded);
    }
    let (mut pause, mut resume, mut is_told) = (FIRST_PAUSE, None, false);
    loop {
        let offer_at = records.as_ref().and_then(Records::offer_at);
        let action = tokio::select! {
            biased;
            event = next(&mut events, resume) => match event {
                Some(event) => Action::Event(event),
                None => return,
            },
            () = tokio::time::sleep_until(offer_at.unwrap_or_else(Instant::now)), if offer_at.is_some() => Action::Offer,
        };
        let update = match action {
            Action::Offer => records.as_mut().and_then(Records::offer),
            Action::Event(Ok(event)) => {
                if !matches!(event, Event::Init | Event::InitApply(_)) {
                    if std::mem::take(&mut is_told) {
                        tracing::info!("the API server tells its pods again");
                    }
                    (pause, resume) = (FIRST_PAUSE, None);
                    node.note_contact(clock.now());
                }
                if let (Event::InitApply(_), Some(records)) = (&event, &mut records) {
                    records.put_off();
                }
                let changed = set.apply(event, clock.now());
                if changed && let Some(records) = &mut records {
                    records.set_pods(&set.pods, &stop);
                }
                changed.then(|| set.update())
            }
            Action::Event(Err(error)) => {
                if !std::mem::replace(&mut is_told, true) {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, known = set.pods.len(), "the API server does not tell its pods: they stay as they are");
                }
                resume = Some(Instant::now() + pause);
                pause = (pause * 2).min(LONGEST_PAUSE);
                None
            }
        };
        if let Some(update) = update
            && updates.send(update).await.is_err()
        {
            return;
        }
    }
}

/// The next event, after a pause.
async fn next<E>(events: &mut (impl futures::Stream<Item = E> + Unpin), resume: Option<Instant>) -> Option<E> {
    if let Some(resume) = resume {
        tokio::time::sleep_until(resume).await;
    }
    events.next().await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, version: u32, more: &str) -> Pod {
        let metadata = format!("name: {name}, namespace: d, uid: u-{name}, resourceVersion: '{version}', managedFields: [{{}}]");
        let text = format!("{{metadata: {{{metadata}}}, spec: {{containers: [{{name: c, image: i}}]}}, status: {{}}}}");
        let mut pod: serde_json::Value = yaml(&text);
        let more: serde_json::Value = yaml(more);
        merge(&mut pod, more);
        serde_json::from_value(pod).unwrap()
    }

    fn yaml(text: &str) -> serde_json::Value {
        crate::source::yaml::parse_documents(text).unwrap().remove(0).value
    }

    fn merge(into: &mut serde_json::Value, from: serde_json::Value) {
        match (into, from) {
            (serde_json::Value::Object(into), serde_json::Value::Object(from)) => {
                from.into_iter().for_each(|(key, value)| merge(into.entry(key).or_insert(serde_json::Value::Null), value));
            }
            (into, from) => *into = from,
        }
    }

    fn names(set: &PodSet) -> Vec<String> {
        set.update().pods.iter().map(|pod| pod::name(pod).to_owned()).collect()
    }

    const NOW: Timestamp = Timestamp::UNIX_EPOCH;

    #[test]
    fn until_a_list_is_whole_the_old_set_counts() {
        let mut set = PodSet::default();
        assert!(!set.apply(Event::Init, NOW));
        assert!(!set.apply(Event::InitApply(pod("a", 1, "{}")), NOW));
        assert!(!set.apply(Event::InitApply(pod("b", 1, "{}")), NOW));
        assert!(set.api.mirrors().is_none());
        assert!(set.apply(Event::InitDone, NOW));
        assert_eq!(names(&set), ["a", "b"]);
        // Hours later: the connection broke, half a list comes.
        assert!(!set.apply(Event::Init, NOW));
        assert!(!set.apply(Event::InitApply(pod("a", 1, "{}")), NOW));
        assert!(!set.apply(Event::Init, NOW), "and breaks off");
        assert_eq!(names(&set), ["a", "b"]);
        for name in ["a", "b"] {
            assert!(!set.apply(Event::InitApply(pod(name, 1, "{}")), NOW));
        }
        assert!(!set.apply(Event::InitDone, NOW), "nothing has changed");
        set.apply(Event::Init, NOW);
        set.apply(Event::InitApply(pod("b", 1, "{}")), NOW);
        assert!(set.apply(Event::InitDone, NOW));
        assert_eq!(names(&set), ["b"]);
    }

    #[test]
    fn an_empty_list_is_one_too() {
        let mut set = PodSet::default();
        set.apply(Event::Init, NOW);
        assert!(set.apply(Event::InitDone, NOW));
    }

    #[test]
    fn only_what_concerns_a_worker_is_a_change() {
        let mut set = PodSet::default();
        assert!(set.apply(Event::Apply(pod("a", 1, "{}")), NOW));
        let first = set.update().pods[0].clone();
        assert_eq!((first.metadata.managed_fields.as_ref(), first.status.as_ref()), (None, None));
        assert_eq!(SourceName::of(&first), Some(SourceName::Api));
        assert_eq!(pod::annotation(&first, CONFIG_SEEN), Some("1970-01-01T00:00:00Z"));
        let cases = [
            ("{status: {phase: Running, podIP: 10.0.0.1}}", false),
            ("{metadata: {finalizers: [x]}}", false),
            ("{metadata: {annotations: {kubernetes.io/config.source: file}}}", false),
            ("{metadata: {labels: {l: x}}}", true),
            ("{metadata: {annotations: {l: x}}}", true),
            ("{metadata: {deletionTimestamp: '2026-01-01T00:00:00Z', deletionGracePeriodSeconds: 3}}", true),
            ("{spec: {activeDeadlineSeconds: 3}}", true),
            ("{status: {phase: Failed}}", true),
            ("{status: {conditions: [{type: gate, status: 'True'}]}}", false),
            ("{spec: {readinessGates: [{conditionType: gate}]}, status: {conditions: [{type: gate, status: 'True'}]}}", true),
        ];
        for (i, (more, changes)) in cases.into_iter().enumerate() {
            let mut set = PodSet::default();
            set.apply(Event::Apply(pod("a", 1, "{}")), NOW);
            let version = 2 + u32::try_from(i).unwrap();
            let later = Timestamp::from_second(9).unwrap();
            assert_eq!(set.apply(Event::Apply(pod("a", version, more)), later), changes, "{more}");
            let seen = set.update().pods[0].clone();
            assert_eq!(pod::annotation(&seen, CONFIG_SEEN), Some("1970-01-01T00:00:00Z"), "{more}");
            let held = set.api.held(&PodUid::new("u-a").unwrap()).unwrap();
            assert_eq!(held.resource_version, version.to_string());
        }
    }

    #[test]
    fn a_mirror_is_known_and_never_run() {
        let mut set = PodSet::default();
        let mut told = set.api.changes();
        let mirror = "{metadata: {annotations: {kubernetes.io/config.mirror: h1, kubernetes.io/config.source: file}}}";
        assert!(!set.apply(Event::Apply(pod("m", 1, mirror)), NOW));
        assert!(names(&set).is_empty());
        assert!(told.has_changed().unwrap());
        told.mark_unchanged();
        let name = FullName { namespace: "d".into(), name: "m".into() };
        let (uid, held) = set.api.mirror(&name).unwrap();
        assert_eq!((uid.as_str(), held.mirror.as_deref()), ("u-m", Some("h1")));
        set.apply(Event::Apply(pod("m", 2, mirror)), NOW);
        assert!(!told.has_changed().unwrap(), "its status is nobody's business");
        set.apply(Event::Delete(pod("m", 3, mirror)), NOW);
        assert!(told.has_changed().unwrap() && set.api.mirror(&name).is_none());
    }

    #[test]
    fn what_the_server_answered_is_not_taken_back_by_what_the_watch_says_later() {
        let mut set = PodSet::default();
        set.apply(Event::Apply(pod("a", 1, "{}")), NOW);
        let uid = PodUid::new("u-a").unwrap();
        set.api.note(&pod("a", 10, "{status: {phase: Running}}"));
        set.apply(Event::Apply(pod("a", 9, "{status: {phase: Pending}}")), NOW);
        assert_eq!(set.api.held(&uid).unwrap().status.phase.as_deref(), Some("Running"));
        set.apply(Event::Apply(pod("a", 11, "{status: {phase: Pending}}")), NOW);
        assert_eq!(set.api.held(&uid).unwrap().status.phase.as_deref(), Some("Pending"));
    }

    #[test]
    fn an_answer_that_is_the_first_to_tell_of_a_deletion_is_heard() {
        let mut set = PodSet::default();
        let mut told = set.api.changes();
        let mirror = "{metadata: {annotations: {kubernetes.io/config.mirror: h1}}}";
        set.apply(Event::Apply(pod("a", 1, "{}")), NOW);
        set.apply(Event::Apply(pod("m", 2, mirror)), NOW);
        told.mark_unchanged();
        let deleted = |name, version, more| {
            let mut pod = pod(name, version, more);
            pod.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(NOW));
            pod
        };
        // Deleted as version 10; a patch of ours, which the server took after that, is 11, and its answer comes before the watch's word.
        set.api.note(&deleted("a", 11, "{}"));
        assert!(!told.has_changed().unwrap());
        assert!(set.apply(Event::Apply(deleted("a", 10, "{}")), NOW), "its worker is to hear it all the same");
        assert!(set.api.held(&PodUid::new("u-a").unwrap()).unwrap().deleting);
        set.api.note(&deleted("m", 12, mirror));
        assert!(told.has_changed().unwrap(), "a mirror that goes is made again");
        set.apply(Event::Delete(deleted("a", 13, "{}")), NOW);
        set.api.note(&pod("a", 14, "{}"));
        assert!(set.api.held(&PodUid::new("u-a").unwrap()).is_none(), "what is gone stays gone");
    }

    #[test]
    fn versions_are_compared_as_numbers() {
        for (version, than, newer) in
            [("10", "9", true), ("9", "10", false), ("9", "9", false), ("x", "9", true), ("x", "x", false)]
        {
            assert_eq!(is_newer(version, than), newer, "{version} {than}");
        }
    }
}
