//! The pod shim: parent of a pod's containers, keeper of its namespaces, reader of its output. See the crate's library for what
//! it says to the agent. Started by the agent with descriptors in fixed places; ends by a request alone.

mod cgroups;
mod child;
mod clock;
mod creator;
mod daemon;
mod error;
mod exit_record;
mod link;
mod logs;
mod pause;
mod pod;
mod startup;

use std::process::ExitCode;

fn main() -> ExitCode {
    let served = startup::start().is_some_and(|mut daemon| daemon.run().is_ok());
    if served { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
