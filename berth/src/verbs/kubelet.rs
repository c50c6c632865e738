//! `berth kubelet`: the kubelet alone, over any CRI socket (containerd's, CRI-O's, ours).

use std::process::ExitCode;

use anyhow::{Context, Result};
use berth_kubelet::Kubelet;

use crate::{agent, cli, client, cluster, config, log, state_dir, wire};

/// The upstream's default endpoint.
const CONTAINERD: &str = "unix:///run/containerd/containerd.sock";

/// Runs until SIGTERM; the pods stay.
pub fn run(global: &cli::Global, args: &cli::Kubelet) -> Result<ExitCode> {
    let _log = log::to_stderr(global.log_level.as_deref().unwrap_or(log::DEFAULT))?;
    let file = config::load_all(global)?;
    let _held = state_dir::hold(&global.state, state_dir::Half::Kubelet)?;
    agent::run(async {
        let ask = agent::AskOfShutdown::default();
        let stop = agent::stop_on_signals(&ask)?;
        let configuration = wire::kubelet_configuration(&args.kubelet, &file)?;
        let endpoint = args.container_runtime_endpoint.as_deref().or_else(|| configuration.text("containerRuntimeEndpoint"));
        let socket = client::socket_path(endpoint.filter(|text| !text.is_empty()).unwrap_or(CONTAINERD))?;
        let configured = file.node.listen.as_deref().and_then(|listen| client::socket_path(listen).ok());
        let ours = configured.unwrap_or_else(|| global.state.join("berth.sock"));
        let channel = match socket == ours {
            true => client::connect(&socket).await?,
            false => client::connect_to_any(&socket).await?,
        };
        let mut config = wire::kubelet(global, &args.kubelet, &file, &configuration, channel)?;
        cluster::enter((global, &args.kubelet, &file), &mut config, &stop)?;
        if socket == ours {
            // `berth stop` may end these pods; another runtime's are not its own.
            state_dir::note_kubelet(&global.state, &state_dir::KubeletNote::of(&config))?;
        }
        let kubelet = Kubelet::new(config).context("starting the kubelet")?;
        let _ = ask.set(kubelet.shutdown());
        agent::notify_ready();
        agent::drain(&stop, async { kubelet.run(stop.clone()).await.context("the kubelet") }).await
    })?;
    Ok(ExitCode::SUCCESS)
}
