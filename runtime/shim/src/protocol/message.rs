//! Requests of version 1, with the positions of their descriptors, and the envelopes of both directions. Data only.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::answer::{Event, Reply};

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
