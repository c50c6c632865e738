//! The crate's error: one variant for one failed operation, with its subject.

use std::io;
use std::path::PathBuf;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can fail while a network is configured, attached or detached.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// No usable network configuration.
    #[error("network is not ready: {reason}")]
    NotReady {
        /// Why, by file name.
        reason: String,
    },
}

#[allow(dead_code)]
fn _assert_path(_: PathBuf, _: io::Error) {}
