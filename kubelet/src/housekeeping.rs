//! What nobody owns any more: pod folders, log folders, dead log links, pod cgroups. Deletes only below the configured
//! roots, never across a mount.

use std::fs;

use crate::cgroup::PodCgroups;
use crate::config::Config;
use crate::pod::PodUid;
use crate::{logs, volume};

/// Removes what belongs to no pod of `known`.
pub fn collect(config: &Config, cgroups: Option<&PodCgroups>, known: &[PodUid]) {
    let is_known = |uid: &str| known.iter().any(|k| k.as_str() == uid);
    logs::remove_orphans(&config.pod_logs_dir, is_known, config.timing.garbage);
    if let Some(links) = &config.container_logs_dir {
        logs::remove_dead_links(links);
    }
    for entry in fs::read_dir(config.kubelet_root.join("pods")).into_iter().flatten().flatten() {
        let Ok(uid) = entry.file_name().into_string() else { continue };
        if is_known(&uid) || PodUid::new(&uid).is_none() {
            continue;
        }
        if let Err(error) = volume::tear_down(&entry.path()) {
            tracing::warn!(uid, error, "orphaned pod's volumes stay");
            continue;
        }
        if let Err(error) = fs::remove_dir_all(entry.path()) {
            tracing::warn!(uid, %error, "orphaned pod's folder stays");
        }
    }
    let Some(cgroups) = cgroups else { return };
    for uid in cgroups.pods().unwrap_or_default().into_iter().filter(|uid| !is_known(uid)) {
        tracing::info!(uid, "cgroup of an unknown pod is removed");
        if let Err(error) = cgroups.remove_pod(&uid) {
            tracing::warn!(uid, %error, "orphaned pod's cgroup stays");
        }
    }
}
