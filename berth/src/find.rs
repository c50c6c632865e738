//! Finds the container that a person means: a container's id (or its start), or a pod's name with the container's name. The
//! kubelet's pods, where one answers, say in which order containers are and why one has not run; without them the runtime's
//! records have to do.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Result, anyhow, bail};
use berth_cri_api::v1::runtime_service_client::RuntimeServiceClient;
use berth_cri_api::v1::{Container, ContainerState, ListContainersRequest, ListPodSandboxRequest};
use serde_json::Value;
use tonic::transport::Channel;

use crate::kubelet_api;

const POD: &str = "io.kubernetes.pod.name";
const NAMESPACE: &str = "io.kubernetes.pod.namespace";
const UID: &str = "io.kubernetes.pod.uid";
const CONTAINER: &str = "io.kubernetes.container.name";
/// The annotation by which a pod says which of its containers is meant when nobody says.
const DEFAULT_CONTAINER: &str = "kubectl.kubernetes.io/default-container";

fn label<'a>(container: &'a Container, key: &str) -> &'a str {
    container.labels.get(key).map_or("", String::as_str)
}

/// The container's name: the kubelet's label, else what the CRI metadata says.
pub fn container_name(container: &Container) -> &str {
    match label(container, CONTAINER) {
        "" => container.metadata.as_ref().map_or("", |m| m.name.as_str()),
        name => name,
    }
}

/// The pod's namespace and name: empty where neither labels nor sandbox said.
pub fn pod_of(container: &Container) -> (&str, &str) {
    (label(container, NAMESPACE), label(container, POD))
}

/// Which pod a sandbox is, as the one who made it said.
struct Sandbox {
    namespace: String,
    name: String,
    uid: String,
}

/// Gives containers without the kubelet's labels those that their sandbox's metadata stands for: crictl sets none.
fn complete(containers: &mut [Container], sandboxes: &HashMap<String, Sandbox>) {
    for container in containers {
        let Some(sandbox) = sandboxes.get(&container.pod_sandbox_id) else { continue };
        if !label(container, POD).is_empty() {
            continue;
        }
        for (key, value) in [(NAMESPACE, &sandbox.namespace), (POD, &sandbox.name), (UID, &sandbox.uid)] {
            container.labels.insert(key.to_owned(), value.clone());
        }
    }
}

/// The runtime's containers, each with the labels that say which pod it is of.
///
/// # Errors
/// When the agent does not answer.
pub async fn containers(client: &mut RuntimeServiceClient<Channel>) -> Result<Vec<Container>> {
    // Containers first: the sandbox of one that is listed is older, so it is listed too unless both are gone.
    let mut all = client.list_containers(ListContainersRequest::default()).await?.into_inner().containers;
    if all.iter().any(|c| label(c, POD).is_empty()) {
        let sandboxes = client.list_pod_sandbox(ListPodSandboxRequest::default()).await?.into_inner().items;
        let sandboxes = sandboxes.into_iter().filter_map(|s| {
            let metadata = s.metadata?;
            Some((s.id, Sandbox { namespace: metadata.namespace, name: metadata.name, uid: metadata.uid }))
        });
        complete(&mut all, &sandboxes.collect());
    }
    Ok(all)
}

/// Who is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// `[NAMESPACE/]POD`, or a container's id.
    pub name: &'a str,
    /// The container's name.
    pub container: Option<&'a str>,
    /// The run before the current one.
    pub previous: bool,
}

/// The container that was meant.
#[derive(Debug)]
pub struct Found {
    /// The container.
    pub container: Container,
    /// What to tell the person: which container was taken where several could be meant.
    pub note: Option<String>,
}

/// The pod that was meant: what the kubelet says of it, and its containers that the runtime has.
struct Pod<'a> {
    name: &'a str,
    told: Option<&'a Value>,
    records: Vec<&'a Container>,
}

fn text<'a>(value: &'a Value, path: &str) -> &'a str {
    value.pointer(path).and_then(Value::as_str).unwrap_or_default()
}

fn list<'a>(value: &'a Value, path: &str) -> impl Iterator<Item = &'a Value> + use<'a> {
    value.pointer(path).and_then(Value::as_array).into_iter().flatten()
}

impl<'a> Pod<'a> {
    fn find(all: &'a [Container], pods: &'a [Value], wanted: &'a str) -> Result<Pod<'a>> {
        let (namespace, name) = wanted.split_once('/').map_or((None, wanted), |(n, p)| (Some(n), p));
        let is_meant = |ns: &str, pod: &str| pod == name && namespace.is_none_or(|n| n == ns);
        let told: Vec<&Value> =
            pods.iter().filter(|p| is_meant(text(p, "/metadata/namespace"), text(p, "/metadata/name"))).collect();
        let mut records: Vec<&Container> = all.iter().filter(|c| is_meant(label(c, NAMESPACE), label(c, POD))).collect();
        let mut namespaces: Vec<&str> = records.iter().map(|c| label(c, NAMESPACE)).collect();
        namespaces.extend(told.iter().map(|p| text(p, "/metadata/namespace")));
        namespaces.sort_unstable();
        namespaces.dedup();
        match namespaces[..] {
            [] => bail!("no pod and no container {wanted:?} here: `berth pods` and `berth ps -a` list what there is"),
            [_] => {}
            _ => bail!("pod {name:?} is in several namespaces ({}): say NAMESPACE/{name}", namespaces.join(", ")),
        }
        // A pod that was replaced has its name from the old one: the newer one is meant.
        let told =
            told.into_iter().max_by_key(|p| (text(p, "/metadata/deletionTimestamp").is_empty(), text(p, "/status/startTime")));
        records.sort_by_key(|c| std::cmp::Reverse(c.created_at));
        let uid = match told {
            Some(pod) => text(pod, "/metadata/uid"),
            None => records.first().map_or("", |c| label(c, UID)),
        };
        records.retain(|c| label(c, UID) == uid);
        Ok(Pod { name, told, records })
    }

    /// Names of the containers that can be meant, regular ones first; with them how messages call them.
    fn names(&self) -> Vec<(&'a str, String)> {
        if let Some(pod) = self.told {
            let regular = list(pod, "/spec/containers").map(|c| text(c, "/name")).map(|n| (n, n.to_owned()));
            let init = list(pod, "/spec/initContainers").map(|c| text(c, "/name")).map(|n| (n, format!("{n} (init)")));
            return regular.chain(init).collect();
        }
        // Nobody says which are init containers: those that run come first, then the others as they were made.
        let mut names: Vec<&str> = Vec::new();
        let runs = |c: &&&Container| c.state() == ContainerState::ContainerRunning;
        let (running, others): (Vec<&&Container>, Vec<&&Container>) = self.records.iter().rev().partition(runs);
        for container in running.into_iter().chain(others) {
            let name = container_name(container);
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names.into_iter().map(|n| (n, n.to_owned())).collect()
    }

    fn status(&self, name: &str) -> Option<&'a Value> {
        let pod = self.told?;
        let all = list(pod, "/status/containerStatuses").chain(list(pod, "/status/initContainerStatuses"));
        all.into_iter().find(|s| text(s, "/name") == name)
    }

    /// The record that a status names in `state`, e.g. `/lastState/terminated`.
    fn named(&self, status: Option<&Value>, state: &str) -> Option<&'a Container> {
        let id = text(status?, &format!("{state}/containerID")).rsplit('/').next()?;
        self.records.iter().copied().find(|c| c.id == id)
    }

    /// The run of the container that is meant.
    fn run(&self, name: &str, previous: bool) -> Result<&'a Container> {
        let mut runs = self.records.iter().copied().filter(|c| container_name(c) == name);
        let status = self.status(name);
        if previous {
            let newest = runs.next();
            let ended = |c: &&Container| c.state() == ContainerState::ContainerExited;
            // Waiting for its restart, what ran last is the run before; nobody told, an ended one without one before it is that.
            return self
                .named(status, "/lastState/terminated")
                .or_else(|| runs.next())
                .or(newest.filter(ended).filter(|_| status.is_none()))
                .ok_or_else(|| anyhow!("container {name:?} of pod {:?} has no run before this one", self.name));
        }
        runs.next().ok_or_else(|| {
            let reason = status.map_or("", |s| text(s, "/state/waiting/reason"));
            let message = status.map_or("", |s| text(s, "/state/waiting/message"));
            let why = match (reason, message) {
                ("", _) => "it has not been started yet".to_owned(),
                (reason, "") => reason.to_owned(),
                (reason, message) => format!("{reason}: {message}"),
            };
            anyhow!("container {name:?} of pod {:?} is waiting to start: {why}", self.name)
        })
    }
}

/// Chooses among what there is. Pure.
fn choose(all: &[Container], pods: &[Value], wanted: Wanted<'_>) -> Result<Found> {
    let by_id: Vec<&Container> = all.iter().filter(|c| wanted.name.len() >= 4 && c.id.starts_with(wanted.name)).collect();
    if let [one] = by_id[..] {
        if wanted.previous {
            bail!("{} is one run of a container: name the pod to see the run before", wanted.name);
        }
        return Ok(Found { container: one.clone(), note: None });
    }
    let pod = Pod::find(all, pods, wanted.name)?;
    let names = pod.names();
    let shown = || names.iter().map(|(_, shown)| shown.as_str()).collect::<Vec<_>>().join(", ");
    let mut note = None;
    let annotated = pod.told.and_then(|p| p.pointer("/metadata/annotations")?.get(DEFAULT_CONTAINER)?.as_str());
    let name = match wanted.container {
        Some(name) if names.iter().any(|(n, _)| *n == name) => name,
        Some(name) => bail!("pod {:?} has no container {name:?}: it has {}", pod.name, shown()),
        None => match annotated.filter(|name| names.iter().any(|(n, _)| n == name)) {
            Some(name) => name,
            None => {
                let (first, _) = names.first().ok_or_else(|| anyhow!("pod {:?} has no container yet", pod.name))?;
                note = (names.len() > 1).then(|| format!("Defaulted container {first:?} out of: {}", shown()));
                first
            }
        },
    };
    Ok(Found { container: pod.run(name, wanted.previous)?.clone(), note })
}

/// Asks agent and kubelet, and chooses the container that is meant.
///
/// # Errors
/// When nothing matches or several do; the text says what to add.
pub async fn container(client: &mut RuntimeServiceClient<Channel>, kubelet: &Path, wanted: Wanted<'_>) -> Result<Found> {
    let all = containers(client).await?;
    let told = kubelet_api::pods(kubelet).await?;
    let pods = told.as_ref().map(|list| list["items"].as_array().cloned().unwrap_or_default()).unwrap_or_default();
    choose(&all, &pods, wanted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_cri_api::v1::ContainerMetadata;
    use serde_json::json;

    fn one(id: &str, pod: &str, name: &str, created_at: i64, state: ContainerState) -> Container {
        let labels = [(NAMESPACE, "default"), (POD, pod), (UID, "u1"), (CONTAINER, name)];
        Container {
            id: id.into(),
            created_at,
            state: state.into(),
            labels: labels.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
            ..Default::default()
        }
    }

    fn wanted<'a>(name: &'a str, container: Option<&'a str>, previous: bool) -> Wanted<'a> {
        Wanted { name, container, previous }
    }

    fn pod(spec: Value, statuses: Value) -> Value {
        json!({"metadata": {"namespace": "default", "name": "web", "uid": "u1"}, "spec": spec, "status": {"containerStatuses": statuses}})
    }

    #[test]
    fn the_newest_run_is_meant_and_previous_is_the_one_before() {
        let all = [
            one("aaaa1", "web", "app", 1, ContainerState::ContainerExited),
            one("bbbb2", "web", "app", 2, ContainerState::ContainerRunning),
        ];
        let id = |name, previous| choose(&all, &[], wanted(name, None, previous)).expect("found").container.id;
        assert_eq!(id("web", false), "bbbb2");
        assert_eq!(id("default/web", true), "aaaa1");
        assert_eq!(id("aaaa", false), "aaaa1");
        assert!(choose(&all, &[], wanted("nothing", None, false)).is_err());
    }

    #[test]
    fn in_a_crash_loop_the_run_that_ended_last_is_the_previous_one() {
        let all = [one("cccc6", "web", "app", 6, ContainerState::ContainerExited)];
        let statuses = json!([{"name": "app", "state": {"waiting": {"reason": "CrashLoopBackOff"}},
            "lastState": {"terminated": {"containerID": "berth://cccc6"}}}]);
        let pods = [pod(json!({"containers": [{"name": "app"}]}), statuses)];
        assert_eq!(choose(&all, &pods, wanted("web", None, true)).expect("found").container.id, "cccc6");
        assert_eq!(choose(&all, &[], wanted("web", None, true)).expect("no kubelet says otherwise").container.id, "cccc6");
        // One that has ended for good has no run before it.
        let over = [pod(json!({"containers": [{"name": "app"}]}), json!([{"name": "app", "state": {"terminated": {}}}]))];
        assert!(choose(&all, &over, wanted("web", None, true)).is_err());
    }

    #[test]
    fn the_first_container_of_several_is_meant_and_the_annotation_wins() {
        let all = [
            one("aaaa1", "web", "setup", 1, ContainerState::ContainerExited),
            one("bbbb2", "web", "app", 2, ContainerState::ContainerRunning),
            one("cccc3", "web", "side", 3, ContainerState::ContainerRunning),
        ];
        let spec = json!({"containers": [{"name": "app"}, {"name": "side"}], "initContainers": [{"name": "setup"}]});
        let mut pods = [pod(spec, json!([]))];
        let found = choose(&all, &pods, wanted("web", None, false)).expect("found");
        assert_eq!(found.container.id, "bbbb2");
        assert_eq!(found.note.as_deref(), Some("Defaulted container \"app\" out of: app, side, setup (init)"));
        let alone = choose(&all, &[], wanted("web", None, false)).expect("without a kubelet");
        assert_eq!(alone.note.as_deref(), Some("Defaulted container \"app\" out of: app, side, setup"));
        assert_eq!(choose(&all, &pods, wanted("web", Some("setup"), false)).expect("found").container.id, "aaaa1");
        let error = choose(&all, &pods, wanted("web", Some("nope"), false)).expect_err("no such").to_string();
        assert!(error.contains("app, side, setup (init)"), "{error}");
        pods[0]["metadata"]["annotations"] = json!({DEFAULT_CONTAINER: "side"});
        let found = choose(&all, &pods, wanted("web", None, false)).expect("found");
        assert_eq!((found.container.id.as_str(), found.note), ("cccc3", None));
    }

    #[test]
    fn a_container_without_labels_is_of_the_pod_that_its_sandbox_names() {
        let sandbox = |namespace: &str, name: &str| Sandbox { namespace: namespace.into(), name: name.into(), uid: "u9".into() };
        let sandboxes = HashMap::from([("s1".to_owned(), sandbox("tools", "probe")), ("s2".to_owned(), sandbox("x", "y"))]);
        let metadata = Some(ContainerMetadata { name: "sh".into(), attempt: 0 });
        let plain = Container { id: "dddd4".into(), pod_sandbox_id: "s1".into(), metadata, ..Default::default() };
        let labelled =
            Container { pod_sandbox_id: "s2".into(), ..one("eeee5", "web", "app", 1, ContainerState::ContainerRunning) };
        let mut all = [plain, labelled];
        assert!(choose(&all, &[], wanted("probe", None, false)).is_err());
        complete(&mut all, &sandboxes);
        assert_eq!(pod_of(&all[0]), ("tools", "probe"));
        assert_eq!(pod_of(&all[1]), ("default", "web"), "the kubelet's labels stay");
        // A kubelet that answers knows nothing of it.
        let pods = [pod(json!({"containers": [{"name": "app"}]}), json!([]))];
        for name in ["probe", "tools/probe"] {
            assert_eq!(choose(&all, &pods, wanted(name, None, false)).expect(name).container.id, "dddd4");
        }
    }

    #[test]
    fn a_container_that_waits_says_why() {
        let statuses = json!([{"name": "app", "state": {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}}]);
        let pods = [pod(json!({"containers": [{"name": "app"}]}), statuses)];
        let error = choose(&[], &pods, wanted("web", None, false)).expect_err("waits").to_string();
        assert_eq!(error, "container \"app\" of pod \"web\" is waiting to start: ErrImagePull: no such image");
    }
}
