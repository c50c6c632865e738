//! The steps that nobody asks for by name: kills at their deadline, teardown and removal step by step, the end of a shim.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use super::container::{Container, Phase, end_now, exit_record, lost};
use super::{Change, Goal, Lifecycle, Machine, Outbox, ProcessExit, Task, answer_all};
use crate::error::Error;
use crate::id::ContainerId;
use crate::progress::stamp;

impl Machine {
    pub(super) fn shim_gone(&mut self, out: &mut Outbox) {
        if let Lifecycle::Ready(live) = &self.lifecycle {
            let live = live.clone();
            let containers =
                self.containers.iter().filter(|(_, c)| !matches!(c.phase, Phase::Exited(_))).map(|(id, _)| id.clone()).collect();
            out.tasks.push(Task::Bury { live: live.clone(), containers });
            self.lifecycle = Lifecycle::Burying(live);
            if self.goal == Goal::Run {
                let at = stamp((self.now)());
                self.not_ready_because = format!("its shim died at {at}, and the pod with it: killed, or out of memory");
            }
            out.sandbox_changed = true;
        }
    }

    pub(super) fn buried(&mut self, exits: &BTreeMap<ContainerId, ProcessExit>, out: &mut Outbox) {
        let at = (self.now)();
        for (id, container) in &mut self.containers {
            if matches!(container.phase, Phase::Exited(_) | Phase::Creating) {
                continue;
            }
            container.phase = Phase::Exited(exits.get(id).map_or_else(|| lost(at), exit_record));
            container.pid = None;
            let gone = Err(Arc::new(Error::ShimGone { id: self.id.as_str().into(), reason: "it died".into() }));
            answer_all(out, &mut container.starters, &gone);
            answer_all(out, &mut container.stoppers, &Ok(()));
            out.events.push((id.as_str().into(), Change::Stopped));
            out.changed.push(id.clone());
        }
        self.tell_stop(out);
        self.goal = self.goal.max(Goal::Stop);
        if let Lifecycle::Burying(live) = std::mem::replace(&mut self.lifecycle, Lifecycle::NotReady(None)) {
            self.lifecycle = Lifecycle::NotReady(Some(live));
        }
        out.sandbox_changed = true;
    }

    /// Kills what did not end in its time.
    pub(super) fn escalate(&mut self, now: Instant, out: &mut Outbox) {
        let Some(live) = self.live().cloned() else { return };
        let stop_all = self.goal >= Goal::Stop;
        for (id, container) in &mut self.containers {
            if !container.has_process() || matches!(container.phase, Phase::Starting) && container.stopping.is_none() && !stop_all
            {
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
    pub(super) fn advance(&mut self, out: &mut Outbox) {
        for (id, container) in &mut self.containers {
            let wanted = !container.removers.is_empty();
            if wanted && container.may_be_deleted() && matches!(container.phase, Phase::Exited(_)) {
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
        // A creation that is stuck on a disk ends when the disk answers; the rest of the pod does not wait for it.
        let shimless = matches!(self.lifecycle, Lifecycle::NotReady(_));
        let stuck = |c: &Container| shimless && matches!(c.phase, Phase::Creating) && c.overdue.is_some();
        let ends = |c: &Container| stuck(c) || (!c.deleting && matches!(c.phase, Phase::Exited(_)));
        let busy = self.resizing || !self.containers.values().all(|container| ends(container));
        let told = self.is_told();
        match &mut self.lifecycle {
            Lifecycle::Ready(live) if !busy => {
                out.tasks.push(Task::TearDown { live: live.clone(), told });
                self.lifecycle = Lifecycle::TearingDown;
            }
            Lifecycle::NotReady(rest @ Some(_)) if !busy => {
                if let Some(live) = rest.take() {
                    out.tasks.push(Task::TearDown { live, told });
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
    pub(super) fn erase(&mut self, out: &mut Outbox) {
        for (id, container) in &mut self.containers {
            if container.may_be_deleted() && !matches!(container.phase, Phase::Creating) {
                container.deleting = true;
                out.tasks.push(Task::Delete { id: id.clone(), live: None });
            }
        }
        if self.containers.is_empty() {
            self.lifecycle = Lifecycle::Erasing;
            out.tasks.push(Task::Erase { told: self.is_told() });
        }
    }
}
