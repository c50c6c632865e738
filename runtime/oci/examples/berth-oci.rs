//! The command line alone, as a program of its own: `berth oci` without the rest of berth.

fn main() {
    std::process::exit(berth_oci::cli::main(std::env::args_os().skip(1).collect()));
}
