//! Requests to the API server as `kube::Client` sends them: turned to the server of the moment, with the credentials of the
//! moment, over connections that are exchanged when those change. Decides no retries.

use std::pin::Pin;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::{AUTHORIZATION, USER_AGENT};
use http::uri::PathAndQuery;
use http::{HeaderValue, Request, Response};
use hyper::body::{Frame, Incoming, SizeHint};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::client::Body;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tower::Service;

use crate::access::{Access, Source, Stamp, stamp};
use crate::connector::Connector;
use crate::limit::Limiter;
use crate::{Error, Result};

/// How often the files behind an access are looked at, at most, and only with a request.
const LOOK: Duration = Duration::from_secs(1);
/// How long a connection without requests is kept (Go's transport).
const IDLE: Duration = Duration::from_secs(90);
/// API servers allow 100 streams on a connection; a watch holds one for minutes. Beyond this a further connection is made.
const STREAMS: usize = 90;
/// So many requests in a row without an answer, and their connections are given up.
const FAILURES: u32 = 2;

/// How a connection is found to be dead while answers are waited for, of a watch too, on which nothing may come for minutes. The defaults are
/// those of Go's HTTP/2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pings {
    /// Without a word for so long it is asked whether it lives.
    pub after: Duration,
    /// It has so long to say so.
    pub answer: Duration,
}

impl Default for Pings {
    fn default() -> Self {
        Pings { after: Duration::from_secs(30), answer: Duration::from_secs(15) }
    }
}

type HttpClient = Client<Connector, Body>;

/// Connections of one kind of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Everything but heartbeats.
    Ordinary,
    /// Heartbeats wait behind nothing.
    Heartbeats,
}

/// A client with its own pool, and how many of its answers are still being read.
struct Pool {
    client: HttpClient,
    open: AtomicUsize,
}

/// All connections of one identity.
struct Channel {
    connector: Connector,
    pings: Pings,
    pools: Mutex<[Vec<Arc<Pool>>; 2]>,
}

impl Channel {
    fn new(access: Arc<Access>, pings: Pings) -> Arc<Channel> {
        let connector = Connector { access, closed: CancellationToken::new() };
        Arc::new(Channel { connector, pings, pools: Mutex::default() })
    }

    /// A pool with room, and a place in it.
    fn place(&self, lane: Lane) -> Place {
        let mut pools = self.pools.lock().unwrap_or_else(PoisonError::into_inner);
        let pools = &mut pools[lane as usize];
        // A pool beyond the first one is given up when nothing is read from it.
        let mut index = 0;
        pools.retain(|pool| {
            index += 1;
            index == 1 || pool.open.load(Ordering::Relaxed) > 0
        });
        let pool = pools.iter().find(|pool| pool.open.load(Ordering::Relaxed) < STREAMS).cloned();
        let pool = pool.unwrap_or_else(|| {
            let pool = Arc::new(Pool { client: client(self.connector.clone(), self.pings), open: AtomicUsize::new(0) });
            pools.push(pool.clone());
            pool
        });
        pool.open.fetch_add(1, Ordering::Relaxed);
        Place(pool)
    }

    /// New requests get new connections; what is under way may end where it is.
    fn retire(&self) {
        *self.pools.lock().unwrap_or_else(PoisonError::into_inner) = Default::default();
    }

    /// Ends all connections, with whatever is under way.
    fn cut(&self) {
        self.connector.closed.cancel();
    }
}

fn client(connector: Connector, pings: Pings) -> HttpClient {
    Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .pool_idle_timeout(IDLE)
        .http2_keep_alive_interval(pings.after)
        .http2_keep_alive_timeout(pings.answer)
        .build(connector)
}

/// One stream of a pool; given back when it is dropped.
struct Place(Arc<Pool>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An answer's body, which holds its place.
pub(crate) struct Held {
    body: Incoming,
    _place: Place,
}

impl hyper::body::Body for Held {
    type Data = bytes::Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<Frame<bytes::Bytes>, hyper::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The access of the moment and its connections.
#[derive(Clone)]
struct Current {
    access: Arc<Access>,
    channel: Arc<Channel>,
}

#[derive(Default)]
struct Known {
    files: Vec<std::path::PathBuf>,
    stamp: Stamp,
    looked: Option<Instant>,
    current: Option<Current>,
    problem: Option<String>,
}

/// What all clients of one API server share.
pub(crate) struct Shared {
    source: Source,
    agent: HeaderValue,
    pings: Pings,
    known: Mutex<Known>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shared({:?})", self.source)
    }
}

impl Shared {
    pub(crate) fn new(source: Source, agent: HeaderValue, pings: Pings) -> Arc<Shared> {
        Arc::new(Shared { source, agent, pings, known: Mutex::default() })
    }

    /// Looks at the files with the next request, however soon that is.
    pub(crate) fn refresh(&self) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.looked = None;
        known.stamp.clear();
    }

    /// Who we are at this moment. While changed files cannot be used, what was read from the old ones stays.
    fn current(&self) -> Result<Current> {
        let now = Instant::now();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = known.looked.is_some_and(|at| now.saturating_duration_since(at) < LOOK);
        if let (Some(current), true) = (&known.current, fresh) {
            return Ok(current.clone());
        }
        known.looked = Some(now);
        // Taken before the files are read: a change in between is seen the next time.
        let seen = stamp(&known.files);
        if let Some(current) = &known.current
            && seen == known.stamp
        {
            return Ok(current.clone());
        }
        let (files, loaded) = Access::load(&self.source);
        known.stamp = if files == known.files { seen } else { stamp(&files) };
        known.files = files;
        match (loaded, known.current.clone()) {
            (Ok(access), before) => {
                known.problem = None;
                let access = Arc::new(access);
                let current = match before {
                    Some(before) if before.access.fingerprint == access.fingerprint => {
                        Current { access, channel: before.channel }
                    }
                    before => {
                        if let Some(before) = before {
                            tracing::info!(server = access.server(), "new credentials are in use");
                            before.channel.cut();
                        }
                        Current { channel: Channel::new(access.clone(), self.pings), access }
                    }
                };
                known.current = Some(current.clone());
                Ok(current)
            }
            (Err(error), Some(before)) => {
                let problem = crate::error::chain(&error);
                if known.problem.as_ref() != Some(&problem) {
                    tracing::warn!(problem, "the changed credentials cannot be used: the old ones stay");
                    known.problem = Some(problem);
                }
                Ok(before)
            }
            (Err(error), None) => Err(error),
        }
    }

    fn retire(&self) {
        let current = self.known.lock().unwrap_or_else(PoisonError::into_inner).current.clone();
        if let Some(current) = current {
            current.channel.retire();
        }
    }
}

/// The service below one `kube::Client`.
#[derive(Clone, Debug)]
pub(crate) struct Transport {
    pub(crate) shared: Arc<Shared>,
    pub(crate) lane: Lane,
    pub(crate) limiter: Arc<Limiter>,
    /// How long an answer may take to begin.
    pub(crate) patience: Option<Duration>,
    pub(crate) failures: Arc<AtomicU32>,
}

impl Transport {
    async fn send(self, mut request: Request<Body>) -> Result<Response<Held>> {
        self.limiter.turn().await;
        let Current { access, channel } = self.shared.current()?;
        let root = PathAndQuery::from_static("/");
        let path = request.uri().path_and_query().unwrap_or(&root);
        let failed = |source| Error::Ask { server: access.server(), source };
        *request.uri_mut() = access.address(path).ok_or_else(|| failed("the path is no address".into()))?;
        request.headers_mut().insert(USER_AGENT, self.shared.agent.clone());
        if let Some(value) = &access.authorization {
            request.headers_mut().insert(AUTHORIZATION, value.clone());
        }
        let place = channel.place(self.lane);
        let asking = place.0.client.request(request);
        let answered = match self.patience {
            None => asking.await,
            Some(patience) => match tokio::time::timeout(patience, asking).await {
                Ok(answered) => answered,
                Err(_) => {
                    self.count(false);
                    return Err(Error::Late { server: access.server(), seconds: patience.as_secs() });
                }
            },
        };
        self.count(answered.is_ok());
        let response = answered.map_err(|error| failed(Box::new(error)))?;
        Ok(response.map(|body| Held { body, _place: place }))
    }

    /// Heartbeats tell whether a path is dead.
    fn count(&self, answered: bool) {
        if self.lane != Lane::Heartbeats {
            return;
        }
        if answered {
            self.failures.store(0, Ordering::Relaxed);
        } else if self.failures.fetch_add(1, Ordering::Relaxed) + 1 >= FAILURES {
            self.failures.store(0, Ordering::Relaxed);
            tracing::debug!("no heartbeat came through: new connections");
            self.shared.retire();
        }
    }
}

impl Service<Request<Body>> for Transport {
    type Response = Response<Held>;
    type Error = Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Held>>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.clone().send(request))
    }
}
