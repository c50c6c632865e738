//! `berth cri`: the CRI server alone, for a stock kubelet, crictl or anything else that speaks CRI.

use std::process::ExitCode;

use anyhow::{Context, Result};
use berth_cri_server::CriServer;

use crate::{agent, cli, config, listen, state_dir, wire};

/// Serves until SIGTERM; the pods stay.
pub fn run(global: &cli::Global, args: &cli::Cri) -> Result<ExitCode> {
    agent::log_to_stderr(&global.log_level)?;
    let file = config::load(global.config.as_deref())?;
    let _held = state_dir::hold(&global.state)?;
    crate::runtime(agent::WORKERS)?.block_on(async {
        let stop = agent::stop_on_signals()?;
        let server = CriServer::start(wire::cri(global, args, &file)).await.context("starting the CRI server")?;
        let path = wire::listen(global, args, &file);
        let listener = listen::bind(&path)?;
        tracing::info!(socket = %path.display(), "serving the CRI");
        agent::notify_ready();
        let served = agent::drain(&stop, listen::serve(&server, listener, stop.clone())).await;
        server.shutdown().await;
        served
    })?;
    Ok(ExitCode::SUCCESS)
}
