//! The network of one berth instance, as its CRI server uses it.

mod attach;
mod config;
mod housekeeping;
mod inner;
mod leaks;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

pub use config::{Leak, NetworkConfig, NetworkStatus};

use crate::doing::Doing;
use crate::{Attachment, Cidr, Netns, PodNetwork, Result};

/// The network of one instance. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Network {
    inner: Arc<inner::Inner>,
}

impl Network {
    /// Opens the state, starts the netlink worker and the reaper (which continues deletions on record) and reads the
    /// configuration. A broken configuration is not an error here: see [`Network::status`].
    ///
    /// The network namespace of the calling thread is the host's side of everything.
    pub fn load(config: NetworkConfig) -> Result<Self> {
        Ok(Self { inner: Arc::new(inner::Inner::open(config)?) })
    }

    /// Whether pods can be attached. Reads changed configuration files; asks external plugins of CNI 1.1 by STATUS.
    pub async fn status(&self) -> NetworkStatus {
        self.inner.status().await
    }

    /// Whether an external plugin is in the chain: then [`Netns::path`] must be given.
    pub fn needs_netns_path(&self) -> bool {
        self.inner.needs_netns_path()
    }

    /// Whether a plugin of the network that new pods get takes [`PodNetwork::bandwidth`]. The built-in network has none.
    pub fn limits_bandwidth(&self) -> bool {
        self.inner.limits_bandwidth()
    }

    /// Gives the sandbox its interface, addresses and host ports. Undone when it fails. A second call for a sandbox that
    /// is attached, or being attached, yields the same result; a dropped call goes on until it has ended or undone itself.
    pub async fn attach(&self, pod: &PodNetwork, netns: Netns) -> Result<Attachment> {
        attach::attach(&self.inner, pod, netns).await
    }

    /// Takes the sandbox off the network: when this returns, its host ports and conntrack entries are gone and its veth is
    /// down and off the bridge. The link is deleted by the reaper, and only then are its addresses free again.
    /// Unknown and detached sandboxes are no error; without a namespace (after its end) the host's side is still undone.
    /// What was kept at attach wins over `pod`, of which only the sandbox's id and the interface's name must be right then.
    pub async fn detach(&self, pod: &PodNetwork, netns: Option<Netns>) -> Result<()> {
        attach::detach(&self.inner, pod, netns).await
    }

    /// Checks that the sandbox's network is as it was left (CNI CHECK).
    pub async fn check(&self, pod: &PodNetwork, netns: Netns) -> Result<()> {
        attach::check(&self.inner, pod, netns).await
    }

    /// What [`Network::attach`] returned for this sandbox's interface `eth0`, from its record.
    pub fn attachment(&self, sandbox_id: &str) -> Option<Attachment> {
        self.inner.attachment(sandbox_id, "eth0")
    }

    /// The plugins that run for a sandbox at this moment, the oldest call first.
    pub fn doing(&self, sandbox_id: &str) -> Vec<Doing> {
        self.inner.host.doing.of(sandbox_id)
    }

    /// At start: removes the addresses, links, host ports and cached results of every sandbox that is not `live`, and tells
    /// external plugins (GC, or DEL from the cached result). Host ports of live sandboxes that are missing come back.
    pub async fn reconcile(&self, live: &BTreeSet<String>) -> Result<()> {
        housekeeping::reconcile(&self.inner, live).await
    }

    /// What is left of sandboxes that are not `live`. Deletions on record are not leaks: [`Network::settle`] first.
    pub async fn leaks(&self, live: &BTreeSet<String>) -> Result<Vec<Leak>> {
        leaks::leaks(&self.inner, live).await
    }

    /// The same where no network runs: nothing is started, forgotten or written. Blocking; the network namespace of the calling
    /// thread is the host's.
    pub fn leaks_on_record(config: &NetworkConfig, live: &BTreeSet<String>) -> Result<Vec<Leak>> {
        leaks::leaks_on_record(config, live)
    }

    /// Waits until no link deletion is pending; false when `timeout` passed first.
    pub async fn settle(&self, timeout: Duration) -> bool {
        self.inner.reaper.settle(timeout).await
    }

    /// Removes the bridge and the nf_tables table of the instance. For `berth stop --all`, after the last pod.
    pub async fn remove_all(&self) -> Result<()> {
        housekeeping::remove_all(&self.inner).await
    }

    /// Replaces the subnets of the built-in network (the CRI's UpdateRuntimeConfig). Pods that are attached keep theirs.
    pub fn set_pod_cidrs(&self, pod_cidrs: Vec<Cidr>) -> Result<()> {
        self.inner.set_pod_cidrs(pod_cidrs)
    }
}
