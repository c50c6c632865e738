//! The kubelet against a runtime that can be told what to do: start, crash, edit, removal, restart of the kubelet,
//! reboot. Time is tokio's, paused where delays are the subject.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::time::Duration;

use support::fake_cri::Behaviour;
use support::{Node, eventually, pod};
use tonic::Status;

fn phase(pod: &serde_json::Value) -> &str {
    pod["status"]["phase"].as_str().unwrap_or_default()
}

#[tokio::test]
async fn a_manifest_becomes_a_running_pod_with_a_true_status() {
    let mut node = Node::new();
    node.apply("web.yaml", &pod("web", "  volumes: [{name: v}]\n"));
    node.start().await;
    let pod = node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    let status = &pod["status"];
    assert_eq!(status["hostIP"], "192.0.2.1");
    assert_eq!(status["podIP"], "10.0.0.1");
    assert_eq!(status["qosClass"], "BestEffort");
    let container = &status["containerStatuses"][0];
    assert_eq!((container["ready"].as_bool(), container["restartCount"].as_i64()), (Some(true), Some(0)));
    assert_eq!(container["containerID"], format!("fake://{:064x}", 2));
    assert_eq!(container["image"], "img:1");
    let conditions: Vec<_> = status["conditions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| format!("{}={}", c["type"].as_str().unwrap(), c["status"].as_str().unwrap()))
        .collect();
    assert_eq!(
        conditions,
        ["PodReadyToStartContainers=True", "Initialized=True", "Ready=True", "ContainersReady=True", "PodScheduled=True"]
    );
    assert_eq!(pod["metadata"]["annotations"]["kubernetes.io/config.source"], "file");
    // What the container was made with.
    let uid = pod["metadata"]["uid"].as_str().unwrap();
    {
        let state = node.cri.lock();
        let config = state.configs.values().next().unwrap();
        assert_eq!(config.log_path, "c/0.log");
        assert_eq!(config.annotations["berth/log-max-bytes"], "10485760");
        let mounts: Vec<_> = config.mounts.iter().map(|m| m.container_path.as_str()).collect();
        assert_eq!(mounts, ["/etc/hosts", "/dev/termination-log"]);
        let hosts = std::fs::read_to_string(&config.mounts[0].host_path).unwrap();
        assert!(hosts.ends_with("10.0.0.1\tweb-n1\n"), "{hosts}");
        assert!(node.path("logs").join(format!("default_web-n1_{uid}/c")).is_dir());
        // The link comes right after the start that the status already tells of.
    }
    let link = node.path("links").join(format!("web-n1_default_c-{:064x}.log", 2));
    node.wait_pod("web-n1", "a link to its log", |_| std::fs::symlink_metadata(&link).is_ok()).await;
}

#[tokio::test]
async fn health_and_unknown_paths_are_answered() {
    let mut node = Node::new();
    node.start().await;
    eventually("the socket", || node.path("kubelet.sock").exists()).await;
    assert_eq!(node.get("/healthz").await, (200, "ok".into()));
    assert!(node.get("/healthz?verbose").await.1.contains("[+]syncloop ok"));
    assert_eq!(node.get("/nothing/a/b").await.0, 404);
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(node.path("kubelet.sock")).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test(start_paused = true)]
async fn a_crashing_container_backs_off_and_keeps_count() {
    let mut node = Node::new();
    node.cri.behave("c", [Behaviour::Exit(1); 5]);
    node.apply("web.yaml", &pod("web", ""));
    node.start().await;
    node.cri.wait("six starts", |s| s.calls.iter().filter(|(_, c)| c.starts_with("StartContainer")).count() == 6).await;
    let starts = node.cri.calls("StartContainer");
    let names: Vec<_> = starts.iter().map(|(_, c)| c.as_str()).collect();
    assert_eq!(names, (0..6).map(|n| format!("StartContainer c/{n}")).collect::<Vec<_>>());
    let gaps: Vec<u64> = starts.windows(2).map(|w| (w[1].0 - w[0].0).as_secs()).collect();
    assert_eq!(gaps, [0, 10, 20, 40, 80]);
    let pod = node.wait_pod("web-n1", "running", |p| p["status"]["containerStatuses"][0]["state"]["running"].is_object()).await;
    let container = &pod["status"]["containerStatuses"][0];
    assert_eq!(container["restartCount"], 5);
    assert_eq!(container["lastState"]["terminated"]["exitCode"], 1);
    assert_eq!(node.cri.lock().overlaps, Vec::<String>::new());
    // One dead record is kept.
    node.cri.wait("old records gone", |s| s.containers.len() == 2).await;
}

#[tokio::test(start_paused = true)]
async fn a_waiting_container_says_why() {
    let mut node = Node::new();
    node.cri.behave("c", [Behaviour::Exit(3), Behaviour::Exit(3)]);
    node.apply("web.yaml", &pod("web", ""));
    let mut config = node.config().await;
    config.crash_backoff.base = Duration::from_secs(10_000);
    config.crash_backoff.max = Duration::from_secs(10_000);
    node.start_with(config);
    let pod = node
        .wait_pod("web-n1", "CrashLoopBackOff", |p| {
            p["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "CrashLoopBackOff"
        })
        .await;
    let uid = pod["metadata"]["uid"].as_str().unwrap();
    let container = &pod["status"]["containerStatuses"][0];
    let message = format!("back-off 2h46m40s restarting failed container=c pod=web-n1_default({uid})");
    assert_eq!(container["state"]["waiting"]["message"], message);
    assert_eq!(container["lastState"]["terminated"]["exitCode"], 3);
    assert_eq!(phase(&pod), "Running");
    assert_eq!(pod["status"]["conditions"][2]["message"], "containers with unready status: [c]");
}

#[tokio::test]
async fn init_containers_run_in_order_and_only_once() {
    let mut node = Node::new();
    node.cri.behave("a", [Behaviour::Exit(1), Behaviour::Exit(0)]);
    node.cri.behave("b", [Behaviour::Exit(0)]);
    node.apply("web.yaml", &pod("web", "  initContainers: [{name: a, image: 'img:1'}, {name: b, image: 'img:1'}]\n"));
    let mut config = node.config().await;
    config.crash_backoff.base = Duration::from_millis(1);
    node.start_with(config);
    let found = node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    let starts: Vec<_> = node.cri.calls("StartContainer").into_iter().map(|(_, c)| c).collect();
    assert_eq!(starts, ["StartContainer a/0", "StartContainer a/1", "StartContainer b/0", "StartContainer c/0"]);
    let inits = &found["status"]["initContainerStatuses"];
    assert_eq!((inits[0]["name"].as_str(), inits[0]["restartCount"].as_i64()), (Some("a"), Some(1)));
    assert_eq!(inits[1]["state"]["terminated"]["reason"], "Completed");
    // A crash of the pod's container does not bring them back.
    node.cri.exit("c", 1);
    node.cri.wait("c again", |s| s.calls.iter().any(|(_, c)| c == "StartContainer c/1")).await;
    assert_eq!(node.cri.calls("StartContainer a").len(), 2);
}

#[tokio::test]
async fn a_failing_init_container_of_a_never_pod_fails_it() {
    let mut node = Node::new();
    node.cri.behave("a", [Behaviour::Exit(9)]);
    node.apply("job.yaml", &pod("job", "  restartPolicy: Never\n  initContainers: [{name: a, image: 'img:1'}]\n"));
    node.start().await;
    let found = node.wait_pod("job-n1", "Failed", |p| phase(p) == "Failed").await;
    assert_eq!(found["status"]["initContainerStatuses"][0]["state"]["terminated"]["exitCode"], 9);
    node.cri.wait("the sandbox stops", |s| s.ready_sandboxes().is_empty()).await;
    assert!(node.cri.calls("CreateContainer c").is_empty());
}

#[tokio::test]
async fn an_edit_replaces_the_pod_after_the_old_one_has_ended() {
    let mut node = Node::new();
    node.cri.add_image("img:2");
    node.apply("web.yaml", &pod("web", ""));
    node.start().await;
    let old = node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    node.cri.hold("StopContainer");
    node.apply("web.yaml", &pod("web", "").replace("img:1", "img:2"));
    node.cri.wait("the old one stops", |s| s.calls.iter().any(|(_, c)| c == "StopContainer c/0 3")).await;
    assert_eq!(node.cri.calls("RunPodSandbox").len(), 1, "the new pod waits");
    node.cri.release("StopContainer");
    let new =
        node.wait_pod("web-n1", "the new one", |p| p["metadata"]["uid"] != old["metadata"]["uid"] && phase(p) == "Running").await;
    assert_eq!(new["status"]["containerStatuses"][0]["image"], "img:2");
    assert_eq!(new["status"]["containerStatuses"][0]["restartCount"], 0);
    let old_uid = old["metadata"]["uid"].as_str().unwrap();
    assert!(!node.path("kubelet/pods").join(old_uid).exists(), "the old pod's folder is gone");
    assert_eq!(node.cri.lock().sandboxes.len(), 1);
    assert_eq!(node.cri.lock().overlaps, Vec::<String>::new());
}

#[tokio::test]
async fn a_pod_whose_manifest_went_is_terminating_until_it_is_gone() {
    let mut node = Node::new();
    node.apply("web.yaml", &pod("web", ""));
    node.start().await;
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    node.cri.hold("StopContainer");
    node.delete("web.yaml");
    let ending = node.wait_pod("web-n1", "terminating", |p| p["metadata"]["deletionTimestamp"].is_string()).await;
    assert_eq!((phase(&ending), ending["metadata"]["deletionGracePeriodSeconds"].as_i64()), ("Running", Some(3)));
    node.cri.release("StopContainer");
    node.cri.wait("nothing is left", |s| s.sandboxes.is_empty()).await;
    eventually("its log folder is gone", || std::fs::read_dir(node.path("logs")).unwrap().count() == 0).await;
}

#[tokio::test]
async fn a_manifest_that_comes_back_begins_at_zero_restarts() {
    let mut node = Node::new();
    node.apply("web.yaml", &pod("web", ""));
    node.start().await;
    let first = node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    let uid = first["metadata"]["uid"].as_str().unwrap().to_owned();
    node.delete("web.yaml");
    node.wait_gone("web-n1").await;
    // What an agent leaves that was killed before it could tidy up.
    let old = node.path("logs").join(format!("default_web-n1_{uid}/c"));
    std::fs::create_dir_all(&old).unwrap();
    std::fs::write(old.join("7.log"), "").unwrap();
    node.apply("web.yaml", &pod("web", ""));
    let again = node.wait_pod("web-n1", "Running again", |p| phase(p) == "Running").await;
    assert_eq!(
        (again["metadata"]["uid"].as_str(), again["status"]["containerStatuses"][0]["restartCount"].as_i64()),
        (Some(&*uid), Some(0))
    );
}

#[tokio::test]
async fn a_pod_whose_host_port_is_taken_says_by_whom_and_starts_when_it_is_free() {
    let with_port =
        |name: &str| pod(name, "").replace("image: 'img:1'", "image: 'img:1', ports: [{containerPort: 80, hostPort: 8080}]");
    let mut node = Node::new();
    node.apply("a.yaml", &with_port("a"));
    node.start().await;
    node.wait_pod("a-n1", "Running", |p| phase(p) == "Running").await;
    node.apply("b.yaml", &with_port("b"));
    let refused = node.wait_pod("b-n1", "refused", |p| phase(p) == "Failed" && p["status"]["reason"] == "NodePorts").await;
    let message = "Pod was rejected: Predicate NodePorts failed: node(s) didn't have free ports for the requested pod ports: \
        hostPort 8080/TCP is taken by pod default/a-n1";
    assert_eq!(refused["status"]["message"], message);
    assert!(refused["status"]["startTime"].is_string(), "it has an age");
    let told = |event: &String| event.starts_with("NodePorts: Predicate NodePorts failed");
    assert_eq!(node.events().iter().filter(|event| told(event)).count(), 1, "{:#?}", node.events());
    assert_eq!(node.cri.calls("RunPodSandbox").len(), 1);
    std::fs::remove_file(node.path("manifests/a.yaml")).unwrap();
    node.wait_pod("b-n1", "Running", |p| phase(p) == "Running").await;
}

#[tokio::test]
async fn new_limits_are_applied_in_place() {
    let limits =
        |cpu: &str| pod("web", "").replace("image: 'img:1'", &format!("image: 'img:1', resources: {{limits: {{cpu: {cpu}}}}}"));
    let mut node = Node::new();
    node.apply("web.yaml", &limits("100m"));
    node.start().await;
    let old = node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    node.apply("web.yaml", &limits("200m"));
    node.cri.wait("the update", |s| s.calls.iter().any(|(_, c)| c == "UpdateContainerResources c/0")).await;
    let new =
        node.wait_pod("web-n1", "the new limit", |p| p["spec"]["containers"][0]["resources"]["limits"]["cpu"] == "200m").await;
    assert_eq!(new["metadata"]["uid"], old["metadata"]["uid"]);
    assert_ne!(
        new["metadata"]["annotations"]["kubernetes.io/config.hash"],
        old["metadata"]["annotations"]["kubernetes.io/config.hash"]
    );
    assert_eq!(node.cri.calls("StartContainer").len(), 1, "no restart");
}

#[tokio::test]
async fn a_removed_manifest_ends_the_pod_and_leaves_nothing() {
    let mut node = Node::new();
    node.apply("web.yaml", &pod("web", ""));
    node.start().await;
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    node.delete("web.yaml");
    node.cri.wait("everything is gone", |s| s.sandboxes.is_empty() && s.containers.is_empty()).await;
    assert_eq!(node.cri.calls("StopContainer").first().unwrap().1, "StopContainer c/0 3");
    eventually("the folders are gone", || std::fs::read_dir(node.path("kubelet/pods")).unwrap().count() == 0).await;
    eventually("the link is gone", || std::fs::read_dir(node.path("links")).unwrap().count() == 0).await;
    node.wait_gone("web-n1").await;
    eventually("the record is gone", || std::fs::read_dir(node.path("kubelet/static-pods")).unwrap().count() == 0).await;
}

#[tokio::test]
async fn a_broken_file_leaves_the_pod_alone_even_over_a_restart_of_the_kubelet() {
    let mut node = Node::new();
    node.apply("web.yaml", &pod("web", ""));
    node.start().await;
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    node.apply("web.yaml", &pod("web", "").replace("kind: Pod", "kind: Pod\nkind: Pod"));
    let file = node.path("manifests/web.yaml").display().to_string();
    for restarted in [false, true] {
        if restarted {
            node.stop().await;
            node.start().await;
        }
        let mut problems = String::new();
        for _ in 0..2000 {
            if tokio::net::UnixStream::connect(node.path("kubelet.sock")).await.is_ok() {
                problems = node.get("/problems").await.1;
            }
            if problems.contains(&file) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(problems.contains(&format!("{file}:3: key \\\"kind\\\" is given twice")), "{problems}");
        node.wait_pod("web-n1", "still Running", |p| phase(p) == "Running").await;
    }
    assert_eq!(node.cri.calls("StartContainer").len(), 1);
    assert_eq!(node.cri.calls("StopContainer").len(), 0);
}

#[tokio::test]
async fn a_restart_of_the_kubelet_restarts_no_container_and_keeps_counts() {
    let mut node = Node::new();
    node.apply("web.yaml", &pod("web", ""));
    node.start().await;
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    node.cri.exit("c", 1);
    node.wait_pod("web-n1", "restarted", |p| p["status"]["containerStatuses"][0]["restartCount"] == 1 && phase(p) == "Running")
        .await;
    let before =
        node.wait_pod("web-n1", "running", |p| p["status"]["containerStatuses"][0]["state"]["running"].is_object()).await;
    node.stop().await;
    let calls = node.cri.calls("StartContainer").len();
    node.start().await;
    let after = node.wait_pod("web-n1", "running", |p| p["status"]["containerStatuses"][0]["state"]["running"].is_object()).await;
    assert_eq!(after["status"]["containerStatuses"], before["status"]["containerStatuses"]);
    assert_eq!(after["metadata"], before["metadata"], "UID and config.seen are kept");
    node.cri.exit("c", 1);
    node.wait_pod("web-n1", "count goes on", |p| p["status"]["containerStatuses"][0]["restartCount"] == 2).await;
    assert_eq!(node.cri.calls("StartContainer").len(), calls + 1);
    assert_eq!(node.cri.calls("RunPodSandbox").len(), 1);
}

#[tokio::test]
async fn a_pod_whose_manifest_went_while_the_kubelet_was_away_is_ended() {
    let mut node = Node::new();
    node.apply("web.yaml", &pod("web", ""));
    node.apply("keep.yaml", &pod("keep", ""));
    node.start().await;
    node.cri.wait("both run", |s| s.running() == ["c", "c"]).await;
    node.stop().await;
    node.delete("web.yaml");
    node.start().await;
    node.cri.wait("one is gone", |s| s.sandboxes.len() == 1 && s.containers.len() == 1).await;
    assert!(node.cri.calls("StopContainer").iter().all(|(_, c)| c == "StopContainer c/0 3"), "with its own grace");
    assert_eq!(node.cri.lock().ready_sandboxes(), ["keep-n1"]);
}

#[tokio::test]
async fn a_manifest_that_changed_while_the_kubelet_was_away_replaces_its_pod_in_order() {
    let mut node = Node::new();
    node.cri.add_image("img:2");
    node.apply("web.yaml", &pod("web", ""));
    node.start().await;
    node.cri.wait("it runs", |s| s.running() == ["c"]).await;
    node.stop().await;
    node.apply("web.yaml", &pod("web", "").replace("img:1", "img:2"));
    node.cri.hold("StopContainer");
    node.start().await;
    node.cri.wait("the old one stops", |s| s.calls.iter().any(|(_, c)| c == "StopContainer c/0 3")).await;
    assert_eq!(node.cri.calls("RunPodSandbox").len(), 1, "the new pod waits");
    node.cri.release("StopContainer");
    // The old one is shown until it has gone.
    let is_new = |p: &serde_json::Value| phase(p) == "Running" && p["metadata"]["deletionTimestamp"].is_null();
    let new = node.wait_pod("web-n1", "the new one", is_new).await;
    assert_eq!(new["status"]["containerStatuses"][0]["image"], "img:2");
    assert_eq!(node.cri.lock().sandboxes.len(), 1);
}

#[tokio::test]
async fn slow_calls_are_not_doubled_by_events_edits_and_listings() {
    let mut node = Node::new();
    node.cri.lock().pullable.push("slow:1".into());
    node.cri.hold("PullImage");
    let slow = |cpu: &str| {
        let limits = format!("slow:1', resources: {{limits: {{cpu: {cpu}}}}}");
        pod("web", "").replace("img:1'", &limits)
    };
    node.apply("web.yaml", &slow("500m"));
    node.apply("other.yaml", &pod("other", ""));
    let mut config = node.config().await;
    config.timing.relist = Duration::from_millis(5);
    node.start_with(config);
    node.wait_pod("other-n1", "the other pod runs", |p| phase(p) == "Running").await;
    node.cri.wait("the pull", |s| s.calls.iter().any(|(_, c)| c == "PullImage slow:1")).await;
    // Listings, events of another container and an edit that changes only a resource.
    node.cri.exit("c", 1);
    node.cri.wait("other restarted", |s| s.calls.iter().any(|(_, c)| c == "StartContainer c/1")).await;
    node.apply("web.yaml", &slow("1"));
    node.wait_pod("web-n1", "the edit", |p| p["spec"]["containers"][0]["resources"]["limits"]["cpu"] == "1").await;
    assert_eq!(node.cri.calls("PullImage").len(), 1);
    node.cri.release("PullImage");
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    assert_eq!(node.cri.calls("PullImage").len(), 1);
    assert_eq!(node.cri.calls("RunPodSandbox web").len(), 1);
    assert_eq!(node.cri.lock().overlaps, Vec::<String>::new());
}

#[tokio::test]
async fn a_removal_interrupts_a_pull() {
    let mut node = Node::new();
    node.cri.hold("PullImage");
    node.apply("web.yaml", &pod("web", "").replace("img:1", "slow:1"));
    node.start().await;
    node.cri.wait("the pull", |s| s.calls.iter().any(|(_, c)| c == "PullImage slow:1")).await;
    node.delete("web.yaml");
    node.cri.wait("it is gone", |s| s.sandboxes.is_empty()).await;
    assert!(node.cri.calls("CreateContainer").is_empty());
}

#[tokio::test(start_paused = true)]
async fn failing_pulls_back_off_and_an_import_ends_the_wait() {
    let mut node = Node::new();
    node.apply("web.yaml", &pod("web", "").replace("img:1", "gone:1"));
    node.start().await;
    node.cri.wait("three pulls", |s| s.calls.iter().filter(|(_, c)| c.starts_with("PullImage")).count() == 3).await;
    let pulls = node.cri.calls("PullImage");
    let gaps: Vec<u64> = pulls.windows(2).map(|w| (w[1].0 - w[0].0).as_secs()).collect();
    assert_eq!(gaps, [10, 20]);
    let found = node
        .wait_pod("web-n1", "ImagePullBackOff", |p| {
            p["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "ImagePullBackOff"
        })
        .await;
    let message = found["status"]["containerStatuses"][0]["state"]["waiting"]["message"].as_str().unwrap();
    assert!(
        message.starts_with(
            "Back-off pulling image \"gone:1\": ErrImagePull: rpc error: code = NotFound desc = no such image: gone:1"
        ),
        "{message}"
    );
    assert_eq!(phase(&found), "Pending");
    node.cri.add_image("gone:1");
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
}

#[tokio::test(start_paused = true)]
async fn failures_of_the_sandbox_are_retried_without_haste() {
    let mut node = Node::new();
    node.cri.fail("RunPodSandbox", [Status::unknown("no address left"), Status::unknown("no address left")]);
    node.apply("web.yaml", &pod("web", ""));
    node.start().await;
    node.cri.wait("the start", |s| s.calls.iter().any(|(_, c)| c == "StartContainer c/0")).await;
    let runs = node.cri.calls("RunPodSandbox");
    let gaps: Vec<u64> = runs.windows(2).map(|w| (w[1].0 - w[0].0).as_secs()).collect();
    assert_eq!(gaps, [10, 10]);
    assert!(runs.iter().all(|(_, c)| c == "RunPodSandbox web-n1/0"));
}

#[tokio::test(start_paused = true)]
async fn pods_wait_for_the_network_but_host_network_pods_do_not() {
    let mut node = Node::new();
    node.cri.lock().network_ready = false;
    node.apply("web.yaml", &pod("web", ""));
    node.apply("host.yaml", &pod("host", "  hostNetwork: true\n"));
    node.start().await;
    let host = node.wait_pod("host-n1", "Running", |p| phase(p) == "Running").await;
    assert_eq!(host["status"]["podIP"], "192.0.2.1");
    assert!(node.cri.calls("RunPodSandbox web").is_empty());
    node.cri.lock().network_ready = true;
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
}

#[tokio::test]
async fn a_start_error_is_told_and_counted() {
    let mut node = Node::new();
    node.cri.behave("c", [Behaviour::FailToStart, Behaviour::FailToStart]);
    node.apply("web.yaml", &pod("web", ""));
    let mut config = node.config().await;
    config.crash_backoff.base = Duration::from_secs(1000);
    node.start_with(config);
    let found = node
        .wait_pod("web-n1", "back-off", |p| {
            p["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "CrashLoopBackOff"
        })
        .await;
    let last = &found["status"]["containerStatuses"][0]["lastState"]["terminated"];
    assert_eq!((last["exitCode"].as_i64(), last["reason"].as_str()), (Some(128), Some("StartError")));
}

#[tokio::test]
async fn a_dead_sandbox_is_replaced_with_the_next_attempt() {
    let mut node = Node::new();
    node.apply("web.yaml", &pod("web", ""));
    node.start().await;
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    node.stop().await;
    node.cri.reboot();
    node.start().await;
    let found = node
        .wait_pod("web-n1", "Running again", |p| {
            p["status"]["containerStatuses"][0]["restartCount"] == 1 && phase(p) == "Running"
        })
        .await;
    assert_eq!(node.cri.calls("RunPodSandbox").last().unwrap().1, "RunPodSandbox web-n1/1");
    assert_eq!(found["status"]["containerStatuses"][0]["lastState"]["terminated"]["exitCode"], 255);
}

#[tokio::test]
async fn finished_pods_do_not_run_again_after_a_reboot() {
    let mut node = Node::new();
    node.cri.behave("c", [Behaviour::Exit(0)]);
    node.apply("never.yaml", &pod("never", "  restartPolicy: Never\n"));
    node.start().await;
    node.wait_pod("never-n1", "Succeeded", |p| phase(p) == "Succeeded").await;
    node.cri.behave("c", [Behaviour::Exit(0)]);
    node.apply("once.yaml", &pod("once", "  restartPolicy: OnFailure\n"));
    node.wait_pod("once-n1", "Succeeded", |p| phase(p) == "Succeeded").await;
    node.apply("killed.yaml", &pod("killed", "  restartPolicy: Never\n"));
    node.wait_pod("killed-n1", "Running", |p| phase(p) == "Running").await;
    node.stop().await;
    node.cri.reboot();
    let starts = node.cri.calls("StartContainer").len();
    node.start().await;
    node.wait_pod("never-n1", "Succeeded", |p| phase(p) == "Succeeded").await;
    node.wait_pod("once-n1", "Succeeded", |p| phase(p) == "Succeeded").await;
    let killed = node.wait_pod("killed-n1", "Failed", |p| phase(p) == "Failed").await;
    assert_eq!(killed["status"]["containerStatuses"][0]["state"]["terminated"]["reason"], "Unknown");
    assert_eq!(node.cri.calls("StartContainer").len(), starts);
}

#[tokio::test(start_paused = true)]
async fn without_an_event_stream_listing_finds_changes() {
    let mut node = Node::new();
    node.cri.lock().without_events = true;
    node.apply("web.yaml", &pod("web", ""));
    node.start().await;
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    node.cri.exit("c", 1);
    node.wait_pod("web-n1", "restarted", |p| p["status"]["containerStatuses"][0]["restartCount"] == 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_pod_over_its_deadline_fails_and_stops() {
    let mut node = Node::new();
    node.apply("web.yaml", &pod("web", "  activeDeadlineSeconds: 60\n"));
    let mut config = node.config().await;
    let start = tokio::time::Instant::now();
    config.clock = berth_kubelet::clock::Clock::from_fn(move || {
        k8s_openapi::jiff::Timestamp::from_second(i64::try_from(start.elapsed().as_secs()).unwrap()).unwrap()
    });
    node.start_with(config);
    node.cri.wait("it stops", |s| s.calls.iter().any(|(_, c)| c.starts_with("StopPodSandbox"))).await;
    let found = node.wait_pod("web-n1", "Failed", |p| phase(p) == "Failed").await;
    assert_eq!(found["status"]["reason"], "DeadlineExceeded");
    node.cri.wait("all has stopped", |s| s.running().is_empty() && s.ready_sandboxes().is_empty()).await;
}

#[tokio::test]
async fn logs_are_served_and_named_errors_given() {
    let mut node = Node::new();
    node.apply("web.yaml", &pod("web", ""));
    node.start().await;
    let found = node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    let uid = found["metadata"]["uid"].as_str().unwrap();
    let log = node.path("logs").join(format!("default_web-n1_{uid}/c/0.log"));
    std::fs::write(log, "2026-01-01T00:00:00.000000000Z stdout F hello\n").unwrap();
    let (code, body) = node.get("/containerLogs/default/web-n1/c").await;
    assert_eq!(code, 200);
    assert!(body.contains("hello\n") && !body.contains("stdout"), "{body}");
    let (code, body) = node.get("/containerLogs/default/web-n1/x").await;
    assert_eq!((code, body.as_str()), (404, "container \"x\" not found in pod \"web-n1\"\n"));
    assert_eq!(node.get("/containerLogs/default/none/c").await.0, 404);
    let (code, body) = node.get("/containerLogs/default/web-n1/c?previous=true").await;
    assert_eq!((code, body.as_str()), (400, "previous terminated container \"c\" in pod \"web-n1\" not found\n"));
    let running = node.get("/runningpods/").await.1;
    assert!(running.contains("\"name\":\"web-n1\""), "{running}");
}

#[tokio::test(start_paused = true)]
async fn probes_decide_about_start_readiness_and_life() {
    let mut node = Node::new();
    let refuse = || Status::aborted("exit 1");
    // The startup probe fails once; later the liveness probe fails twice.
    node.apply(
        "web.yaml",
        &pod("web", "").replace(
            "image: 'img:1'",
            "image: 'img:1', startupProbe: {exec: {command: [start]}, periodSeconds: 1}, livenessProbe: {exec: {command: [live]}, periodSeconds: 2, failureThreshold: 2, terminationGracePeriodSeconds: 1}, readinessProbe: {exec: {command: [ready]}, periodSeconds: 3}",
        ),
    );
    node.cri.fail("ExecSync start", [refuse()]);
    node.start().await;
    let ready = |p: &serde_json::Value| p["status"]["containerStatuses"][0]["ready"] == true;
    node.wait_pod("web-n1", "ready", ready).await;
    let execs: Vec<_> = node.cri.calls("ExecSync").into_iter().map(|(_, c)| c).take(2).collect();
    assert_eq!(execs, ["ExecSync c/0 start", "ExecSync c/0 start"], "nothing else is asked before it has started");
    assert_eq!(node.cri.lock().running(), ["c"]);
    node.cri.fail("ExecSync live", [refuse(), refuse()]);
    node.cri.wait("the restart", |s| s.calls.iter().any(|(_, c)| c == "StartContainer c/1")).await;
    assert_eq!(node.cri.calls("StopContainer").first().unwrap().1, "StopContainer c/0 1", "the probe's grace, not the pod's");
    let again =
        node.wait_pod("web-n1", "ready again", |p| ready(p) && p["status"]["containerStatuses"][0]["restartCount"] == 1).await;
    assert_eq!(again["status"]["containerStatuses"][0]["lastState"]["terminated"]["exitCode"], 143);
}

#[tokio::test]
async fn a_pod_has_a_user_namespace_of_its_own_where_the_runtime_can_make_one() {
    let mut node = Node::new();
    node.apply("web.yaml", &pod("web", "  hostUsers: false\n"));
    let mut config = node.config().await;
    config.timing.retry = Duration::from_millis(50);
    config.subordinate_ids = [node.path("none"), node.path("none")];
    node.start_with(config);
    let refused = "FailedCreatePodSandBox: Failed to create pod sandbox: can't set `spec.hostUsers: false`, runtime does not support user namespaces";
    eventually("the refusal", || node.events().contains(&refused.to_owned())).await;
    assert!(node.cri.calls("RunPodSandbox").is_empty());
    node.cri.lock().user_namespaces = true;
    let found = node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    let uid = found["metadata"]["uid"].as_str().unwrap();
    let state = node.cri.lock();
    let sandbox = state.sandboxes.values().next().unwrap().linux.clone().unwrap();
    let users = sandbox.namespaces.unwrap().options.unwrap().userns_options.unwrap();
    let (first, length) = (users.uids[0].host_id, users.gids[0].length);
    assert!(first >= 65536 && first.is_multiple_of(65536), "{users:?}");
    assert_eq!((users.gids[0].host_id, length, users.mode), (first, 65536, 0));
    let container = state.configs.values().next().unwrap();
    assert!(container.mounts.iter().all(|m| m.uid_mappings == users.uids && m.gid_mappings == users.gids));
    let own = container.linux.clone().unwrap().security_context.unwrap().namespace_options.unwrap();
    assert_eq!(own.userns_options, Some(users));
    assert!(node.path("kubelet/pods").join(uid).join("userns").exists());
}

#[tokio::test]
async fn a_rule_makes_all_containers_begin_again() {
    let mut node = Node::new();
    node.cri.behave("setup", [Behaviour::Exit(0), Behaviour::Exit(0)]);
    let rule = "{action: RestartAllContainers, exitCodes: {operator: In, values: [42]}}";
    let spec = format!(
        "  initContainers: [{{name: setup, image: 'img:1'}}]\n  containers: [{{name: d, image: 'img:1'}}, \
         {{name: c, image: 'img:1', restartPolicy: Never, restartPolicyRules: [{rule}]}}]\n"
    );
    let manifest =
        format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: web}}\nspec:\n  terminationGracePeriodSeconds: 3\n{spec}");
    node.apply("web.yaml", &manifest);
    node.start().await;
    let ready = |p: &serde_json::Value| p["status"]["conditions"][2]["status"] == "True";
    node.wait_pod("web-n1", "ready", ready).await;
    node.cri.exit("c", 42);
    node.cri.wait("the second life", |s| s.calls.iter().any(|(_, c)| c == "StartContainer c/1")).await;
    let starts: Vec<_> = node.cri.calls("StartContainer").into_iter().map(|(_, c)| c.replace("StartContainer ", "")).collect();
    assert_eq!(starts, ["setup/0", "d/0", "c/0", "setup/1", "d/1", "c/1"]);
    assert_eq!(node.cri.calls("RunPodSandbox").len(), 1, "in the same sandbox");
    let found = node.wait_pod("web-n1", "ready again", ready).await;
    let states = &found["status"]["containerStatuses"];
    assert_eq!((&states[0]["restartCount"], &states[1]["restartCount"]), (&1.into(), &1.into()));
    assert_eq!(states[0]["lastState"]["terminated"]["exitCode"], 42, "what started it");
    let uid = found["metadata"]["uid"].as_str().unwrap();
    assert!(node.path("logs").join(format!("default_web-n1_{uid}/c/0.log")).exists(), "the last life's log stays");
}

#[tokio::test]
async fn a_resize_that_fails_is_told_and_tried_again() {
    let limits =
        |cpu: &str| pod("web", "").replace("image: 'img:1'", &format!("image: 'img:1', resources: {{limits: {{cpu: {cpu}}}}}"));
    let mut node = Node::new();
    node.apply("web.yaml", &limits("100m"));
    let mut config = node.config().await;
    config.timing.retry = Duration::from_millis(300);
    node.start_with(config);
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    node.cri.fail("UpdateContainerResources", [Status::unknown("no room"), Status::unknown("no room")]);
    node.apply("web.yaml", &limits("200m"));
    let first = |p: &serde_json::Value| p["status"]["conditions"][0].clone();
    let failing = node.wait_pod("web-n1", "the error", |p| first(p)["reason"] == "Error").await;
    let shown = first(&failing);
    assert_eq!((&shown["type"], &shown["message"]), (&"PodResizeInProgress".into(), &"no room".into()));
    node.wait_pod("web-n1", "the end of it", |p| first(p)["type"] != "PodResizeInProgress").await;
    assert_eq!(node.cri.calls("UpdateContainerResources").len(), 3);
    let events = node.events();
    for reason in
        ["ResizeStarted: Pod resize started: {", "ResizeError: Pod resize error: {", "ResizeCompleted: Pod resize completed: {"]
    {
        assert!(events.iter().any(|event| event.starts_with(reason)), "{reason} in {events:#?}");
    }
    assert_eq!(node.cri.calls("StartContainer").len(), 1);
}

#[tokio::test]
async fn a_resize_that_restarts_the_container_is_told_as_one_and_not_as_a_back_off() {
    let sized = |memory: &str| {
        let policy = "resizePolicy: [{resourceName: memory, restartPolicy: RestartContainer}]";
        let more = format!("image: 'img:1', {policy}, resources: {{limits: {{memory: {memory}}}}}");
        pod("web", "").replace("image: 'img:1'", &more)
    };
    let restarts = |p: &serde_json::Value| p["status"]["containerStatuses"][0]["restartCount"] == 1 && phase(p) == "Running";
    let mut node = Node::new();
    node.apply("web.yaml", &sized("64Mi"));
    node.start().await;
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    node.apply("web.yaml", &sized("128Mi"));
    node.wait_pod("web-n1", "restarted", restarts).await;
    eventually("the end is told", || node.events().iter().any(|e| e.starts_with("ResizeCompleted: "))).await;
    let events = node.events();
    assert_eq!(events.iter().filter(|e| e.starts_with("ResizeStarted: ")).count(), 1, "{events:#?}");
    assert!(!events.iter().any(|e| e.starts_with("BackOff")), "{events:#?}");
}

#[tokio::test]
async fn a_container_that_is_being_started_again_does_not_back_off() {
    let mut node = Node::new();
    node.apply("web.yaml", &pod("web", "  - {name: other, image: 'img:1'}\n"));
    node.start().await;
    node.cri.wait("both run", |s| s.running().len() == 2).await;
    node.cri.hold("CreateContainer");
    node.cri.exit("c", 1);
    node.cri.wait("a third creation", |s| s.calls.iter().filter(|(_, c)| c.starts_with("CreateContainer")).count() == 3).await;
    // The worker looks while the start goes on.
    node.cri.exit("other", 1);
    let has_ended = |p: &serde_json::Value| {
        let statuses = p["status"]["containerStatuses"].as_array().unwrap();
        statuses.iter().any(|c| c["name"] == "other" && !c["state"]["running"].is_object())
    };
    node.wait_pod("web-n1", "the other's end", has_ended).await;
    let events = node.events();
    let named = |e: &&String| e.starts_with("BackOff") && e.contains("container c ");
    assert_eq!(events.iter().filter(named).count(), 0, "{events:#?}");
    node.cri.release("CreateContainer");
    node.cri.wait("both run again", |s| s.running().len() == 2).await;
}

fn sized(name: &str, cpu: &str) -> String {
    pod(name, "").replace("image: 'img:1'", &format!("image: 'img:1', resources: {{requests: {{cpu: '{cpu}'}}}}"))
}

/// Status, reason and message of the condition that tells of a resize that waits.
fn waits(pod: &serde_json::Value) -> Option<(String, String)> {
    let conditions = pod["status"]["conditions"].as_array()?;
    let found = conditions.iter().find(|c| c["type"] == "PodResizePending" && c["status"] == "True")?;
    Some((found["reason"].as_str()?.to_owned(), found["message"].as_str()?.to_owned()))
}

#[tokio::test]
async fn a_resize_waits_for_room_also_over_a_restart_and_what_never_fits_is_told() {
    let mut node = Node::new();
    let cpus = berth_kubelet::node::Capacity::read(node.root.path(), std::path::Path::new("/sys/devices/system")).cpu_millis;
    let mut config = node.config().await;
    config.timing.relist = Duration::from_millis(200);
    node.apply("a.yaml", &sized("a", "100m"));
    node.apply("b.yaml", &sized("b", &format!("{}m", cpus / 2)));
    node.start_with(config.clone());
    for name in ["a-n1", "b-n1"] {
        node.wait_pod(name, "Running", |p| phase(p) == "Running").await;
    }
    let most = cpus - 100;
    node.apply("a.yaml", &sized("a", &format!("{most}m")));
    let deferred = format!("Node didn't have enough resource: cpu, requested: {most}, used: {}, capacity: {cpus}", cpus / 2);
    let deferred = Some(("Deferred".to_owned(), deferred));
    let found = node.wait_pod("a-n1", "deferred", |p| waits(p) == deferred).await;
    assert_eq!(found["spec"]["containers"][0]["resources"]["requests"]["cpu"], format!("{most}m"), "as its source has it");
    assert_eq!(found["status"]["containerStatuses"][0]["allocatedResources"]["cpu"], "100m");
    let events = || node.events().into_iter().filter(|e| e.starts_with("ResizeDeferred: Pod resize Deferred: {")).count();
    assert_eq!(events(), 1, "{:#?}", node.events());
    node.stop().await;
    node.start_with(config);
    let found = node.wait_pod("a-n1", "still deferred", |p| phase(p) == "Running" && waits(p) == deferred).await;
    assert_eq!(found["status"]["containerStatuses"][0]["allocatedResources"]["cpu"], "100m");
    assert!(node.cri.calls("UpdateContainerResources").is_empty());
    node.delete("b.yaml");
    node.cri.wait("the resize", |s| s.calls.iter().any(|(_, c)| c == "UpdateContainerResources c/0")).await;
    node.wait_pod("a-n1", "resized", |p| {
        waits(p).is_none() && p["status"]["containerStatuses"][0]["allocatedResources"]["cpu"] == format!("{most}m")
    })
    .await;
    node.apply("a.yaml", &sized("a", &format!("{}m", cpus + 1)));
    let never = format!("Node didn't have enough capacity: cpu, requested: {}, capacity: {cpus}", cpus + 1);
    node.wait_pod("a-n1", "infeasible", |p| waits(p) == Some(("Infeasible".to_owned(), never.clone()))).await;
    node.apply("a.yaml", &sized("a", &format!("{most}m")));
    node.wait_pod("a-n1", "as it was", |p| waits(p).is_none()).await;
    assert_eq!(
        (node.cri.calls("UpdateContainerResources").len(), node.cri.calls("StopContainer c/0").len()),
        (1, 1),
        "b alone ended"
    );
}
