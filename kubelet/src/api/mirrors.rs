//! Mirror pods: what shows the pods of the node's own sources in the API. One for each, made again when it goes or no longer fits,
//! deleted when its pod has gone. A pure plan on what there is on both sides; runs nothing, and writes no status.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::Api;
use kube::api::{DeleteParams, PostParams, Preconditions};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::node::OwnNode;
use super::pods::{ApiPods, Held};
use crate::pod::{self, CONFIG_HASH, CONFIG_MIRROR, FullName, PodUid};
use crate::status::is_terminal_phase;
use crate::table::PodTable;

/// How soon what failed is tried again; each further try waits twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// What follows from statuses is looked at as often.
const AGAIN: Duration = Duration::from_secs(10);
/// The longest wait between tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What is to be done at the API server.
#[derive(Clone, Debug, PartialEq)]
enum Step {
    /// A mirror that nothing stands behind, or that does not fit any more.
    Delete { name: FullName, uid: PodUid },
    /// A pod that has none.
    Create(Arc<Pod>),
}

/// What of a static pod there is here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Here {
    /// A worker has it; its UID may be another one's that ends and had the name before.
    known: bool,
    /// The one that has it has not ended, or begins again.
    lives: bool,
    /// A pod of this name and another UID has not gone yet.
    taken: bool,
}

/// Deletions first: a mirror is made again when the old one is seen to be gone.
fn plan(wanted: &[Arc<Pod>], mirrors: &[(PodUid, Held)], here: impl Fn(&FullName, Option<&Pod>) -> Here) -> Vec<Step> {
    let wanted: BTreeMap<FullName, &Arc<Pod>> = wanted.iter().map(|pod| (FullName::of(pod), pod)).collect();
    let mut steps = Vec::new();
    let mut shown = BTreeSet::new();
    for (uid, held) in mirrors {
        let fits = match wanted.get(&held.name) {
            // While it ends it is still shown.
            None => here(&held.name, None).known,
            Some(pod) => {
                let here = here(&held.name, Some(pod));
                let hash = held.mirror.as_deref() == pod::annotation(pod, CONFIG_HASH);
                let ended = is_terminal_phase(held.status.phase.as_deref());
                here.taken || hash && !held.deleting && !(ended && here.lives)
            }
        };
        if !fits {
            steps.push(Step::Delete { name: held.name.clone(), uid: uid.clone() });
        }
        shown.insert(&held.name);
    }
    let missing = wanted.iter().filter(|(name, pod)| !shown.contains(name) && !here(name, Some(pod)).taken);
    steps.extend(missing.map(|(_, pod)| Step::Create((*pod).clone())));
    steps
}

/// The pod as the API is to show it: the API's rules for mirrors want exactly this.
fn mirror_of(pod: &Pod, node: (&str, &str)) -> Pod {
    let (node_name, node_uid) = node;
    let mut mirror = Pod { spec: pod.spec.clone(), ..Pod::default() };
    mirror.metadata.name.clone_from(&pod.metadata.name);
    mirror.metadata.namespace = Some(pod::namespace(pod).to_owned());
    mirror.metadata.labels.clone_from(&pod.metadata.labels);
    let mut annotations = pod.metadata.annotations.clone().unwrap_or_default();
    let hash = annotations.get(CONFIG_HASH).cloned().unwrap_or_default();
    annotations.insert(CONFIG_MIRROR.to_owned(), hash);
    mirror.metadata.annotations = Some(annotations);
    mirror.metadata.owner_references = Some(vec![OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: node_name.to_owned(),
        uid: node_uid.to_owned(),
        controller: Some(true),
        ..OwnerReference::default()
    }]);
    if let Some(spec) = &mut mirror.spec {
        spec.node_name = Some(node_name.to_owned());
    }
    mirror
}

/// When a name is tried again after failures.
#[derive(Clone, Copy, Debug)]
struct Failed {
    pause: Duration,
    until: Instant,
}

struct Mirrors {
    client: kube::Client,
    node_name: String,
    table: PodTable,
    api: ApiPods,
    /// Whose mirrors they are: without that object there are none.
    node: OwnNode,
    failed: BTreeMap<FullName, Failed>,
    /// Mirrors whose deletion has been asked for.
    asked: BTreeSet<PodUid>,
}

/// Keeps the mirrors until `stop`.
pub(crate) async fn run(
    client: kube::Client,
    (node_name, node): (String, OwnNode),
    (table, api): (PodTable, ApiPods),
    stop: CancellationToken,
) {
    let mut mirrors = Mirrors { client, node_name, table, api, node, failed: BTreeMap::new(), asked: BTreeSet::new() };
    let (mut told, mut node) = (mirrors.api.changes(), mirrors.node.follow());
    told.mark_changed();
    let follow = async {
        loop {
            let again = mirrors.failed.values().map(|failed| failed.until).min();
            let latest = Instant::now() + AGAIN;
            tokio::select! {
                changed = told.changed() => if changed.is_err() { return },
                changed = node.changed() => if changed.is_err() { return },
                () = sleep_until(again.map_or(latest, |at| at.min(latest))) => {}
            }
            mirrors.turn().await;
        }
    };
    stop.run_until_cancelled(follow).await;
}

impl Mirrors {
    /// Brings the API server's mirrors as near to what they should be as can be now.
    async fn turn(&mut self) {
        let (Some(wanted), Some(mirrors)) = (self.api.static_pods(), self.api.mirrors()) else { return };
        let here = |name: &FullName, pod: Option<&Pod>| {
            let of_name = |known: &Pod| pod::is_static(known) && FullName::of(known) == *name;
            let same = |known: &Pod| pod.is_some_and(|pod| pod.metadata.uid == known.metadata.uid);
            let uid = pod.and_then(PodUid::of);
            let phase = uid.and_then(|uid| self.table.known(&uid)).map(|known| known.status.phase.clone());
            Here {
                known: self.table.any(of_name),
                lives: phase.is_some_and(|phase| !is_terminal_phase(phase.as_deref())),
                taken: pod.is_some() && self.table.any(|known| of_name(known) && !same(known)),
            }
        };
        let steps = plan(&wanted, &mirrors, here);
        self.asked.retain(|uid| mirrors.iter().any(|(mirror, _)| mirror == uid));
        self.failed.retain(|name, _| {
            let of = |step: &Step| match step {
                Step::Delete { name, .. } => name.clone(),
                Step::Create(pod) => FullName::of(pod),
            };
            steps.iter().any(|step| of(step) == *name)
        });
        let now = Instant::now();
        for step in steps {
            match step {
                Step::Delete { name, uid } => {
                    if !self.asked.contains(&uid) && self.may_try(&name, now) {
                        self.delete(name, uid).await;
                    }
                }
                Step::Create(pod) => {
                    let name = FullName::of(&pod);
                    if self.may_try(&name, now)
                        && let Some(node_uid) = self.node_uid()
                    {
                        self.create(name, mirror_of(&pod, (&self.node_name, &node_uid))).await;
                    }
                }
            }
        }
    }

    fn may_try(&self, name: &FullName, now: Instant) -> bool {
        self.failed.get(name).is_none_or(|failed| failed.until <= now)
    }

    /// The node object's UID; none while there is no such object, or it is to go.
    fn node_uid(&self) -> Option<String> {
        let node = self.node.current().filter(|node| node.metadata.deletion_timestamp.is_none())?;
        node.metadata.uid.clone()
    }

    async fn create(&mut self, name: FullName, mirror: Pod) {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &name.namespace);
        match api.create(&PostParams::default(), &mirror).await {
            // The watch shows it; until then it is not made again: there is one of that name.
            Ok(_) => self.done(&name),
            Err(kube::Error::Api(status)) if status.code == 409 => self.try_later(name, None),
            Err(error) => self.try_later(name, Some(("made", &error))),
        }
    }

    async fn delete(&mut self, name: FullName, uid: PodUid) {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), &name.namespace);
        let only = Preconditions { uid: Some(uid.to_string()), resource_version: None };
        let params = DeleteParams { grace_period_seconds: Some(0), preconditions: Some(only), ..DeleteParams::default() };
        match api.delete(&name.name, &params).await {
            Ok(_) => {
                self.asked.insert(uid);
                self.done(&name);
            }
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => _ = self.asked.insert(uid),
            Err(error) => self.try_later(name, Some(("deleted", &error))),
        }
    }

    fn done(&mut self, name: &FullName) {
        self.failed.remove(name);
    }

    fn try_later(&mut self, name: FullName, why: Option<(&str, &kube::Error)>) {
        let before = self.failed.get(&name);
        if let (None, Some((what, error))) = (before, why) {
            let error = error as &dyn std::error::Error;
            tracing::warn!(pod = %name, error, "the pod's mirror in the API is not {what}: tried again");
        }
        let failed = longer(before, Instant::now());
        self.failed.insert(name, failed);
    }
}

fn longer(before: Option<&Failed>, now: Instant) -> Failed {
    let pause = before.map_or(FIRST_PAUSE, |failed| (failed.pause * 2).min(LONGEST_PAUSE));
    Failed { pause, until: now + pause }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::PodStatus;

    fn pod(name: &str, hash: &str) -> Arc<Pod> {
        let mut pod = Pod::default();
        pod.metadata.name = Some(name.to_owned());
        pod.metadata.namespace = Some("d".to_owned());
        pod.metadata.uid = Some(hash.to_owned());
        let annotations = [("kubernetes.io/config.source", "file"), (CONFIG_HASH, hash)];
        pod.metadata.annotations = Some(annotations.map(|(key, value)| (key.to_owned(), value.to_owned())).into());
        Arc::new(pod)
    }

    fn mirror(name: &str, hash: &str, deleting: bool, phase: &str) -> (PodUid, Held) {
        let held = Held {
            name: FullName { namespace: "d".into(), name: name.into() },
            resource_version: "1".into(),
            deleting,
            mirror: Some(hash.to_owned()),
            status: Arc::new(PodStatus { phase: Some(phase.to_owned()), ..PodStatus::default() }),
        };
        (PodUid::new(&format!("m-{name}")).unwrap(), held)
    }

    fn steps(wanted: &[Arc<Pod>], mirrors: &[(PodUid, Held)], here: Here) -> String {
        let step = |step: &Step| match step {
            Step::Delete { name, uid } => format!("delete {} {uid}", name.name),
            Step::Create(pod) => format!("create {}", pod::name(pod)),
        };
        plan(wanted, mirrors, |_, _| here).iter().map(step).collect::<Vec<_>>().join(", ")
    }

    #[test]
    fn every_static_pod_has_one_mirror_that_fits() {
        let (none, lives) = (Here::default(), Here { known: true, lives: true, taken: false });
        let taken = Here { known: true, lives: false, taken: true };
        let a = [pod("a", "h1")];
        type Case<'a> = (&'a str, &'a [Arc<Pod>], Vec<(PodUid, Held)>, Here, &'a str);
        let cases: [Case<'_>; 10] = [
            ("missing", &a, vec![], none, "create a"),
            ("there", &a, vec![mirror("a", "h1", false, "Running")], lives, ""),
            ("another hash", &a, vec![mirror("a", "h0", false, "Running")], lives, "delete a m-a"),
            ("deleted by somebody", &a, vec![mirror("a", "h1", true, "Running")], lives, "delete a m-a"),
            ("its pod is gone", &[], vec![mirror("a", "h1", false, "Running")], none, "delete a m-a"),
            ("its pod ends", &[], vec![mirror("a", "h1", false, "Running")], lives, ""),
            ("another hash, but the old pod ends", &a, vec![mirror("a", "h0", false, "Running")], taken, ""),
            ("missing, but the old pod ends", &a, vec![], taken, ""),
            ("ended, and the pod runs again", &a, vec![mirror("a", "h1", false, "Failed")], lives, "delete a m-a"),
            ("ended, as the pod has", &a, vec![mirror("a", "h1", false, "Failed")], none, ""),
        ];
        for (what, wanted, mirrors, here, expected) in cases {
            assert_eq!(steps(wanted, &mirrors, here), expected, "{what}");
        }
    }

    #[test]
    fn a_mirror_says_whose_it_is() {
        let mirror = mirror_of(&pod("a", "h1"), ("n", "node-uid"));
        assert_eq!(pod::annotation(&mirror, CONFIG_MIRROR), Some("h1"));
        assert_eq!(pod::annotation(&mirror, "kubernetes.io/config.source"), Some("file"));
        assert_eq!((mirror.metadata.uid.as_ref(), mirror.status.as_ref()), (None, None));
        let owner = &mirror.metadata.owner_references.unwrap()[0];
        assert_eq!((owner.kind.as_str(), owner.uid.as_str(), owner.controller), ("Node", "node-uid", Some(true)));
    }
}
