//! What other parts of the node ask of the main loop.

use super::{Handle, Main};
use crate::control::Order;
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
            Order::LookAgain => self.start_queued(),
        }
    }
}
