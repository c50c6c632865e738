//! One leg: a fresh server of one side, its workloads in order, and a file with what was seen.

use std::cell::Cell;
use std::fs;
use std::process::Command;
use std::sync::atomic::AtomicU32;

use anyhow::{Context, Result, ensure};
use berth_cri_api::v1::{ImageSpec, PullImageRequest};

use crate::LegArgs;
use crate::cri::Shape;
use crate::daemon::Daemon;
use crate::machine::{Accounting, busy_percent};
use crate::meter::{Leg, Meter};
use crate::pods::Bench;
use crate::traces::{Hierarchies, Traces};
use crate::workload::{DENSITIES, LIVES, Scale, exec, grace, idle, life, logs, many, pull};

/// The image of all pods.
pub const IMAGE: &str = "registry.k8s.io/e2e-test-images/busybox:1.29-2";
/// The workloads that `--only` knows besides the life cycles and densities.
const OTHERS: [&str; 10] = ["idle", "exec", "grace", "logs", "pull", "burst", "density110", "list", "restart", "gone"];
/// A machine that is busier than this before a leg is waited for.
const BUSY_PERCENT: f64 = 20.0;
/// How often it is looked at again, half a second each.
const BUSY_TRIES: usize = 40;

/// What was asked for.
struct Wanted {
    only: Vec<String>,
    /// Whether anything was measured.
    any: Cell<bool>,
}

impl Wanted {
    fn parse(only: Vec<String>) -> Result<Self> {
        let lives = LIVES.iter().map(|l| l.0);
        let known: Vec<&str> = lives.chain(DENSITIES.iter().map(|d| d.0)).chain(OTHERS).collect();
        // critest is a workload of the script.
        for name in only.iter().filter(|n| *n != "critest") {
            ensure!(known.contains(&name.as_str()), "no workload {name}; there are {} critest", known.join(" "));
        }
        Ok(Self { only, any: Cell::new(false) })
    }

    fn has(&self, name: &str) -> bool {
        let has = self.only.is_empty() || self.only.iter().any(|o| o == name);
        self.any.set(self.any.get() || has);
        has
    }
}

/// Runs a leg and writes its file.
pub async fn run(args: LegArgs) -> Result<()> {
    let wanted = Wanted::parse(args.only.clone())?;
    fs::create_dir_all(&args.dir)?;
    let accounting = Accounting::start()?;
    let busy_percent = wait_calm().await?;
    let leg =
        Leg { side: args.side.clone(), round: args.round, leg: args.leg, quick: args.quick, busy_percent, ..Default::default() };
    let log = args.dir.join("server.log");
    let (mut daemon, cri) = Daemon::start(args.command, args.socket, log, &accounting).await?;
    let hierarchies = Hierarchies::find()?;
    let mut bench = Bench {
        cri,
        image: String::new(),
        dir: args.dir,
        accounting,
        baseline: Traces::count(&hierarchies),
        hierarchies,
        meter: Meter::new(leg),
        next: AtomicU32::new(0),
    };
    let scale = if args.quick { Scale::QUICK } else { Scale::FULL };
    measure(&mut bench, &mut daemon, scale, &wanted).await?;
    ensure!(wanted.any.get(), "nothing to measure");
    if let Some(line) = &args.at_end {
        at_end(&bench, line)?;
    }
    daemon.kill();
    let leg = bench.meter.into_leg();
    fs::write(&args.out, serde_json::to_vec(&leg)?).with_context(|| format!("write {}", args.out.display()))
}

fn at_end(bench: &Bench, line: &str) -> Result<()> {
    let out = Command::new("sh").args(["-c", line]).output()?;
    let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    if !said.trim().is_empty() || !out.status.success() {
        bench.meter.fail(format!("at the end: {}: {}", out.status, said.trim().replace('\n', "; ")));
    }
    Ok(())
}

/// Waits, so long and no longer, until the machine does nothing else; says how busy it is then.
pub async fn wait_calm() -> Result<f64> {
    let mut busy = busy_percent().await?;
    for _ in 0..BUSY_TRIES {
        if busy < BUSY_PERCENT {
            break;
        }
        busy = busy_percent().await?;
    }
    Ok((busy * 10.0).round() / 10.0)
}

async fn measure(bench: &mut Bench, daemon: &mut Daemon, scale: Scale, wanted: &Wanted) -> Result<()> {
    if wanted.has("idle") {
        idle::server(bench, daemon.pid()).await;
    }
    let request =
        PullImageRequest { image: Some(ImageSpec { image: IMAGE.to_owned(), ..Default::default() }), ..Default::default() };
    bench.image = bench.cri.images.pull_image(request).await?.into_inner().image_ref;
    warm_up(bench).await?;
    for (name, ways, shape) in LIVES {
        if wanted.has(name) {
            let count = match ways {
                1 => scale.life[0],
                4 => scale.life[1],
                _ => scale.life[2],
            };
            life::run(bench, name, ways, shape, count).await?;
        }
    }
    if wanted.has("exec") {
        exec::run(bench, scale.execs).await?;
    }
    if wanted.has("grace") {
        grace::run(bench, scale.grace).await?;
    }
    if wanted.has("logs") {
        logs::run(bench, scale.log_mib).await?;
    }
    if wanted.has("pull") {
        pull::run(bench, scale.pulls).await?;
    }
    for (name, shape) in DENSITIES {
        if wanted.has(name) {
            idle::few(bench, name, shape, scale.density[0], daemon.pid()).await?;
        }
    }
    let parts = many::Parts {
        burst: wanted.has("burst"),
        density: wanted.has("density110"),
        list: wanted.has("list"),
        restart: wanted.has("restart"),
        gone: wanted.has("gone"),
    };
    if parts.any() { many::run(bench, daemon, scale, parts).await } else { Ok(()) }
}

/// One pod of each shape comes and goes, so that bridges, rules and cached images are there; what is there then is the baseline.
async fn warm_up(bench: &mut Bench) -> Result<()> {
    for shape in [Shape::PerContainer, Shape::Shared] {
        let plan = bench.plan(shape)?;
        let pod = bench.up(&plan, "").await?;
        bench.check(&pod, "warm-up").await?;
        bench.down(&pod, "").await?;
        bench.release(&pod);
        // The bridge stays; the pod's own link goes.
        let expected = bench.baseline.with_room(1, &bench.hierarchies);
        if let Err(left) = expected.wait_same(&bench.hierarchies).await {
            bench.meter.fail(format!("warm-up: {left}"));
        }
    }
    bench.baseline = Traces::count(&bench.hierarchies);
    Ok(())
}
