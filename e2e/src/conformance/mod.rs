//! The conformance table: every field of a pod, what berth makes of it, and the scenarios that prove it on a real node.

pub mod model;
pub mod run;
pub mod scenario;
pub mod table;

use std::path::{Path, PathBuf};

/// The folder of the table and the scenarios.
#[must_use]
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance")
}
