//! The care of the node: what it counts of itself, what it removes when it runs short.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use berth_kubelet::addresses::AddressSource;
use berth_kubelet::eviction::threshold::{Quota, Signal, Threshold};
use support::fake_cri::Behaviour;
use support::{Node, pod};

fn phase(pod: &serde_json::Value) -> &str {
    pod["status"]["phase"].as_str().unwrap_or_default()
}

/// Waits until the metrics have a line.
async fn counted(node: &Node, line: &str) {
    let limit = std::time::Instant::now() + Duration::from_secs(30);
    loop {
        let page = node.get("/metrics").await.1;
        if page.lines().any(|found| found == line) {
            return;
        }
        assert!(std::time::Instant::now() < limit, "{line} is not in:\n{page}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A threshold that is always met.
fn always(signal: Signal) -> Threshold {
    Threshold { signal, below: Quota::Amount(i64::MAX), grace: None, reclaim: None }
}

#[tokio::test]
async fn what_the_node_removes_refuses_and_evicts_is_counted() {
    let mut node = Node::new();
    node.apply("gone.yaml", &pod("gone", ""));
    node.start().await;
    node.wait_pod("gone-n1", "Running", |p| phase(p) == "Running").await;
    node.stop().await;
    node.delete("gone.yaml");
    node.cri.add_image("unused:1");
    node.cri.lock().images.get_mut("img:1").unwrap().pinned = true;
    let mut config = node.config().await;
    config.max_pods = 1;
    config.timing.relist = Duration::from_millis(100);
    config.timing.image_gc = Duration::from_millis(200);
    config.image_gc.min_age = Duration::ZERO;
    config.image_gc.max_age = Some(Duration::from_millis(1));
    config.image_gc.high_percent = 100;
    node.start_with(config);
    node.wait_socket().await;
    counted(&node, "kubelet_orphaned_runtime_pods_total 1").await;
    node.wait_gone("gone-n1").await;
    node.apply("a.yaml", &pod("a", ""));
    node.wait_pod("a-n1", "Running", |p| phase(p) == "Running").await;
    node.apply("b.yaml", &pod("b", ""));
    counted(&node, "kubelet_admission_rejections_total{reason=\"OutOfpods\"} 1").await;
    counted(&node, "kubelet_image_garbage_collected_total{reason=\"age\"} 1").await;
    let page = node.get("/metrics").await.1;
    let interval = page.lines().find_map(|line| line.strip_prefix("kubelet_pleg_relist_interval_seconds_count "));
    assert!(interval.is_some_and(|count| count.parse::<u64>().unwrap() > 0), "{page}");
    // With room for two it would be let in now, and be evicted after the other.
    node.delete("b.yaml");
    node.wait_gone("b-n1").await;
    node.stop().await;
    let mut config = node.config().await;
    config.eviction.thresholds = vec![always(Signal::MemoryAvailable)];
    config.eviction.static_pods = true;
    config.timing.eviction = Duration::from_millis(50);
    node.start_with(config);
    let evicted = node.wait_pod("a-n1", "evicted", |p| phase(p) == "Failed").await;
    assert_eq!(evicted["status"]["reason"], "Evicted");
    counted(&node, "kubelet_evictions{eviction_signal=\"memory.available\"} 1").await;
}

#[tokio::test]
async fn what_the_kernel_kills_for_want_of_memory_is_named() {
    let mut node = Node::new();
    rustix::fs::mknodat(rustix::fs::CWD, node.path("kmsg"), rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
    // A pipe that is open for both is neither refused nor over when it has no other end.
    let mut log = std::fs::OpenOptions::new().read(true).write(true).open(node.path("kmsg")).unwrap();
    node.apply("web.yaml", &pod("web", ""));
    node.start().await;
    let found = node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    let uid = found["metadata"]["uid"].as_str().unwrap();
    let id = found["status"]["containerStatuses"][0]["containerID"].as_str().unwrap().strip_prefix("fake://").unwrap();
    let line = |rest: &str| format!("6,1,2,-;oom-kill:constraint=X,nodemask=(null),cpuset=/,mems_allowed=0,{rest},uid=0\n");
    let own = line(&format!("oom_memcg=/kubepods/pod{uid},task_memcg=/kubepods/pod{uid}/{id},task=python3,pid=41"));
    let system = line("global_oom,task_memcg=/init.scope,task=stress,pid=42");
    let foreign = line("oom_memcg=/user.slice,task_memcg=/user.slice,task=other,pid=43");
    for text in ["6,1,2,-;something else\n", &own, &foreign, &system] {
        log.write_all(text.as_bytes()).unwrap();
    }
    let events = [
        "OOMKilling: Memory cgroup out of memory: killed process 41 (python3)",
        "SystemOOM: System OOM encountered, victim process: stress, pid: 42",
    ];
    support::eventually("the events", || events.iter().all(|event| node.events().contains(&(*event).to_owned()))).await;
    assert!(!node.events().iter().any(|event| event.contains("43")), "{:#?}", node.events());
}

#[tokio::test]
async fn the_nodes_new_address_is_in_the_statuses_and_restarts_nothing() {
    let mut node = Node::new();
    let address = Arc::new(Mutex::new(vec!["192.0.2.1".parse().unwrap()]));
    node.apply("web.yaml", &pod("web", ""));
    node.apply("host.yaml", &pod("host", "  hostNetwork: true\n"));
    let mut config = node.config().await;
    config.timing.addresses = Duration::from_millis(20);
    let found = address.clone();
    config.node_ip_source = Some(AddressSource::from_fn(move || found.lock().unwrap().clone()));
    node.start_with(config);
    let host_ip = |p: &serde_json::Value| p["status"]["hostIP"].as_str().map(str::to_owned);
    for name in ["web-n1", "host-n1"] {
        node.wait_pod(name, "Running", |p| phase(p) == "Running" && host_ip(p).as_deref() == Some("192.0.2.1")).await;
    }
    *address.lock().unwrap() = vec!["192.0.2.7".parse().unwrap(), "2001:db8::7".parse().unwrap()];
    let web = node.wait_pod("web-n1", "the new address", |p| host_ip(p).as_deref() == Some("192.0.2.7")).await;
    assert_eq!(web["status"]["hostIPs"][1]["ip"], "2001:db8::7");
    assert_eq!(web["status"]["podIP"].as_str().map(|ip| ip.starts_with("10.0.0.")), Some(true));
    node.wait_pod("host-n1", "the new address", |p| p["status"]["podIP"] == "192.0.2.7").await;
    // Without a network the last addresses stay.
    address.lock().unwrap().clear();
    node.apply("late.yaml", &pod("late", ""));
    node.wait_pod("late-n1", "Running", |p| phase(p) == "Running" && host_ip(p).as_deref() == Some("192.0.2.7")).await;
    assert_eq!((node.cri.calls("StartContainer").len(), node.cri.calls("StopContainer").len()), (3, 0));
}

#[tokio::test]
async fn pods_get_the_servers_behind_a_resolver_on_loopback_unless_one_is_named() {
    let write = |node: &Node, file: &str, server: &str| {
        std::fs::write(node.path(file), format!("nameserver {server}\nsearch example.org\n")).unwrap();
    };
    for (uplink, named, server, notice) in [
        (Some("192.0.2.99"), false, "192.0.2.99", Some("pods get the servers of")),
        (Some("192.0.2.99"), true, "127.0.0.53", Some("which pods cannot reach")),
        (Some("127.0.0.1"), false, "127.0.0.53", Some("which pods cannot reach")),
        (None, false, "127.0.0.53", Some("which pods cannot reach")),
    ] {
        let mut node = Node::new();
        write(&node, "resolv.conf", "127.0.0.53");
        uplink.into_iter().for_each(|uplink| write(&node, "uplink.conf", uplink));
        node.apply("web.yaml", &pod("web", ""));
        let mut config = node.config().await;
        if named {
            config.resolv_conf_uplink = None;
        }
        node.start_with(config);
        node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
        assert_eq!(node.cri.lock().resolvers, [server], "{uplink:?} {named}");
        let events = node.events();
        let told = events.iter().find(|event| event.starts_with("HostResolver: "));
        assert_eq!(told.is_some_and(|event| event.contains(notice.unwrap_or("-"))), notice.is_some(), "{events:#?}");
    }
}

#[tokio::test]
async fn on_a_full_disk_dead_containers_go_before_images_and_what_has_ended_stays_over() {
    let mut node = Node::new();
    node.cri.behave("done", [Behaviour::Exit(0)]);
    node.apply("done.yaml", &pod("done", "  restartPolicy: OnFailure\n").replace("name: c,", "name: done,"));
    node.apply("web.yaml", &pod("web", ""));
    node.cri.lock().images.get_mut("img:1").unwrap().pinned = true;
    let mut config = node.config().await;
    config.max_pods = 2;
    config.image_gc.min_age = Duration::ZERO;
    config.eviction.thresholds = vec![always(Signal::NodeFsAvailable)];
    // The pod is over before the first of them.
    config.timing.eviction = Duration::from_secs(3);
    node.start_with(config.clone());
    let before = node.wait_pod("done-n1", "Succeeded", |p| phase(p) == "Succeeded").await;
    // Images are looked at in each round: this one is there when the pod is over.
    node.cri.add_image("unused:1");
    node.cri.wait("the image goes", |s| s.calls.iter().any(|(_, c)| c.starts_with("RemoveImage"))).await;
    let calls = node.cri.call_names();
    let at = |name: &str| calls.iter().position(|call| call.starts_with(name)).unwrap_or(usize::MAX);
    assert!(at("RemoveContainer done/0") < at("RemoveImage"), "{calls:#?}");
    assert!(at("RemovePodSandbox done-n1/0") < at("RemoveImage"), "{calls:#?}");
    let state = |p: &serde_json::Value| (p["status"]["phase"].clone(), p["status"]["containerStatuses"].clone());
    assert_eq!(state(&node.pod("done-n1").await.unwrap()), state(&before));
    node.stop().await;
    node.apply("late.yaml", &pod("late", ""));
    node.start_with(config);
    node.wait_pod("late-n1", "Running", |p| phase(p) == "Running").await;
    let after = node.wait_pod("done-n1", "still over", |p| phase(p) == "Succeeded").await;
    assert_eq!(state(&after), state(&before));
    assert_eq!((node.cri.calls("StartContainer done").len(), node.cri.lock().running()), (1, vec!["c".into(), "c".into()]));
    node.delete("done.yaml");
    node.wait_gone("done-n1").await;
}

#[tokio::test]
async fn probes_of_the_hosts_network_follow_the_nodes_address() {
    let mut node = Node::new();
    let old = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = old.local_addr().unwrap().port();
    let new = tokio::net::TcpListener::bind(("127.0.0.2", port)).await.unwrap();
    let probe = format!("image: 'img:1', livenessProbe: {{tcpSocket: {{port: {port}}}, periodSeconds: 1, failureThreshold: 1}}");
    node.apply("host.yaml", &pod("host", "  hostNetwork: true\n").replace("image: 'img:1'", &probe));
    let address = Arc::new(Mutex::new(vec!["127.0.0.1".parse().unwrap()]));
    let mut config = node.config().await;
    config.node_ips = address.lock().unwrap().clone();
    config.timing.addresses = Duration::from_millis(20);
    let found = address.clone();
    config.node_ip_source = Some(AddressSource::from_fn(move || found.lock().unwrap().clone()));
    node.start_with(config);
    let limit = Duration::from_secs(30);
    tokio::time::timeout(limit, old.accept()).await.unwrap().unwrap();
    *address.lock().unwrap() = vec!["127.0.0.2".parse().unwrap()];
    tokio::time::timeout(limit, new.accept()).await.unwrap().unwrap();
    drop(old);
    tokio::time::timeout(limit, new.accept()).await.unwrap().unwrap();
    assert_eq!(node.cri.calls("StopContainer").len(), 0);
}

#[tokio::test]
async fn what_an_earlier_kubelet_left_of_a_pod_that_nobody_wants_goes_at_once() {
    let mut node = Node::new();
    let folder = node.path("kubelet/pods/4f3a");
    std::fs::create_dir_all(folder.join("volumes")).unwrap();
    std::fs::write(folder.join(".berth"), "").unwrap();
    node.start().await;
    support::eventually("the folder is gone", || !folder.exists()).await;
    node.stop().await;
}
