//! The state of one container.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use tokio_util::sync::DropGuard;

use super::Reply;
use crate::board::{ContainerFacts, ContainerState, Exit};
use crate::error::Error;
use crate::id::ContainerId;
use crate::spec::{ContainerSpec, Resources};

/// How a container's process ended, as the shim recorded it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ProcessExit {
    pub(crate) code: i32,
    pub(crate) oom: bool,
    pub(crate) finished_at: i64,
    /// Why the program could not be started; empty when it ran.
    pub(crate) start_error: String,
}

/// The result of a container creation.
pub(crate) struct CreatedContainer {
    pub(crate) facts: Arc<ContainerFacts>,
    pub(crate) created_at: i64,
    pub(crate) pid: i32,
    pub(crate) hold: Option<Hold>,
}

/// Keeps the images of a container: its own and its volumes'.
pub(crate) type Hold = Arc<Vec<berth_image::Hold>>;

/// A stop under way.
#[derive(Debug)]
pub(super) struct Stopping {
    pub(super) deadline: Instant,
    pub(super) killed: bool,
    /// A kill has failed: the next one waits for the deadline.
    pub(super) again: bool,
}

/// The checkpoint of a container.
#[derive(Debug)]
pub(super) enum Checkpoint {
    None,
    /// Dropping what it holds ends it.
    Under {
        _cut: DropGuard,
    },
    /// It was told to end and has not yet.
    Ending,
}

#[derive(Debug)]
pub(super) enum Phase {
    Creating,
    Created,
    Starting,
    Running,
    Exited(Exit),
}

/// A creation that waits for its name.
pub(super) struct Heir {
    pub(super) spec: Box<ContainerSpec>,
    pub(super) log_directory: String,
    pub(super) reply: Reply<ContainerId>,
}

/// A container inside the machine.
pub(crate) struct Container {
    pub(super) phase: Phase,
    pub(super) name: (String, u32),
    pub(crate) facts: Option<Arc<ContainerFacts>>,
    pub(crate) resources: Resources,
    pub(crate) created_at: i64,
    pub(crate) started_at: i64,
    pub(crate) pid: Option<i32>,
    /// The first process is being ended: once begun this only gets faster.
    pub(super) stopping: Option<Stopping>,
    /// An exit that came while the start was still under way.
    pub(super) early_exit: Option<ProcessExit>,
    /// Limits are being written; the next change waits, because it is merged with what this one leaves.
    pub(super) updating: bool,
    pub(super) updates: VecDeque<(Box<Resources>, bool, Reply<()>)>,
    pub(super) deleting: bool,
    pub(super) checkpoint: Checkpoint,
    /// Half made or half removed when the agent ended: on no list, and on its way out.
    pub(super) forlorn: bool,
    pub(super) hold: Option<Hold>,
    /// The step that is past its limit: whoever asks is told, until it ends.
    pub(super) overdue: Option<Arc<Error>>,
    /// Creations of the same name that came while this one is being removed.
    pub(super) heirs: Vec<Heir>,
    pub(super) creators: Vec<Reply<ContainerId>>,
    pub(super) starters: Vec<Reply<()>>,
    pub(super) stoppers: Vec<Reply<()>>,
    pub(super) removers: Vec<Reply<()>>,
}

impl Container {
    pub(super) fn new(name: (String, u32), resources: Resources) -> Self {
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
            updating: false,
            updates: VecDeque::new(),
            deleting: false,
            checkpoint: Checkpoint::None,
            forlorn: false,
            hold: None,
            overdue: None,
            heirs: Vec::new(),
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
        container.hold = hold;
        container
    }

    /// Whether it was made as `spec` says. The ids of image volumes were filled in since.
    pub(super) fn is_of(&self, spec: &ContainerSpec) -> bool {
        let Some(facts) = &self.facts else { return false };
        let mut made = facts.spec.clone();
        for (mine, asked) in made.mounts.iter_mut().zip(&spec.mounts) {
            if let (Some(mine), Some(asked)) = (&mut mine.image, &asked.image) {
                mine.id.clone_from(&asked.id);
            }
        }
        made == *spec
    }

    /// A container that was being made, or removed, when the agent ended: nobody may see it, and its owner removes it.
    pub(crate) fn forlorn(name: (String, u32), resources: Resources) -> Self {
        let mut container = Self::new(name, resources);
        container.phase = Phase::Exited(lost(0));
        container.forlorn = true;
        container.removers.push(tokio::sync::oneshot::channel().0);
        container
    }

    pub(super) fn has_process(&self) -> bool {
        matches!(self.phase, Phase::Created | Phase::Starting | Phase::Running)
    }

    /// A checkpoint reads and writes in the container's folder.
    pub(super) fn may_be_deleted(&self) -> bool {
        !self.deleting && matches!(self.checkpoint, Checkpoint::None)
    }

    /// Its name in the pod.
    pub(crate) fn name(&self) -> &str {
        &self.name.0
    }

    /// The state to show; none while it is being created.
    pub(crate) fn state(&self) -> Option<ContainerState> {
        match self.phase {
            _ if self.forlorn => None,
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

/// The first process is to end at once.
pub(super) fn end_now(container: &mut Container, now: Instant) {
    match &mut container.stopping {
        Some(stopping) if stopping.again => {}
        Some(stopping) => stopping.deadline = stopping.deadline.min(now),
        None => container.stopping = Some(Stopping { deadline: now, killed: false, again: false }),
    }
}

/// The end of a container that nobody saw.
pub(super) fn lost(at: i64) -> Exit {
    Exit { code: 255, finished_at: at, reason: "Unknown".into(), message: "the pod's shim died".into() }
}

/// The exit as clients are told it.
pub(crate) fn exit_record(exit: &ProcessExit) -> Exit {
    if !exit.start_error.is_empty() {
        let (finished_at, message) = (exit.finished_at, exit.start_error.clone());
        return Exit { code: 128, finished_at, reason: "StartError".into(), message };
    }
    let reason = if exit.oom {
        "OOMKilled"
    } else if exit.code == 0 {
        "Completed"
    } else {
        "Error"
    };
    Exit { code: exit.code, finished_at: exit.finished_at, reason: reason.into(), message: String::new() }
}
