//! Our CNI plugins as a program of its own: which one is said by its name (a link in the plugin folder) or its first argument.

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args =
        std::env::args().map(|arg| Path::new(&arg).file_name().map_or(String::new(), |n| n.to_string_lossy().into_owned()));
    let own = args.next().unwrap_or_default();
    let plugin = if berth_cni::plugin::TYPES.contains(&own.as_str()) { own } else { args.next().unwrap_or_default() };
    u8::try_from(berth_cni::plugin::main(&plugin)).map_or(ExitCode::FAILURE, ExitCode::from)
}
