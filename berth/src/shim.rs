//! The pod shim's program, embedded by `build.rs`. Owns the bytes; running them is the CRI server's affair.

/// The static `berth-shim` binary of this build.
pub static PROGRAM: &[u8] = include_bytes!(env!("BERTH_SHIM"));
