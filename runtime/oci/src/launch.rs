//! Making a container's first process, up to the gate at which it waits for its start, and making further processes
//! in a container. What is public here is plain values: nothing is read from disk but what the spec names.

mod heard;
mod maker;
mod root;
mod start;
mod trees;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use berth_cgroup::{Cgroup, Placement};
use berth_linux::ns::NamespaceKind;
use rustix::process::Pid;
use serde::{Deserialize, Serialize};

use crate::seccomp::Filter;
use crate::spec::{Process, Spec};

pub use heard::Heard;
pub use root::open_root;
pub use start::{become_exec, exec, launch, tell_failure};

/// Everything that makes a container. The caller keeps none of the descriptors.
#[derive(Debug)]
pub struct Launch {
    /// The container's id: told to hooks, part of messages.
    pub id: String,
    /// The folder that relative paths of the spec start from; told to hooks.
    pub bundle: PathBuf,
    /// What to make.
    pub spec: Spec,
    /// Where the root filesystem comes from.
    pub root: RootSource,
    /// The control group, prepared by the caller. None: the caller's own.
    pub cgroup: Option<Placement>,
    /// Namespaces to enter, by descriptor. They win over `linux.namespaces` entries of their kind.
    pub join: Vec<(NamespaceKind, OwnedFd)>,
    /// Detached mount trees by the destination of the spec's mount that they are the source of (`open_tree` with clone,
    /// done by someone who sees the right mount namespace). Read-only and propagation options of the mount are applied to them.
    pub mounts: BTreeMap<String, OwnedFd>,
    /// Standard streams.
    pub stdio: Stdio,
    /// What holds the process back until its start.
    pub gate: Gate,
    /// Whose child it becomes.
    pub parent: Parentage,
    /// The compiled filter of `linux.seccomp`, when the caller has it (a cache). None: it is compiled here.
    pub filter: Option<Filter>,
    /// How many descriptors from 3 on are passed to the process (`--preserve-fds`). Each must have been passed to the launcher by its own starter.
    pub preserve_fds: u32,
    /// Whether the process gets a session keyring of its own.
    pub new_keyring: bool,
}

/// Where a root filesystem comes from.
#[derive(Debug)]
pub enum RootSource {
    /// `root.path` of the spec.
    Spec,
    /// An overlay that is mounted for this container alone, in its own mount namespace.
    Overlay {
        /// The folder that the lower names are relative to.
        dir: OwnedFd,
        /// Lower folders, the topmost first.
        lowers: Vec<String>,
        /// The writable folder, absolute.
        upper: PathBuf,
        /// The overlay's work folder, absolute, on the same filesystem.
        work: PathBuf,
        /// Whether syncing is left out: what a crash of the machine leaves behind is thrown away anyway.
        volatile: bool,
    },
}

/// Standard streams of a process.
#[derive(Debug)]
pub enum Stdio {
    /// Input, output and error output.
    Fds([OwnedFd; 3]),
    /// A new pseudo terminal of the container's own devpts. [`Init::console`] is its master.
    Pty {
        /// Columns; 0 leaves it.
        width: u16,
        /// Lines; 0 leaves it.
        height: u16,
    },
}

/// What a ready process waits for.
#[derive(Debug)]
pub enum Gate {
    /// One byte from this pipe starts it, its end makes it exit.
    Pipe(OwnedFd),
    /// One byte written to this fifo starts it. Its failure to start can be read from the fifo of the same name with `.report`
    /// behind it; both must exist. For starters that are not the maker of the process.
    ExecFifo(PathBuf),
    /// Nothing: it starts at once.
    Open,
}

/// Whose child a process becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parentage {
    /// The caller's.
    Caller,
    /// The caller's parent's: the caller is a short-lived fork of the process that will reap the container. In one case (a new PID
    /// namespace inside a user namespace that is joined) that parent also gets a helper process to reap, which ends at once.
    CallersParent,
}

/// A process that is ready at its gate.
#[derive(Debug)]
pub struct Init {
    /// Its process id as the caller sees it.
    pub pid: Pid,
    /// Its descriptor.
    pub pidfd: OwnedFd,
    /// The master of its terminal, when [`Stdio::Pty`] was asked for.
    pub console: Option<OwnedFd>,
    /// End of file when it was executed, otherwise one JSON [`StartError`] first. See [`read_started`].
    pub started: OwnedFd,
    /// What could not be done as asked and was left (one sentence each): limits above what this process may set, and the like.
    pub warnings: Vec<String>,
}

/// Why a process could not be executed, in words close to runc's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
#[serde(deny_unknown_fields)]
pub struct StartError {
    /// The user's error: what was to be executed, and why that cannot be.
    pub message: String,
    /// The error number behind it.
    pub errno: Option<i32>,
}

/// A further process in a running container.
#[derive(Debug)]
pub struct ExecLaunch {
    /// What to execute.
    pub process: Process,
    /// The container's first process: its namespaces and root are entered.
    pub init: Pid,
    /// Its descriptor, so that a reused pid is never entered.
    pub init_pidfd: OwnedFd,
    /// The container's control group.
    pub cgroup: Option<Cgroup>,
    /// The container's system call filter.
    pub filter: Option<Filter>,
    /// Standard streams.
    pub stdio: Stdio,
    /// How many descriptors from 3 on are passed, as in [`Launch::preserve_fds`].
    pub preserve_fds: u32,
}

/// Waits until the process behind [`Init::started`] was executed or could not be.
pub fn read_started(started: OwnedFd) -> Result<(), StartError> {
    let mut text = Vec::new();
    if let Err(error) = File::from(started).take(64 * 1024).read_to_end(&mut text) {
        return Err(StartError {
            message: "the report of the container's start cannot be read".into(),
            errno: error.raw_os_error(),
        });
    }
    if text.is_empty() {
        return Ok(());
    }
    Err(serde_json::from_slice(&text)
        .unwrap_or_else(|_| StartError { message: String::from_utf8_lossy(&text).into_owned(), errno: None }))
}
