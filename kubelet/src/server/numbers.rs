//! `/metrics…` and `/stats/summary`: gathers what the pages are made of and lets them be written while they are sent. Every
//! question takes its own samples.

use std::sync::Arc;
use std::time::Duration;

use berth_cri_api::v1 as cri;
use futures::StreamExt;
use http::{Response, StatusCode};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;

use super::query;
use super::{Api, Body, stream, text};
use crate::metrics::text::Text;
use crate::metrics::{cadvisor, own, resource};
use crate::node::Capacity;
use crate::stats::node::{self, FileSystem, NodeStats};
use crate::stats::volumes::Walks;
use crate::stats::{Rate, summary};

/// What Prometheus is told it reads.
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8; escaping=underscores";

/// Pages that are made at a time: each has a thread that may block until its client has read it, and the agent has few. A
/// file system that hangs takes no more than these either.
const PAGES: usize = 4;
/// How long a page may be read, and waited for: longer than any scraper waits.
const READ: Duration = Duration::from_secs(30);

/// What is remembered between the questions: some numbers.
#[derive(Debug)]
pub(crate) struct Memory {
    node: Rate,
    walks: Walks,
    /// Room for pages.
    room: Arc<Semaphore>,
    read: Duration,
}

impl Default for Memory {
    fn default() -> Self {
        // The upstream's volumeStatsAggPeriod.
        Memory {
            node: Rate::default(),
            walks: Walks::new(Duration::from_secs(60)),
            room: Arc::new(Semaphore::new(PAGES)),
            read: READ,
        }
    }
}

/// Room for one page, and how long it may be read.
struct Room(OwnedSemaphorePermit, Duration);

impl Room {
    /// Before anything is gathered: who waits holds nothing. None when pages stay unread.
    async fn wait(memory: &Memory) -> Option<Room> {
        let room = memory.room.clone().acquire_owned();
        let permit = tokio::time::timeout(memory.read, room).await.ok()?.ok()?;
        Some(Room(permit, memory.read))
    }

    /// Writes a page on a thread that may block, while it is sent.
    fn page(self, content_type: &'static str, write: impl FnOnce(&mut Text) + Send + 'static) -> Response<Body> {
        let (sender, receiver) = tokio::sync::mpsc::channel(2);
        let (mut out, cut) = Text::sent(sender, Instant::now() + self.1);
        tokio::task::spawn_blocking(move || {
            write(&mut out);
            drop(out);
            drop(self.0);
        });
        // A page that was given up must not look like a whole one.
        let end = futures::stream::once(async move { cut.is_cut() });
        let end = end.filter_map(async |cut| cut.then(|| Err(std::io::ErrorKind::TimedOut.into())));
        let body = StreamBody::new(ReceiverStream::new(receiver).chain(end).map(|piece| piece.map(Frame::data)));
        stream(content_type, BodyExt::boxed_unsync(body))
    }
}

fn full() -> Response<Body> {
    text(StatusCode::SERVICE_UNAVAILABLE, format!("{PAGES} pages are being read already, and slowly\n"))
}

fn now_ns(api: &Api) -> i64 {
    i64::try_from(api.config.clock.now().as_nanosecond()).unwrap_or(0)
}

/// `/metrics`.
pub(super) async fn metrics(api: &Api) -> Response<Body> {
    let Some(room) = Room::wait(&api.memory).await else { return full() };
    let api = api.clone();
    room.page(PROMETHEUS, move |out| {
        let about = own::About {
            metrics: api.runtime.metrics(),
            pods: &api.table.list(),
            node: &api.config.node_name,
            pod_logs: &api.config.pod_logs_dir,
            certificates: api.config.certificates.as_ref().map(|source| (source.look(), api.config.clock.now().as_second())),
        };
        own::write(&about, out);
    })
}

/// `/metrics/probes`.
pub(super) async fn probes(api: &Api) -> Response<Body> {
    let Some(room) = Room::wait(&api.memory).await else { return full() };
    let api = api.clone();
    room.page(PROMETHEUS, move |out| own::write_probes(api.runtime.metrics(), out))
}

/// `/metrics/slis`.
pub(super) async fn slis(api: &Api) -> Response<Body> {
    let Some(room) = Room::wait(&api.memory).await else { return full() };
    let checks = api.health.checks();
    room.page(PROMETHEUS, move |out| own::write_slis(&checks, out))
}

/// When a running container was started, by its ID in the runtime.
fn start_time(pods: &[Arc<Pod>], id: &str) -> Option<Timestamp> {
    let status = |pod: &Arc<Pod>| {
        let status = pod.status.as_ref()?;
        let all = [&status.container_statuses, &status.init_container_statuses];
        let is_it = |told: &str| told.rsplit("//").next() == Some(id);
        let found = all.into_iter().flatten().flatten().find(|s| s.container_id.as_deref().is_some_and(is_it))?;
        Some(found.state.as_ref()?.running.as_ref()?.started_at.as_ref()?.0)
    };
    pods.iter().find_map(status)
}

/// `/metrics/resource`.
pub(super) async fn resource(api: &Api) -> Response<Body> {
    let Some(room) = Room::wait(&api.memory).await else { return full() };
    let mut stats = told(api.runtime.list_pod_sandbox_stats().await);
    let pods = api.table.list();
    if let Some(stats) = &mut stats {
        resource::add_start_times(stats, |id| start_time(&pods, id));
    }
    let now = now_ns(api);
    room.page(PROMETHEUS, move |out| resource::write(&NodeStats::read(now), stats.as_deref(), out))
}

/// `/metrics/cadvisor`.
pub(super) async fn cadvisor(api: &Api) -> Response<Body> {
    let Some(room) = Room::wait(&api.memory).await else { return full() };
    let stats = told(api.runtime.list_pod_sandbox_stats().await).unwrap_or_default();
    let descriptors = told(api.runtime.metric_descriptors().await);
    let mut failed = descriptors.is_none();
    let mut scrape = cadvisor::Scrape::new(descriptors.unwrap_or_default(), &stats);
    if !failed {
        failed = told(api.runtime.pod_sandbox_metrics(|pod| scrape.add(pod)).await).is_none();
    }
    let (now, root, sys) = (now_ns(api), api.config.kubelet_root.clone(), api.config.sys_devices.clone());
    room.page(PROMETHEUS, move |out| {
        let node = NodeStats::read(now);
        scrape.add_cgroups(&node, FileSystem::of(&root), &stats);
        scrape.write(out);
        cadvisor::write_machine(&node, &Capacity::read(&root, &sys), failed, out);
    })
}

/// What the runtime does not tell is left out of the page, which says so.
fn told<T>(answer: crate::Result<T>) -> Option<T> {
    answer.inspect_err(|error| tracing::warn!(%error, "the runtime's statistics are not to be had")).ok()
}

/// `/stats/summary`.
pub(super) async fn stats_summary(api: &Api, query: Option<&str>) -> Response<Body> {
    let Some(room) = Room::wait(&api.memory).await else { return full() };
    let brief = query::flag(&query::pairs(query), "only_cpu_and_memory");
    let stats: Vec<cri::PodSandboxStats> = match api.runtime.list_pod_sandbox_stats().await {
        Ok(stats) => stats,
        Err(error) => return text(StatusCode::INTERNAL_SERVER_ERROR, format!("failed to get pod stats: {error}\n")),
    };
    let runtime_fs = if brief { [None, None] } else { node::runtime_file_systems(&api.runtime).await };
    let (api, now) = (api.clone(), now_ns(api));
    room.page("application/json", move |out| {
        let node = NodeStats::read(now);
        let source = summary::Source {
            node_name: &api.config.node_name,
            node_nano_cores: api.memory.node.of(node.cpu_ns, Instant::now()),
            node: &node,
            own: own_usage(),
            kubelet_root: &api.config.kubelet_root,
            pod_logs: &api.config.pod_logs_dir,
            walks: &api.memory.walks,
            runtime_fs,
            pods: &api.table.list(),
            stats: &stats,
            brief,
        };
        summary::write(&source, out);
    })
}

/// Processor time in nanoseconds and resident bytes of this process.
fn own_usage() -> (u64, u64) {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<u64> =
        stat.rsplit(") ").next().unwrap_or_default().split(' ').map(|f| f.trim().parse().unwrap_or(0)).collect();
    let at = |n: usize| fields.get(n).copied().unwrap_or(0);
    // Hundredths of a second, and pages.
    ((at(11) + at(12)) * 10_000_000, at(21) * rustix::param::page_size() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn pages_that_are_not_read_have_few_threads_and_not_for_long() {
        let memory = Memory { read: Duration::from_millis(500), ..Memory::default() };
        let endless = |room: Room| {
            room.page("x", |out| {
                while !out.is_unread() {
                    out.push("abcdefgh");
                }
            })
        };
        let mut pages = Vec::new();
        for _ in 0..PAGES {
            pages.push(endless(Room::wait(&memory).await.unwrap()));
        }
        assert!(memory.room.try_acquire().is_err(), "there is room for no more");
        let room = tokio::time::timeout(Duration::from_secs(20), memory.room.acquire()).await;
        assert!(room.is_ok(), "pages that are not read are given up");
        let body = pages.remove(0).into_body();
        assert!(body.collect().await.is_err(), "half a page must not look like a whole one");
    }
}
