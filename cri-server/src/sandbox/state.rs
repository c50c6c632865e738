//! The state machine of a sandbox and its containers. [`Machine::apply`] is the only thing that changes it: it is not async, does
//! no I/O, and says in an [`Outbox`] which slow work to start, what to show and whom to answer.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::board::{ContainerFacts, ContainerState, Exit};
use crate::error::{Error, Shared};
use crate::id::{ContainerId, SandboxId};
use crate::spec::{ContainerSpec, Resources, SandboxSpec};

/// Where an answer goes. A client that has given up has dropped the other end.
pub(crate) type Reply<T> = oneshot::Sender<Shared<T>>;

/// What clients ask of a sandbox.
pub(crate) enum Op {
    /// RunPodSandbox, the first time or again with the same metadata.
    Run(Reply<SandboxId>),
    Stop(Reply<()>),
    Remove(Reply<()>),
    CreateContainer { spec: Box<ContainerSpec>, log_directory: String, reply: Reply<ContainerId> },
    StartContainer { id: ContainerId, reply: Reply<()> },
    StopContainer { id: ContainerId, timeout: Duration, reply: Reply<()> },
    RemoveContainer { id: ContainerId, reply: Reply<()> },
    Update { id: ContainerId, resources: Box<Resources>, reply: Reply<()> },
    ReopenLog { id: ContainerId, reply: Reply<()> },
    /// What exec, attach, port-forward and statistics need.
    Live(Reply<Arc<H>>),
}

/// What a sandbox holds of the system while it is ready. Opaque to the state machine.
pub(crate) type H = super::holdings::Live;

/// How a container's process ended, as the shim recorded it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProcessExit {
    pub(crate) code: i32,
    pub(crate) oom: bool,
    pub(crate) finished_at: i64,
}

/// The result of a container creation.
pub(crate) struct CreatedContainer {
    pub(crate) facts: Arc<ContainerFacts>,
    pub(crate) created_at: i64,
    pub(crate) pid: i32,
    pub(crate) hold: Option<Hold>,
}

/// Keeps the image of a container.
pub(crate) type Hold = Arc<berth_image::Hold>;

/// Completions of tasks.
pub(crate) enum Done {
    Ran(Result<Arc<H>, Error>),
    Created { id: ContainerId, result: Result<CreatedContainer, Error> },
    Started { id: ContainerId, at: i64, result: Result<(), Error> },
    Signalled { id: ContainerId, result: Result<(), Error> },
    Deleted { id: ContainerId, result: Result<(), Error> },
    Updated { id: ContainerId, resources: Box<Resources>, reply: Reply<()>, result: Result<(), Error> },
    /// What was left of a dead shim's containers: the exits it still recorded.
    Lost(BTreeMap<ContainerId, ProcessExit>),
    TornDown { rest: Option<Arc<H>>, result: Result<(), Error> },
    Erased(Result<(), Error>),
}

/// What can happen to a sandbox.
pub(crate) enum Event {
    Op(Op),
    Done(Done),
    /// The shim says that a container's first process ended.
    Exited { id: ContainerId, exit: ProcessExit },
    /// The shim is dead.
    ShimGone,
    /// A deadline has passed.
    Tick,
}

/// Slow work.
pub(crate) enum Task {
    Run,
    Create { id: ContainerId, spec: Box<ContainerSpec>, log_directory: String, live: Arc<H> },
    Start { id: ContainerId, live: Arc<H> },
    /// To the first process alone.
    Signal { id: ContainerId, signal: i32, live: Arc<H> },
    /// To everything in the container's cgroup.
    Kill { id: ContainerId, live: Arc<H> },
    Delete { id: ContainerId, live: Option<Arc<H>> },
    Update { id: ContainerId, resources: Box<Resources>, merged: Box<Resources>, reply: Reply<()>, live: Arc<H> },
    ReopenLog { id: ContainerId, reply: Reply<()>, live: Arc<H> },
    Bury { live: Arc<H>, containers: Vec<ContainerId> },
    TearDown { live: Arc<H> },
    Erase,
}

/// What clients may be told happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    Created,
    Started,
    Stopped,
    Deleted,
}

/// What an event led to. Shown first, then announced, then answered, then worked on.
#[derive(Default)]
pub(crate) struct Outbox {
    pub(crate) sandbox_changed: bool,
    pub(crate) changed: Vec<ContainerId>,
    pub(crate) gone: Vec<ContainerId>,
    pub(crate) events: Vec<(String, Change)>,
    pub(crate) answers: Vec<Box<dyn FnOnce() + Send>>,
    pub(crate) tasks: Vec<Task>,
}

/// A stop under way.
#[derive(Debug)]
struct Stopping {
    deadline: Instant,
    killed: bool,
}

#[derive(Debug)]
enum Phase {
    Creating,
    Created,
    Starting,
    Running,
    Exited(Exit),
}

/// A container inside the machine.
pub(crate) struct Container {
    phase: Phase,
    name: (String, u32),
    pub(crate) facts: Option<Arc<ContainerFacts>>,
    pub(crate) resources: Resources,
    pub(crate) created_at: i64,
    pub(crate) started_at: i64,
    pub(crate) pid: Option<i32>,
    /// The first process is being ended: once begun this only gets faster.
    stopping: Option<Stopping>,
    /// An exit that came while the start was still under way.
    early_exit: Option<ProcessExit>,
    deleting: bool,
    claimed: bool,
    hold: Option<Hold>,
    creators: Vec<Reply<ContainerId>>,
    starters: Vec<Reply<()>>,
    stoppers: Vec<Reply<()>>,
    removers: Vec<Reply<()>>,
}

impl Container {
    fn new(name: (String, u32), resources: Resources) -> Self {
        Self {
            phase: Phase::Creating,
            name,
            facts: None,
            resources,
            created_at: 0,
            started_at: 0,
            pid: None,
            stopping: None,
            early_exit: None,
            deleting: false,
            claimed: false,
            hold: None,
            creators: Vec::new(),
            starters: Vec::new(),
            stoppers: Vec::new(),
            removers: Vec::new(),
        }
    }

    /// A container found again by the recovery.
    pub(crate) fn recovered(
        facts: Arc<ContainerFacts>,
        resources: Resources,
        created_at: i64,
        started_at: i64,
        pid: Option<i32>,
        exit: Option<Exit>,
        hold: Option<Hold>,
    ) -> Self {
        let phase = match exit {
            Some(exit) => Phase::Exited(exit),
            None if started_at != 0 => Phase::Running,
            None => Phase::Created,
        };
        let mut container = Self::new((facts.spec.name.clone(), facts.spec.attempt), resources);
        container.pid = if matches!(phase, Phase::Exited(_)) { None } else { pid };
        container.phase = phase;
        container.facts = Some(facts);
        container.created_at = created_at;
        container.started_at = started_at;
        container.claimed = true;
        container.hold = hold;
        container
    }

    fn has_process(&self) -> bool {
        matches!(self.phase, Phase::Created | Phase::Starting | Phase::Running)
    }

    /// The state to show; none while it is being created.
    pub(crate) fn state(&self) -> Option<ContainerState> {
        match self.phase {
            Phase::Creating => None,
            Phase::Created | Phase::Starting => Some(ContainerState::Created),
            Phase::Running => Some(ContainerState::Running),
            Phase::Exited(_) => Some(ContainerState::Exited),
        }
    }

    /// How it ended.
    pub(crate) fn exit(&self) -> Option<&Exit> {
        match &self.phase {
            Phase::Exited(exit) => Some(exit),
            _ => None,
        }
    }
}

#[derive(PartialEq, Eq, PartialOrd, Ord, Clone, Copy, Debug)]
enum Goal {
    Run,
    Stop,
    Remove,
}

enum Lifecycle {
    Creating,
    Ready(Arc<H>),
    /// The shim is dead and what it left behind is being ended.
    Burying(Arc<H>),
    /// Network, shim and cgroup are being undone; the task has the holdings.
    TearingDown,
    /// What a failed teardown left, for the next try.
    NotReady(Option<Arc<H>>),
    Erasing,
    /// The owner may end.
    Over,
}

/// A sandbox with its containers.
pub(crate) struct Machine {
    pub(crate) id: SandboxId,
    pub(crate) spec: Arc<SandboxSpec>,
    lifecycle: Lifecycle,
    goal: Goal,
    pub(crate) created_at: i64,
    claimed: bool,
    runners: Vec<Reply<SandboxId>>,
    stoppers: Vec<Reply<()>>,
    removers: Vec<Reply<()>>,
    pub(crate) containers: BTreeMap<ContainerId, Container>,
    now: fn() -> i64,
}

fn answer<T: Send + Sync + 'static>(out: &mut Outbox, reply: Reply<T>, result: Shared<T>) {
    out.answers.push(Box::new(move || {
        let _ = reply.send(result);
    }));
}

fn answer_all(out: &mut Outbox, replies: &mut Vec<Reply<()>>, result: &Shared<()>) {
    for reply in replies.drain(..) {
        answer(out, reply, result.clone());
    }
}

impl Machine {
    /// A sandbox to be made.
    pub(crate) fn new(id: SandboxId, spec: Arc<SandboxSpec>) -> Self {
        Self {
            id,
            spec,
            lifecycle: Lifecycle::Creating,
            goal: Goal::Run,
            created_at: crate::clock::now_ns(),
            claimed: false,
            runners: Vec::new(),
            stoppers: Vec::new(),
            removers: Vec::new(),
            containers: BTreeMap::new(),
            now: crate::clock::now_ns,
        }
    }

    /// A sandbox found again by the recovery: ready when its shim lives, else with what is to be torn down, if anything.
    pub(crate) fn recovered(
        id: SandboxId,
        spec: Arc<SandboxSpec>,
        created_at: i64,
        ready: bool,
        live: Option<Arc<H>>,
        containers: BTreeMap<ContainerId, Container>,
    ) -> Self {
        let mut machine = Self::new(id, spec);
        machine.lifecycle = match live {
            Some(live) if ready => Lifecycle::Ready(live),
            rest => Lifecycle::NotReady(rest),
        };
        machine.created_at = created_at;
        machine.claimed = true;
        machine.containers = containers;
        machine
    }

    /// Whether the sandbox is READY.
    pub(crate) fn ready(&self) -> bool {
        matches!(self.lifecycle, Lifecycle::Ready(_)) && self.goal == Goal::Run
    }

    /// Whether there is anything to show.
    pub(crate) fn listed(&self) -> bool {
        !matches!(self.lifecycle, Lifecycle::Creating | Lifecycle::Over)
    }

    /// Whether the owner may end.
    pub(crate) fn over(&self) -> bool {
        matches!(self.lifecycle, Lifecycle::Over)
    }

    /// What the sandbox holds, while it is ready.
    pub(crate) fn live(&self) -> Option<&Arc<H>> {
        match &self.lifecycle {
            Lifecycle::Ready(live) => Some(live),
            _ => None,
        }
    }

    /// When the next [`Event::Tick`] is due.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.containers
            .values()
            .filter(|c| c.has_process())
            .filter_map(|c| c.stopping.as_ref())
            .filter(|s| !s.killed)
            .map(|s| s.deadline)
            .min()
    }

    /// Changes the state by one event.
    pub(crate) fn apply(&mut self, event: Event, now: Instant) -> Outbox {
        let mut out = Outbox::default();
        match event {
            Event::Op(op) => self.op(op, now, &mut out),
            Event::Done(done) => self.done(done, now, &mut out),
            Event::Exited { id, exit } => self.exited(&id, exit, &mut out),
            Event::ShimGone => self.shim_gone(&mut out),
            Event::Tick => {}
        }
        self.escalate(now, &mut out);
        self.advance(&mut out);
        out
    }

    fn op(&mut self, op: Op, now: Instant, out: &mut Outbox) {
        match op {
            Op::Run(reply) => self.run(reply, out),
            Op::Stop(reply) => self.stop(reply, out),
            Op::Remove(reply) => {
                self.removers.push(reply);
                self.goal = Goal::Remove;
                out.sandbox_changed = self.listed();
            }
            Op::CreateContainer { spec, log_directory, reply } => self.create(spec, log_directory, reply, out),
            Op::StartContainer { id, reply } => self.start(&id, reply, out),
            Op::StopContainer { id, timeout, reply } => self.stop_container(&id, now + timeout, reply, out),
            Op::RemoveContainer { id, reply } => self.remove_container(&id, reply, now, out),
            Op::Update { id, resources, reply } => match self.alive(&id, false) {
                Ok((container, live)) => {
                    let merged = Box::new(container.resources.merged(&resources));
                    out.tasks.push(Task::Update { id, resources, merged, reply, live });
                }
                Err(error) => answer(out, reply, Err(error.into())),
            },
            Op::ReopenLog { id, reply } => match self.alive(&id, true) {
                Ok((_, live)) => out.tasks.push(Task::ReopenLog { id, reply, live }),
                Err(error) => answer(out, reply, Err(error.into())),
            },
            Op::Live(reply) => {
                let result = match self.live().filter(|_| self.goal == Goal::Run) {
                    Some(live) => Ok(live.clone()),
                    None => Err(Arc::new(self.not_ready("must be ready"))),
                };
                answer(out, reply, result);
            }
        }
    }

    fn not_ready(&self, wanted: &'static str) -> Error {
        Error::State { kind: "pod sandbox", id: self.id.as_str().into(), state: "not ready", wanted }
    }

    /// A container that may be acted upon: running, or also created.
    fn alive(&self, id: &ContainerId, running: bool) -> Result<(&Container, Arc<H>), Error> {
        let container = self.container(id)?;
        let state = container.state().unwrap_or(ContainerState::Created);
        let good = state == ContainerState::Running || (!running && state == ContainerState::Created);
        match self.live() {
            Some(live) if good => Ok((container, live.clone())),
            _ => Err(Error::State {
                kind: "container",
                id: id.as_str().into(),
                state: state.text(),
                wanted: "must be running",
            }),
        }
    }

    fn container(&self, id: &ContainerId) -> Result<&Container, Error> {
        self.containers.get(id).ok_or_else(|| Error::NotFound { kind: "container", id: id.as_str().into() })
    }

    fn run(&mut self, reply: Reply<SandboxId>, out: &mut Outbox) {
        match self.lifecycle {
            Lifecycle::Creating => {
                if self.runners.is_empty() && !self.claimed {
                    // The very first: `claimed` says from here on that the work has begun.
                    self.claimed = true;
                    out.tasks.push(Task::Run);
                }
                self.runners.push(reply);
            }
            // The one who asked had gone away before it was told: the retry gets what was made.
            _ if !self.claimed && self.goal == Goal::Run => {
                self.claimed = true;
                answer(out, reply, Ok(self.id.clone()));
            }
            _ => {
                let m = &self.spec.metadata;
                let name = format!("{}_{}_{}_{}", m.name, m.namespace, m.uid, m.attempt);
                let error = Error::Exists { kind: "pod sandbox", name, id: self.id.as_str().into() };
                answer(out, reply, Err(error.into()));
            }
        }
    }

    fn stop(&mut self, reply: Reply<()>, out: &mut Outbox) {
        self.stoppers.push(reply);
        if self.goal < Goal::Stop {
            self.goal = Goal::Stop;
            out.sandbox_changed = self.listed();
        }
    }

    fn create(&mut self, spec: Box<ContainerSpec>, log_directory: String, reply: Reply<ContainerId>, out: &mut Outbox) {
        let Some(live) = self.live().filter(|_| self.goal == Goal::Run).cloned() else {
            let error = self.not_ready("containers can only be created in a ready sandbox");
            return answer(out, reply, Err(error.into()));
        };
        let name = (spec.name.clone(), spec.attempt);
        if let Some((id, container)) = self.containers.iter_mut().find(|(_, c)| c.name == name) {
            match container.phase {
                Phase::Creating => container.creators.push(reply),
                _ if !container.claimed && !container.deleting && container.removers.is_empty() => {
                    container.claimed = true;
                    answer(out, reply, Ok(id.clone()));
                }
                _ => {
                    let name = format!("{}_{}", name.0, name.1);
                    let error = Error::Exists { kind: "container", name, id: id.as_str().into() };
                    answer(out, reply, Err(error.into()));
                }
            }
            return;
        }
        let id = ContainerId::random();
        let mut container = Container::new(name, spec.resources.clone().unwrap_or_default());
        container.creators.push(reply);
        self.containers.insert(id.clone(), container);
        out.tasks.push(Task::Create { id, spec, log_directory, live });
    }

    fn start(&mut self, id: &ContainerId, reply: Reply<()>, out: &mut Outbox) {
        let live = self.live().filter(|_| self.goal == Goal::Run).cloned();
        let Some(container) = self.containers.get_mut(id) else {
            let error = Error::NotFound { kind: "container", id: id.as_str().into() };
            return answer(out, reply, Err(error.into()));
        };
        match (&container.phase, live) {
            // A retry of a start whose client went away joins it.
            (Phase::Starting, _) => container.starters.push(reply),
            (Phase::Created, Some(live)) if container.stopping.is_none() && !container.deleting => {
                container.phase = Phase::Starting;
                container.starters.push(reply);
                out.tasks.push(Task::Start { id: id.clone(), live });
            }
            _ => {
                let state = container.state().map_or("being created", ContainerState::text);
                let error = Error::State {
                    kind: "container",
                    id: id.as_str().into(),
                    state,
                    wanted: "only a created container in a ready sandbox can be started",
                };
                answer(out, reply, Err(error.into()));
            }
        }
    }

    fn stop_container(&mut self, id: &ContainerId, deadline: Instant, reply: Reply<()>, out: &mut Outbox) {
        let live = self.live().cloned();
        match self.containers.get_mut(id) {
            Some(container) if matches!(container.phase, Phase::Running | Phase::Starting) => {
                container.stoppers.push(reply);
                match &mut container.stopping {
                    Some(stopping) => stopping.deadline = stopping.deadline.min(deadline),
                    None => {
                        container.stopping = Some(Stopping { deadline, killed: false });
                        let signal = container.facts.as_ref().map_or(15, |f| f.stop_signal);
                        if let Some(live) = live {
                            out.tasks.push(Task::Signal { id: id.clone(), signal, live });
                        }
                    }
                }
            }
            // Created, exited, unknown: nothing to stop.
            _ => answer(out, reply, Ok(())),
        }
    }

    fn remove_container(&mut self, id: &ContainerId, reply: Reply<()>, now: Instant, out: &mut Outbox) {
        match self.containers.get_mut(id) {
            Some(container) => {
                container.removers.push(reply);
                if container.has_process() {
                    end_now(container, now);
                }
            }
            None => answer(out, reply, Ok(())),
        }
    }

    fn done(&mut self, done: Done, now: Instant, out: &mut Outbox) {
        match done {
            Done::Ran(result) => self.ran(result, out),
            Done::Created { id, result } => self.created(id, result, out),
            Done::Started { id, at, result } => self.started(&id, at, result, out),
            Done::Signalled { id, result } => {
                if let (Err(error), Some(container)) = (result, self.containers.get_mut(&id)) {
                    tracing::debug!(container = %id, error = %crate::error::text(&error), "signal not delivered");
                    // What can not be signalled is killed at its deadline; a failed kill is tried again a little later.
                    if let Some(stopping) = container.stopping.as_mut().filter(|s| s.killed) {
                        stopping.killed = false;
                        stopping.deadline = now + Duration::from_millis(200);
                    }
                }
            }
            Done::Deleted { id, result } => self.deleted(id, result, out),
            Done::Updated { id, resources, reply, result } => {
                if let (Ok(()), Some(container)) = (&result, self.containers.get_mut(&id)) {
                    container.resources = *resources;
                    out.changed.push(id);
                }
                answer(out, reply, result.map_err(Arc::new));
            }
            Done::Lost(exits) => self.buried(&exits, out),
            Done::TornDown { rest, result } => {
                self.lifecycle = Lifecycle::NotReady(rest);
                out.sandbox_changed = true;
                let result = result.map_err(Arc::new);
                if result.is_err() && self.goal == Goal::Remove {
                    answer_all(out, &mut self.removers, &result);
                }
                if result.is_err() {
                    self.goal = Goal::Run; // Tried again by the next call.
                }
                answer_all(out, &mut self.stoppers, &result);
            }
            Done::Erased(result) => {
                let result = result.map_err(Arc::new);
                if result.is_ok() {
                    self.lifecycle = Lifecycle::Over;
                    out.sandbox_changed = true;
                    out.events.push((self.id.as_str().into(), Change::Deleted));
                } else {
                    self.lifecycle = Lifecycle::NotReady(None);
                    self.goal = Goal::Run;
                }
                answer_all(out, &mut self.removers, &result);
                answer_all(out, &mut self.stoppers, &Ok(()));
            }
        }
    }

    fn ran(&mut self, result: Result<Arc<H>, Error>, out: &mut Outbox) {
        let runners = std::mem::take(&mut self.runners);
        out.sandbox_changed = true;
        match result {
            Ok(live) => {
                self.lifecycle = Lifecycle::Ready(live);
                self.claimed = runners.iter().any(|r| !r.is_closed());
                out.events.push((self.id.as_str().into(), Change::Created));
                out.events.push((self.id.as_str().into(), Change::Started));
                for reply in runners {
                    answer(out, reply, Ok(self.id.clone()));
                }
                // It may have died while the rest was made: that event came too early to count.
                if self.live().is_some_and(|live| live.is_dead()) {
                    self.shim_gone(out);
                }
            }
            Err(error) => {
                self.lifecycle = Lifecycle::Over;
                let error = Arc::new(error);
                for reply in runners {
                    answer(out, reply, Err(error.clone()));
                }
                answer_all(out, &mut self.stoppers, &Ok(()));
                answer_all(out, &mut self.removers, &Ok(()));
            }
        }
    }

    fn created(&mut self, id: ContainerId, result: Result<CreatedContainer, Error>, out: &mut Outbox) {
        match result {
            Ok(made) => {
                let Some(container) = self.containers.get_mut(&id) else { return };
                container.phase = Phase::Created;
                container.facts = Some(made.facts);
                container.created_at = made.created_at;
                container.pid = Some(made.pid);
                container.hold = made.hold;
                let creators = std::mem::take(&mut container.creators);
                container.claimed = creators.iter().any(|r| !r.is_closed());
                for reply in creators {
                    answer(out, reply, Ok(id.clone()));
                }
                if let Some(exit) = container.early_exit.take() {
                    container.pid = None;
                    container.phase = Phase::Exited(exit_record(&exit));
                }
                out.events.push((id.as_str().into(), Change::Created));
                out.changed.push(id);
            }
            Err(error) => {
                let Some(container) = self.containers.remove(&id) else { return };
                let error = Arc::new(error);
                for reply in container.creators {
                    answer(out, reply, Err(error.clone()));
                }
            }
        }
    }

    fn started(&mut self, id: &ContainerId, at: i64, result: Result<(), Error>, out: &mut Outbox) {
        let Some(container) = self.containers.get_mut(id) else { return };
        out.changed.push(id.clone());
        let result = result.map_err(Arc::new);
        if matches!(container.phase, Phase::Starting) {
            match &result {
                Ok(()) => {
                    container.started_at = at;
                    container.phase = Phase::Running;
                    out.events.push((id.as_str().into(), Change::Started));
                }
                Err(error) => {
                    // As containerd reports it: the container is there, ended, and says why.
                    container.early_exit = None;
                    container.pid = None;
                    container.started_at = at;
                    container.phase = Phase::Exited(Exit {
                        code: 128,
                        finished_at: at,
                        reason: "StartError".into(),
                        message: crate::error::text(&**error),
                    });
                    out.events.push((id.as_str().into(), Change::Stopped));
                    answer_all(out, &mut container.stoppers, &Ok(()));
                }
            }
        }
        answer_all(out, &mut container.starters, &result);
        if let Some(exit) = container.early_exit.take() {
            self.exited(id, exit, out);
        }
    }

    fn exited(&mut self, id: &ContainerId, exit: ProcessExit, out: &mut Outbox) {
        let Some(container) = self.containers.get_mut(id) else { return };
        match container.phase {
            Phase::Creating | Phase::Starting => container.early_exit = Some(exit),
            Phase::Created | Phase::Running => {
                let mut exit = exit_record(&exit);
                exit.finished_at = exit.finished_at.max(container.started_at);
                container.phase = Phase::Exited(exit);
                container.pid = None;
                answer_all(out, &mut container.stoppers, &Ok(()));
                out.events.push((id.as_str().into(), Change::Stopped));
                out.changed.push(id.clone());
            }
            Phase::Exited(_) => {}
        }
    }

    fn deleted(&mut self, id: ContainerId, result: Result<(), Error>, out: &mut Outbox) {
        let Some(container) = self.containers.get_mut(&id) else { return };
        container.deleting = false;
        let result = result.map_err(Arc::new);
        answer_all(out, &mut container.removers, &result);
        match result {
            Ok(()) => {
                self.containers.remove(&id);
                out.events.push((id.as_str().into(), Change::Deleted));
                out.gone.push(id);
            }
            Err(error) => {
                if self.goal == Goal::Remove {
                    self.goal = Goal::Run;
                    answer_all(out, &mut self.removers, &Err(error));
                }
            }
        }
    }

    fn shim_gone(&mut self, out: &mut Outbox) {
        if let Lifecycle::Ready(live) = &self.lifecycle {
            let live = live.clone();
            let containers = self.containers.iter().filter(|(_, c)| !matches!(c.phase, Phase::Exited(_))).map(|(id, _)| id.clone()).collect();
            out.tasks.push(Task::Bury { live: live.clone(), containers });
            self.lifecycle = Lifecycle::Burying(live);
            out.sandbox_changed = true;
        }
    }

    fn buried(&mut self, exits: &BTreeMap<ContainerId, ProcessExit>, out: &mut Outbox) {
        let at = (self.now)();
        for (id, container) in &mut self.containers {
            if matches!(container.phase, Phase::Exited(_) | Phase::Creating) {
                continue;
            }
            let lost = Exit {
                code: 255,
                finished_at: at,
                reason: "Unknown".into(),
                message: "the pod's shim died".into(),
            };
            container.phase = Phase::Exited(exits.get(id).map_or(lost, exit_record));
            container.pid = None;
            let gone = Err(Arc::new(Error::ShimGone { id: self.id.as_str().into(), reason: "it died".into() }));
            answer_all(out, &mut container.starters, &gone);
            answer_all(out, &mut container.stoppers, &Ok(()));
            out.events.push((id.as_str().into(), Change::Stopped));
            out.changed.push(id.clone());
        }
        self.goal = self.goal.max(Goal::Stop);
        if let Lifecycle::Burying(live) = std::mem::replace(&mut self.lifecycle, Lifecycle::NotReady(None)) {
            self.lifecycle = Lifecycle::NotReady(Some(live));
        }
        out.sandbox_changed = true;
    }

    /// Kills what did not end in its time.
    fn escalate(&mut self, now: Instant, out: &mut Outbox) {
        let Some(live) = self.live().cloned() else { return };
        let stop_all = self.goal >= Goal::Stop;
        for (id, container) in &mut self.containers {
            if !container.has_process() || matches!(container.phase, Phase::Starting) && container.stopping.is_none() && !stop_all {
                continue;
            }
            if stop_all {
                end_now(container, now);
            }
            if let Some(stopping) = container.stopping.as_mut().filter(|s| !s.killed && s.deadline <= now) {
                stopping.killed = true;
                out.tasks.push(Task::Kill { id: id.clone(), live: live.clone() });
            }
        }
    }

    /// Takes the next step of a stop or removal, once what it has to wait for has happened.
    fn advance(&mut self, out: &mut Outbox) {
        for (id, container) in &mut self.containers {
            let wanted = !container.removers.is_empty();
            if wanted && !container.deleting && matches!(container.phase, Phase::Exited(_)) {
                container.deleting = true;
                let live = match &self.lifecycle {
                    Lifecycle::Ready(live) => Some(live.clone()),
                    _ => None,
                };
                out.tasks.push(Task::Delete { id: id.clone(), live });
            }
        }
        if self.goal < Goal::Stop {
            return;
        }
        let busy = self.containers.values().any(|c| c.deleting || !matches!(c.phase, Phase::Exited(_)));
        match &mut self.lifecycle {
            Lifecycle::Ready(live) if !busy => {
                out.tasks.push(Task::TearDown { live: live.clone() });
                self.lifecycle = Lifecycle::TearingDown;
            }
            Lifecycle::NotReady(rest @ Some(_)) if !busy => {
                if let Some(live) = rest.take() {
                    out.tasks.push(Task::TearDown { live });
                }
                self.lifecycle = Lifecycle::TearingDown;
            }
            Lifecycle::NotReady(None) => {
                answer_all(out, &mut self.stoppers, &Ok(()));
                if self.goal == Goal::Remove {
                    self.erase(out);
                } else {
                    self.goal = Goal::Run;
                }
            }
            _ => {}
        }
    }

    /// Removes the containers, then the sandbox itself.
    fn erase(&mut self, out: &mut Outbox) {
        for (id, container) in &mut self.containers {
            if !container.deleting {
                container.deleting = true;
                out.tasks.push(Task::Delete { id: id.clone(), live: None });
            }
        }
        if self.containers.is_empty() {
            self.lifecycle = Lifecycle::Erasing;
            out.tasks.push(Task::Erase);
        }
    }
}

fn end_now(container: &mut Container, now: Instant) {
    match &mut container.stopping {
        Some(stopping) => stopping.deadline = stopping.deadline.min(now),
        None => container.stopping = Some(Stopping { deadline: now, killed: false }),
    }
}

/// The exit as clients are told it.
pub(crate) fn exit_record(exit: &ProcessExit) -> Exit {
    let reason = if exit.oom {
        "OOMKilled"
    } else if exit.code == 0 {
        "Completed"
    } else {
        "Error"
    };
    Exit { code: exit.code, finished_at: exit.finished_at, reason: reason.into(), message: String::new() }
}
