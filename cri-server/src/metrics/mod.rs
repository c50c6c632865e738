//! The metrics that the kubelet serves on /metrics/cadvisor, with cAdvisor's names. Read when asked for; nothing is sampled
//! while nobody asks. A container that vanishes meanwhile is left out.

mod process;
mod sample;
mod table;

use std::os::fd::AsFd;
use std::sync::Arc;

use berth_cri_api::v1;

use crate::Server;
use crate::board::{ContainerState, ContainerView, SandboxView};
use crate::sandbox::holdings::Live;
use crate::sandbox::owner;
use crate::sandbox::state::Op;
use crate::stats::network::{self, Interface};
use sample::Reader;
use table::{CONTAINER, Needs, POD};

/// The labels of every metric, in this order; a metric's own follow.
const LABELS: [&str; 5] = ["pod", "namespace", "container", "id", "image"];

/// What can be measured on this machine. Blocking.
fn available(server: &Server) -> impl Fn(Needs) -> bool {
    let v2 = server.cgroups.is_v2();
    let pressure = v2 && std::fs::read("/proc/pressure/cpu").is_ok();
    let huge = server.cgroups.has_controller("hugetlb");
    move |needs| match needs {
        Needs::Nothing => true,
        Needs::Pressure => pressure,
        Needs::HugePages => huge,
        Needs::HugePagePeak => huge && !v2,
    }
}

/// The metrics that this machine has. Blocking.
pub(crate) fn descriptors(server: &Server) -> Vec<v1::MetricDescriptor> {
    table::descriptors(available(server))
}

/// The metrics of all running pods and containers.
pub(crate) async fn pods(server: &Arc<Server>) -> Vec<v1::PodSandboxMetrics> {
    let views = server.board.sandboxes().into_iter().filter(|view| view.ready);
    let this = server.as_ref();
    let views = futures::future::join_all(views.map(|view| async move {
        let live = if view.spec.host_network() { None } else { owner::submit(this, &view.id, Op::Live).await.ok() };
        (view, live)
    }))
    .await;
    let this = server.clone();
    let read = move || {
        let available = available(&this);
        let mut reader = Reader::new(&this);
        Ok(views.iter().map(|(view, live)| pod(&mut reader, view, live.as_deref(), &available)).collect())
    };
    crate::blocking(read).await.unwrap_or_default()
}

fn pod(
    reader: &mut Reader<'_>,
    view: &SandboxView,
    live: Option<&Live>,
    available: &impl Fn(Needs) -> bool,
) -> v1::PodSandboxMetrics {
    let containers = reader.server.board.containers_of(&view.id);
    let running = containers.iter().filter(|c| c.state == ContainerState::Running);
    let interfaces = live.and_then(|live| network::read(live.netns.as_ref()?.as_fd()));
    v1::PodSandboxMetrics {
        pod_sandbox_id: view.id.as_str().to_owned(),
        metrics: network_metrics(view, &interfaces.unwrap_or_default()),
        container_metrics: running.filter_map(|c| container(reader, view, c, available)).collect(),
    }
}

fn network_metrics(view: &SandboxView, interfaces: &[Interface]) -> Vec<v1::Metric> {
    let timestamp = crate::clock::now_ns();
    let mut out = Vec::with_capacity(POD.len() * interfaces.len());
    for descriptor in POD {
        for interface in interfaces {
            let mut labels = labels(view, "POD", &view.cgroup, "");
            labels.push(interface.name.clone());
            out.push(descriptor.metric(labels, (descriptor.values)(interface), timestamp));
        }
    }
    out
}

/// One container; none when it is being removed.
fn container(
    reader: &mut Reader<'_>,
    pod: &SandboxView,
    view: &ContainerView,
    available: &impl Fn(Needs) -> bool,
) -> Option<v1::ContainerMetrics> {
    let sample = reader.read(view)?;
    let facts = &view.facts;
    let image = if facts.image_name.is_empty() { &facts.image_ref } else { &facts.image_name };
    let labels = labels(pod, &facts.spec.name, &facts.cgroup, image);
    let metrics = table::metrics(CONTAINER, &sample, &labels, available);
    Some(v1::ContainerMetrics { container_id: view.id.as_str().to_owned(), metrics })
}

fn labels(pod: &SandboxView, container: &str, id: &str, image: &str) -> Vec<String> {
    let metadata = &pod.spec.metadata;
    [metadata.name.as_str(), &metadata.namespace, container, id, image].map(str::to_owned).to_vec()
}
