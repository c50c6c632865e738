//! The state machine of a sandbox and its containers. [`Machine::apply`] is the only thing that changes it: it is not async, does
//! no I/O, and says in an [`Outbox`] which slow work to start, what to show and whom to answer.

mod advance;
mod container;
mod event;
mod late;
mod members;
mod remains;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use container::Checkpoint;
pub(crate) use container::{Container, CreatedContainer, ProcessExit, exit_record};
pub(crate) use event::{Change, Done, Event, Fate, NotMade, Op, Outbox, Reply, Resize, Rest, Task};

use crate::board::ContainerState;
use crate::error::{Error, Shared};
use crate::id::{ContainerId, SandboxId};
use crate::progress::stamp;
use crate::spec::SandboxSpec;

/// What a sandbox holds of the system while it is ready. Opaque to the state machine.
pub(crate) type H = super::holdings::Live;

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
    begun: bool,
    /// The agent that made it died before anybody was told of it: it only goes.
    hidden: bool,
    /// It could not be made, and something of it is left: when that is given back again.
    remains: Option<remains::Again>,
    /// Clients have been told that the sandbox runs, and not that it stopped.
    told_running: bool,
    /// Why it is not ready, for people.
    not_ready_because: String,
    /// A shim that answers nobody is being killed.
    killing: bool,
    /// The step that is past its limit: whoever asks is told, until it ends.
    overdue: Option<Arc<Error>>,
    heirs: Vec<(Arc<SandboxSpec>, Reply<SandboxId>)>,
    runners: Vec<Reply<SandboxId>>,
    stoppers: Vec<Reply<()>>,
    removers: Vec<Reply<()>>,
    /// In boxes: a node of the map has room for eleven, and most pods have one or two.
    pub(crate) containers: BTreeMap<ContainerId, Box<Container>>,
    /// A record is being rewritten; the next change waits, and so does the teardown, which writes the last one.
    resizing: bool,
    resizes: VecDeque<(Box<Resize>, Reply<()>)>,
    now: fn() -> i64,
}

fn answer<T: Send + Sync + 'static>(out: &mut Outbox, reply: Reply<T>, result: Shared<T>) {
    out.answers.push(Box::new(move || reply.send(result).err().and_then(Result::err)));
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
            begun: false,
            hidden: false,
            remains: None,
            told_running: false,
            not_ready_because: String::new(),
            killing: false,
            overdue: None,
            heirs: Vec::new(),
            runners: Vec::new(),
            stoppers: Vec::new(),
            removers: Vec::new(),
            containers: BTreeMap::new(),
            resizing: false,
            resizes: VecDeque::new(),
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
        containers: BTreeMap<ContainerId, Box<Container>>,
    ) -> Self {
        let mut machine = Self::new(id, spec);
        machine.lifecycle = match live {
            Some(live) if ready => Lifecycle::Ready(live),
            rest => Lifecycle::NotReady(rest),
        };
        machine.told_running = machine.ready();
        machine.created_at = created_at;
        machine.begun = true;
        machine.containers = containers;
        machine
    }

    /// The agent ended while it made this one. Nobody is told of it while it goes.
    pub(crate) fn hide(&mut self, now: Instant) {
        self.hidden = true;
        self.told_running = false;
        self.remains = Some(remains::Again::first(now));
    }

    /// The recovery's word on why it is not ready.
    pub(crate) fn because(&mut self, reason: &str) {
        self.not_ready_because = reason.to_owned();
    }

    /// Why the sandbox is not ready, for people; empty while it is.
    pub(crate) fn why_not_ready(&self) -> &str {
        if self.ready() { "" } else { &self.not_ready_because }
    }

    /// Whether the sandbox is READY.
    pub(crate) fn ready(&self) -> bool {
        matches!(self.lifecycle, Lifecycle::Ready(_)) && self.goal == Goal::Run
    }

    /// Whether there is anything to show.
    pub(crate) fn listed(&self) -> bool {
        !self.hidden && !matches!(self.lifecycle, Lifecycle::Creating | Lifecycle::Over)
    }

    /// Whether something of the system may be held: while it is made, ready, or not wholly given back.
    pub(crate) fn holds(&self) -> bool {
        !matches!(self.lifecycle, Lifecycle::NotReady(None) | Lifecycle::Erasing | Lifecycle::Over)
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
            .chain(self.undo_again())
            .min()
    }

    /// Until when containers that were asked to end are waited for, and which are waited for no more.
    pub(crate) fn graces(&self) -> impl Iterator<Item = (&ContainerId, Option<Instant>)> {
        let asked = self.containers.iter().filter_map(|(id, c)| Some((id, c.stopping.as_ref()?.deadline, c.has_process())));
        asked.map(|(id, until, runs)| (id, runs.then_some(until)))
    }

    /// Changes the state by one event.
    pub(crate) fn apply(&mut self, event: Event, now: Instant) -> Outbox {
        let mut out = Outbox::default();
        match event {
            Event::Op(op) => self.op(op, now, &mut out),
            Event::Done(done, pass) => {
                out.pass = pass;
                self.done(done, now, &mut out);
            }
            Event::Exited { id, exit } => self.exited(&id, exit, &mut out),
            Event::ShimGone => self.shim_gone(&mut out),
            Event::Overdue { container, error } => self.is_late(container, error),
            Event::Reached { live, fates } => self.reached(live, &fates, &mut out),
            Event::Tick => {}
        }
        self.escalate(now, &mut out);
        self.undo_what_is_left(now);
        self.cut_checkpoints();
        self.resize(&mut out);
        self.advance(&mut out);
        self.tell_the_late(&mut out);
        if self.over() {
            out.heirs.append(&mut self.heirs);
        }
        out
    }

    fn op(&mut self, op: Op, now: Instant, out: &mut Outbox) {
        match op {
            Op::Run { spec, reply } => self.run(spec, reply, out),
            Op::Stop(reply) => self.stop(reply, out),
            Op::Remove(reply) => {
                self.removers.push(reply);
                self.goal = Goal::Remove;
                out.sandbox_changed = self.listed();
            }
            Op::CreateContainer { spec, log_directory, reply } => self.create(spec, log_directory, reply, out),
            Op::StartContainer { id, reply } => self.start(&id, reply, out),
            Op::StopContainer { id, timeout, reply } => self.stop_container(&id, now, timeout, reply, out),
            Op::RemoveContainer { id, reply } => self.remove_container(&id, reply, now, out),
            Op::Update { id, resources, by_plugin, reply } => self.update(&id, resources, by_plugin, reply, out),
            Op::ReopenLog { id, reply } => match self.alive(&id, true) {
                Ok((_, live)) => out.tasks.push(Task::ReopenLog { id, reply, live }),
                Err(error) => answer(out, reply, Err(error.into())),
            },
            Op::Resize { resize, reply } => self.resizes.push_back((resize, reply)),
            Op::Checkpoint { id, wanted, reply } => self.checkpoint(&id, wanted, reply, out),
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
    pub(super) fn alive(&self, id: &ContainerId, running: bool) -> Result<(&Container, Arc<H>), Error> {
        let container = self.container(id)?;
        let state = container.state().unwrap_or(ContainerState::Created);
        let good = state == ContainerState::Running || (!running && state == ContainerState::Created);
        match self.live() {
            Some(live) if good => Ok((container, live.clone())),
            _ => Err(Error::State { kind: "container", id: id.as_str().into(), state: state.text(), wanted: "must be running" }),
        }
    }

    fn container(&self, id: &ContainerId) -> Result<&Container, Error> {
        self.containers.get(id).map(Box::as_ref).ok_or_else(|| Error::NotFound { kind: "container", id: id.as_str().into() })
    }

    /// Begins the next change of the pod's limits.
    fn resize(&mut self, out: &mut Outbox) {
        let live = self.live().filter(|_| self.goal == Goal::Run).cloned();
        while !self.resizing {
            let Some((resize, reply)) = self.resizes.pop_front() else { return };
            match &live {
                Some(live) => {
                    self.resizing = true;
                    let spec = Arc::new(resize.applied(&self.spec));
                    out.tasks.push(Task::Resize { spec, reply, live: live.clone() });
                }
                None => answer(out, reply, Err(self.not_ready("must be ready to be resized").into())),
            }
        }
    }

    fn run(&mut self, spec: Arc<SandboxSpec>, reply: Reply<SandboxId>, out: &mut Outbox) {
        match self.lifecycle {
            // The name is free once this one is gone. What is left of one that could not be made goes for the next.
            _ if self.goal == Goal::Remove || self.remains.is_some() => {
                self.goal = Goal::Remove;
                self.heirs.push((spec, reply));
            }
            Lifecycle::Creating => {
                if !self.begun {
                    self.begun = true;
                    out.tasks.push(Task::Run);
                }
                self.runners.push(reply);
            }
            // A retry whose first answer was lost on its way, by the client's death or ours: it gets what was made.
            Lifecycle::Ready(_) if self.goal == Goal::Run && *spec == *self.spec => answer(out, reply, Ok(self.id.clone())),
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
            if self.ready() {
                self.not_ready_because = format!("it was stopped by StopPodSandbox at {}", stamp((self.now)()));
            }
            self.goal = Goal::Stop;
            out.sandbox_changed = self.listed();
        }
    }

    /// A removal has failed: nobody inherits the name.
    fn not_removed(&mut self, error: &Arc<Error>, out: &mut Outbox) {
        answer_all(out, &mut self.removers, &Err(error.clone()));
        for (_, reply) in self.heirs.drain(..) {
            answer(out, reply, Err(error.clone()));
        }
    }

    fn done(&mut self, done: Done, now: Instant, out: &mut Outbox) {
        self.no_longer_late(&done);
        match done {
            Done::Ran(result) => self.ran(result, now, out),
            Done::Created { id, result } => self.created(id, result, out),
            Done::Started { id, at, result } => self.started(&id, at, result, out),
            Done::Signalled { id, result } => self.signalled(&id, result, now, out),
            Done::Killed(result) => {
                self.killing = false;
                if let Err(error) = result {
                    self.overdue = Some(Arc::new(error));
                }
            }
            Done::Deleted { id, result } => self.deleted(id, result, out),
            Done::Updated { id, resources, reply, result } => self.updated(id, *resources, reply, result, out),
            Done::Checkpointed { id, reply, result } => {
                if let Some(container) = self.containers.get_mut(&id) {
                    container.checkpoint = Checkpoint::None;
                }
                answer(out, reply, result.map_err(Arc::new));
            }
            Done::Resized { spec, reply, result } => {
                self.resizing = false;
                if result.is_ok() {
                    self.spec = spec;
                    out.sandbox_changed = true;
                }
                answer(out, reply, result.map_err(Arc::new));
            }
            Done::Lost(exits) => self.buried(&exits, out),
            Done::TornDown { rest, result } => {
                self.lifecycle = Lifecycle::NotReady(rest);
                out.sandbox_changed = true;
                let result = result.map_err(Arc::new);
                if result.is_ok() {
                    self.tell_stop(out);
                }
                if let (Err(error), Goal::Remove) = (&result, self.goal) {
                    self.not_removed(error, out);
                }
                if result.is_err() {
                    self.goal = Goal::Run; // Tried again by the next call.
                }
                self.still_there(now);
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
                    self.still_there(now);
                    out.sandbox_changed = true;
                }
                if let Err(error) = &result {
                    self.not_removed(error, out);
                }
                answer_all(out, &mut self.removers, &result);
                answer_all(out, &mut self.stoppers, &Ok(()));
            }
        }
    }

    /// The sandbox has stopped. Told once, and of none that nobody was told of.
    fn tell_stop(&mut self, out: &mut Outbox) {
        if std::mem::replace(&mut self.told_running, false) {
            out.events.push((self.id.as_str().into(), Change::Stopped));
        }
    }

    fn ran(&mut self, result: Result<Arc<H>, NotMade>, now: Instant, out: &mut Outbox) {
        let runners = std::mem::take(&mut self.runners);
        out.sandbox_changed = true;
        match result {
            Ok(live) => {
                self.lifecycle = Lifecycle::Ready(live);
                self.told_running = true;
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
            Err(NotMade { error, rest }) => {
                let error = Arc::new(error);
                for reply in runners {
                    answer(out, reply, Err(error.clone()));
                }
                self.not_made(rest, now, out);
            }
        }
    }
}
