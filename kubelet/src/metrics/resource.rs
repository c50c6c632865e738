//! `/metrics/resource`: processor time, memory and swap of node, pods and containers, for autoscalers. The names and labels
//! are the ones that metrics-server reads.

use berth_cri_api::v1 as cri;
use k8s_openapi::jiff::Timestamp;

use super::text::Text;
use crate::cri::keys;
use crate::stats::node::NodeStats;

/// The page; without the runtime's statistics the node's are there and the error is told.
pub(crate) fn write(node: &NodeStats, pods: Option<&[cri::PodSandboxStats]>, out: &mut Text) {
    let now = node.time_ns;
    let mut of_node = |name: &str, kind: &str, help: &str, value: f64| {
        out.family(name, kind, help);
        out.sample_at(name, &[], value, now);
    };
    let seconds = |ns: u64| ns as f64 / 1e9;
    of_node(
        "node_cpu_usage_seconds_total",
        "counter",
        "Cumulative cpu time consumed by the node in core-seconds",
        seconds(node.cpu_ns),
    );
    of_node("node_memory_working_set_bytes", "gauge", "Current working set of the node in bytes", node.memory.working_set as f64);
    of_node(
        "node_swap_usage_bytes",
        "gauge",
        "Current swap usage of the node in bytes. Reported only on non-windows systems",
        node.swap_used as f64,
    );
    let pods = pods.map(newest);
    let error = usize::from(pods.is_none());
    if let Some(pods) = &pods {
        for family in CONTAINERS {
            family.write(out, pods.iter().flat_map(containers));
        }
        for family in PODS {
            family.write(out, pods.iter().filter_map(pod));
        }
    }
    for (name, help) in [
        ("scrape_error", "1 if there was an error while getting container metrics, 0 otherwise"),
        ("resource_scrape_error", "1 if there was an error while getting container metrics, 0 otherwise"),
    ] {
        out.family(name, "gauge", help);
        out.sample(name, &[], error);
    }
}

/// One sandbox of each pod: the one that was asked about last.
fn newest(all: &[cri::PodSandboxStats]) -> Vec<&cri::PodSandboxStats> {
    let mut of_pod = std::collections::BTreeMap::new();
    for stats in all {
        let Some(metadata) = stats.attributes.as_ref().and_then(|a| a.metadata.as_ref()) else { continue };
        let entry = of_pod.entry((&metadata.namespace, &metadata.name)).or_insert((metadata.attempt, stats));
        if metadata.attempt >= entry.0 {
            *entry = (metadata.attempt, stats);
        }
    }
    of_pod.into_values().map(|(_, stats)| stats).collect()
}

/// What is measured, and of whom.
struct Measured<'a> {
    labels: Vec<(&'static str, &'a str)>,
    cpu: Option<&'a cri::CpuUsage>,
    memory: Option<&'a cri::MemoryUsage>,
    swap: Option<Swap>,
    started: Option<f64>,
}

type Value = (f64, i64);

/// Used and available bytes, and when.
#[derive(Clone, Copy)]
struct Swap {
    used: u64,
    available: Option<u64>,
    ns: i64,
}

struct Family {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    value: fn(&Measured<'_>) -> Option<Value>,
}

fn cpu(m: &Measured<'_>) -> Option<Value> {
    Some((m.cpu?.usage_core_nano_seconds?.value as f64 / 1e9, m.cpu?.timestamp))
}

fn working_set(m: &Measured<'_>) -> Option<Value> {
    Some((m.memory?.working_set_bytes?.value as f64, m.memory?.timestamp))
}

fn swap(m: &Measured<'_>) -> Option<Value> {
    m.swap.map(|swap| (swap.used as f64, swap.ns))
}

fn swap_limit(m: &Measured<'_>) -> Option<Value> {
    m.swap.and_then(|swap| Some((swap.used.saturating_add(swap.available?) as f64, swap.ns)))
}

fn swap_of(stats: &cri::ContainerStats) -> Option<Swap> {
    let swap = stats.swap.as_ref()?;
    let available = swap.swap_available_bytes.as_ref().map(|v| v.value);
    Some(Swap { used: swap.swap_usage_bytes.as_ref()?.value, available, ns: swap.timestamp })
}

const CONTAINERS: &[Family] = &[
    Family {
        name: "container_cpu_usage_seconds_total",
        kind: "counter",
        help: "Cumulative cpu time consumed by the container in core-seconds",
        value: cpu,
    },
    Family {
        name: "container_memory_working_set_bytes",
        kind: "gauge",
        help: "Current working set of the container in bytes",
        value: working_set,
    },
    Family {
        name: "container_start_time_seconds",
        kind: "gauge",
        help: "Start time of the container since unix epoch in seconds",
        value: |m| Some((m.started?, 0)),
    },
    Family {
        name: "container_swap_usage_bytes",
        kind: "gauge",
        help: "Current amount of the container swap usage in bytes. Reported only on non-windows systems",
        value: swap,
    },
    Family {
        name: "container_swap_limit_bytes",
        kind: "gauge",
        help: "Current amount of the container swap limit in bytes. Reported only on non-windows systems",
        value: swap_limit,
    },
];

const PODS: &[Family] = &[
    Family {
        name: "pod_cpu_usage_seconds_total",
        kind: "counter",
        help: "Cumulative cpu time consumed by the pod in core-seconds",
        value: cpu,
    },
    Family {
        name: "pod_memory_working_set_bytes",
        kind: "gauge",
        help: "Current working set of the pod in bytes",
        value: working_set,
    },
    Family {
        name: "pod_swap_usage_bytes",
        kind: "gauge",
        help: "Current amount of the pod swap usage in bytes. Reported only on non-windows systems",
        value: swap,
    },
];

impl Family {
    fn write<'a>(&self, out: &mut Text, measured: impl Iterator<Item = Measured<'a>>) {
        let mut headed = false;
        for one in measured {
            let Some((value, ns)) = (self.value)(&one) else { continue };
            if !std::mem::replace(&mut headed, true) {
                out.family(self.name, self.kind, self.help);
            }
            out.sample_at(self.name, &one.labels, value, ns);
        }
    }
}

fn containers<'a>(pod: &&'a cri::PodSandboxStats) -> impl Iterator<Item = Measured<'a>> {
    let pod: &'a cri::PodSandboxStats = pod;
    let metadata = pod.attributes.as_ref().and_then(|a| a.metadata.as_ref());
    let all = pod.linux.iter().flat_map(|linux| &linux.containers);
    all.filter_map(move |stats| {
        let (metadata, attributes) = (metadata?, stats.attributes.as_ref()?);
        let name = attributes.metadata.as_ref()?.name.as_str();
        Some(Measured {
            labels: vec![("container", name), ("namespace", &metadata.namespace), ("pod", &metadata.name)],
            cpu: stats.cpu.as_ref(),
            memory: stats.memory.as_ref(),
            swap: swap_of(stats),
            started: attributes.annotations.get(STARTED).and_then(|t| t.parse().ok()),
        })
    })
}

/// Put there by the page's caller, who knows it from the pod's status: the statistics do not have it.
pub(crate) const STARTED: &str = "started";

/// Adds what the statistics lack: when each container was started, by its ID.
pub(crate) fn add_start_times(pods: &mut [cri::PodSandboxStats], started: impl Fn(&str) -> Option<Timestamp>) {
    for attributes in
        pods.iter_mut().flat_map(|p| p.linux.iter_mut()).flat_map(|l| &mut l.containers).filter_map(|c| c.attributes.as_mut())
    {
        attributes.annotations.clear();
        attributes.labels.retain(|key, _| key == keys::CONTAINER_NAME);
        if let Some(time) = started(&attributes.id) {
            let seconds = time.as_nanosecond() as f64 / 1e9;
            attributes.annotations.insert(STARTED.to_owned(), seconds.to_string());
        }
    }
}

fn pod<'a>(pod: &&'a cri::PodSandboxStats) -> Option<Measured<'a>> {
    let pod: &'a cri::PodSandboxStats = pod;
    let (metadata, linux) = (pod.attributes.as_ref()?.metadata.as_ref()?, pod.linux.as_ref()?);
    let sum = |a: Swap, b: Swap| Swap { used: a.used.saturating_add(b.used), ..a };
    let swap = linux.containers.iter().filter_map(swap_of).reduce(sum);
    Some(Measured {
        labels: vec![("namespace", &metadata.namespace), ("pod", &metadata.name)],
        cpu: linux.cpu.as_ref(),
        memory: linux.memory.as_ref(),
        swap,
        started: None,
    })
}
