//! The network of one berth instance, as its CRI server uses it.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use crate::{Attachment, Cidr, Error, Netns, PodNetwork, Result};

/// Where a network finds its configuration and keeps its state.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// Folder of `*.conflist`, `*.conf` and `*.json` files.
    pub conf_dir: PathBuf,
    /// Folders searched for plugin binaries, in order.
    pub bin_dirs: Vec<PathBuf>,
    /// The instance's id (six hex digits): part of the name of the bridge, veths and the nf_tables table.
    pub instance: String,
    /// Folder for what dies with the boot: leases, attachments, pending deletions.
    pub state_dir: PathBuf,
    /// Folder for cached results of chains with external plugins (libcni's format), which outlive the boot.
    pub cache_dir: PathBuf,
    /// Subnets of the built-in network, used when `conf_dir` has no configuration; empty: chosen from the instance's id.
    pub pod_cidrs: Vec<Cidr>,
    /// Use a plugin binary found in `bin_dirs` even for the types that are built in.
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

/// The network of one instance. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Network {}

impl Network {
    /// Opens the state, starts the netlink worker and the reaper (which continues deletions on record) and reads the
    /// configuration. A broken configuration is not an error here: see [`Network::status`].
    pub fn load(config: NetworkConfig) -> Result<Self> {
        let _ = config;
        Ok(Self {})
    }

    /// Whether pods can be attached. Reads changed configuration files; asks external plugins of CNI 1.1 by STATUS.
    pub async fn status(&self) -> NetworkStatus {
        NetworkStatus { reason: "NetworkPluginNotReady".to_owned(), ..Default::default() }
    }

    /// Whether an external plugin is in the chain: then [`Netns::path`] must be given.
    pub fn needs_netns_path(&self) -> bool {
        false
    }

    /// Gives the sandbox its interface, addresses and host ports. Undone when it fails. A second call for a sandbox that
    /// is attached, or being attached, yields the same result; a dropped call goes on until it has ended or undone itself.
    pub async fn attach(&self, pod: &PodNetwork, netns: Netns) -> Result<Attachment> {
        let _ = (pod, netns);
        Err(Error::NotReady { reason: "not loaded".to_owned() })
    }

    /// Takes the sandbox off the network: when this returns, its host ports and conntrack entries are gone and its veth is
    /// down and off the bridge. The link is deleted by the reaper, and only then are its addresses free again.
    /// Unknown and detached sandboxes are no error; without a namespace (after its end) the host's side is still undone.
    pub async fn detach(&self, pod: &PodNetwork, netns: Option<Netns>) -> Result<()> {
        let _ = (pod, netns);
        Ok(())
    }

    /// Checks that the sandbox's network is as it was left (CNI CHECK).
    pub async fn check(&self, pod: &PodNetwork, netns: Netns) -> Result<()> {
        let _ = (pod, netns);
        Ok(())
    }

    /// What [`Network::attach`] returned for this sandbox, from its record.
    pub fn attachment(&self, sandbox_id: &str) -> Option<Attachment> {
        let _ = sandbox_id;
        None
    }

    /// At start: removes the addresses, links, host ports and cached results of every sandbox that is not `live`, and tells
    /// external plugins (GC, or DEL from the cached result).
    pub async fn reconcile(&self, live: &BTreeSet<String>) -> Result<()> {
        let _ = live;
        Ok(())
    }

    /// What is left of sandboxes that are not `live`. Deletions on record are not leaks: [`Network::settle`] first.
    pub async fn leaks(&self, live: &BTreeSet<String>) -> Result<Vec<Leak>> {
        let _ = live;
        Ok(Vec::new())
    }

    /// Waits until no link deletion is pending; false when `timeout` passed first.
    pub async fn settle(&self, timeout: Duration) -> bool {
        let _ = timeout;
        true
    }

    /// Removes the bridge and the nf_tables table of the instance. For `berth stop --all`, after the last pod.
    pub async fn remove_all(&self) -> Result<()> {
        Ok(())
    }

    /// Replaces the subnets of the built-in network (the CRI's UpdateRuntimeConfig). Pods that are attached keep theirs.
    pub fn set_pod_cidrs(&self, pod_cidrs: Vec<Cidr>) -> Result<()> {
        let _ = pod_cidrs;
        Ok(())
    }
}
