//! What no record owns goes: containers that a shim has, cgroups, and what is left of the network.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use berth_shim::protocol::{ContainerState as ShimContainer, Request};

use super::ids;
use crate::Server;
use crate::id::{ContainerId, SandboxId, is_id};
use crate::sandbox::holdings::Live;
use crate::sandbox::run;
use crate::sandbox::state::Container;

/// What the shim has and no record knows: its creation was cut off, nobody was told of it.
pub(super) async fn drain_strays(live: &Live, states: &[ShimContainer], known: &BTreeMap<ContainerId, Container>) {
    for stray in states.iter().filter(|s| !known.contains_key(s.id.as_str())) {
        tracing::info!(container = %stray.id, "container without a record: drained");
        if let Ok(shim) = live.shim() {
            let request = Request::Delete { id: stray.id.clone(), force: true };
            if let Err(error) = shim.call("delete container", request, Vec::new()).await {
                tracing::warn!(container = %stray.id, error = %crate::error::text(&error), "draining a container");
            }
        }
    }
}

/// Cgroups with an id for their name that no sandbox and no container has: their folders went and the agent died before they did.
/// Nobody may ask yet, so nobody makes new ones. Blocking.
fn drain_cgroups(server: &Server) {
    let held = server.owners.held();
    let mut parents: BTreeSet<String> = held.values().map(|h| server.cgroups.pod(&h.cgroup_parent)).collect();
    parents.insert(server.cgroups.top().to_owned());
    for parent in parents {
        for name in server.cgroups.children(&parent).into_iter().filter(|name| is_id(name)) {
            let owned = held.contains_key(name.as_str()) || held.values().any(|h| h.containers.contains(name.as_str()));
            if owned {
                continue;
            }
            tracing::info!(cgroup = format!("{parent}/{name}"), "cgroup without an owner: drained");
            if let Err(error) = server.cgroups.remove_now(&format!("{parent}/{name}"), &name) {
                tracing::warn!(error = %crate::error::text(&error), "draining a cgroup");
            }
        }
    }
}

/// Names of network namespaces of this instance that no sandbox has: the agent died between the network's end and its folders'.
/// Blocking.
fn drain_netns(server: &Server, owned: &BTreeSet<String>) {
    let known: BTreeSet<_> = owned.iter().map(|id| run::netns_path(server, &SandboxId::from(id.as_str()))).collect();
    let prefix = format!("berth-{}-", server.instance);
    for entry in std::fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        let path = entry.path();
        if known.contains(&path) || !entry.file_name().to_string_lossy().starts_with(&prefix) {
            continue;
        }
        tracing::info!(path = %path.display(), "network namespace without a sandbox: drained");
        if let Err(error) = crate::sandbox::holdings::unbind(&path) {
            tracing::warn!(error = %crate::error::text(&error), "draining a network namespace");
        }
    }
}

/// What nobody claims: folders without a record, network leftovers.
pub(super) async fn drain(server: &Arc<Server>) {
    let owned: BTreeSet<String> = server.owners.ids().iter().map(|id| id.as_str().to_owned()).collect();
    // The board knows every pod by now; those of another boot, and stopped ones, have nothing of the network any more.
    // What an owner still has to give back is its own to detach.
    let held = server.owners.held().into_iter().filter(|(_, h)| h.system).map(|(id, _)| id.as_str().to_owned()).collect();
    if let Err(error) = server.network.reconcile(&held).await {
        tracing::warn!(%error, "cleaning up the network");
    }
    let this = server.clone();
    let result = crate::blocking(move || {
        drain_cgroups(&this);
        drain_netns(&this, &owned);
        for name in ids(&this.paths.live_sandboxes())?.into_iter().filter(|n| !owned.contains(n)) {
            tracing::info!(sandbox = name, "pod sandbox without a record: drained");
            let id = SandboxId::from(name);
            run::remove_folder(&this.paths.live_sandbox(&id))?;
        }
        for name in ids(&this.paths.kept_sandboxes())?.into_iter().filter(|n| !owned.contains(n)) {
            run::remove_folder(&this.paths.kept_sandbox(&SandboxId::from(name)))?;
        }
        this.reaper.wake();
        Ok(())
    })
    .await;
    if let Err(error) = result {
        tracing::warn!(error = %crate::error::text(&error), "draining what nobody claims");
    }
}
