//! One leg of a node agent: a fresh agent of one side, its workloads in order, and a file with what was seen.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::NodeLegArgs;
use crate::agent::Agent;
use crate::leg::{IMAGE, wait_calm};
use crate::machine::Accounting;
use crate::meter::{Leg, Meter};
use crate::workload::node::{NodeBench, Probe, disk_kib};

const WORKLOADS: [&str; 4] = ["drops", "idle-http", "idle-exec", "idle-disk"];
/// What is not to be written in: the time that the disk is watched, once without an agent and once with one.
const DISK_WINDOW: Duration = Duration::from_secs(600);

/// How much: pods that are dropped, idle pods, seconds of idleness.
fn scale(quick: bool) -> (usize, usize, Duration) {
    if quick { (2, 5, Duration::from_secs(5)) } else { (40, 110, Duration::from_secs(60)) }
}

/// Runs a leg and writes its file.
pub fn run(args: NodeLegArgs) -> Result<()> {
    for name in &args.only {
        ensure!(WORKLOADS.contains(&name.as_str()), "no workload {name}; there are {}", WORKLOADS.join(" "));
    }
    let wanted = |name: &str| args.only.is_empty() || args.only.iter().any(|o| o == name);
    let (manifests, shared) = (args.dir.join("manifests"), args.dir.join("shared"));
    fs::create_dir_all(&manifests)?;
    fs::create_dir_all(&shared)?;
    let accounting = Accounting::start()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let busy_percent = runtime.block_on(wait_calm())?;
    let leg = Leg { side: args.side, round: args.round, leg: args.leg, quick: args.quick, busy_percent, ..Default::default() };
    let meter = Meter::new(leg);
    // Longer than all others together, so only where it is asked for by name.
    let disk = args.only.iter().any(|name| name == "idle-disk");
    let disk_window = if args.quick { Duration::from_secs(5) } else { DISK_WINDOW };
    if disk {
        let before = disk_kib(&args.dir)?;
        std::thread::sleep(disk_window);
        meter.add("idle-disk.control", disk_kib(&args.dir)? - before);
    }
    let agent = Agent::start(&args.command, manifests, &args.dir.join("server.log"), &accounting)?;
    let mut bench = NodeBench { agent, accounting, meter, image: IMAGE, shared };
    let (drops, idle, window) = scale(args.quick);
    // Always one: it pulls the image and makes the network.
    bench.drops(if wanted("drops") { drops } else { 0 })?;
    if wanted("idle-http") {
        bench.idle("idle-http", Probe::Http, idle, window)?;
    }
    if wanted("idle-exec") {
        bench.idle("idle-exec", Probe::Exec, idle, window)?;
    }
    if disk {
        bench.idle_disk(&args.dir, idle, disk_window)?;
    }
    drop(bench.agent);
    let leg = bench.meter.into_leg();
    fs::write(&args.out, serde_json::to_vec(&leg)?).with_context(|| format!("write {}", args.out.display()))
}
