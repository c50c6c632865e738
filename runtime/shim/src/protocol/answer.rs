//! Replies and events of version 1, and the states and records in them. Data only.

use serde::{Deserialize, Serialize};

use super::message::{FdIndex, LogSpec, PodNamespace};

/// An answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To [`Request::Hello`](super::Request::Hello).
    Hello {
        /// Highest version that the shim speaks.
        version: u32,
        /// The shim's process.
        pid: i32,
        /// Its sandbox.
        sandbox_id: String,
    },
    /// To [`Request::Namespaces`](super::Request::Namespaces). Descriptors: one namespace each, in the order of `kinds`; then the pidfd of pause, if there
    /// is one. A namespace of the host's is not in the list.
    Namespaces {
        /// What the pod has of its own.
        kinds: Vec<PodNamespace>,
        /// Process id of pause; its pidfd is the last descriptor.
        pause: Option<i32>,
    },
    /// To [`Request::Create`](super::Request::Create).
    Created {
        /// The container's first process.
        pid: i32,
        /// What could not be done as asked and was left: one sentence each, for the log.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        warnings: Vec<String>,
    },
    /// To [`Request::Start`](super::Request::Start).
    Started {
        /// When the gate was opened, unix time in nanoseconds.
        started_at_ns: i64,
    },
    /// To [`Request::Exec`](super::Request::Exec). Descriptors where the indexes say. With a terminal there is only `console`.
    Execed {
        /// The exec's first process.
        pid: i32,
        /// Write end of its stdin.
        stdin: Option<FdIndex>,
        /// Read end of its stdout.
        stdout: Option<FdIndex>,
        /// Read end of its stderr.
        stderr: Option<FdIndex>,
        /// Terminal master.
        console: Option<FdIndex>,
    },
    /// To [`Request::Attach`](super::Request::Attach). Descriptors where the indexes say. The output descriptors are read ends of pipes, one per
    /// stream, that end when the container's output does, or early when the reader is too slow.
    Attached {
        /// Write end of stdin, or the terminal master (write only to it; its output comes by `stdout`).
        stdin: Option<FdIndex>,
        /// Stdout.
        stdout: Option<FdIndex>,
        /// Stderr.
        stderr: Option<FdIndex>,
    },
    /// To [`Request::State`](super::Request::State).
    State(ShimState),
    /// To all others.
    Done,
    /// The request was not done.
    Error(Failure),
}

/// A request that was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Sort.
    pub kind: FailureKind,
    /// Text for the user.
    pub message: String,
    /// Error number of the system call behind it, if one is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub errno: Option<i32>,
}

/// Sorts of failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// No such container or exec.
    NotFound,
    /// The id is taken.
    AlreadyExists,
    /// Not in this state.
    WrongState,
    /// The request makes no sense (bad index, no descriptor, bad signal).
    Invalid,
    /// The shim does not know the request.
    Unsupported,
    /// A container or exec could not be made.
    Create,
    /// The program could not be started.
    Start,
    /// A log file could not be opened.
    Log,
    /// Anything else of the system's.
    System,
    /// A sort this version does not know.
    #[serde(other)]
    Other,
}

/// How far a container is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Being made; [`Request::Create`](super::Request::Create) has not been answered.
    Creating,
    /// Waits at the gate.
    Created,
    /// Runs, or is being started.
    Running,
    /// Has ended.
    Exited,
}

/// How a container ended; also the content of `<runtime_dir>/<container id>.exit`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// First process.
    pub pid: i32,
    /// Exit code; 128 + n for signal n.
    pub code: i32,
    /// The signal that ended it, 0 = none.
    pub signal: i32,
    /// A process of the container was killed for want of memory.
    pub oom: bool,
    /// When it was opened the gate to, unix time in nanoseconds; 0 = never.
    #[serde(default)]
    pub started_at_ns: i64,
    /// When it ended, unix time in nanoseconds.
    pub finished_at_ns: i64,
    /// Why it could not be started; empty = it was.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub start_error: String,
}

/// One container in [`ShimState`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContainerState {
    /// Its id.
    pub id: String,
    /// How far it is.
    pub phase: Phase,
    /// First process; 0 while being made.
    pub pid: i32,
    /// 0 = not started.
    pub started_at_ns: i64,
    /// When exited.
    pub exit: Option<ExitRecord>,
    /// Its cgroup, as given.
    pub cgroup: String,
    /// Its log, as given.
    pub log: Option<LogSpec>,
    /// All output has been read and written (true some time after the exit).
    pub logs_drained: bool,
    /// As given.
    pub tty: bool,
    /// As given.
    pub stdin: bool,
    /// As given.
    pub stdin_once: bool,
    /// Stdin can still be attached to.
    pub stdin_open: bool,
    /// Ids of running execs.
    pub execs: Vec<String>,
}

/// Everything a new agent has to know.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ShimState {
    /// The sandbox.
    pub sandbox_id: String,
    /// The shim's process.
    pub pid: i32,
    /// Pause, if the pod has one and it lives.
    pub pause: Option<i32>,
    /// All containers not yet deleted.
    pub containers: Vec<ContainerState>,
    /// Bytes of container output that could not be written to log files so far.
    pub log_bytes_dropped: u64,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// A container has ended, and every process of its cgroup with it. The record is on file already.
    Exited {
        /// Container.
        id: String,
        /// How.
        exit: ExitRecord,
    },
    /// The log writer has written all output of a container; comes after its end (perhaps long after, when another
    /// process holds the pipe).
    LogsDrained {
        /// Container.
        id: String,
    },
    /// An exec has ended. Only to the connection that owns it.
    ExecExited {
        /// Container.
        container: String,
        /// Exec.
        id: String,
        /// Exit code; 128 + n for signal n.
        code: i32,
        /// The signal that ended it, 0 = none.
        signal: i32,
    },
    /// The pause process has died: the pod's PID namespace is gone, its containers die with it.
    PauseExited {
        /// Its process id.
        pid: i32,
    },
}
