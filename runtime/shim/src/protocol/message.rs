//! Requests, replies and events of version 1, with the positions of their descriptors. Data only.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Position of a descriptor among those of the same frame.
pub type FdIndex = u32;

/// What the agent sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ToShim {
    /// Chosen by the agent, comes back in the reply. Replies may come in another order than requests.
    pub seq: u64,
    /// What to do.
    pub request: Request,
}

/// What the shim sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromShim {
    /// The answer to one request.
    Reply {
        /// Of the request.
        seq: u64,
        /// The answer.
        reply: Reply,
    },
    /// Something happened (to subscribers; exec events: to the connection that owns the exec).
    Event(Event),
}

/// A request. Container and exec ids are chosen by the agent; exec ids are unique among the execs of one shim.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(clippy::large_enum_variant, reason = "a request is read, handled and dropped; none is kept")]
pub enum Request {
    /// First request of a connection. → [`Reply::Hello`].
    Hello {
        /// [`super::VERSION`] of the agent.
        version: u32,
    },
    /// The pod's namespaces. → [`Reply::Namespaces`] with descriptors.
    Namespaces,
    /// Makes a container: its init waits at the gate when the reply comes. Descriptors: 0 = memfd with the OCI spec as
    /// JSON, the others where [`CreateExt`] says. → [`Reply::Created`]. On failure nothing is left.
    Create {
        /// New container's id.
        id: String,
        /// What an OCI spec cannot say.
        ext: CreateExt,
    },
    /// Opens the gate; the reply comes when `execve` has succeeded or failed. → [`Reply::Started`], or an error of kind
    /// [`FailureKind::Start`] (the container is exited then, with code 128).
    Start {
        /// Container.
        id: String,
    },
    /// Sends a signal. Nothing left to signal = success. → [`Reply::Done`].
    Kill {
        /// Container.
        id: String,
        /// Only this exec of it.
        exec: Option<String>,
        /// Signal number, 1 to 64.
        signal: i32,
        /// Every process of the container's cgroup (with SIGKILL), or of the exec's process tree, instead of the first process alone.
        all: bool,
    },
    /// Runs a process in a running container. Descriptors: 0 = memfd with an [`ExecSpec`] as JSON. The reply comes when
    /// `execve` has succeeded or failed. → [`Reply::Execed`] with descriptors, later [`Event::ExecExited`] on this
    /// connection. When this connection closes, the exec and its children are killed.
    Exec {
        /// Container.
        container: String,
        /// New exec's id.
        id: String,
        /// What else to know.
        ext: ExecExt,
    },
    /// Taps a container's output, and hands out its stdin. → [`Reply::Attached`] with descriptors.
    Attach {
        /// Container.
        id: String,
        /// Wants to write stdin (not given if the container has none, or if it was closed).
        stdin: bool,
        /// Wants stdout (with a tty: everything).
        stdout: bool,
        /// Wants stderr (never with a tty).
        stderr: bool,
    },
    /// Sets the size of a terminal. → [`Reply::Done`].
    Resize {
        /// Container.
        id: String,
        /// The terminal of this exec of it: refused, it is with whoever asked for the exec. Kept for agents before this was so.
        exec: Option<String>,
        /// Columns.
        width: u16,
        /// Lines.
        height: u16,
    },
    /// The shim lets go of the container's stdin: end of file for it, once attached writers have closed theirs too.
    /// → [`Reply::Done`].
    CloseStdin {
        /// Container.
        id: String,
    },
    /// Opens the log file anew at its path (it has been renamed, or is gone). → [`Reply::Done`] when the new file exists and
    /// the old one gets no more bytes; an error leaves the old one in use and makes no file.
    ReopenLog {
        /// Container.
        id: String,
    },
    /// Everything a new agent has to know. → [`Reply::State`].
    State,
    /// Forgets an exited container: cgroup and exit record are removed. Unknown id = success. → [`Reply::Done`].
    Delete {
        /// Container.
        id: String,
        /// Kill it first when it lives (an unstarted one too); else that is an error.
        force: bool,
    },
    /// From now on this connection gets the events. Subscribe first, then ask for the state: nothing is missed.
    /// → [`Reply::Done`].
    Subscribe,
    /// Ends the shim with its pause process. → [`Reply::Done`], then the shim exits. With containers that have not been
    /// deleted an error, unless `force`: they are killed and their cgroups removed first.
    Shutdown {
        /// Kill what is left.
        force: bool,
    },
}

/// The namespace kinds of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PodNamespace {
    /// Network.
    Net,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Host name.
    Uts,
    /// Processes (pause is its PID 1).
    Pid,
    /// User and group ids.
    User,
}

/// Which PID namespace a container gets.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PidMode {
    /// A new one of its own.
    #[default]
    Container,
    /// The pod's (needs [`super::config::SandboxConfig::share_pid`]).
    Pod,
    /// The host's.
    Node,
    /// That of another container of this shim.
    Target(String),
}

/// The root filesystem.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Root {
    /// `root.path` of the spec, which must be absolute.
    #[default]
    Spec,
    /// An overlay, mounted for this container alone.
    Overlay {
        /// Descriptor of the folder that holds the layers' links.
        dir: FdIndex,
        /// Names in it, top layer first.
        lowers: Vec<String>,
        /// Upper folder (absolute).
        upper: PathBuf,
        /// Work folder (absolute).
        work: PathBuf,
        /// Mount option of the same name.
        volatile: bool,
    },
}

/// Who makes a container and its execs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Runner {
    /// The shim itself.
    #[default]
    Builtin,
    /// Another OCI runtime.
    External(ExternalRuntime),
}

/// An OCI runtime with runc's command line, whose containers' first process is left to the caller as a child.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ExternalRuntime {
    /// The handler's name, for messages.
    pub name: String,
    /// Its program.
    pub path: PathBuf,
    /// Arguments before all others.
    pub args: Vec<String>,
    /// Where it keeps its state (`--root`): a folder of the sandbox's own.
    pub root: PathBuf,
    /// The cgroup path is one of systemd's (`--systemd-cgroup`).
    pub systemd_cgroup: bool,
    /// How long one call may take; 0 = the shim's own limit.
    pub deadline_ms: u64,
}

/// A log file in CRI format, written by the shim's log writer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogSpec {
    /// Absolute; missing folders are made.
    pub path: PathBuf,
    /// Rotate when the file would get longer; 0 or absent = never (the kubelet does it).
    #[serde(default)]
    pub max_bytes: u64,
    /// How many files to keep when rotating, the current one included; less than 2 = 2.
    #[serde(default)]
    pub max_files: u32,
}

/// What [`Request::Create`] needs beside the OCI spec.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct CreateExt {
    /// Folder that relative paths of the spec start from, told to hooks; empty = none.
    pub bundle: PathBuf,
    /// Who makes the container. A shim of before this field makes it itself: its pods have no other handler.
    pub runner: Runner,
    /// Root filesystem.
    pub root: Root,
    /// Memfd with the compiled filter of `linux.seccomp` (a `berth_oci::seccomp::Filter` as JSON); absent = compiled from
    /// the spec each time.
    pub filter: Option<FdIndex>,
    /// The container's cgroup as text; empty = none is made. `linux.cgroupsPath` of the spec is ignored.
    pub cgroup: String,
    /// Log file; `None` = output can be attached to but is not kept.
    pub log: Option<LogSpec>,
    /// The container has a stdin (a pipe, or the terminal); else it is `/dev/null`.
    pub stdin: bool,
    /// Stdin belongs to the first one who attaches to it: when that one closes it, the container sees the end of the file.
    pub stdin_once: bool,
    /// Standard streams are a terminal (the spec's `process.terminal` must say the same).
    pub tty: bool,
    /// First size of the terminal: columns, lines; 0, 0 = not set.
    pub console_size: (u16, u16),
    /// Mounts of the spec, by destination, whose source is a detached mount (`open_tree(OPEN_TREE_CLONE)`).
    pub mounts: BTreeMap<String, FdIndex>,
    /// Give the pod's `/dev/shm` for the mount of the spec with that destination.
    pub shm: bool,
    /// PID namespace.
    pub pid: PidMode,
    /// Pod namespaces that the container does not join (it joins all others that the pod has; the PID namespace goes by
    /// [`CreateExt::pid`]). The spec's `linux.namespaces` lists the kinds without paths.
    pub stay_out: Vec<PodNamespace>,
}

/// What [`Request::Exec`] needs beside the process.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ExecExt {
    /// A stdin pipe is wanted (implied by a tty); else it is `/dev/null`.
    pub stdin: bool,
    /// Standard streams are a terminal.
    pub tty: bool,
    /// First size of the terminal: columns, lines; 0, 0 = not set.
    pub console_size: (u16, u16),
}

/// Content of the memfd of [`Request::Exec`], as JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExecSpec {
    /// What to run.
    pub process: berth_oci::spec::Process,
    /// The container's system call filter; absent = unconfined.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<berth_oci::seccomp::Filter>,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To [`Request::Hello`].
    Hello {
        /// Highest version that the shim speaks.
        version: u32,
        /// The shim's process.
        pid: i32,
        /// Its sandbox.
        sandbox_id: String,
    },
    /// To [`Request::Namespaces`]. Descriptors: one namespace each, in the order of `kinds`; then the pidfd of pause, if there
    /// is one. A namespace of the host's is not in the list.
    Namespaces {
        /// What the pod has of its own.
        kinds: Vec<PodNamespace>,
        /// Process id of pause; its pidfd is the last descriptor.
        pause: Option<i32>,
    },
    /// To [`Request::Create`].
    Created {
        /// The container's first process.
        pid: i32,
        /// What could not be done as asked and was left: one sentence each, for the log.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        warnings: Vec<String>,
    },
    /// To [`Request::Start`].
    Started {
        /// When the gate was opened, unix time in nanoseconds.
        started_at_ns: i64,
    },
    /// To [`Request::Exec`]. Descriptors where the indexes say. With a terminal there is only `console`.
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
    /// To [`Request::Attach`]. Descriptors where the indexes say. The output descriptors are read ends of pipes, one per
    /// stream, that end when the container's output does, or early when the reader is too slow.
    Attached {
        /// Write end of stdin, or the terminal master (write only to it; its output comes by `stdout`).
        stdin: Option<FdIndex>,
        /// Stdout.
        stdout: Option<FdIndex>,
        /// Stderr.
        stderr: Option<FdIndex>,
    },
    /// To [`Request::State`].
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
    /// Being made; [`Request::Create`] has not been answered.
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
