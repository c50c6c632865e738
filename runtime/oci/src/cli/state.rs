//! A container's folder: what is kept of it between two commands.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use berth_cgroup::{Cgroup, CgroupPath, Layout};
use berth_linux::file;
use berth_linux::pidfd::PidFd;
use rustix::process::Pid;
use serde::{Deserialize, Serialize};

use super::Global;
use crate::spec::Spec;

/// What is written down about a container.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    /// Version of this format.
    pub(super) version: u32,
    pub(super) id: String,
    pub(super) bundle: PathBuf,
    pub(super) rootfs: PathBuf,
    pub(super) created: String,
    /// The first process, and when it began in ticks since the boot: a pid alone may be another's by now. 0 until it waits at its gate.
    pub(super) pid: i32,
    pub(super) began: u64,
    pub(super) cgroup: Option<String>,
}

/// States of a container by runc's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Creating,
    Created,
    Running,
    Paused,
    Stopped,
}

impl Status {
    pub(super) fn name(self) -> &'static str {
        match self {
            Status::Creating => "creating",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        }
    }
}

/// A container's folder.
#[derive(Debug, Clone)]
pub(super) struct Folder {
    pub(super) path: PathBuf,
}

/// Checks that an id is a plain name.
pub(super) fn check_id(id: &str) -> Result<&str, String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '+' | '-' | '.');
    match id {
        "" => Err("container id cannot be empty".into()),
        "." | ".." => Err("invalid container ID format".into()),
        id if id.chars().all(plain) && id.len() <= 1024 => Ok(id),
        _ => Err("invalid container ID format".into()),
    }
}

impl Folder {
    pub(super) fn of(global: &Global, id: &str) -> Self {
        Self { path: global.root.join(id) }
    }

    /// Makes the folder of a new container.
    pub(super) fn make(global: &Global, id: &str) -> Result<Self, String> {
        let folder = Self::of(global, id);
        let mut builder = fs::DirBuilder::new();
        builder.mode(0o711);
        builder.recursive(true).create(&global.root).map_err(|error| format!("make {}: {error}", global.root.display()))?;
        builder.recursive(false).create(&folder.path).map_err(|error| match error.kind() {
            std::io::ErrorKind::AlreadyExists => "container with given ID already exists".to_owned(),
            _ => format!("make {}: {error}", folder.path.display()),
        })?;
        Ok(folder)
    }

    pub(super) fn fifo(&self) -> PathBuf {
        self.path.join("exec.fifo")
    }

    pub(super) fn report_fifo(&self) -> PathBuf {
        self.path.join("exec.fifo.report")
    }

    pub(super) fn save<T: Serialize>(&self, name: &str, value: &T) -> Result<(), String> {
        let text = serde_json::to_vec(value).map_err(|error| format!("write {name}: {error}"))?;
        // Of root alone: the environment of a process holds secrets.
        write_whole(&self.path.join(name), &text, file::PRIVATE)
    }

    pub(super) fn record(&self) -> Result<Record, String> {
        self.load("state.json")
    }

    pub(super) fn spec(&self) -> Result<Spec, String> {
        self.load("config.json")
    }

    fn load<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<T, String> {
        let path = self.path.join(name);
        let text = fs::read(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => "container does not exist".to_owned(),
            _ => format!("read {}: {error}", path.display()),
        })?;
        serde_json::from_slice(&text).map_err(|error| format!("read {}: {error}", path.display()))
    }

    pub(super) fn remove(&self) -> Result<(), String> {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(format!("remove {}: {error}", self.path.display())),
            _ => Ok(()),
        }
    }

    /// The state, and the process when it lives.
    pub(super) fn status(&self, record: &Record) -> (Status, Option<PidFd>) {
        if record.pid == 0 {
            return (Status::Creating, None);
        }
        let Some(process) = living(record) else { return (Status::Stopped, None) };
        let frozen = open_cgroup(record).is_ok_and(|cgroup| cgroup.is_some_and(|cgroup| cgroup.is_frozen().unwrap_or(false)));
        let status = match (self.fifo().exists(), frozen) {
            (_, true) => Status::Paused,
            (true, false) => Status::Created,
            (false, false) => Status::Running,
        };
        (status, Some(process))
    }
}

/// The first process of a container by descriptor, when it is still that one and has not ended.
fn living(record: &Record) -> Option<PidFd> {
    let process = PidFd::open(Pid::from_raw(record.pid)?).ok()?;
    let (began, ended) = began(record.pid)?;
    (began == record.began && !ended).then_some(process)
}

/// When a process began, and whether it has ended and waits to be reaped.
pub(super) fn began(pid: i32) -> Option<(u64, bool)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    let ended = matches!(state, "Z" | "X" | "x");
    Some((fields.nth(18)?.parse().ok()?, ended))
}

/// The container's control group, when it has one.
pub(super) fn open_cgroup(record: &Record) -> Result<Option<Cgroup>, String> {
    let Some(path) = &record.cgroup else { return Ok(None) };
    let text = |error: berth_cgroup::Error| crate::chain(&error);
    let layout = Layout::detect().map_err(text)?;
    Ok(Some(Cgroup::at(&layout, &CgroupPath::parse(path).map_err(text)?).map_err(text)?))
}

/// Writes a file whole or not at all.
pub(super) fn write_whole(path: &Path, bytes: &[u8], mode: u32) -> Result<(), String> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    let write = || {
        file::write(&new, bytes, mode)?;
        fs::rename(&new, path)
    };
    write().map_err(|error: std::io::Error| format!("write {}: {error}", path.display()))
}
