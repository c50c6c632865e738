//! The OCI runtime core: a runtime spec becomes a plan, the plan becomes a process.
//!
//! It knows containers and bundles; it knows no pod, no image and no CRI.

mod channel;
pub mod cli;
mod devices;
mod error;
mod hooks;
mod init;
mod launch;
pub mod plan;
pub mod seccomp;
pub mod spec;

pub use devices::default_device_rules;
pub use error::{Error, chain};
pub use hooks::{HookState, run_hooks};
pub use launch::{
    ExecLaunch, Gate, Heard, Init, Launch, Parentage, RootSource, StartError, Stdio, become_exec, exec, launch, open_root,
    read_started, tell_failure,
};
