//! Probes: when they ask, what their thresholds count, and what a restart of the kubelet changes (nothing).

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::time::Duration;

use berth_kubelet::Config;
use berth_kubelet::clock::{Clock, Uptime};
use k8s_openapi::jiff::Timestamp;
use support::Node;
use tokio::time::Instant;
use tonic::Status;

fn pod(probes: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: web}}\nspec:\n  terminationGracePeriodSeconds: 5\n  \
         containers: [{{name: c, image: 'img:1', {probes}}}]\n"
    )
}

fn ready(pod: &serde_json::Value) -> bool {
    pod["status"]["containerStatuses"][0]["ready"] == true
}

fn failures(count: usize) -> Vec<Status> {
    vec![Status::aborted("exit code 1"); count]
}

/// A wall clock that goes with tokio's. The fake runtime's containers start 2 s after the epoch, as does the clock.
async fn config(node: &Node, start: Instant) -> Config {
    let mut config = node.config().await;
    let uptime = move || Uptime { boot: "a".into(), millis: u64::try_from(start.elapsed().as_millis()).unwrap() };
    config.clock = Clock::from_fn(move || Timestamp::new(2, 0).unwrap() + start.elapsed()).with_uptime(uptime);
    config
}

/// Seconds from the container's start to each call of a command.
fn seconds(node: &Node, command: &str) -> Vec<u64> {
    let start = node.cri.calls("StartContainer")[0].0;
    let calls = node.cri.calls("ExecSync").into_iter().filter(|(_, call)| call.ends_with(command));
    calls.map(|(at, _)| (at - start).as_secs_f64().round() as u64).collect()
}

#[tokio::test(start_paused = true)]
async fn delays_periods_and_thresholds_are_exact() {
    let mut node = Node::new();
    node.cri.fail("ExecSync is-ready", failures(3));
    node.apply(
        "web.yaml",
        &pod("readinessProbe: {exec: {command: [is-ready]}, initialDelaySeconds: 7, periodSeconds: 5, successThreshold: 2, failureThreshold: 3}"),
    );
    let start = Instant::now();
    let config = config(&node, start).await;
    node.start_with(config);
    node.wait_pod("web-n1", "ready", ready).await;
    // Three failures count for nothing: it was not ready. The second success does.
    assert_eq!(seconds(&node, "is-ready"), [7, 12, 17, 22, 27]);
    let events = node.events();
    assert!(events.contains(&"Unhealthy: Readiness probe failed: said".into()), "{events:#?}");
    node.cri.fail("ExecSync is-ready", failures(3));
    node.wait_pod("web-n1", "not ready", |p| !ready(p)).await;
    assert_eq!(seconds(&node, "is-ready")[5..8], [32, 37, 42], "not before the third");
    assert!(node.cri.calls("StopContainer").is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_startup_probe_comes_first_and_its_failure_kills_with_its_own_grace() {
    let mut node = Node::new();
    node.cri.fail("ExecSync is-up", failures(2));
    let probe = |name: &str, more: &str| format!("{{exec: {{command: [{name}]}}, periodSeconds: 1, {more}}}");
    let probes = format!(
        "startupProbe: {}, livenessProbe: {}",
        probe("is-up", "failureThreshold: 2, terminationGracePeriodSeconds: 3"),
        probe("is-well", "failureThreshold: 2, terminationGracePeriodSeconds: 4")
    );
    node.apply("web.yaml", &pod(&probes));
    node.start().await;
    node.cri.wait("the stop", |s| s.calls.iter().any(|(_, c)| c == "StopContainer c/0 3")).await;
    assert!(node.cri.calls("ExecSync c/0 is-well").is_empty(), "not asked before it has come up");
    node.cri.wait("the next one is asked", |s| s.calls.iter().any(|(_, c)| c == "ExecSync c/1 is-well")).await;
    node.cri.fail("ExecSync is-well", failures(2));
    node.cri.wait("the second stop", |s| s.calls.iter().any(|(_, c)| c == "StopContainer c/1 4")).await;
    let events = node.events();
    for event in [
        "Unhealthy: Startup probe failed: said",
        "Killing: Container c failed startup probe, will be restarted",
        "Unhealthy: Liveness probe failed: said",
        "Killing: Container c failed liveness probe, will be restarted",
    ] {
        assert!(events.contains(&event.to_owned()), "{event} in {events:#?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_being_pulled_and_which_probe_ended_a_run_is_told() {
    let mut node = Node::new();
    node.cri.hold("PullImage");
    node.cri.lock().pullable.push("img:1".into());
    node.cri.fail("ExecSync is-well", failures(1));
    let probe = "livenessProbe: {exec: {command: [is-well]}, periodSeconds: 1, failureThreshold: 1}";
    node.apply("web.yaml", &pod(&format!("imagePullPolicy: Always, {probe}")));
    let config = config(&node, Instant::now()).await;
    node.start_with(config);
    node.cri.wait("the pull", |s| s.calls.iter().any(|(_, c)| c.starts_with("PullImage"))).await;
    let doing = async || {
        let (_, body) = node.get("/problems").await;
        serde_json::from_str::<serde_json::Value>(&body).unwrap()["doing"].clone()
    };
    let told = doing().await;
    let (_, of_pod) = told.as_object().unwrap().iter().next().expect("the pod is told of");
    assert_eq!(of_pod["pulling"]["c"]["image"], "img:1", "{told}");
    assert!(of_pod["pulling"]["c"]["since"].as_str().unwrap().starts_with("1970-01-01T00:00:"), "{told}");
    node.cri.release("PullImage");
    let again = |p: &serde_json::Value| p["status"]["containerStatuses"][0]["restartCount"] == 1;
    let restarted = node.wait_pod("web-n1", "the restart", again).await;
    let ended = &restarted["status"]["containerStatuses"][0]["lastState"]["terminated"]["containerID"];
    let ended = ended.as_str().unwrap().rsplit('/').next().unwrap();
    let told = doing().await;
    let of_pod = &told[restarted["metadata"]["uid"].as_str().unwrap()];
    assert_eq!(of_pod["condemned"], serde_json::json!({ended: "liveness"}), "{told}");
    assert!(of_pod["pulling"].is_null(), "{told}");
}

#[tokio::test(start_paused = true)]
async fn a_probe_that_does_not_work_counts_for_nothing() {
    let mut node = Node::new();
    node.cri.fail("ExecSync is-well", vec![Status::internal("no such runtime"); 6]);
    node.apply("web.yaml", &pod("livenessProbe: {exec: {command: [is-well]}, periodSeconds: 1, failureThreshold: 1}"));
    node.start().await;
    node.cri.wait("looks", |s| s.calls.iter().filter(|(_, c)| c.ends_with("is-well")).count() > 7).await;
    assert!(node.cri.calls("StopContainer").is_empty());
    let message = "Unhealthy: Liveness probe errored and resulted in unknown state: no such runtime";
    assert!(node.events().contains(&message.into()), "{:#?}", node.events());
}

#[tokio::test(start_paused = true)]
async fn a_restarted_kubelet_neither_forgets_what_is_ready_nor_asks_out_of_turn() {
    let mut node = Node::new();
    node.apply("web.yaml", &pod("readinessProbe: {exec: {command: [is-ready]}, initialDelaySeconds: 3, periodSeconds: 10}"));
    let start = Instant::now();
    let first = config(&node, start).await;
    node.start_with(first);
    let before = node.wait_pod("web-n1", "ready", ready).await;
    tokio::time::sleep(Duration::from_secs(12)).await;
    let uid = before["metadata"]["uid"].as_str().unwrap().to_owned();
    support::eventually("the status is kept", || {
        let kept = std::fs::read_to_string(node.path("kubelet/pods").join(&uid).join("status.json")).unwrap_or_default();
        kept.contains("\"ready\":true")
    })
    .await;
    node.stop().await;
    let asked = seconds(&node, "is-ready").len();
    let again = config(&node, start).await;
    node.start_with(again);
    let after = node.wait_pod("web-n1", "known again", |p| p["status"]["containerStatuses"].is_array()).await;
    assert_eq!(after["status"]["conditions"], before["status"]["conditions"], "no transition");
    assert_eq!(after["status"]["containerStatuses"], before["status"]["containerStatuses"]);
    assert_eq!(after["status"]["startTime"], before["status"]["startTime"]);
    node.cri.wait("more looks", |s| s.calls.iter().filter(|(_, c)| c.ends_with("is-ready")).count() >= asked + 2).await;
    let all = seconds(&node, "is-ready");
    assert!(all.iter().all(|second| second % 10 == 3), "{all:?}");
    assert_eq!(node.cri.calls("StartContainer").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_turn_that_came_while_the_kubelet_was_starting_is_made_up_for_and_the_rhythm_stays() {
    let mut node = Node::new();
    node.apply("web.yaml", &pod("readinessProbe: {exec: {command: [is-ready]}, initialDelaySeconds: 3, periodSeconds: 10}"));
    let start = Instant::now();
    let first = config(&node, start).await;
    node.start_with(first);
    node.wait_pod("web-n1", "ready", ready).await;
    tokio::time::sleep(Duration::from_secs(12)).await;
    node.stop().await;
    assert_eq!(seconds(&node, "is-ready"), [3, 13]);
    // The runtime answers so late that the turn at 23 s is over.
    node.cri.hold("Version");
    let again = config(&node, start).await;
    node.start_with(again);
    tokio::time::sleep(Duration::from_secs(10)).await;
    node.cri.release("Version");
    node.cri.wait("more looks", |s| s.calls.iter().filter(|(_, c)| c.ends_with("is-ready")).count() >= 5).await;
    let all = seconds(&node, "is-ready");
    assert!((24..=27).contains(&all[2]), "{all:?}");
    assert_eq!(all[3..5], [33, 43], "{all:?}");
}
