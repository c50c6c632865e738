//! What the caller configures, and what it is told.

use std::path::PathBuf;
use std::time::Duration;

use crate::Cidr;

/// Where a network finds its configuration and keeps its state.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// Folder of `*.conflist`, `*.conf` and `*.json` files.
    pub conf_dir: PathBuf,
    /// Folders searched for plugin binaries, in order.
    pub bin_dirs: Vec<PathBuf>,
    /// The instance's id (six hex digits): part of the name of the bridge, veths and the nf_tables table.
    pub instance: String,
    /// Folder for what dies with the boot: leases, results, pending deletions.
    pub state_dir: PathBuf,
    /// Folder for cached results of chains with external plugins (libcni's format), which outlive the boot.
    pub cache_dir: PathBuf,
    /// Subnets of the built-in network, used when `conf_dir` has no configuration; empty: chosen from the instance's id so that they
    /// overlap with no route of the host.
    pub pod_cidrs: Vec<Cidr>,
    /// Without a configuration in `conf_dir` pods get the built-in network; false: there is no network then, and the node waits for one.
    pub built_in: bool,
    /// Which one runs when a plugin's type is built in (bridge, host-local, loopback, portmap): false, the usual choice, ours in this
    /// process, whatever is in `bin_dirs`; true, a binary of that name in `bin_dirs` where there is one.
    pub prefer_external: bool,
    /// How long one external plugin may run before it is killed.
    pub plugin_timeout: Duration,
}

/// Whether pods can be attached, and why not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NetworkStatus {
    /// A usable configuration is loaded and its plugins say that they are ready.
    pub ready: bool,
    /// Empty, or a CamelCase reason (`NetworkPluginNotReady`).
    pub reason: String,
    /// Empty, or what is wrong.
    pub message: String,
    /// Name of the network in use.
    pub network: String,
    /// The file that it comes from; none: the built-in network.
    pub source: Option<PathBuf>,
    /// Files that were not used, each with its error.
    pub invalid: Vec<(PathBuf, String)>,
}

/// Something of this instance in the kernel or on disk that no live sandbox owns.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Leak {
    /// A host-side veth.
    Link(String),
    /// A leased address and the sandbox that it was leased to.
    Address(String, String),
    /// A host port's element in the nf_tables maps, with its owner.
    HostPort(String, String),
    /// A cached result, by sandbox.
    Record(String),
}

impl std::fmt::Display for Leak {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Link(name) => write!(f, "veth {name}"),
            Self::Address(ip, owner) => write!(f, "address {ip} leased to {owner}"),
            Self::HostPort(port, owner) => write!(f, "host port {port} of {owner}"),
            Self::Record(owner) => write!(f, "network record of {owner}"),
        }
    }
}
