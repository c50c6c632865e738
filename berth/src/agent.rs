//! What the long-running verbs share: signals, readiness and the bounded drain at the end.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::{Context, Result};
use berth_kubelet::shutdown::Shutdown;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::heap;

/// Worker threads of the agent.
const WORKERS: usize = 2;
/// How long calls under way may take after SIGTERM: below systemd's default of 90 s, above any ordinary call.
const DRAIN: Duration = Duration::from_secs(10);

/// Runs an agent to its end, on threads of its own.
pub fn run<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    heap::prepare();
    crate::runtime(WORKERS)?.block_on(async {
        let heap = tokio::spawn(heap::give_back());
        let ended = work.await;
        heap.abort();
        ended
    })
}

/// What has to be asked about SIGTERM, once there is a kubelet: the machine may be going down.
pub type AskOfShutdown = Arc<OnceLock<Shutdown>>;

/// A token that SIGINT cancels at once, and SIGTERM when the pods have ended, should it mean the machine's end.
pub fn stop_on_signals(ask: &AskOfShutdown) -> Result<CancellationToken> {
    let stop = CancellationToken::new();
    let (token, ask) = (stop.clone(), ask.clone());
    let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
    tokio::spawn(async move {
        let pods = tokio::select! {
            _ = interrupt.recv() => "keep running",
            _ = terminate.recv() => {
                let end_pods = async {
                    match ask.get() {
                        Some(shutdown) => shutdown.on_sigterm().await,
                        None => false,
                    }
                };
                tokio::select! {
                    ended = end_pods => if ended { "have ended" } else { "keep running" },
                    _ = interrupt.recv() => "may still be ending",
                }
            }
        };
        tracing::info!("ending: the pods {pods}");
        token.cancel();
    });
    Ok(stop)
}

/// Tells a service manager of `Type=notify` that we are ready (sd_notify's protocol); nothing where there is none.
pub fn notify_ready() {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let path = path.to_string_lossy().into_owned();
    let address = match path.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    let sent = address.and_then(|to| UnixDatagram::unbound()?.send_to_addr(b"READY=1", &to));
    if let Err(error) = sent {
        tracing::warn!(%error, socket = path, "could not tell the service manager that berth is ready");
    }
}

/// Waits for `serving` to end; after `stop`, no longer than [`DRAIN`].
pub async fn drain(stop: &CancellationToken, serving: impl Future<Output = Result<()>>) -> Result<()> {
    tokio::pin!(serving);
    tokio::select! {
        ended = &mut serving => return ended,
        () = stop.cancelled() => {}
    }
    match tokio::time::timeout(DRAIN, serving).await {
        Ok(ended) => ended,
        Err(_) => {
            tracing::warn!(
                "calls were still under way after {} s; they end or undo themselves at the next start",
                DRAIN.as_secs()
            );
            Ok(())
        }
    }
}
