//! Follows the node's own object at the API server, and says when it may take pods or may not any more.

use std::pin::pin;

use futures::{Stream, StreamExt as _};
use k8s_openapi::api::core::v1::Node;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};

use super::NodeAgent;
use crate::api::follow::{asking, pauses};
use crate::record::Weight;

/// What the API server tells of the object.
fn events(client: Client, name: &str) -> impl Stream<Item = Result<Event<Node>, watcher::Error>> + Send + use<> {
    let config = asking(name).fields(&format!("metadata.name={name}"));
    watcher(Api::all(client), config).backoff(pauses())
}

/// Watches the object. Never returns.
pub(super) async fn run(agent: NodeAgent) {
    let mut events = pin!(events(agent.api.client.clone(), &agent.config.node_name));
    let (mut listed, mut unschedulable) = (false, false);
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => listed = false,
            Ok(Event::InitApply(node) | Event::Apply(node)) => {
                listed = true;
                let is_new = agent.own.current().is_none();
                agent.own.set(node);
                if is_new {
                    agent.own.wake();
                }
            }
            Ok(Event::InitDone) if listed => {}
            Ok(Event::InitDone | Event::Delete(_)) => agent.own.forget(),
            Err(error) => {
                tracing::debug!(%error, "the node's own object is not watched");
                continue;
            }
        }
        tell_schedulable(&agent, &mut unschedulable);
    }
}

/// The event of a node that takes no pods any more, or takes them again.
fn tell_schedulable(agent: &NodeAgent, before: &mut bool) {
    let Some(node) = agent.own.current() else { return };
    let now = node.spec.as_ref().and_then(|spec| spec.unschedulable).unwrap_or(false);
    if std::mem::replace(before, now) != now {
        let reason = if now { "NodeNotSchedulable" } else { "NodeSchedulable" };
        let message = format!("Node {} status is now: {reason}", agent.config.node_name);
        agent.recorder.node_event(Weight::Normal, reason, &message);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::api::node::fake::{calls, server};

    #[tokio::test(start_paused = true)]
    async fn a_server_that_refuses_every_list_is_asked_ever_more_seldom() {
        let (client, asked) = server(Vec::new());
        let follow = async {
            let mut events = pin!(events(client, "n1"));
            while events.next().await.is_some() {}
        };
        let _ = tokio::time::timeout(Duration::from_secs(30), follow).await;
        let asked = calls(&asked).len();
        assert!((5..15).contains(&asked), "asked {asked} times in 30 seconds");
    }
}
