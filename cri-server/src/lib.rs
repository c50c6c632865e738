//! The CRI server: sandboxes, containers, streaming and records
