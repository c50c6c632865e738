//! `berth why`: why a pod, sandbox or container is as it is. The kubelet says what it wants and what keeps it from it; the runtime
//! what it is doing, since when, what it waits for and how it failed last. Asks the agent by its sockets; where none runs, or none
//! answers, reads the records and /proc itself.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use berth_cri_server::{CriServer, Why};
use serde::Serialize;
use serde_json::Value;

use crate::kubelet_why::{self, PodWhy, Problems};
use crate::{admin, cli, config, kubelet_api, state_dir, wire};

/// An agent that has not answered by then is itself what has to be explained.
const PATIENCE: Duration = Duration::from_secs(5);

/// One answer, of either half.
#[derive(Serialize)]
#[serde(untagged)]
enum Answer {
    Kubelet(PodWhy),
    Runtime(Box<Why>),
}

impl std::fmt::Display for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Kubelet(why) => why.fmt(f),
            Self::Runtime(why) => why.fmt(f),
        }
    }
}

async fn ask(global: &cli::Global, wanted: &str) -> Result<Vec<Why>> {
    let request = admin::Request::Why { wanted: wanted.to_owned() };
    let lines = tokio::time::timeout(PATIENCE, admin::ask(&global.state, &request)).await;
    let lines = lines.with_context(|| format!("no answer in {} s", PATIENCE.as_secs()))??;
    lines.iter().map(|line| serde_json::from_str(line).context("reading the agent's answer")).collect()
}

/// The kubelet's pods and problems; `None` where no kubelet runs.
async fn ask_kubelet(global: &cli::Global) -> Result<Option<(Value, Problems)>> {
    let socket = global.state.join("kubelet.sock");
    let both = async { tokio::try_join!(kubelet_api::pods(&socket), kubelet_api::problems(&socket)) };
    let both = tokio::time::timeout(PATIENCE, both).await;
    let (pods, problems) = both.with_context(|| format!("no answer in {} s", PATIENCE.as_secs()))??;
    Ok(pods.zip(problems))
}

/// What the runtime says: the agent, or else the records.
fn ask_runtime(global: &cli::Global, wanted: &str) -> Result<Vec<Why>> {
    let file = config::load(global.config.as_deref())?;
    let on_record = || {
        let config = wire::cri(global, &cli::Cri::default(), &file)?;
        CriServer::why_on_record(&config, wanted).context("no agent answers; reading the records")
    };
    let Some(pid) = state_dir::holder(&global.state, state_dir::Half::Runtime) else { return on_record() };
    match crate::runtime(1)?.block_on(ask(global, wanted)) {
        Err(error) if !admin::is_refusal(&error) => {
            crate::note(&format!("the agent (pid {pid}) does not answer ({error:#}): this is what the records say"));
            on_record()
        }
        answered => answered,
    }
}

/// Prints the answers.
pub fn run(global: &cli::Global, args: &cli::Why) -> Result<ExitCode> {
    let kubelet = crate::runtime(1)?.block_on(ask_kubelet(global)).unwrap_or_else(|error| {
        crate::note(&format!("the kubelet does not answer: {error:#}"));
        None
    });
    let now = time::OffsetDateTime::now_utc();
    let said = kubelet.as_ref().map(|(pods, problems)| kubelet_why::explain(pods, problems, &args.name, now));
    let mut answers: Vec<Answer> = said.into_iter().flatten().map(Answer::Kubelet).collect();
    match ask_runtime(global, &args.name) {
        Ok(more) => answers.extend(more.into_iter().map(|why| Answer::Runtime(Box::new(why)))),
        // The runtime need not have heard of a pod that the kubelet can not start.
        Err(_) if !answers.is_empty() => {}
        Err(error) => {
            let refused = kubelet.iter().flat_map(|(_, problems)| &problems.problems);
            for problem in refused {
                crate::note(&format!("a manifest is refused: {problem}"));
            }
            return Err(error);
        }
    }
    if args.output.output == "json" {
        crate::out(&serde_json::to_string_pretty(&answers)?);
    } else {
        let text: Vec<String> = answers.iter().map(ToString::to_string).collect();
        crate::out(&text.join("\n"));
    }
    Ok(ExitCode::SUCCESS)
}
