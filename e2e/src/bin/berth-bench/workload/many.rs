//! Many pods: a burst, what they cost idle, lists and statistics of them, a server killed and started again under them, and how long it
//! takes until nothing of them is left.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use berth_cri_api::v1::{
    ContainerFilter, ContainerState, ContainerStateValue, ContainerStatusRequest, ListContainerStatsRequest,
    ListContainersRequest, ListContainersResponse, ListImagesRequest, ListPodSandboxRequest, ListPodSandboxResponse,
    ListPodSandboxStatsRequest, PodSandboxStatusRequest, VersionRequest,
};
use berth_e2e::memory::available_kib;
use futures::future::try_join_all;
use futures::{StreamExt, TryStreamExt, stream};
use prost::Message;

use super::{Scale, idle};
use crate::cri::{Cri, Shape};
use crate::daemon::Daemon;
use crate::pods::{Bench, PODS_CGROUP, Pod, three_of};
use crate::traces::Traces;

/// How many stops and status calls are under way at once: what a kubelet's workers come to.
const WAYS: usize = 10;
/// The kernel's deferred work is done after this; both sides' CPU is counted so long.
const TAIL: Duration = Duration::from_millis(500);
/// How many times more lists are asked for when their cost is counted: one costs less than the clock of a cgroup can tell.
const LISTS_ALONE: usize = 10;
/// What a kubelet asks for.
const SHAPE: Shape = Shape::PerContainer;

/// The parts of this workload that were asked for.
#[derive(Debug, Clone, Copy)]
pub struct Parts {
    /// The burst.
    pub burst: bool,
    /// Memory of many pods.
    pub density: bool,
    /// Lists and statistics.
    pub list: bool,
    /// The restart.
    pub restart: bool,
    /// Until nothing is left.
    pub gone: bool,
}

impl Parts {
    /// Whether anything was asked for.
    pub fn any(self) -> bool {
        self.burst || self.gone || self.more_than_burst()
    }

    fn more_than_burst(self) -> bool {
        self.density || self.list || self.restart
    }
}

/// Runs the parts, which share their pods.
pub async fn run(bench: &mut Bench, daemon: &mut Daemon, scale: Scale, parts: Parts) -> Result<()> {
    let before = available_kib();
    let mut pods = burst(bench, scale.burst, parts.burst).await?;
    if parts.more_than_burst() {
        let with_burst = Traces::count(&bench.hierarchies);
        let more = bench.up_all(scale.density[1].saturating_sub(scale.burst), 4, SHAPE, "").await?;
        let added = more.len();
        pods.extend(more);
        if parts.density {
            idle::measure(bench, "density110", &pods, daemon.pid(), before).await;
        }
        if parts.list {
            list(bench, scale.lists, pods.len()).await?;
        }
        if parts.restart {
            restart(bench, daemon, &pods).await?;
        }
        let extra = pods.split_off(pods.len() - added);
        stream::iter(&extra).map(|pod| bench.down(pod, "")).buffer_unordered(WAYS).try_collect::<()>().await?;
        // Their links go before the clock of the others runs.
        bench.settle_to(&with_burst, "many", extra.iter()).await;
    }
    gone(bench, &pods, parts.gone).await
}

async fn burst(bench: &Bench, count: usize, timed: bool) -> Result<Vec<Pod>> {
    let key = if timed { "burst" } else { "" };
    let plans = (0..count).map(|_| bench.plan(SHAPE)).collect::<Result<Vec<_>>>()?;
    let counting = bench.accounting.begin()?;
    let begun = Instant::now();
    let pods = try_join_all(plans.iter().map(|plan| bench.up(plan, key))).await?;
    let seconds = begun.elapsed().as_secs_f64();
    if timed {
        bench.meter.spent(key, count, counting.end()?);
        bench.meter.add("burst.pods/s", count as f64 / seconds);
    }
    let running = running(&bench.cri).await?;
    ensure!(running == count, "{running} of {count} containers run after the burst");
    for n in three_of(count) {
        bench.check(&pods[n], "burst").await?;
    }
    Ok(pods)
}

async fn running(cri: &Cri) -> Result<usize> {
    let state = Some(ContainerStateValue { state: ContainerState::ContainerRunning.into() });
    let request = ListContainersRequest { filter: Some(ContainerFilter { state, ..Default::default() }) };
    Ok(cri.runtime.clone().list_containers(request).await?.into_inner().containers.len())
}

async fn list(bench: &Bench, calls: usize, pods: usize) -> Result<()> {
    let counting = bench.accounting.begin()?;
    let (mut runtime, mut images) = (bench.cri.runtime.clone(), bench.cri.images.clone());
    for _ in 0..calls {
        let listed = bench.meter.time("list.ListPodSandbox", runtime.list_pod_sandbox(ListPodSandboxRequest::default())).await?;
        ensure!(listed.get_ref().items.len() == pods, "ListPodSandbox is not whole");
        let listed = bench.meter.time("list.ListContainers", runtime.list_containers(ListContainersRequest::default())).await?;
        ensure!(listed.get_ref().containers.len() == pods, "ListContainers is not whole");
        let request = ListPodSandboxStatsRequest::default();
        let listed = bench.meter.time("list.ListPodSandboxStats", runtime.list_pod_sandbox_stats(request)).await?;
        let stats = &listed.get_ref().stats;
        let whole = stats
            .iter()
            .filter(|s| s.linux.as_ref().is_some_and(|l| l.cpu.is_some() && l.memory.is_some() && l.network.is_some()));
        ensure!(whole.count() == pods, "ListPodSandboxStats is not whole");
        let request = ListContainerStatsRequest::default();
        let listed = bench.meter.time("list.ListContainerStats", runtime.list_container_stats(request)).await?;
        let stats = &listed.get_ref().stats;
        let whole = stats.iter().filter(|s| s.cpu.is_some() && s.memory.is_some() && s.writable_layer.is_some());
        ensure!(whole.count() == pods, "ListContainerStats is not whole");
        bench.meter.time("list.ListImages", images.list_images(ListImagesRequest::default())).await?;
        bench.meter.time("list.Version", runtime.version(VersionRequest::default())).await?;
    }
    bench.meter.spent("list", calls, counting.end()?);
    lists_alone(bench, calls * LISTS_ALONE).await
}

/// What a list costs the server, and what it costs this client to read the reply: a call's duration has both in it.
async fn lists_alone(bench: &Bench, calls: usize) -> Result<()> {
    let mut runtime = bench.cri.runtime.clone();
    let counting = bench.accounting.begin()?;
    let mut sandboxes = ListPodSandboxResponse::default();
    for _ in 0..calls {
        sandboxes = runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await?.into_inner();
    }
    bench.meter.spent("list.ListPodSandbox", calls, counting.end()?);
    let counting = bench.accounting.begin()?;
    let mut containers = ListContainersResponse::default();
    for _ in 0..calls {
        containers = runtime.list_containers(ListContainersRequest::default()).await?.into_inner();
    }
    bench.meter.spent("list.ListContainers", calls, counting.end()?);
    let (sandboxes, containers) = (sandboxes.encode_to_vec(), containers.encode_to_vec());
    for _ in 0..calls {
        bench.meter.time("list.read pods", async { ListPodSandboxResponse::decode(sandboxes.as_slice()) }).await?;
        bench.meter.time("list.read containers", async { ListContainersResponse::decode(containers.as_slice()) }).await?;
    }
    Ok(())
}

/// Kills the server and starts it again; the clock runs from the kill until it has told about every pod and container.
async fn restart(bench: &mut Bench, daemon: &mut Daemon, pods: &[Pod]) -> Result<()> {
    let counting = bench.accounting.begin()?;
    let begun = Instant::now();
    daemon.kill();
    daemon.spawn()?;
    let count = pods.len();
    let whole = |mut cri: Cri| async move {
        let sandboxes = cri.runtime.list_pod_sandbox(ListPodSandboxRequest::default()).await?.into_inner().items;
        Ok(sandboxes.iter().filter(|s| s.state == 0).count() == count && running(&cri).await? == count)
    };
    let cri = daemon.wait_for("the restarted server to list everything", whole).await?;
    bench.meter.add("restart.lists", begun.elapsed().as_secs_f64() * 1e3);
    let status = |pod: &Pod| {
        let mut runtime = cri.runtime.clone();
        let sandbox = PodSandboxStatusRequest { pod_sandbox_id: pod.sandbox.clone(), verbose: false };
        let container = ContainerStatusRequest { container_id: pod.container.clone(), verbose: false };
        async move {
            let pod = runtime.pod_sandbox_status(sandbox).await?.into_inner().status.context("a pod's status")?;
            ensure!(pod.network.is_some_and(|n| !n.ip.is_empty()), "a pod has no address after the restart");
            let status = runtime.container_status(container).await?.into_inner().status.context("a container's status")?;
            ensure!(status.state() == ContainerState::ContainerRunning, "a container does not run after the restart");
            Ok(())
        }
    };
    stream::iter(pods).map(status).buffer_unordered(WAYS).try_collect::<()>().await?;
    bench.meter.add("restart.all", begun.elapsed().as_secs_f64() * 1e3);
    bench.meter.spent("restart", 1, counting.end()?);
    bench.cri = cri;
    Ok(())
}

/// Stops the pods and waits until no link, namespace or cgroup of them is left; then removes them.
async fn gone(bench: &Bench, pods: &[Pod], timed: bool) -> Result<()> {
    let key = if timed { "gone" } else { "" };
    let counting = bench.accounting.begin()?;
    let begun = Instant::now();
    stream::iter(pods).map(|pod| bench.stop(pod, key)).buffer_unordered(WAYS).try_collect::<()>().await?;
    bench.meter.add(&format!("{key}.stopped"), begun.elapsed().as_secs_f64() * 1e3);
    let gone = bench.baseline.wait_gone(&bench.hierarchies, PODS_CGROUP, pods.len()).await;
    bench.meter.add(&format!("{key}.gone"), begun.elapsed().as_secs_f64() * 1e3);
    if gone.is_none() {
        bench.meter.fail("gone: stopped pods left something behind".to_owned());
    }
    tokio::time::sleep(TAIL).await;
    if timed {
        bench.meter.spent(key, pods.len(), counting.end()?);
    }
    stream::iter(pods).map(|pod| bench.remove(pod, "")).buffer_unordered(WAYS).try_collect::<()>().await?;
    bench.settle("gone", pods.iter()).await;
    Ok(())
}
