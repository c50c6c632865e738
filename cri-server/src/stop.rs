//! The end of a pod that nobody may wait for longer than a bound: `berth stop --all`. Asks the pod's owner like any client; ends
//! nothing itself.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use crate::error::Error;
use crate::id::SandboxId;
use crate::sandbox::owner;
use crate::sandbox::state::Op;
use crate::{Server, why};

/// How long a pod may take to end beyond its containers' grace. Above what a pod with a shim that answers nobody takes: a signal of
/// 10 s, a kill of 20 s that is not answered, the shim's own death of 10 s and the network's end; below systemd's 90 s (TimeoutStopSec).
pub const POD_ENDS: Duration = Duration::from_secs(70);

/// Ends one pod: its containers in their grace, then all of it.
pub(crate) async fn pod(server: &Arc<Server>, id: &SandboxId, pod: String, grace: Duration) -> Result<(), Error> {
    let mut failed = None;
    let end = async {
        let containers = server.board.containers_of(id);
        let stops = containers
            .iter()
            .map(|view| owner::submit(server, id, |reply| Op::StopContainer { id: view.id.clone(), timeout: grace, reply }));
        // Those that could not be stopped in order are killed with the pod.
        futures::future::join_all(stops).await;
        loop {
            match owner::submit(server, id, Op::Remove).await {
                Ok(()) => return,
                Err(error) if matches!(*error, Error::NotFound { .. }) => return,
                // A step that is late goes on, and what failed may succeed: its pod is asked again until the time is over.
                Err(error) => failed = Some(error),
            }
            tokio::time::sleep(AGAIN).await;
        }
    };
    if timeout(grace.saturating_add(POD_ENDS), end).await.is_ok() {
        return Ok(());
    }
    let doing = match (why::doing(server, id), failed) {
        (Some(doing), _) => doing,
        (None, Some(error)) => crate::error::text(&error),
        (None, None) => "nothing is under way".to_owned(),
    };
    Err(Error::Unended { pod, id: id.as_str().into(), doing })
}

/// The pause between two tries.
const AGAIN: Duration = Duration::from_secs(1);
