//! `berth cri`: the CRI server alone, for a stock kubelet, crictl or anything else that speaks CRI.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use berth_cri_server::CriServer;

use crate::{admin, agent, cli, config, listen, log, state_dir, wire};

/// Serves until SIGTERM; the pods stay.
pub fn run(global: &cli::Global, args: &cli::Cri) -> Result<ExitCode> {
    let _log = log::to_stderr(global.log_level.as_deref().unwrap_or(log::DEFAULT))?;
    let file = config::load(global.config.as_deref())?;
    let path = wire::listen(global, args, &file)?;
    let _held = state_dir::hold(&global.state, state_dir::Half::Runtime)?;
    let _root = state_dir::hold_root(&global.root)?;
    agent::run(async {
        let stop = agent::stop_on_signals(&agent::AskOfShutdown::default())?;
        let server =
            Arc::new(CriServer::start(wire::serving_cri(global, args, &file)?).await.context("starting the CRI server")?);
        admin::spawn(&server, &global.state, stop.clone())?;
        let listener = listen::bind(&path)?;
        tracing::info!(socket = %path.display(), "serving the CRI");
        agent::notify_ready();
        let served = agent::drain(&stop, listen::serve(&server, listener, stop.clone())).await;
        server.shutdown().await;
        served
    })?;
    Ok(ExitCode::SUCCESS)
}
