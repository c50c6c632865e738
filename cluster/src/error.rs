//! The errors of the crate: one variant per failed operation, with its subject. Owns texts only.

use std::io;
use std::path::PathBuf;

/// What failed on the way to an API server.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("read {}", path.display())]
    ReadFile {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The record of a join is damaged, or a later berth's.
    #[error("the record of the join, {}, cannot be read: remove it, and what that join wrote (docs/guide/join.md)", path.display())]
    JoinRecord {
        /// The file.
        path: PathBuf,
    },
    /// A file could not be written.
    #[error("write {}", path.display())]
    WriteFile {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is no kubeconfig yet, so nobody can be asked.
    #[error("there are no credentials for the API server yet: no {}", path.display())]
    NoCredentials {
        /// The kubeconfig that is awaited.
        path: PathBuf,
    },
    /// A kubeconfig is not one, or asks for what is not there.
    #[error("kubeconfig {name}: {problem}")]
    Kubeconfig {
        /// The file, or where the text came from.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A certificate or key cannot be used.
    #[error("{name}: {problem}")]
    Certificate {
        /// The file, or where the certificate came from.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// No connection to the API server.
    #[error("connect to {server}")]
    Connect {
        /// Its address.
        server: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A request that got no answer.
    #[error("ask {server}")]
    Ask {
        /// The API server.
        server: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The API server's refusal, or no answer of it.
    #[error("ask the API server for {asking}")]
    Api {
        /// What it was asked for.
        asking: String,
        /// Why not.
        #[source]
        source: Box<kube::Error>,
    },
    /// What a server says of its cluster is not believed, or not what kubeadm's clusters say.
    #[error("discovery at {server}: {problem}")]
    Discovery {
        /// The server.
        server: String,
        /// Why not.
        problem: String,
    },
    /// A certificate was not issued.
    #[error("certificate request {name}: {problem}")]
    Request {
        /// The request.
        name: String,
        /// What has become of it.
        problem: String,
    },
    /// The certificate that a request was answered with is over.
    #[error("certificate request {name}: its certificate has expired")]
    Expired {
        /// The request.
        name: String,
    },
    /// A request that was answered too late.
    #[error("{server} did not answer within {seconds} s")]
    Late {
        /// The API server.
        server: String,
        /// How long was waited.
        seconds: u64,
    },
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// An error with its causes, in one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let more = cause.to_string();
        // Some errors tell their cause in their own text.
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        next = cause.source();
    }
    text
}
