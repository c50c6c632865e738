//! Drives the built berth binary in a sandbox of testkit, for the scenarios in `tests/`.
//!
//! Owns starting nodes, speaking to them as a user does, and the images they run. It links no part of berth: what it sees is
//! what a user sees.
#![allow(clippy::print_stdout, clippy::print_stderr, clippy::unwrap_used, reason = "test code")]

pub mod conformance;
pub mod containerd;
pub mod cri;
pub mod crictl;
pub mod fetch;
pub mod image;
pub mod memory;
pub mod node;
pub mod registry;
pub mod tools;

use std::process::{Command, Output};
use std::time::Duration;

/// How long anything may take that needs the machine to do some work.
pub const SOON: Duration = Duration::from_secs(30);

/// Runs a command to its end and returns its standard output.
///
/// # Panics
/// When it cannot be run or fails; the message holds what it wrote.
pub fn output(command: &mut Command) -> String {
    let out = try_output(command);
    assert!(out.status.success(), "{command:?}: {}\n{}{}", out.status, text(&out.stdout), text(&out.stderr));
    text(&out.stdout)
}

/// Runs a command to its end.
///
/// # Panics
/// When it cannot be run.
pub fn try_output(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// Bytes as text.
#[must_use]
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
