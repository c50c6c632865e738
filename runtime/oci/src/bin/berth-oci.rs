//! The command line alone, as a program of its own: for tests of this crate.

fn main() {
    std::process::exit(berth_oci::cli::main(std::env::args_os().skip(1).collect()));
}
