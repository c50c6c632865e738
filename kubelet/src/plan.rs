//! Pure: what to do next for a pod, from its spec, what the runtime has and what the worker remembers. The same plan
//! serves start, change, crash, restart of the kubelet and reboot. Calls nothing.

mod container;

use k8s_openapi::api::core::v1::{Container, ContainerRestartRule, Pod};
use tokio::time::Instant;

use self::container::{plan_first_start, plan_init, plan_restart, plan_running};
pub use self::container::{resize_of, restarted_by_resize};
use crate::clock::Now;
use crate::memory::{PodMemory, Reason, Termination};
use crate::node::NodeView;
use crate::observed::{self, PodObserved, State};
use crate::pod;
use crate::source::static_pod::digest;
use crate::status;

/// One step of a plan. Steps run in order; neighbouring stops of containers run together, stage by stage.
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
        /// Stops of one stage run together, those of the next after them: sidecars end after what they serve.
        stage: usize,
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
    /// Moves a running container to other processors.
    Pin {
        /// The container.
        id: String,
        /// The processors, as a list.
        cpus: String,
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
    /// Forgets a dead container of a pod that begins again; its log stays.
    ClearContainer {
        /// Container's ID.
        id: String,
    },
    /// Writes down that the pod has ended and is not to run again: the records that say so are to go.
    KeepEnd,
    /// Forgets a dead sandbox.
    RemoveSandbox {
        /// Sandbox's ID.
        id: String,
    },
    /// Volumes and cgroup, and the pod's folder but for what is to be kept of it.
    Release {
        /// The logs go too, and nothing may be left.
        forget: bool,
        /// The last status stays: the pod has ended, and the next kubelet is to know how.
        keep_status: bool,
    },
    /// Runs the postStart hook that an earlier kubelet has not seen the end of.
    PostStart {
        /// Container's ID.
        id: String,
        /// Its name.
        name: String,
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

/// Whether the pod's policy lets a container run again after this exit code: the first of its rules that matches decides,
/// else its own policy, else the pod's.
pub fn restarts(pod: &Pod, container: &Container, exit_code: i32) -> bool {
    if rule_for(container, exit_code).is_some() {
        return true;
    }
    let own = container.restart_policy.as_deref();
    match own.or(pod::spec(pod).restart_policy.as_deref()) {
        Some("Never") => false,
        Some("OnFailure") => exit_code != 0,
        _ => true,
    }
}

/// The first of the container's rules that speaks of this exit code. All rules restart something.
fn rule_for(container: &Container, exit_code: i32) -> Option<&ContainerRestartRule> {
    container.restart_policy_rules.iter().flatten().find(|rule| {
        let Some(codes) = &rule.exit_codes else { return false };
        let listed = codes.values.iter().flatten().any(|code| *code == exit_code);
        listed == (codes.operator == "In")
    })
}

/// The action of a rule by which all containers of a pod begin again.
const RESTART_ALL: &str = "RestartAllContainers";

/// Whether the pod has a rule by which all its containers begin again.
pub fn can_restart_all(pod: &Pod) -> bool {
    let mut rules = pod::all_containers(pod).flat_map(|c| c.restart_policy_rules.iter().flatten());
    rules.any(|rule| rule.action == RESTART_ALL)
}

/// The container whose end makes all containers of the pod begin again, while its record is there.
pub fn restart_all_trigger<'a>(pod: &Pod, observed: &'a PodObserved) -> Option<&'a observed::Container> {
    let sandbox = observed.sandbox().filter(|sandbox| sandbox.ready)?;
    pod::all_containers(pod).find_map(|container| {
        let ended = observed.newest(&container.name).filter(|c| c.state == State::Exited && c.sandbox_id == sandbox.id)?;
        rule_for(container, ended.exit_code).filter(|rule| rule.action == RESTART_ALL).map(|_| ended)
    })
}

/// As [`restarts`], for an init container: `Always` means until it succeeds.
pub fn init_restarts(pod: &Pod, container: &Container, exit_code: i32) -> bool {
    exit_code != 0 && restarts(pod, container, exit_code)
}

/// Hash of what a running container cannot change: name and image.
pub fn container_hash(container: &Container) -> String {
    digest(&[&container.name, container.image.as_deref().unwrap_or_default()])[..8].to_owned()
}

/// Plans the next pass.
pub fn plan(situation: &Situation<'_>) -> Plan {
    let Situation { pod, observed, memory, .. } = *situation;
    if let Some(termination) = memory.terminating {
        return plan_end(situation, termination);
    }
    if status::is_terminal(pod, observed, memory) || memory.deadline_exceeded {
        return plan_rest(pod, observed, memory);
    }
    let mut plan = Plan::default();
    match sandbox_verdict(situation) {
        SandboxVerdict::Keep if restart_all_trigger(pod, observed).is_some() => {
            plan_restart_all(pod, observed, &mut plan.ops);
        }
        SandboxVerdict::Keep => {
            if !plan_containers(situation, &mut plan) {
                return plan_rest(pod, observed, memory);
            }
            plan_ephemeral(situation, &mut plan);
        }
        SandboxVerdict::Leave => return plan_rest(pod, observed, memory),
        SandboxVerdict::Replace { attempt } => {
            stop_all(pod, observed, pod::grace_seconds(pod), &mut plan.ops);
            plan.ops.push(PodOp::Prepare);
            plan.ops.push(PodOp::CreateSandbox { attempt });
        }
    }
    if !memory.prepared && !plan.ops.contains(&PodOp::Prepare) {
        plan_prepare(situation, &mut plan);
    }
    collect_garbage(observed, &mut plan.ops);
    plan.wake = sooner(plan.wake, deadline(situation));
    plan
}

/// A pod that has a sandbox is to be brought up to date. When that fails the rest goes on: what is ill is stopped, and what has all
/// its volumes starts.
fn plan_prepare(situation: &Situation<'_>, plan: &mut Plan) {
    let outdated = situation.memory.outdated;
    if outdated.is_some_and(|outdated| !outdated.usable) {
        plan.ops.retain(|op| !matches!(op, PodOp::StartContainer { .. }));
    }
    match outdated.map(|outdated| outdated.until).filter(|until| *until > situation.now.mono) {
        Some(until) => plan.wake = sooner(plan.wake, Some(until)),
        None => plan.ops.insert(0, PodOp::Prepare),
    }
}

/// All containers of the sandbox end and are forgotten; without records the pod then begins from its first init container. The
/// record that says so goes last: whatever comes between, the next plan is the same.
fn plan_restart_all(pod: &Pod, observed: &PodObserved, ops: &mut Vec<PodOp>) {
    stop_containers(pod, observed, pod::grace_seconds(pod), ops);
    let trigger = restart_all_trigger(pod, observed).map(|c| c.id.as_str());
    let others = observed.containers.iter().map(|c| c.id.as_str()).filter(|id| Some(*id) != trigger);
    ops.extend(others.chain(trigger).map(|id| PodOp::ClearContainer { id: id.to_owned() }));
}

/// When the pod's active deadline passes. By the monotonic clock: a wall clock that jumps ends no pod.
fn deadline(situation: &Situation<'_>) -> Option<Instant> {
    let seconds = u64::try_from(pod::spec(situation.pod).active_deadline_seconds?).ok()?;
    situation.memory.active_since.checked_add(std::time::Duration::from_secs(seconds))
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

/// The pod's source does not have it any more: stop, then forget everything. A pod that only the node ends is still wanted: it stays
/// known, with its status.
fn plan_end(situation: &Situation<'_>, termination: Termination) -> Plan {
    let Situation { pod, observed, memory, .. } = *situation;
    let mut plan = Plan::default();
    stop_all(pod, observed, termination.grace, &mut plan.ops);
    if !plan.ops.is_empty() {
        return plan;
    }
    if termination.forget {
        forget_records(observed, &mut plan.ops);
    }
    let is_over = memory.cleared || memory.unwanted && !runs_again(situation);
    if !memory.released {
        let keep_status = is_over && !termination.forget;
        plan.ops.push(PodOp::Release { forget: termination.forget, keep_status });
    }
    if memory.unwanted && !termination.forget {
        clear_records(observed, memory, is_over, &mut plan.ops);
    }
    plan.finished = plan.ops.is_empty() && termination.forget;
    plan
}

/// The records of a pod that has ended go. Where they alone say that it has run, that is put on disk first.
fn clear_records(observed: &PodObserved, memory: &PodMemory, is_over: bool, ops: &mut Vec<PodOp>) {
    let any = !observed.containers.is_empty() || !observed.sandboxes.is_empty();
    if any && is_over && !memory.end_kept {
        ops.push(PodOp::KeepEnd);
    }
    forget_records(observed, ops);
}

/// Whether the next kubelet, which finds only the records, would run a pod again that the node has ended.
fn runs_again(situation: &Situation<'_>) -> bool {
    let Situation { pod, observed, memory, .. } = *situation;
    let over_deadline = memory.deadline_exceeded;
    !over_deadline
        && !status::is_over_by_records(pod, observed, memory)
        && !matches!(sandbox_verdict(situation), SandboxVerdict::Leave)
}

/// Everything that the runtime has of a pod, when nothing of it runs.
fn forget_records(observed: &PodObserved, ops: &mut Vec<PodOp>) {
    ops.extend(observed.containers.iter().map(|c| PodOp::RemoveContainer { id: c.id.clone() }));
    ops.extend(observed.sandboxes.iter().map(|s| PodOp::RemoveSandbox { id: s.id.clone() }));
}

/// The pod has nothing more to run: stop what is left, keep the records.
fn plan_rest(pod: &Pod, observed: &PodObserved, memory: &PodMemory) -> Plan {
    let mut plan = Plan::default();
    stop_all(pod, observed, pod::grace_seconds(pod), &mut plan.ops);
    if plan.ops.is_empty() && !memory.released {
        plan.ops.push(PodOp::Release { forget: false, keep_status: true });
    }
    match memory.unwanted && plan.ops.is_empty() {
        true => clear_records(observed, memory, true, &mut plan.ops),
        false => collect_garbage(observed, &mut plan.ops),
    }
    plan
}

/// Everything that may run is stopped: the sidecars after all others, in the reverse order of their start.
fn stop_all(pod: &Pod, observed: &PodObserved, grace: i64, ops: &mut Vec<PodOp>) {
    stop_containers(pod, observed, grace, ops);
    let ready = observed.sandboxes.iter().filter(|s| s.ready);
    ops.extend(ready.map(|s| PodOp::StopSandbox { id: s.id.clone() }));
}

fn stop_containers(pod: &Pod, observed: &PodObserved, grace: i64, ops: &mut Vec<PodOp>) {
    let sidecars: Vec<&str> = pod::sidecars(pod).map(|c| c.name.as_str()).collect();
    let stage = |name: &str| sidecars.iter().position(|sidecar| *sidecar == name).map_or(0, |at| sidecars.len() - at);
    let mut running: Vec<_> = observed.containers.iter().filter(|c| c.may_run()).map(|c| (stage(&c.name), c)).collect();
    running.sort_by_key(|(stage, _)| *stage);
    for (stage, container) in running {
        let message = format!("Stopping container {}", container.name);
        let (id, name) = (container.id.clone(), container.name.clone());
        ops.push(PodOp::StopContainer { id, name, grace, stage, message });
    }
}

fn stop(container: &observed::Container, grace: i64, message: String) -> PodOp {
    PodOp::StopContainer { id: container.id.clone(), name: container.name.clone(), grace, stage: 0, message }
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
    let Situation { pod, observed, memory, .. } = *situation;
    let sandbox = observed.sandbox().map(|s| s.id.as_str()).unwrap_or_default();
    if !status::is_initialized(pod, observed, memory) {
        plan_init(situation, sandbox, plan);
        return true;
    }
    let (mut alive, mut regular) = (false, Plan::default());
    for container in &pod::spec(pod).containers {
        alive |= plan_one(situation, container, sandbox, &mut regular);
    }
    if alive {
        // What serves the others is there first; without them it is not wanted.
        for sidecar in pod::sidecars(pod) {
            plan_one(situation, sidecar, sandbox, plan);
        }
    }
    plan.ops.append(&mut regular.ops);
    plan.waiting.append(&mut regular.waiting);
    plan.wake = sooner(plan.wake, regular.wake);
    alive
}

/// Plans one container of an initialized pod; whether it runs or is to run.
fn plan_one(situation: &Situation<'_>, container: &Container, sandbox: &str, plan: &mut Plan) -> bool {
    let Situation { pod, observed, .. } = *situation;
    match observed.newest(&container.name) {
        Some(running) if running.state == State::Running && running.sandbox_id == sandbox => {
            plan_running(situation, container, running, plan);
        }
        Some(lost) if lost.may_run() => {
            let message = format!("Container {} is in an unknown state", container.name);
            plan.ops.push(stop(lost, pod::grace_seconds(pod), message));
        }
        Some(dead) if dead.state == State::Exited => {
            if !restarts(pod, container, dead.exit_code) {
                return false;
            }
            plan_restart(situation, container, dead, false, plan);
        }
        other => plan_first_start(situation, container, other, false, plan),
    }
    true
}

/// What somebody has added to the running pod starts once, whatever the others do.
fn plan_ephemeral(situation: &Situation<'_>, plan: &mut Plan) {
    let Situation { pod, observed, memory, .. } = *situation;
    let known = memory.status.iter().flat_map(|status| status.ephemeral_container_statuses.iter().flatten());
    let over: Vec<&str> =
        known.filter(|s| s.state.as_ref().is_some_and(|s| s.terminated.is_some())).map(|s| s.name.as_str()).collect();
    for container in pod::ephemeral_containers(pod).filter(|container| !over.contains(&container.name.as_str())) {
        match observed.newest(&container.name) {
            Some(record) if record.state != State::Created => {}
            created => plan_first_start(situation, &container, created, false, plan),
        }
    }
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
mod tests;
