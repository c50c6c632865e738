//! Pure: what to do about one container of a good sandbox.

use k8s_openapi::api::core::v1::Container;

use super::{Plan, PodOp, Situation, container_hash, init_restarts, restarts, sooner, stop};
use crate::backoff::format_delay;
use crate::memory::Reason;
use crate::node::parse_cpu_list;
use crate::observed::{self, Limits, State};
use crate::pod;
use crate::resources::container_resources;
use crate::status;

/// How often the presence of an image is checked while its pulls back off.
const PRESENCE_CHECK: std::time::Duration = std::time::Duration::from_secs(10);

/// What follows a container's name in the message of its stop.
const RESIZE_RESTARTS: &str = " resize requires restart";

/// The container that a step stops so that it starts again with other resources.
pub fn restarted_by_resize(op: &PodOp) -> Option<&str> {
    match op {
        PodOp::StopContainer { name, message, .. } if message.ends_with(RESIZE_RESTARTS) => Some(name),
        _ => None,
    }
}

/// A running container stays unless its definition, its limits or its health have changed.
pub(super) fn plan_running(situation: &Situation<'_>, container: &Container, running: &observed::Container, plan: &mut Plan) {
    let Situation { pod, memory, .. } = *situation;
    let grace = pod::grace_seconds(pod);
    let name = &container.name;
    if !running.hash.is_empty() && running.hash != container_hash(container) {
        let message = format!("Container {name} definition changed, will be restarted");
        plan.ops.push(stop(running, grace, message));
        return;
    }
    if let Some(unhealthy) = memory.unhealthy.get(&running.id) {
        let mut message = format!("Container {name} failed {} probe", unhealthy.probe);
        if restarts(pod, container, 1) {
            message.push_str(", will be restarted");
        }
        plan.ops.push(stop(running, unhealthy.grace.unwrap_or(grace), message));
        return;
    }
    if memory.unfinished_hooks.get(name) == Some(&running.attempt) {
        plan.ops.push(PodOp::PostStart { id: running.id.clone(), name: name.clone() });
        return;
    }
    plan_pin(situation, name, running, plan);
    let Some((now, wanted)) = resize_of(situation, container, running) else { return };
    if needs_restart(container, now, wanted) {
        plan.ops.push(stop(running, grace, format!("Container {name}{RESIZE_RESTARTS}")));
    } else if let Some(failure) = memory.resize_failures.get(&running.id).filter(|f| f.until > situation.now.mono) {
        plan.wake = sooner(plan.wake, Some(failure.until));
    } else if memory.resized.get(&running.id) != Some(&wanted) {
        plan.ops.push(PodOp::Resize { id: running.id.clone(), name: name.clone() });
    }
}

/// A container runs on the processors that it is to have, where these are managed.
fn plan_pin(situation: &Situation<'_>, name: &str, running: &observed::Container, plan: &mut Plan) {
    let memory = situation.memory;
    let Some(wanted) = memory.cpus.get(name) else { return };
    let now = memory.pinned.get(&running.id).unwrap_or(&running.cpus);
    if parse_cpu_list(now) == parse_cpu_list(wanted) {
        return;
    }
    match memory.pin_failures.get(&running.id).filter(|until| **until > situation.now.mono) {
        Some(until) => plan.wake = sooner(plan.wake, Some(*until)),
        None => plan.ops.push(PodOp::Pin { id: running.id.clone(), cpus: wanted.clone() }),
    }
}

/// The limits that a running container has and those that it is to have, where they differ.
pub fn resize_of(situation: &Situation<'_>, container: &Container, running: &observed::Container) -> Option<(Limits, Limits)> {
    let Situation { pod, node, .. } = *situation;
    let wanted = Limits::from(&container_resources(pod, container, &node.capacity));
    running.resources.filter(|now| differs(*now, wanted)).map(|now| (now, wanted))
}

/// Whether what changes may not change in a running container.
fn needs_restart(container: &Container, now: Limits, wanted: Limits) -> bool {
    let cpu = now.cpu_shares != wanted.cpu_shares || now.cpu_quota != wanted.cpu_quota;
    let changes = |name: &str| if name == "memory" { now.memory != wanted.memory } else { cpu };
    let policies = container.resize_policy.iter().flatten();
    policies.into_iter().any(|policy| policy.restart_policy == "RestartContainer" && changes(&policy.resource_name))
}

/// Whether limits in force differ from the wanted ones; what the runtime does not tell (zero) is not compared.
fn differs(now: Limits, wanted: Limits) -> bool {
    let other = |now: i64, wanted: i64| now != 0 && now != wanted;
    other(now.cpu_shares, wanted.cpu_shares)
        || now.cpu_quota != wanted.cpu_quota && (now.cpu_shares != 0 || now.cpu_quota != 0)
        || now.memory != wanted.memory && (now.memory != 0 || now.cpu_shares != 0)
}

/// Init containers in their order: a regular one has to succeed, a sidecar to be started, before the next.
pub(super) fn plan_init(situation: &Situation<'_>, sandbox: &str, plan: &mut Plan) {
    let Situation { pod, observed, memory, .. } = *situation;
    for container in pod::init_containers(pod) {
        // A new sandbox runs them all again, whatever became of them in the old one.
        let record = observed.newest(&container.name).filter(|r| r.sandbox_id == sandbox);
        let sidecar = pod::is_sidecar(container);
        match record {
            Some(running) if running.state == State::Running && sidecar => {
                plan_running(situation, container, running, plan);
                if status::is_started(container, running, memory) {
                    continue;
                }
            }
            Some(done) if done.state == State::Exited && done.exit_code == 0 && !sidecar => continue,
            Some(failed) if failed.state == State::Exited => {
                if sidecar || init_restarts(pod, container, failed.exit_code) {
                    plan_restart(situation, container, failed, true, plan);
                }
            }
            Some(running) if running.state == State::Running => {}
            Some(lost) if lost.state == State::Unknown => {
                let message = format!("Init container {} is in an unknown state", container.name);
                plan.ops.push(stop(lost, pod::grace_seconds(pod), message));
            }
            other => plan_first_start(situation, container, other, true, plan),
        }
        return;
    }
}

/// Starts a container that has not run (in this sandbox); one that was only created is replaced.
pub(super) fn plan_first_start(
    situation: &Situation<'_>,
    container: &Container,
    created: Option<&observed::Container>,
    init: bool,
    plan: &mut Plan,
) {
    let name = container.name.clone();
    let attempt = match created {
        Some(created) => {
            plan.ops.push(PodOp::RemoveContainer { id: created.id.clone() });
            created.attempt
        }
        None => situation.memory.attempts.get(&name).map_or(0, |highest| highest + 1),
    };
    plan_start(situation, container, plan, PodOp::StartContainer { name, attempt, after: None, init, pull: true });
}

/// Starts a container again unless it has to wait.
pub(super) fn plan_restart(
    situation: &Situation<'_>,
    container: &Container,
    dead: &observed::Container,
    init: bool,
    plan: &mut Plan,
) {
    let Situation { pod, memory, now, .. } = *situation;
    let name = container.name.clone();
    let ended = memory.exits.get(&dead.id).copied().unwrap_or(now.mono);
    if let Some(waiting) = memory.crash.check(&name, ended, now.mono) {
        let message =
            format!("back-off {} restarting failed container={name} pod={}", format_delay(waiting.delay), pod::format_pod(pod));
        plan.waiting.push((name, Reason::new("CrashLoopBackOff", message)));
        plan.wake = sooner(plan.wake, Some(waiting.until));
        return;
    }
    let attempt = memory.attempts.get(&name).copied().unwrap_or(dead.attempt).max(dead.attempt) + 1;
    let after = Some(dead.id.clone());
    plan_start(situation, container, plan, PodOp::StartContainer { name, attempt, after, init, pull: true });
}

/// Adds a start unless the container waits for another try.
fn plan_start(situation: &Situation<'_>, container: &Container, plan: &mut Plan, mut start: PodOp) {
    let Situation { memory, now, .. } = *situation;
    let name = container.name.clone();
    if let Some(hold) = memory.holds.get(&name).filter(|hold| **hold > now.mono) {
        let reason = memory.reasons.get(&name).cloned();
        plan.waiting.extend(reason.map(|reason| (name, reason)));
        plan.wake = sooner(plan.wake, Some(*hold));
        return;
    }
    let image = container.image.as_deref().unwrap_or_default();
    let failure = memory.pull_failures.get(image);
    let waiting = failure.and_then(|f| memory.pulls.check(image, f.failed_at, now.mono));
    if let (Some(failure), Some(waiting)) = (failure, waiting) {
        let message = format!("Back-off pulling image {image:?}: {}: {}", failure.reason.reason, failure.reason.message);
        plan.waiting.push((name, Reason::new("ImagePullBackOff", message)));
        let check_at = failure.checked_at + PRESENCE_CHECK;
        let may_appear = container.image_pull_policy.as_deref() != Some("Always");
        if !may_appear || now.mono < check_at {
            let until = if may_appear { waiting.until.min(check_at) } else { waiting.until };
            plan.wake = sooner(plan.wake, Some(until));
            return;
        }
        // Somebody may have imported it meanwhile.
        if let PodOp::StartContainer { pull, .. } = &mut start {
            *pull = false;
        }
    }
    plan.ops.push(start);
}
