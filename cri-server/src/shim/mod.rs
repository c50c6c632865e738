//! The agent's side of the shims: starting one, and talking to one. Knows no CRI.

mod client;
mod socket;
mod start;

pub(crate) use client::ShimClient;
pub(crate) use socket::{bind, connect};
pub(crate) use start::{Program, start};
