//! `berth plan FILE|DIR`: what manifests would do, with every default filled in, and what that changes on this node. Reads the
//! named files, the node's manifests and the kubelet's list of pods, and does nothing else.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use berth_kubelet::{Change, PlanNode, PlanReport, Pod, compare};
use serde_json::Value;
use tonic::transport::Endpoint;

use crate::{cli, config, kubelet_api, kubelet_why, wire};

/// Prints the pods as YAML and what they would change as comments on standard output, errors and warnings on standard error; the
/// exit code is 1 when there are errors, and with `--strict` when there are warnings.
#[allow(clippy::print_stderr)]
pub async fn run(kubelet: &Path, global: &cli::Global, args: &cli::Plan) -> Result<ExitCode> {
    let file = config::load(global.config.as_deref())?;
    // What no agent would start with is no node to plan for.
    let flags = cli::KubeletFlags { node_name: args.node_name.clone(), ..cli::KubeletFlags::default() };
    let configuration = wire::kubelet_configuration(&flags, &file)?;
    let nobody = Endpoint::from_static("http://unused").connect_lazy();
    let node = wire::kubelet(global, &flags, &file, &configuration, nobody)?;
    let manifests = node.manifests.unwrap_or_default();
    let (name, allowed_unsafe_sysctls) = (node.node_name.as_str(), node.allowed_unsafe_sysctls.as_slice());
    let report = berth_kubelet::plan_files(&args.paths, PlanNode { name, manifests: Some(&manifests), allowed_unsafe_sysctls });
    for (path, pod) in &report.pods {
        crate::out(&format!("---\n# {}\n{}", path.display(), serde_yaml_ng::to_string(pod)?.trim_end()));
    }
    // Without an agent there is nothing to compare with: what runs then is not known.
    if let Some(list) = kubelet_api::pods(kubelet).await? {
        let whole = args.paths.contains(&manifests);
        for line in changes(&report, &running(list)?, whole) {
            crate::out(&line);
        }
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

/// The pods of a list by namespace and name.
fn running(mut list: Value) -> Result<BTreeMap<String, Pod>> {
    let items = list["items"].take().as_array().cloned().unwrap_or_default();
    let pods = items.into_iter().map(|item| serde_json::from_value(item).context("reading the kubelet's pods"));
    pods.map(|pod| pod.map(|pod| (full_name(&pod), pod))).collect()
}

fn full_name(pod: &Pod) -> String {
    let part = |part: &Option<String>| part.clone().unwrap_or_default();
    format!("{}/{}", part(&pod.metadata.namespace), part(&pod.metadata.name))
}

/// Why a pod does not have the resources that its source gives it.
fn unresized(pod: Option<&Pod>) -> Option<String> {
    let pod = serde_json::to_value(pod?).ok()?;
    Some(kubelet_why::resize_message(&pod)).filter(|why| !why.is_empty())
}

/// What would change, as comments; `whole` says that the files are all that the node has.
fn changes(report: &PlanReport, running: &BTreeMap<String, Pod>, whole: bool) -> Vec<String> {
    let mut lines = vec!["---".to_owned()];
    let planned: BTreeMap<String, &(PathBuf, Pod)> = report.pods.iter().map(|entry| (full_name(&entry.1), entry)).collect();
    for (name, (_, pod)) in &planned {
        match compare(pod, running.get(name)) {
            Change::New => lines.push(format!("# {name}: new")),
            Change::None => match unresized(running.get(name)) {
                Some(why) => lines.push(format!("# {name}: is this here, and has not got its resources: {why}")),
                None => lines.push(format!("# {name}: runs as it is here")),
            },
            Change::Fields(fields) => {
                lines.push(format!("# {name}: changes"));
                lines.extend(fields.iter().map(|field| format!("#   {field}")));
            }
        }
    }
    if whole && report.errors.is_empty() {
        lines.extend(running.keys().filter(|name| !planned.contains_key(*name)).map(|name| format!("# {name}: ends")));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, image: &str) -> Pod {
        let value = serde_json::json!({"metadata": {"name": name, "namespace": "n"}, "spec": {"containers": [{"name": "c", "image": image}]}});
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn what_changes_is_told_by_pod() {
        let report =
            PlanReport { pods: ["a", "b", "c"].map(|n| (PathBuf::from("f"), pod(n, "i"))).to_vec(), ..PlanReport::default() };
        let items = serde_json::json!({"items": [pod("b", "i"), pod("c", "j"), pod("d", "i")]});
        let running = running(items).unwrap();
        let mut lines = changes(&report, &running, true);
        assert_eq!(
            lines,
            [
                "---",
                "# n/a: new",
                "# n/b: runs as it is here",
                "# n/c: changes",
                "#   spec.containers[0].image: \"j\" → \"i\"",
                "# n/d: ends"
            ]
        );
        let mut waits = pod("b", "i");
        let condition = serde_json::json!({"conditions": [
            {"type": "PodResizePending", "status": "True", "reason": "Deferred", "message": "no room"}]});
        waits.status = serde_json::from_value(condition).unwrap();
        let told = changes(&report, &[("n/b".to_owned(), waits)].into(), false);
        assert_eq!(told[2], "# n/b: is this here, and has not got its resources: Deferred: no room");
        lines.pop();
        assert_eq!(changes(&report, &running, false), lines, "files that are not all say nothing about others");
    }
}
