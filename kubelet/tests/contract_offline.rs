//! Pods of an API server that is not there when the node starts: what it last said is on disk, and counts until it says more.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "support/fake_api.rs"]
mod fake_api;
mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_kubelet::api::offline::{OfflineSettings, SealingKey};
use fake_api::FakeApi;
use serde_json::{Value, json};
use support::{Node, eventually};

fn key() -> Option<SealingKey> {
    SealingKey::parse(&[7; 32])
}

fn settings() -> OfflineSettings {
    OfflineSettings { key: key(), patience: Duration::from_millis(300), ..OfflineSettings::default() }
}

async fn start(node: &mut Node, api: &FakeApi, offline: OfflineSettings) {
    let mut config = node.config().await;
    config.api = Some(api.server());
    config.offline = offline;
    node.start_with(config);
}

fn spec(policy: &str) -> Value {
    json!({"nodeName": "n1", "restartPolicy": policy, "terminationGracePeriodSeconds": 3,
        "containers": [{"name": "c", "image": "img:1", "imagePullPolicy": "IfNotPresent"}]})
}

/// A pod with a variable of a Secret, and one of a ConfigMap.
fn reads(secret: &str, map: &str) -> Value {
    let mut spec = spec("Always");
    spec["containers"][0]["env"] = json!([
        {"name": "A", "valueFrom": {"secretKeyRef": {"name": secret, "key": "a"}}},
        {"name": "B", "valueFrom": {"configMapKeyRef": {"name": map, "key": "b"}}}]);
    spec
}

fn put(api: &FakeApi, collection: &str, object: Value) {
    api.lock().create((format!("/api/v1/{collection}"), "d".into(), String::new()), object).ok().unwrap();
}

/// `login` with a password, and `settings`.
fn objects(api: &FakeApi) {
    put(api, "secrets", json!({"metadata": {"name": "login"}, "data": {"a": "aHVudGVyMg=="}}));
    put(api, "configmaps", json!({"metadata": {"name": "settings"}, "data": {"b": "teal"}}));
}

async fn runs(api: &FakeApi, name: &str) -> String {
    let phase = || api.pod(name).is_some_and(|pod| pod["status"]["phase"] == "Running");
    eventually(&format!("{name} runs"), phase).await;
    api.pod(name).unwrap()["metadata"]["uid"].as_str().unwrap().to_owned()
}

fn folder(node: &Node) -> PathBuf {
    node.path("kubelet").join("api-pods")
}

/// All but what is being written.
fn files(folder: &Path) -> Vec<PathBuf> {
    let is_whole = |path: &PathBuf| path.extension().is_none_or(|extension| extension != "new");
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).filter(is_whole).collect()
}

async fn recorded(node: &Node, uid: &str, objects: usize) {
    let (pod, all) = (folder(node).join(format!("pods/{uid}.json")), folder(node).join("objects"));
    eventually("it is on record", || pod.exists() && files(&all).len() == objects).await;
}

/// A node on which pod `a` runs and is on record.
async fn one_on_record() -> (Node, FakeApi, String) {
    let (mut node, api) = (Node::new(), FakeApi::default());
    objects(&api);
    start(&mut node, &api, settings()).await;
    api.create_pod("a", &reads("login", "settings"));
    let a = runs(&api, "a").await;
    recorded(&node, &a, 2).await;
    (node, api, a)
}

fn count(node: &Node, call: &str) -> usize {
    node.cri.calls(call).len()
}

#[tokio::test]
async fn after_a_reboot_without_the_server_its_pods_start_and_are_the_same_when_it_is_back() {
    let (mut node, api) = (Node::new(), FakeApi::default());
    objects(&api);
    start(&mut node, &api, settings()).await;
    api.create_pod("a", &reads("login", "settings"));
    api.create_pod("b", &spec("Always"));
    let mut ends = spec("Never");
    ends["containers"][0]["name"] = json!("once");
    api.create_pod("once", &ends);
    let (a, b) = (runs(&api, "a").await, runs(&api, "b").await);
    let once = runs(&api, "once").await;
    node.cri.exit("once", 0);
    eventually("it is over", || api.pod("once").unwrap()["status"]["phase"] == "Succeeded").await;
    recorded(&node, &a, 2).await;
    let over = folder(&node).join(format!("pods/{once}.json"));
    eventually("that it is over is on record", || fs::read_to_string(&over).is_ok_and(|text| text.contains("Succeeded"))).await;
    for file in files(&folder(&node)) {
        // One that was being written has its name by now.
        let Ok(text) = fs::read_to_string(&file) else { continue };
        assert!(!text.contains("hunter2") && !text.contains("aHVudGVyMg"), "{}", file.display());
    }

    api.set_down(true);
    node.stop().await;
    node.cri.reboot();
    let before = count(&node, "StartContainer");
    start(&mut node, &api, settings()).await;
    eventually("both start again", || node.cri.lock().ready_sandboxes().len() == 2 && node.cri.lock().running().len() == 2).await;
    assert_eq!(count(&node, "StartContainer"), before + 2, "what is over does not run again");
    let shown = node.wait_pod("a", "its status is known", |pod| pod["status"]["phase"] == "Running").await;
    assert_eq!(shown["status"]["containerStatuses"][0]["restartCount"], 1);

    let made = (count(&node, "RunPodSandbox"), count(&node, "StartContainer"));
    api.delete_pod("b", 0);
    api.set_down(false);
    node.wait_gone("b").await;
    eventually("the server hears of it", || api.pod("a").unwrap()["status"]["containerStatuses"][0]["restartCount"] == 1).await;
    assert_eq!(api.pod("a").unwrap()["metadata"]["uid"], a.as_str());
    assert_eq!(node.cri.lock().ready_sandboxes(), ["a"]);
    assert_eq!((count(&node, "RunPodSandbox"), count(&node, "StartContainer")), made, "none a second time");
    assert_eq!(api.pod("once").unwrap()["status"]["phase"], "Succeeded");
    let gone = folder(&node).join(format!("pods/{b}.json"));
    eventually("its record is gone", || !gone.exists()).await;
    node.stop().await;
}

#[tokio::test]
async fn without_a_key_a_pod_with_a_secret_is_named_and_waits_for_the_server() {
    let (mut node, api) = (Node::new(), FakeApi::default());
    objects(&api);
    let keyless = || OfflineSettings { key: None, ..settings() };
    start(&mut node, &api, keyless()).await;
    api.create_pod("a", &reads("login", "settings"));
    api.create_pod("b", &spec("Always"));
    let a = runs(&api, "a").await;
    runs(&api, "b").await;
    recorded(&node, &a, 1).await;
    api.set_down(true);
    node.stop().await;
    node.cri.reboot();
    start(&mut node, &api, keyless()).await;
    let shown = node.wait_pod("a", "it is named", |pod| pod["status"]["reason"] == "Offline").await;
    let message = shown["status"]["message"].as_str().unwrap();
    assert!(message.contains("Secret d/login is not on record: secrets are kept with a sealing key only"), "{message}");
    eventually("the other runs", || node.cri.lock().running().len() == 1).await;
    assert!(node.events().iter().any(|event| event.starts_with("Offline: ")), "{:?}", node.events());
    let before = api.lock().phases.len();
    api.set_down(false);
    eventually("both run", || node.cri.lock().running().len() == 2).await;
    assert_eq!(runs(&api, "a").await, a);
    node.stop().await;
    let phases = api.lock().phases.split_off(before);
    assert!(phases.iter().all(|(_, phase)| phase == "Running"), "that it waited is nobody's business there: {phases:?}");
}

#[tokio::test]
async fn an_agent_that_starts_without_the_server_keeps_containers_up_and_ends_none() {
    let (mut node, api) = (Node::new(), FakeApi::default());
    objects(&api);
    start(&mut node, &api, settings()).await;
    api.create_pod("a", &reads("login", "settings"));
    api.create_pod("b", &spec("Always"));
    let a = runs(&api, "a").await;
    let b = runs(&api, "b").await;
    recorded(&node, &a, 2).await;
    recorded(&node, &b, 2).await;
    api.set_down(true);
    node.stop().await;
    // One record is lost: its pod is nobody's to end.
    fs::write(folder(&node).join(format!("pods/{b}.json")), "{half").unwrap();
    start(&mut node, &api, settings()).await;
    node.wait_pod("a", "it is looked after", |pod| pod["status"]["phase"] == "Running").await;
    assert_eq!((count(&node, "RunPodSandbox"), count(&node, "StopContainer")), (2, 0));
    api.set_down(false);
    node.wait_pod("b", "it is known again", |pod| pod["status"]["phase"] == "Running").await;
    assert_eq!((count(&node, "RunPodSandbox"), count(&node, "StopContainer")), (2, 0));
    recorded(&node, &b, 2).await;
    node.stop().await;
}

#[tokio::test]
async fn a_pod_that_was_to_go_is_not_started_again() {
    let (mut node, api) = (Node::new(), FakeApi::default());
    start(&mut node, &api, settings()).await;
    api.create_pod("a", &spec("Always"));
    let a = runs(&api, "a").await;
    recorded(&node, &a, 0).await;
    // It takes its time; then comes the power cut.
    node.cri.hold("StopContainer");
    api.delete_pod("a", 3);
    let file = folder(&node).join(format!("pods/{a}.json"));
    eventually("its deletion is on record", || fs::read_to_string(&file).is_ok_and(|text| text.contains("deletionTimestamp")))
        .await;
    api.set_down(true);
    node.cri.reboot();
    node.cri.release("StopContainer");
    node.stop().await;
    let before = count(&node, "StartContainer");
    start(&mut node, &api, settings()).await;
    node.wait_pod("a", "it is over", |pod| {
        ["Succeeded", "Failed"].contains(&pod["status"]["phase"].as_str().unwrap_or_default())
    })
    .await;
    api.set_down(false);
    eventually("it has gone", || api.pod("a").is_none()).await;
    assert_eq!(count(&node, "StartContainer"), before);
    node.stop().await;
}

#[tokio::test]
async fn what_came_in_the_last_moment_is_on_record() {
    let (mut node, api, a) = one_on_record().await;
    api.delete_pod("a", 0);
    eventually("it is to end", || count(&node, "StopContainer") > 0).await;
    node.stop().await;
    assert!(!folder(&node).join(format!("pods/{a}.json")).exists(), "it would start again without the server");
}

#[tokio::test]
async fn while_nothing_changes_nothing_is_written() {
    let (mut node, api, _) = one_on_record().await;
    // It is written last.
    let contact = folder(&node).join("contact.json");
    eventually("all is on record", || contact.exists()).await;
    let written = |node: &Node| {
        let mut all: Vec<_> = files(&folder(node))
            .into_iter()
            .filter_map(|path| Some((fs::metadata(&path).ok()?.modified().unwrap(), path)))
            .collect();
        all.sort();
        all.into_iter().filter(|(_, path)| !path.to_string_lossy().contains("contact.json")).collect::<Vec<_>>()
    };
    let before = written(&node);
    // Another agent reads the same from the server; one more pod shows that it has looked.
    node.stop().await;
    start(&mut node, &api, settings()).await;
    api.create_pod("b", &spec("Always"));
    let b = runs(&api, "b").await;
    recorded(&node, &b, 2).await;
    let after: Vec<_> = written(&node).into_iter().filter(|(_, path)| !path.ends_with(format!("{b}.json"))).collect();
    assert_eq!(after, before);
    node.stop().await;
}
