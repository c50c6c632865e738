//! The crate's error: one variant per failed operation.

use std::io;
use std::path::PathBuf;

use crate::path::CgroupPath;

/// A result whose error names the failed operation.
pub type Result<T> = std::result::Result<T, Error>;

/// A failed operation on control groups.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The mount table could not be read.
    #[error("find the mounted cgroup hierarchies")]
    Layout {
        /// Why.
        #[source]
        source: berth_linux::Error,
    },
    /// No hierarchy is mounted.
    #[error("no cgroup hierarchy is mounted")]
    NotMounted,
    /// A text is no cgroup path.
    #[error("bad cgroup path {path:?}: {reason}")]
    BadPath {
        /// The text.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// systemd did not do it.
    #[error("{action} the systemd unit {unit}")]
    Systemd {
        /// What was to be done.
        action: &'static str,
        /// The unit.
        unit: String,
        /// Why not.
        #[source]
        source: crate::systemd::Failure,
    },
    /// A scope of systemd's is made of a process, and there is none yet.
    #[error("cgroup {path}: a scope of systemd's can not be made without a process")]
    NoProcess {
        /// The path.
        path: CgroupPath,
    },
    /// The cgroup does not exist in any hierarchy.
    #[error("cgroup {path} does not exist")]
    NotFound {
        /// The path.
        path: CgroupPath,
    },
    /// A cgroup's folder could not be made.
    #[error("create cgroup {}", path.display())]
    Create {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A cgroup's folder could not be removed.
    #[error("delete cgroup {}", path.display())]
    Delete {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A cgroup's file could not be read.
    #[error("read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A value was refused.
    #[error("write {value:?} to {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The value.
        value: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A process could not be put into the cgroup.
    #[error("add process {pid} to cgroup {}", path.display())]
    Attach {
        /// The process; 0 is the calling one.
        pid: i32,
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A limit is asked for whose controller is not there.
    #[error("{limit} needs the cgroup controller {controller}, which is not available")]
    MissingController {
        /// The controller (or its optional part).
        controller: String,
        /// The wish, by its name in the OCI specification.
        limit: String,
    },
    /// A wish that this layout or this program cannot fulfil.
    #[error("{field} is not supported: {reason}")]
    Unsupported {
        /// The wish, by its name in the OCI specification.
        field: String,
        /// Why not.
        reason: &'static str,
    },
    /// A wish that makes no sense.
    #[error("bad value for {field}: {reason}")]
    Invalid {
        /// The wish, by its name in the OCI specification.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A memory limit below what is used now: the kernel would kill.
    #[error("memory limit {limit} is below the present use of {usage}")]
    BelowUsage {
        /// The new limit.
        limit: i64,
        /// The use.
        usage: u64,
    },
    /// The device program was refused.
    #[error("set device rules of cgroup {}", path.display())]
    DeviceProgram {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Processes could not be signalled.
    #[error("signal the processes of cgroup {}", path.display())]
    Signal {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The processes did not stop in time.
    #[error("freeze cgroup {}: the processes did not stop in time", path.display())]
    FreezeTimeout {
        /// The folder.
        path: PathBuf,
    },
    /// Out-of-memory events cannot be watched.
    #[error("watch out-of-memory events of cgroup {}", path.display())]
    OomWatch {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Error {
    /// The errno of the failed call, when it was the kernel that refused.
    #[must_use]
    pub fn raw_errno(&self) -> Option<i32> {
        match self {
            Self::Layout { source } => source.raw_errno(),
            Self::Create { source, .. }
            | Self::Delete { source, .. }
            | Self::Read { source, .. }
            | Self::Write { source, .. }
            | Self::Attach { source, .. }
            | Self::DeviceProgram { source, .. }
            | Self::Signal { source, .. }
            | Self::OomWatch { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}
