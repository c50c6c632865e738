//! `kill -9` of the agent, and a machine that went down under it.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use berth_e2e::cri::{PidShape, run_pod};
use berth_e2e::node::{Berth, Half, container_ids, is_running, restarts};
use berth_e2e::{SOON, output};
use berth_testkit::{Sandbox, report_measured, wait_until};
use k8s_openapi::jiff::Timestamp;
use serde_json::Value;

const WEB: &str = env!("CARGO_BIN_EXE_demo-web");
const PODS: usize = 10;

fn counting_pod(n: usize) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: count-{n}}}\nspec:\n  terminationGracePeriodSeconds: 0\n  containers:\n  - name: count\n    \
         image: berth.test/busybox:1\n    command: [sh, -c, 'i=0; while :; do echo line $i; i=$((i+1)); usleep 5000; done']\n"
    )
}

fn all_running(pods: &[Value]) -> bool {
    pods.len() == PODS && pods.iter().all(is_running)
}

/// pod name → container ids, sorted.
fn containers(pods: &[Value]) -> Vec<(String, Vec<String>)> {
    let mut all: Vec<_> = pods.iter().map(|p| (p["metadata"]["name"].as_str().unwrap().to_owned(), container_ids(p))).collect();
    all.sort();
    all
}

fn newest_line(node: &Berth, pod: &str) -> usize {
    let log = node.logs(pod);
    log.last().and_then(|line| line.strip_prefix("line ")).and_then(|n| n.parse().ok()).unwrap_or(0)
}

#[test]
fn a_killed_agent_loses_no_container_no_log_line_and_no_status() {
    Sandbox::new().test(|| {
        let mut node = Berth::start(Half::Node, WEB);
        for n in 0..PODS {
            node.write_manifest(&format!("count-{n}.yaml"), &counting_pod(n));
        }
        assert!(wait_until(SOON * 2, || all_running(&node.pods())), "{}", node.agent_log());
        let before = containers(&node.pods());

        node.kill_agent();
        let seen: Vec<usize> = (0..PODS).map(|n| newest_line_in_file(&node, n)).collect();
        let went_on = || (0..PODS).all(|n| newest_line_in_file(&node, n) > seen[n] + 20);
        assert!(wait_until(SOON, went_on), "the logs grow while no agent runs");

        let begun = Instant::now();
        node.launch();
        assert!(wait_until(SOON, || all_running(&node.pods())), "{}", node.agent_log());
        let took = begun.elapsed();
        report_measured(&format!("restart of the agent with {PODS} pods: {} ms until every status was right", took.as_millis()));
        assert!(took < Duration::from_secs(1), "{took:?}");

        let pods = node.pods();
        assert_eq!(containers(&pods), before);
        assert!(pods.iter().all(|pod| restarts(pod) == 0), "{pods:?}");
        for n in 0..PODS {
            let pod = format!("count-{n}-e2e");
            let now = newest_line(&node, &pod);
            assert!(wait_until(SOON, || newest_line(&node, &pod) > now), "{pod} goes on");
            let lines = node.logs(&pod);
            let gap = lines.iter().enumerate().find(|(i, line)| **line != format!("line {i}"));
            assert_eq!(gap, None, "a line of {pod} is missing");
        }
        node.finish();
    });
}

/// The newest line's number in the log file itself: no agent is needed to read it.
fn newest_line_in_file(node: &Berth, n: usize) -> usize {
    let logs = node.dir.path().join("logs");
    let pod =
        fs::read_dir(logs).unwrap().flatten().find(|e| e.file_name().to_string_lossy().contains(&format!("_count-{n}-e2e_")));
    let text = pod.and_then(|pod| fs::read_to_string(pod.path().join("count/0.log")).ok()).unwrap_or_default();
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().last().and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0)
}

/// pod name → status and time of its condition Ready, restarts.
fn readiness(pods: &[Value]) -> Vec<(String, String, String, i64)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let of = |pod: &Value| {
        let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let ready = conditions.into_iter().find(|c| c["type"] == "Ready").unwrap_or_default();
        (text(&pod["metadata"]["name"]), text(&ready["status"]), text(&ready["lastTransitionTime"]), restarts(pod))
    };
    let mut all: Vec<_> = pods.iter().filter(|pod| text(&pod["metadata"]["name"]).starts_with("count-")).map(of).collect();
    all.sort();
    all
}

/// Seconds between the looks of the probe that is followed.
const PERIOD: f64 = 3.0;
/// How far from its turn a look may arrive on a machine with a lot to do. Far less than the period: looks that keep no turns are
/// outside.
const SLACK: f64 = 0.6;

/// Seconds since the epoch.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

/// When a line that begins with a time stamp was written, in seconds since the epoch.
fn written_at(line: &str) -> Option<f64> {
    let stamp: Timestamp = line.split(' ').next()?.parse().ok()?;
    Some(stamp.as_nanosecond() as f64 / 1e9)
}

/// When the looks arrived at the probed server of a pod, by the time stamps of its own log.
fn looks(node: &Berth, n: usize) -> Vec<f64> {
    let logs = fs::read_dir(node.dir.path().join("logs")).unwrap().flatten();
    let pod = logs.map(|e| e.path()).find(|path| path.to_string_lossy().contains(&format!("_count-{n}-e2e_"))).unwrap();
    let text = fs::read_to_string(pod.join("web/0.log")).unwrap();
    text.lines().filter(|line| line.ends_with("/probe")).filter_map(written_at).collect()
}

/// One death of the agent, in seconds since the epoch.
#[derive(Debug)]
struct Death {
    killed: f64,
    /// The next kubelet began.
    began: f64,
    /// It had taken up the pods.
    answered: f64,
}

impl Death {
    fn around(&self, turn: f64, until: f64) -> bool {
        (self.killed - SLACK / 2.0..until + SLACK / 2.0).contains(&turn)
    }
}

/// Each turn since the first look was kept by one look, in time or, where the kubelet was starting, as soon as it had; only a turn that
/// came while there was no kubelet may have been left out. How many were kept, how many left out, and the longest time between looks.
fn assert_rhythm(looks: &[f64], deaths: &[Death]) -> (usize, usize, f64) {
    let (first, last) = (looks[0], looks.last().unwrap());
    let (mut kept, mut left_out) = (0, 0);
    for turn in (0..).map(|n| first + f64::from(n) * PERIOD).take_while(|turn| turn <= last) {
        let of_turn: Vec<_> = looks.iter().filter(|look| (turn - SLACK..turn + PERIOD - SLACK).contains(*look)).collect();
        let told = || format!("{:.2} s after the first: {looks:?}\n{deaths:?}", turn - first);
        match of_turn[..] {
            [] => assert!(deaths.iter().any(|death| death.around(turn, death.began)), "no look {}", told()),
            [look] => {
                let starting = deaths.iter().any(|death| death.around(turn, death.answered) && *look < death.answered + SLACK);
                assert!(*look <= turn + SLACK || starting, "a look out of turn {}", told());
            }
            _ => panic!("several looks {}", told()),
        }
        (kept, left_out) = (kept + of_turn.len(), left_out + usize::from(of_turn.is_empty()));
    }
    let longest = looks.windows(2).map(|two| two[1] - two[0]).fold(0.0, f64::max);
    (kept, left_out, longest)
}

/// A few rounds; `KILL_ROUNDS=50` in the soak.
#[test]
fn an_agent_that_is_killed_again_and_again_under_load_shows_in_no_status_and_loses_no_line() {
    let rounds: usize = std::env::var("KILL_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(5);
    // A round takes some seconds on a machine with a lot to do.
    let patience = SOON * 4 + Duration::from_secs(8) * u32::try_from(rounds).unwrap();
    Sandbox::new().timeout(Some(patience)).test(|| {
        let mut node = Berth::start(Half::Node, WEB);
        let probe = format!(
            "    readinessProbe: {{exec: {{command: ['true']}}, periodSeconds: 1, timeoutSeconds: 30}}\n  - name: web\n    \
             image: berth.test/web:1\n    livenessProbe: {{httpGet: {{path: /probe, port: 8080}}, periodSeconds: {PERIOD}, timeoutSeconds: 30}}\n"
        );
        for n in 0..PODS {
            node.write_manifest(&format!("count-{n}.yaml"), &(counting_pod(n) + &probe));
        }
        let all_ready = |pods: &[Value]| {
            let found = readiness(pods);
            found.len() == PODS && found.iter().all(|(_, ready, ..)| ready == "True")
        };
        assert!(wait_until(SOON * 3, || all_ready(&node.pods())), "{}", node.agent_log());
        let (ids, since) = (containers(&node.pods()), readiness(&node.pods()));
        let kept = |name: &str| {
            let text =
                fs::read_to_string(node.dir.path().join("kubelet/pods").join(name).join("status.json")).unwrap_or_default();
            text.contains("\"ready\":true")
        };
        let uids: Vec<String> = node.pods().iter().map(|p| p["metadata"]["uid"].as_str().unwrap().to_owned()).collect();
        assert!(wait_until(SOON, || uids.iter().all(|uid| kept(uid))), "the statuses are on disk");
        assert!(wait_until(SOON, || (0..PODS).all(|n| !looks(&node, n).is_empty())), "all are probed");
        let mut deaths = Vec::new();
        for round in 0..rounds {
            // Something is always being made or ended when the agent dies.
            match round % 2 {
                0 => node.write_manifest("churn.yaml", &counting_pod(0).replace("count-0", "churn")),
                _ => node.remove_manifest("churn.yaml"),
            }
            // And it dies at another point of the probes' period each time: some hundred lines later.
            let line = newest_line_in_file(&node, 0) + round % 4 * 150;
            assert!(wait_until(SOON, || newest_line_in_file(&node, 0) >= line), "the load goes on");
            let killed = now();
            node.kill_agent();
            node.launch();
            assert!(wait_until(SOON, || readiness(&node.pods()).len() == PODS), "round {round}: {}", node.agent_log());
            deaths.push(Death { killed, began: 0.0, answered: now() });
            assert_eq!(readiness(&node.pods()), since, "round {round}: a status has changed");
            let counting = |(name, _): &(String, Vec<String>)| name.starts_with("count-");
            let now: Vec<_> = containers(&node.pods()).into_iter().filter(counting).collect();
            assert_eq!(now, ids, "round {round}: a container has been replaced");
        }
        // A whole round of looks by the last one.
        let ended = now();
        let asked_since = || (0..PODS).all(|n| looks(&node, n).last().is_some_and(|look| *look > ended));
        assert!(wait_until(SOON, asked_since), "all are still probed: {}", node.agent_log());
        assert_eq!(readiness(&node.pods()), since);
        let log = node.agent_log();
        let began: Vec<f64> = log.lines().filter(|line| line.contains("kubelet runs")).filter_map(written_at).collect();
        assert_eq!(began.len(), rounds + 1, "each start is told once");
        deaths.iter_mut().zip(&began[1..]).for_each(|(death, began)| death.began = *began);
        let kept: Vec<_> = (0..PODS).map(|n| assert_rhythm(&looks(&node, n), &deaths)).collect();
        let most = |of: &dyn Fn(&Death) -> f64| deaths.iter().map(of).fold(0.0, f64::max);
        report_measured(&format!(
            "{rounds} kills: {} turns of probes kept, {} left out in the at most {:.0} ms without a kubelet; at most {:.1} s from look \
             to look of a period of {PERIOD} s; at most {:.0} ms from a kill to all statuses",
            kept.iter().map(|(kept, ..)| kept).sum::<usize>(),
            kept.iter().map(|(_, left_out, _)| left_out).sum::<usize>(),
            most(&|death| death.began - death.killed) * 1e3,
            kept.iter().map(|(.., longest)| *longest).fold(0.0, f64::max),
            most(&|death| death.answered - death.killed) * 1e3,
        ));
        let mut counted = 0;
        for n in 0..PODS {
            let lines = node.logs(&format!("count-{n}-e2e -c count"));
            counted += lines.len();
            let lost = lines.iter().enumerate().find(|(i, line)| **line != format!("line {i}"));
            assert_eq!(lost, None, "of {} lines of pod {n}", lines.len());
        }
        report_measured(&format!("{rounds} kills: none of {counted} log lines lost, no container replaced, no condition changed"));
        node.finish();
    });
}

#[test]
fn an_exit_while_no_agent_runs_is_told_afterwards() {
    Sandbox::new().test(|| {
        let mut berth = Berth::start(Half::Cri, WEB);
        let crictl = berth.crictl();
        let script = "while ! grep -q open /tmp/gate 2>/dev/null; do usleep 10000; done; exit 7";
        let (_, container) = run_pod(&crictl, &berth.dir, "late", PidShape::PerContainer, script);
        berth.kill_agent();
        // Through the container's root: its processes are found by their script.
        let processes = berth_e2e::memory::processes(|_, _, command| command.contains("exit 7"));
        let pid = processes.first().expect("the container runs").pid;
        fs::write(format!("/proc/{pid}/root/tmp/gate"), "open").unwrap();
        assert!(wait_until(SOON, || !fs::exists(format!("/proc/{pid}")).unwrap()));
        berth.launch();
        let status = crictl.json(&["inspect", &container]);
        assert_eq!(status["status"]["state"], "CONTAINER_EXITED", "{status}");
        assert_eq!(status["status"]["exitCode"], 7, "{status}");
        berth.finish();
    });
}

#[test]
fn after_a_reboot_old_sandboxes_list_as_not_ready_and_containers_as_exited_255() {
    Sandbox::new().test(|| {
        let mut berth = Berth::start(Half::Cri, WEB);
        let crictl = berth.crictl();
        let (pod, container) = run_pod(&crictl, &berth.dir, "old", PidShape::PerContainer, "sleep 1000");
        // What must outlive a boot is committed in groups, some milliseconds behind the replies.
        let record = berth.dir.path().join(format!("root/containers/{container}/record.json"));
        assert!(
            wait_until(SOON, || fs::read_to_string(&record).is_ok_and(|r| !r.contains("\"started_at\":null"))),
            "no durable record"
        );
        berth.kill_agent();
        reboot(&berth);
        berth.launch();

        let pods = crictl.json(&["pods"]);
        assert_eq!(pods["items"][0]["id"], pod.as_str(), "{pods}");
        assert_eq!(pods["items"][0]["state"], "SANDBOX_NOTREADY", "{pods}");
        let status = crictl.json(&["inspect", &container]);
        assert_eq!(status["status"]["state"], "CONTAINER_EXITED", "{status}");
        assert_eq!(status["status"]["exitCode"], 255, "{status}");
        assert_eq!(status["status"]["reason"], "Unknown", "{status}");

        // A new attempt of the same pod starts, and the old one can be removed.
        let (_, fresh) = run_pod(&crictl, &berth.dir, "fresh", PidShape::PerContainer, "sleep 1000");
        assert_eq!(crictl.json(&["inspect", &fresh])["status"]["state"], "CONTAINER_RUNNING");
        crictl.run(&["rmp", &pod]);
        assert_eq!(crictl.json(&["pods", "--state", "notready"])["items"].as_array().map(Vec::len), Some(0));
        berth.finish();
    });
}

/// What a power failure does, as far as a sandbox can play it: every process dies, what is on tmpfs is gone, the network is
/// as at boot, and the kernel tells another boot id.
fn reboot(berth: &Berth) {
    let own = std::process::id();
    let doomed = || berth_e2e::memory::processes(|pid, _, _| pid > 1 && pid != own);
    let killed = wait_until(SOON, || {
        for process in doomed() {
            // It may be gone already.
            let _ = Command::new("kill").args(["-9", &process.pid.to_string()]).stderr(std::process::Stdio::null()).status();
        }
        doomed().is_empty()
    });
    assert!(killed, "{:?}", doomed());
    let state = berth.dir.path().join("state");
    for mounted in mounts_below(&state.to_string_lossy()) {
        let _ = Command::new("umount").args(["-l", &mounted]).status();
    }
    fs::remove_dir_all(&state).unwrap();
    for mounted in mounts_below(&berth.dir.path().join("root").to_string_lossy()) {
        let _ = Command::new("umount").args(["-l", &mounted]).status();
    }
    output(Command::new("nft").args(["flush", "ruleset"]));
    for link in output(Command::new("ip").args(["-brief", "link"])).lines() {
        let name = link.split(['@', ' ']).next().unwrap();
        if !matches!(name, "lo" | "uplink0" | "uplink0-far") {
            let _ = Command::new("ip").args(["link", "delete", name]).status();
        }
    }
    let boot_id = berth.dir.file("boot_id", "00000000-1111-2222-3333-444444444444\n");
    output(Command::new("mount").args(["--bind", &boot_id.to_string_lossy(), "/proc/sys/kernel/random/boot_id"]));
}

fn mounts_below(dir: &str) -> Vec<String> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let mut below: Vec<_> =
        text.lines().filter_map(|l| l.split(' ').nth(4)).filter(|m| m.starts_with(dir)).map(str::to_owned).collect();
    below.reverse();
    below
}
