//! Every way an image operation fails. One variant is one failed operation with its subject.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::digest::{Digest, ParseDigestError};

/// A failed image operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text is no image reference.
    #[error("invalid image reference {text:?}: {reason}")]
    Reference {
        /// What was given.
        text: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A digest in a manifest or index cannot be used.
    #[error("{subject}")]
    Digest {
        /// Where it stood.
        subject: String,
        /// What is wrong with it.
        #[source]
        source: ParseDigestError,
    },
    /// Credentials that cannot be used.
    #[error("invalid registry credentials: {reason}")]
    Credentials {
        /// What is wrong with them; never holds a secret.
        reason: &'static str,
    },
    /// No image of that ID in the store.
    #[error("image {id}: not found")]
    NoImage {
        /// The ID asked for.
        id: String,
    },
    /// The registry does not have it.
    #[error("{reference}: not found")]
    NotFound {
        /// The reference, or the blob of a repository.
        reference: String,
    },
    /// The registry refuses.
    #[error("pull access denied for {repository}: repository does not exist or may require authorization: {detail}")]
    Unauthorized {
        /// Registry and repository.
        repository: String,
        /// The registry's own words or what was missing.
        detail: String,
    },
    /// The registry cannot be reached.
    #[error("registry {host} is unavailable")]
    Unavailable {
        /// Host and port.
        host: String,
        /// What the connection said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The registry answered something unexpected.
    #[error("registry {host}: {method} {path}: status {status}{detail}")]
    Status {
        /// Host and port.
        host: String,
        /// The HTTP method.
        method: &'static str,
        /// The path asked for.
        path: String,
        /// The HTTP status code.
        status: u16,
        /// The registry's own words, with a leading `: `, or empty.
        detail: String,
    },
    /// The registry went silent.
    #[error("registry {host}: no progress for {} s", after.as_secs_f32())]
    Stalled {
        /// Host and port.
        host: String,
        /// How long was waited.
        after: Duration,
    },
    /// The registry's answer is not what the protocol says.
    #[error("registry {host}: {reason}")]
    Protocol {
        /// Host and port.
        host: String,
        /// What is wrong.
        reason: String,
    },
    /// A registry configuration file cannot be used.
    #[error("registry configuration {}: {reason}", path.display())]
    HostsFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Content does not have its digest.
    #[error("{subject}: digest mismatch: expected {expected}, got {found}")]
    DigestMismatch {
        /// Which blob or layer.
        subject: String,
        /// What the manifest or configuration says.
        expected: Digest,
        /// What the bytes say.
        found: Digest,
    },
    /// Content is shorter or longer than its descriptor says.
    #[error("{subject}: size mismatch: expected {expected} bytes, got {found}")]
    SizeMismatch {
        /// Which blob.
        subject: String,
        /// What the descriptor says.
        expected: u64,
        /// What arrived.
        found: u64,
    },
    /// A manifest, index or configuration cannot be read.
    #[error("{subject}: cannot be parsed")]
    Json {
        /// Which document.
        subject: String,
        /// The parser's words.
        #[source]
        source: serde_json::Error,
    },
    /// An image that is well formed but of no use here.
    #[error("{subject}: {reason}")]
    Unsupported {
        /// The image or layer.
        subject: String,
        /// What is not supported.
        reason: String,
    },
    /// A layer archive entry that cannot or must not be applied.
    #[error("layer entry {entry:?}: {reason}")]
    LayerEntry {
        /// The entry's name in the archive.
        entry: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A layer archive entry that the file system refused.
    #[error("layer entry {entry:?}: {operation}")]
    LayerApply {
        /// The entry's name in the archive.
        entry: String,
        /// The call that failed.
        operation: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A layer's stream ended early or is no archive.
    #[error("layer {layer}: cannot be read")]
    LayerStream {
        /// Which layer.
        layer: String,
        /// What the decoder or connection said.
        #[source]
        source: io::Error,
    },
    /// An image archive without the parts it needs.
    #[error("image archive {}: {reason}", path.display())]
    Archive {
        /// The file or folder.
        path: PathBuf,
        /// What is missing or wrong.
        reason: String,
    },
    /// A file of the store or of an archive.
    #[error("{operation} {}", path.display())]
    File {
        /// What was tried, such as `open`.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Everyone who waited for this operation has left, or the store is shutting down.
    #[error("canceled")]
    Canceled,
    /// A worker thread or task of the store died: a defect of ours.
    #[error("{task} ended unexpectedly")]
    Worker {
        /// Which.
        task: &'static str,
    },
    /// The result of an operation that several callers share.
    #[error(transparent)]
    Shared(Arc<Error>),
}

/// What an [`Error`] means to a caller: the only thing a gRPC mapping needs to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The caller's text or credentials cannot be used.
    InvalidArgument,
    /// There is no such image, here or in the registry.
    NotFound,
    /// The registry wants other credentials.
    Unauthorized,
    /// The registry cannot be reached, is silent or is broken.
    Unavailable,
    /// Content is damaged or not what its digest says.
    Corrupt,
    /// The image is of a kind that is refused.
    Unsupported,
    /// The disk is full.
    NoSpace,
    /// The operation was given up.
    Canceled,
    /// Everything else.
    Internal,
}

impl Error {
    /// What the error means to a caller.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Reference { .. } | Error::Credentials { .. } | Error::Archive { .. } => ErrorKind::InvalidArgument,
            Error::NoImage { .. } | Error::NotFound { .. } => ErrorKind::NotFound,
            Error::Unauthorized { .. } => ErrorKind::Unauthorized,
            Error::Unavailable { .. } | Error::Stalled { .. } => ErrorKind::Unavailable,
            Error::Status { status, .. } if *status >= 500 || *status == 429 => ErrorKind::Unavailable,
            Error::DigestMismatch { .. }
            | Error::SizeMismatch { .. }
            | Error::Digest { .. }
            | Error::Json { .. }
            | Error::LayerEntry { .. }
            | Error::Protocol { .. } => ErrorKind::Corrupt,
            Error::Unsupported { .. } => ErrorKind::Unsupported,
            Error::LayerApply { source, .. } | Error::File { source, .. } if is_full(source) => ErrorKind::NoSpace,
            Error::LayerStream { .. } => ErrorKind::Corrupt,
            Error::Canceled => ErrorKind::Canceled,
            Error::Shared(shared) => shared.kind(),
            Error::Status { .. }
            | Error::HostsFile { .. }
            | Error::LayerApply { .. }
            | Error::File { .. }
            | Error::Worker { .. } => ErrorKind::Internal,
        }
    }

    pub(crate) fn file(operation: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Error::File { operation, path: path.to_path_buf(), source: source.into() }
    }
}

fn is_full(source: &io::Error) -> bool {
    matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
