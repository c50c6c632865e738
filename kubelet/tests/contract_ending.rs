//! Pods that the node does not let in, or ends by itself: shutdown, preemption, admission.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use berth_kubelet::Ending;
use berth_kubelet::admission::NodeConditions;
use support::fake_cri::Behaviour;
use support::{Node, pod};

fn phase(pod: &serde_json::Value) -> &str {
    pod["status"]["phase"].as_str().unwrap_or_default()
}

fn shutdown(grace: i64) -> Ending {
    Ending {
        grace: Some(grace),
        reason: "Terminated".into(),
        message: "Pod was terminated in response to imminent node shutdown.".into(),
        disruption: Some("Pod was terminated in response to imminent node shutdown.".into()),
    }
}

#[tokio::test]
async fn pods_that_the_node_ends_get_their_hooks_and_the_grace_and_exist_once_after_the_next_start() {
    let mut node = Node::new();
    let hook = "image: 'img:1', lifecycle: {preStop: {exec: {command: [bye]}}}";
    node.apply("web.yaml", &pod("web", "").replace("image: 'img:1'", hook));
    node.apply("job.yaml", &pod("job", "  restartPolicy: Never\n"));
    node.start().await;
    for name in ["web-n1", "job-n1"] {
        node.wait_pod(name, "Running", |p| phase(p) == "Running").await;
    }
    let control = node.control.clone().unwrap();
    control.set_conditions(NodeConditions { shutting_down: true, ..NodeConditions::default() });
    control.end(|_| Some(shutdown(2))).await;
    assert_eq!(node.cri.lock().running(), Vec::<String>::new(), "nothing runs when the order is carried out");
    assert!(node.cri.lock().ready_sandboxes().is_empty());
    let stops: Vec<_> = node.cri.calls("StopContainer").into_iter().map(|(_, call)| call).collect();
    assert_eq!(stops, ["StopContainer c/0 2", "StopContainer c/0 2"], "not the pod's own 3 seconds");
    assert_eq!(node.cri.calls("ExecSync c/0 bye").len(), 1);
    let ended = node.pod("web-n1").await.unwrap();
    let status = &ended["status"];
    assert_eq!((phase(&ended), &status["reason"]), ("Failed", &"Terminated".into()));
    assert_eq!(
        (&status["conditions"][0]["type"], &status["conditions"][0]["reason"]),
        (&"DisruptionTarget".into(), &"TerminationByKubelet".into())
    );
    // Nothing new comes in, and an ended pod does not come back by itself.
    node.apply("late.yaml", &pod("late", ""));
    let late = node.wait_pod("late-n1", "rejected", |p| phase(p) == "Failed").await;
    assert_eq!(late["status"]["message"], "Pod was rejected: Pod was rejected as the node is shutting down.");
    assert_eq!(late["status"]["reason"], "NodeShutdown");
    assert!(node.events().contains(&"NodeShutdown: Pod was rejected as the node is shutting down.".into()));
    assert_eq!(node.cri.calls("RunPodSandbox").len(), 2);
    node.stop().await;
    node.cri.reboot();
    node.start().await;
    for name in ["web-n1", "late-n1"] {
        node.wait_pod(name, "Running", |p| phase(p) == "Running").await;
    }
    let job = node.wait_pod("job-n1", "over", |p| phase(p) == "Failed").await;
    assert_eq!(job["status"]["containerStatuses"][0]["restartCount"], 0, "it has run");
    assert_eq!(node.cri.lock().running(), ["c", "c"], "one of each");
}

#[tokio::test]
async fn a_second_order_shortens_the_grace_of_the_first() {
    let mut node = Node::new();
    node.apply("web.yaml", &pod("web", ""));
    node.start().await;
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    node.cri.hold("StopContainer");
    let control = node.control.clone().unwrap();
    let first = tokio::spawn({
        let control = control.clone();
        async move { control.end(|_| Some(shutdown(600))).await }
    });
    node.cri.wait("the first stop", |s| s.calls.iter().any(|(_, c)| c == "StopContainer c/0 600")).await;
    let second = tokio::spawn(async move { control.end(|_| Some(shutdown(2))).await });
    node.cri.wait("the second stop", |s| s.calls.iter().any(|(_, c)| c == "StopContainer c/0 2")).await;
    node.cri.release("StopContainer");
    first.await.unwrap();
    second.await.unwrap();
}

#[tokio::test]
async fn a_pod_without_room_fails_and_lower_priorities_make_some() {
    let mut node = Node::new();
    let with = |name: &str, priority: i32| pod(name, &format!("  priority: {priority}\n"));
    node.apply("low.yaml", &with("low", 1));
    let mut config = node.config().await;
    config.max_pods = 1;
    node.start_with(config);
    node.wait_pod("low-n1", "Running", |p| phase(p) == "Running").await;
    node.apply("other.yaml", &with("other", 1));
    let other = node.wait_pod("other-n1", "rejected", |p| phase(p) == "Failed").await;
    assert_eq!(other["status"]["reason"], "OutOfpods");
    let message = "Pod was rejected: Node didn't have enough resource: pods, requested: 1, used: 1, capacity: 1";
    assert_eq!(other["status"]["message"], message);
    node.apply("high.yaml", &with("high", 2));
    node.wait_pod("high-n1", "Running", |p| phase(p) == "Running").await;
    let low = node.pod("low-n1").await.unwrap();
    assert_eq!((phase(&low), &low["status"]["reason"]), ("Failed", &"Preempting".into()));
    assert_eq!(low["status"]["message"], "Preempted in order to admit critical pod");
    // A rejected pod is forgotten with its manifest.
    node.delete("other.yaml");
    node.wait_gone("other-n1").await;
    assert_eq!(node.cri.lock().running(), ["c"]);
}

#[tokio::test]
async fn a_pod_waits_for_its_priority_class() {
    let mut node = Node::new();
    node.apply("web.yaml", &pod("web", "  priorityClassName: high\n"));
    node.start().await;
    let waiting = node.wait_pod("web-n1", "waiting", |p| phase(p) == "Pending").await;
    assert_eq!(waiting["status"]["message"], "no PriorityClass with name high was found");
    node.apply("class.yaml", "apiVersion: scheduling.k8s.io/v1\nkind: PriorityClass\nmetadata: {name: high}\nvalue: 5\n");
    let found = node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    assert_eq!(found["spec"]["priority"], 5);
}

fn evicted() -> Ending {
    Ending {
        grace: Some(1),
        reason: "Evicted".into(),
        message: "The node was low on resource: memory. ".into(),
        disruption: None,
    }
}

#[tokio::test]
async fn what_has_ended_by_itself_stays_over_after_a_restart_and_what_the_node_ended_goes_by_its_policy() {
    let mut node = Node::new();
    node.cri.behave("done", [Behaviour::Exit(0)]);
    node.cri.behave("bad", [Behaviour::Exit(3)]);
    let named = |name: &str, extra: &str| pod(name, extra).replace("name: c,", &format!("name: {name},"));
    node.apply("done.yaml", &named("done", "  restartPolicy: OnFailure\n"));
    node.apply("bad.yaml", &named("bad", "  restartPolicy: Never\n"));
    node.apply("late.yaml", &named("late", "  activeDeadlineSeconds: 1\n"));
    node.apply("again.yaml", &named("again", ""));
    node.apply("never.yaml", &named("never", "  restartPolicy: Never\n"));
    node.start().await;
    for name in ["again-n1", "never-n1"] {
        node.wait_pod(name, "Running", |p| phase(p) == "Running").await;
    }
    let out = ["again-n1", "never-n1"];
    let control = node.control.clone().unwrap();
    control.end(move |pod| out.contains(&pod.metadata.name.as_deref().unwrap()).then(evicted)).await;
    let ends = [("done-n1", "Succeeded"), ("bad-n1", "Failed"), ("late-n1", "Failed"), ("again-n1", "Failed")];
    let mut before = Vec::new();
    for (name, end) in ends {
        before.push(node.wait_pod(name, end, |p| phase(p) == end).await["status"].clone());
    }
    assert_eq!(before[3]["reason"], "Evicted");
    node.cri.wait("all has stopped", |s| s.running().is_empty() && s.ready_sandboxes().is_empty()).await;
    // Of what was evicted nothing is left in the runtime: its layers and logs were in the way.
    let of = |s: &support::fake_cri::State, pod: &str| s.sandboxes.values().any(|s| s.metadata.as_ref().unwrap().name == pod);
    node.cri.wait("the evicted are gone", |s| out.iter().all(|pod| !of(s, pod)) && s.containers.len() == 3).await;
    node.stop().await;
    node.start().await;
    node.wait_pod("again-n1", "Running again", |p| phase(p) == "Running").await;
    for (at, (name, end)) in ends.into_iter().enumerate().take(3) {
        let after = node.wait_pod(name, end, |p| phase(p) == end && p["status"]["conditions"].is_array()).await;
        assert_eq!(after["status"], before[at], "{name}");
    }
    assert_eq!(before[2]["reason"], "DeadlineExceeded");
    // Without records the status that was kept is all that is known of a pod that does not run again.
    let never = node.wait_pod("never-n1", "Failed", |p| phase(p) == "Failed").await;
    assert_eq!(never["status"]["reason"], "Evicted");
    assert_eq!(node.cri.lock().running(), ["again"]);
    node.delete("late.yaml");
    node.wait_gone("late-n1").await;
    node.stop().await;
}

#[tokio::test]
async fn what_was_over_before_a_restart_takes_no_room_after_it() {
    let mut node = Node::new();
    node.cri.behave("c", [Behaviour::Exit(0)]);
    node.apply("done.yaml", &pod("done", "  restartPolicy: Never\n"));
    let mut config = node.config().await;
    config.max_pods = 1;
    node.start_with(config.clone());
    node.wait_pod("done-n1", "Succeeded", |p| phase(p) == "Succeeded").await;
    node.cri.wait("its sandbox ends", |s| s.ready_sandboxes().is_empty()).await;
    node.stop().await;
    node.apply("web.yaml", &pod("web", ""));
    node.start_with(config);
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
}

#[tokio::test]
async fn no_record_goes_before_it_is_on_disk_that_the_pod_has_ended() {
    let mut node = Node::new();
    node.cri.behave("c", [Behaviour::Exit(0)]);
    node.apply("done.yaml", &pod("done", "  restartPolicy: Never\n"));
    node.start().await;
    let done = node.wait_pod("done-n1", "Succeeded", |p| phase(p) == "Succeeded").await;
    node.cri.wait("its sandbox ends", |s| s.ready_sandboxes().is_empty()).await;
    node.stop().await;
    // In the way of the status, as a full disk is.
    let status = node.path("kubelet/pods").join(done["metadata"]["uid"].as_str().unwrap()).join("status.json");
    let _ = std::fs::remove_file(&status);
    std::fs::create_dir_all(status.join("x")).unwrap();
    let mut config = node.config().await;
    config.timing.retry = std::time::Duration::from_millis(50);
    config.timing.eviction = std::time::Duration::from_millis(50);
    let below = berth_kubelet::eviction::threshold::Quota::Amount(i64::MAX);
    let signal = berth_kubelet::eviction::threshold::Signal::NodeFsAvailable;
    config.eviction.thresholds =
        vec![berth_kubelet::eviction::threshold::Threshold { signal, below, grace: None, reclaim: None }];
    node.start_with(config);
    let told = |node: &Node| node.events().iter().any(|event| event.contains("error keeping how the pod ended"));
    support::eventually("the failure is told", || told(&node)).await;
    assert_eq!(node.cri.calls("Remove").len(), 0, "{:#?}", node.cri.call_names());
    std::fs::remove_dir_all(&status).unwrap();
    node.cri.wait("the records go", |s| s.containers.is_empty() && s.sandboxes.is_empty()).await;
    node.stop().await;
    node.start().await;
    node.wait_pod("done-n1", "still over", |p| phase(p) == "Succeeded").await;
    assert_eq!(node.cri.calls("StartContainer").len(), 1, "it has run");
}

#[tokio::test]
async fn nothing_is_torn_down_before_the_runtime_has_said_what_runs() {
    let mut node = Node::new();
    let volume = "  volumes: [{name: v, emptyDir: {}}]\n";
    let mounted = pod("web", volume).replace("image: 'img:1'", "image: 'img:1', volumeMounts: [{name: v, mountPath: /v}]");
    node.apply("web.yaml", &mounted);
    node.start().await;
    let web = node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    node.stop().await;
    node.delete("web.yaml");
    node.cri.lock().mute = true;
    let before = node.cri.lock().listings;
    let mut config = node.config().await;
    let often = std::time::Duration::from_millis(20);
    (config.timing.garbage, config.timing.relist, config.timing.relist_without_events) = (often, 2 * often, 2 * often);
    node.start_with(config);
    // By then what belongs to nobody would have been collected many times.
    node.cri.wait("many listings", |s| s.listings > before + 40).await;
    let folder = node.path("kubelet/pods").join(web["metadata"]["uid"].as_str().unwrap());
    assert!(folder.join("volumes/kubernetes.io~empty-dir/v").is_dir(), "its container still runs");
    node.cri.lock().mute = false;
    node.cri.wait("it ends with its grace", |s| s.calls.iter().any(|(_, c)| c == "StopContainer c/0 3")).await;
    support::eventually("it is gone", || !folder.exists()).await;
}
