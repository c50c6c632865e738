//! The OCI runtime core: a runtime spec becomes a plan, the plan becomes a process.
//!
//! It knows containers and bundles; it knows no pod, no image and no CRI.

mod error;
mod launch;
mod pending;
pub mod seccomp;
pub mod spec;

pub use error::Error;
pub use launch::{ExecLaunch, Gate, Init, Launch, Parentage, RootSource, StartError, Stdio, exec, launch, read_started};
