//! The crate's error.

use std::io;
use std::path::PathBuf;

/// What failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The spec asks for something that is wrong or that berth does not do.
    #[error("{field}: {reason}")]
    Spec {
        /// The field, as a path like `linux.seccomp.listenerPath`.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The root filesystem could not be opened or mounted.
    #[error("prepare root filesystem {path}")]
    Root {
        /// Where it is.
        path: PathBuf,
        /// Why not.
        #[source]
        source: berth_linux::Error,
    },
    /// What is to be mounted could not be opened or mapped.
    #[error("prepare mount of {path}")]
    Bind {
        /// Where it is on the host.
        path: PathBuf,
        /// Why not.
        #[source]
        source: berth_linux::Error,
    },
    /// The file system of a mount takes no part in mappings of ids.
    #[error("map the ids of mount {path}: its file system does not support that with this kernel (tmpfs does since 6.3)")]
    IdmapUnsupported {
        /// Where it is in the container.
        path: PathBuf,
        /// Why not.
        #[source]
        source: berth_linux::Error,
    },
    /// A namespace could not be opened or entered.
    #[error("namespace")]
    Namespace(#[source] berth_linux::Error),
    /// A file that the process needs could not be opened.
    #[error("open {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A descriptor that is to be passed on was not passed to us.
    #[error("descriptor {number} is to be preserved but was not passed to this program")]
    Preserve {
        /// Its number.
        number: i32,
    },
    /// The process could not be made.
    #[error("make the container's process")]
    Clone(#[source] io::Error),
    /// A pipe or socket to the new process failed.
    #[error("talk to the container's process")]
    Channel(#[source] io::Error),
    /// The process could not be put into its control group.
    #[error("join control group")]
    Cgroup(#[source] berth_cgroup::Error),
    /// The id maps of the user namespace could not be written.
    #[error("map user and group ids")]
    IdMap(#[source] berth_linux::Error),
    /// The new process failed before its gate.
    #[error("{message}")]
    Init {
        /// What failed in it, with its causes.
        message: String,
    },
    /// The new process was killed before its gate, for want of memory.
    #[error(
        "the container's process was killed before it could start: a memory limit of {limit} bytes is too small to start a process"
    )]
    MemoryLimit {
        /// The limit that was asked for, in bytes.
        limit: i64,
    },
    /// A hook failed.
    #[error("error running {point} hook #{index}: {reason}")]
    Hook {
        /// The point of the container's life, by the specification's name.
        point: &'static str,
        /// Which one of its hooks.
        index: usize,
        /// Why, with what it wrote on its error output.
        reason: String,
    },
}

/// An error's text with all its causes, in one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// An errno in the words that C programs and runc use: `no such file or directory`.
#[must_use]
pub fn errno_text(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or_default();
    let mut chars = text.chars();
    chars.next().map(|first| first.to_lowercase().chain(chars).collect()).unwrap_or_default()
}
