//! `berth reset`: takes a join back. Ends the pods, removes the files and certificates that the join and the node after it wrote, and
//! says what it leaves.

use std::process::ExitCode;

use anyhow::{Context, Result};
use berth_cluster::join;
use berth_kubelet::api::offline;

use super::join::{places, record};
use super::stop;
use crate::{cli, config};

/// Ends the node and removes what makes it one of the cluster.
pub fn run(global: &cli::Global, args: &cli::Reset) -> Result<ExitCode> {
    let file = config::load(global.config.as_deref())?;
    let flags = cli::KubeletFlags { kubelet_root: args.kubelet_root.clone(), ..cli::KubeletFlags::default() };
    stop::run(global, &cli::Stop { all: true, timeout: args.timeout }).context("ending the pods")?;
    offline::forget(&places(&flags, &file).kubelet_root).context("removing the records of the cluster's pods")?;
    let removed = join::reset(&places(&flags, &file), &record(global))?;
    for path in &removed {
        crate::out(&format!("removed {}", path.display()));
    }
    if removed.is_empty() {
        crate::note("there is no record of a join here: no file was removed");
    }
    let own = places(&flags, &file).certificates().join("kubelet.key");
    if own.exists() {
        crate::note(&format!("left: {} and its certificate, which the node made for itself", own.display()));
    }
    crate::note(
        "left: the Node object in the cluster (kubectl delete node NAME), images, static pods' manifests, CNI configurations in /etc/cni/net.d",
    );
    Ok(ExitCode::SUCCESS)
}
