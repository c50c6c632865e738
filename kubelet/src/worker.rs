//! One task per pod UID: looks, plans, acts, one pass at a time. The latest spec wins; slow calls run as tasks of their
//! own and come back as actions, so that the worker always listens.

mod outcome;
mod probing;

pub(crate) use self::outcome::resize_summary;

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::clock::Now;
use crate::control::{Ending, Unfinished};
use crate::execute::{Executor, PassResults, run_pass};
use crate::memory::{Pending, PodMemory, Termination};
use crate::node::NodeView;
use crate::observed::{self, PodObserved, State};
use crate::plan::{self, Plan, PodOp, Situation};
use crate::pod::{self, PodUid};
use crate::probe::{Kind, Probers};
use crate::record::Weight;
use crate::saved_status::{Saved, SavedStatus};
use crate::table::PodTable;
use crate::{hook_record, status};

/// How long a stopping kubelet waits for the step that is being carried out.
const STOP_PATIENCE: Duration = Duration::from_secs(2);

/// What a worker is told.
#[derive(Clone, Debug)]
pub(crate) enum Message {
    /// The pod's spec as it is now.
    Update(Arc<Pod>),
    /// The pod is to have other resources, which the node does not have yet.
    ResizePending(Pending),
    /// The pod is to end.
    Terminate(Termination),
    /// The node ends the pod; it stays known, and is over.
    End {
        /// How and why.
        ending: Ending,
        /// Let go when nothing of the pod runs any more.
        unfinished: Unfinished,
    },
    /// The pod has ended: its records go. Let go when there are none.
    ClearRecords(Unfinished),
    /// Something changed in the runtime.
    Look,
    /// The node has other addresses.
    NodeChanged(Arc<NodeView>),
    /// ConfigMaps, Secrets or classes changed.
    ObjectsChanged,
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

/// What a worker is told comes in boxes: the room that a channel sets aside is for 32 messages at least, one for each pod.
type Inbox = mpsc::UnboundedReceiver<Box<Message>>;

/// The way to a worker.
#[derive(Clone, Debug)]
pub(crate) struct Outlet(mpsc::UnboundedSender<Box<Message>>);

/// The way to a worker, which does not keep it open.
#[derive(Clone, Debug)]
pub(crate) struct WeakOutlet(mpsc::WeakUnboundedSender<Box<Message>>);

/// The worker has ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended;

/// The way to a worker, and its end of it.
pub(crate) fn mailbox() -> (Outlet, Inbox) {
    let (sender, inbox) = mpsc::unbounded_channel();
    (Outlet(sender), inbox)
}

impl Outlet {
    /// Tells the worker, unless it has ended.
    pub(crate) fn send(&self, message: Message) -> Result<(), Ended> {
        self.0.send(Box::new(message)).map_err(|_| Ended)
    }

    /// Does not keep the way open.
    pub(crate) fn downgrade(&self) -> WeakOutlet {
        WeakOutlet(self.0.downgrade())
    }
}

impl WeakOutlet {
    /// The way, while somebody keeps it open.
    pub(crate) fn upgrade(&self) -> Option<Outlet> {
        self.0.upgrade().map(Outlet)
    }
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
    /// The containers that it starts: none of them waits.
    starts: BTreeSet<String>,
}

/// A pod's worker.
pub(crate) struct Worker {
    uid: PodUid,
    pod: Arc<Pod>,
    executor: Executor,
    table: PodTable,
    inbox: Inbox,
    shutdown: CancellationToken,
    observed: Arc<PodObserved>,
    memory: PodMemory,
    look: Option<Look>,
    pass: Option<Pass>,
    passes: u64,
    dirty: bool,
    wake: Option<Instant>,
    /// When volumes are to be published again.
    republish: Option<Instant>,
    /// After a failure of the pod as a whole nothing is tried before this.
    hold: Option<Instant>,
    last_ops: Vec<PodOp>,
    /// What the running pass has prepared may be of before: the spec or the objects have changed since it began.
    stale: bool,
    probers: Probers,
    own_inbox: WeakOutlet,
    /// Who waits for the pod's end.
    unfinished: Vec<Unfinished>,
    /// Who waits for the end of its records.
    clearing: Vec<Unfinished>,
    has_looked: bool,
    saved: SavedStatus,
    finished: bool,
    /// Containers whose postStart hook has failed, with their attempts; until they are seen.
    hook_failures: BTreeMap<String, u32>,
    /// Containers that have been stopped so that they start with other resources.
    resizing: BTreeSet<String>,
}

impl Worker {
    /// A worker that has not looked yet; `told` is what the API server, or this kubelet, has said of the pod so far. In a box: moved into its task it would be there twice, as argument and as what it became.
    pub fn new(
        uid: PodUid,
        pod: Arc<Pod>,
        executor: Executor,
        table: PodTable,
        inbox: Inbox,
        own_inbox: WeakOutlet,
        (shutdown, told): (CancellationToken, Option<PodStatus>),
    ) -> Box<Worker> {
        let now = Now { mono: Instant::now(), wall: executor.config.clock.now() };
        let logs = crate::logs::pod_log_dir(&executor.config.pod_logs_dir, &pod);
        let mut memory = PodMemory::new(&executor.config, now, crate::logs::highest_attempts(&logs));
        let saved = SavedStatus::new(&executor.pod_dir(&pod));
        memory.unfinished_hooks = hook_record::unfinished(&executor.pod_dir(&pod));
        // What has been told as its end stays its end.
        let ended = told.as_ref().is_some_and(|told| status::is_terminal_phase(told.phase.as_deref()));
        match (saved.load().filter(|_| !ended), told) {
            (Some(mut before), _) => {
                before.ages = before.ages.at(&executor.config.clock.uptime());
                memory.resume(before, now.mono, !pod::is_static(&pod));
            }
            (None, Some(told)) => memory.resume_from_api(told, now),
            (None, None) => {}
        }
        Box::new(Worker {
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
            republish: None,
            hold: None,
            last_ops: Vec::new(),
            stale: false,
            probers: Probers::default(),
            own_inbox,
            unfinished: Vec::new(),
            clearing: Vec::new(),
            has_looked: false,
            saved,
            finished: false,
            hook_failures: BTreeMap::new(),
            resizing: BTreeSet::new(),
        })
    }

    /// Runs until the pod is gone or the kubelet stops; whether the pod is gone.
    pub async fn run(mut self: Box<Self>) -> bool {
        self.heed_wishes();
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
            message = self.inbox.recv() => message.map_or(Action::Abandoned, |message| Action::Told(*message)),
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
                if self.republish.is_some_and(|at| at <= Instant::now()) {
                    self.republish = None;
                    self.memory.prepared = false;
                    self.last_ops.clear();
                }
            }
            Action::Abandoned => {}
        }
    }

    fn told(&mut self, message: Message) {
        match message {
            Message::Look => {}
            Message::ClearRecords(unfinished) => self.clear_records(unfinished),
            Message::ResizePending(pending) => self.memory.pending = Some(pending),
            Message::NodeChanged(node) => self.executor.node = node,
            Message::ObjectsChanged => {
                // Volumes are brought up to date; what failed for want of an object is tried again at once.
                self.memory.prepared = false;
                self.stale = true;
                self.memory.outdated = None;
                self.memory.holds.clear();
                self.hold = None;
                self.last_ops.clear();
            }
            Message::Update(pod) => {
                self.pod = pod;
                self.memory.pending = None;
                self.hold = None;
                self.last_ops.clear();
                // Limits of the pod's cgroup may have changed.
                self.memory.resize_failures.clear();
                self.memory.prepared = false;
                self.memory.outdated = None;
                self.stale = true;
                self.heed_wishes();
            }
            Message::Terminate(termination) => self.terminate(termination),
            Message::End { ending, unfinished } => {
                let grace = ending.grace.unwrap_or_else(|| pod::grace_seconds(&self.pod));
                self.memory.unwanted |= self.memory.ending.get_or_insert(ending).is_eviction();
                self.unfinished.push(unfinished);
                self.terminate(Termination { grace, forget: false });
            }
            Message::Probed { id, kind, well, grace } => self.probed(id, kind, well, grace),
        }
        self.dirty = true;
    }

    /// What the pod itself says of its end: somebody has asked the API server for its deletion, or has declared it over there.
    fn heed_wishes(&mut self) {
        let phase =
            |status: Option<&PodStatus>| status.and_then(|s| s.phase.clone()).filter(|p| status::is_terminal_phase(Some(p)));
        if let Some(declared) = phase(self.pod.status.as_ref())
            && phase(self.memory.status.as_ref()).is_none()
        {
            let told = self.pod.status.clone().unwrap_or_default();
            let status = self.memory.status.get_or_insert_default();
            (status.phase, status.reason, status.message) = (Some(declared), told.reason, told.message);
            self.terminate(Termination { grace: pod::grace_seconds(&self.pod), forget: false });
        }
        if pod::is_deleting(&self.pod) {
            self.memory.deleted = true;
            self.terminate(Termination { grace: pod::deletion_grace_seconds(&self.pod), forget: false });
        }
    }

    /// The pod is to end, or sooner than it was: what is being done for it is given up.
    fn terminate(&mut self, termination: Termination) {
        let before = self.memory.terminating;
        self.memory.terminate(termination);
        if termination.forget {
            self.memory.terminating_since.get_or_insert_with(|| self.executor.config.clock.now());
        }
        if self.memory.terminating != before {
            self.hold = None;
            self.last_ops.clear();
            self.memory.released = false;
            if let Some(pass) = &self.pass {
                pass.cancel.cancel();
            }
        }
    }

    /// The records of a pod that has ended are not to be kept.
    fn clear_records(&mut self, unfinished: Unfinished) {
        let phase = self.memory.status.as_ref().and_then(|s| s.phase.as_deref());
        if status::is_terminal_phase(phase) {
            self.memory.unwanted = true;
            self.clearing.push(unfinished);
        }
    }

    fn wake_at(&mut self, at: Instant) {
        self.wake = Some(self.wake.map_or(at, |now| now.min(at)));
    }

    /// A fresh view: new status, and a new pass unless one is running or began after the look.
    fn looked(&mut self, number: u64, observed: PodObserved) {
        let now = self.now();
        if !self.has_looked {
            self.has_looked = true;
            let running = observed.containers.iter().filter(|c| c.state == State::Running);
            self.memory.adopted = running.map(|c| c.id.clone()).collect();
        }
        self.memory.note(&observed, now);
        self.note_hook_failures(&observed);
        self.observed = Arc::new(observed);
        self.memory.cpus = self.executor.cpus.lists_of(&self.pod);
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
        if self.memory.terminating.is_some() && self.memory.released && !self.observed.is_alive() {
            self.unfinished.clear();
            if self.memory.deleted {
                self.table.set_finished(&self.uid);
            }
        }
        if self.observed.containers.is_empty() && self.observed.sandboxes.is_empty() {
            self.clearing.clear();
        }
        self.wake = plan.wake;
        if let Some(at) = self.republish {
            self.wake_at(at);
        }
        if plan.finished {
            self.finished = true;
            return;
        }
        if plan.ops.is_empty() {
            self.last_ops.clear();
            return;
        }
        if !self.executor.runtime.is_well() {
            // As upstream: while the runtime has errors no pod is worked on.
            self.wake_at(now.mono + self.executor.config.timing.retry);
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
        let is_starting = |name: &str| self.pass.as_ref().is_some_and(|pass| pass.starts.contains(name));
        // What is being started has no end but the one that it is started after: its next delay is not its own yet.
        for (name, reason) in plan.waiting.iter().filter(|(name, _)| !is_starting(name)) {
            self.tell_waiting(name, reason);
            self.memory.reasons.insert(name.clone(), reason.clone());
        }
        plan
    }

    fn publish(&mut self, now: Now, plan: &Plan) {
        let situation =
            Situation { pod: &self.pod, observed: &self.observed, memory: &self.memory, node: &self.executor.node, now };
        let mut status = status::status(&situation);
        self.executor.devices.add_health(&self.pod, &mut status);
        let phase = status.phase.clone();
        // Of a pod that goes for good the records go, and with them what its phase is told by.
        let goes = self.memory.deletion().is_some();
        if !goes && self.memory.status.as_ref().and_then(|s| s.phase.clone()) != phase {
            let phase = phase.as_deref().unwrap_or_default();
            tracing::info!(pod = %pod::format_pod(&self.pod), steps = plan.ops.len(), "pod is {phase}");
        }
        if self.memory.status.as_ref() != Some(&status) && self.memory.terminating.is_none() {
            self.save(&status, now.mono);
        }
        self.memory.status = Some(status.clone());
        let shown = self.memory.pending.as_ref().map_or(&self.pod, |pending| &pending.wanted);
        self.table.set_trouble(&self.uid, self.memory.pod_error.as_ref());
        self.table.doing().set_condemned(&self.uid, &self.memory.condemned);
        self.table.set_ending(&self.uid, self.memory.terminating.is_some());
        match self.memory.deletion() {
            Some((since, grace)) => {
                let mut ending = Pod::clone(&self.pod);
                ending.metadata.deletion_timestamp = Some(Time(since));
                ending.metadata.deletion_grace_period_seconds = Some(grace);
                self.table.set(&self.uid, &Arc::new(ending), status);
            }
            None => self.table.set(&self.uid, shown, status),
        }
    }

    /// Keeps what the next kubelet goes on from.
    fn save(&self, status: &PodStatus, now: Instant) {
        self.saved.save(self.what_to_keep(status, now));
    }

    fn what_to_keep(&self, status: &PodStatus, now: Instant) -> Saved {
        let ages = self.memory.ages(self.executor.config.clock.uptime(), now);
        Saved { status: status.clone(), ages, cleared: self.memory.cleared }
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
        for op in &ops {
            if let PodOp::StartContainer { name, attempt, .. } = op
                && self.container(name).and_then(|c| c.lifecycle.as_ref()).is_some_and(|l| l.post_start.is_some())
            {
                self.memory.hooked.insert(name.clone(), *attempt);
            }
        }
        if ops.contains(&PodOp::KeepEnd) {
            // From now on whatever is kept says it: a later status does not take it back.
            self.memory.cleared = true;
            let status = self.memory.status.clone().unwrap_or_default();
            self.saved.ended(self.what_to_keep(&status, Instant::now()));
        }
        let restarts: Vec<String> = ops.iter().filter_map(plan::restarted_by_resize).map(str::to_owned).collect();
        if !restarts.is_empty() || ops.iter().any(|op| matches!(op, PodOp::Resize { .. })) {
            let message = format!("Pod resize started: {}", outcome::resize_summary(&self.pod, None));
            self.executor.recorder.event(&self.pod, None, Weight::Normal, "ResizeStarted", &message);
        }
        self.resizing.extend(restarts);
        self.last_ops.clone_from(&ops);
        self.stale = false;
        let starts = ops.iter().filter_map(|op| match op {
            PodOp::StartContainer { name, .. } => Some(name.clone()),
            _ => None,
        });
        let starts = starts.collect();
        let cancel = CancellationToken::new();
        let (pod, observed, saved) = (self.pod.clone(), self.observed.clone(), self.saved.clone());
        let pass = run_pass(self.executor.clone(), pod, observed, saved, ops, cancel.clone());
        self.pass = Some(Pass { task: tokio::spawn(pass), cancel, starts });
    }
}
