//! Sidecars and lifecycle hooks: what comes before what, and what a failing or hanging hook leads to.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use support::Node;
use support::fake_cri::Behaviour;
use tonic::Status;

fn phase(pod: &serde_json::Value) -> &str {
    pod["status"]["phase"].as_str().unwrap_or_default()
}

fn pod(spec: &str) -> String {
    format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: web}}\nspec:\n  terminationGracePeriodSeconds: 5\n{spec}")
}

/// The names of the calls that change or run something, in order.
fn story(node: &Node) -> Vec<String> {
    let told = ["StartContainer", "StopContainer", "ExecSync", "StopPodSandbox"];
    node.cri.call_names().into_iter().filter(|call| told.iter().any(|t| call.starts_with(t))).collect()
}

#[tokio::test]
async fn a_sidecar_starts_before_the_others_and_ends_after_them() {
    let mut node = Node::new();
    node.cri.behave("setup", [Behaviour::Exit(0)]);
    let spec = "  initContainers:\n  - {name: proxy, image: 'img:1', restartPolicy: Always, lifecycle: {preStop: {exec: {command: [drain]}}}}\n  \
        - {name: setup, image: 'img:1'}\n  containers: [{name: c, image: 'img:1'}]\n";
    node.apply("web.yaml", &pod(spec));
    node.start().await;
    let found = node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    let inits = &found["status"]["initContainerStatuses"];
    assert_eq!((inits[0]["ready"].as_bool(), inits[0]["started"].as_bool()), (Some(true), Some(true)));
    // A sidecar comes back while the others run.
    node.cri.exit("proxy", 0);
    node.cri.wait("the sidecar again", |s| s.calls.iter().any(|(_, c)| c == "StartContainer proxy/1")).await;
    node.cri.hold("StopContainer");
    node.delete("web.yaml");
    node.cri.wait("the container stops", |s| s.calls.iter().any(|(_, c)| c.starts_with("StopContainer c/0"))).await;
    node.cri.wait("the hook began at once", |s| s.calls.iter().any(|(_, c)| c == "ExecSync proxy/1 drain")).await;
    assert!(node.cri.calls("StopContainer proxy").is_empty(), "not before the container has ended");
    node.cri.release("StopContainer");
    node.wait_gone("web-n1").await;
    let starts: Vec<_> = node.cri.calls("StartContainer").into_iter().map(|(_, c)| c).collect();
    assert_eq!(starts, ["StartContainer proxy/0", "StartContainer setup/0", "StartContainer c/0", "StartContainer proxy/1"]);
    assert!(node.cri.calls("StopContainer proxy/1").len() == 1);
}

#[tokio::test]
async fn a_pod_is_complete_when_its_containers_are_and_its_sidecar_goes() {
    let mut node = Node::new();
    let spec = "  restartPolicy: Never\n  initContainers: [{name: proxy, image: 'img:1', restartPolicy: Always}]\n  \
        containers: [{name: c, image: 'img:1'}]\n";
    node.apply("web.yaml", &pod(spec));
    node.start().await;
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    node.cri.exit("c", 0);
    node.wait_pod("web-n1", "Succeeded", |p| phase(p) == "Succeeded").await;
    node.cri.wait("the sidecar has ended", |s| s.running().is_empty()).await;
    assert_eq!(node.cri.calls("StartContainer proxy").len(), 1);
}

#[tokio::test]
async fn pre_stop_runs_before_the_stop_and_its_failure_changes_nothing() {
    let mut node = Node::new();
    let spec = "  containers: [{name: c, image: 'img:1', lifecycle: {preStop: {exec: {command: [bye]}}, postStart: {exec: {command: [hello]}}}}]\n";
    node.apply("web.yaml", &pod(spec));
    node.start().await;
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    node.cri.fail("ExecSync", [Status::aborted("exit code 1")]);
    node.delete("web.yaml");
    node.wait_gone("web-n1").await;
    assert_eq!(
        story(&node)[..4],
        ["StartContainer c/0", "ExecSync c/0 hello", "ExecSync c/0 bye", "StopContainer c/0 5"],
        "{:?}",
        story(&node)
    );
}

#[tokio::test(start_paused = true)]
async fn a_hook_that_hangs_takes_the_grace_and_not_more() {
    let mut node = Node::new();
    let spec = "  containers: [{name: c, image: 'img:1', lifecycle: {preStop: {exec: {command: [bye]}}}}]\n";
    node.apply("web.yaml", &pod(spec));
    node.start().await;
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    node.cri.hold("ExecSync");
    node.delete("web.yaml");
    node.cri.wait("the stop", |s| s.calls.iter().any(|(_, c)| c == "StopContainer c/0 2")).await;
    let at = |name: &str| node.cri.calls(name)[0].0;
    assert_eq!((at("StopContainer") - at("ExecSync")).as_secs(), 5);
}

#[tokio::test]
async fn a_sleep_hook_is_part_of_the_grace() {
    let mut node = Node::new();
    let spec = "  containers: [{name: c, image: 'img:1', lifecycle: {preStop: {sleep: {seconds: 1}}}}]\n";
    node.apply("web.yaml", &pod(spec));
    node.start().await;
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    node.delete("web.yaml");
    node.cri.wait("the stop", |s| s.calls.iter().any(|(_, c)| c.starts_with("StopContainer c/0"))).await;
    assert_ne!(node.cri.calls("StopContainer")[0].1, "StopContainer c/0 5", "the second is taken off");
}

#[tokio::test]
async fn a_failing_post_start_kills_the_container_and_is_its_reason() {
    let mut node = Node::new();
    node.cri.fail("ExecSync", [Status::aborted("exit code 1"), Status::aborted("exit code 1")]);
    let spec = "  containers: [{name: c, image: 'img:1', lifecycle: {postStart: {exec: {command: [warm, up]}}}}]\n";
    node.apply("web.yaml", &pod(spec));
    let mut config = node.config().await;
    config.crash_backoff.base = std::time::Duration::from_millis(200);
    node.cri.hold("ExecSync");
    node.start_with(config);
    node.cri.wait("the hook", |s| s.calls.iter().any(|(_, c)| c.starts_with("ExecSync"))).await;
    // The reason is shown until the next try has begun: that is held back until it has been seen.
    node.cri.hold("CreateContainer");
    node.cri.release("ExecSync");
    let waiting = |p: &serde_json::Value| p["status"]["containerStatuses"][0]["state"]["waiting"].clone();
    let found = node.wait_pod("web-n1", "the reason", |p| waiting(p)["reason"] == "PostStartHookError").await;
    node.cri.release("CreateContainer");
    let message = waiting(&found)["message"].as_str().unwrap().to_owned();
    assert!(message.starts_with("Exec lifecycle hook ([warm up]) for Container \"c\" in Pod \"web-n1_default("), "{message}");
    assert!(message.ends_with("failed - error: command 'warm up' exited with 1, message: \"said\""), "{message}");
    // It backs off and is tried again; the third time the hook works.
    node.wait_pod("web-n1", "ready", |p| p["status"]["containerStatuses"][0]["ready"] == true).await;
    assert_eq!(node.cri.calls("StartContainer").len(), 3);
}

#[tokio::test]
async fn a_container_whose_post_start_failed_gets_its_pre_stop_before_it_is_killed() {
    let mut node = Node::new();
    node.cri.fail("ExecSync", [Status::aborted("exit code 1"), Status::aborted("exit code 1")]);
    let spec = "  containers: [{name: c, image: 'img:1', lifecycle: {postStart: {exec: {command: [up]}}, preStop: {exec: {command: [down]}}}}]\n";
    node.apply("web.yaml", &pod(spec));
    node.start().await;
    node.cri.wait("the stop", |s| s.calls.iter().any(|(_, c)| c.starts_with("StopContainer"))).await;
    assert_eq!(story(&node)[..4], ["StartContainer c/0", "ExecSync c/0 up", "ExecSync c/0 down", "StopContainer c/0 5"]);
    let events = node.events();
    let at = |event: &str| events.iter().position(|e| e == event).unwrap_or_else(|| panic!("{event} in {events:#?}"));
    let order = ["Created: Container created", "Started: Container started", "FailedPostStartHook: PostStartHook failed"];
    let rest = ["Killing: FailedPostStartHook", "FailedPreStopHook: PreStopHook failed"];
    let places: Vec<_> = order.iter().chain(&rest).map(|event| at(event)).collect();
    assert!(places.is_sorted(), "{events:#?}");
}

#[tokio::test]
async fn tcp_hooks_connect_or_fail() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let hook = |port: u16| format!("{{tcpSocket: {{host: 127.0.0.1, port: {port}}}}}");
    let mut node = Node::new();
    let spec =
        format!("  containers: [{{name: c, image: 'img:1', lifecycle: {{postStart: {}, preStop: {}}}}}]\n", hook(port), hook(1));
    node.apply("web.yaml", &pod(&spec));
    node.start().await;
    node.wait_pod("web-n1", "ready", |p| p["status"]["containerStatuses"][0]["ready"] == true).await;
    listener.accept().unwrap();
    node.delete("web.yaml");
    node.wait_gone("web-n1").await;
    assert!(node.events().contains(&"FailedPreStopHook: PreStopHook failed".into()), "{:#?}", node.events());
}

#[tokio::test]
async fn a_container_is_not_ready_and_not_probed_while_its_post_start_hook_runs() {
    let mut node = Node::new();
    node.cri.hold("ExecSync");
    let spec = "  containers: [{name: c, image: 'img:1', lifecycle: {postStart: {exec: {command: [warm]}}}, \
                livenessProbe: {exec: {command: [alive]}, periodSeconds: 1}}]\n";
    node.apply("web.yaml", &pod(spec));
    node.start().await;
    let state = |p: &serde_json::Value| p["status"]["containerStatuses"][0].clone();
    let found = node.wait_pod("web-n1", "running", |p| state(p)["state"]["running"].is_object()).await;
    assert_eq!((&state(&found)["ready"], &state(&found)["started"]), (&false.into(), &false.into()));
    assert_eq!(node.cri.calls("ExecSync").len(), 1, "the hook alone");
    node.cri.release("ExecSync");
    node.wait_pod("web-n1", "ready", |p| state(p)["ready"] == true).await;
    node.cri.wait("the probe", |s| s.calls.iter().any(|(_, c)| c.contains("alive"))).await;
}

#[tokio::test]
async fn a_post_start_hook_that_was_cut_off_runs_again_before_its_container_has_come_up() {
    let mut node = Node::new();
    node.cri.hold("ExecSync");
    let spec = "  containers: [{name: c, image: 'img:1', lifecycle: {postStart: {exec: {command: [warm]}}}, \
                livenessProbe: {exec: {command: [alive]}, periodSeconds: 1}}]\n";
    node.apply("web.yaml", &pod(spec));
    node.start().await;
    let hooks = |node: &Node| node.cri.calls("ExecSync c/0 warm").len();
    node.cri.wait("the hook", |s| s.calls.iter().any(|(_, c)| c == "ExecSync c/0 warm")).await;
    node.stop().await;
    node.start().await;
    node.cri.wait("it again", |s| s.calls.iter().filter(|(_, c)| c == "ExecSync c/0 warm").count() == 2).await;
    let state = |p: &serde_json::Value| p["status"]["containerStatuses"][0].clone();
    let found = node.wait_pod("web-n1", "running", |p| state(p)["state"]["running"].is_object()).await;
    assert_eq!((&state(&found)["ready"], &state(&found)["started"]), (&false.into(), &false.into()));
    node.cri.release("ExecSync");
    node.wait_pod("web-n1", "ready", |p| state(p)["ready"] == true).await;
    node.cri.wait("the probe", |s| s.calls.iter().any(|(_, c)| c.contains("alive"))).await;
    // What is over is not run once more.
    node.stop().await;
    node.start().await;
    node.wait_pod("web-n1", "ready", |p| state(p)["ready"] == true).await;
    assert_eq!((hooks(&node), node.cri.calls("StartContainer").len()), (2, 1));
}

#[tokio::test]
async fn a_post_start_hook_that_fails_the_second_time_kills_its_container() {
    let mut node = Node::new();
    node.cri.hold("ExecSync");
    node.apply(
        "web.yaml",
        &pod("  containers: [{name: c, image: 'img:1', lifecycle: {postStart: {exec: {command: [warm]}}}}]\n"),
    );
    node.start().await;
    node.cri.wait("the hook", |s| s.calls.iter().any(|(_, c)| c.starts_with("ExecSync"))).await;
    node.stop().await;
    node.start().await;
    node.cri.wait("it again", |s| s.calls.iter().filter(|(_, c)| c.starts_with("ExecSync")).count() == 2).await;
    node.cri.fail("ExecSync", [Status::aborted("exit code 1"), Status::aborted("exit code 1")]);
    node.cri.release("ExecSync");
    node.cri.wait("the stop", |s| s.calls.iter().any(|(_, c)| c.starts_with("StopContainer c/0"))).await;
    node.cri.wait("the next start", |s| s.calls.iter().any(|(_, c)| c == "StartContainer c/1")).await;
}
