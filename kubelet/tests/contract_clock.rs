//! Wall clocks that jump: nothing restarts, nothing ends, nothing is removed before its time; what was measured outlives the
//! kubelet. Time is tokio's, paused; the wall clock is the test's own.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use berth_kubelet::Config;
use berth_kubelet::clock::{Clock, Uptime};
use k8s_openapi::jiff::Timestamp;
use support::fake_cri::Behaviour;
use support::{Node, pod};
use tokio::time::Instant;

/// 2025-01-01, and the jumps from there: to 1970 as after a boot without a battery, 40 years on, a day back.
const BEGIN: i64 = 1_735_689_600;
const JUMPS: [i64; 3] = [-BEGIN, 40 * 365 * 86_400, -86_400];

/// A wall clock that goes with tokio's and can be set, on a machine whose boot can be chosen.
#[derive(Clone)]
struct Wall {
    offset: Arc<AtomicI64>,
    start: Instant,
}

impl Wall {
    fn new() -> Wall {
        Wall { offset: Arc::new(AtomicI64::new(BEGIN)), start: Instant::now() }
    }

    fn jump(&self, seconds: i64) {
        self.offset.fetch_add(seconds, Ordering::SeqCst);
    }

    async fn config(&self, node: &Node, boot: &'static str) -> Config {
        let (wall, start) = (self.clone(), self.start);
        let now = move || {
            let passed = i64::try_from(wall.start.elapsed().as_secs()).unwrap();
            Timestamp::from_second(wall.offset.load(Ordering::SeqCst) + passed).unwrap()
        };
        let uptime = move || Uptime { boot: boot.into(), millis: u64::try_from(start.elapsed().as_millis()).unwrap() };
        let mut config = node.config().await;
        config.clock = Clock::from_fn(now).with_uptime(uptime);
        config
    }
}

fn phase(pod: &serde_json::Value) -> &str {
    pod["status"]["phase"].as_str().unwrap_or_default()
}

/// Lets the paused clock run until nothing more happens within `seconds`.
async fn pass(seconds: u64) {
    tokio::time::sleep(Duration::from_secs(seconds)).await;
}

fn probed(extra: &str) -> String {
    let probe = "image: 'img:1', livenessProbe: {exec: {command: [live]}, periodSeconds: 7, initialDelaySeconds: 20}";
    pod("web", extra).replace("image: 'img:1'", probe)
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_jumps_restarts_ends_and_removes_nothing() {
    for jump in JUMPS {
        let (mut node, wall) = (Node::new(), Wall::new());
        node.cri.add_image("unused:1");
        node.apply("web.yaml", &probed("  activeDeadlineSeconds: 300\n"));
        let mut config = wall.config(&node, "a").await;
        config.timing.image_gc = Duration::from_secs(30);
        config.image_gc.max_age = Some(Duration::from_secs(240));
        node.start_with(config);
        let begun = Instant::now();
        node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
        let folder = node.path("kubelet/pods/4f3a/volumes");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.with_file_name(".berth"), "").unwrap();
        let before = node.cri.call_names().into_iter().filter(|c| c.contains("Container c")).count();
        wall.jump(jump);
        pass(100).await;
        let changes = node.cri.call_names().into_iter().filter(|c| c.contains("Container c")).count();
        assert_eq!((changes, node.cri.calls("StopPodSandbox").len()), (before, 0), "{jump}");
        assert!(node.cri.calls("RemoveImage").is_empty(), "{jump}");
        assert!(folder.exists(), "a folder that was there for one look only ({jump})");
        let probes: Vec<u64> = node.cri.calls("ExecSync").iter().map(|(at, _)| (*at - begun).as_secs()).collect();
        assert_eq!(probes[0], 20, "{jump}");
        assert!(probes.windows(2).all(|w| w[1] - w[0] == 7), "{jump}: {probes:?}");
        node.cri.wait("the deadline", |s| s.calls.iter().any(|(_, c)| c.starts_with("StopPodSandbox"))).await;
        assert_eq!((node.cri.calls("StopPodSandbox")[0].0 - begun).as_secs(), 300, "{jump}");
        node.cri.wait("the unused image goes", |s| s.calls.iter().any(|(_, c)| c.starts_with("RemoveImage"))).await;
        assert!((Instant::now() - begun).as_secs() >= 240, "{jump}");
        node.stop().await;
        assert!(!folder.exists(), "it is nobody's for longer than a look");
    }
}

#[tokio::test(start_paused = true)]
async fn a_deadline_counts_on_over_a_restart_whatever_the_clock_says() {
    for jump in JUMPS {
        let (mut node, wall) = (Node::new(), Wall::new());
        node.apply("web.yaml", &pod("web", "  activeDeadlineSeconds: 60\n"));
        node.start_with(wall.config(&node, "a").await);
        let begun = Instant::now();
        let start = node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await["status"]["startTime"].clone();
        pass(30).await;
        node.stop().await;
        wall.jump(jump);
        pass(10).await;
        node.start_with(wall.config(&node, "a").await);
        let again = node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
        assert_eq!(again["status"]["startTime"], start);
        node.cri.wait("the deadline", |s| s.calls.iter().any(|(_, c)| c.starts_with("StopPodSandbox"))).await;
        assert_eq!((node.cri.calls("StopPodSandbox")[0].0 - begun).as_secs(), 60, "{jump}");
        node.wait_pod("web-n1", "Failed", |p| phase(p) == "Failed").await;
        node.stop().await;
        node.start_with(wall.config(&node, "a").await);
        let over = node.wait_pod("web-n1", "still over", |p| phase(p) == "Failed").await;
        assert_eq!(over["status"]["reason"], "DeadlineExceeded");
        assert_eq!(node.cri.calls("StartContainer").len(), 1);
        node.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn after_a_reboot_only_what_the_pod_was_seen_active_counts() {
    let (mut node, wall) = (Node::new(), Wall::new());
    node.apply("web.yaml", &pod("web", "  activeDeadlineSeconds: 60\n"));
    wall.jump(JUMPS[0]);
    node.start_with(wall.config(&node, "a").await);
    node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
    node.stop().await;
    node.cri.reboot();
    wall.jump(BEGIN);
    pass(1000).await;
    node.start_with(wall.config(&node, "b").await);
    let begun = Instant::now();
    node.wait_pod("web-n1", "Running again", |p| {
        phase(p) == "Running" && p["status"]["containerStatuses"][0]["restartCount"] == 1
    })
    .await;
    let stops = node.cri.calls("StopPodSandbox").len();
    node.cri.wait("the deadline", |s| s.calls.iter().filter(|(_, c)| c.starts_with("StopPodSandbox")).count() > stops).await;
    let at = node.cri.calls("StopPodSandbox").last().unwrap().0;
    assert!((50..=60).contains(&(at - begun).as_secs()), "{:?}", at - begun);
}

#[tokio::test(start_paused = true)]
async fn a_back_off_and_the_rhythm_of_probes_go_on_over_a_restart_and_a_jump() {
    for jump in JUMPS {
        let (mut node, wall) = (Node::new(), Wall::new());
        node.cri.behave("c", [Behaviour::Exit(1), Behaviour::Exit(1), Behaviour::Exit(1), Behaviour::Run]);
        node.apply("web.yaml", &probed(""));
        node.start_with(wall.config(&node, "a").await);
        node.cri.wait("the third start", |s| s.calls.iter().any(|(_, c)| c == "StartContainer c/2")).await;
        node.wait_pod("web-n1", "waiting", |p| {
            p["status"]["containerStatuses"][0]["restartCount"] == 2
                && p["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "CrashLoopBackOff"
        })
        .await;
        let ended = node.cri.calls("StartContainer c/2")[0].0;
        pass(5).await;
        node.stop().await;
        wall.jump(jump);
        node.start_with(wall.config(&node, "a").await);
        node.cri.wait("the fourth start", |s| s.calls.iter().any(|(_, c)| c == "StartContainer c/3")).await;
        let started = node.cri.calls("StartContainer c/3")[0].0;
        assert_eq!((started - ended).as_secs(), 20, "{jump}");
        node.wait_pod("web-n1", "Running", |p| phase(p) == "Running").await;
        pass(10).await;
        node.stop().await;
        wall.jump(-jump);
        node.start_with(wall.config(&node, "a").await);
        node.cri.wait("a probe", |s| s.calls.iter().any(|(_, c)| c.starts_with("ExecSync"))).await;
        assert_eq!((node.cri.calls("ExecSync")[0].0 - started).as_secs(), 20, "the initial delay, counted on ({jump})");
        node.stop().await;
    }
}
