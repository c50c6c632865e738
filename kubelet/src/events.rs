//! The runtime's event stream: which pod changed. Reconnects; tells when it is not connected, so that the main loop
//! lists more often.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::cri::{Runtime, keys};

/// What the stream tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RuntimeEvent {
    /// Events flow from now on.
    Connected,
    /// Something of the pod with this UID changed.
    Changed(String),
    /// No events until further notice.
    Disconnected,
}

/// Follows the stream until `shutdown`.
pub async fn run(runtime: Runtime, sender: mpsc::Sender<RuntimeEvent>, shutdown: CancellationToken) {
    let follow = async {
        let mut pause = Duration::from_millis(100);
        loop {
            if let Ok(mut stream) = runtime.events().await {
                if sender.send(RuntimeEvent::Connected).await.is_err() {
                    return;
                }
                let mut got = false;
                while let Ok(Some(event)) = stream.message().await {
                    got = true;
                    let labels = event.pod_sandbox_status.as_ref().map(|s| &s.labels);
                    let by_label = labels.and_then(|l| l.get(keys::POD_UID)).cloned();
                    let metadata = event.pod_sandbox_status.and_then(|s| s.metadata).map(|m| m.uid);
                    let Some(uid) = by_label.or(metadata).filter(|uid| !uid.is_empty()) else { continue };
                    if sender.send(RuntimeEvent::Changed(uid)).await.is_err() {
                        return;
                    }
                }
                if got {
                    pause = Duration::from_millis(100);
                }
            }
            if sender.send(RuntimeEvent::Disconnected).await.is_err() {
                return;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(30));
        }
    };
    tokio::select! {
        () = follow => {}
        () = shutdown.cancelled() => {}
    }
}
