//! What other parts of the node ask of the main loop.

use std::sync::Arc;

use super::{Handle, Main};
use crate::control::Order;
use crate::host_ports;
use crate::node::NodeView;
use crate::pod;
use crate::resources::extended_resources;
use crate::worker::Message;

impl Main {
    pub(super) fn carry_out(&mut self, order: Order) {
        match order {
            Order::End { mut choose, unfinished } => {
                for Handle { pod, inbox, .. } in self.workers.values() {
                    if let Some(ending) = choose(pod) {
                        let _ = inbox.send(Message::End { ending, unfinished: unfinished.clone() });
                    }
                }
            }
            Order::Conditions(conditions) => self.conditions = conditions,
            Order::ClearEnded(unfinished) => {
                let over = |uid| host_ports::is_over(self.table.status(uid).as_ref());
                for (_, handle) in self.workers.iter().filter(|(uid, handle)| !handle.ending && over(uid)) {
                    let _ = handle.inbox.send(Message::ClearRecords(unfinished.clone()));
                }
            }
            Order::Addresses(host_ips) => {
                let node = Arc::new(NodeView { host_ips, ..NodeView::clone(&self.executor.node) });
                self.executor.node = node.clone();
                for handle in self.workers.values() {
                    let _ = handle.inbox.send(Message::NodeChanged(node.clone()));
                }
            }
            Order::ObjectsChanged(pods) => {
                for handle in pods.iter().filter_map(|uid| self.workers.get(uid)) {
                    let _ = handle.inbox.send(Message::ObjectsChanged);
                }
            }
            Order::LookAgain => self.start_queued(),
            Order::NodeLooked(uid, looked) => {
                self.second_looks.take(uid, looked);
                self.start_queued();
            }
            Order::CpusChanged | Order::LookAtAll => {
                for handle in self.workers.values() {
                    let _ = handle.inbox.send(Message::Look);
                }
            }
            Order::DevicesChanged(resource) => {
                for Handle { pod, inbox, .. } in self.workers.values() {
                    let asks = |c| extended_resources(c).any(|(name, _)| name == resource);
                    if pod::all_containers(pod).any(asks) {
                        // What failed for want of a device is tried again at once.
                        let _ = inbox.send(Message::ObjectsChanged);
                    }
                }
                self.allotting.devices_changed();
                self.start_queued();
            }
        }
    }
}
