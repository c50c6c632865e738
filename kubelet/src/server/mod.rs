//! The kubelet's own API: plain HTTP on a root-only unix socket, and `/healthz` alone on a loopback port where that is
//! configured. No authentication here: who may open the socket may ask.

pub mod config;
mod container_logs;
mod health;
mod pods;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub use health::Health;

use crate::config::Config;
use crate::cri::Runtime;
use crate::table::PodTable;
use crate::{Error, Result};

/// A response's body.
pub(crate) type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// What the handlers look at.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) config: Arc<Config>,
    pub(crate) table: PodTable,
    pub(crate) runtime: Runtime,
    pub(crate) health: Health,
}

/// The running listeners.
pub struct Server(JoinSet<()>);

impl Server {
    /// Waits until all listeners have ended.
    pub async fn stopped(mut self) {
        while self.0.join_next().await.is_some() {}
    }
}

/// Opens the configured listeners and serves until `shutdown`.
pub async fn start(
    config: &Arc<Config>,
    table: PodTable,
    runtime: Runtime,
    health: Health,
    shutdown: CancellationToken,
) -> Result<Server> {
    let api = Api { config: config.clone(), table, runtime, health };
    let mut tasks = JoinSet::new();
    if let Some(path) = &config.socket {
        let listener = bind_socket(path).map_err(|source| Error::Listen { address: path.display().to_string(), source })?;
        let (api, shutdown, path) = (api.clone(), shutdown.clone(), path.clone());
        tasks.spawn(async move {
            let accept = futures::stream::unfold(listener, |listener| async {
                let accepted = listener.accept().await.map(|(stream, _)| stream);
                Some((accepted, listener))
            });
            serve(Box::pin(accept), api, Surface::Full, shutdown).await;
            let _ = std::fs::remove_file(path);
        });
    }
    if let Some(port) = config.healthz_port {
        let address = SocketAddr::new(config.server.healthz_address, port);
        let listener =
            TcpListener::bind(address).await.map_err(|source| Error::Listen { address: address.to_string(), source })?;
        tasks.spawn(async move {
            let accept = futures::stream::unfold(listener, |listener| async {
                let accepted = listener.accept().await.map(|(stream, _)| stream);
                Some((accepted, listener))
            });
            serve(Box::pin(accept), api, Surface::HealthOnly, shutdown).await;
        });
    }
    Ok(Server(tasks))
}

/// A unix socket that only root can open, from the first moment.
fn bind_socket(path: &Path) -> std::io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
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

#[derive(Clone, Copy, PartialEq, Eq)]
enum Surface {
    Full,
    HealthOnly,
}

async fn serve<S>(
    mut accept: impl futures::Stream<Item = std::io::Result<S>> + Unpin,
    api: Api,
    surface: Surface,
    shutdown: CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            accepted = accept.next() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let stream = match accepted {
            Some(Ok(stream)) => stream,
            Some(Err(error)) => {
                tracing::warn!(%error, "accept");
                tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                continue;
            }
            None => break,
        };
        let api = api.clone();
        connections.spawn(async move {
            let service = service_fn(move |request| {
                let api = api.clone();
                async move { Ok::<_, Infallible>(route(&api, surface, request).await) }
            });
            // A client that goes away is no news.
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
    connections.shutdown().await;
}

async fn route(api: &Api, surface: Surface, request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    let segments: Vec<&str> = path.trim_matches('/').split('/').collect();
    if segments[0] == "healthz" {
        return only_get(&request).unwrap_or_else(|| api.health.respond(&path, request.uri().query()));
    }
    if surface == Surface::HealthOnly {
        return text(StatusCode::NOT_FOUND, "404 page not found\n");
    }
    if let Some(refused) = only_get(&request) {
        return refused;
    }
    match segments.as_slice() {
        ["pods"] => pods::list(api),
        ["runningpods"] => pods::running(api).await,
        ["problems"] => json(StatusCode::OK, &serde_json::json!({ "problems": api.health.problems() })),
        ["containerLogs", namespace, pod, container] => {
            container_logs::respond(api, namespace, pod, container, request.uri().query()).await
        }
        _ => text(StatusCode::NOT_FOUND, "404 page not found\n"),
    }
}

fn only_get(request: &Request<Incoming>) -> Option<Response<Body>> {
    (request.method() != Method::GET).then(|| text(StatusCode::METHOD_NOT_ALLOWED, "405: Method Not Allowed"))
}

/// A plain text answer.
pub(crate) fn text(status: StatusCode, content: impl Into<String>) -> Response<Body> {
    respond(status, "text/plain; charset=utf-8", content.into())
}

/// A JSON answer.
pub(crate) fn json(status: StatusCode, value: &serde_json::Value) -> Response<Body> {
    respond(status, "application/json", value.to_string())
}

fn respond(status: StatusCode, content_type: &'static str, content: String) -> Response<Body> {
    let mut response = Response::new(Full::new(Bytes::from(content)).map_err(|e| match e {}).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    response
}
