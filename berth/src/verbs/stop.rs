//! `berth stop --all`: ends the agent of this instance, then its pods, and takes its network and its tmpfs down.

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use berth_cri_server::CriServer;
use berth_kubelet::shutdown::SYSTEM_BUS;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;

use crate::state_dir::Half;
use crate::{agent, cli, config, kubelet_api, log, state_dir, wire};

/// How long the agent may take to end: its own drain and a little more.
const AGENT_ENDS: Duration = Duration::from_secs(15);
/// How long the kubelet is waited for to name its pods.
const KUBELET_ANSWERS: Duration = Duration::from_secs(5);

/// Sends SIGTERM to the agent that holds the state folder for a half and waits for its end.
fn end_agent(global: &cli::Global, half: Half) -> Result<()> {
    let Some(pid) = state_dir::holder(&global.state, half).and_then(Pid::from_raw) else { return Ok(()) };
    // With times for the end of the machine the pods end first, as the agent takes SIGTERM for that.
    let pods_end = state_dir::kubelet_note(&global.state).map_or(0, |note| note.shutdown_seconds);
    let patience = AGENT_ENDS + Duration::from_secs(pods_end);
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("opening the agent")?;
    // Asked again: the pid may have ended and be somebody else's by now.
    if state_dir::holder(&global.state, half).and_then(Pid::from_raw) != Some(pid) {
        return Ok(());
    }
    pidfd_send_signal(&pidfd, Signal::TERM).context("ending the agent")?;
    let until = Instant::now() + patience;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            bail!("the agent (pid {pid}) did not end within {} s", patience.as_secs());
        }
        let wait = rustix::time::Timespec { tv_sec: left.as_secs().try_into()?, tv_nsec: left.subsec_nanos().into() };
        if poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&wait))? > 0 {
            return Ok(());
        }
    }
}

/// The containers with a preStop hook: hooks are the kubelet's, and it ends before its pods here.
fn hooks(pods: &Value) -> Vec<String> {
    let items = pods.get("items").and_then(Value::as_array).into_iter().flatten();
    let text = |value: &Value, path: &str| value.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
    let of_pod = |pod: &Value| {
        let name = format!("{}/{}", text(pod, "/metadata/namespace"), text(pod, "/metadata/name"));
        let lists = ["containers", "initContainers"].map(|list| pod.pointer(&format!("/spec/{list}")).and_then(Value::as_array));
        let with_hook = lists.into_iter().flatten().flatten().filter(|c| c.pointer("/lifecycle/preStop").is_some());
        with_hook.map(|c| format!("{name}/{}", text(c, "/name"))).collect::<Vec<_>>()
    };
    items.flat_map(of_pod).collect()
}

/// Whether the agent ends its pods itself, hooks and all, when it is told to end: with times for the machine's end, and nobody else
/// who tells of that.
fn agent_runs_hooks(global: &cli::Global) -> bool {
    let has_times = state_dir::kubelet_note(&global.state).is_some_and(|note| note.shutdown_seconds > 0);
    has_times && !Path::new(SYSTEM_BUS).exists()
}

/// Says which hooks are not run. A kubelet that does not answer keeps nobody from stopping.
fn tell_hooks(global: &cli::Global) -> Result<()> {
    let socket = global.state.join("kubelet.sock");
    let asked = crate::runtime(1)?.block_on(async { tokio::time::timeout(KUBELET_ANSWERS, kubelet_api::pods(&socket)).await });
    if let Ok(Ok(Some(pods))) = asked {
        for container in hooks(&pods) {
            crate::note(&format!("the preStop hook of {container} is not run: remove its manifest first where it has to"));
        }
    }
    Ok(())
}

/// Ends everything of this instance.
pub fn run(global: &cli::Global, args: &cli::Stop) -> Result<ExitCode> {
    // For a person at a terminal: each step of each pod is what the agent's own log has.
    let _log = log::to_stderr(global.log_level.as_deref().unwrap_or("warn"))?;
    if !global.state.exists() && !global.root.exists() {
        return Ok(ExitCode::SUCCESS);
    }
    // Read first: an agent is not ended for a file that its pods cannot be ended by.
    let file = config::load(global.config.as_deref())?;
    if !agent_runs_hooks(global) {
        tell_hooks(global)?;
    }
    // The kubelet goes first: it would start again what ends.
    end_agent(global, Half::Kubelet)?;
    end_agent(global, Half::Runtime)?;
    let held = (state_dir::hold(&global.state, Half::Kubelet)?, state_dir::hold(&global.state, Half::Runtime)?);
    let _root = state_dir::hold_root(&global.root)?;
    let flags = cli::Cri::default();
    agent::run(async {
        let server = CriServer::start(wire::cri(global, &flags, &file)?).await.context("reading the records")?;
        let ended = server.stop_all(Duration::from_secs(args.timeout.into())).await.context("ending the pods");
        server.shutdown().await;
        ended
    })?;
    if let Some(note) = state_dir::kubelet_note(&global.state) {
        let stays = berth_kubelet::remove_all(&note.kubelet_root, note.cgroup_root.as_deref());
        if !stays.is_empty() {
            bail!("the pods have ended, but not everything of them could be removed: {}", stays.join("; "));
        }
    }
    drop(held);
    state_dir::release(&global.state)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn containers_with_a_hook_before_their_end_are_named() {
        let hook = json!({"preStop": {"exec": {"command": ["x"]}}});
        let pods = json!({"items": [{"metadata": {"namespace": "default", "name": "web"}, "spec": {
            "containers": [{"name": "a", "lifecycle": hook}, {"name": "b", "lifecycle": {"postStart": {}}}],
            "initContainers": [{"name": "side", "lifecycle": hook}]}}]});
        assert_eq!(hooks(&pods), ["default/web/a", "default/web/side"]);
    }
}
