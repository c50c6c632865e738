//! The gRPC edge: converts, submits to the owner of the operation and awaits. Must not do work itself.

mod cni_result;
mod handlers;
mod image;
mod lists;
mod namespaces;
mod reading;
mod runtime;
mod verbose;

pub use image::ImageEdge;
pub use lists::RuntimeApi;
