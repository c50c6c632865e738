//! The kubelet's own servers: everything on a root-only unix socket; the same on TCP with TLS, authentication and
//! authorisation where that is asked for; a read-only part without either, and `/healthz` alone. Who may open the socket may
//! ask. Answers only: what pods are to do is decided elsewhere.

mod caller;
pub mod config;
mod container_logs;
mod health;
mod listen;
mod log_reader;
mod log_watch;
mod lookup;
mod numbers;
mod pods;
mod query;
mod route;
mod runtime_calls;
mod streaming;
mod system_logs;
mod tls;

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::{Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

pub use health::Health;

use crate::Result;
use crate::auth::Guard;
use crate::config::Config;
use crate::cri::Runtime;
use crate::table::PodTable;
use listen::Surface;

/// A response's body.
pub(crate) type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// What the handlers look at.
#[derive(Clone)]
pub(crate) struct Api {
    pub(crate) config: Arc<Config>,
    pub(crate) table: PodTable,
    pub(crate) runtime: Runtime,
    pub(crate) health: Health,
    pub(crate) memory: Arc<numbers::Memory>,
    /// Ends what a request has begun and left behind: joined streams, followed logs.
    pub(crate) stop: CancellationToken,
}

/// The running listeners.
pub struct Server(JoinSet<()>);

impl Server {
    /// Waits until all listeners have ended.
    pub async fn stopped(mut self) {
        while self.0.join_next().await.is_some() {}
    }
}

/// Opens the configured listeners and serves until `shutdown`. All are checked before the first is opened.
pub async fn start(
    config: &Arc<Config>,
    table: PodTable,
    runtime: Runtime,
    health: Health,
    shutdown: CancellationToken,
) -> Result<Server> {
    let wanted = &config.server;
    let guarded = match wanted.port.filter(|_| wanted.enabled) {
        Some(port) => {
            let guard = Guard::new(wanted, &config.node_name)?;
            Some((port, Arc::new(guard), Arc::new(tls::Tls::load(config)?)))
        }
        None => None,
    };
    let api = Api { config: config.clone(), table, runtime, health, memory: Arc::default(), stop: shutdown.clone() };
    let mut tasks = JoinSet::new();
    if let Some(path) = &config.socket {
        listen::unix(&mut tasks, path, &api)?;
    }
    if let Some(port) = config.healthz_port {
        let address = SocketAddr::new(wanted.healthz_address, port);
        listen::tcp(&mut tasks, address, None, Surface::HealthOnly, &api).await?;
    }
    if let Some(port) = wanted.read_only_port.filter(|_| wanted.enabled) {
        listen::tcp(&mut tasks, SocketAddr::new(wanted.address, port), None, Surface::ReadOnly, &api).await?;
    }
    if let Some((port, guard, tls)) = guarded {
        let address = SocketAddr::new(wanted.address, port);
        listen::tcp(&mut tasks, address, Some(tls), Surface::Guarded(guard), &api).await?;
    }
    Ok(Server(tasks))
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
    bytes(status, content_type, content.into_bytes())
}

/// An answer of text that is there.
pub(crate) fn bytes(status: StatusCode, content_type: &'static str, content: Vec<u8>) -> Response<Body> {
    let mut response = stream(content_type, Full::new(Bytes::from(content)).map_err(|e| match e {}).boxed_unsync());
    *response.status_mut() = status;
    response
}

/// An answer that is made while it is sent.
pub(crate) fn stream(content_type: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    response
}

/// Plain text that is made while it is sent.
pub(crate) fn plain(body: Body) -> Response<Body> {
    stream("text/plain; charset=utf-8", body)
}
