//! The node's object as the API server last had it, for whoever goes by it: labels and taints for admission, attached volumes, the
//! pods' addresses. Also what other parts tell for its status. Asks nobody.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use k8s_openapi::api::core::v1::{Node, NodeAddress, NodeStatus, Taint};
use k8s_openapi::jiff::Timestamp;
use tokio::sync::{Notify, watch};

use crate::volume::claim::node_labels;

/// The node's own object. Clones share it; without an API server it stays empty.
#[derive(Clone, Default)]
pub struct OwnNode(Arc<Shared>);

struct Shared {
    seen: watch::Sender<Option<Arc<Node>>>,
    /// `None`: what is mounted is not known yet.
    volumes_in_use: watch::Sender<Option<Vec<String>>>,
    /// Something of the status has changed.
    wake: Notify,
    /// What is on record of it, for as long as it has not been read.
    remembered: Mutex<Option<Arc<Node>>>,
    /// When the API server was last there, in seconds of the wall clock; 0: it was not.
    contact: AtomicI64,
}

impl Default for Shared {
    fn default() -> Self {
        Shared {
            seen: watch::Sender::new(None),
            volumes_in_use: watch::Sender::new(None),
            wake: Notify::new(),
            remembered: Mutex::default(),
            contact: AtomicI64::new(0),
        }
    }
}

impl fmt::Debug for OwnNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OwnNode")
    }
}

/// Two views of one node have the same object.
impl PartialEq for OwnNode {
    fn eq(&self, other: &OwnNode) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.current() == other.current()
    }
}

impl Eq for OwnNode {}

/// Resource versions grow; one that is no number is as new as any.
fn version(node: &Node) -> u128 {
    node.metadata.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(u128::MAX)
}

impl OwnNode {
    /// The object; `None` before it was read, and once it has been deleted.
    pub fn current(&self) -> Option<Arc<Node>> {
        self.0.seen.borrow().clone()
    }

    /// The node's labels: those of its object, or those that every node has.
    pub fn labels(&self, name: &str) -> BTreeMap<String, String> {
        self.known().and_then(|node| node.metadata.labels.clone()).unwrap_or_else(|| node_labels(name))
    }

    /// The node's taints.
    pub fn taints(&self) -> Vec<Taint> {
        self.known().and_then(|node| node.spec.as_ref()?.taints.clone()).unwrap_or_default()
    }

    /// The address ranges of its pods.
    pub(super) fn pod_cidrs(&self) -> Vec<String> {
        self.known().and_then(|node| node.spec.as_ref()?.pod_cidrs.clone()).unwrap_or_default()
    }

    /// The object, or what is on record of it.
    fn known(&self) -> Option<Arc<Node>> {
        self.current().or_else(|| self.0.remembered.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// What is on record: it counts until the object is read.
    pub(in crate::api) fn remember(&self, node: Arc<Node>) {
        *self.0.remembered.lock().unwrap_or_else(PoisonError::into_inner) = Some(node);
        // Those who follow the object look again.
        self.0.seen.send_modify(|_| {});
    }

    /// The API server has answered.
    pub(in crate::api) fn note_contact(&self, now: Timestamp) {
        self.0.contact.store(now.as_second(), Ordering::Relaxed);
    }

    /// When the API server was last there.
    pub(in crate::api) fn contact(&self) -> Option<Timestamp> {
        let second = self.0.contact.load(Ordering::Relaxed);
        Timestamp::from_second(second).ok().filter(|_| second != 0)
    }

    /// What the object calls the node: DNS names and addresses, for a certificate.
    pub fn names(&self) -> (Vec<String>, Vec<IpAddr>) {
        let (mut names, mut addresses) = (Vec::new(), Vec::new());
        let told = self.current().and_then(|node| node.status.as_ref()?.addresses.clone());
        for NodeAddress { type_, address } in told.unwrap_or_default() {
            match (type_.as_str(), address.parse()) {
                ("Hostname" | "InternalIP" | "ExternalIP", Ok(address)) => addresses.push(address),
                ("Hostname" | "InternalDNS" | "ExternalDNS", _) => names.push(address),
                _ => {}
            }
        }
        (names, addresses)
    }

    /// Follows the object.
    pub fn follow(&self) -> watch::Receiver<Option<Arc<Node>>> {
        self.0.seen.subscribe()
    }

    /// The volumes that the status calls in use: `kubernetes.io/csi/<driver>^<handle>`. To be told once what is mounted is known, and
    /// on every change; the status follows at once.
    pub fn set_volumes_in_use(&self, mut volumes: Vec<String>) {
        volumes.sort();
        let changed = self.0.volumes_in_use.send_if_modified(|now| {
            let changed = now.as_ref() != Some(&volumes);
            *now = Some(volumes);
            changed
        });
        if changed {
            self.wake();
        }
    }

    pub(in crate::api) fn volumes_in_use(&self) -> Option<Vec<String>> {
        self.0.volumes_in_use.borrow().clone()
    }

    /// Has the status looked at now.
    pub(crate) fn wake(&self) {
        self.0.wake.notify_one();
    }

    pub(super) async fn woken(&self) {
        self.0.wake.notified().await;
    }

    /// Takes a newer object; answers and watch events may overtake each other.
    pub(crate) fn set(&self, mut node: Node) {
        node.metadata.managed_fields = None;
        self.0.seen.send_if_modified(|seen| {
            let older = |seen: &Arc<Node>| seen.metadata.uid == node.metadata.uid && version(seen) > version(&node);
            if seen.as_ref().is_some_and(|seen| older(seen) || **seen == node) {
                return false;
            }
            *seen = Some(Arc::new(std::mem::take(&mut node)));
            true
        });
    }

    /// The object is gone.
    pub(super) fn forget(&self) {
        self.0.seen.send_if_modified(|seen| seen.take().is_some());
    }
}

/// The status of a node's object.
pub(super) fn status_of(node: &Node) -> NodeStatus {
    node.status.clone().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(uid: &str, version: &str, label: &str) -> Node {
        let mut node = Node::default();
        node.metadata.uid = Some(uid.to_owned());
        node.metadata.resource_version = Some(version.to_owned());
        node.metadata.labels = Some([("zone".to_owned(), label.to_owned())].into());
        node.metadata.managed_fields = Some(Vec::new());
        node
    }

    #[test]
    fn an_older_answer_does_not_replace_a_newer_one() {
        let own = OwnNode::default();
        assert_eq!(own.labels("n")["kubernetes.io/hostname"], "n", "before anything is read the node has the usual labels");
        own.set(node("a", "9", "new"));
        own.set(node("a", "8", "old"));
        assert_eq!(own.labels("n")["zone"], "new");
        assert_eq!(own.current().unwrap().metadata.managed_fields, None);
        own.set(node("b", "1", "another"));
        assert_eq!(own.labels("n")["zone"], "another", "a node of this name that was made again counts");
        own.forget();
        assert_eq!(own.current(), None);
    }

    #[test]
    fn names_are_told_apart_from_addresses_by_what_the_object_calls_them() {
        let names = |addresses: &[(&str, &str)]| {
            let told =
                |(type_, address): &(&str, &str)| NodeAddress { type_: (*type_).to_owned(), address: (*address).to_owned() };
            let mut node = node("a", "1", "z");
            node.status = Some(NodeStatus { addresses: Some(addresses.iter().map(told).collect()), ..NodeStatus::default() });
            let own = OwnNode::default();
            own.set(node);
            let (names, addresses) = own.names();
            format!("{} {}", names.join(","), addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(","))
        };
        let all = [
            ("Hostname", "n1"),
            ("InternalIP", "10.0.0.1"),
            ("ExternalIP", "198.51.100.7"),
            ("ExternalDNS", "n1.example"),
            ("InternalDNS", "n1.internal"),
            ("Else", "x"),
        ];
        assert_eq!(names(&all), "n1,n1.example,n1.internal 10.0.0.1,198.51.100.7");
        assert_eq!(names(&[("Hostname", "10.0.0.2")]), " 10.0.0.2");
    }

    #[tokio::test]
    async fn volumes_in_use_wake_the_status_when_they_change() {
        let own = OwnNode::default();
        own.set_volumes_in_use(vec!["b".into(), "a".into()]);
        own.woken().await;
        assert_eq!(own.volumes_in_use(), Some(vec!["a".into(), "b".into()]));
        own.set_volumes_in_use(vec!["a".into(), "b".into()]);
        let again = tokio::time::timeout(std::time::Duration::from_millis(20), own.woken()).await;
        assert!(again.is_err(), "the same volumes wake nobody");
    }
}
