//! `berth node`: the CRI server and the kubelet in one process. The kubelet reaches the runtime through the CRI
//! contract alone, over memory.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use berth_cri_server::CriServer;
use berth_kubelet::Kubelet;

use crate::{admin, agent, cli, cluster, config, listen, log, state_dir, wire};

/// Runs until SIGTERM; the pods stay.
pub fn run(global: &cli::Global, args: &cli::Node) -> Result<ExitCode> {
    let _log = log::to_stderr(global.log_level.as_deref().unwrap_or(log::DEFAULT))?;
    be(global, args, None)
}

/// The same where the log is open already. With the time at which somebody began to wait, it prints when the node is Ready.
pub fn be(global: &cli::Global, args: &cli::Node, begun: Option<Instant>) -> Result<ExitCode> {
    let file = config::load_all(global)?;
    let path = wire::listen(global, &args.cri, &file)?;
    let configuration = wire::kubelet_configuration(&args.kubelet, &file)?;
    let _runtime = state_dir::hold(&global.state, state_dir::Half::Runtime)?;
    let _kubelet = state_dir::hold(&global.state, state_dir::Half::Kubelet)?;
    let _root = state_dir::hold_root(&global.root)?;
    agent::run(async {
        let ask = agent::AskOfShutdown::default();
        let stop = agent::stop_on_signals(&ask)?;
        let server =
            Arc::new(CriServer::start(wire::serving_cri(global, &args.cri, &file)?).await.context("starting the CRI server")?);
        admin::spawn(&server, &global.state, stop.clone())?;
        let listener = listen::bind(&path)?;
        // The kubelet's own calls have to end before the server that answers them.
        let serve_until = tokio_util::sync::CancellationToken::new();
        let channel = listen::in_memory(&server, serve_until.clone()).await?;
        let mut config = wire::kubelet(global, &args.kubelet, &file, &configuration, channel)?;
        cluster::enter((global, &args.kubelet, &file), &mut config, &stop)?;
        if let Some(begun) = begun {
            cluster::tell_when_ready(&config, begun, &stop);
        }
        state_dir::note_kubelet(&global.state, &state_dir::KubeletNote::of(&config))?;
        let kubelet = Kubelet::new(config).context("starting the kubelet")?;
        let _ = ask.set(kubelet.shutdown());
        tracing::info!(socket = %path.display(), "serving the CRI");
        agent::notify_ready();
        let both = async {
            let serving = listen::serve(&server, listener, stop.clone());
            let running = async { kubelet.run(stop.clone()).await.context("the kubelet") };
            let ended = tokio::try_join!(serving, running).map(|_| ());
            serve_until.cancel();
            ended
        };
        let ended = agent::drain(&stop, both).await;
        server.shutdown().await;
        ended
    })?;
    Ok(ExitCode::SUCCESS)
}
