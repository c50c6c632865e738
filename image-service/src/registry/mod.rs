//! Talking to registries: which hosts stand for a name, how they are reached, what they want to see, and what is
//! fetched from them. Nothing here writes to the store.

mod challenge;
mod client;
mod hosts;
mod resolver;
mod transport;

pub(crate) use client::Session;
