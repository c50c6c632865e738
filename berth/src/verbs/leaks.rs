//! `berth leaks`: what of this instance is on the machine without an owner on record. Asks the agent where one runs; else
//! reads the records itself and changes nothing.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use berth_cri_server::CriServer;

use crate::{admin, cli, config, kubelet_api, state_dir, wire};

/// Prints one line for each; the exit code is 1 when there are any.
pub fn run(global: &cli::Global, args: &cli::Leaks) -> Result<ExitCode> {
    let mut lines = if state_dir::holder(&global.state, state_dir::Half::Runtime).is_some() {
        crate::runtime(1)?.block_on(admin::ask(&global.state, &admin::Request::Leaks { settle: args.settle }))?
    } else {
        let file = config::load(global.config.as_deref())?;
        let flags = cli::Cri::default();
        let config = wire::cri(global, &flags, &file)?;
        crate::runtime(1)?.block_on(CriServer::leaks_on_record(config)).context("reading the records")?
    };
    lines.extend(of_kubelet(global, args.settle)?);
    for line in &lines {
        crate::out(line);
    }
    Ok(if lines.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// How long `--settle` waits for the kubelet to take down what has just ended, and how often it looks.
const SETTLE: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(100);

/// What the kubelet of this instance, where it has one, left.
fn of_kubelet(global: &cli::Global, settle: bool) -> Result<Vec<String>> {
    let Some(note) = state_dir::kubelet_note(&global.state) else { return Ok(Vec::new()) };
    let limit = Instant::now() + SETTLE;
    loop {
        let pods = crate::runtime(1)?.block_on(kubelet_api::pods(&global.state.join("kubelet.sock")))?;
        let items = pods.as_ref().and_then(|list| list["items"].as_array()).into_iter().flatten();
        let running: Vec<String> = items.filter_map(|pod| Some(pod["metadata"]["uid"].as_str()?.to_owned())).collect();
        let lines = berth_kubelet::leaks(&note.kubelet_root, &running);
        if lines.is_empty() || !settle || Instant::now() >= limit {
            return Ok(lines);
        }
        std::thread::sleep(LOOK);
    }
}
