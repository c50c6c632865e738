//! What no record owns goes: containers that a shim has, cgroups, what is left of the network, and plugins at work for a dead agent.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use berth_linux::pidfd::PidFd;
use berth_shim::protocol::{ContainerState as ShimContainer, Request};

use super::ids;
use crate::Server;
use crate::id::{ContainerId, SandboxId, is_id};
use crate::processes::{Process, plugins_of};
use crate::sandbox::holdings::Live;
use crate::sandbox::run;
use crate::sandbox::state::Container;

/// What the shim has and no record knows: its creation was cut off, nobody was told of it.
pub(super) async fn drain_strays(live: &Live, states: &[ShimContainer], known: &BTreeMap<ContainerId, Box<Container>>) {
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

/// How long a killed plugin may take to end. One in uninterruptible sleep is left to its disk.
const PLUGIN_ENDS: Duration = Duration::from_secs(2);

/// Ends the CNI plugins that a dead agent left at work for a sandbox which is to be undone: what an ADD makes after the DEL of the
/// undoing nobody would take away. Blocking.
pub(super) fn end_plugins(sandbox: &SandboxId) {
    for plugin in plugins_of(sandbox.as_str()).into_iter().map(|plugin| plugin.process) {
        let Some(pidfd) = rustix::process::Pid::from_raw(plugin.pid).and_then(|pid| PidFd::open(pid).ok()) else { continue };
        // Asked again with the descriptor in hand: the number can not have changed its owner.
        if Process::of(plugin.pid).is_none_or(|now| now.started != plugin.started) {
            continue;
        }
        tracing::info!(%sandbox, %plugin, "CNI plugin of an agent that has died: killed");
        match pidfd.signal(9).and_then(|()| pidfd.wait_ended(Some(PLUGIN_ENDS))) {
            Ok(true) => {}
            Ok(false) => tracing::warn!(%sandbox, %plugin, "a killed CNI plugin has not ended"),
            Err(error) => tracing::warn!(%sandbox, %plugin, %error, "killing a CNI plugin"),
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

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn plugins_that_a_dead_agent_left_at_work_for_a_sandbox_are_ended_and_no_others() {
        let id = |n: u8| format!("{n}-of-test-{}", std::process::id());
        let start = |id: String| Command::new("sleep").arg("1000").env("CNI_CONTAINERID", id).env("CNI_COMMAND", "ADD").spawn();
        let (mut left, mut other) = (start(id(1)).unwrap(), start(id(2)).unwrap());
        end_plugins(&id(1).into());
        let ended = berth_testkit::wait_for(Duration::from_secs(10), || left.try_wait().unwrap());
        let others = other.try_wait().unwrap();
        for child in [&mut left, &mut other] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!((ended.and_then(|status| status.signal()), others), (Some(9), None));
    }
}
