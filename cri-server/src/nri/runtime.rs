//! What plugins may ask of the runtime: all there is, other limits, an end. Everything is submitted to the owners.

use std::sync::{Arc, Weak};
use std::time::Duration;

use berth_nri::Runtime;
use berth_nri::api::{Container, ContainerEviction, ContainerUpdate, PodSandbox};
use futures::future::BoxFuture;

use super::{limits, messages};
use crate::Server;
use crate::board::ContainerState;
use crate::error::text;
use crate::sandbox::owner;
use crate::sandbox::state::Op;

/// The server as plugins see it. Does not keep it alive.
pub(crate) struct Node(Weak<Server>);

impl Node {
    pub(crate) fn of(server: &Arc<Server>) -> Self {
        Self(Arc::downgrade(server))
    }
}

impl Runtime for Node {
    fn snapshot(&self) -> BoxFuture<'static, (Vec<PodSandbox>, Vec<Container>)> {
        let server = self.0.upgrade();
        Box::pin(async move {
            let Some(server) = server else { return Default::default() };
            let pods = server.board.sandboxes().iter().map(|view| messages::pod(view)).collect();
            let mut containers = Vec::new();
            for view in server.board.containers() {
                if view.state != ContainerState::Exited {
                    containers.push(messages::on_file(&server, view).await);
                }
            }
            (pods, containers)
        })
    }

    fn change(
        &self,
        updates: Vec<ContainerUpdate>,
        evictions: Vec<ContainerEviction>,
    ) -> BoxFuture<'static, Vec<ContainerUpdate>> {
        let server = self.0.upgrade();
        Box::pin(async move {
            let Some(server) = server else { return updates };
            let mut failed = Vec::new();
            for eviction in evictions {
                evict(&server, &eviction).await;
            }
            for update in updates {
                if let Err(reason) = limit(&server, &update).await {
                    tracing::warn!(container = update.container_id, reason, "NRI: an update that a plugin asked for failed");
                    if !update.ignore_failure {
                        failed.push(update);
                    }
                }
            }
            failed
        })
    }
}

async fn limit(server: &Arc<Server>, update: &ContainerUpdate) -> Result<(), String> {
    // What is gone needs no limits.
    let Some(view) = server.board.container(&update.container_id) else { return Ok(()) };
    let wanted = update.linux.as_ref().and_then(|l| l.resources.clone()).unwrap_or_default();
    let resources = Box::new(limits::domain(&wanted).map_err(|e| text(&e))?);
    let op = |reply| Op::Update { id: view.id.clone(), resources, by_plugin: true, reply };
    owner::submit(server, &view.sandbox, op).await.map_err(|e| text(&*e))
}

async fn evict(server: &Arc<Server>, eviction: &ContainerEviction) {
    let Some(view) = server.board.container(&eviction.container_id) else { return };
    tracing::info!(container = %view.id, reason = eviction.reason, "NRI: a plugin ends a container");
    let op = |reply| Op::StopContainer { id: view.id.clone(), timeout: Duration::ZERO, reply };
    if let Err(error) = owner::submit(server, &view.sandbox, op).await {
        tracing::warn!(container = %view.id, error = %text(&*error), "NRI: a plugin's eviction failed");
    }
}
