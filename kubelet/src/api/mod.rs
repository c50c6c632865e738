//! The API server's part of the kubelet: the node's object and lease, pods and their objects from the API, statuses, mirrors and
//! events to it. Gets a client that works whenever the server does; how that is reached and who we are there is not decided here.

mod attach;
mod claims;
pub(crate) mod events;
#[cfg(test)]
mod fake;
mod follow;
mod mirrors;
pub mod node;
pub mod objects;
pub mod offline;
mod pods;
mod review;
mod services;
mod statuses;
mod supported;
mod tokens;
mod wanted;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

pub use self::node::KUBERNETES_VERSION;
use self::offline::Offline;
pub(crate) use self::pods::ApiPods;
pub use self::review::ApiReviewer;
pub(crate) use self::supported::{news, refusal};
use crate::execute::Executor;
use crate::source::SourceUpdate;
use crate::table::PodTable;

/// What an answer says that is an error; else what kept it from coming.
pub(crate) fn message(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if !status.message.is_empty() => status.message.clone(),
        error => crate::execute::with_causes(error),
    }
}

/// The same of a watch.
fn message_of_watch(error: &kube::runtime::watcher::Error) -> String {
    use kube::runtime::watcher::Error;
    match error {
        Error::InitialListFailed(error) | Error::WatchStartFailed(error) | Error::WatchFailed(error) => message(error),
        Error::WatchError(status) => status.message.clone(),
        error => crate::execute::with_causes(error),
    }
}

/// The API server that a node belongs to.
#[derive(Clone)]
pub struct ApiServer {
    /// For everything but heartbeats and events.
    pub client: kube::Client,
    /// For the node's status and its lease: no limit holds them up.
    pub heartbeats: kube::Client,
    /// For events: a flood of them holds up nothing else.
    pub events: kube::Client,
}

impl std::fmt::Debug for ApiServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ApiServer")
    }
}

/// What KubeletConfiguration says of the way to an API server; whoever makes the clients acts on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApiSettings {
    /// `rotateCertificates`: the client certificate is renewed.
    pub rotate_certificate: bool,
    /// `serverTLSBootstrap`: the serving certificate comes from the cluster.
    pub request_serving_certificate: bool,
    /// `kubeAPIQPS`; 0: no limit.
    pub requests_per_second: u32,
    /// `kubeAPIBurst`.
    pub requests_burst: u32,
    /// `eventRecordQPS`; 0: no limit.
    pub events_per_second: u32,
    /// `eventBurst`.
    pub events_burst: u32,
}

impl Default for ApiSettings {
    fn default() -> Self {
        ApiSettings {
            rotate_certificate: false,
            request_serving_certificate: false,
            requests_per_second: 50,
            requests_burst: 100,
            events_per_second: 50,
            events_burst: 100,
        }
    }
}

/// Starts what follows the API server's pods, and what tells it how they are.
pub(crate) fn start_pods(
    server: &ApiServer,
    executor: &Executor,
    (table, api): (&PodTable, &ApiPods),
    updates: mpsc::Sender<SourceUpdate>,
    stop: &CancellationToken,
) {
    let config = &executor.config;
    let offline = executor.objects.api().map(|objects| Offline::new(config, objects.clone(), executor.node.own.clone()));
    let source = pods::PodSource {
        client: server.client.clone(),
        node_name: config.node_name.clone(),
        clock: config.clock.clone(),
        node: executor.node.own.clone(),
        api: api.clone(),
        offline,
    };
    let node = (config.node_name.clone(), executor.node.own.clone());
    table.follow();
    tokio::spawn(pods::run(source, updates, stop.clone()));
    tokio::spawn(statuses::run(server.client.clone(), table.clone(), api.clone(), stop.clone()));
    tokio::spawn(mirrors::run(server.client.clone(), node, (table.clone(), api.clone()), stop.clone()));
}
