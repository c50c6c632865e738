//! What can go wrong with plugins. Must not log.

use std::path::PathBuf;

/// A failed operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Bytes on a plugin's connection that are not the protocol.
    #[error("{what}: {reason}")]
    Protocol {
        /// What was being read.
        what: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// A plugin's connection failed.
    #[error("connection to NRI plugin {plugin}")]
    Connection {
        /// The plugin.
        plugin: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A plugin's connection is closed.
    #[error("NRI plugin {plugin} is gone")]
    Closed {
        /// The plugin.
        plugin: String,
    },
    /// A plugin did not answer in time.
    #[error("NRI plugin {plugin} did not answer {call} within {millis} ms")]
    Timeout {
        /// The plugin.
        plugin: String,
        /// The call.
        call: &'static str,
        /// The time it had.
        millis: u128,
    },
    /// A plugin answered with an error.
    #[error("NRI plugin {plugin} failed {call}: {message}")]
    Refused {
        /// The plugin.
        plugin: String,
        /// The call.
        call: &'static str,
        /// Its gRPC code.
        code: i32,
        /// Its text.
        message: String,
    },
    /// A plugin may not join.
    #[error("NRI plugin {plugin} can not join: {reason}")]
    Join {
        /// The plugin.
        plugin: String,
        /// Why.
        reason: String,
    },
    /// Two plugins want one thing.
    #[error("NRI plugins {first:?} and {second:?} both tried to set {field} of container {container}")]
    Conflict {
        /// The one that was asked first.
        first: String,
        /// The one that came after it.
        second: String,
        /// What both set.
        field: String,
        /// The container.
        container: String,
    },
    /// A plugin's answer can not be meant.
    #[error("NRI plugin {plugin} asked for {what}")]
    Answer {
        /// The plugin.
        plugin: String,
        /// What it asked for.
        what: String,
    },
    /// A validating plugin said no.
    #[error("NRI plugin {plugin} rejected the container: {reason}")]
    Rejected {
        /// The plugin.
        plugin: String,
        /// Its reason.
        reason: String,
    },
    /// The socket can not be made, or a folder not be read.
    #[error("{action} {path:?}")]
    File {
        /// What was being done.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A plugin could not be started.
    #[error("start NRI plugin {path:?}")]
    Launch {
        /// The program.
        path: PathBuf,
        /// The cause.
        #[source]
        source: berth_linux::Error,
    },
    /// The relay has ended.
    #[error("the runtime is shutting down")]
    Closing,
}

impl Error {
    /// Whether the plugin is of no use any more: it is closed, and that it failed is not the container's fault.
    pub(crate) fn is_fatal(&self) -> bool {
        matches!(self, Self::Protocol { .. } | Self::Connection { .. } | Self::Closed { .. } | Self::Timeout { .. })
    }

    /// Whether the plugin has no such call.
    pub(crate) fn is_unimplemented(&self) -> bool {
        matches!(self, Self::Refused { code, .. } if *code == crate::wire::UNIMPLEMENTED)
    }
}
