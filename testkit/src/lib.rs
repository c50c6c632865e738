//! Development only: throw-away namespaces, bounded waits, root filesystems and images made from files.
//!
//! Owns what tests of several crates share. It must not know berth: nothing here names a berth type, so that every crate can
//! depend on it.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tests are told what happens")]

pub mod editors;
pub mod image;
pub mod registry;
pub mod rootfs;
pub mod sandbox;
mod skip;
mod state;
mod wait;

pub use sandbox::{Sandbox, in_namespaces};
pub use skip::{report_measured, report_skip};
pub use state::{TempState, write_program};
pub use wait::{patience, wait_for, wait_until};
