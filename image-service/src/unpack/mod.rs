//! From a layer's bytes to a folder that overlayfs can use: decode, verify, apply, complete.
//!
//! Everything here blocks and runs on blocking threads. It knows the layer's folder only; names, records and
//! registries are others'.

mod apply;
mod complete;
mod merged;
mod meta;
mod resolve;
pub(crate) mod stream;
pub(crate) mod tar;

pub(crate) use apply::{Applied, RootMeta};
pub(crate) use complete::complete;
pub(crate) use merged::Merged;
pub(crate) use resolve::clean;

#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) mod testtar;
