//! Pure: what to do next for a pod, from its spec, what the runtime has and what the worker remembers. The same plan
//! serves start, change, crash, restart of the kubelet and reboot. Calls nothing.

mod container;

use k8s_openapi::api::core::v1::{Container, Pod};
use tokio::time::Instant;

use self::container::{plan_first_start, plan_init, plan_restart, plan_running};
use crate::clock::Now;
use crate::memory::{PodMemory, Reason, Termination};
use crate::node::NodeView;
use crate::observed::{self, PodObserved, State};
use crate::pod;
use crate::source::static_pod::digest;
use crate::status;

/// One step of a plan. Steps run in order; neighbouring stops of containers run together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodOp {
    /// Folders, cgroup and volumes.
    Prepare,
    /// SIGTERM, grace, SIGKILL.
    StopContainer {
        /// Container's ID.
        id: String,
        /// Its name.
        name: String,
        /// Seconds.
        grace: i64,
        /// For users.
        message: String,
    },
    /// Ends a sandbox with all its processes.
    StopSandbox {
        /// Sandbox's ID.
        id: String,
    },
    /// Makes a sandbox.
    CreateSandbox {
        /// From 0.
        attempt: u32,
    },
    /// Pulls, creates and starts.
    StartContainer {
        /// Its name in the pod.
        name: String,
        /// Restart count.
        attempt: u32,
        /// The record whose end it follows, for the back-off.
        after: Option<String>,
        /// An init container: its failure ends the pass.
        init: bool,
        /// Its image may be pulled now; otherwise it must be there.
        pull: bool,
    },
    /// Changes limits of a running container.
    Resize {
        /// Container's ID.
        id: String,
        /// Its name.
        name: String,
    },
    /// Forgets a dead container.
    RemoveContainer {
        /// Container's ID.
        id: String,
    },
    /// Forgets a dead sandbox.
    RemoveSandbox {
        /// Sandbox's ID.
        id: String,
    },
    /// Volumes, cgroup and, when the pod is forgotten, its folder.
    Release {
        /// The folder goes too.
        forget: bool,
    },
}

/// The outcome of planning.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// In order; none: nothing to do now.
    pub ops: Vec<PodOp>,
    /// When something will be to do without anything happening.
    pub wake: Option<Instant>,
    /// Containers that wait, and why.
    pub waiting: Vec<(String, Reason)>,
    /// The pod has ended and nothing of it is left: the worker may go.
    pub finished: bool,
}

/// Everything a plan depends on.
#[derive(Clone, Copy, Debug)]
pub struct Situation<'a> {
    /// What is wanted.
    pub pod: &'a Pod,
    /// What there is.
    pub observed: &'a PodObserved,
    /// What happened.
    pub memory: &'a PodMemory,
    /// The node.
    pub node: &'a NodeView,
    /// When.
    pub now: Now,
}

/// Whether the pod's policy lets a container run again after this exit code.
pub fn restarts(pod: &Pod, container: &Container, exit_code: i32) -> bool {
    let own = container.restart_policy.as_deref();
    match own.or(pod::spec(pod).restart_policy.as_deref()) {
        Some("Never") => false,
        Some("OnFailure") => exit_code != 0,
        _ => true,
    }
}

/// As [`restarts`], for an init container: `Always` means until it succeeds.
pub fn init_restarts(pod: &Pod, exit_code: i32) -> bool {
    exit_code != 0 && pod::spec(pod).restart_policy.as_deref() != Some("Never")
}

/// Hash of what a running container cannot change: name and image.
pub fn container_hash(container: &Container) -> String {
    digest(&[&container.name, container.image.as_deref().unwrap_or_default()])[..8].to_owned()
}

/// Plans the next pass.
pub fn plan(situation: &Situation<'_>) -> Plan {
    let Situation { pod, observed, memory, .. } = *situation;
    if let Some(termination) = memory.terminating {
        return plan_end(observed, memory, termination);
    }
    if status::is_terminal(pod, observed, memory) || memory.deadline_exceeded {
        return plan_rest(pod, observed, memory);
    }
    let mut plan = Plan::default();
    match sandbox_verdict(situation) {
        SandboxVerdict::Keep => {
            if !plan_containers(situation, &mut plan) {
                return plan_rest(pod, observed, memory);
            }
        }
        SandboxVerdict::Leave => return plan_rest(pod, observed, memory),
        SandboxVerdict::Replace { attempt } => {
            stop_all(observed, pod::grace_seconds(pod), &mut plan.ops);
            plan.ops.push(PodOp::Prepare);
            plan.ops.push(PodOp::CreateSandbox { attempt });
        }
    }
    if !memory.prepared && !plan.ops.contains(&PodOp::Prepare) {
        plan.ops.insert(0, PodOp::Prepare);
    }
    collect_garbage(observed, &mut plan.ops);
    plan.wake = sooner(plan.wake, deadline(situation));
    plan
}

/// When the pod's active deadline passes.
fn deadline(situation: &Situation<'_>) -> Option<Instant> {
    let seconds = pod::spec(situation.pod).active_deadline_seconds?;
    let start = situation.memory.start_time.as_second();
    let left = start.saturating_add(seconds).saturating_sub(situation.now.wall.as_second());
    Some(situation.now.mono + std::time::Duration::from_secs(u64::try_from(left).unwrap_or(0)))
}

/// Whether the pod has been active for longer than it may.
pub fn is_over_deadline(situation: &Situation<'_>) -> bool {
    deadline(situation).is_some_and(|at| at <= situation.now.mono)
}

fn sooner(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// The pod's source does not have it any more: stop, then forget everything.
fn plan_end(observed: &PodObserved, memory: &PodMemory, termination: Termination) -> Plan {
    let mut plan = Plan::default();
    stop_all(observed, termination.grace, &mut plan.ops);
    if !plan.ops.is_empty() {
        return plan;
    }
    if termination.forget {
        plan.ops.extend(observed.containers.iter().map(|c| PodOp::RemoveContainer { id: c.id.clone() }));
        plan.ops.extend(observed.sandboxes.iter().map(|s| PodOp::RemoveSandbox { id: s.id.clone() }));
    }
    if !memory.released {
        plan.ops.push(PodOp::Release { forget: termination.forget });
    }
    plan.finished = plan.ops.is_empty();
    plan
}

/// The pod has nothing more to run: stop what is left, keep the records.
fn plan_rest(pod: &Pod, observed: &PodObserved, memory: &PodMemory) -> Plan {
    let mut plan = Plan::default();
    stop_all(observed, pod::grace_seconds(pod), &mut plan.ops);
    if plan.ops.is_empty() && !memory.released {
        plan.ops.push(PodOp::Release { forget: false });
    }
    collect_garbage(observed, &mut plan.ops);
    plan
}

fn stop_all(observed: &PodObserved, grace: i64, ops: &mut Vec<PodOp>) {
    for container in observed.containers.iter().filter(|c| c.may_run()) {
        let message = format!("Stopping container {}", container.name);
        ops.push(stop(container, grace, message));
    }
    let ready = observed.sandboxes.iter().filter(|s| s.ready);
    ops.extend(ready.map(|s| PodOp::StopSandbox { id: s.id.clone() }));
}

fn stop(container: &observed::Container, grace: i64, message: String) -> PodOp {
    PodOp::StopContainer { id: container.id.clone(), name: container.name.clone(), grace, message }
}

enum SandboxVerdict {
    Keep,
    Leave,
    Replace { attempt: u32 },
}

fn sandbox_verdict(situation: &Situation<'_>) -> SandboxVerdict {
    let Situation { pod, observed, .. } = *situation;
    let Some(newest) = observed.sandbox() else {
        let verdict = SandboxVerdict::Replace { attempt: 0 };
        // Containers without any sandbox: the records of a pod that may have finished.
        return if observed.containers.is_empty() || anything_to_start(situation) { verdict } else { SandboxVerdict::Leave };
    };
    let host_network = pod::is_host_network(pod);
    let without_address = !host_network && newest.has_network && newest.ips.is_empty();
    let good = newest.ready
        && observed.sandboxes.iter().filter(|s| s.ready).count() == 1
        && newest.host_network == host_network
        && !without_address;
    if good {
        return SandboxVerdict::Keep;
    }
    let never = pod::spec(pod).restart_policy.as_deref() == Some("Never");
    if never && !observed.containers.is_empty() || !anything_to_start(situation) {
        return SandboxVerdict::Leave;
    }
    SandboxVerdict::Replace { attempt: newest.attempt + 1 }
}

/// Whether a new sandbox would have any container to run.
fn anything_to_start(situation: &Situation<'_>) -> bool {
    let Situation { pod, observed, .. } = *situation;
    let wanted = |container: &Container| match observed.newest(&container.name) {
        Some(record) if record.state == State::Exited => restarts(pod, container, record.exit_code),
        _ => true,
    };
    pod::spec(pod).containers.iter().any(wanted)
}

/// Plans the containers of a good sandbox; whether there is anything to run.
fn plan_containers(situation: &Situation<'_>, plan: &mut Plan) -> bool {
    let Situation { pod, observed, .. } = *situation;
    let sandbox = observed.sandbox().map(|s| s.id.as_str()).unwrap_or_default();
    if !status::is_initialized(pod, observed) {
        plan_init(situation, sandbox, plan);
        return true;
    }
    let mut alive = false;
    for container in &pod::spec(pod).containers {
        let record = observed.newest(&container.name);
        match record {
            Some(running) if running.state == State::Running && running.sandbox_id == sandbox => {
                alive = true;
                plan_running(situation, container, running, plan);
            }
            Some(lost) if lost.may_run() => {
                alive = true;
                let message = format!("Container {} is in an unknown state", container.name);
                plan.ops.push(stop(lost, pod::grace_seconds(pod), message));
            }
            Some(dead) if dead.state == State::Exited => {
                if restarts(pod, container, dead.exit_code) {
                    alive = true;
                    plan_restart(situation, container, dead, false, plan);
                }
            }
            other => {
                alive = true;
                plan_first_start(situation, container, other, false, plan);
            }
        }
    }
    alive
}

/// Dead containers but the newest of each name, and old sandboxes that nothing refers to.
fn collect_garbage(observed: &PodObserved, ops: &mut Vec<PodOp>) {
    let mut kept: Vec<&str> = Vec::new();
    let mut removed: Vec<&str> = Vec::new();
    for container in observed.containers.iter().filter(|c| c.state == State::Exited) {
        if kept.contains(&container.name.as_str()) {
            removed.push(&container.id);
        } else {
            kept.push(&container.name);
        }
    }
    for id in &removed {
        ops.push(PodOp::RemoveContainer { id: (*id).to_owned() });
    }
    for sandbox in observed.sandboxes.iter().skip(1).filter(|s| !s.ready) {
        let used = observed.containers.iter().any(|c| c.sandbox_id == sandbox.id && !removed.contains(&c.id.as_str()));
        if !used {
            ops.push(PodOp::RemoveSandbox { id: sandbox.id.clone() });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::backoff::BackoffPolicy;
    use crate::memory::{PullFailure, Unhealthy};
    use crate::observed::Limits;
    use crate::observed::State::{Created, Exited, Running, Unknown};
    use crate::scene::Scene;

    const TWO: &str = "{containers: [{name: a, image: i}, {name: b, image: i}]}";
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
}
