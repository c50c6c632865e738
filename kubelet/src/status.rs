//! Pure: the v1 status of a pod, from its spec, what the runtime has and what the worker remembers.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting, ContainerStatus,
    ContainerUser, HostIP, LinuxContainerUser, Pod, PodCondition, PodIP, PodStatus, VolumeMountStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::memory::{DEADLINE_EXCEEDED, PodMemory};
use crate::node::NodeView;
use crate::observed::{self, PodObserved, State, timestamp, whole_second};
use crate::plan::{Situation, can_restart_all, init_restarts, resize_of, restart_all_trigger, restarts};
use crate::pod;
use crate::resize;
use crate::resources::qos_class;

/// Most that one termination message may have, and all of a pod together.
const MAX_MESSAGE: usize = 4096;
const MAX_MESSAGES: usize = 12 * 1024;

/// Whether initialization is over: no init containers, the last one has done its part, or a regular one was made already.
pub fn is_initialized(pod: &Pod, observed: &PodObserved, memory: &PodMemory) -> bool {
    let inits = pod::init_containers(pod);
    let Some(last) = inits.last() else { return true };
    let Some(sandbox) = observed.sandbox() else { return false };
    let here = |name: &str| observed.newest(name).filter(|c| c.sandbox_id == sandbox.id);
    let done = here(&last.name).is_some_and(|c| match pod::is_sidecar(last) {
        true => is_started(last, c, memory),
        false => c.state == State::Exited && c.exit_code == 0,
    });
    done || pod::spec(pod).containers.iter().any(|c| here(&c.name).is_some())
}

/// Whether a container runs and has come up, as far as its postStart hook and its startup probe say.
pub fn is_started(container: &Container, record: &observed::Container, memory: &PodMemory) -> bool {
    let probed = memory.probes.get(&record.id).map_or(container.startup_probe.is_none(), |probes| probes.started);
    record.state == State::Running && probed && !memory.is_hooked(record)
}

/// Whether the pod has ended for good.
pub fn is_terminal(pod: &Pod, observed: &PodObserved, memory: &PodMemory) -> bool {
    let before = memory.status.as_ref().and_then(|s| s.phase.as_deref());
    is_terminal_phase(before) || is_terminal_phase(Some(phase(pod, observed, memory)))
}

/// Whether the records alone say that the pod has ended for good.
pub fn is_over_by_records(pod: &Pod, observed: &PodObserved, memory: &PodMemory) -> bool {
    is_terminal_phase(Some(phase(pod, observed, memory)))
}

/// Whether a phase never changes again.
pub fn is_terminal_phase(phase: Option<&str>) -> bool {
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// The phase as the records have it.
fn phase(pod: &Pod, observed: &PodObserved, memory: &PodMemory) -> &'static str {
    let initialized = is_initialized(pod, observed, memory);
    if !initialized {
        for container in pod::init_containers(pod) {
            match observed.newest(&container.name) {
                Some(c) if pod::is_sidecar(container) => {
                    if !is_started(container, c, memory) {
                        return "Pending";
                    }
                }
                Some(c) if c.state == State::Exited && c.exit_code == 0 => {}
                Some(c) if c.state == State::Exited && !init_restarts(pod, container, c.exit_code) => return "Failed",
                _ => return "Pending",
            }
        }
        // All succeeded, but not in this sandbox: they run again.
        return "Pending";
    }
    let (mut running, mut waiting, mut stopped, mut succeeded, mut restarting) = (0, 0, 0, 0, 0);
    for container in &pod::spec(pod).containers {
        let ended_before = observed.containers.iter().any(|c| c.name == container.name && c.state == State::Exited);
        match observed.newest(&container.name) {
            Some(c) if c.state == State::Running => running += 1,
            Some(c) if c.state == State::Exited => {
                stopped += 1;
                succeeded += u32::from(c.exit_code == 0);
                restarting += u32::from(restarts(pod, container, c.exit_code));
            }
            _ if ended_before => {
                stopped += 1;
                restarting += 1;
            }
            _ => waiting += 1,
        }
    }
    for sidecar in pod::sidecars(pod) {
        // One that has ended has no say: it is restarted, or it ends with the pod.
        match observed.newest(&sidecar.name) {
            Some(c) if c.state == State::Running => running += 1,
            None if running > 0 => waiting += 1,
            _ => {}
        }
    }
    match () {
        () if waiting > 0 => "Pending",
        () if running > 0 || restarting > 0 => "Running",
        () if stopped > 0 && stopped == succeeded => "Succeeded",
        () if stopped > 0 => "Failed",
        () => "Pending",
    }
}

/// The whole status.
pub fn status(situation: &Situation<'_>) -> PodStatus {
    let Situation { pod, observed, memory, node, now } = *situation;
    let before = memory.status.as_ref();
    let terminal_before = before.and_then(|s| s.phase.clone()).filter(|p| is_terminal_phase(Some(p)));
    let spec = pod::spec(pod);
    let initialized = is_initialized(pod, observed, memory);
    let init_statuses: Vec<_> = pod::init_containers(pod)
        .iter()
        .map(|c| {
            let kind = if pod::is_sidecar(c) { Kind::Sidecar { initialized } } else { Kind::Init { initialized } };
            container_status(situation, c, kind)
        })
        .collect();
    let mut statuses: Vec<_> = spec.containers.iter().map(|c| container_status(situation, c, Kind::Regular)).collect();
    statuses.sort_by(|a, b| a.name.cmp(&b.name));
    let mut added: Vec<_> = pod::ephemeral_containers(pod).map(|c| container_status(situation, &c, Kind::Ephemeral)).collect();
    added.sort_by(|a, b| a.name.cmp(&b.name));
    let total = init_statuses.len() + statuses.len() + added.len();
    let [init_statuses, statuses, added] = [init_statuses, statuses, added].map(|statuses| cut_messages(statuses, total));
    // Of a pod that was not let in there never were any containers.
    let never_let_in = terminal_before.is_some()
        && observed.containers.is_empty()
        && before.is_some_and(|s| s.container_statuses.is_none() && s.init_container_statuses.is_none());
    let [init_statuses, statuses, added] = match never_let_in {
        true => [Vec::new(), Vec::new(), Vec::new()],
        false => [init_statuses, statuses, added],
    };

    let verdict = verdict(memory);
    let phase = match (terminal_before, &verdict) {
        (Some(phase), _) => phase,
        (None, None) if !memory.deleted => phase(pod, observed, memory).to_owned(),
        (None, None) if !observed.is_alive() => end_of_deleted(pod, observed).to_owned(),
        (None, Some(_)) if !observed.is_alive() => "Failed".to_owned(),
        // It ends, but something of it still runs: whoever acts on a terminal phase may not see one yet.
        (None, _) => {
            let phase = phase(pod, observed, memory);
            if is_terminal_phase(Some(phase)) { "Running" } else { phase }.to_owned()
        }
    };
    let (reason, message) = match before.filter(|b| b.phase.as_deref() == Some(&phase)) {
        Some(same) if same.reason.is_some() => (same.reason.clone(), same.message.clone()),
        Some(_) if is_terminal_phase(Some(&phase)) => (None, None),
        _ if phase == "Failed" => verdict.map_or((None, None), |(reason, message)| (Some(reason), Some(message))),
        _ => (None, None),
    };
    let conditions = conditions(situation, &phase, initialized, &init_statuses, &statuses);
    let host_ips = node.host_ips.clone();
    let pod_ips = match () {
        () if is_terminal_phase(Some(&phase)) => Vec::new(),
        () if pod::is_host_network(pod) => host_ips.clone(),
        () => memory.ips.clone(),
    };
    let _ = now;
    PodStatus {
        phase: Some(phase),
        reason,
        message,
        conditions: Some(conditions),
        host_ip: host_ips.first().cloned(),
        host_ips: list(host_ips.into_iter().map(|ip| HostIP { ip }).collect()),
        pod_ip: pod_ips.first().cloned(),
        pod_ips: list(pod_ips.into_iter().map(|ip| PodIP { ip }).collect()),
        start_time: Some(Time(memory.start_time)),
        qos_class: Some(qos_class(pod).as_str().to_owned()),
        observed_generation: pod.metadata.generation,
        init_container_statuses: list(init_statuses),
        container_statuses: list(statuses),
        ephemeral_container_statuses: list(added),
        ..PodStatus::default()
    }
}

/// How a pod has ended whose deletion was asked for: whatever its policy says, nothing of it starts again.
fn end_of_deleted(pod: &Pod, observed: &PodObserved) -> &'static str {
    let succeeded = |c: &Container| observed.newest(&c.name).is_some_and(|c| c.state == State::Exited && c.exit_code == 0);
    if pod::spec(pod).containers.iter().all(succeeded) { "Succeeded" } else { "Failed" }
}

/// Why the pod fails whatever its containers do.
fn verdict(memory: &PodMemory) -> Option<(String, String)> {
    let deadline = || {
        let message = "Pod was active on the node longer than the specified deadline";
        memory.deadline_exceeded.then(|| (DEADLINE_EXCEEDED.to_owned(), message.to_owned()))
    };
    let ending = memory.ending.as_ref().map(|ending| (ending.reason.clone(), ending.message.clone()));
    ending.or_else(deadline)
}

fn list<T>(items: Vec<T>) -> Option<Vec<T>> {
    (!items.is_empty()).then_some(items)
}

#[derive(Clone, Copy)]
enum Kind {
    Init {
        initialized: bool,
    },
    Sidecar {
        initialized: bool,
    },
    Regular,
    /// Added to the running pod; it starts once.
    Ephemeral,
}

fn container_status(situation: &Situation<'_>, container: &Container, kind: Kind) -> ContainerStatus {
    let Situation { pod, observed, memory, node, .. } = *situation;
    let mut records = observed.containers.iter().filter(|c| c.name == container.name);
    let (newest, older) = (records.next(), records.find(|c| c.state == State::Exited));
    let before = previous(memory, &container.name);
    let over = || is_terminal_phase(memory.status.as_ref().and_then(|s| s.phase.as_deref()));
    if let Some(ended) = before.filter(|b| b.state.as_ref().is_some_and(|s| s.terminated.is_some()))
        && newest.is_none()
        && over()
    {
        // Its record went when the disk was full.
        return ended.clone();
    }
    let cached = memory.reasons.get(&container.name);
    let again = |exit_code| {
        memory.terminating.is_none()
            && !memory.deadline_exceeded
            && match kind {
                Kind::Init { initialized } => !initialized && init_restarts(pod, container, exit_code),
                Kind::Sidecar { .. } | Kind::Regular => restarts(pod, container, exit_code),
                Kind::Ephemeral => false,
            }
    };
    let waiting = |reason: Option<(&str, &str)>| ContainerState {
        waiting: Some(ContainerStateWaiting {
            reason: reason.map(|(r, _)| r.to_owned()).filter(|r| !r.is_empty()),
            message: reason.map(|(_, m)| m.to_owned()).filter(|m| !m.is_empty()),
        }),
        ..ContainerState::default()
    };
    let cached_pair = cached.map(|c| (c.reason.as_str(), c.message.as_str()));
    let mut last_state = older.map(|c| terminated(c, &node.runtime_name));
    let state = match newest {
        None => match kind {
            Kind::Init { initialized: true } => lost_init(),
            Kind::Sidecar { initialized: true } => waiting(cached_pair.or(Some(("ContainerCreating", "")))),
            Kind::Ephemeral => waiting(cached_pair.or(Some(("ContainerCreating", "")))),
            _ if pod::init_containers(pod).is_empty() => waiting(cached_pair.or(Some(("ContainerCreating", "")))),
            _ => waiting(cached_pair.or(Some(("PodInitializing", "")))),
        },
        Some(c) => match c.state {
            State::Created | State::Unknown => waiting(cached_pair),
            State::Running => ContainerState {
                running: Some(ContainerStateRunning { started_at: Some(Time(timestamp(c.started_at))) }),
                ..ContainerState::default()
            },
            State::Exited if cached.is_some() && again(c.exit_code) => {
                last_state = Some(terminated(c, &node.runtime_name));
                waiting(cached_pair)
            }
            State::Exited => terminated(c, &node.runtime_name),
        },
    };
    let state = match state.terminated.is_none() && is_lost(situation, kind) {
        true => unlocated(),
        false => state,
    };
    if last_state.is_none() {
        last_state = remembered(before, newest, &node.runtime_name);
    }
    let (state, last_state) = match restart_all_trigger(pod, observed) {
        // What started this keeps its own end as the last state.
        Some(trigger) => {
            let own = newest.filter(|c| c.id == trigger.id).map(|c| terminated(c, &node.runtime_name));
            (waiting(Some((RESTARTING_ALL, ""))), own.or_else(|| Some(ended_by_rule(newest, &node.runtime_name))))
        }
        None => (state, last_state),
    };
    let runs = newest.filter(|c| c.state == State::Running);
    let probes = runs.and_then(|c| memory.probes.get(&c.id).copied());
    let started = runs.is_some_and(|c| !memory.is_hooked(c)) && probes.is_none_or(|p| p.started);
    let ready = match kind {
        Kind::Init { initialized } => initialized || newest.is_some_and(|c| c.state == State::Exited && c.exit_code == 0),
        Kind::Sidecar { .. } | Kind::Regular => started && probes.is_none_or(|p| p.ready),
        Kind::Ephemeral => false,
    };
    let restart_count = newest.map(|c| c.attempt).or_else(|| before.and_then(|b| u32::try_from(b.restart_count).ok()));
    ContainerStatus {
        name: container.name.clone(),
        image: newest.map(|c| c.image.clone()).filter(|i| !i.is_empty()).or(container.image.clone()).unwrap_or_default(),
        image_id: newest.map(|c| c.image_ref.clone()).unwrap_or_default(),
        container_id: newest.map(|c| format!("{}://{}", node.runtime_name, c.id)),
        restart_count: i32::try_from(restart_count.unwrap_or(0)).unwrap_or(i32::MAX),
        started: Some(started),
        ready,
        state: Some(state),
        last_state,
        resources: runs.and(container.resources.clone()),
        allocated_resources: runs.and(container.resources.as_ref().and_then(|r| r.requests.clone())),
        user: runs.and_then(|c| c.user.clone()).map(|u| ContainerUser {
            linux: Some(LinuxContainerUser { uid: u.uid, gid: u.gid, supplemental_groups: list(u.groups) }),
        }),
        volume_mounts: list(mount_statuses(container)),
        ..ContainerStatus::default()
    }
}

/// Whether a container that has not ended never will: the pod is over, though it had come up.
fn is_lost(situation: &Situation<'_>, kind: Kind) -> bool {
    let Situation { pod, observed, memory, .. } = *situation;
    let came_up = pod::spec(pod).containers.iter().any(|c| observed.newest(&c.name).is_some());
    (verdict(memory).is_some() || memory.deleted) && !observed.is_alive() && came_up && matches!(kind, Kind::Regular)
}

/// Why containers wait, and how they ended, when a rule makes all of a pod begin again.
const RESTARTING_ALL: &str = "RestartingAllContainers";

fn ended_by_rule(newest: Option<&observed::Container>, runtime_name: &str) -> ContainerState {
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            exit_code: 137,
            reason: Some(RESTARTING_ALL.to_owned()),
            container_id: newest.map(|c| format!("{runtime_name}://{}", c.id)),
            ..ContainerStateTerminated::default()
        }),
        ..ContainerState::default()
    }
}

fn unlocated() -> ContainerState {
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            exit_code: 137,
            reason: Some("ContainerStatusUnknown".to_owned()),
            message: Some("The container could not be located when the pod was terminated".to_owned()),
            ..ContainerStateTerminated::default()
        }),
        ..ContainerState::default()
    }
}

fn previous<'a>(memory: &'a PodMemory, name: &str) -> Option<&'a ContainerStatus> {
    let status = memory.status.as_ref()?;
    let lists = [&status.container_statuses, &status.init_container_statuses, &status.ephemeral_container_statuses];
    let all = lists.into_iter().flatten().flatten();
    all.into_iter().find(|s| s.name == name)
}

/// Whether the last status of this very container had it started, and ready.
pub fn known(memory: &PodMemory, node: &NodeView, record: &observed::Container) -> Option<(bool, bool)> {
    let before = previous(memory, &record.name)?;
    let same = before.container_id.as_deref() == Some(&format!("{}://{}", node.runtime_name, record.id));
    same.then(|| (before.started == Some(true), before.ready))
}

/// The former status's end, when its record is gone.
fn remembered(
    before: Option<&ContainerStatus>,
    newest: Option<&observed::Container>,
    runtime_name: &str,
) -> Option<ContainerState> {
    let before = before?;
    let same = newest.is_some_and(|c| before.container_id == Some(format!("{runtime_name}://{}", c.id)));
    let ended = before.state.as_ref().filter(|s| s.terminated.is_some());
    if same { before.last_state.clone() } else { ended.cloned().or_else(|| before.last_state.clone()) }
}

fn terminated(container: &observed::Container, runtime_name: &str) -> ContainerState {
    let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            exit_code: container.exit_code,
            reason: text(&container.reason),
            message: text(&container.message),
            started_at: Some(Time(timestamp(container.started_at))),
            finished_at: Some(Time(timestamp(container.finished_at))),
            container_id: Some(format!("{runtime_name}://{}", container.id)),
            signal: None,
        }),
        ..ContainerState::default()
    }
}

/// An init container that is done and whose record the runtime has lost.
fn lost_init() -> ContainerState {
    let message = "Unable to get init container status from container runtime and pod has been initialized, \
                   treat it as exited normally";
    ContainerState {
        terminated: Some(ContainerStateTerminated {
            exit_code: 0,
            reason: Some("Completed".to_owned()),
            message: Some(message.to_owned()),
            ..ContainerStateTerminated::default()
        }),
        ..ContainerState::default()
    }
}

fn mount_statuses(container: &Container) -> Vec<VolumeMountStatus> {
    let mounts = container.volume_mounts.iter().flatten();
    mounts
        .map(|mount| VolumeMountStatus {
            name: mount.name.clone(),
            mount_path: mount.mount_path.clone(),
            read_only: mount.read_only,
            recursive_read_only: (mount.read_only == Some(true)).then(|| match mount.recursive_read_only.as_deref() {
                Some("Enabled") => "Enabled".to_owned(),
                _ => "Disabled".to_owned(),
            }),
            ..VolumeMountStatus::default()
        })
        .collect()
}

fn cut_messages(mut statuses: Vec<ContainerStatus>, total: usize) -> Vec<ContainerStatus> {
    let most = MAX_MESSAGE.min(MAX_MESSAGES / total.max(1));
    for status in &mut statuses {
        for state in [&mut status.state, &mut status.last_state] {
            let message = state.as_mut().and_then(|s| s.terminated.as_mut()).and_then(|t| t.message.as_mut());
            if let Some(message) = message.filter(|m| m.len() > most) {
                let start = message.len() - most;
                let start = (start..message.len()).find(|i| message.is_char_boundary(*i)).unwrap_or(start);
                *message = message.split_off(start);
            }
        }
    }
    statuses
}

fn conditions(
    situation: &Situation<'_>,
    phase: &str,
    initialized: bool,
    init_statuses: &[ContainerStatus],
    statuses: &[ContainerStatus],
) -> Vec<PodCondition> {
    let Situation { pod, observed, memory, now, .. } = *situation;
    let sandbox_ready =
        observed.sandbox().is_some_and(|s| s.ready && (pod::is_host_network(pod) || !s.has_network || !s.ips.is_empty()));
    let is_sidecar = |s: &&ContainerStatus| pod::sidecars(pod).any(|c| c.name == s.name);
    let init_verdict = match (phase, initialized) {
        ("Succeeded", _) => Verdict::yes_because("PodCompleted"),
        (_, true) => Verdict::yes(),
        (_, false) => {
            // A sidecar has done its part when it has started.
            let waits = |s: &&ContainerStatus| if is_sidecar(s) { s.started != Some(true) } else { !s.ready };
            let names = init_statuses.iter().filter(waits).map(|s| s.name.as_str());
            Verdict::no("ContainersNotInitialized", "containers with incomplete status", names)
        }
    };
    let serving: Vec<&ContainerStatus> = init_statuses.iter().filter(is_sidecar).chain(statuses).collect();
    let ready_verdict = match phase {
        "Succeeded" => Verdict { status: false, reason: Some("PodCompleted"), message: None },
        "Failed" => Verdict { status: false, reason: Some("PodFailed"), message: None },
        _ if serving.iter().all(|s| s.ready) => Verdict::yes(),
        _ => {
            let names = serving.iter().filter(|s| !s.ready).map(|s| s.name.as_str());
            Verdict::no("ContainersNotReady", "containers with unready status", names)
        }
    };
    let before: BTreeMap<&str, &PodCondition> = memory
        .status
        .iter()
        .flat_map(|s| s.conditions.iter().flatten())
        .map(|condition| (condition.type_.as_str(), condition))
        .collect();
    let gates = pod::spec(pod).readiness_gates.iter().flatten().map(|gate| gate.condition_type.as_str());
    let told = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let told: BTreeMap<&str, &PodCondition> = told.map(|condition| (condition.type_.as_str(), condition)).collect();
    let pod_ready = if ready_verdict.status { gates_verdict(gates, &told) } else { ready_verdict.clone() };
    let wanted = [
        ("PodReadyToStartContainers", Verdict { status: sandbox_ready, reason: None, message: None }),
        ("Initialized", init_verdict),
        ("Ready", pod_ready),
        ("ContainersReady", ready_verdict),
        ("PodScheduled", Verdict::yes()),
    ];
    let build = |(type_, verdict): (&str, Verdict)| {
        let status = if verdict.status { "True" } else { "False" };
        let same = before.get(type_).filter(|c| c.status == status);
        PodCondition {
            type_: type_.to_owned(),
            status: status.to_owned(),
            reason: verdict.reason.map(str::to_owned),
            message: verdict.message,
            last_transition_time: same.and_then(|c| c.last_transition_time.clone()).or(Some(Time(whole_second(now.wall)))),
            observed_generation: match (type_, &memory.pending) {
                // What is refused is what the pod is to become.
                (resize::PENDING, Some(pending)) => pending.wanted.metadata.generation,
                _ => pod.metadata.generation,
            },
            ..PodCondition::default()
        }
    };
    let restarting = can_restart_all(pod).then(|| {
        let verdict = match restart_all_trigger(pod, observed) {
            Some(_) => Verdict {
                status: true,
                reason: Some("RestartAllContainersStarted"),
                message: Some("container exited with restart policy rule".to_owned()),
            },
            None => Verdict { status: false, reason: None, message: None },
        };
        ("AllContainersRestarting", verdict)
    });
    let pending = memory.pending.as_ref().map(|pending| {
        let message = Some(pending.refusal.message.clone());
        (resize::PENDING, Verdict { status: true, reason: Some(pending.refusal.reason), message })
    });
    let resizing = resize_verdict(situation).map(|verdict| ("PodResizeInProgress", verdict));
    let disruption = memory.ending.as_ref().and_then(|ending| ending.disruption.clone()).filter(|_| phase == "Failed");
    let disruption = disruption.map(|message| {
        ("DisruptionTarget", Verdict { status: true, reason: Some("TerminationByKubelet"), message: Some(message) })
    });
    pending.into_iter().chain(resizing).chain(disruption).chain(wanted).chain(restarting).map(build).collect()
}

/// Whether limits of running containers are still to change, and why they could not yet.
fn resize_verdict(situation: &Situation<'_>) -> Option<Verdict> {
    let Situation { pod, observed, memory, .. } = *situation;
    let running = |c: &Container| observed.newest(&c.name).filter(|record| record.state == State::Running);
    let differs = |c: &&Container| running(c).is_some_and(|record| resize_of(situation, c, record).is_some());
    let tried = |record: &observed::Container| memory.resized.contains_key(&record.id);
    let waiting = pod::spec(pod).containers.iter().chain(pod::sidecars(pod)).filter(differs).filter_map(running);
    let first = waiting.filter(|record| !tried(record)).collect::<Vec<_>>();
    let error = first.iter().find_map(|record| memory.resize_failures.get(&record.id));
    (!first.is_empty()).then(|| Verdict {
        status: true,
        reason: error.map(|_| "Error"),
        message: error.map(|failure| failure.message.clone()),
    })
}

/// What a pod's readiness gates say. Nobody on this node sets their conditions: they come with the pod from the API server.
fn gates_verdict<'a>(gates: impl Iterator<Item = &'a str>, known: &BTreeMap<&str, &PodCondition>) -> Verdict {
    let problem = |gate: &str| match known.get(gate) {
        Some(condition) if condition.status == "True" => None,
        Some(condition) => Some(format!("the status of pod readiness gate {gate:?} is not \"True\", but {}", condition.status)),
        None => Some(format!("corresponding condition of pod readiness gate {gate:?} does not exist.")),
    };
    let problems: Vec<String> = gates.filter_map(problem).collect();
    match problems.is_empty() {
        true => Verdict::yes(),
        false => Verdict { status: false, reason: Some("ReadinessGatesNotReady"), message: Some(problems.join(", ")) },
    }
}

#[derive(Clone)]
struct Verdict {
    status: bool,
    reason: Option<&'static str>,
    message: Option<String>,
}

impl Verdict {
    fn yes() -> Verdict {
        Verdict { status: true, reason: None, message: None }
    }

    fn yes_because(reason: &'static str) -> Verdict {
        Verdict { status: true, reason: Some(reason), message: None }
    }

    fn no<'a>(reason: &'static str, what: &str, names: impl Iterator<Item = &'a str>) -> Verdict {
        let message = format!("{what}: [{}]", names.collect::<Vec<_>>().join(" "));
        Verdict { status: false, reason: Some(reason), message: Some(message) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{ProbeResults, Reason};
    use crate::observed::State::{Created, Exited, Running, Unknown};
    use crate::scene::Scene;

    const INIT: &str = "{initContainers: [{name: x, image: i}, {name: z, image: i}], containers: [{name: c, image: i}]}";

    fn conditions(status: &PodStatus) -> String {
        let short =
            |c: &PodCondition| format!("{}{}", &c.status[..1], c.reason.as_deref().map(|r| format!(":{r}")).unwrap_or_default());
        status.conditions.iter().flatten().map(short).collect::<Vec<_>>().join(" ")
    }

    /// `waiting ContainerCreating`, `running`, `exit 1`.
    fn state(state: Option<&ContainerState>) -> String {
        match state {
            Some(ContainerState { waiting: Some(w), .. }) => format!("waiting {}", w.reason.as_deref().unwrap_or("-")),
            Some(ContainerState { running: Some(_), .. }) => "running".to_owned(),
            Some(ContainerState { terminated: Some(t), .. }) => format!("exit {}", t.exit_code),
            _ => "none".to_owned(),
        }
    }

    #[tokio::test]
    async fn phases_and_states_follow_the_records() {
        let always = || Scene::with_policy("Always");
        let on_failure = || Scene::with_policy("OnFailure");
        let never = || Scene::with_policy("Never");
        let cases: Vec<(&str, Scene, &str, &str, &str)> = vec![
            ("nothing there", always(), "Pending", "waiting ContainerCreating", "none"),
            ("sandbox only", always().sandbox(0, true), "Pending", "waiting ContainerCreating", "none"),
            ("created", always().sandbox(0, true).container("c", 0, Created, 0), "Pending", "waiting -", "none"),
            ("running", always().sandbox(0, true).container("c", 0, Running, 0), "Running", "running", "none"),
            ("crashed", always().sandbox(0, true).container("c", 0, Exited, 3), "Running", "exit 3", "none"),
            (
                "again",
                always().sandbox(0, true).container("c", 0, Exited, 3).container("c", 1, Running, 0),
                "Running",
                "running",
                "exit 3",
            ),
            ("done, OnFailure", on_failure().sandbox(0, true).container("c", 0, Exited, 0), "Succeeded", "exit 0", "none"),
            ("failed, OnFailure", on_failure().sandbox(0, true).container("c", 0, Exited, 1), "Running", "exit 1", "none"),
            ("done, Never", never().sandbox(0, true).container("c", 0, Exited, 0), "Succeeded", "exit 0", "none"),
            ("failed, Never", never().sandbox(0, true).container("c", 0, Exited, 1), "Failed", "exit 1", "none"),
            ("lost", always().sandbox(0, true).container("c", 0, Unknown, 0), "Pending", "waiting -", "none"),
            (
                "pull error",
                always().sandbox(0, true).remembering(|m, _| _ = m.reasons.insert("c".into(), Reason::new("ErrImagePull", "no"))),
                "Pending",
                "waiting ErrImagePull",
                "none",
            ),
            (
                "crash loop",
                always()
                    .sandbox(0, true)
                    .container("c", 0, Exited, 3)
                    .remembering(|m, _| _ = m.reasons.insert("c".into(), Reason::new("CrashLoopBackOff", "wait"))),
                "Running",
                "waiting CrashLoopBackOff",
                "exit 3",
            ),
        ];
        for (what, mut scene, phase, now, last) in cases {
            let status = scene.status();
            let container = &status.container_statuses.as_ref().unwrap()[0];
            let found = (status.phase.as_deref().unwrap(), state(container.state.as_ref()), state(container.last_state.as_ref()));
            assert_eq!(found, (phase, now.to_owned(), last.to_owned()), "{what}");
        }
    }

    #[tokio::test]
    async fn init_containers_hold_the_pod_pending() {
        let cases: Vec<(&str, Scene, &str, &str)> = vec![
            (
                "first",
                Scene::new(INIT).sandbox(0, true),
                "Pending",
                "T F:ContainersNotInitialized F:ContainersNotReady F:ContainersNotReady T",
            ),
            (
                "first done",
                Scene::new(INIT).sandbox(0, true).container("x", 0, Exited, 0),
                "Pending",
                "T F:ContainersNotInitialized F:ContainersNotReady F:ContainersNotReady T",
            ),
            (
                "failed",
                Scene::new(INIT).sandbox(0, true).container("x", 0, Exited, 1),
                "Pending",
                "T F:ContainersNotInitialized F:ContainersNotReady F:ContainersNotReady T",
            ),
            (
                "done",
                Scene::new(INIT).sandbox(0, true).container("x", 0, Exited, 0).container("z", 0, Exited, 0),
                "Pending",
                "T T F:ContainersNotReady F:ContainersNotReady T",
            ),
            ("records lost", Scene::new(INIT).sandbox(0, true).container("c", 0, Running, 0), "Running", "T T T T T"),
        ];
        for (what, mut scene, phase, expected) in cases {
            let status = scene.status();
            assert_eq!((status.phase.as_deref().unwrap(), conditions(&status).as_str()), (phase, expected), "{what}");
        }
        let mut lost = Scene::new(INIT).sandbox(0, true).container("c", 0, Running, 0);
        let status = lost.status();
        let first = &status.init_container_statuses.as_ref().unwrap()[0];
        assert_eq!((first.name.as_str(), first.ready), ("x", true));
        assert!(
            first
                .state
                .as_ref()
                .unwrap()
                .terminated
                .as_ref()
                .unwrap()
                .message
                .as_ref()
                .unwrap()
                .starts_with("Unable to get init container status")
        );
        let mut waiting = Scene::new(INIT).sandbox(0, true);
        assert_eq!(state(waiting.status().container_statuses.unwrap()[0].state.as_ref()), "waiting PodInitializing");
    }

    #[tokio::test]
    async fn ends_are_reported_in_the_conditions_and_addresses() {
        let mut done = Scene::with_policy("Never").sandbox(0, false).container("c", 0, Exited, 0);
        let status = done.status();
        assert_eq!(conditions(&status), "F T:PodCompleted F:PodCompleted F:PodCompleted T");
        assert_eq!((status.pod_ip, status.host_ip.as_deref()), (None, Some("192.0.2.1")));
        let mut failed = Scene::with_policy("Never").sandbox(0, false).container("c", 0, Exited, 1);
        assert_eq!(conditions(&failed.status()), "F T F:PodFailed F:PodFailed T");
        let mut down = Scene::with_policy("Always").sandbox(7, true);
        assert_eq!(down.status().pod_ip.as_deref(), Some("10.0.0.7"));
        down.observed.sandboxes[0].ready = false;
        down.observed.sandboxes[0].ips.clear();
        assert_eq!(down.status().pod_ip.as_deref(), Some("10.0.0.7"), "the last address is kept");
    }

    #[tokio::test]
    async fn transition_times_move_only_with_the_status() {
        let mut scene = Scene::with_policy("Always").sandbox(0, true).container("c", 0, Running, 0);
        let first = scene.status();
        scene.memory.status = Some(first.clone());
        scene.now.wall = k8s_openapi::jiff::Timestamp::from_second(9000).unwrap();
        let mut second = scene.status();
        assert_eq!(second, first);
        scene.memory.probes.insert("c0".into(), ProbeResults { started: true, ready: false });
        second = scene.status();
        let moved: Vec<_> = second
            .conditions
            .iter()
            .flatten()
            .filter(|c| c.last_transition_time.as_ref().unwrap().0.as_second() == 9000)
            .map(|c| c.type_.as_str())
            .collect();
        assert_eq!(moved, ["Ready", "ContainersReady"]);
        assert_eq!(second.conditions.unwrap()[2].message.as_deref(), Some("containers with unready status: [c]"));
    }

    #[tokio::test]
    async fn a_container_is_not_ready_before_its_post_start_hook_is_over() {
        for (attempt, ready) in [(1, false), (0, true)] {
            let hooked = |m: &mut PodMemory, _| _ = m.hooked.insert("c".into(), attempt);
            let mut scene = Scene::with_policy("Always").sandbox(0, true).container("c", 1, Running, 0).remembering(hooked);
            let status = scene.status();
            let container = &status.container_statuses.as_ref().unwrap()[0];
            assert_eq!((container.started, container.ready), (Some(ready), ready), "the hook of attempt {attempt}");
            assert_eq!(conditions(&status).starts_with("T T T"), ready);
        }
    }

    #[tokio::test]
    async fn a_readiness_gate_of_the_api_server_makes_a_pod_ready() {
        let spec = "{readinessGates: [{conditionType: example.org/up}], containers: [{name: c, image: i}]}";
        let mut scene = Scene::new(spec).sandbox(0, true).container("c", 0, Running, 0);
        let gate = PodCondition { type_: "example.org/up".into(), status: "True".into(), ..PodCondition::default() };
        scene.pod.status = Some(PodStatus { conditions: Some(vec![gate]), ..PodStatus::default() });
        assert_eq!(conditions(&scene.status()), "T T T T T");
    }

    #[tokio::test]
    async fn a_deleted_pod_ends_by_its_containers_codes_whatever_its_policy_says() {
        let cases = [(Running, 0, "Running"), (Exited, 0, "Succeeded"), (Exited, 137, "Failed")];
        for (container, code, wanted) in cases {
            let deleted = |m: &mut PodMemory, _| {
                m.deleted = true;
                m.terminate(crate::memory::Termination { grace: 1, forget: false });
            };
            let mut scene = Scene::with_policy("Always").sandbox(0, container == Running).container("c", 0, container, code);
            scene = scene.remembering(deleted);
            let status = scene.status();
            assert_eq!(status.phase.as_deref(), Some(wanted));
        }
        let spec = "{containers: [{name: c, image: i}, {name: d, image: i}]}";
        let mut scene = Scene::new(spec).sandbox(0, false).container("c", 0, Exited, 0).remembering(|m, _| m.deleted = true);
        let status = scene.status();
        assert_eq!(status.phase.as_deref(), Some("Failed"));
        let lost = &status.container_statuses.as_ref().unwrap()[1];
        assert_eq!(lost.state.as_ref().unwrap().terminated.as_ref().unwrap().reason.as_deref(), Some("ContainerStatusUnknown"));
    }

    #[tokio::test]
    async fn of_a_pod_that_was_not_let_in_no_container_is_invented() {
        let refused = PodStatus { phase: Some("Failed".into()), reason: Some("NodeAffinity".into()), ..PodStatus::default() };
        let mut scene = Scene::with_policy("Always").remembering(|m, _| m.status = Some(refused));
        let status = scene.status();
        assert_eq!((status.reason.as_deref(), status.container_statuses), (Some("NodeAffinity"), None));
    }

    #[tokio::test]
    async fn readiness_gates_keep_a_pod_from_being_ready() {
        let spec = "{readinessGates: [{conditionType: example.org/up}], containers: [{name: c, image: i}]}";
        let mut scene = Scene::new(spec).sandbox(0, true).container("c", 0, Running, 0);
        let status = scene.status();
        assert_eq!(conditions(&status), "T T F:ReadinessGatesNotReady T T");
        let message = "corresponding condition of pod readiness gate \"example.org/up\" does not exist.";
        assert_eq!(status.conditions.unwrap()[2].message.as_deref(), Some(message));
    }

    #[tokio::test]
    async fn a_pod_that_begins_again_says_so() {
        let spec = "{containers: [{name: d, image: i}, {name: c, image: i, restartPolicy: Never, restartPolicyRules: \
            [{action: RestartAllContainers, exitCodes: {operator: In, values: [42]}}]}]}";
        let calm = Scene::new(spec).sandbox(0, true).container("d", 0, Running, 0).container("c", 0, Running, 0).status();
        assert_eq!(conditions(&calm), "T T T T T F");
        let status = Scene::new(spec).sandbox(0, true).container("d", 0, Running, 0).container("c", 0, Exited, 42).status();
        assert!(conditions(&status).ends_with("T:RestartAllContainersStarted"), "{}", conditions(&status));
        let states: Vec<_> = status.container_statuses.iter().flatten().collect();
        let shown = |i: usize| (state(states[i].state.as_ref()), state(states[i].last_state.as_ref()));
        let waiting = || "waiting RestartingAllContainers".to_owned();
        assert_eq!((shown(0), shown(1)), ((waiting(), "exit 42".to_owned()), (waiting(), "exit 137".to_owned())));
    }

    #[tokio::test]
    async fn a_terminal_phase_never_changes() {
        let mut scene = Scene::with_policy("Never").sandbox(0, true).container("c", 0, Exited, 0);
        scene.memory.status = Some(scene.status());
        scene.observed = PodObserved::default();
        assert_eq!(scene.status().phase.as_deref(), Some("Succeeded"));
        assert!(is_terminal(&scene.pod, &scene.observed, &scene.memory));
    }

    #[tokio::test]
    async fn the_end_of_a_lost_record_is_remembered() {
        let mut scene = Scene::with_policy("Always").sandbox(0, true).container("c", 2, Exited, 5);
        scene.memory.status = Some(scene.status());
        scene.observed.containers.clear();
        let status = scene.status();
        let container = &status.container_statuses.unwrap()[0];
        assert_eq!((container.restart_count, state(container.last_state.as_ref()).as_str()), (2, "exit 5"));
    }

    #[tokio::test]
    async fn messages_are_cut_to_the_pods_share() {
        let mut scene = Scene::with_policy("Never").sandbox(0, true).container("c", 0, Exited, 1);
        scene.observed.containers[0].message = "x".repeat(10_000);
        let status = scene.status();
        let message = status.container_statuses.unwrap()[0].state.clone().unwrap().terminated.unwrap().message.unwrap();
        assert_eq!(message.len(), 4096);
    }
}
