//! The wire: one connection carries two logical ones (`mux`), each with ttRPC messages (`ttrpc`); `connection` runs both.
//! Whatever a peer sends is an error at worst, and never needs more memory than a few messages.

mod connection;
mod mux;
mod ttrpc;

#[cfg(test)]
pub(crate) use connection::tests::fake;
pub(crate) use connection::{Answer, Connection, Service, Status};

/// gRPC's codes, as far as they are used.
pub(crate) const INVALID_ARGUMENT: i32 = 3;
pub(crate) const RESOURCE_EXHAUSTED: i32 = 8;
pub(crate) const FAILED_PRECONDITION: i32 = 9;
pub(crate) const UNIMPLEMENTED: i32 = 12;

/// The most bytes of a ttRPC message, without its header.
pub(crate) const MAX_MESSAGE: usize = 4 << 20;
