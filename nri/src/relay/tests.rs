//! Plugins made of functions, over a real socket.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use futures::future::BoxFuture;
use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio::sync::Notify;

use super::*;
use crate::api::{
    ConfigureResponse, KeyValue, RegisterPluginRequest, StateChangeEvent, SynchronizeRequest, UpdateContainersRequest,
};
use crate::wire::fake::Peer;
use crate::wire::{Answer, Status, UNIMPLEMENTED};
use crate::{Config, Nri};

/// A runtime with one pod and whatever containers a test gives it.
#[derive(Default)]
struct Node {
    containers: Mutex<BTreeSet<String>>,
    changed: Arc<Mutex<Vec<String>>>,
    told: Arc<Notify>,
}

impl Runtime for Node {
    fn snapshot(&self) -> BoxFuture<'static, (Vec<PodSandbox>, Vec<Container>)> {
        let containers = self.containers.lock().unwrap();
        let all = (vec![pod()], containers.iter().map(|id| container(id)).collect());
        Box::pin(std::future::ready(all))
    }

    fn change(
        &self,
        updates: Vec<ContainerUpdate>,
        evictions: Vec<ContainerEviction>,
    ) -> BoxFuture<'static, Vec<ContainerUpdate>> {
        let mut changed = self.changed.lock().unwrap();
        changed.extend(updates.iter().map(|u| format!("update {}", u.container_id)));
        changed.extend(evictions.iter().map(|e| format!("evict {}", e.container_id)));
        self.told.notify_one();
        Box::pin(async { vec![] })
    }
}

fn pod() -> PodSandbox {
    PodSandbox { id: "p".into(), ..Default::default() }
}

fn container(id: &str) -> Container {
    Container { id: id.into(), pod_sandbox_id: "p".into(), ..Default::default() }
}

struct Rig {
    _dir: TempDir,
    socket: PathBuf,
    nri: Nri,
    node: Arc<Node>,
    /// What the plugins were called, in order.
    calls: Arc<Mutex<Vec<String>>>,
    heard: Arc<Notify>,
}

/// How a plugin answers; none: as one that agrees with everything.
type Special = fn(&str, &[u8]) -> Option<Answer>;

fn refuse(code: i32, message: &str) -> Option<Answer> {
    Some(Err(Status { code, message: message.into() }))
}

impl Rig {
    async fn new(request_timeout: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("nri/nri.sock");
        let config = Config {
            socket_path: socket.clone(),
            plugin_path: "/nowhere".into(),
            request_timeout,
            registration_timeout: Duration::from_secs(60),
            ..Default::default()
        };
        let (nri, node) = (Nri::new(config), Arc::new(Node::default()));
        nri.start(node.clone()).await.unwrap();
        Self { _dir: dir, socket, nri, node, calls: Arc::default(), heard: Arc::default() }
    }

    async fn patient() -> Self {
        Self::new(Duration::from_secs(60)).await
    }

    async fn connect(&self, name: &'static str, events: i32, special: Special) -> Arc<Peer> {
        let stream = UnixStream::connect(&self.socket).await.unwrap();
        let (calls, heard) = (self.calls.clone(), self.heard.clone());
        let peer = Peer::new(
            stream,
            Arc::new(move |method, payload| {
                calls.lock().unwrap().push(format!("{name} {method}"));
                heard.notify_one();
                let answer = special(&method, &payload).unwrap_or_else(|| {
                    Ok(if method == "Configure" { ConfigureResponse { events }.encode_to_vec() } else { Vec::new() })
                });
                Box::pin(async move {
                    match answer {
                        Err(status) if status.code == i32::MAX => std::future::pending().await,
                        answer => answer,
                    }
                })
            }),
        );
        let (index, base) = name.split_once('-').unwrap_or(("", name));
        let request = RegisterPluginRequest { plugin_name: base.into(), plugin_idx: index.into(), nri_version: "v0.12.0".into() };
        peer.call("RegisterPlugin", &request).await;
        peer
    }

    /// Connects and waits until the plugin was told everything.
    async fn join(&self, name: &'static str, events: i32, special: Special) -> Arc<Peer> {
        let peer = self.connect(name, events, special).await;
        self.until(|| self.has(&format!("{name} Synchronize"))).await;
        // The answer to the synchronization is taken before anything else is asked.
        let _ = self.nri.pod(Event::Unknown, pod()).await;
        peer
    }

    fn has(&self, call: &str) -> bool {
        self.calls.lock().unwrap().iter().any(|c| c == call)
    }

    async fn until(&self, good: impl Fn() -> bool) {
        let wait = async {
            while !good() {
                // Both wake it: calls of plugins, and the clock, for what nobody tells.
                let _ = tokio::time::timeout(Duration::from_millis(20), self.heard.notified()).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), wait).await.expect("it happens");
    }

    fn calls(&self, method: &str) -> Vec<String> {
        let calls = self.calls.lock().unwrap();
        calls.iter().filter_map(|c| c.split_once(' ').filter(|(_, m)| *m == method).map(|(n, _)| n.to_owned())).collect()
    }
}

fn sets_a(method: &str, _: &[u8]) -> Option<Answer> {
    let env = vec![KeyValue { key: "A".into(), value: "1".into() }];
    let adjust = ContainerAdjustment { env, ..Default::default() };
    (method == "CreateContainer")
        .then(|| Ok(CreateContainerResponse { adjust: Some(adjust), ..Default::default() }.encode_to_vec()))
}

fn agrees(_: &str, _: &[u8]) -> Option<Answer> {
    None
}

fn hangs(method: &str, _: &[u8]) -> Option<Answer> {
    if method == "RunPodSandbox" || method == "CreateContainer" { refuse(i32::MAX, "") } else { None }
}

#[tokio::test]
async fn plugins_are_asked_in_the_order_of_their_indexes_and_only_for_what_they_want() {
    let rig = Rig::patient().await;
    assert!(!rig.nri.active());
    let _b = rig.join("20-b", 0, agrees).await;
    let _a = rig.join("10-a", 0, sets_a).await;
    let _c = rig.join("05-c", 1, agrees).await;
    assert!(rig.nri.active());
    let created = rig.nri.create(pod(), container("c")).await.unwrap();
    assert_eq!(created.adjust.env[0].key, "A");
    assert_eq!(rig.calls("CreateContainer"), ["10-a", "20-b"]);
    rig.nri.pod(Event::RunPodSandbox, pod()).await.unwrap();
    assert_eq!(rig.calls("RunPodSandbox"), ["05-c", "10-a", "20-b"]);
}

#[tokio::test]
async fn a_conflict_of_two_plugins_names_both() {
    let rig = Rig::patient().await;
    let _a = rig.join("10-a", 0, sets_a).await;
    let _b = rig.join("20-b", 0, sets_a).await;
    let error = rig.nri.create(pod(), container("c")).await.unwrap_err().to_string();
    assert!(error.contains("10-a") && error.contains("20-b"), "{error}");
}

#[tokio::test]
async fn a_plugin_that_does_not_answer_is_closed_and_nothing_fails_for_it() {
    let rig = Rig::new(Duration::from_secs(3)).await;
    let _a = rig.join("10-a", 0, hangs).await;
    let _b = rig.join("20-b", 0, agrees).await;
    rig.nri.pod(Event::RunPodSandbox, pod()).await.unwrap();
    rig.nri.create(pod(), container("c")).await.unwrap();
    assert_eq!(rig.calls("RunPodSandbox"), ["10-a", "20-b"]);
    assert_eq!(rig.calls("CreateContainer"), ["20-b"]);
}

#[tokio::test]
async fn a_plugin_that_refuses_a_pod_fails_it() {
    let rig = Rig::patient().await;
    let _a = rig.join("10-a", 0, |m, _| if m == "RunPodSandbox" { refuse(2, "not today") } else { None }).await;
    let error = rig.nri.pod(Event::RunPodSandbox, pod()).await.unwrap_err().to_string();
    assert!(error.contains("10-a") && error.contains("not today"), "{error}");
    assert!(rig.nri.active(), "it stays");
}

#[tokio::test]
async fn an_older_plugin_is_told_by_state_change_and_the_newer_call_is_tried_once() {
    let rig = Rig::patient().await;
    let older: Special = |m, payload| match m {
        "StartContainer" => refuse(UNIMPLEMENTED, "no such method"),
        "StateChange" => {
            let change = StateChangeEvent::decode(payload).unwrap();
            assert_eq!((change.event, change.container.unwrap().id.as_str()), (Event::StartContainer as i32, "c"));
            None
        }
        _ => None,
    };
    let _a = rig.join("10-a", 0, older).await;
    for _ in 0..2 {
        rig.nri.container(Event::StartContainer, pod(), container("c")).await.unwrap();
    }
    assert_eq!((rig.calls("StartContainer").len(), rig.calls("StateChange").len()), (1, 2));
}

#[tokio::test]
async fn a_plugin_joins_when_no_operation_is_under_way_and_is_told_what_came_of_them() {
    let rig = Rig::patient().await;
    let pass = rig.nri.enter().await;
    let sees_c: Special = |m, payload| {
        (m == "Synchronize").then(|| {
            let request = SynchronizeRequest::decode(payload).unwrap();
            assert_eq!((request.pods.len(), request.containers.len()), (1, 1));
            Ok(Vec::new())
        })
    };
    let _a = rig.connect("10-a", 0, sees_c).await;
    rig.until(|| rig.has("10-a Configure")).await;
    assert!(!rig.has("10-a Synchronize"));
    rig.node.containers.lock().unwrap().insert("c".into());
    drop(pass);
    rig.until(|| rig.has("10-a Synchronize")).await;
    rig.until(|| rig.nri.active()).await;
}

#[tokio::test]
async fn an_end_is_told_once_and_before_the_removal() {
    let rig = Rig::patient().await;
    let _a = rig.join("10-a", 0, agrees).await;
    rig.nri.stopped(pod(), container("c"));
    rig.nri.stopped(pod(), container("c"));
    rig.nri.container(Event::RemoveContainer, pod(), container("c")).await.unwrap();
    rig.nri.container(Event::RemoveContainer, pod(), container("d")).await.unwrap();
    for _ in 0..2 {
        rig.nri.pod(Event::StopPodSandbox, pod()).await.unwrap();
    }
    rig.nri.pod(Event::RemovePodSandbox, pod()).await.unwrap();
    let calls = rig.calls.lock().unwrap().clone();
    let got: Vec<&str> = calls[2..].iter().map(|c| c.split_once(' ').unwrap().1).collect();
    let want = ["StopContainer", "RemoveContainer", "StopContainer", "RemoveContainer", "StopPodSandbox", "RemovePodSandbox"];
    assert_eq!(got, want);
}

#[tokio::test]
async fn a_validator_can_say_no_and_one_that_can_not_be_asked_has_not_agreed() {
    let rig = Rig::patient().await;
    let no: Special = |m, _| {
        (m == "ValidateContainerAdjustment")
            .then(|| Ok(ValidateContainerAdjustmentResponse { reject: true, reason: "A is mine".into() }.encode_to_vec()))
    };
    let _a = rig.join("10-a", 0, sets_a).await;
    let _v = rig.join("20-v", 1 << 13, no).await;
    let error = rig.nri.create(pod(), container("c")).await.unwrap_err().to_string();
    assert!(error.contains("20-v") && error.contains("A is mine"), "{error}");
}

#[tokio::test]
async fn plugins_may_change_and_end_containers_when_they_like() {
    let rig = Rig::patient().await;
    let peer = rig.join("10-a", 0, agrees).await;
    let update = vec![ContainerUpdate { container_id: "c".into(), ..Default::default() }];
    let evict = vec![ContainerEviction { container_id: "d".into(), reason: "r".into() }];
    peer.call("UpdateContainers", &UpdateContainersRequest { update, evict }).await;
    rig.node.told.notified().await;
    assert_eq!(*rig.node.changed.lock().unwrap(), ["update c", "evict d"]);
}

#[tokio::test]
async fn a_plugin_without_a_valid_name_and_one_that_wants_unknown_events_do_not_join() {
    let rig = Rig::patient().await;
    let nameless = rig.connect("x", 0, agrees).await;
    let _greedy = rig.connect("10-greedy", 1 << 20, agrees).await;
    rig.until(|| rig.has("10-greedy Configure")).await;
    let _good = rig.join("20-good", 0, agrees).await;
    rig.nri.pod(Event::RunPodSandbox, pod()).await.unwrap();
    assert_eq!(rig.calls("RunPodSandbox"), ["20-good"]);
    assert!(!rig.has("x Configure"));
    drop(nameless);
}

#[tokio::test]
async fn a_second_runtime_does_not_take_the_socket_of_a_living_one() {
    let rig = Rig::patient().await;
    let config = Config { socket_path: rig.socket.clone(), plugin_path: "/nowhere".into(), ..Default::default() };
    let second = Nri::new(config.clone());
    assert!(second.start(Arc::new(Node::default())).await.is_err());
    rig.nri.stop();
    // The socket's file stays; nobody serves it.
    rig.until(|| std::os::unix::net::UnixStream::connect(&rig.socket).is_err()).await;
    Nri::new(config).start(Arc::new(Node::default())).await.unwrap();
}
