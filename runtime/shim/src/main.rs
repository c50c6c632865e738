//! The pod shim: parent of a pod's containers, keeper of its namespaces, reader of its output. See the crate's library for what
//! it says to the agent. Started by the agent with descriptors in fixed places; ends by a request alone. By another name it is
//! the small program that `berth oci` makes containers from.

mod cgroups;
mod child;
mod clock;
mod creator;
mod daemon;
mod entrant;
mod error;
mod exit_record;
mod foreign;
mod link;
mod logs;
mod pause;
mod pod;
mod startup;
mod tree;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    if args.next().is_some_and(|name| name == berth_oci::cli::INIT_PROGRAM) {
        let code = berth_oci::cli::main(args.collect(), None);
        return ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX));
    }
    let served = startup::start().is_some_and(|mut daemon| daemon.run().is_ok());
    if served { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
