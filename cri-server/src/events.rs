//! Container and sandbox events for clients that listen. A slow client loses events; it never holds up the runtime.

use std::sync::Arc;

use berth_cri_api::v1;
use tokio::sync::broadcast;

use crate::board::{Board, SandboxView};
use crate::convert::status::{container_status, sandbox_status};
use crate::sandbox::state::Change;

/// How many events a client may be behind.
const BACKLOG: usize = 256;

/// The announcer.
pub(crate) struct Events {
    /// Shared: the backlog's room is set aside from the start.
    sender: broadcast::Sender<Arc<v1::ContainerEventResponse>>,
}

impl Default for Events {
    fn default() -> Self {
        Self { sender: broadcast::channel(BACKLOG).0 }
    }
}

impl Events {
    /// Listens from now on.
    pub(crate) fn listen(&self) -> broadcast::Receiver<Arc<v1::ContainerEventResponse>> {
        self.sender.subscribe()
    }

    /// Tells the listeners, if there are any, with the pod as it is now. The sandbox comes from its owner: one that was just
    /// removed is on no board any more, and kubelets ignore events without it.
    pub(crate) fn announce(&self, board: &Board, sandbox: impl FnOnce() -> SandboxView, subject: &str, change: Change) {
        if self.sender.receiver_count() == 0 {
            return;
        }
        let kind = match change {
            Change::Created => v1::ContainerEventType::ContainerCreatedEvent,
            Change::Started => v1::ContainerEventType::ContainerStartedEvent,
            Change::Stopped => v1::ContainerEventType::ContainerStoppedEvent,
            Change::Deleted => v1::ContainerEventType::ContainerDeletedEvent,
        };
        let view = sandbox();
        let _ = self.sender.send(Arc::new(v1::ContainerEventResponse {
            container_id: subject.to_owned(),
            container_event_type: kind.into(),
            created_at: crate::clock::now_ns(),
            pod_sandbox_status: Some(sandbox_status(&view)),
            containers_statuses: board.containers_of(&view.id).iter().map(|c| container_status(c)).collect(),
        }));
    }
}
