//! One leg of a node under an API server: a fresh agent of one side on a fresh control plane, its workloads in order, and a file with what was
//! seen.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::ApiLegArgs;
use crate::agent::{Agent, container_id, pods};
use crate::leg::{IMAGE, wait_calm};
use crate::machine::Accounting;
use crate::meter::{Leg, Meter};
use crate::workload::api::ApiBench;
use crate::workload::node::NodeBench;

const WORKLOADS: [&str; 3] = ["single", "burst50", "api-idle"];
/// After the last pod is ready, until what the start allocated is given back as far as it is, and events have been told.
const SETTLE: Duration = Duration::from_secs(30);

/// How much: pods one by one, pods of the deployment, idle pods, seconds of idleness.
fn scale(quick: bool) -> (usize, usize, usize, Duration) {
    if quick { (3, 5, 5, Duration::from_secs(10)) } else { (40, 50, 110, Duration::from_secs(180)) }
}

/// Runs a leg and writes its file.
pub fn run(args: ApiLegArgs) -> Result<()> {
    for name in &args.only {
        ensure!(WORKLOADS.contains(&name.as_str()), "no workload {name}; there are {}", WORKLOADS.join(" "));
    }
    let wanted = |name: &str| args.only.is_empty() || args.only.iter().any(|o| o == name);
    let accounting = Accounting::start()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let busy_percent = runtime.block_on(wait_calm())?;
    let leg = Leg { side: args.side, round: args.round, leg: args.leg, quick: args.quick, busy_percent, ..Default::default() };
    let (singles, burst, idle, window) = scale(args.quick);
    let api = runtime.block_on(async {
        let config = kube::Config::new(args.server.parse().context("the server's address")?);
        anyhow::Ok(ApiBench { client: kube::Client::try_from(config)?, meter: Meter::new(leg), image: IMAGE, audit: args.audit })
    })?;
    let fake = if wanted("burst50") { runtime.block_on(api.fake_burst(burst))? } else { 0.0 };
    let agent = Agent::start(&args.command, args.dir.join("manifests"), &args.dir.join("server.log"), &accounting)?;
    let mut bench = NodeBench { agent, accounting, meter: Meter::default(), image: IMAGE, shared: args.dir.join("shared") };
    runtime.block_on(async {
        api.ready(&args.node).await?;
        api.single(if wanted("single") { singles } else { 0 }).await?;
        if wanted("burst50") {
            api.burst(burst, fake).await?;
        }
        if wanted("api-idle") {
            let measure = async |api: &ApiBench| {
                tokio::time::sleep(SETTLE).await;
                api.calls(window).await?;
                let containers: Vec<String> = pods()?.iter().filter_map(container_id).collect();
                bench.window("api-idle", &containers, window / 3)
            };
            api.with_idle(idle, measure).await?;
        }
        anyhow::Ok(())
    })?;
    let NodeBench { agent, meter, .. } = bench;
    drop(agent);
    let mut leg = api.meter.into_leg();
    leg.metrics.extend(meter.into_leg().metrics);
    fs::write(&args.out, serde_json::to_vec(&leg)?).with_context(|| format!("write {}", args.out.display()))
}
