//! What a worker remembers of its pod between passes: delays, last errors, what was seen when. Lost with the process
//! except for what records and log files tell again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use k8s_openapi::jiff::Timestamp;
use tokio::time::Instant;

use crate::ages::{self, Ages};
use crate::backoff::Backoff;
use crate::clock::{Now, Uptime};
use crate::config::Config;
use crate::control::Ending;
use crate::observed::{self, PodObserved, State};
use crate::resize::Refusal;
use crate::saved_status::Saved;

/// Why a container waits, as the status shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason {
    /// `CrashLoopBackOff`, `ErrImagePull`…
    pub reason: String,
    /// The text for users.
    pub message: String,
}

impl Reason {
    /// A reason with its message.
    pub fn new(reason: &str, message: impl Into<String>) -> Reason {
        Reason { reason: reason.to_owned(), message: message.into() }
    }
}

/// A pull that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PullFailure {
    /// When it failed.
    pub failed_at: Instant,
    /// When the image was last found absent.
    pub checked_at: Instant,
    /// How it failed.
    pub reason: Reason,
}

/// Other resources that a pod is to have when the node has room for them.
#[derive(Clone, Debug, PartialEq)]
pub struct Pending {
    /// The pod with them.
    pub wanted: Arc<Pod>,
    /// Why it does not have them yet.
    pub refusal: Refusal,
}

/// A change of limits that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResizeFailure {
    /// Not tried again before.
    pub until: Instant,
    /// How it failed.
    pub message: String,
}

/// A pod that runs could not be brought up to date: folders, cgroup or volumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outdated {
    /// Not tried again before.
    pub until: Instant,
    /// Its volumes are all there, if not as they should be: containers may start.
    pub usable: bool,
}

/// The pod is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Termination {
    /// Seconds between SIGTERM and SIGKILL.
    pub grace: i64,
    /// Nothing of the pod is to be kept: its source does not have it any more.
    pub forget: bool,
}

/// The status' reason of a pod that was active for longer than it may.
pub const DEADLINE_EXCEEDED: &str = "DeadlineExceeded";

/// The memory of one worker.
#[derive(Clone, Debug)]
pub struct PodMemory {
    /// First sight of the pod, for users.
    pub start_time: Timestamp,
    /// The start time is an earlier kubelet's, or the oldest record's.
    start_known: bool,
    /// The same by the monotonic clock: the active deadline counts from it.
    pub active_since: Instant,
    /// Set once the pod is to end; can only become shorter.
    pub terminating: Option<Termination>,
    /// When its source let go of it.
    pub terminating_since: Option<Timestamp>,
    /// Why the node ends a pod that its source still wants.
    pub ending: Option<Ending>,
    /// Somebody has asked the API server for the pod's deletion: its last status is told there before its records go.
    pub deleted: bool,
    /// Delays of containers, by name.
    pub crash: Backoff,
    /// Delays of pulls, by image.
    pub pulls: Backoff,
    /// Failed pulls, by image.
    pub pull_failures: BTreeMap<String, PullFailure>,
    /// Containers that are not tried again before a time, by name.
    pub holds: BTreeMap<String, Instant>,
    /// When each exit was first seen, by container ID.
    pub exits: BTreeMap<String, Instant>,
    /// Since when containers run, by ID: the wall clock may have jumped since their start.
    pub running: BTreeMap<String, Instant>,
    /// Last errors, by container name.
    pub reasons: BTreeMap<String, Reason>,
    /// Highest attempt known, by container name.
    pub attempts: BTreeMap<String, u32>,
    /// Results of readiness and startup probes, by container ID.
    pub probes: BTreeMap<String, ProbeResults>,
    /// Containers that ran already when this process first looked, by ID.
    pub adopted: BTreeSet<String>,
    /// Containers that a probe has condemned, by ID.
    pub unhealthy: BTreeMap<String, Unhealthy>,
    /// The probe that had a run stopped, by the container's ID, for as long as there is a record of it.
    pub condemned: BTreeMap<String, &'static str>,
    /// Containers whose limits were changed in place, with the limits, by ID.
    pub resized: BTreeMap<String, crate::observed::Limits>,
    /// Containers whose limits could not be changed, by ID.
    pub resize_failures: BTreeMap<String, ResizeFailure>,
    /// Resources that the pod does not get yet.
    pub pending: Option<Pending>,
    /// On which processors containers are to run, by name; nothing where these are not managed.
    pub cpus: BTreeMap<String, String>,
    /// To which processors running containers have been moved, by ID.
    pub pinned: BTreeMap<String, String>,
    /// Until when containers that could not be moved are left alone, by ID.
    pub pin_failures: BTreeMap<String, Instant>,
    /// Folders, cgroup and volumes are there.
    pub prepared: bool,
    /// Why a pod that runs is not prepared.
    pub outdated: Option<Outdated>,
    /// The runtime's records of the pod are not to be kept once it has ended: the disk is full, or it was evicted.
    pub unwanted: bool,
    /// What is kept of the pod's status says that it is not to run again, whatever becomes of its records.
    pub cleared: bool,
    /// That is on disk: the records may go.
    pub end_kept: bool,
    /// Folders, cgroup and volumes are gone again.
    pub released: bool,
    /// Status of the last pass.
    pub status: Option<PodStatus>,
    /// Error of the last pass that belongs to the pod as a whole.
    pub pod_error: Option<Reason>,
    /// The last known addresses.
    pub ips: Vec<String>,
    /// The pod was over its active deadline.
    pub deadline_exceeded: bool,
    /// Containers whose start may be in its postStart hook, with their attempts: until it is over they have not come up.
    pub hooked: BTreeMap<String, u32>,
    /// The same of an earlier kubelet that was killed meanwhile: their hooks have to run again.
    pub unfinished_hooks: BTreeMap<String, u32>,
}

/// What probes say of a running container.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProbeResults {
    /// The startup probe has succeeded.
    pub started: bool,
    /// The readiness probe's verdict.
    pub ready: bool,
}

/// A container that is to be killed because of a probe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unhealthy {
    /// `liveness` or `startup`.
    pub probe: &'static str,
    /// Grace of the probe, where it has one of its own.
    pub grace: Option<i64>,
}

impl PodMemory {
    /// Of a pod that is seen for the first time by this process.
    pub fn new(config: &Config, now: Now, attempts: BTreeMap<String, u32>) -> PodMemory {
        PodMemory {
            start_time: now.wall,
            start_known: false,
            active_since: now.mono,
            terminating: None,
            terminating_since: None,
            ending: None,
            deleted: false,
            crash: Backoff::new(config.crash_backoff),
            pulls: Backoff::new(config.pull_backoff),
            pull_failures: BTreeMap::new(),
            holds: BTreeMap::new(),
            exits: BTreeMap::new(),
            running: BTreeMap::new(),
            reasons: BTreeMap::new(),
            attempts,
            probes: BTreeMap::new(),
            adopted: BTreeSet::new(),
            unhealthy: BTreeMap::new(),
            condemned: BTreeMap::new(),
            resized: BTreeMap::new(),
            resize_failures: BTreeMap::new(),
            pending: None,
            cpus: BTreeMap::new(),
            pinned: BTreeMap::new(),
            pin_failures: BTreeMap::new(),
            prepared: false,
            outdated: None,
            unwanted: false,
            cleared: false,
            end_kept: false,
            released: false,
            status: None,
            pod_error: None,
            ips: Vec::new(),
            deadline_exceeded: false,
            hooked: BTreeMap::new(),
            unfinished_hooks: BTreeMap::new(),
        }
    }

    /// Goes on from what an earlier kubelet last said of the pod: since when, what was ready, how containers ended. Whether the pod is
    /// over is found out anew by its records, as the upstream does, unless the kubelet has removed them itself: what ended it may have been that kubelet's shutdown. A deadline
    /// that has passed has passed.
    /// `over_is_over`: what has ended never runs again; the API server has been told, or will be.
    pub fn resume(&mut self, saved: Saved, now: Instant, over_is_over: bool) {
        let Saved { mut status, ages: kept, cleared } = saved;
        (self.unwanted, self.cleared, self.end_kept) = (cleared, cleared, cleared);
        if let Some(start) = &status.start_time {
            (self.start_time, self.start_known) = (start.0, true);
        }
        let instants = |ages: BTreeMap<String, u64>| ages.into_iter().map(|(id, age)| (id, ages::before(now, age))).collect();
        self.active_since = ages::before(now, kept.active);
        self.running = instants(kept.running);
        self.exits = instants(kept.exits);
        self.crash.resume(kept.delays, now);
        self.deadline_exceeded = status.reason.as_deref() == Some(DEADLINE_EXCEEDED);
        if !cleared && !over_is_over && matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
            (status.phase, status.reason, status.message) = (None, None, None);
        }
        self.status = Some(status);
    }

    /// Goes on from what the API server says of the pod, where nothing else is known of it: another kubelet ran it here, or this one has
    /// lost its disk.
    pub fn resume_from_api(&mut self, status: PodStatus, now: Now) {
        if let Some(start) = &status.start_time {
            (self.start_time, self.start_known) = (start.0, true);
            let age = now.wall.duration_since(start.0).as_millis();
            self.active_since = ages::before(now.mono, u64::try_from(age).unwrap_or(0));
        }
        let lists = [&status.init_container_statuses, &status.container_statuses];
        for container in lists.into_iter().flatten().flatten().filter(|container| container.container_id.is_some()) {
            let count = u32::try_from(container.restart_count).unwrap_or(0);
            let highest = self.attempts.entry(container.name.clone()).or_insert(count);
            *highest = (*highest).max(count);
        }
        self.deadline_exceeded = status.reason.as_deref() == Some(DEADLINE_EXCEEDED);
        self.status = Some(status);
    }

    /// What the next kubelet counts on from.
    pub fn ages(&self, at: Uptime, now: Instant) -> Ages {
        let ages = |times: &BTreeMap<String, Instant>| times.iter().map(|(id, at)| (id.clone(), ages::age(*at, now))).collect();
        Ages {
            at,
            active: ages::age(self.active_since, now),
            running: ages(&self.running),
            exits: ages(&self.exits),
            delays: self.crash.kept(now),
        }
    }

    /// Whether a container's postStart hook is not over.
    pub fn is_hooked(&self, record: &observed::Container) -> bool {
        [&self.hooked, &self.unfinished_hooks].iter().any(|hooks| hooks.get(&record.name) == Some(&record.attempt))
    }

    /// Takes note of what the runtime has.
    pub fn note(&mut self, observed: &PodObserved, now: Now) {
        for container in &observed.containers {
            let highest = self.attempts.entry(container.name.clone()).or_insert(container.attempt);
            *highest = (*highest).max(container.attempt);
            if container.state == State::Exited {
                self.exits.entry(container.id.clone()).or_insert(now.mono);
            }
            if container.state == State::Running {
                // Of one that ran before this process, and is on no record of its own, the runtime's word is all there is.
                let told = now.wall.as_nanosecond() - i128::from(container.started_at);
                let age = if self.adopted.contains(&container.id) { u64::try_from(told / 1_000_000).unwrap_or(0) } else { 0 };
                self.running.entry(container.id.clone()).or_insert_with(|| ages::before(now.mono, age));
            }
        }
        let known = |id: &String| observed.containers.iter().any(|c| c.id == *id);
        let runs = |id: &String| observed.containers.iter().any(|c| c.id == *id && c.state == State::Running);
        self.exits.retain(|id, _| known(id));
        self.unfinished_hooks
            .retain(|name, attempt| observed.newest(name).is_some_and(|c| c.attempt == *attempt && c.state == State::Running));
        self.running.retain(|id, _| runs(id));
        self.probes.retain(|id, _| runs(id));
        self.adopted.retain(&runs);
        self.unhealthy.retain(|id, _| runs(id));
        self.condemned.retain(|id, _| known(id));
        self.resized.retain(|id, _| runs(id));
        self.resize_failures.retain(|id, _| runs(id));
        self.pinned.retain(|id, _| runs(id));
        self.pin_failures.retain(|id, _| runs(id));
        if !std::mem::replace(&mut self.start_known, true) {
            // A pod that ran before this process started is as old as its oldest record.
            let records = observed.containers.iter().map(|c| c.created_at).chain(observed.sandboxes.iter().map(|s| s.created_at));
            let oldest = records.min().filter(|first| *first > 0).map(observed::timestamp);
            self.start_time = oldest.map_or(self.start_time, |oldest| self.start_time.min(oldest));
        }
        if let Some(sandbox) = observed.sandbox().filter(|s| s.ready && !s.ips.is_empty()) {
            self.ips.clone_from(&sandbox.ips);
        }
    }

    /// When the pod was deleted, and its grace. One that only the node ends is not: it stays, with the reason in its status.
    pub fn deletion(&self) -> Option<(Timestamp, i64)> {
        let grace = self.terminating.filter(|termination| termination.forget)?.grace;
        Some((self.terminating_since?, grace))
    }

    /// Asks for the end of the pod; a shorter grace wins.
    pub fn terminate(&mut self, wanted: Termination) {
        let wanted = Termination { grace: wanted.grace.max(1), ..wanted };
        self.terminating = Some(match self.terminating {
            Some(now) => Termination { grace: now.grace.min(wanted.grace), forget: now.forget || wanted.forget },
            None => wanted,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scene::Scene;

    #[tokio::test]
    async fn a_pod_that_only_the_node_ends_is_not_deleted() {
        let mut memory = Scene::with_policy("Always").memory;
        memory.terminating_since = Some(Timestamp::UNIX_EPOCH);
        memory.terminate(Termination { grace: 9, forget: false });
        assert_eq!(memory.deletion(), None);
        memory.terminate(Termination { grace: 5, forget: true });
        assert_eq!(memory.deletion(), Some((Timestamp::UNIX_EPOCH, 5)));
    }
}
