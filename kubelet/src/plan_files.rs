//! What manifests would do, without doing it: the pure entry behind `berth plan FILE|DIR`.

use std::path::PathBuf;

use k8s_openapi::api::core::v1::Pod;

/// What a set of manifest files amounts to.
#[derive(Clone, Debug, Default)]
pub struct PlanReport {
    /// The pods, named, defaulted and with their UIDs, in file order.
    pub pods: Vec<(PathBuf, Pod)>,
    /// Errors, each with `file:line`: what they name would not run.
    pub errors: Vec<String>,
    /// Warnings, each with `file:line`: unknown fields and the like.
    pub warnings: Vec<String>,
}

/// Reads manifests (files, or folders of them) as the file source would for the node `node_name`.
pub fn plan_files(paths: &[PathBuf], node_name: &str) -> PlanReport {
    let _ = (paths, node_name);
    PlanReport::default()
}
