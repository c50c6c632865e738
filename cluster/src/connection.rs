//! The clients of an API server, from a kubeconfig that may not be there yet and may change. Owns what they have in common.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use http::HeaderValue;
use kube::Client;

use crate::Kubeconfig;
use crate::access::Source;
use crate::limit::{Limit, Limiter};
use crate::transport::{Lane, Pings, Shared, Transport};

/// The upstream's: its nodes send one every ten seconds.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// How often the clients may ask; the defaults are the upstream's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// `kubeAPIQPS`; 0: no limit.
    pub per_second: f64,
    /// `kubeAPIBurst`.
    pub burst: u32,
    /// `eventRecordQPS`; 0: no limit.
    pub events_per_second: f64,
    /// `eventBurst`.
    pub events_burst: u32,
    /// How long a heartbeat waits for its answer: no longer than until the next one, nor than the lease.
    pub heartbeat: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { per_second: 50.0, burst: 100, events_per_second: 50.0, events_burst: 100, heartbeat: HEARTBEAT }
    }
}

/// The clients that a node needs.
#[derive(Clone)]
pub struct Clients {
    /// For everything but heartbeats and events.
    pub ordinary: Client,
    /// For the node's status and its lease: no limit holds them up.
    pub heartbeats: Client,
    /// For events: a flood of them holds up nothing else.
    pub events: Client,
}

impl std::fmt::Debug for Clients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Clients")
    }
}

/// The way to one API server. Requests fail while it is away, or while there is no kubeconfig; nothing has to be made again then.
#[derive(Clone, Debug)]
pub struct Connection {
    shared: Arc<Shared>,
}

impl Connection {
    /// By a kubeconfig file; `agent` is the User-Agent of all requests. Reads nothing yet.
    pub fn of_file(kubeconfig: PathBuf, agent: &str) -> Connection {
        Self::pinged(kubeconfig, agent, Pings::default())
    }

    /// The same, with other pings than the usual ones.
    pub fn pinged(kubeconfig: PathBuf, agent: &str, pings: Pings) -> Connection {
        Self::new(Source::File(kubeconfig), agent, pings)
    }

    /// By what was read already.
    pub fn of(kubeconfig: Kubeconfig, agent: &str) -> Connection {
        Self::new(Source::Fixed(kubeconfig), agent, Pings::default())
    }

    fn new(source: Source, agent: &str, pings: Pings) -> Connection {
        let agent = HeaderValue::from_str(agent).unwrap_or_else(|_| HeaderValue::from_static("berth"));
        Connection { shared: Shared::new(source, agent, pings) }
    }

    /// One client with a limit. Needs tokio's runtime around it.
    pub fn client(&self, limit: Limit) -> Client {
        self.with_lane(Lane::Ordinary, limit, None)
    }

    /// One whose requests fail when they have no answer after so long. Needs tokio's runtime around it.
    pub fn client_within(&self, patience: Duration) -> Client {
        self.with_lane(Lane::Ordinary, Limit::NONE, Some(patience))
    }

    /// The clients of a node. Needs tokio's runtime around it.
    pub fn clients(&self, limits: Limits) -> Clients {
        Clients {
            ordinary: self.client(Limit { per_second: limits.per_second, burst: limits.burst }),
            heartbeats: self.with_lane(Lane::Heartbeats, Limit::NONE, Some(limits.heartbeat)),
            events: self.client(Limit { per_second: limits.events_per_second, burst: limits.events_burst }),
        }
    }

    /// What was written to the files counts from the next request on, and the connections with what was there before end.
    pub fn refresh(&self) {
        self.shared.refresh();
    }

    fn with_lane(&self, lane: Lane, limit: Limit, patience: Option<Duration>) -> Client {
        let limiter = Arc::new(Limiter::new(limit));
        let failures = Arc::new(AtomicU32::new(0));
        Client::new(Transport { shared: self.shared.clone(), lane, limiter, patience, failures }, "default")
    }
}
