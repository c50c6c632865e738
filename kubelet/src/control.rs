//! How the rest of the node ends pods: shutdown, eviction, `stop --all`. Carries orders to the main loop and waits until they
//! have been carried out; which pods, when and why is for the caller to decide.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::fmt;

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::mpsc;

use crate::admission::NodeConditions;
use crate::pod::PodUid;

/// How and why the node ends a pod that its source still wants. The pod stays known, with its status.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ending {
    /// Seconds that replace the pod's own grace period; at least 1 is given.
    pub grace: Option<i64>,
    /// The status' reason: `Evicted`, `Terminated`, `Preempting`.
    pub reason: String,
    /// The status' message.
    pub message: String,
    /// Message of the condition `DisruptionTarget`; `None`: the pod gets no such condition.
    pub disruption: Option<String>,
}

/// The reason of pods that had to make room.
pub(crate) const EVICTED: &str = "Evicted";

impl Ending {
    /// Whether the pod has to make room: nothing of it is to be kept.
    pub(crate) fn is_eviction(&self) -> bool {
        self.reason == EVICTED
    }
}

/// Held by whoever still works on an order: when the last one lets go, the order has been carried out.
pub(crate) type Unfinished = mpsc::Sender<Infallible>;

/// Which pods an order is about, and what becomes of each.
pub(crate) type Choice = Box<dyn FnMut(&Pod) -> Option<Ending> + Send>;

/// What a second look at the node's object has come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Looked {
    /// The object is as the API server has it.
    Anew,
    /// The API server does not answer.
    Unanswered,
}

/// What the main loop is told by other parts of the node.
pub(crate) enum Order {
    /// Pods for which there is an ending end.
    End { choose: Choice, unfinished: Unfinished },
    /// What new pods have to be judged by from now on.
    Conditions(NodeConditions),
    /// The node's addresses are these now.
    Addresses(Vec<String>),
    /// The runtime's records of pods that have ended go.
    ClearEnded(Unfinished),
    /// Pods that wait may not have to any more.
    LookAgain,
    /// There are other devices of this resource than before.
    DevicesChanged(String),
    /// Containers are to run on other processors than before.
    CpusChanged,
    /// All pods are looked at: what they waited for may be over.
    LookAtAll,
    /// What these pods refer to has changed.
    ObjectsChanged(BTreeSet<PodUid>),
    /// The node's object has been asked for, for this pod.
    NodeLooked(PodUid, Looked),
}

impl fmt::Debug for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Order::End { .. } => f.write_str("End"),
            Order::ClearEnded(_) => f.write_str("ClearEnded"),
            Order::LookAgain => f.write_str("LookAgain"),
            Order::Addresses(addresses) => f.debug_tuple("Addresses").field(addresses).finish(),
            Order::CpusChanged => f.write_str("CpusChanged"),
            Order::LookAtAll => f.write_str("LookAtAll"),
            Order::ObjectsChanged(pods) => f.debug_tuple("ObjectsChanged").field(pods).finish(),
            Order::NodeLooked(uid, looked) => f.debug_tuple("NodeLooked").field(uid).field(looked).finish(),
            Order::DevicesChanged(resource) => f.debug_tuple("DevicesChanged").field(resource).finish(),
            Order::Conditions(conditions) => f.debug_tuple("Conditions").field(conditions).finish(),
        }
    }
}

/// The other parts' end of the main loop's orders. Clones give orders to the same loop.
#[derive(Clone, Debug)]
pub struct PodControl(mpsc::UnboundedSender<Order>);

impl PodControl {
    pub(crate) fn new() -> (PodControl, mpsc::UnboundedReceiver<Order>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (PodControl(sender), receiver)
    }

    /// Ends every pod for which `choose` gives an ending: preStop hooks, SIGTERM, grace, SIGKILL, as its spec says but for the
    /// grace. Comes back when none of them runs any more and their volumes are gone, or when the kubelet has stopped; it has no
    /// limit of its own. A second order may shorten the grace of the first.
    pub async fn end(&self, choose: impl FnMut(&Pod) -> Option<Ending> + Send + 'static) {
        let (unfinished, mut finished) = mpsc::channel(1);
        if self.0.send(Order::End { choose: Box::new(choose), unfinished }).is_ok() {
            let _ = finished.recv().await;
        }
    }

    /// Has the main loop judge the waiting pods again.
    pub(crate) fn look_again(&self) {
        let _ = self.0.send(Order::LookAgain);
    }

    /// Removes what the runtime still has of pods that have ended: containers with their layers and logs. Their statuses stay. Comes
    /// back when nothing of them is left, or when the kubelet has stopped; it has no limit of its own.
    pub(crate) async fn clear_ended(&self) {
        let (unfinished, mut finished) = mpsc::channel(1);
        if self.0.send(Order::ClearEnded(unfinished)).is_ok() {
            let _ = finished.recv().await;
        }
    }

    /// Gives pods' statuses the addresses that the node has now.
    pub(crate) fn set_addresses(&self, addresses: Vec<String>) {
        let _ = self.0.send(Order::Addresses(addresses));
    }

    /// Has the pods looked at that have, or wait for, devices of this resource.
    pub(crate) fn devices_changed(&self, resource: &str) {
        let _ = self.0.send(Order::DevicesChanged(resource.to_owned()));
    }

    /// Has all pods see on which processors their containers are to run.
    pub(crate) fn cpus_changed(&self) {
        let _ = self.0.send(Order::CpusChanged);
    }

    /// Has all pods looked at.
    pub(crate) fn look_at_all(&self) {
        let _ = self.0.send(Order::LookAtAll);
    }

    /// Has these pods look up what they refer to again.
    pub(crate) fn objects_changed(&self, pods: BTreeSet<PodUid>) {
        if !pods.is_empty() {
            let _ = self.0.send(Order::ObjectsChanged(pods));
        }
    }

    /// The node's object has been asked for, for this pod.
    pub(crate) fn node_looked(&self, uid: PodUid, looked: Looked) {
        let _ = self.0.send(Order::NodeLooked(uid, looked));
    }

    /// Judges pods that come from now on by these conditions: `shutting_down` lets none in.
    pub fn set_conditions(&self, conditions: NodeConditions) {
        let _ = self.0.send(Order::Conditions(conditions));
    }
}
