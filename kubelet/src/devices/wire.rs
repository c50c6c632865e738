//! The generated contract of device plugins. No behaviour.

/// Device plugins, package `v1beta1`.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
pub mod v1beta1 {
    tonic::include_proto!("v1beta1");
}
