//! The crate's error.

/// What failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Not written yet (goes away).
    #[error("not ready")]
    Unready,
    /// The spec asks for something that is wrong or that berth does not do.
    #[error("{field}: {reason}")]
    Spec {
        /// The field, as a path like `linux.seccomp.listenerPath`.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
}
