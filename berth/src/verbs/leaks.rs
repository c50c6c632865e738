//! `berth leaks`: what of this instance is on the machine without an owner on record. Asks the agent where one runs; else
//! reads the records itself and changes nothing.

use std::process::ExitCode;

use anyhow::{Context, Result};
use berth_cri_server::CriServer;

use crate::{admin, cli, config, state_dir, wire};

/// Prints one line for each; the exit code is 1 when there are any.
pub fn run(global: &cli::Global, args: &cli::Leaks) -> Result<ExitCode> {
    let lines = if state_dir::holder(&global.state).is_some() {
        crate::runtime(1)?.block_on(admin::ask(&global.state, &admin::Request::Leaks { settle: args.settle }))?
    } else {
        let file = config::load(global.config.as_deref())?;
        let flags = cli::Cri::default();
        let config = wire::cri(global, &flags, &file)?;
        crate::runtime(1)?.block_on(CriServer::leaks_on_record(config)).context("reading the records")?
    };
    for line in &lines {
        crate::out(line);
    }
    Ok(if lines.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
