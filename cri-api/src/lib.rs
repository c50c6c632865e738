//! The Container Runtime Interface 1.36 (`runtime.v1`): messages, clients and server traits generated from
//! `proto/api.proto`. Owns the wire contract and nothing else; must not hold behaviour.

/// The generated package `runtime.v1`.
#[allow(missing_docs, clippy::all, clippy::pedantic, deprecated)]
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}

/// Largest message either side sends or accepts, in bytes: what kubelet, critest and crictl accept (16 MiB).
pub const MAX_MESSAGE_BYTES: usize = 16 * 1024 * 1024;
