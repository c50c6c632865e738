//! `/metrics`, `/metrics/probes` and `/metrics/slis`: the kubelet about itself and its pods.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{ContainerState, Pod};

use super::certificates::{self, Certificates};
use super::text::Text;
use super::{Metrics, families, process};
use crate::{logs, pod};

/// What the pages are made of.
pub(crate) struct About<'a> {
    pub(crate) metrics: &'a Metrics,
    pub(crate) pods: &'a [Arc<Pod>],
    pub(crate) node: &'a str,
    pub(crate) pod_logs: &'a Path,
    /// The node's certificates, where it has some, and the second in which they are looked at.
    pub(crate) certificates: Option<(Certificates, i64)>,
}

/// `/metrics`.
pub(crate) fn write(about: &About<'_>, out: &mut Text) {
    for family in families::ALL {
        about.metrics.write(family, out);
    }
    gauge(out, "kubelet_node_name", "The node's name. The count is always 1.", &[("node", about.node)], 1);
    let version = if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() { 2 } else { 1 };
    gauge(out, "kubelet_cgroup_version", "cgroup version on the hosts.", &[], version);
    if let Some((certificates, now)) = &about.certificates {
        certificates::write(certificates, *now, out);
    }
    pods(about.pods, out);
    log_sizes(about, out);
    let name = "kubernetes_build_info";
    let help = "A metric with a constant '1' value labeled by the version of the kubelet and the API that it implements.";
    gauge(
        out,
        name,
        help,
        &[
            ("git_version", concat!("v1.36.0+berth.", env!("CARGO_PKG_VERSION"))),
            ("major", "1"),
            ("minor", "36"),
            ("platform", PLATFORM),
        ],
        1,
    );
    process::write(out);
}

#[cfg(target_arch = "x86_64")]
const PLATFORM: &str = "linux/amd64";
#[cfg(target_arch = "aarch64")]
const PLATFORM: &str = "linux/arm64";
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const PLATFORM: &str = "linux";

fn gauge(out: &mut Text, name: &str, help: &str, labels: &[(&str, &str)], value: usize) {
    out.family(name, "gauge", help);
    out.sample(name, labels, value);
}

fn states(pod: &Pod) -> impl Iterator<Item = &ContainerState> {
    let status = pod.status.as_ref();
    let all = status.into_iter().flat_map(|s| [&s.container_statuses, &s.init_container_statuses]);
    all.flatten().flatten().filter_map(|s| s.state.as_ref())
}

fn pods(all: &[Arc<Pod>], out: &mut Text) {
    let phase = |pod: &Pod| pod.status.as_ref().and_then(|s| s.phase.clone()).unwrap_or_default();
    let is_active = |pod: &&Arc<Pod>| !matches!(phase(pod).as_str(), "Succeeded" | "Failed");
    let running = all.iter().filter(|pod| states(pod).any(|s| s.running.is_some())).count();
    gauge(out, "kubelet_running_pods", "Number of pods that have a running pod sandbox", &[], running);
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for state in all.iter().flat_map(|pod| states(pod)) {
        let name = match (&state.running, &state.terminated) {
            (Some(_), _) => "running",
            (None, Some(_)) => "exited",
            (None, None) => continue,
        };
        *counts.entry(name).or_default() += 1;
    }
    let name = "kubelet_running_containers";
    out.family(name, "gauge", "Number of containers currently running");
    for (state, count) in counts {
        out.sample(name, &[("container_state", state)], count);
    }
    for (name, help, active) in [
        (
            "kubelet_desired_pods",
            "The number of pods the kubelet is being instructed to run. static is true if the pod is not from the apiserver.",
            false,
        ),
        (
            "kubelet_active_pods",
            "The number of pods the kubelet considers active and which are being considered when admitting new pods. static is true if the pod is not from the apiserver.",
            true,
        ),
    ] {
        out.family(name, "gauge", help);
        for (label, is_static) in [("", false), ("true", true)] {
            let count = all.iter().filter(|pod| pod::is_static(pod) == is_static && (!active || is_active(pod))).count();
            out.sample(name, &[("static", label)], count);
        }
    }
    let help = "The number of mirror pods the kubelet will try to create (one per admitted static pod)";
    gauge(out, "kubelet_mirror_pods", help, &[], 0);
}

/// The upstream's sum is of the live file and its rotations.
fn log_sizes(about: &About<'_>, out: &mut Text) {
    let name = "kubelet_container_log_filesystem_used_bytes";
    out.family(name, "gauge", "Bytes used by the container's logs on the filesystem.");
    for pod in about.pods {
        let folder = logs::pod_log_dir(about.pod_logs, pod);
        for container in pod::all_containers(pod) {
            let bytes = folder_bytes(&folder.join(&container.name));
            let labels = [
                ("uid", pod::uid(pod)),
                ("namespace", pod::namespace(pod)),
                ("pod", pod::name(pod)),
                ("container", &container.name),
            ];
            out.sample(name, &labels, bytes);
        }
        if out.is_unread() {
            return;
        }
    }
}

/// Bytes of the files in a folder.
pub(crate) fn folder_bytes(folder: &Path) -> u64 {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten();
    files.filter_map(|file| file.metadata().ok()).filter(|m| m.is_file()).map(|m| m.len()).sum()
}

/// `/metrics/probes`.
pub(crate) fn write_probes(metrics: &Metrics, out: &mut Text) {
    metrics.write(&families::PROBES, out);
    metrics.write(&families::PROBE_SECONDS, out);
}

/// Forgets the probes of pods that are no longer there: nobody may ever read them.
pub(crate) fn forget_probes(metrics: &Metrics, pods: &[Arc<Pod>]) {
    let uids: BTreeSet<&str> = pods.iter().map(|pod| pod::uid(pod)).collect();
    let names: BTreeSet<(&str, &str)> = pods.iter().map(|pod| (pod::name(pod), pod::namespace(pod))).collect();
    metrics.retain(&families::PROBES, |labels| labels.last().is_some_and(|uid| uids.contains(&**uid)));
    metrics.retain(&families::PROBE_SECONDS, |labels| names.contains(&(&*labels[2], &*labels[3])));
}

/// `/metrics/slis`: the health checks as numbers.
pub(crate) fn write_slis(checks: &[(&str, bool)], out: &mut Text) {
    let name = "kubernetes_healthcheck";
    out.family(name, "gauge", "This metric records the result of a single healthcheck.");
    for (check, well) in checks {
        out.sample(name, &[("name", check), ("type", "healthz")], usize::from(*well));
    }
}
