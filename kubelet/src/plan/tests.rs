use std::time::Duration;

use super::*;
use crate::backoff::BackoffPolicy;
use crate::memory::{Outdated, PodMemory, PullFailure, Unhealthy};
use crate::observed::Limits;
use crate::observed::State::{Created, Exited, Running, Unknown};
use crate::scene::Scene;

const TWO: &str = "{containers: [{name: a, image: i}, {name: b, image: i}]}";
const SIDE: &str =
    "{initContainers: [{name: s, image: i, restartPolicy: Always}, {name: x, image: i}], containers: [{name: c, image: i}]}";
const TWO_SIDES: &str = "{initContainers: [{name: s, image: i, restartPolicy: Always}, {name: t, image: i, restartPolicy: Always}], \
    containers: [{name: c, image: i}]}";
const RULES: &str = "{restartPolicy: Always, containers: [{name: c, image: i, restartPolicy: Never, \
    restartPolicyRules: [{action: Restart, exitCodes: {operator: In, values: [42]}}]}]}";
const ALL: &str = "{restartPolicy: Always, initContainers: [{name: x, image: i}], containers: [{name: d, image: i}, {name: c, image: i, \
    restartPolicy: Never, restartPolicyRules: [{action: RestartAllContainers, exitCodes: {operator: In, values: [42]}}]}]}";
const INIT: &str = "{initContainers: [{name: x, image: i}, {name: z, image: i}], containers: [{name: c, image: i}]}";

#[tokio::test]
async fn each_situation_has_its_steps() {
    let always = || Scene::with_policy("Always");
    let on_failure = || Scene::with_policy("OnFailure");
    let never = || Scene::with_policy("Never");
    let cases: Vec<(&str, Scene, &str)> = vec![
        ("nothing there", always(), "prepare, sandbox 0"),
        ("sandbox ready", always().sandbox(0, true), "start c/0"),
        ("running", always().sandbox(0, true).container("c", 0, Running, 0), ""),
        ("crashed, first time", always().sandbox(0, true).container("c", 0, Exited, 1), "start c/1"),
        ("ended well, Always", always().sandbox(0, true).container("c", 0, Exited, 0), "start c/1"),
        ("ended well, OnFailure", on_failure().sandbox(0, true).container("c", 0, Exited, 0), "stop s0"),
        ("failed, OnFailure", on_failure().sandbox(0, true).container("c", 0, Exited, 2), "start c/1"),
        ("failed, Never", never().sandbox(0, true).container("c", 0, Exited, 2), "stop s0"),
        ("only created", always().sandbox(0, true).container("c", 3, Created, 0), "remove c3, start c/3"),
        ("lost", always().sandbox(0, true).container("c", 0, Unknown, 0), "stop c0 30"),
        ("sandbox died", always().sandbox(0, false).container("c", 0, Exited, 137), "prepare, sandbox 1"),
        (
            "sandbox died under a running container",
            always().sandbox(0, false).container("c", 0, Running, 0),
            "stop c0 30, prepare, sandbox 1",
        ),
        ("sandbox died, Never", never().sandbox(0, false).container("c", 0, Exited, 255), "release"),
        ("sandbox died, OnFailure, done", on_failure().sandbox(0, false).container("c", 0, Exited, 0), "release"),
        ("two sandboxes ready", always().sandbox(0, true).sandbox(1, true), "stop s1, stop s0, prepare, sandbox 2"),
        ("new sandbox, old records", always().sandbox(0, false).container("c", 4, Exited, 255).sandbox(1, true), "start c/5"),
        (
            "old records go",
            always()
                .sandbox(0, false)
                .container("c", 0, Exited, 1)
                .container("c", 1, Exited, 1)
                .sandbox(1, true)
                .container("c", 2, Running, 0),
            "remove c0",
        ),
        (
            "old sandbox goes with its last record",
            always()
                .sandbox(0, false)
                .container("c", 0, Exited, 1)
                .sandbox(1, true)
                .container("c", 1, Exited, 1)
                .container("c", 2, Running, 0),
            "remove c0, remove s0",
        ),
        ("two containers, in order", Scene::new(TWO).sandbox(0, true), "start a/0, start b/0"),
        ("one of two missing", Scene::new(TWO).sandbox(0, true).container("a", 0, Running, 0), "start b/0"),
        ("init first", Scene::new(INIT).sandbox(0, true), "start x/0"),
        ("init runs", Scene::new(INIT).sandbox(0, true).container("x", 0, Running, 0), ""),
        ("init done", Scene::new(INIT).sandbox(0, true).container("x", 0, Exited, 0), "start z/0"),
        ("init failed", Scene::new(INIT).sandbox(0, true).container("x", 0, Exited, 1), "start x/1"),
        (
            "all init done",
            Scene::new(INIT).sandbox(0, true).container("x", 0, Exited, 0).container("z", 0, Exited, 0),
            "start c/0",
        ),
        ("a sidecar comes before the next init container", Scene::new(SIDE).sandbox(0, true), "start s/0"),
        ("the next one when it runs", Scene::new(SIDE).sandbox(0, true).container("s", 0, Running, 0), "start x/0"),
        (
            "then the containers",
            Scene::new(SIDE).sandbox(0, true).container("s", 0, Running, 0).container("x", 0, Exited, 0),
            "start c/0",
        ),
        (
            "a sidecar that ended comes back, before what else is missing",
            Scene::new(SIDE).sandbox(0, true).container("s", 0, Exited, 0).container("x", 0, Exited, 0),
            "start s/1, start c/0",
        ),
        (
            "also in a pod that is never restarted",
            Scene::new(&SIDE.replace("{init", "{restartPolicy: Never, init"))
                .sandbox(0, true)
                .container("s", 0, Exited, 1)
                .container("x", 0, Exited, 0)
                .container("c", 0, Running, 0),
            "start s/1",
        ),
        (
            "without anybody to serve it goes",
            Scene::new(&SIDE.replace("{init", "{restartPolicy: Never, init"))
                .sandbox(0, true)
                .container("s", 0, Running, 0)
                .container("x", 0, Exited, 0)
                .container("c", 0, Exited, 3),
            "stop s0 30 after 1, stop s0",
        ),
        (
            "sidecars end last and in reverse",
            Scene::new(TWO_SIDES)
                .sandbox(0, true)
                .container("s", 0, Running, 0)
                .container("t", 0, Running, 0)
                .container("c", 0, Running, 0)
                .remembering(|m, _| m.terminate(Termination { grace: 9, forget: true })),
            "stop c0 9, stop t0 9 after 1, stop s0 9 after 2, stop s0",
        ),
        (
            "a rule brings a container back that its policy would leave",
            Scene::new(RULES).sandbox(0, true).container("c", 0, Exited, 42),
            "start c/1",
        ),
        ("another exit code is not the rule's", Scene::new(RULES).sandbox(0, true).container("c", 0, Exited, 41), "stop s0"),
        (
            "init again in a new sandbox",
            Scene::new(INIT)
                .sandbox(0, false)
                .container("x", 0, Exited, 0)
                .container("z", 0, Exited, 0)
                .container("c", 0, Exited, 255)
                .sandbox(1, true),
            "start x/1",
        ),
        ("init records lost, but the pod runs", Scene::new(INIT).sandbox(0, true).container("c", 0, Running, 0), ""),
        ("records without a sandbox, finished", never().container("c", 0, Exited, 0), "release"),
    ];
    for (what, mut scene, expected) in cases {
        assert_eq!(scene.steps(), expected, "{what}");
    }
}

#[tokio::test]
async fn a_pod_that_is_to_end_is_stopped_then_forgotten() {
    let end = |scene: Scene| scene.remembering(|m, _| m.terminate(Termination { grace: 7, forget: true }));
    let mut scene = end(Scene::with_policy("Always").sandbox(0, true).container("c", 0, Running, 0));
    assert_eq!(scene.steps(), "stop c0 7, stop s0");
    let mut scene = end(Scene::with_policy("Always").sandbox(0, false).container("c", 0, Exited, 143));
    assert_eq!(scene.steps(), "remove c0, remove s0, release and forget");
    let mut scene = end(Scene::with_policy("Always")).remembering(|m, _| m.released = true);
    assert_eq!(scene.steps(), "finished");
    let mut scene = end(Scene::with_policy("Always").sandbox(0, true))
        .remembering(|m, _| m.terminate(Termination { grace: 0, forget: false }));
    assert_eq!(scene.memory.terminating, Some(Termination { grace: 1, forget: true }));
    assert_eq!(scene.steps(), "stop s0");
}

#[tokio::test]
async fn a_finished_pod_keeps_its_records_and_loses_the_rest() {
    let finished = || Scene::with_policy("Never").sandbox(0, false).container("c", 0, Exited, 0);
    assert_eq!(finished().steps(), "release");
    assert_eq!(finished().remembering(|m, _| m.released = true).steps(), "");
}

#[tokio::test]
async fn records_that_are_not_wanted_go_after_it_is_on_disk_that_the_pod_has_run() {
    let done = || Scene::with_policy("Never").sandbox(0, false).container("c", 0, Exited, 0);
    let done = |change: fn(&mut PodMemory)| {
        done().remembering(|m, _| {
            (m.released, m.unwanted) = (true, true);
            change(m);
        })
    };
    assert_eq!(done(|_| {}).steps(), "keep the end, remove c0, remove s0");
    assert_eq!(done(|m| m.cleared = true).steps(), "keep the end, remove c0, remove s0", "it was said, and did not get there");
    assert_eq!(done(|m| (m.cleared, m.end_kept) = (true, true)).steps(), "remove c0, remove s0");
    let none = Scene::with_policy("Never").remembering(|m, _| {
        (m.released, m.unwanted, m.cleared, m.end_kept) = (true, true, true, true);
        m.status = Some(k8s_openapi::api::core::v1::PodStatus { phase: Some("Failed".into()), ..Default::default() });
    });
    assert_eq!({ none }.steps(), "");
    // Of a pod that the node has ended too: what would run again after a restart leaves nothing behind.
    let evicted = |policy, code, unwanted| {
        Scene::with_policy(policy).sandbox(0, false).container("c", 0, Exited, code).remembering(|m, _| {
            m.terminate(Termination { grace: 1, forget: false });
            m.unwanted = unwanted;
        })
    };
    assert_eq!(evicted("Never", 137, true).steps(), "release, keep the end, remove c0, remove s0");
    assert_eq!(evicted("OnFailure", 0, true).steps(), "release, keep the end, remove c0, remove s0");
    assert_eq!(evicted("Always", 143, true).steps(), "release, remove c0, remove s0");
    assert_eq!(evicted("Never", 137, false).steps(), "release");
    let mut running = Scene::with_policy("Never").sandbox(0, true).container("c", 0, Running, 0);
    running.memory.terminate(Termination { grace: 1, forget: false });
    running.memory.unwanted = true;
    assert_eq!(running.steps(), "stop c0 1, stop s0");
}

#[tokio::test]
async fn a_running_pod_that_cannot_be_brought_up_to_date_is_looked_after_all_the_same() {
    let scene = |seconds: Option<u64>, usable| {
        let mut scene = Scene::new(TWO).sandbox(0, true).container("a", 0, Running, 0).container("b", 0, Exited, 1);
        scene.memory.prepared = false;
        scene.memory.unhealthy.insert("a0".into(), Unhealthy { probe: "liveness", grace: Some(2) });
        let until = seconds.map(|seconds| scene.now.mono + Duration::from_secs(seconds));
        scene.memory.outdated = until.map(|until| Outdated { until, usable });
        scene
    };
    assert_eq!(scene(None, true).steps(), "prepare, stop a0 2, start b/1");
    assert_eq!(scene(Some(0), true).steps(), "prepare, stop a0 2, start b/1");
    assert_eq!(scene(Some(9), true).steps(), "stop a0 2, start b/1");
    assert_eq!(scene(Some(9), false).steps(), "stop a0 2");
    assert_eq!(scene(Some(0), false).steps(), "prepare, stop a0 2");
    let mut waiting = scene(Some(9), false);
    assert_eq!(waiting.plan().wake, Some(waiting.now.mono + Duration::from_secs(9)));
}

#[tokio::test]
async fn a_crash_loop_waits_and_wakes_in_time() {
    let mut scene = Scene::with_policy("Always").sandbox(0, true).container("c", 1, Exited, 1).remembering(|m, now| {
        m.exits.insert("c1".into(), now.mono - Duration::from_secs(4));
        m.crash.advance("c", now.mono - Duration::from_secs(5), now.mono - Duration::from_secs(5));
    });
    let plan = scene.plan();
    assert!(plan.ops.is_empty());
    assert_eq!(plan.wake, Some(scene.now.mono + Duration::from_secs(6)));
    assert_eq!(plan.waiting[0].1.reason, "CrashLoopBackOff");
    assert_eq!(plan.waiting[0].1.message, "back-off 10s restarting failed container=c pod=web_default(u1)");
    scene.now.mono += Duration::from_secs(6);
    assert_eq!(scene.steps(), "start c/2");
}

#[tokio::test]
async fn restart_counts_go_on_from_logs_and_lost_records() {
    let mut scene = Scene::with_policy("Always").sandbox(0, true).remembering(|m, _| _ = m.attempts.insert("c".into(), 6));
    assert_eq!(scene.steps(), "start c/7");
}

#[tokio::test]
async fn a_failing_pull_waits_but_presence_is_checked() {
    let scene = |policy: &str, checked: u64| {
        let spec = format!("{{containers: [{{name: c, image: 'i:1', imagePullPolicy: {policy}}}]}}");
        Scene::new(&spec).sandbox(0, true).remembering(|m, now| {
            m.pulls =
                crate::backoff::Backoff::new(BackoffPolicy { base: Duration::from_secs(100), max: Duration::from_secs(100) });
            let failed_at = now.mono - Duration::from_secs(50);
            m.pulls.advance("i:1", failed_at, failed_at);
            let reason = Reason::new("ErrImagePull", "no");
            let failure = PullFailure { failed_at, checked_at: now.mono - Duration::from_secs(checked), reason };
            m.pull_failures.insert("i:1".into(), failure);
        })
    };
    assert_eq!(scene("Always", 50).steps(), "");
    assert_eq!(scene("Always", 50).plan().waiting[0].1.message, "Back-off pulling image \"i:1\": ErrImagePull: no");
    assert_eq!(scene("IfNotPresent", 50).steps(), "start c/0 if present");
    let mut recent = scene("IfNotPresent", 3);
    assert_eq!(recent.steps(), "");
    assert_eq!(recent.plan().wake, Some(recent.now.mono + Duration::from_secs(7)));
}

#[tokio::test]
async fn changes_of_definition_limits_and_health_reach_a_running_container() {
    let running = || {
        Scene::new("{containers: [{name: c, image: i, resources: {limits: {cpu: 1, memory: 1Gi}}}]}")
            .sandbox(0, true)
            .container("c", 0, Running, 0)
    };
    let mut scene = running();
    scene.observed.containers[0].hash = "other".into();
    assert_eq!(scene.steps(), "stop c0 30");
    let limits = |cpu_quota, memory| Some(Limits { cpu_shares: 1024, cpu_quota, memory });
    for (now, expected) in [
        (None, ""),
        (Some(Limits::default()), ""),
        (limits(100_000, 1 << 30), ""),
        (limits(50_000, 1 << 30), "resize c0"),
        (limits(100_000, 0), "resize c0"),
    ] {
        let mut scene = running();
        scene.observed.containers[0].resources = now;
        assert_eq!(scene.steps(), expected, "{now:?}");
    }
    let mut scene = running().remembering(|m, _| _ = m.resized.insert("c0".into(), limits(100_000, 1 << 30).unwrap()));
    scene.observed.containers[0].resources = limits(5, 5);
    assert_eq!(scene.steps(), "", "what was tried is not tried again");
    let unhealthy = Unhealthy { probe: "liveness", grace: Some(2) };
    let mut scene = running().remembering(|m, _| _ = m.unhealthy.insert("c0".into(), unhealthy));
    assert_eq!(scene.steps(), "stop c0 2");
}

#[tokio::test]
async fn the_deadline_wakes_and_ends_the_pod() {
    let mut scene = Scene::new("{activeDeadlineSeconds: 60, containers: [{name: c, image: i}]}")
        .sandbox(0, true)
        .container("c", 0, Running, 0);
    assert_eq!(scene.plan().wake, Some(scene.now.mono + Duration::from_secs(60)));
    scene.memory.deadline_exceeded = true;
    assert_eq!(scene.steps(), "stop c0 30, stop s0");
}
#[tokio::test]
async fn a_sidecar_with_a_startup_probe_holds_the_next_one_up_until_it_has_started() {
    let spec = "{initContainers: [{name: s, image: i, restartPolicy: Always, startupProbe: {tcpSocket: {port: 1}}}, {name: x, image: i}], \
        containers: [{name: c, image: i}]}";
    let scene = |started| {
        let results = crate::memory::ProbeResults { started, ready: true };
        let scene = Scene::new(spec).sandbox(0, true).container("s", 0, Running, 0);
        scene.remembering(|m, _| _ = m.probes.insert("s0".into(), results))
    };
    assert_eq!(scene(false).steps(), "");
    assert_eq!(scene(true).steps(), "start x/0");
}

#[tokio::test]
async fn a_rule_makes_all_containers_begin_again_in_the_same_sandbox() {
    let ended = |code| {
        let scene = Scene::new(ALL).sandbox(0, true).container("x", 0, Exited, 0).container("d", 0, Running, 0);
        scene.container("c", 0, Exited, code)
    };
    assert_eq!(ended(42).steps(), "stop d0 30, clear d0, clear x0, clear c0");
    assert_eq!(ended(1).steps(), "", "another exit code is the policy's");
    // When the records are gone it begins from the first init container, without a delay.
    let begun = |m: &mut PodMemory, now: Now| {
        m.attempts = [("x".to_owned(), 0), ("d".to_owned(), 0), ("c".to_owned(), 0)].into();
        m.crash.advance("c", now.mono, now.mono);
    };
    assert_eq!(Scene::new(ALL).sandbox(0, true).remembering(begun).steps(), "start x/1");
}

#[tokio::test]
async fn new_limits_restart_a_container_only_where_its_policy_says_so() {
    let scene = |policy: &str, change: fn(&mut Limits)| {
        let resources = "resources: {limits: {cpu: 200m, memory: 64Mi}}";
        let policy = format!("resizePolicy: [{{resourceName: memory, restartPolicy: {policy}}}]");
        let mut scene = Scene::new(&format!("{{containers: [{{name: c, image: i, {resources}, {policy}}}]}}"));
        scene = scene.sandbox(0, true).container("c", 0, Running, 0);
        let mut now = Limits { cpu_shares: 204, cpu_quota: 20_000, memory: 64 << 20 };
        change(&mut now);
        scene.observed.containers[0].resources = Some(now);
        scene
    };
    assert_eq!(scene("NotRequired", |_| {}).steps(), "");
    assert_eq!(scene("NotRequired", |now| now.memory = 1 << 20).steps(), "resize c0");
    assert_eq!(scene("RestartContainer", |now| now.memory = 1 << 20).steps(), "stop c0 30");
    assert_eq!(scene("RestartContainer", |now| now.cpu_quota = 10_000).steps(), "resize c0");
}

#[tokio::test]
async fn a_running_container_is_moved_to_its_processors_once() {
    let steps = |on: &str, change: &dyn Fn(&mut PodMemory, Now)| {
        let mut scene = Scene::with_policy("Always").sandbox(0, true).container("c", 0, Running, 0).remembering(|m, now| {
            m.cpus.insert("c".into(), "0-1,3".into());
            change(m, now);
        });
        scene.observed.containers[0].cpus = on.to_owned();
        scene.steps()
    };
    assert_eq!(steps("0-3", &|_, _| ()), "pin c0 to 0-1,3");
    assert_eq!(steps("", &|_, _| ()), "pin c0 to 0-1,3");
    assert_eq!(steps("0,1,3", &|_, _| ()), "");
    assert_eq!(steps("0-3", &|m, _| _ = m.pinned.insert("c0".into(), "0-1,3".into())), "", "what was done is not done again");
    assert_eq!(steps("0-1,3", &|m, _| _ = m.pinned.insert("c0".into(), "0".into())), "pin c0 to 0-1,3");
    assert_eq!(steps("0-3", &|m, _| m.cpus.clear()), "");
    let later = |m: &mut PodMemory, now: Now| _ = m.pin_failures.insert("c0".into(), now.mono + Duration::from_secs(5));
    assert_eq!(steps("0-3", &later), "");
}

#[tokio::test]
async fn an_added_container_starts_once_and_keeps_no_pod_alive() {
    let spec = "{restartPolicy: Never, containers: [{name: c, image: i}]}";
    let added = |mut scene: Scene| {
        let container = serde_json::json!([{"name": "e", "image": "i", "targetContainerName": "c"}]);
        scene.pod.spec.as_mut().unwrap().ephemeral_containers = serde_json::from_value(container).unwrap();
        scene
    };
    let running = || added(Scene::new(spec)).sandbox(0, true).container("c", 0, Running, 0);
    assert_eq!(running().steps(), "start e/0");
    assert_eq!(running().container("e", 0, Running, 0).steps(), "");
    assert_eq!(running().container("e", 0, Exited, 1).steps(), "");
    let ended = added(Scene::new(spec)).sandbox(0, true).container("c", 0, Exited, 0).container("e", 0, Running, 0);
    assert_eq!({ ended }.steps(), "stop e0 30, stop s0");
}
