//! `berth why`: what a sandbox or container is doing, since when, what it waits for and how it failed last. Asks the agent by the
//! admin socket; where none runs, or none answers, reads the records and /proc itself.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use berth_cri_server::{CriServer, Why};

use crate::{admin, cli, config, state_dir, wire};

/// An agent that has not answered by then is itself what has to be explained.
const PATIENCE: Duration = Duration::from_secs(5);

async fn ask(global: &cli::Global, wanted: &str) -> Result<Vec<Why>> {
    let request = admin::Request::Why { wanted: wanted.to_owned() };
    let lines = tokio::time::timeout(PATIENCE, admin::ask(&global.state, &request)).await;
    let lines = lines.with_context(|| format!("no answer in {} s", PATIENCE.as_secs()))??;
    lines.iter().map(|line| serde_json::from_str(line).context("reading the agent's answer")).collect()
}

/// Prints the answers.
pub fn run(global: &cli::Global, args: &cli::Why) -> Result<ExitCode> {
    let file = config::load(global.config.as_deref())?;
    let on_record = || {
        let config = wire::cri(global, &cli::Cri::default(), &file)?;
        CriServer::why_on_record(&config, &args.name).context("no agent answers; reading the records")
    };
    let answers = match state_dir::holder(&global.state) {
        Some(pid) => match crate::runtime(1)?.block_on(ask(global, &args.name)) {
            Ok(answers) => answers,
            Err(error) if admin::is_refusal(&error) => return Err(error),
            Err(error) => {
                crate::note(&format!("the agent (pid {pid}) does not answer ({error:#}): this is what the records say"));
                on_record()?
            }
        },
        None => on_record()?,
    };
    if args.output.output == "json" {
        crate::out(&serde_json::to_string_pretty(&answers)?);
    } else {
        let text: Vec<String> = answers.iter().map(ToString::to_string).collect();
        crate::out(&text.join("\n"));
    }
    Ok(ExitCode::SUCCESS)
}
