//! What the node says of itself to pods that come: pressures from eviction, the end from shutdown. Both tell the main loop through
//! here, so that neither overwrites the other.

use std::sync::{Arc, Mutex, PoisonError};

use crate::admission::NodeConditions;
use crate::control::PodControl;

/// The node's conditions and the main loop that goes by them. Clones share it.
#[derive(Clone, Debug)]
pub struct NodeState {
    control: PodControl,
    conditions: Arc<Mutex<NodeConditions>>,
}

impl NodeState {
    /// Of a node that is well.
    pub fn new(control: PodControl) -> NodeState {
        NodeState { control, conditions: Arc::default() }
    }

    /// Changes the conditions; the main loop is told what changed. Returns what they were.
    pub fn change(&self, change: impl FnOnce(&mut NodeConditions)) -> NodeConditions {
        let mut conditions = self.conditions.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *conditions;
        change(&mut conditions);
        if *conditions != before {
            self.control.set_conditions(*conditions);
        }
        before
    }

    /// By which pods are ended.
    pub fn control(&self) -> &PodControl {
        &self.control
    }
}
