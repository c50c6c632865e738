//! What the node says of itself to pods that come, and to the API server: pressures from eviction, the end from shutdown. Both tell the
//! main loop through here, so that neither overwrites the other.

use std::sync::Arc;

use tokio::sync::watch;

use crate::admission::NodeConditions;
use crate::control::PodControl;

/// The node's conditions and the main loop that goes by them. Clones share it.
#[derive(Clone, Debug)]
pub struct NodeState {
    control: PodControl,
    conditions: Arc<watch::Sender<NodeConditions>>,
}

impl NodeState {
    /// Of a node that is well.
    pub fn new(control: PodControl) -> NodeState {
        NodeState { control, conditions: Arc::new(watch::Sender::new(NodeConditions::default())) }
    }

    /// Changes the conditions; the main loop and who follows are told what changed. Returns what they were.
    pub fn change(&self, change: impl FnOnce(&mut NodeConditions)) -> NodeConditions {
        let mut before = NodeConditions::default();
        self.conditions.send_if_modified(|conditions| {
            before = *conditions;
            change(conditions);
            let changed = *conditions != before;
            if changed {
                self.control.set_conditions(*conditions);
            }
            changed
        });
        before
    }

    /// The conditions now.
    pub fn current(&self) -> NodeConditions {
        *self.conditions.borrow()
    }

    /// Follows them.
    pub fn follow(&self) -> watch::Receiver<NodeConditions> {
        self.conditions.subscribe()
    }

    /// By which pods are ended.
    pub fn control(&self) -> &PodControl {
        &self.control
    }
}
