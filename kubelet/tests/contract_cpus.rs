//! The CPU manager's static policy over the fake runtime, on a machine of eight processors that is made of files.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;

use berth_kubelet::Config;
use berth_kubelet::config::CpuPolicy;
use support::{Node, eventually};

/// Two sockets of two cores of two threads; core n has the threads n and n + 4.
fn machine(node: &Node) {
    let write = |path: String, text: String| {
        let path = node.path("sys").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    write("cpu/online".into(), "0-7\n".into());
    for cpu in 0..8 {
        let core = cpu % 4;
        write(format!("cpu/cpu{cpu}/topology/physical_package_id"), format!("{}\n", core / 2));
        write(format!("cpu/cpu{cpu}/topology/thread_siblings_list"), format!("{core},{}\n", core + 4));
    }
    write("node/node0/cpulist".into(), "0-1,4-5\n".into());
    write("node/node1/cpulist".into(), "2-3,6-7\n".into());
}

async fn config(node: &Node) -> Config {
    let mut config = node.config().await;
    config.sys_devices = node.path("sys");
    config.cpu_manager.policy = CpuPolicy::Static;
    config.policy.exclusive_cpus = true;
    config.reservations.cpus = Some([0].into());
    config
}

fn pod(name: &str, cpu: &str) -> String {
    support::pod(name, "").replace("'img:1'", &format!("'img:1', resources: {{limits: {{cpu: {cpu}, memory: 1Mi}}}}"))
}

/// The processors on which the runtime has a pod's container, and its quota.
fn runs_on(node: &Node, pod: &str) -> (String, i64) {
    let state = node.cri.lock();
    let running = state.containers.values().filter(|(_, c)| c.state == 1);
    let of_pod = running.filter(|(_, c)| c.labels["io.kubernetes.pod.name"] == pod);
    let mut given = of_pod.filter_map(|(_, c)| c.resources.as_ref()?.linux.clone());
    let linux = given.next_back().unwrap_or_default();
    (linux.cpuset_cpus, linux.cpu_quota)
}

async fn running(node: &Node, name: &str) -> serde_json::Value {
    node.wait_pod(name, "Running", |p| p["status"]["phase"] == "Running").await
}

async fn moved(node: &Node, pod: &str, cpus: &str) {
    eventually(&format!("{pod} runs on {cpus}"), || runs_on(node, pod).0 == cpus).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn guaranteed_containers_have_whole_processors_and_the_others_make_room_and_spread_again() {
    let mut node = Node::new();
    machine(&node);
    let mut config = config(&node).await;
    config.cpu_manager.full_cores = true;
    node.start_with(config.clone());
    node.apply("many.yaml", &support::pod("many", ""));
    running(&node, "many-n1").await;
    assert_eq!(runs_on(&node, "many-n1").0, "0-7");
    node.apply("fast.yaml", &pod("fast", "2"));
    running(&node, "fast-n1").await;
    assert_eq!(runs_on(&node, "fast-n1"), ("1,5".to_owned(), 0), "a whole core, and no quota");
    moved(&node, "many-n1", "0,2-4,6-7").await;
    // The next one finds a smaller pool.
    node.apply("later.yaml", &support::pod("later", ""));
    running(&node, "later-n1").await;
    assert_eq!(runs_on(&node, "later-n1").0, "0,2-4,6-7");
    node.apply("greedy.yaml", &pod("greedy", "3"));
    let greedy = node.wait_pod("greedy-n1", "Failed", |p| p["status"]["phase"] == "Failed").await;
    assert_eq!(greedy["status"]["reason"], "SMTAlignmentError");
    let why = "SMT Alignment Error: requested 3 cpus not multiple cpus per core = 2";
    assert_eq!(greedy["status"]["message"], format!("Pod was rejected: {why}"));
    let (_, metrics) = node.get("/metrics").await;
    for told in [
        "kubelet_cpu_manager_pinning_requests_total 2",
        "kubelet_cpu_manager_pinning_errors_total 1",
        "kubelet_cpu_manager_exclusive_cpu_allocation_count 2",
        // Without the reserved one.
        "kubelet_cpu_manager_shared_pool_size_millicores 5000",
    ] {
        assert!(metrics.lines().any(|line| line == told), "{told} in {metrics}");
    }
    // A new kubelet goes on where the old one was, and moves nobody.
    let state = node.path("kubelet/cpu_manager_state");
    let kept: serde_json::Value = serde_json::from_slice(&fs::read(&state).unwrap()).unwrap();
    assert_eq!((kept["policyName"].as_str(), kept["defaultCpuSet"].as_str()), (Some("static"), Some("0,2-4,6-7")));
    node.stop().await;
    let updates = node.cri.calls("UpdateContainerResources").len();
    node.start_with(config);
    running(&node, "fast-n1").await;
    node.apply("third.yaml", &pod("third", "2"));
    running(&node, "third-n1").await;
    assert_eq!(runs_on(&node, "third-n1").0, "2,6");
    moved(&node, "many-n1", "0,3-4,7").await;
    moved(&node, "later-n1", "0,3-4,7").await;
    assert_eq!(node.cri.calls("UpdateContainerResources").len(), updates + 2);
    // What ends gives back.
    node.delete("fast.yaml");
    node.wait_gone("fast-n1").await;
    moved(&node, "many-n1", "0-1,3-5,7").await;
    assert_eq!(node.cri.lock().overlaps, Vec::<String>::new());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_edit_of_how_many_processors_a_running_container_has_is_infeasible() {
    let mut node = Node::new();
    machine(&node);
    let config = config(&node).await;
    node.start_with(config);
    node.apply("fast.yaml", &pod("fast", "2"));
    running(&node, "fast-n1").await;
    node.apply("fast.yaml", &pod("fast", "4"));
    let condition = |pod: &serde_json::Value| {
        let all = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
        all.into_iter().find(|c| c["type"] == "PodResizePending").unwrap_or_default()
    };
    let told = node.wait_pod("fast-n1", "told", |p| condition(p)["status"] == "True").await;
    let text = "Resize is infeasible for Guaranteed Pods alongside CPU Manager policy \"static\"";
    assert_eq!((condition(&told)["reason"].as_str(), condition(&told)["message"].as_str()), (Some("Infeasible"), Some(text)));
    let quoted = text.replace('"', "\\\"");
    eventually("the event is there", || {
        node.events().iter().any(|e| e.starts_with("ResizeInfeasible: Pod resize Infeasible: ") && e.contains(&quoted))
    })
    .await;
    assert_eq!(runs_on(&node, "fast-n1").0, "1,5");
    assert!(node.cri.calls("UpdateContainerResources").is_empty(), "nothing was tried");
    // Back to what it has: nothing is pending any more.
    node.apply("fast.yaml", &pod("fast", "2"));
    node.wait_pod("fast-n1", "as it was", |p| condition(p).is_null()).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_cannot_be_moved_is_tried_again() {
    let mut node = Node::new();
    machine(&node);
    let mut config = config(&node).await;
    config.cpu_manager.reconcile = std::time::Duration::from_millis(50);
    node.start_with(config);
    node.apply("many.yaml", &support::pod("many", ""));
    running(&node, "many-n1").await;
    node.cri.fail("UpdateContainerResources", [tonic::Status::unknown("busy"), tonic::Status::unknown("busy")]);
    node.apply("fast.yaml", &pod("fast", "2"));
    running(&node, "fast-n1").await;
    moved(&node, "many-n1", "0,2-4,6-7").await;
    assert_eq!(node.cri.calls("UpdateContainerResources").len(), 3);
    node.stop().await;
}
