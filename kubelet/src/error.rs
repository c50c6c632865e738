//! The errors of the crate: one variant per failed operation, with its subject. Owns texts only.

use std::io;
use std::path::PathBuf;

/// Failures of the kubelet as a whole; failures of one pod are part of that pod's status instead.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration contradicts itself.
    #[error("configuration field {field}: {problem}")]
    Config {
        /// The field of [`crate::Config`].
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// A field of KubeletConfiguration, or a flag, has a value that cannot be.
    #[error("{field}: {problem}")]
    Setting {
        /// The field's path, or the flag.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A file of configuration is not one.
    #[error("configuration file {}: {problem}", path.display())]
    ConfigurationFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A folder could not be made.
    #[error("create folder {}", path.display())]
    CreateDir {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
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
    /// A file could not be read.
    #[error("read {}", path.display())]
    ReadFile {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file or folder could not be removed.
    #[error("remove {}", path.display())]
    Remove {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The API socket could not be opened.
    #[error("listen on {address}")]
    Listen {
        /// Path or address.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A certificate, key or bundle of authorities could not be used.
    #[error("certificates of {}", path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Watching the manifests failed.
    #[error("watch {}", path.display())]
    Watch {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Who has which processors does not fit the machine or the configuration.
    #[error(
        "could not restore state from checkpoint: {problem}, please drain this node and delete the CPU manager checkpoint file {path:?} before restarting Kubelet"
    )]
    CpuManager {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The key that secrets of API pods are sealed with cannot be used.
    #[error("sealing key {}: {problem}", path.display())]
    SealingKey {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A CRI call failed.
    #[error("{call}: {}", crate::cri::status_text(source))]
    Cri {
        /// The call's name.
        call: &'static str,
        /// The status that came back.
        #[source]
        source: Box<tonic::Status>,
    },
}
