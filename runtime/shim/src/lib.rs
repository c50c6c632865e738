//! The pod shim's protocol: what the agent and the shim say to each other. The shim itself is the binary of this
//! package; this library does no I/O and starts nothing, so that the agent can link it.

pub mod protocol;

/// The OCI types that travel in memfds beside the protocol's frames.
pub use berth_oci as oci;
