//! Listeners and connections: unix socket, plain TCP, TLS. Counts connections, gives each its peer and its surface, and hands
//! requests to the routes.

use std::convert::Infallible;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use super::tls::Tls;
use super::{Api, route};
use crate::auth::{Guard, Peer};
use crate::{Error, Result};

/// A connection without a request is closed after this long, as upstream.
const IDLE: Duration = Duration::from_secs(90);
/// The upstream's limit of a request's headers.
const HEADER_BYTES: u32 = 1 << 20;
/// Connections of one listener: far more than the clients of a node, far fewer than would starve it.
const CONNECTIONS: usize = 512;
/// Streams of one HTTP/2 connection at a time.
const STREAMS: u32 = 100;
/// What one HTTP/2 stream may send before it is read: requests here have no bodies to speak of.
const WINDOW: u32 = 64 * 1024;

/// What a listener shows, and to whom.
#[derive(Clone, Debug)]
pub(super) enum Surface {
    /// Everything, to whoever can connect.
    Full,
    /// Everything, to whom the guard admits.
    Guarded(Arc<Guard>),
    /// What changes and reveals nothing, to everybody.
    ReadOnly,
    /// `/healthz`.
    HealthOnly,
}

/// Serves on a unix socket that only root can open.
pub(super) fn unix(tasks: &mut JoinSet<()>, path: &Path, api: &Api) -> Result<()> {
    let listener = bind_socket(path).map_err(|source| Error::Listen { address: path.display().to_string(), source })?;
    let (api, path) = (api.clone(), path.to_owned());
    tasks.spawn(async move {
        let mut connections = Connections::default();
        while let Some((stream, permit)) = connections.next(&api, &listener).await {
            let api = api.clone();
            connections.tasks.spawn(async move {
                serve_http1(stream, &api, &Surface::Full, Peer::Unknown).await;
                drop(permit);
            });
        }
        connections.tasks.shutdown().await;
        let _ = std::fs::remove_file(path);
    });
    Ok(())
}

/// Serves on a TCP port.
pub(super) async fn tcp(
    tasks: &mut JoinSet<()>,
    address: SocketAddr,
    tls: Option<Arc<Tls>>,
    surface: Surface,
    api: &Api,
) -> Result<()> {
    let listener = TcpListener::bind(address).await.map_err(|source| Error::Listen { address: address.to_string(), source })?;
    let api = api.clone();
    tasks.spawn(async move {
        let mut connections = Connections::default();
        while let Some((stream, permit)) = connections.next(&api, &listener).await {
            let (api, tls, surface) = (api.clone(), tls.clone(), surface.clone());
            connections.tasks.spawn(async move {
                attend(stream, tls.as_deref(), &surface, &api).await;
                drop(permit);
            });
        }
        connections.tasks.shutdown().await;
    });
    Ok(())
}

async fn attend(stream: TcpStream, tls: Option<&Tls>, surface: &Surface, api: &Api) {
    let _ = stream.set_nodelay(true);
    let Some(tls) = tls else { return serve_http1(stream, api, surface, Peer::Unknown).await };
    match tls.accept(stream).await {
        Ok((stream, peer)) if stream.get_ref().1.alpn_protocol() == Some(b"h2") => {
            serve_http2(stream, api, surface, peer).await;
        }
        Ok((stream, peer)) => serve_http1(stream, api, surface, peer).await,
        Err(error) => tracing::debug!(%error, "TLS handshake"),
    }
}

/// A listener of either kind.
trait Accept {
    type Stream;
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<std::io::Result<Self::Stream>>;
}

impl Accept for TcpListener {
    type Stream = TcpStream;
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<std::io::Result<TcpStream>> {
        TcpListener::poll_accept(self, cx).map_ok(|(stream, _)| stream)
    }
}

impl Accept for UnixListener {
    type Stream = UnixStream;
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<std::io::Result<UnixStream>> {
        UnixListener::poll_accept(self, cx).map_ok(|(stream, _)| stream)
    }
}

/// The connections of one listener.
struct Connections {
    tasks: JoinSet<()>,
    room: Arc<Semaphore>,
}

impl Default for Connections {
    fn default() -> Self {
        Connections { tasks: JoinSet::new(), room: Arc::new(Semaphore::new(CONNECTIONS)) }
    }
}

impl Connections {
    /// The next connection once there is room for it; none when the servers stop.
    async fn next<L: Accept>(&mut self, api: &Api, listener: &L) -> Option<(L::Stream, OwnedSemaphorePermit)> {
        let room = self.room.clone();
        let permit = tokio::select! {
            () = api.stop.cancelled() => return None,
            permit = room.acquire_owned() => permit.ok()?,
        };
        loop {
            let accepted = tokio::select! {
                () = api.stop.cancelled() => return None,
                accepted = poll_fn(|cx| listener.poll_accept(cx)) => accepted,
                Some(_) = self.tasks.join_next() => continue,
            };
            match accepted {
                Ok(stream) => return Some((stream, permit)),
                Err(error) => {
                    // Out of descriptors, most likely: wait until some are free again.
                    tracing::warn!(%error, "accept");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

async fn serve_http1<S>(stream: S, api: &Api, surface: &Surface, peer: Peer)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(|request| {
        let peer = &peer;
        async move { Ok::<_, Infallible>(route::answer(api, surface, peer, request).await) }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(IDLE).max_buf_size(HEADER_BYTES as usize);
    // A client that goes away is no news.
    let _ = builder.serve_connection(TokioIo::new(stream), service).with_upgrades().await;
}

async fn serve_http2<S>(stream: S, api: &Api, surface: &Surface, peer: Peer)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (api, surface, peer) = (api.clone(), surface.clone(), Arc::new(peer));
    let service = service_fn(move |request| {
        let (api, surface, peer) = (api.clone(), surface.clone(), peer.clone());
        async move { Ok::<_, Infallible>(route::answer(&api, &surface, &peer, request).await) }
    });
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .keep_alive_interval(IDLE)
        .max_concurrent_streams(STREAMS)
        .initial_stream_window_size(WINDOW)
        .max_header_list_size(HEADER_BYTES);
    let _ = builder.serve_connection(TokioIo::new(stream), service).await;
}

/// A unix socket that only root can open, from the first moment.
fn bind_socket(path: &Path) -> std::io::Result<UnixListener> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let name = path.file_name().ok_or(std::io::ErrorKind::InvalidInput)?.to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.new"));
    match std::fs::remove_file(&temporary) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(&temporary)?;
    std::fs::set_permissions(&temporary, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&temporary, path)?;
    Ok(listener)
}
