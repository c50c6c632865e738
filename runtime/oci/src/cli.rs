//! `berth oci`: runc's command line over this crate, so that whatever drives runc can drive berth.
//!
//! Containers are folders below `--root`: `state.json`, the spec, and the fifo at which a created one waits. Nothing here stays
//! running but `run` and `exec` without `--detach`.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a command line talks")]

mod args;
mod create;
mod example;
mod exec;
mod features;
mod foreground;
mod lifecycle;
mod log;
mod protect;
mod state;
mod update;

use std::ffi::OsString;
use std::path::PathBuf;

use args::{Flags, parse};
use log::Log;

/// What a command comes to: an exit code, or the user's error.
type Outcome = Result<i32, String>;

/// The options in front of the command.
struct Global {
    root: PathBuf,
    log: Log,
    /// All words of the command line, for a program that is to go on with it.
    words: Vec<String>,
    init_program: Option<&'static [u8]>,
    /// Control groups are systemd's scopes.
    systemd_cgroup: bool,
}

/// The name by which the small program that [`main`] was given is started, with the command line behind it. It then is to call
/// [`main`] without one.
pub const INIT_PROGRAM: &str = "berth-oci-init";

/// The exit code of a failing command; that of `exec` cannot be one of the program's usual ones.
const FAILED: i32 = 1;
const EXEC_FAILED: i32 = 255;

const USAGE: &str = "usage: berth oci [--root DIR] [--log FILE] [--log-format text|json] [--debug] [--systemd-cgroup] COMMAND

  create [--bundle DIR] [--console-socket SOCKET] [--pid-file FILE] [--preserve-fds N] [--no-new-keyring] ID
  start ID                          run [-d] [create's options] [--keep] ID
  state ID                          list [-f table|json] [-q]
  kill [--all] ID [SIGNAL]          delete [--force] ID
  exec [-d] [-t] [-p FILE] [--cwd DIR] [--env NAME=VALUE] [--user UID[:GID]] [--console-socket SOCKET] [--pid-file FILE] ID COMMAND ...
  ps [-f table|json] ID             pause ID, resume ID
  update [-r FILE|-] [--memory N] ... ID
  features                          spec [--bundle DIR]
";

/// Runs a command of runc's and returns its exit code. `args` are what stands behind `berth oci`. To be called before the
/// process has a second thread.
///
/// What becomes a container's first process is a sealed copy in memory of `init_program`, a static program that goes on with the command line when it
/// is started as [`INIT_PROGRAM`]; of this whole program without one.
#[must_use]
pub fn main(args: Vec<OsString>, init_program: Option<&'static [u8]>) -> i32 {
    let mut words = Vec::new();
    for arg in args {
        match arg.into_string() {
            Ok(word) => words.push(word),
            Err(arg) => {
                eprintln!("berth oci: {} is not text", arg.to_string_lossy());
                return 1;
            }
        }
    }
    let flags = match parse(&words, args::GLOBAL, true) {
        Ok(flags) => flags,
        Err(error) => {
            eprintln!("berth oci: {error}\n{USAGE}");
            return 1;
        }
    };
    let log = Log::new(flags.get("log"), flags.get("log-format"), flags.is("debug"));
    let outcome = log.and_then(|log| {
        let root = PathBuf::from(flags.get("root").unwrap_or("/run/berth/oci"));
        let systemd_cgroup = flags.is("systemd-cgroup");
        let global = Global { root, log, words, init_program, systemd_cgroup };
        dispatch(&global, &flags).inspect_err(|error| global.log.error(error))
    });
    outcome.unwrap_or_else(|error| {
        eprintln!("berth oci: {error}");
        if flags.rest.first().is_some_and(|command| command == "exec") { EXEC_FAILED } else { FAILED }
    })
}

fn dispatch(global: &Global, flags: &Flags) -> Outcome {
    if flags.is("help") {
        print!("{USAGE}");
        return Ok(0);
    }
    if flags.is("version") {
        println!("berth oci version {}\nspec: {}", env!("CARGO_PKG_VERSION"), crate::spec::VERSION);
        return Ok(0);
    }
    if flags.get("rootless").is_some_and(|value| value == "true") {
        return Err("--rootless: running without root is not supported".into());
    }
    let [command, rest @ ..] = flags.rest.as_slice() else {
        print!("{USAGE}");
        return Err("no command".into());
    };
    match command.as_str() {
        "create" => create::create(global, &parse(rest, args::CREATE, false)?),
        "run" => create::run(global, &parse(rest, args::CREATE, false)?),
        "start" => lifecycle::start(global, &parse(rest, args::NONE, false)?),
        "state" => lifecycle::state(global, &parse(rest, args::NONE, false)?),
        "kill" => lifecycle::kill(global, &parse(rest, args::KILL, false)?),
        "delete" => lifecycle::delete(global, &parse(rest, args::DELETE, false)?),
        "exec" => exec::exec(global, &parse(rest, args::EXEC, true)?),
        "ps" => lifecycle::ps(global, &parse(rest, args::PS, true)?),
        "pause" => lifecycle::pause(global, &parse(rest, args::NONE, false)?),
        "resume" => lifecycle::resume(global, &parse(rest, args::NONE, false)?),
        "update" => update::update(global, &parse(rest, args::UPDATE, false)?),
        "list" => lifecycle::list(global, &parse(rest, args::LIST, false)?),
        "features" => features::features(),
        "spec" => example::write(&parse(rest, args::SPEC, false)?),
        "help" => {
            print!("{USAGE}");
            Ok(0)
        }
        "checkpoint" | "restore" | "events" => Err(format!("{command}: not supported")),
        other => Err(format!("unknown command {other:?}")),
    }
}

/// The only positional argument.
fn id(flags: &Flags) -> Result<&str, String> {
    match flags.rest.as_slice() {
        [id] => state::check_id(id),
        [] => Err("container id cannot be empty".into()),
        _ => Err("too many arguments".into()),
    }
}
