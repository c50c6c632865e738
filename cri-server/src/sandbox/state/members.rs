//! What happens to the containers of a sandbox: the part of the state machine that knows one container at a time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::container::{Checkpoint, Container, Heir, Phase, Stopping, end_now, exit_record, lost};
use super::{Change, CreatedContainer, Goal, Lifecycle, Machine, Outbox, ProcessExit, Reply, Task, answer, answer_all};
use crate::board::{ContainerState, Exit};
use crate::checkpoint::Wanted;
use crate::error::Error;
use crate::id::ContainerId;
use crate::spec::{ContainerSpec, Resources};

impl Machine {
    pub(super) fn create(
        &mut self,
        spec: Box<ContainerSpec>,
        log_directory: String,
        reply: Reply<ContainerId>,
        out: &mut Outbox,
    ) {
        let Some(live) = self.live().filter(|_| self.goal == Goal::Run).cloned() else {
            let error = self.not_ready("containers can only be created in a ready sandbox");
            return answer(out, reply, Err(error.into()));
        };
        let name = (spec.name.clone(), spec.attempt);
        if let Some((id, container)) = self.containers.iter_mut().find(|(_, c)| c.name == name) {
            let untouched = !container.deleting && container.removers.is_empty();
            match container.phase {
                Phase::Creating => container.creators.push(reply),
                // The name is free once this one is gone.
                _ if !untouched || container.forlorn => {
                    if container.forlorn && untouched {
                        // The last try to remove it failed.
                        container.removers.push(tokio::sync::oneshot::channel().0);
                    }
                    container.heirs.push(Heir { spec, log_directory, reply });
                }
                // A retry whose first answer was lost on its way, by the client's death or ours: it gets what was made.
                Phase::Created if container.stopping.is_none() && container.is_of(&spec) => answer(out, reply, Ok(id.clone())),
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
        self.containers.insert(id.clone(), Box::new(container));
        out.tasks.push(Task::Create { id, spec, log_directory, live });
    }

    pub(super) fn start(&mut self, id: &ContainerId, reply: Reply<()>, out: &mut Outbox) {
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

    pub(super) fn stop_container(
        &mut self,
        id: &ContainerId,
        now: Instant,
        timeout: Duration,
        reply: Reply<()>,
        out: &mut Outbox,
    ) {
        let deadline = now + timeout;
        let live = self.live().cloned();
        match self.containers.get_mut(id) {
            Some(container) if matches!(container.phase, Phase::Running | Phase::Starting) => {
                container.stoppers.push(reply);
                match &mut container.stopping {
                    Some(stopping) => stopping.deadline = stopping.deadline.min(deadline),
                    None => {
                        container.stopping = Some(Stopping { deadline, killed: false, again: false });
                        let signal = container.facts.as_ref().map_or(15, |f| f.stop_signal);
                        // Without time to end there is nothing to ask: it is killed below.
                        if let Some(live) = live.filter(|_| !timeout.is_zero()) {
                            out.tasks.push(Task::Signal { id: id.clone(), pid: container.pid, signal, live });
                        }
                    }
                }
            }
            // Created, exited, unknown: nothing to stop.
            _ => answer(out, reply, Ok(())),
        }
    }

    pub(super) fn remove_container(&mut self, id: &ContainerId, reply: Reply<()>, now: Instant, out: &mut Outbox) {
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

    pub(super) fn update(
        &mut self,
        id: &ContainerId,
        resources: Box<Resources>,
        by_plugin: bool,
        reply: Reply<()>,
        out: &mut Outbox,
    ) {
        if let Some(container) = self.containers.get_mut(id).filter(|container| container.updating) {
            container.updates.push_back((resources, by_plugin, reply));
            return;
        }
        match self.alive(id, false) {
            Ok((container, live)) => {
                let merged = Box::new(container.resources.merged(&resources));
                out.tasks.push(Task::Update { id: id.clone(), resources, merged, by_plugin, reply, live });
                if let Some(container) = self.containers.get_mut(id) {
                    container.updating = true;
                }
            }
            Err(error) => answer(out, reply, Err(error.into())),
        }
    }

    pub(super) fn updated(
        &mut self,
        id: ContainerId,
        resources: Resources,
        reply: Reply<()>,
        result: Result<(), Error>,
        out: &mut Outbox,
    ) {
        let waiting = match self.containers.get_mut(&id) {
            Some(container) => {
                container.updating = false;
                if result.is_ok() {
                    container.resources = resources;
                    out.changed.push(id.clone());
                }
                std::mem::take(&mut container.updates)
            }
            None => Default::default(),
        };
        answer(out, reply, result.map_err(Arc::new));
        for (resources, by_plugin, reply) in waiting {
            self.update(&id, resources, by_plugin, reply, out);
        }
    }

    /// Begins a checkpoint; a container has one at a time. A stop lets it go on for as long as the container may.
    pub(super) fn checkpoint(&mut self, id: &ContainerId, wanted: Box<Wanted>, reply: Reply<()>, out: &mut Outbox) {
        let state = |state, wanted| Error::State { kind: "container", id: id.as_str().into(), state, wanted };
        let free = match self.alive(id, true) {
            Ok((container, _)) if !matches!(container.checkpoint, Checkpoint::None) => {
                Err(state("being checkpointed", "one checkpoint at a time"))
            }
            Ok((container, _)) if container.stopping.is_some() || self.goal != Goal::Run => {
                Err(state("being stopped", "only running containers can be checkpointed"))
            }
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
        match (free, self.containers.get_mut(id)) {
            (Ok(()), Some(container)) => {
                let cut = CancellationToken::new();
                container.checkpoint = Checkpoint::Under { _cut: cut.clone().drop_guard() };
                out.tasks.push(Task::Checkpoint { id: id.clone(), wanted, cut, reply });
            }
            (Err(error), _) => answer(out, reply, Err(error.into())),
            (Ok(()), None) => {}
        }
    }

    /// Ends the checkpoints of containers that are killed, or have ended.
    pub(super) fn cut_checkpoints(&mut self) {
        for container in self.containers.values_mut() {
            let goes_on = matches!(container.phase, Phase::Running) && !container.stopping.as_ref().is_some_and(|s| s.killed);
            if !goes_on && matches!(container.checkpoint, Checkpoint::Under { .. }) {
                container.checkpoint = Checkpoint::Ending;
            }
        }
    }

    pub(super) fn created(&mut self, id: ContainerId, result: Result<CreatedContainer, Error>, out: &mut Outbox) {
        let buried = !matches!(self.lifecycle, Lifecycle::Ready(_) | Lifecycle::Burying(_));
        match result {
            Ok(made) => {
                let Some(container) = self.containers.get_mut(&id) else { return };
                container.phase = Phase::Created;
                // Plugins may have changed them.
                container.resources = made.facts.spec.resources.clone().unwrap_or_default();
                container.facts = Some(made.facts);
                container.created_at = made.created_at;
                container.pid = Some(made.pid);
                container.hold = made.hold;
                for reply in std::mem::take(&mut container.creators) {
                    answer(out, reply, Ok(id.clone()));
                }
                if let Some(exit) = container.early_exit.take() {
                    container.pid = None;
                    container.phase = Phase::Exited(exit_record(&exit));
                } else if buried {
                    // The shim had answered and died, and its pod was buried before this was heard.
                    container.pid = None;
                    container.phase = Phase::Exited(lost((self.now)()));
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

    pub(super) fn started(&mut self, id: &ContainerId, at: i64, result: Result<(), Error>, out: &mut Outbox) {
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

    pub(super) fn exited(&mut self, id: &ContainerId, exit: ProcessExit, out: &mut Outbox) {
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

    pub(super) fn deleted(&mut self, id: ContainerId, result: Result<(), Error>, out: &mut Outbox) {
        let Some(container) = self.containers.get_mut(&id) else { return };
        container.deleting = false;
        let result = result.map_err(Arc::new);
        answer_all(out, &mut container.removers, &result);
        match result {
            Ok(()) => {
                let heirs = self.containers.remove(&id).map(|c| c.heirs).unwrap_or_default();
                out.events.push((id.as_str().into(), Change::Deleted));
                out.gone.push(id);
                for Heir { spec, log_directory, reply } in heirs {
                    self.create(spec, log_directory, reply, out);
                }
            }
            Err(error) => {
                for heir in std::mem::take(&mut container.heirs) {
                    answer(out, heir.reply, Err(error.clone()));
                }
                if self.goal == Goal::Remove {
                    self.goal = Goal::Run;
                    self.not_removed(&error, out);
                }
            }
        }
    }
}
