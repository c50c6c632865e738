//! Runs a program in a sandbox of testkit: `berth-sandbox [--shared-root] PROGRAM [ARGUMENT…]`; exits as the program does.
#![allow(clippy::print_stderr)]

use std::process::{Command, exit};

use berth_testkit::sandbox::{Sandbox, init_main, is_init, shell_code};

fn main() {
    let mut arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if is_init() {
        let mut program = Command::new(&arguments[0]);
        init_main(program.args(&arguments[1..]));
    }
    let mut sandbox = Sandbox::new().timeout(None);
    if arguments.first().is_some_and(|a| a == "--shared-root") {
        arguments.remove(0);
        sandbox = sandbox.shared_root();
    }
    if arguments.is_empty() {
        eprintln!("usage: berth-sandbox [--shared-root] PROGRAM [ARGUMENT…]");
        exit(2);
    }
    match sandbox.run(Command::new("/proc/self/exe").args(&arguments)) {
        Ok(status) => exit(shell_code(status)),
        Err(error) => {
            eprintln!("berth-sandbox: {error} (root is needed)");
            exit(125)
        }
    }
}
