//! What is past its limit, and what a shim does that answers nobody. A step that may not be given up goes on; those who wait for
//! it are told which one it is, and so is everybody who asks while it lasts. A pod that is to end never waits for its shim: the
//! shim is killed, and the pod ends with it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::container::Phase;
use super::{Change, Done, Fate, Goal, H, Lifecycle, Machine, Outbox, Task, answer, answer_all};
use crate::error::Error;
use crate::id::ContainerId;

/// After a kill that failed, and after one that was not answered: the next try.
const KILL_AGAIN: Duration = Duration::from_millis(200);
const KILL_AGAIN_UNANSWERED: Duration = Duration::from_secs(5);

impl Machine {
    /// A step has passed its limit.
    pub(super) fn is_late(&mut self, container: Option<ContainerId>, error: Arc<Error>) {
        match container.map(|id| self.containers.get_mut(&id)) {
            Some(Some(container)) => container.overdue = Some(error),
            // It was over before we heard of it.
            Some(None) => {}
            None => self.overdue = Some(error),
        }
    }

    /// What has ended is late no more.
    pub(super) fn no_longer_late(&mut self, done: &Done) {
        match done {
            Done::Created { id, .. }
            | Done::Started { id, .. }
            | Done::Deleted { id, .. }
            | Done::Checkpointed { id, .. }
            | Done::Signalled { id, .. }
            | Done::Updated { id, .. } => {
                if let Some(container) = self.containers.get_mut(id) {
                    container.overdue = None;
                }
            }
            _ => self.overdue = None,
        }
    }

    /// Whether the shim keeps the end of the pod waiting.
    fn held_up(&self) -> bool {
        self.containers.values().any(|c| c.overdue.is_some() && !matches!(c.phase, Phase::Exited(_)))
    }

    /// Answers those who wait for what is late. What they asked for stays asked.
    pub(super) fn tell_the_late(&mut self, out: &mut Outbox) {
        let live = self.live().filter(|_| self.goal >= Goal::Stop && !self.killing && self.overdue.is_none() && self.held_up());
        if let Some(live) = live.cloned() {
            self.killing = true;
            out.tasks.push(Task::KillShim { live });
        }
        let mut inside = None;
        for container in self.containers.values_mut() {
            let Some(error) = container.overdue.clone() else { continue };
            for reply in container.creators.drain(..) {
                answer(out, reply, Err(error.clone()));
            }
            let result = Err(error.clone());
            answer_all(out, &mut container.starters, &result);
            answer_all(out, &mut container.stoppers, &result);
            answer_all(out, &mut container.removers, &result);
            inside = Some(error);
        }
        if let Some(error) = self.overdue.clone() {
            for reply in self.runners.drain(..) {
                answer(out, reply, Err(error.clone()));
            }
            answer_all(out, &mut self.stoppers, &Err(error.clone()));
            self.not_removed(&error, out);
        } else if let (Some(error), Lifecycle::NotReady(None)) = (inside, &self.lifecycle) {
            // All but what is stuck is done.
            self.not_removed(&error, out);
        }
    }

    /// A signal or a kill has been delivered, or not.
    pub(super) fn signalled(&mut self, id: &ContainerId, result: Result<(), Error>, now: Instant, out: &mut Outbox) {
        let silent = self.live().is_some_and(|live| live.is_silent());
        let (Err(error), Some(container)) = (result, self.containers.get_mut(id)) else { return };
        tracing::debug!(container = %id, error = %crate::error::text(&error), "signal not delivered");
        // Or not even asked: of a shim that was silent when the agent came there is nobody to ask.
        let unanswered = matches!(error, Error::Overdue { .. }) || silent && matches!(error, Error::ShimGone { .. });
        // What can not be signalled is killed at its deadline; a failed kill is tried again a little later.
        let Some(stopping) = container.stopping.as_mut().filter(|s| s.killed) else { return };
        stopping.killed = false;
        stopping.again = true;
        stopping.deadline = now + if unanswered { KILL_AGAIN_UNANSWERED } else { KILL_AGAIN };
        if unanswered && container.has_process() {
            let error = Arc::new(error);
            answer_all(out, &mut container.stoppers, &Err(error.clone()));
            answer_all(out, &mut container.removers, &Err(error.clone()));
            container.overdue = Some(error);
        }
    }

    /// A shim that was silent at the agent's start has answered: what it knows counts.
    pub(super) fn reached(&mut self, live: Arc<H>, fates: &BTreeMap<ContainerId, Fate>, out: &mut Outbox) {
        if !matches!(self.lifecycle, Lifecycle::Ready(_)) {
            return;
        }
        self.lifecycle = Lifecycle::Ready(live);
        out.sandbox_changed = true;
        let ids: Vec<ContainerId> = self.containers.keys().cloned().collect();
        for id in ids {
            let (Some(container), fate) = (self.containers.get_mut(&id), fates.get(&id)) else { continue };
            if !container.has_process() {
                continue;
            }
            container.overdue = None;
            out.changed.push(id.clone());
            let Some(fate) = fate else {
                // The shim has never heard of it.
                let lost = super::ProcessExit { code: 255, oom: false, finished_at: (self.now)(), start_error: String::new() };
                self.exited(&id, lost, out);
                continue;
            };
            container.pid = fate.pid;
            if fate.started_at != 0 && matches!(container.phase, Phase::Created) {
                container.started_at = fate.started_at;
                container.phase = Phase::Running;
                out.events.push((id.as_str().into(), Change::Started));
            }
            if let Some(exit) = fate.exit.clone() {
                self.exited(&id, exit, out);
            }
        }
        if self.live().is_some_and(|live| live.is_dead()) {
            self.shim_gone(out);
        }
    }
}
