//! `berth plan FILE|DIR`: what manifests would do, with every default filled in. Reads the named files and does nothing else.

use std::process::ExitCode;

use anyhow::Result;

use crate::{cli, config, wire};

/// Prints the pods as YAML on standard output, errors and warnings on standard error; the exit code is 1 when there are errors,
/// and with `--strict` when there are warnings.
#[allow(clippy::print_stderr)]
pub fn run(global: &cli::Global, args: &cli::Plan) -> Result<ExitCode> {
    let file = config::load(global.config.as_deref())?;
    let name = args.node_name.clone().or(file.node.node_name).unwrap_or_else(wire::host_name);
    let report = berth_kubelet::plan_files(&args.paths, &name);
    for (path, pod) in &report.pods {
        crate::out(&format!("---\n# {}\n{}", path.display(), serde_yaml_ng::to_string(pod)?.trim_end()));
    }
    for warning in &report.warnings {
        eprintln!("warning: {warning}");
    }
    for error in &report.errors {
        eprintln!("error: {error}");
    }
    let refused = !report.errors.is_empty() || args.strict && !report.warnings.is_empty();
    Ok(if !refused { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
