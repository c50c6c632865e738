//! `berth`: parse, wire, wait, drain. One file per verb; this file is the table of contents. The verbs that fork
//! (`oci`) run before any thread exists.

mod admin;
mod agent;
mod cli;
mod client;
mod cluster;
mod config;
mod find;
mod heap;
mod kubelet_api;
mod kubelet_why;
mod listen;
mod log;
mod scrub;
mod shim;
mod state_dir;
mod table;
mod upstream_flags;
mod verbs;
mod websocket;
mod wire;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;

use cli::{Cli, Verb};

/// Prints one text for a person on standard output; a closed pipe ends the verb quietly.
#[allow(clippy::print_stdout)]
pub(crate) fn out(text: &str) {
    use std::io::Write;
    if writeln!(std::io::stdout(), "{text}").is_err() {
        std::process::exit(0);
    }
}

/// Says something beside what was asked for, on standard error.
pub(crate) fn note(text: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "berth: {text}");
}

/// The threads of the agent's runtime: two suffice for a node, and each costs memory.
fn runtime(workers: usize) -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(16)
        .thread_stack_size(1 << 20)
        .thread_keep_alive(std::time::Duration::from_secs(2))
        .enable_all()
        .build()
        .context("starting the runtime")
}

/// The name this program was called by, without its folder.
fn called_as(argv0: &OsString) -> String {
    Path::new(argv0).file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

fn main() -> ExitCode {
    let mut args: Vec<OsString> = std::env::args_os().collect();
    let name = args.first().map(called_as).unwrap_or_default();
    if wire::PLUGINS.contains(&name.as_str()) {
        return exit_code(berth_cni::plugin::main(&name));
    }
    // kubeadm reads this line before it joins.
    if name == "kubelet" && args.iter().skip(1).any(|arg| arg == "--version" || arg == "--version=true") {
        out(&format!("Kubernetes {}", berth_kubelet::api::KUBERNETES_VERSION));
        return ExitCode::SUCCESS;
    }
    match name.as_str() {
        "kubelet" => args.insert(1, "kubelet".into()),
        // A link by one of these names is what containerd's BinaryName or podman's --runtime can name.
        "berth-oci" | "runc" => args.insert(1, "oci".into()),
        _ => {}
    }
    // runc's command line has its own grammar: nothing of ours may parse it.
    if args.get(1).is_some_and(|verb| verb == "oci") {
        return exit_code(berth_oci::cli::main(args.split_off(2), Some(shim::PROGRAM)));
    }
    if args.get(1).is_some_and(|verb| verb == "kubelet") {
        args = upstream_flags::with_dashes(args);
    }
    match run(Cli::parse_from(args)) {
        Ok(code) => code,
        Err(error) => {
            use std::io::Write;
            let _ = writeln!(std::io::stderr(), "berth: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(mut cli: Cli) -> Result<ExitCode> {
    // The instance's id is a hash of the absolute path.
    cli.global.root = std::path::absolute(&cli.global.root).context("--root")?;
    cli.global.state = std::path::absolute(&cli.global.state).context("--state")?;
    let global = &cli.global;
    match &cli.verb {
        Verb::Node(args) => verbs::node::run(global, args),
        Verb::Cri(args) => verbs::cri::run(global, args),
        Verb::Kubelet(args) => verbs::kubelet::run(global, args),
        Verb::Join(args) => verbs::join::run(global, args),
        Verb::Reset(args) => verbs::reset::run(global, args),
        Verb::Stop(args) => verbs::stop::run(global, args),
        Verb::Plan(args) => runtime(1)?.block_on(verbs::plan::run(&kubelet_socket(global), global, args)),
        Verb::Pods(args) => asking(async { verbs::pods::run(&kubelet_socket(global), &cri_socket(global)?, args).await }),
        Verb::Ps(args) => asking(async { verbs::ps::run(&cri_socket(global)?, args).await }),
        Verb::Logs(args) => asking(async { verbs::logs::run(&cri_socket(global)?, &kubelet_socket(global), args).await }),
        Verb::Exec(args) => {
            runtime(1)?.block_on(async { verbs::exec::run(&cri_socket(global)?, &kubelet_socket(global), args).await })
        }
        Verb::Images(args) => asking(async { verbs::image::ls(global, &cri_socket(global)?, args).await }),
        Verb::Image(cli::Image::Ls(args)) => asking(async { verbs::image::ls(global, &cri_socket(global)?, args).await }),
        Verb::Image(cli::Image::Pull { reference, creds }) => {
            asking(async { verbs::image::pull(&cri_socket(global)?, reference, creds.as_deref()).await })
        }
        Verb::Image(cli::Image::Rm { images, force }) => {
            asking(async { verbs::image::rm(global, &cri_socket(global)?, images, *force).await })
        }
        Verb::Import(args) | Verb::Image(cli::Image::Import(args)) => asking(async { verbs::image::import(global, args).await }),
        Verb::Oci(_) => anyhow::bail!("`oci` comes first: berth oci …"),
        Verb::Cni { plugin } => Ok(exit_code(berth_cni::plugin::main(plugin))),
        Verb::Doctor(args) => verbs::doctor::run(&global.root, &global.state, args),
        Verb::Leaks(args) => verbs::leaks::run(global, args),
        Verb::Why(args) => verbs::why::run(global, args),
        Verb::Completion { shell } => verbs::completion::run(*shell),
        Verb::Version => {
            out(&format!("berth {} ({})", env!("CARGO_PKG_VERSION"), env!("BERTH_TARGET")));
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Runs a verb that asks a running agent.
fn asking(verb: impl Future<Output = Result<()>>) -> Result<ExitCode> {
    runtime(1)?.block_on(verb).map(|()| ExitCode::SUCCESS)
}

/// Where the CRI is served, for the verbs that ask: the configured place, else the default below `--state`.
fn cri_socket(global: &cli::Global) -> Result<PathBuf> {
    let file = config::load(global.config.as_deref())?;
    file.node.listen.map_or_else(|| Ok(global.state.join("berth.sock")), |listen| client::socket_path(&listen))
}

fn kubelet_socket(global: &cli::Global) -> PathBuf {
    global.state.join("kubelet.sock")
}
