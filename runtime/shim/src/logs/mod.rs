//! Container logs: the messages between the shim and its log writer, a forked process that alone touches storage.

pub mod file;
pub mod format;
pub mod writer;

use berth_shim::protocol::LogSpec;
use serde::{Deserialize, Serialize};

/// From the shim to the writer.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToWriter {
    /// Read a container's output from now on. Descriptors: stdout and stderr, or the terminal master alone.
    /// Answered with [`FromWriter::Opened`].
    Add {
        /// Container.
        id: String,
        /// Where to; `None` = to taps only.
        log: Option<LogSpec>,
    },
    /// Open the log file anew. Answered with [`FromWriter::Reopened`].
    Reopen {
        /// Container.
        id: String,
        /// Comes back in the answer.
        ticket: u64,
    },
    /// Copy a stream to a pipe. Descriptor: its write end, non-blocking.
    Tap {
        /// Container.
        id: String,
        /// Standard error output instead of standard output.
        stderr: bool,
    },
    /// Write what has come so far and let go of the container.
    Remove {
        /// Container.
        id: String,
    },
}

/// From the writer to the shim.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromWriter {
    /// The log file is open, or why not (the output is read nevertheless).
    Opened {
        /// Container.
        id: String,
        /// Why it could not be opened.
        error: Option<LogError>,
    },
    /// The answer to a reopen.
    Reopened {
        /// Of the request.
        ticket: u64,
        /// Why the old file stays in use.
        error: Option<LogError>,
    },
    /// All output of a container has been read and written.
    Drained {
        /// Container.
        id: String,
    },
    /// Bytes were lost since the last such message.
    Dropped {
        /// How many.
        bytes: u64,
    },
}

/// Why a log file could not be opened.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LogError {
    /// For the user.
    pub message: String,
    /// The system's error number.
    pub errno: Option<i32>,
}
