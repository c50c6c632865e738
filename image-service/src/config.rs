//! What the store is told at start. Nothing here is read from the environment.

use std::path::PathBuf;
use std::time::Duration;

/// Where the store lives and how it reaches registries.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// The store's own folder, `<root>/images`; made with mode 0700 when missing.
    pub root: PathBuf,
    /// How registries are reached.
    pub registry: RegistryConfig,
}

impl StoreConfig {
    /// A store at `root` with the default registry configuration.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        StoreConfig { root: root.into(), registry: RegistryConfig::default() }
    }
}

/// How registries are reached.
#[derive(Clone, Debug)]
pub struct RegistryConfig {
    /// containerd's `certs.d` trees, the first that has the host wins. Read again at each pull.
    pub config_dirs: Vec<PathBuf>,
    /// Which image of a multi-platform index is wanted.
    pub platform: Platform,
    /// How long a connection may take to be made.
    pub connect_timeout: Duration,
    /// A request or download that brings no byte for this long is given up.
    pub stall_timeout: Duration,
    /// How many layers of one pull are downloaded and unpacked at once.
    pub parallel_layers: usize,
}

impl Default for RegistryConfig {
    fn default() -> Self {
        RegistryConfig {
            config_dirs: Vec::new(),
            platform: Platform::host(),
            connect_timeout: Duration::from_secs(30),
            stall_timeout: Duration::from_secs(60),
            parallel_layers: 3,
        }
    }
}

/// An operating system and processor as image indexes name them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// `amd64`, `arm64`, ...
    pub architecture: String,
    /// `v8` and the like; empty for the plain architecture.
    pub variant: String,
}

impl Platform {
    /// The platform this program was built for.
    pub fn host() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", ""),
            "aarch64" => ("arm64", "v8"),
            "arm" => ("arm", "v7"),
            "x86" => ("386", ""),
            other => (other, ""),
        };
        Platform { os: "linux".into(), architecture: architecture.into(), variant: variant.into() }
    }
}
