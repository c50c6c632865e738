//! The generated contracts of plugins: CSI as far as a node has to do with it, and the registration of plugins. No behaviour.

/// CSI, package `csi.v1`.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("csi.v1");
}

/// Registration, package `pluginregistration`.
#[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
pub mod registration {
    tonic::include_proto!("pluginregistration");
}
