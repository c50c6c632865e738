//! Whether pods are worked on: not while the runtime has errors, as upstream. What is under way goes on, what has to be begun or ended waits.
//! Says so once each time, and has all pods looked at when it is over.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::NodeAgent;
use super::runtime::Seen;

/// How often it is looked at besides: an answer that does not come is told by nobody.
const LOOK: Duration = Duration::from_secs(1);

/// Keeps the runtime's word. Never returns.
pub(super) async fn run(agent: NodeAgent, mut seen: watch::Receiver<Seen>) {
    loop {
        let well = !seen.borrow_and_update().is_ill(agent.health.listed(), Instant::now());
        if agent.runtime.set_well(well) {
            match well {
                true => {
                    tracing::info!("the runtime is well again: pods are worked on");
                    agent.state.control().look_at_all();
                }
                false => tracing::warn!("no pod is worked on while the runtime is not well: the node's condition says why"),
            }
            agent.own.wake();
        }
        tokio::select! {
            changed = seen.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}
