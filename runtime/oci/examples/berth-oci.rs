//! The command line alone, as a program of its own: `berth oci` without the rest of berth. It has no smaller program to become a
//! container's first process.

fn main() {
    std::process::exit(berth_oci::cli::main(std::env::args_os().skip(1).collect(), None));
}
