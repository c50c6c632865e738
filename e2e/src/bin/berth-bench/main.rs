//! The benchmark's client: `berth-bench leg` measures one CRI server inside a sandbox, `berth-bench report` makes the table and the
//! picture of all legs. `e2e/bench.sh` calls both.
//!
//! Owns the workloads and what is measured. It must not know berth: both sides are a command line and a socket to it, and every
//! workload treats them alike.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line program")]

mod agent;
mod api_leg;
mod checks;
mod cri;
mod daemon;
mod leg;
mod machine;
mod meter;
mod node_leg;
mod pods;
mod report;
mod rows;
mod svg;
mod traces;
mod workload;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Measures one CRI server and writes what it saw as JSON.
    Leg(LegArgs),
    /// Measures one node agent and writes what it saw as JSON.
    NodeLeg(NodeLegArgs),
    /// Measures one node agent under an API server and writes what it saw as JSON.
    ApiLeg(ApiLegArgs),
    /// Reads the legs of a folder and writes results.md, results.svg and results.json.
    Report(ReportArgs),
}

/// One run of one side.
#[derive(Args, Debug)]
pub struct LegArgs {
    /// The side's name.
    #[arg(long)]
    side: String,
    /// Which round this is; 0 is the warm-up.
    #[arg(long)]
    round: u32,
    /// Which leg of the round.
    #[arg(long)]
    leg: u32,
    /// The CRI socket that the command opens.
    #[arg(long)]
    socket: PathBuf,
    /// A fresh folder for logs and files.
    #[arg(long)]
    dir: PathBuf,
    /// Where the JSON goes.
    #[arg(long)]
    out: PathBuf,
    /// Workloads by name, with commas between; all without it.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Tiny counts: whether everything works, not how fast.
    #[arg(long)]
    quick: bool,
    /// A shell's line that is run before the server ends; what it prints voids the round.
    #[arg(long)]
    at_end: Option<String>,
    /// The server's command line.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// One run of one side's node agent.
#[derive(Args, Debug)]
pub struct NodeLegArgs {
    /// The side's name.
    #[arg(long)]
    side: String,
    /// Which round this is; 0 is the warm-up.
    #[arg(long)]
    round: u32,
    /// Which leg of the round.
    #[arg(long)]
    leg: u32,
    /// A fresh folder for logs and files; its `manifests` is what the command runs.
    #[arg(long)]
    dir: PathBuf,
    /// Where the JSON goes.
    #[arg(long)]
    out: PathBuf,
    /// Workloads by name, with commas between; all without it.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Tiny counts: whether everything works, not how fast.
    #[arg(long)]
    quick: bool,
    /// The agent's command line.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// One run of one side's node agent under an API server.
#[derive(Args, Debug)]
pub struct ApiLegArgs {
    /// The side's name.
    #[arg(long)]
    side: String,
    /// Which round this is; 0 is the warm-up.
    #[arg(long)]
    round: u32,
    /// Which leg of the round.
    #[arg(long)]
    leg: u32,
    /// A fresh folder for logs and files.
    #[arg(long)]
    dir: PathBuf,
    /// Where the JSON goes.
    #[arg(long)]
    out: PathBuf,
    /// The API server over plain HTTP, e.g. of `kubectl proxy`.
    #[arg(long)]
    server: String,
    /// The API server's audit log of the node's calls.
    #[arg(long)]
    audit: PathBuf,
    /// The node that the command registers.
    #[arg(long)]
    node: String,
    /// Workloads by name, with commas between; all without it.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Tiny counts: whether everything works, not how fast.
    #[arg(long)]
    quick: bool,
    /// The agent's command line.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// The legs and the results' folder.
#[derive(Args, Debug)]
pub struct ReportArgs {
    /// The folder with the legs' JSON.
    #[arg(long)]
    legs: PathBuf,
    /// Where the results go.
    #[arg(long)]
    out: PathBuf,
    /// Lines about the machine and the versions, for the results' head.
    #[arg(long)]
    about: Vec<String>,
}

fn main() -> Result<()> {
    match Cli::parse().verb {
        Verb::Leg(args) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(leg::run(args))
        }
        Verb::NodeLeg(args) => node_leg::run(args),
        Verb::ApiLeg(args) => api_leg::run(args),
        Verb::Report(args) => report::run(&args),
    }
}
