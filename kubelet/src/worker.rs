//! One task per pod UID: looks, plans, acts, one pass at a time. The latest spec wins; slow calls run as tasks of their
//! own and come back as actions, so that the worker always listens.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::clock::Now;
use crate::execute::{Executor, OpResult, PassResults, run_pass};
use crate::memory::{PodMemory, ProbeResults, PullFailure, Reason, Termination, Unhealthy};
use crate::observed::{self, Limits, PodObserved, State};
use crate::plan::{self, Plan, PodOp, Situation};
use crate::pod::{self, PodUid};
use crate::probe::{Kind, Probers, Subject};
use crate::resources::container_resources;
use crate::status;
use crate::table::PodTable;

/// How long a stopping kubelet waits for the step that is being carried out.
const STOP_PATIENCE: Duration = Duration::from_secs(2);

/// What a worker is told.
#[derive(Clone, Debug)]
pub enum Message {
    /// The pod's spec as it is now.
    Update(Arc<Pod>),
    /// The pod is to end.
    Terminate(Termination),
    /// Something changed in the runtime.
    Look,
    /// What a container's probe has found, beyond its threshold.
    Probed {
        /// Container's ID.
        id: String,
        /// Which probe.
        kind: Kind,
        /// Its verdict.
        well: bool,
        /// Grace of the probe, where it has one of its own.
        grace: Option<i64>,
    },
}

/// What happens to a worker.
enum Action {
    Told(Message),
    Looked(u64, crate::Result<PodObserved>),
    Acted(PassResults),
    Woken,
    Abandoned,
}

/// A running look at the runtime; `pass` is the number of passes that had ended when it began.
struct Look {
    pass: u64,
    task: JoinHandle<crate::Result<PodObserved>>,
}

struct Pass {
    task: JoinHandle<PassResults>,
    cancel: CancellationToken,
}

/// A pod's worker.
pub struct Worker {
    uid: PodUid,
    pod: Arc<Pod>,
    executor: Executor,
    table: PodTable,
    inbox: mpsc::UnboundedReceiver<Message>,
    shutdown: CancellationToken,
    observed: Arc<PodObserved>,
    memory: PodMemory,
    look: Option<Look>,
    pass: Option<Pass>,
    passes: u64,
    dirty: bool,
    wake: Option<Instant>,
    /// After a failure of the pod as a whole nothing is tried before this.
    hold: Option<Instant>,
    last_ops: Vec<PodOp>,
    probers: Probers,
    own_inbox: mpsc::WeakUnboundedSender<Message>,
    finished: bool,
}

impl Worker {
    /// A worker that has not looked yet.
    pub fn new(
        uid: PodUid,
        pod: Arc<Pod>,
        executor: Executor,
        table: PodTable,
        inbox: mpsc::UnboundedReceiver<Message>,
        own_inbox: mpsc::WeakUnboundedSender<Message>,
        shutdown: CancellationToken,
    ) -> Worker {
        let now = Now { mono: Instant::now(), wall: executor.config.clock.now() };
        let logs = crate::logs::pod_log_dir(&executor.config.pod_logs_dir, &pod);
        let memory = PodMemory::new(&executor.config, now, crate::logs::highest_attempts(&logs));
        Worker {
            uid,
            pod,
            executor,
            table,
            inbox,
            shutdown,
            observed: Arc::default(),
            memory,
            look: None,
            pass: None,
            passes: 0,
            dirty: true,
            wake: None,
            hold: None,
            last_ops: Vec::new(),
            probers: Probers::default(),
            own_inbox,
            finished: false,
        }
    }

    /// Runs until the pod is gone or the kubelet stops; whether the pod is gone.
    pub async fn run(mut self) -> bool {
        while !self.finished {
            if self.dirty && self.look.is_none() {
                self.begin_look();
            }
            let action = self.next_action().await;
            if let Action::Abandoned = action {
                break;
            }
            self.apply(action);
        }
        if self.finished {
            self.table.remove(&self.uid);
        }
        if let Some(pass) = self.pass.take() {
            // The kubelet stops: what is quick is finished, what is slow is left to the next one.
            pass.cancel.cancel();
            let _ = tokio::time::timeout(STOP_PATIENCE, pass.task).await;
        }
        self.finished
    }

    async fn next_action(&mut self) -> Action {
        let look = async {
            match &mut self.look {
                Some(look) => (look.pass, (&mut look.task).await),
                None => pending().await,
            }
        };
        let pass = async {
            match &mut self.pass {
                Some(pass) => (&mut pass.task).await,
                None => pending().await,
            }
        };
        let wake = async {
            match self.wake {
                Some(at) => tokio::time::sleep_until(at).await,
                None => pending().await,
            }
        };
        tokio::select! {
            biased;
            () = self.shutdown.cancelled() => Action::Abandoned,
            message = self.inbox.recv() => message.map_or(Action::Abandoned, Action::Told),
            (number, looked) = look => match looked {
                Ok(observed) => Action::Looked(number, observed),
                Err(_) => Action::Abandoned,
            },
            acted = pass => acted.map_or(Action::Abandoned, Action::Acted),
            () = wake => Action::Woken,
        }
    }

    fn now(&self) -> Now {
        Now { mono: Instant::now(), wall: self.executor.config.clock.now() }
    }

    fn begin_look(&mut self) {
        self.dirty = false;
        let (runtime, uid, before) = (self.executor.runtime.clone(), self.uid.clone(), self.observed.clone());
        let logs = self.executor.config.pod_logs_dir.clone();
        let task = tokio::spawn(async move { observed::observe(&runtime, uid.as_str(), &logs, &before).await });
        self.look = Some(Look { pass: self.passes, task });
    }

    /// Changes the worker's state; never waits.
    fn apply(&mut self, action: Action) {
        match action {
            Action::Told(message) => self.told(message),
            Action::Looked(number, looked) => {
                self.look = None;
                match looked {
                    Ok(observed) => self.looked(number, observed),
                    Err(error) => {
                        tracing::warn!(pod = %pod::format_pod(&self.pod), %error, "the runtime does not answer");
                        self.wake_at(Instant::now() + self.executor.config.timing.network_retry);
                    }
                }
            }
            Action::Acted(results) => self.acted(results),
            Action::Woken => {
                self.wake = None;
                self.dirty = true;
            }
            Action::Abandoned => {}
        }
    }

    fn told(&mut self, message: Message) {
        match message {
            Message::Look => {}
            Message::Update(pod) => {
                self.pod = pod;
                self.hold = None;
                self.last_ops.clear();
                // Limits of the pod's cgroup may have changed.
                self.memory.prepared = false;
            }
            Message::Terminate(termination) => {
                let before = self.memory.terminating;
                self.memory.terminate(termination);
                if self.memory.terminating != before {
                    self.hold = None;
                    self.last_ops.clear();
                    self.memory.released = false;
                    if let Some(pass) = &self.pass {
                        pass.cancel.cancel();
                    }
                }
            }
            Message::Probed { id, kind, well, grace } => self.probed(id, kind, well, grace),
        }
        self.dirty = true;
    }

    fn probed(&mut self, id: String, kind: Kind, well: bool, grace: Option<i64>) {
        if let Some(results) = self.memory.probes.get_mut(&id) {
            match kind {
                Kind::Startup => results.started |= well,
                Kind::Readiness => results.ready = well,
                Kind::Liveness => {}
            }
        }
        if !well && kind != Kind::Readiness {
            self.memory.unhealthy.insert(id, Unhealthy { probe: kind.as_str(), grace });
        }
    }

    /// Starts the probers of containers that run, ends those of others.
    fn keep_probers(&mut self, now: Now) {
        let observed = self.observed.clone();
        let running = |id: &str| observed.containers.iter().any(|c| c.id == id && c.state == State::Running);
        let ending = self.memory.terminating.is_some();
        self.probers.retain(|id, kind| running(id) && (!ending || kind == Kind::Readiness));
        let addresses = match pod::is_host_network(&self.pod) {
            true => &self.executor.node.host_ips,
            false => &self.memory.ips,
        };
        let ip = addresses.first().and_then(|ip| ip.parse().ok());
        for container in &pod::spec(&self.pod).containers {
            let Some(record) = observed.newest(&container.name).filter(|c| c.state == State::Running) else { continue };
            let age = now.wall.as_nanosecond() - i128::from(record.started_at);
            let age = u64::try_from(age).map(Duration::from_nanos).unwrap_or_default();
            let subject = Subject { pod: &self.pod, container, id: &record.id, age, ip };
            let results = self.memory.probes.entry(record.id.clone()).or_insert(ProbeResults {
                started: container.startup_probe.is_none(),
                ready: container.readiness_probe.is_none(),
            });
            let kinds: &[Kind] = match (results.started, ending) {
                (_, true) => &[],
                (false, _) => &[Kind::Startup],
                (true, _) => &[Kind::Liveness, Kind::Readiness],
            };
            for kind in kinds {
                self.probers.ensure(&subject, *kind, &self.executor.runtime, &self.own_inbox);
            }
        }
    }

    fn wake_at(&mut self, at: Instant) {
        self.wake = Some(self.wake.map_or(at, |now| now.min(at)));
    }

    /// A fresh view: new status, and a new pass unless one is running or began after the look.
    fn looked(&mut self, number: u64, observed: PodObserved) {
        let now = self.now();
        self.memory.note(&observed, now);
        self.observed = Arc::new(observed);
        self.keep_probers(now);
        let plan = self.make_plan(now);
        self.publish(now, &plan);
        if self.pass.is_some() {
            return;
        }
        if number != self.passes {
            self.dirty = true;
            return;
        }
        if let Some(hold) = self.hold.filter(|hold| *hold > now.mono) {
            self.wake_at(hold);
            return;
        }
        self.wake = plan.wake;
        if plan.finished {
            self.finished = true;
            return;
        }
        if plan.ops.is_empty() {
            self.last_ops.clear();
            return;
        }
        if plan.ops == self.last_ops {
            // The same steps again, though they succeeded: never in a tight loop.
            self.last_ops.clear();
            let hold = now.mono + self.executor.config.timing.retry;
            self.hold = Some(hold);
            self.wake_at(hold);
            return;
        }
        self.begin_pass(plan.ops);
    }

    fn make_plan(&mut self, now: Now) -> Plan {
        let situation =
            Situation { pod: &self.pod, observed: &self.observed, memory: &self.memory, node: &self.executor.node, now };
        let over = self.memory.terminating.is_none()
            && plan::is_over_deadline(&situation)
            && !status::is_terminal(&self.pod, &self.observed, &self.memory);
        self.memory.deadline_exceeded |= over;
        let plan = plan::plan(&Situation {
            pod: &self.pod,
            observed: &self.observed,
            memory: &self.memory,
            node: &self.executor.node,
            now,
        });
        for (name, reason) in &plan.waiting {
            self.memory.reasons.insert(name.clone(), reason.clone());
        }
        plan
    }

    fn publish(&mut self, now: Now, plan: &Plan) {
        let situation =
            Situation { pod: &self.pod, observed: &self.observed, memory: &self.memory, node: &self.executor.node, now };
        let status = status::status(&situation);
        let phase = status.phase.clone();
        if self.memory.status.as_ref().and_then(|s| s.phase.clone()) != phase {
            let phase = phase.as_deref().unwrap_or_default();
            tracing::info!(pod = %pod::format_pod(&self.pod), steps = plan.ops.len(), "pod is {phase}");
        }
        self.memory.status = Some(status.clone());
        self.table.set(&self.uid, &self.pod, status);
    }

    fn begin_pass(&mut self, ops: Vec<PodOp>) {
        tracing::debug!(pod = %pod::format_pod(&self.pod), ?ops, "pass");
        for op in &ops {
            if let PodOp::StartContainer { name, after: Some(after), .. } = op {
                let now = Instant::now();
                let ended = self.memory.exits.get(after).copied().unwrap_or(now);
                self.memory.crash.advance(name, ended, now);
            }
        }
        self.last_ops.clone_from(&ops);
        let cancel = CancellationToken::new();
        let pass = run_pass(self.executor.clone(), self.pod.clone(), self.observed.clone(), ops, cancel.clone());
        self.pass = Some(Pass { task: tokio::spawn(pass), cancel });
    }

    /// A pass has ended: takes note of what failed and looks again.
    fn acted(&mut self, results: PassResults) {
        self.pass = None;
        self.passes += 1;
        self.dirty = true;
        let timing = self.executor.config.timing;
        let now = Instant::now();
        for (op, result) in results {
            if result != OpResult::Done && result != OpResult::Cancelled {
                // What failed is tried again, however alike the plan is.
                self.last_ops.clear();
            }
            match result {
                OpResult::Done => self.succeeded(op),
                OpResult::Cancelled => self.last_ops.clear(),
                OpResult::StartFailed(reason) => self.start_failed(op, reason, now),
                OpResult::PullFailed { image, reason, pulled } => self.pull_failed(op, image, reason, pulled, now),
                OpResult::PodFailed(reason) => {
                    let again = matches!(op, PodOp::RemoveContainer { .. } | PodOp::RemoveSandbox { .. });
                    tracing::warn!(pod = %pod::format_pod(&self.pod), reason = reason.reason, gc = again, "{}", reason.message);
                    self.memory.pod_error = Some(reason);
                    self.hold = Some(now + timing.retry);
                }
                OpResult::NetworkNotReady(text) => {
                    if self.memory.pod_error.as_ref().is_none_or(|e| e.message != text) {
                        tracing::warn!(pod = %pod::format_pod(&self.pod), reason = "NetworkNotReady", "{text}");
                    }
                    self.memory.pod_error = Some(Reason::new("NetworkNotReady", text));
                    self.hold = Some(now + timing.network_retry);
                }
            }
        }
    }

    fn succeeded(&mut self, op: PodOp) {
        match op {
            PodOp::Prepare => {
                self.memory.prepared = true;
                self.memory.released = false;
            }
            PodOp::Release { .. } => {
                self.memory.released = true;
                self.memory.prepared = false;
            }
            PodOp::CreateSandbox { .. } => self.memory.pod_error = None,
            PodOp::StartContainer { name, .. } => {
                self.memory.reasons.remove(&name);
                self.memory.holds.remove(&name);
                if let Some(image) = self.container(&name).and_then(|c| c.image.clone()) {
                    self.memory.pull_failures.remove(&image);
                    self.memory.pulls.forget(&image);
                }
            }
            PodOp::Resize { id, name } => self.note_resize(id, &name),
            _ => {}
        }
    }

    fn container(&self, name: &str) -> Option<&k8s_openapi::api::core::v1::Container> {
        let all = pod::init_containers(&self.pod).iter().chain(&pod::spec(&self.pod).containers);
        all.into_iter().find(|c| c.name == name)
    }

    fn note_resize(&mut self, id: String, name: &str) {
        let capacity = &self.executor.node.capacity;
        let limits = self.container(name).map(|c| Limits::from(&container_resources(&self.pod, c, capacity)));
        if let Some(limits) = limits {
            self.memory.resized.insert(id, limits);
        }
    }

    fn start_failed(&mut self, op: PodOp, reason: Reason, now: Instant) {
        let name = match op {
            PodOp::StartContainer { name, .. } => name,
            PodOp::Resize { id, name } => {
                self.note_resize(id, &name);
                name
            }
            _ => return,
        };
        tracing::warn!(pod = %pod::format_pod(&self.pod), container = name, reason = reason.reason, "{}", reason.message);
        // A container that ran, or tried to, leaves a record and backs off by it.
        if reason.reason != "RunContainerError" && reason.reason != "ResizeError" {
            self.memory.holds.insert(name.clone(), now + self.executor.config.timing.retry);
        }
        if reason.reason != "ResizeError" {
            self.memory.reasons.insert(name, reason);
        }
    }

    fn pull_failed(&mut self, op: PodOp, image: String, reason: Reason, pulled: bool, now: Instant) {
        let PodOp::StartContainer { name, .. } = op else { return };
        if !pulled {
            if let Some(failure) = self.memory.pull_failures.get_mut(&image) {
                failure.checked_at = now;
            }
            return;
        }
        tracing::warn!(pod = %pod::format_pod(&self.pod), container = name, reason = reason.reason, "Failed to pull image {image:?}: {}", reason.message);
        self.memory.pulls.advance(&image, now, now);
        self.memory.pull_failures.insert(image, PullFailure { failed_at: now, checked_at: now, reason: reason.clone() });
        self.memory.reasons.insert(name, reason);
    }
}
