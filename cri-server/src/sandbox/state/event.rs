//! What goes into the state machine and what comes out of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use berth_nri::Pass;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::{CreatedContainer, H, ProcessExit};
use crate::checkpoint::Wanted;
use crate::error::{Error, Shared};
use crate::id::{ContainerId, SandboxId};
use crate::spec::{ContainerSpec, Resources, SandboxSpec};

/// Where an answer goes. A client that has given up has dropped the other end.
pub(crate) type Reply<T> = oneshot::Sender<Shared<T>>;

/// New limits of a pod. What is not named stays.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Resize {
    pub(crate) resources: Option<Resources>,
    pub(crate) overhead: Option<Resources>,
}

impl Resize {
    /// The spec as it is afterwards.
    pub(super) fn applied(self, spec: &SandboxSpec) -> SandboxSpec {
        let mut spec = spec.clone();
        spec.resources = self.resources.or(spec.resources);
        spec.overhead = self.overhead.or(spec.overhead);
        spec
    }
}

/// What clients ask of a sandbox.
pub(crate) enum Op {
    /// RunPodSandbox, the first time or again with the same metadata.
    Run {
        spec: Arc<SandboxSpec>,
        reply: Reply<SandboxId>,
    },
    Stop(Reply<()>),
    Remove(Reply<()>),
    CreateContainer {
        spec: Box<ContainerSpec>,
        log_directory: String,
        reply: Reply<ContainerId>,
    },
    StartContainer {
        id: ContainerId,
        reply: Reply<()>,
    },
    StopContainer {
        id: ContainerId,
        timeout: Duration,
        reply: Reply<()>,
    },
    RemoveContainer {
        id: ContainerId,
        reply: Reply<()>,
    },
    Update {
        id: ContainerId,
        resources: Box<Resources>,
        /// An NRI plugin asks: plugins are not asked in turn.
        by_plugin: bool,
        reply: Reply<()>,
    },
    ReopenLog {
        id: ContainerId,
        reply: Reply<()>,
    },
    /// UpdatePodSandboxResources: what the pod may use in all. Its cgroup is the kubelet's.
    Resize {
        resize: Box<Resize>,
        reply: Reply<()>,
    },
    Checkpoint {
        id: ContainerId,
        wanted: Box<Wanted>,
        reply: Reply<()>,
    },
    /// What exec, attach, port-forward and statistics need.
    Live(Reply<Arc<H>>),
}

/// What a sandbox that could not be made has left.
pub(crate) enum Rest {
    Nothing,
    /// Folders and records alone.
    Folders,
    /// What of the system could not be given back.
    Held(Arc<H>),
}

/// A sandbox that could not be made.
pub(crate) struct NotMade {
    pub(crate) error: Error,
    pub(crate) rest: Rest,
}

/// Completions of tasks.
pub(crate) enum Done {
    Ran(Result<Arc<H>, NotMade>),
    Created {
        id: ContainerId,
        result: Result<CreatedContainer, Error>,
    },
    Started {
        id: ContainerId,
        at: i64,
        result: Result<(), Error>,
    },
    Signalled {
        id: ContainerId,
        result: Result<(), Error>,
    },
    Deleted {
        id: ContainerId,
        result: Result<(), Error>,
    },
    Updated {
        id: ContainerId,
        resources: Box<Resources>,
        reply: Reply<()>,
        result: Result<(), Error>,
    },
    /// Its archive is where it was wanted, or there is none.
    Checkpointed {
        id: ContainerId,
        reply: Reply<()>,
        result: Result<(), Error>,
    },
    /// The sandbox's record has the new limits, or could not be written.
    Resized {
        spec: Arc<SandboxSpec>,
        reply: Reply<()>,
        result: Result<(), Error>,
    },
    /// What was left of a dead shim's containers: the exits it still recorded.
    Lost(BTreeMap<ContainerId, ProcessExit>),
    TornDown {
        rest: Option<Arc<H>>,
        result: Result<(), Error>,
    },
    Erased(Result<(), Error>),
    /// The shim that kept a stop from going on is dead, or can not be killed.
    Killed(Result<(), Error>),
}

impl Done {
    /// How it failed.
    pub(crate) fn error(&self) -> Option<&Error> {
        match self {
            Self::Ran(result) => result.as_ref().err().map(|not_made| &not_made.error),
            Self::Created { result, .. } => result.as_ref().err(),
            Self::Started { result, .. }
            | Self::Signalled { result, .. }
            | Self::Deleted { result, .. }
            | Self::Updated { result, .. }
            | Self::TornDown { result, .. }
            | Self::Resized { result, .. }
            | Self::Checkpointed { result, .. }
            | Self::Erased(result)
            | Self::Killed(result) => result.as_ref().err(),
            Self::Lost(_) => None,
        }
    }
}

/// What can happen to a sandbox.
pub(crate) enum Event {
    Op(Op),
    /// A task is done; with the pass that it held, which is given back when everybody can see what came of it.
    Done(Done, Option<Pass>),
    /// The shim says that a container's first process ended.
    Exited {
        id: ContainerId,
        exit: ProcessExit,
    },
    /// The shim is dead.
    ShimGone,
    /// A step that is not given up is past its limit.
    Overdue {
        /// None: the sandbox itself.
        container: Option<ContainerId>,
        error: Arc<Error>,
    },
    /// A shim that did not answer at the agent's start does now.
    Reached {
        live: Arc<H>,
        fates: BTreeMap<ContainerId, Fate>,
    },
    /// A deadline has passed.
    Tick,
}

/// What a shim knows of a container that the records do not.
#[derive(Debug, Clone)]
pub(crate) struct Fate {
    pub(crate) started_at: i64,
    pub(crate) pid: Option<i32>,
    pub(crate) exit: Option<ProcessExit>,
}

/// Slow work.
pub(crate) enum Task {
    Run,
    Create {
        id: ContainerId,
        spec: Box<ContainerSpec>,
        log_directory: String,
        live: Arc<H>,
    },
    Start {
        id: ContainerId,
        live: Arc<H>,
    },
    /// To the first process alone.
    Signal {
        id: ContainerId,
        pid: Option<i32>,
        signal: i32,
        live: Arc<H>,
    },
    /// To everything in the container's cgroup.
    Kill {
        id: ContainerId,
        live: Arc<H>,
    },
    Delete {
        id: ContainerId,
        live: Option<Arc<H>>,
    },
    Update {
        id: ContainerId,
        resources: Box<Resources>,
        merged: Box<Resources>,
        by_plugin: bool,
        reply: Reply<()>,
        live: Arc<H>,
    },
    ReopenLog {
        id: ContainerId,
        reply: Reply<()>,
        live: Arc<H>,
    },
    /// Puts a changed sandbox on record.
    Resize {
        spec: Arc<SandboxSpec>,
        reply: Reply<()>,
        live: Arc<H>,
    },
    Checkpoint {
        id: ContainerId,
        wanted: Box<Wanted>,
        /// Cancelled: the container is killed, or has ended.
        cut: CancellationToken,
        reply: Reply<()>,
    },
    Bury {
        live: Arc<H>,
        containers: Vec<ContainerId>,
    },
    TearDown {
        live: Arc<H>,
        /// As in [`Self::Erase`]; it is on record as stopped from then on.
        told: bool,
    },
    Erase {
        /// Clients and plugins have heard of the sandbox: it ran.
        told: bool,
    },
    /// Of a pod that is to end and whose shim answers nobody.
    KillShim {
        live: Arc<H>,
    },
}

impl Task {
    /// Whether pods or containers come, go or change their state by it.
    pub(crate) fn changes_what_there_is(&self) -> bool {
        matches!(
            self,
            Self::Run
                | Self::Create { .. }
                | Self::Start { .. }
                | Self::Delete { .. }
                | Self::TearDown { .. }
                | Self::Erase { .. }
        )
    }
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
    /// Each sends one answer; back comes an error that nobody waits for any more.
    pub(crate) answers: Vec<Box<dyn FnOnce() -> Option<Arc<Error>> + Send>>,
    pub(crate) tasks: Vec<Task>,
    pub(crate) pass: Option<Pass>,
    /// RunPodSandbox of the same name that came while this one was being removed: for a new owner.
    pub(crate) heirs: Vec<(Arc<SandboxSpec>, Reply<SandboxId>)>,
}
