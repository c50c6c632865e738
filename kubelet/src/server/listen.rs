//! Listeners and connections: unix socket, plain TCP, TLS. Counts connections, gives each its peer and its surface, and hands
//! requests to the routes.

use std::convert::Infallible;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response, header};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use super::caller::{Addresses, Caller, IDLE, Seat};
use super::tls::{Shown, Tls};
use super::{Api, Body, route};
use crate::auth::Guard;
use crate::{Error, Result};

/// Go's TCP keep-alive, which the upstream has: a peer that is lost is noticed after two and a half minutes.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
const PROBES: u32 = 9;
/// How long a stranger's connection may take to end once it was told to.
const LEAVE: Duration = Duration::from_secs(10);
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
                serve_http1(stream, &api, &Surface::Full, Caller::welcome()).await;
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
        let (mut connections, addresses) = (Connections::default(), Addresses::default());
        while let Some((stream, permit)) = connections.next(&api, &listener).await {
            let Some(seat) = seat(&addresses, &stream) else { continue };
            let (api, tls, surface) = (api.clone(), tls.clone(), surface.clone());
            connections.tasks.spawn(async move {
                attend(stream, tls.as_ref(), &surface, &api).await;
                drop((permit, seat));
            });
        }
        connections.tasks.shutdown().await;
    });
    Ok(())
}

/// A seat for the connection; without one it is closed.
fn seat(addresses: &Addresses, stream: &TcpStream) -> Option<Seat> {
    let address = stream.peer_addr().ok()?.ip();
    let seat = addresses.seat(address);
    if seat.is_none() {
        tracing::debug!(%address, "one address has too many connections: another is closed");
    }
    seat
}

async fn attend(stream: TcpStream, tls: Option<&Arc<Tls>>, surface: &Surface, api: &Api) {
    let _ = stream.set_nodelay(true);
    if let Err(error) = keep_alive(&stream) {
        tracing::debug!(%error, "TCP keep-alive");
    }
    let Some(tls) = tls else { return serve_http1(stream, api, surface, Caller::stranger(Shown::default())).await };
    match tls.accept(stream).await {
        Ok((stream, shown)) if stream.get_ref().1.alpn_protocol() == Some(b"h2") => {
            let (api, surface) = (api.clone(), surface.clone());
            let answer = move |caller: Arc<Caller>, request| {
                let (api, surface) = (api.clone(), surface.clone());
                async move { route::answer(&api, &surface, &caller, request).await }
            };
            serve_http2(stream, Caller::stranger(shown), answer).await;
        }
        Ok((stream, shown)) => serve_http1(stream, api, surface, Caller::stranger(shown)).await,
        Err(error) => tracing::debug!(%error, "TLS handshake"),
    }
}

/// Without it a peer that lost its power holds an idle connection for ever.
fn keep_alive(stream: &TcpStream) -> std::io::Result<()> {
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEP_ALIVE)?;
    sockopt::set_tcp_keepintvl(stream, KEEP_ALIVE)?;
    Ok(sockopt::set_tcp_keepcnt(stream, PROBES)?)
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

async fn serve_http1<S>(stream: S, api: &Api, surface: &Surface, caller: Caller)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(|request| {
        let caller = &caller;
        async move {
            let mut response = route::answer(api, surface, caller, request).await;
            if caller.is_refused() {
                response.headers_mut().insert(header::CONNECTION, header::HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response)
        }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(IDLE).max_buf_size(HEADER_BYTES as usize);
    // A client that goes away is no news.
    let _ = builder.serve_connection(TokioIo::new(caller.patience(stream)), service).with_upgrades().await;
}

async fn serve_http2<S, A, F>(stream: S, caller: Caller, answer: A)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    A: Fn(Arc<Caller>, Request<Incoming>) -> F,
    F: Future<Output = Response<Body>> + Send + 'static,
{
    let stream = TokioIo::new(caller.patience(stream));
    let caller = Arc::new(caller);
    let service = service_fn(|request| {
        let (caller, answering) = (caller.clone(), answer(caller.clone(), request));
        async move {
            let response = answering.await;
            caller.has_asked();
            Ok::<_, Infallible>(response)
        }
    });
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .keep_alive_interval(IDLE)
        .max_concurrent_streams(STREAMS)
        .initial_stream_window_size(WINDOW)
        .max_header_list_size(HEADER_BYTES);
    let mut connection = pin!(builder.serve_connection(stream, service));
    tokio::select! {
        _ = connection.as_mut() => return,
        () = caller.is_done() => connection.as_mut().graceful_shutdown(),
    }
    // What is being said to a known client goes on; it takes another connection for what comes next.
    let _ = match caller.is_known() {
        true => connection.await,
        false => tokio::time::timeout(LEAVE, connection).await.unwrap_or(Ok(())),
    };
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

#[cfg(test)]
mod tests {
    use http::StatusCode;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    use super::super::text;
    use super::*;

    /// Begins HTTP/2, and asks for `/` if wanted.
    async fn begin(client: &mut DuplexStream, ask: bool) {
        client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
        if ask {
            // The end of headers and of the stream; `:method: GET`, `:scheme: http`, `:path: /` of the static table.
            client.write_all(b"\0\0\x03\x01\x05\0\0\0\x01\x82\x86\x84").await.unwrap();
        }
    }

    /// A client that answers pings and does nothing else; returns when it is left.
    async fn stay(mut client: DuplexStream) {
        let mut head = [0; 9];
        while client.read_exact(&mut head).await.is_ok() {
            let mut body = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
            if client.read_exact(&mut body).await.is_err() {
                return;
            }
            if head[3] == 6 && head[4] == 0 {
                head[4] = 1;
                let _ = client.write_all(&[&head[..], &body].concat()).await;
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_only_answers_pings_is_let_go() {
        for (ask, known) in [(false, false), (true, false), (true, true)] {
            let (near, mut far) = tokio::io::duplex(64 * 1024);
            begin(&mut far, ask).await;
            let server = tokio::spawn(serve_http2(near, Caller::stranger(Shown::default()), move |caller: Arc<Caller>, _| {
                if known {
                    caller.let_in()
                } else {
                    caller.turn_away()
                }
                std::future::ready(text(StatusCode::OK, "x"))
            }));
            let begun = tokio::time::Instant::now();
            let left = tokio::time::timeout(Duration::from_secs(3600), async { tokio::join!(stay(far), server).1.unwrap() });
            assert!(left.await.is_ok(), "asks {ask}, known {known}");
            let most = if ask && !known { LEAVE } else { IDLE + LEAVE };
            assert!(begun.elapsed() <= most + Duration::from_secs(1), "asks {ask}, known {known}: {:?}", begun.elapsed());
        }
    }

    #[tokio::test]
    async fn lost_peers_are_noticed() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        keep_alive(&stream).unwrap();
        assert!(sockopt::socket_keepalive(&stream).unwrap() && sockopt::tcp_keepidle(&stream).unwrap() == KEEP_ALIVE);
    }
}
