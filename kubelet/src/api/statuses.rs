//! Statuses to the API server: what the workers say of their pods is patched there at once (that a pod is only on its way, a moment later),
//! what failed again every few seconds. A pod
//! that is to go and of which nothing is left is deleted there, after the server has its last status. What the patch holds is a pure
//! comparison of ours with theirs; others' fields are never touched.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Pod, PodCondition, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::Api;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use serde_json::{Map, Value, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep_until};
use tokio_util::sync::CancellationToken;

use super::pods::{ApiPods, Held};
use crate::observed::whole_second;
use crate::pod::{self, CONFIG_HASH, FullName, PodUid};
use crate::source::OFFLINE;
use crate::status::is_terminal_phase;
use crate::table::{Known, PodTable};

/// What failed, and what others have changed, is looked at again; the upstream's period.
const AGAIN: Duration = Duration::from_secs(10);
/// So long a status that says no more than that its pod is on its way waits for a better one: a pod that runs by then takes one request, not
/// three, which is what the API server notices of a deployment.
const LATER: Duration = Duration::from_secs(1);
/// Requests at one time.
const AT_ONCE: usize = 8;

/// The fields of a status that a kubelet writes; conditions and addresses besides.
const OWN: [&str; 13] = [
    "phase",
    "reason",
    "message",
    "hostIP",
    "podIP",
    "startTime",
    "qosClass",
    "observedGeneration",
    "initContainerStatuses",
    "containerStatuses",
    "ephemeralContainerStatuses",
    "resources",
    "allocatedResources",
];
/// Conditions of ours that are there only while they hold.
const PASSING: [&str; 2] = ["PodResizePending", "PodResizeInProgress"];

/// The patch that makes their status ours; `None`: it is, or it may not become so.
pub(crate) fn plan_patch(uid: &str, ours: &PodStatus, theirs: &PodStatus) -> Option<Value> {
    if is_terminal_phase(theirs.phase.as_deref()) && theirs.phase != ours.phase {
        // A phase that never changes: whoever acts on it has acted.
        return None;
    }
    let (ours, theirs) = (normal(ours, Some(theirs)), normal(theirs, None));
    let value = |status: &PodStatus| match serde_json::to_value(status) {
        Ok(Value::Object(fields)) => fields,
        _ => Map::new(),
    };
    let (mine, known) = (value(&ours), value(&theirs));
    let mut status = Map::new();
    for field in OWN.iter().filter(|field| mine.get(**field) != known.get(**field)) {
        status.insert((*field).to_owned(), mine.get(*field).cloned().unwrap_or(Value::Null));
    }
    for field in ["hostIPs", "podIPs"].iter().filter(|field| mine.get(**field) != known.get(**field)) {
        // Merged by address otherwise: old ones would stay.
        let mut list = vec![json!({"$patch": "replace"})];
        list.extend(mine.get(*field).and_then(Value::as_array).cloned().unwrap_or_default());
        status.insert((*field).to_owned(), Value::Array(list));
    }
    patch_conditions(
        ours.conditions.as_deref().unwrap_or_default(),
        theirs.conditions.as_deref().unwrap_or_default(),
        &mut status,
    );
    (!status.is_empty()).then(|| json!({"metadata": {"uid": uid}, "status": status}))
}

/// What of the conditions differs, in the order that lists are shown in: others' first.
fn patch_conditions(ours: &[PodCondition], theirs: &[PodCondition], status: &mut Map<String, Value>) {
    let differs = |condition: &&PodCondition| !theirs.contains(condition);
    let changed: Vec<Value> = ours.iter().filter(differs).map(|condition| json!(condition)).collect();
    let is_ours = |type_: &str| ours.iter().any(|condition| condition.type_ == type_);
    let over = theirs.iter().map(|c| c.type_.as_str()).filter(|type_| PASSING.contains(type_) && !is_ours(type_));
    let over: Vec<Value> = over.map(|type_| json!({"$patch": "delete", "type": type_})).collect();
    if changed.is_empty() && over.is_empty() {
        return;
    }
    let stays = |type_: &&str| !is_ours(type_) && !PASSING.contains(type_);
    let foreign = theirs.iter().map(|c| c.type_.as_str()).filter(stays);
    let order: Vec<Value> = foreign.chain(ours.iter().map(|c| c.type_.as_str())).map(|type_| json!({"type": type_})).collect();
    status.insert("$setElementOrder/conditions".to_owned(), Value::Array(order));
    status.insert("conditions".to_owned(), changed.into_iter().chain(over).collect());
}

/// A status as it is compared: whole seconds, and the times that its counterpart has for what has not changed since.
fn normal(status: &PodStatus, known: Option<&PodStatus>) -> PodStatus {
    let mut status = status.clone();
    cut(&mut status.start_time);
    if let Some(start) = known.and_then(|known| known.start_time.clone()) {
        status.start_time = Some(Time(whole_second(start.0)));
    }
    for condition in status.conditions.iter_mut().flatten() {
        cut(&mut condition.last_transition_time);
        let same = known.and_then(|known| {
            let mut all = known.conditions.iter().flatten();
            all.find(|c| c.type_ == condition.type_ && c.status == condition.status)
        });
        if let Some(same) = same {
            condition.last_transition_time.clone_from(&same.last_transition_time);
            condition.last_probe_time.clone_from(&same.last_probe_time);
            cut(&mut condition.last_transition_time);
        }
    }
    let lists = [&mut status.init_container_statuses, &mut status.container_statuses, &mut status.ephemeral_container_statuses];
    for container in lists.into_iter().flatten().flatten() {
        container.state.iter_mut().chain(&mut container.last_state).for_each(cut_state);
    }
    status
}

fn cut_state(state: &mut ContainerState) {
    if let Some(running) = &mut state.running {
        cut(&mut running.started_at);
    }
    if let Some(ended) = &mut state.terminated {
        cut(&mut ended.started_at);
        cut(&mut ended.finished_at);
    }
}

fn cut(time: &mut Option<Time>) {
    if let Some(time) = time {
        time.0 = whole_second(time.0);
    }
}

/// Whether all that is new is that the pod is on its way: nothing of it has run, and nothing has gone wrong.
fn is_on_its_way(ours: &PodStatus, theirs: &PodStatus) -> bool {
    let pending = |status: &PodStatus| status.phase.as_deref().is_none_or(|phase| phase == "Pending");
    let begins = |container: &ContainerStatus| {
        let waiting = container.state.as_ref().and_then(|state| state.waiting.as_ref());
        // Without a reason: it is made, and starts next.
        let begins = |reason: &String| matches!(reason.as_str(), "ContainerCreating" | "PodInitializing");
        container.restart_count == 0 && waiting.is_some_and(|waiting| waiting.reason.as_ref().is_none_or(begins))
    };
    let lists = [&ours.init_container_statuses, &ours.container_statuses, &ours.ephemeral_container_statuses];
    pending(ours) && pending(theirs) && ours.reason.is_none() && lists.into_iter().flatten().flatten().all(begins)
}

/// One request to the server.
#[derive(Clone, Debug, PartialEq)]
enum Step {
    Patch { name: FullName, body: Value },
    Delete { name: FullName, uid: PodUid },
}

/// Both sides when they last were as they should be.
#[derive(Clone, Debug)]
struct Settled {
    ours: Arc<PodStatus>,
    theirs: Arc<PodStatus>,
}

impl Settled {
    fn is_still(&self, ours: &Arc<PodStatus>, theirs: &Arc<PodStatus>) -> bool {
        Arc::ptr_eq(&self.ours, ours) && Arc::ptr_eq(&self.theirs, theirs)
    }
}

/// What is to be done about one pod; `target` is the object that shows it.
fn plan_step(known: &Known, (uid, target): (&PodUid, &Held), settled: bool, asked: bool) -> Option<Step> {
    let name = target.name.clone();
    if !settled && let Some(body) = plan_patch(uid.as_str(), &known.status, &target.status) {
        return Some(Step::Patch { name, body });
    }
    let goes = known.finished && target.deleting && target.mirror.is_none() && !asked;
    // The last word first: with the object goes what it says.
    let is_told = is_terminal_phase(target.status.phase.as_deref());
    (goes && is_told).then(|| Step::Delete { name, uid: uid.clone() })
}

enum Action {
    Changed(BTreeSet<PodUid>),
    All,
    /// Somebody has waited for a better word long enough.
    Due,
    Done(PodUid, Outcome),
    /// A request ended without an outcome.
    Broken(tokio::task::Id),
    Stop,
}

#[derive(Debug)]
enum Outcome {
    /// The answer to a patch.
    Patched(Box<Pod>, Arc<PodStatus>),
    /// The server has been asked to delete it. What others wait for may keep it there.
    Deleted(PodUid),
    /// It is another one by now, or gone.
    Gone,
    Failed(kube::Error),
}

/// The uploader: what it has sent and what is under way.
struct Uploader {
    client: kube::Client,
    table: PodTable,
    api: ApiPods,
    settled: BTreeMap<PodUid, Settled>,
    /// Objects whose deletion has been asked for.
    asked: BTreeSet<PodUid>,
    running: JoinSet<(PodUid, Outcome)>,
    busy: BTreeMap<PodUid, tokio::task::Id>,
    waiting: BTreeSet<PodUid>,
    /// Pods that are on their way, and when that is told.
    later: BTreeMap<PodUid, Instant>,
    /// The last request failed: told once.
    failing: bool,
}

/// Sends until `stop`.
pub(crate) async fn run(client: kube::Client, table: PodTable, api: ApiPods, stop: CancellationToken) {
    let mut uploader = Uploader::new(client, table, api);
    let mut told = uploader.api.changes();
    let mut tick = interval_at(Instant::now() + AGAIN, AGAIN);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let table = uploader.table.clone();
        let due = uploader.due();
        let action = tokio::select! {
            () = stop.cancelled() => Action::Stop,
            Some(ended) = uploader.running.join_next() => match ended {
                Ok((uid, outcome)) => Action::Done(uid, outcome),
                Err(error) => Action::Broken(error.id()),
            },
            changed = table.changed() => Action::Changed(changed),
            Ok(()) = told.changed() => Action::All,
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => Action::Due,
            _ = tick.tick() => Action::All,
        };
        if let Action::Stop = action {
            return;
        }
        uploader.apply(action);
    }
}

impl Uploader {
    fn new(client: kube::Client, table: PodTable, api: ApiPods) -> Uploader {
        Uploader {
            client,
            table,
            api,
            settled: BTreeMap::new(),
            asked: BTreeSet::new(),
            running: JoinSet::new(),
            busy: BTreeMap::new(),
            waiting: BTreeSet::new(),
            later: BTreeMap::new(),
            failing: false,
        }
    }

    fn apply(&mut self, action: Action) {
        match action {
            Action::Changed(uids) => self.waiting.extend(uids),
            Action::All => {
                let known: BTreeSet<PodUid> = self.table.uids();
                self.settled.retain(|uid, _| known.contains(uid));
                self.asked.retain(|uid| self.api.held(uid).is_some());
                self.waiting.extend(known);
            }
            Action::Due => {
                let now = Instant::now();
                self.waiting.extend(self.later.iter().filter(|(_, until)| **until <= now).map(|(uid, _)| uid.clone()));
            }
            Action::Done(uid, outcome) => self.take(uid, outcome),
            // Looked at again with all others.
            Action::Broken(task) => self.busy.retain(|_, running| *running != task),
            Action::Stop => {}
        }
        self.begin();
    }

    /// When the first of those is to be told who wait for nothing else.
    fn due(&self) -> Option<Instant> {
        self.later.iter().filter(|(uid, _)| !self.waiting.contains(*uid)).map(|(_, until)| *until).min()
    }

    /// Starts what may start now.
    fn begin(&mut self) {
        let now = Instant::now();
        let ready: Vec<PodUid> = self.waiting.iter().filter(|uid| !self.busy.contains_key(*uid)).cloned().collect();
        for uid in ready {
            if self.busy.len() >= AT_ONCE {
                return;
            }
            self.waiting.remove(&uid);
            let Some((step, ours)) = self.plan(&uid, now) else { continue };
            let (client, of) = (self.client.clone(), uid.clone());
            let task = self.running.spawn(async move { (of, carry_out(client, step, ours).await) });
            self.busy.insert(uid, task.id());
        }
    }

    fn plan(&mut self, uid: &PodUid, now: Instant) -> Option<(Step, Arc<PodStatus>)> {
        let later = self.later.remove(uid);
        let known = self.table.known(uid)?;
        if known.status.reason.as_deref() == Some(OFFLINE) {
            return None;
        }
        let (target_uid, target) = self.target(uid, &known.pod)?;
        let settled = self.settled.get(uid).is_some_and(|settled| settled.is_still(&known.status, &target.status));
        let step = plan_step(&known, (&target_uid, &target), settled, self.asked.contains(&target_uid));
        let patches = matches!(step, Some(Step::Patch { .. }));
        if patches && !target.deleting && is_on_its_way(&known.status, &target.status) {
            let until = later.unwrap_or(now + LATER);
            if now < until {
                self.later.insert(uid.clone(), until);
                return None;
            }
        }
        if !settled && !patches {
            self.settled.insert(uid.clone(), Settled { ours: known.status.clone(), theirs: target.status.clone() });
        }
        Some((step?, known.status))
    }

    /// The object that shows the pod: itself, or its mirror.
    fn target(&self, uid: &PodUid, pod: &Pod) -> Option<(PodUid, Held)> {
        if !pod::is_static(pod) {
            return Some((uid.clone(), self.api.held(uid)?));
        }
        let mirror = self.api.mirror(&FullName::of(pod))?;
        (mirror.1.mirror.as_deref() == pod::annotation(pod, CONFIG_HASH) && !mirror.1.deleting).then_some(mirror)
    }

    fn take(&mut self, uid: PodUid, outcome: Outcome) {
        self.busy.remove(&uid);
        match outcome {
            Outcome::Patched(answer, ours) => {
                self.failing = false;
                self.api.note(&answer);
                let theirs = PodUid::of(&answer).and_then(|target| self.api.held(&target));
                if let Some(theirs) = theirs {
                    // Whatever the server makes of it: the same is not sent again before one of both changes.
                    self.settled.insert(uid.clone(), Settled { ours, theirs: theirs.status });
                }
                self.waiting.insert(uid);
            }
            Outcome::Deleted(target) => {
                self.failing = false;
                self.asked.insert(target);
            }
            // The watch will say so.
            Outcome::Gone => {}
            Outcome::Failed(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(uid = uid.as_str(), error, "a pod's status has not reached the API server: tried again");
                }
            }
        }
    }
}

async fn carry_out(client: kube::Client, step: Step, ours: Arc<PodStatus>) -> Outcome {
    let done = match step {
        Step::Patch { name, body } => {
            let api: Api<Pod> = Api::namespaced(client, &name.namespace);
            let patched = api.patch_status(&name.name, &PatchParams::default(), &Patch::Strategic(body)).await;
            patched.map(|pod| Outcome::Patched(Box::new(pod), ours))
        }
        Step::Delete { name, uid } => {
            let api: Api<Pod> = Api::namespaced(client, &name.namespace);
            let only = Preconditions { uid: Some(uid.to_string()), resource_version: None };
            let params = DeleteParams { grace_period_seconds: Some(0), preconditions: Some(only), ..DeleteParams::default() };
            api.delete(&name.name, &params).await.map(|_| Outcome::Deleted(uid))
        }
    };
    match done {
        Ok(outcome) => outcome,
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Outcome::Gone,
        Err(error) => Outcome::Failed(error),
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use bytes::Bytes;
    use http_body_util::Full;
    use k8s_openapi::jiff::Timestamp;

    fn status(text: &str) -> PodStatus {
        serde_json::from_value(crate::source::yaml::parse_documents(text).unwrap().remove(0).value).unwrap()
    }

    fn patch(ours: &str, theirs: &str) -> Value {
        plan_patch("u1", &status(ours), &status(theirs)).map_or(Value::Null, |mut patch| {
            assert_eq!(patch["metadata"], json!({"uid": "u1"}));
            patch["status"].take()
        })
    }

    #[test]
    fn only_what_differs_is_sent() {
        let running = "{phase: Running, podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}], startTime: '2026-01-01T00:00:00Z'}";
        let cases = [
            (running, running, Value::Null),
            (
                running,
                "{phase: Pending, podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}], startTime: '2026-01-01T00:00:00Z'}",
                json!({"phase": "Running"}),
            ),
            (
                "{phase: Running, startTime: '2026-01-01T00:00:00.9Z'}",
                "{phase: Running, startTime: '2026-01-01T00:00:00Z'}",
                Value::Null,
            ),
            (
                "{phase: Running, startTime: '2026-01-01T00:00:09Z'}",
                "{phase: Running, startTime: '2026-01-01T00:00:00Z'}",
                Value::Null,
            ),
            ("{phase: Running}", "{phase: Running, reason: Old, message: old}", json!({"reason": null, "message": null})),
            ("{phase: Running}", "{phase: Running, nominatedNodeName: node, resourceClaimStatuses: [{name: c}]}", Value::Null),
            (
                "{podIPs: [{ip: 10.0.0.2}]}",
                "{podIPs: [{ip: 10.0.0.1}]}",
                json!({"podIPs": [{"$patch": "replace"}, {"ip": "10.0.0.2"}]}),
            ),
            ("{}", "{podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}]}", json!({"podIP": null, "podIPs": [{"$patch": "replace"}]})),
        ];
        for (ours, theirs, wanted) in cases {
            assert_eq!(patch(ours, theirs), wanted, "{ours} {theirs}");
        }
    }

    #[test]
    fn others_conditions_stay_and_times_move_only_with_the_status() {
        let old = "lastTransitionTime: '2026-01-01T00:00:00Z'";
        let new = "lastTransitionTime: '2026-01-01T00:00:09.5Z'";
        let theirs = format!(
            "{{conditions: [{{type: PodScheduled, status: 'True', {old}}}, {{type: mine/gate, status: 'True'}}, {{type: Ready, status: 'False', {old}}}, {{type: PodResizePending, status: 'True'}}]}}"
        );
        let same = format!(
            "{{conditions: [{{type: Ready, status: 'False', {new}}}, {{type: PodScheduled, status: 'True', {new}}}, {{type: PodResizePending, status: 'True'}}]}}"
        );
        assert_eq!(patch(&same, &theirs), Value::Null);
        let ready =
            format!("{{conditions: [{{type: Ready, status: 'True', {new}}}, {{type: PodScheduled, status: 'True', {new}}}]}}");
        let sent = patch(&ready, &theirs);
        assert_eq!(
            sent["conditions"],
            json!([
                {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:09Z"},
                {"$patch": "delete", "type": "PodResizePending"}
            ])
        );
        assert_eq!(
            sent["$setElementOrder/conditions"],
            json!([{"type": "mine/gate"}, {"type": "Ready"}, {"type": "PodScheduled"}])
        );
        let generation = "{conditions: [{type: Ready, status: 'True', observedGeneration: 2}]}";
        let sent = patch(generation, "{conditions: [{type: Ready, status: 'True', observedGeneration: 1}]}");
        assert_eq!(sent["conditions"][0]["observedGeneration"], 2);
    }

    #[test]
    fn container_states_are_compared_by_the_second() {
        let of = |time: &str| {
            format!(
                "{{containerStatuses: [{{name: c, image: i, imageID: d, ready: true, restartCount: 0, state: {{running: {{startedAt: '{time}'}}}}}}]}}"
            )
        };
        assert_eq!(patch(&of("2026-01-01T00:00:00.7Z"), &of("2026-01-01T00:00:00Z")), Value::Null);
        assert_eq!(
            patch(&of("2026-01-01T00:00:01Z"), &of("2026-01-01T00:00:00Z"))["containerStatuses"].as_array().unwrap().len(),
            1
        );
    }

    #[test]
    fn a_terminal_phase_is_never_taken_back() {
        for (ours, sent) in [("Running", false), ("Failed", false), ("Succeeded", true)] {
            let ours = PodStatus { phase: Some(ours.into()), message: Some("m".into()), ..PodStatus::default() };
            let theirs = PodStatus { phase: Some("Succeeded".into()), ..PodStatus::default() };
            assert_eq!(plan_patch("u", &ours, &theirs).is_some(), sent);
        }
    }

    fn held(phase: &str, deleting: bool, mirror: bool) -> Held {
        Held {
            name: FullName { namespace: "d".into(), name: "a".into() },
            resource_version: "1".into(),
            deleting,
            mirror: mirror.then(|| "h".into()),
            status: Arc::new(PodStatus { phase: Some(phase.into()), ..PodStatus::default() }),
        }
    }

    #[test]
    fn a_pod_is_deleted_there_when_nothing_of_it_is_left_and_its_end_is_told() {
        let uid = PodUid::new("u").unwrap();
        let known = |phase: &str, finished| Known {
            pod: Arc::default(),
            status: Arc::new(PodStatus { phase: Some(phase.into()), ..PodStatus::default() }),
            finished,
        };
        let cases = [
            // ours, finished, theirs, deleting, mirror, asked
            ("Failed", true, "Running", true, false, false, "patch"),
            ("Failed", true, "Failed", true, false, false, "delete"),
            ("Failed", true, "Failed", true, false, true, ""),
            ("Failed", true, "Failed", true, true, false, ""),
            ("Failed", true, "Failed", false, false, false, ""),
            ("Failed", false, "Failed", true, false, false, ""),
            ("Running", true, "Running", true, false, false, ""),
        ];
        for (i, (ours, finished, theirs, deleting, mirror, asked, wanted)) in cases.into_iter().enumerate() {
            let step = plan_step(&known(ours, finished), (&uid, &held(theirs, deleting, mirror)), false, asked);
            let step = step.map_or("", |step| if matches!(step, Step::Patch { .. }) { "patch" } else { "delete" });
            assert_eq!(step, wanted, "case {i}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_breaks_off_silences_no_pod() {
        let asked = Arc::new(AtomicUsize::new(0));
        let heard = asked.clone();
        let service = tower::service_fn(move |_: http::Request<kube::client::Body>| {
            let first = heard.fetch_add(1, Ordering::Relaxed) == 0;
            async move {
                assert!(!first, "what a bug would do");
                Ok::<_, Infallible>(http::Response::builder().status(404).body(Full::new(Bytes::new())).unwrap())
            }
        });
        let (table, api, uid) = (PodTable::default(), ApiPods::default(), PodUid::new("u").unwrap());
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "a", "namespace": "d", "uid": "u"}})).unwrap();
        api.insert(&uid, &pod);
        table.follow();
        table.set(&uid, &Arc::new(pod), status("{phase: Running}"));
        let upload = run(kube::Client::new(service, "default"), table, api, CancellationToken::new());
        let _ = tokio::time::timeout(AGAIN * 2, upload).await;
        assert!(asked.load(Ordering::Relaxed) > 1);
    }

    #[test]
    fn a_pod_is_on_its_way_until_something_runs_or_goes_wrong() {
        let waits = |reason: &str| {
            format!(
                "{{phase: Pending, containerStatuses: [{{name: c, image: i, imageID: '', ready: false, restartCount: 0, state: {{waiting: {{reason: {reason}}}}}}}]}}"
            )
        };
        let cases = [
            ("{phase: Pending}", "{}", true),
            (&waits("ContainerCreating"), "{phase: Pending}", true),
            (&waits("PodInitializing"), "{}", true),
            (&waits("null"), "{phase: Pending}", true),
            (&waits("ErrImagePull"), "{phase: Pending}", false),
            (&waits("ContainerCreating"), "{phase: Running}", false),
            (&waits("null").replace("restartCount: 0", "restartCount: 1"), "{phase: Pending}", false),
            (&waits("CrashLoopBackOff").replace("containerStatuses", "ephemeralContainerStatuses"), "{}", false),
            (&waits("PodInitializing").replace("containerStatuses", "initContainerStatuses"), "{}", true),
            ("{phase: Running}", "{phase: Pending}", false),
            ("{phase: Pending, reason: Refused}", "{}", false),
            (
                "{phase: Pending, initContainerStatuses: [{name: i, image: i, imageID: '', ready: false, restartCount: 0, state: {running: {}}}]}",
                "{phase: Pending}",
                false,
            ),
        ];
        for (ours, theirs, wanted) in cases {
            assert_eq!(is_on_its_way(&status(ours), &status(theirs)), wanted, "{ours} {theirs}");
        }
    }

    /// When which phase is told of a pod that is Pending from the start, and half of the waiting time later `then`.
    async fn told(then: Option<&str>, deleting: bool) -> Vec<(Duration, String)> {
        let heard: Arc<std::sync::Mutex<Vec<(Duration, String)>>> = Arc::default();
        let (hears, begun) = (heard.clone(), Instant::now());
        let service = tower::service_fn(move |request: http::Request<kube::client::Body>| {
            let hears = hears.clone();
            async move {
                let body: Value = serde_json::from_slice(&request.into_body().collect_bytes().await.unwrap()).unwrap();
                let phase = body["status"]["phase"].as_str().unwrap_or_default().to_owned();
                hears.lock().unwrap().push((begun.elapsed(), phase));
                let named = json!({"name": "a", "namespace": "d", "uid": "u", "resourceVersion": "2"});
                let answer = json!({"metadata": named, "status": body["status"]});
                Ok::<_, Infallible>(http::Response::new(Full::new(Bytes::from(answer.to_string()))))
            }
        });
        let (table, api, uid) = (PodTable::default(), ApiPods::default(), PodUid::new("u").unwrap());
        let deleted = deleting.then_some("2026-01-01T00:00:00Z");
        let pod = json!({"metadata": {"name": "a", "namespace": "d", "uid": "u", "deletionTimestamp": deleted}});
        let pod: Arc<Pod> = Arc::new(serde_json::from_value(pod).unwrap());
        api.insert(&uid, &pod);
        table.follow();
        table.set(&uid, &pod, status("{phase: Pending}"));
        let upload = tokio::spawn(run(kube::Client::new(service, "default"), table.clone(), api, CancellationToken::new()));
        tokio::time::sleep(LATER / 2).await;
        if let Some(then) = then {
            table.set(&uid, &pod, status(then));
        }
        tokio::time::sleep(LATER * 4).await;
        upload.abort();
        std::mem::take(&mut *heard.lock().unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_that_runs_within_a_moment_takes_one_request_and_another_is_told_once() {
        assert_eq!(told(Some("{phase: Running}"), false).await, [(LATER / 2, "Running".to_owned())]);
        assert_eq!(told(None, false).await, [(LATER, "Pending".to_owned())]);
        assert_eq!(told(Some("{phase: Pending, podIP: 10.0.0.1}"), false).await, [(LATER, "Pending".to_owned())]);
        assert_eq!(told(None, true).await, [(Duration::ZERO, "Pending".to_owned())], "whoever deletes it waits");
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_a_free_request_wakes_nobody() {
        let service = tower::service_fn(|_: http::Request<kube::client::Body>| {
            std::future::pending::<Result<http::Response<Full<Bytes>>, Infallible>>()
        });
        let (table, api) = (PodTable::default(), ApiPods::default());
        table.follow();
        let mut uploader = Uploader::new(kube::Client::new(service, "default"), table.clone(), api.clone());
        let set = |uid: &str, phase: &str| {
            let (uid, pod) = (PodUid::new(uid).unwrap(), json!({"metadata": {"name": uid, "namespace": "d", "uid": uid}}));
            let pod: Arc<Pod> = Arc::new(serde_json::from_value(pod).unwrap());
            api.insert(&uid, &pod);
            table.set(&uid, &pod, status(&format!("{{phase: {phase}}}")));
            uid
        };
        let held = set("on-its-way", "Pending");
        uploader.apply(Action::Changed([held.clone()].into()));
        assert_eq!(uploader.due(), Some(Instant::now() + LATER));
        let others = (0..AT_ONCE).map(|n| set(&format!("u{n}"), "Running")).collect();
        uploader.apply(Action::Changed(others));
        assert_eq!(uploader.busy.len(), AT_ONCE);
        tokio::time::sleep(LATER).await;
        uploader.apply(Action::Due);
        assert!(uploader.waiting.contains(&held) && uploader.due().is_none(), "the loop would spin");
        uploader.busy.clear();
        uploader.apply(Action::Due);
        assert!(uploader.busy.contains_key(&held) && uploader.later.is_empty());
    }

    #[test]
    fn what_the_server_makes_otherwise_is_not_sent_again_and_again() {
        let uid = PodUid::new("u").unwrap();
        let known =
            Known { pod: Arc::default(), status: Arc::new(status("{phase: Running, qosClass: BestEffort}")), finished: false };
        let theirs = held("Running", false, false);
        assert!(plan_step(&known, (&uid, &theirs), false, false).is_some());
        let settled = Settled { ours: known.status.clone(), theirs: theirs.status.clone() };
        assert!(settled.is_still(&known.status, &theirs.status));
        assert_eq!(plan_step(&known, (&uid, &theirs), true, false), None);
        assert!(!settled.is_still(&known.status, &held("Running", false, false).status));
        assert_eq!(whole_second(Timestamp::UNIX_EPOCH), Timestamp::UNIX_EPOCH);
    }
}
