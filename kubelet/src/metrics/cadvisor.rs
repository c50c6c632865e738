//! `/metrics/cadvisor`: what the runtime measures of containers and pods under cAdvisor's names, and the machine. The series
//! of a full node are kept as small rows while they are sorted by family; the text is made while it is sent.

use std::collections::{BTreeMap, HashMap};

use berth_cri_api::v1 as cri;

use super::text::{Text, push_labels};
use crate::node::Capacity;
use crate::stats::node::{FileSystem, NodeStats};

/// The labels that every series of a subject shares.
const SHARED: [&str; 5] = ["container", "id", "image", "namespace", "pod"];
/// The family that is told from the statistics: the runtime's metric has whole seconds only.
const CPU: &str = "container_cpu_usage_seconds_total";

#[derive(Debug)]
struct Family {
    name: String,
    help: String,
    kind: &'static str,
    labels: Vec<String>,
}

#[derive(Debug)]
struct Row {
    family: u16,
    subject: u32,
    value: f64,
    ns: i64,
    /// Labels of its own, written already.
    own: Option<Box<str>>,
}

/// The metrics of one scrape.
#[derive(Debug, Default)]
pub(crate) struct Scrape {
    families: Vec<Family>,
    by_name: HashMap<String, u16>,
    /// Labels, written already.
    subjects: Vec<String>,
    rows: Vec<Row>,
    /// The precise processor time by container ID.
    cpu: HashMap<String, u64>,
    /// The cgroup of each pod, by namespace and name: the parent of its containers'.
    cgroups: BTreeMap<(String, String), String>,
}

impl Scrape {
    /// Nothing but what the runtime can measure.
    pub(crate) fn new(descriptors: Vec<cri::MetricDescriptor>, stats: &[cri::PodSandboxStats]) -> Scrape {
        let mut scrape = Scrape::default();
        for descriptor in descriptors {
            let at = u16::try_from(scrape.families.len()).unwrap_or(u16::MAX);
            scrape.by_name.insert(descriptor.name.clone(), at);
            let kind = if descriptor.name.ends_with("_total") { "counter" } else { "gauge" };
            scrape.families.push(Family { name: descriptor.name, help: descriptor.help, kind, labels: descriptor.label_keys });
        }
        for container in stats.iter().flat_map(|p| &p.linux).flat_map(|l| &l.containers) {
            let usage = container.cpu.as_ref().and_then(|c| c.usage_core_nano_seconds);
            if let (Some(attributes), Some(usage)) = (&container.attributes, usage) {
                scrape.cpu.insert(attributes.id.clone(), usage.value);
            }
        }
        scrape
    }

    /// Adds a sandbox's metrics.
    pub(crate) fn add(&mut self, pod: cri::PodSandboxMetrics) {
        for metric in pod.metrics {
            self.metric(&pod.pod_sandbox_id, metric, None);
        }
        for container in pod.container_metrics {
            let cpu = self.cpu.get(&container.container_id).map(|ns| *ns as f64 / 1e9);
            for metric in container.metrics {
                self.metric(&container.container_id, metric, cpu);
            }
        }
    }

    fn metric(&mut self, id: &str, metric: cri::Metric, cpu: Option<f64>) {
        let Some(&family) = self.by_name.get(&metric.name) else { return };
        let Some(described) = self.families.get_mut(usize::from(family)) else { return };
        if metric.metric_type() == cri::MetricType::Counter {
            described.kind = "counter";
        }
        let pairs = described.labels.iter().map(String::as_str).zip(metric.label_values.iter().map(String::as_str));
        let pairs: Vec<(&str, &str)> = pairs.collect();
        let find = |key: &str| pairs.iter().find(|(name, _)| *name == key).map_or("", |(_, value)| *value);
        // A sandbox is nobody's container here.
        let container = Some(find("container")).filter(|name| *name != "POD").unwrap_or_default();
        let mut subject = String::new();
        let value = |key| if key == "container" { container } else { find(key) };
        push_labels(&mut subject, &SHARED.map(|key| (key, value(key))));
        push_labels(&mut subject, &[("name", id)]);
        let mut own = String::new();
        let others = pairs.iter().filter(|(name, _)| !SHARED.contains(name) && *name != "name");
        push_labels(&mut own, &others.copied().collect::<Vec<_>>());
        if described.name == CPU && own.is_empty() {
            push_labels(&mut own, &[("cpu", "total")]);
        }
        if !container.is_empty()
            && let Some((parent, _)) = find("id").rsplit_once('/')
        {
            let key = (find("namespace").to_owned(), find("pod").to_owned());
            self.cgroups.entry(key).or_insert_with(|| parent.to_owned());
        }
        let told = metric.value.map_or(0.0, |v| v.value as f64);
        let value = cpu.filter(|_| described.name == CPU).unwrap_or(told);
        if self.subjects.last() != Some(&subject) {
            self.subjects.push(subject);
        }
        let subject = u32::try_from(self.subjects.len() - 1).unwrap_or(u32::MAX);
        let own = (!own.is_empty()).then(|| own.into_boxed_str());
        self.rows.push(Row { family, subject, value, ns: metric.timestamp, own });
    }

    /// Adds the pods' cgroups, and the whole machine's as cAdvisor does: as the cgroup `/`.
    pub(crate) fn add_cgroups(&mut self, node: &NodeStats, root: Option<FileSystem>, pods: &[cri::PodSandboxStats]) {
        let mut put = |subject: &str, ns: i64, values: &[(&str, &'static str, Option<u64>, f64)]| {
            self.subjects.push(subject.to_owned());
            for (name, kind, value, unit) in values {
                let Some(value) = value else { continue };
                let next = u16::try_from(self.families.len()).unwrap_or(u16::MAX);
                let family = *self.by_name.entry((*name).to_owned()).or_insert(next);
                if family == next {
                    let help = "Of a cgroup.".to_owned();
                    self.families.push(Family { name: (*name).to_owned(), help, kind, labels: Vec::new() });
                }
                let own = (*name == CPU).then(|| "cpu=\"total\"".into());
                let subject = u32::try_from(self.subjects.len() - 1).unwrap_or(u32::MAX);
                self.rows.push(Row { family, subject, value: *value as f64 / unit, ns, own });
            }
        };
        for pod in pods {
            let Some(metadata) = pod.attributes.as_ref().and_then(|a| a.metadata.as_ref()) else { continue };
            let Some(id) = self.cgroups.get(&(metadata.namespace.clone(), metadata.name.clone())) else { continue };
            let Some(linux) = &pod.linux else { continue };
            let mut subject = String::new();
            let labels = [
                ("container", ""),
                ("id", id),
                ("image", ""),
                ("namespace", &metadata.namespace),
                ("pod", &metadata.name),
                ("name", ""),
            ];
            push_labels(&mut subject, &labels);
            let memory = linux.memory.as_ref();
            let cpu = linux.cpu.as_ref();
            put(
                &subject,
                cpu.map_or(0, |c| c.timestamp),
                &[
                    (CPU, "counter", cpu.and_then(|c| c.usage_core_nano_seconds).map(|v| v.value), 1e9),
                    ("container_memory_usage_bytes", "gauge", memory.and_then(|m| m.usage_bytes).map(|v| v.value), 1.0),
                    (
                        "container_memory_working_set_bytes",
                        "gauge",
                        memory.and_then(|m| m.working_set_bytes).map(|v| v.value),
                        1.0,
                    ),
                    ("container_memory_rss", "gauge", memory.and_then(|m| m.rss_bytes).map(|v| v.value), 1.0),
                ],
            );
        }
        let mut subject = String::new();
        push_labels(&mut subject, &[("container", ""), ("id", "/"), ("image", ""), ("namespace", ""), ("pod", ""), ("name", "")]);
        put(
            &subject,
            node.time_ns,
            &[
                (CPU, "counter", Some(node.cpu_ns), 1e9),
                ("container_memory_usage_bytes", "gauge", Some(node.memory.usage), 1.0),
                ("container_memory_working_set_bytes", "gauge", Some(node.memory.working_set), 1.0),
                ("container_memory_rss", "gauge", Some(node.memory.rss), 1.0),
                ("container_memory_swap", "gauge", Some(node.swap_used), 1.0),
                ("container_fs_usage_bytes", "gauge", root.map(|fs| fs.used), 1.0),
                ("container_fs_limit_bytes", "gauge", root.map(|fs| fs.capacity), 1.0),
                ("container_start_time_seconds", "gauge", u64::try_from(node.boot_time).ok(), 1.0),
            ],
        );
    }

    /// Writes all families, each in one piece.
    pub(crate) fn write(mut self, out: &mut Text) {
        // What the runtime did not tell does not exist: an empty family has no head.
        self.rows.sort_by_key(|row| row.family);
        let mut last = None;
        for row in &self.rows {
            let (Some(family), Some(subject)) =
                (self.families.get(usize::from(row.family)), self.subjects.get(row.subject as usize))
            else {
                continue;
            };
            if last.replace(row.family) != Some(row.family) {
                out.family(&family.name, family.kind, &family.help);
            }
            match &row.own {
                None => out.line(&family.name, subject, row.value, row.ns),
                Some(own) => out.line(&family.name, &format!("{subject},{own}"), row.value, row.ns),
            }
            if out.is_unread() {
                return;
            }
        }
    }
}

/// The machine's families.
pub(crate) fn write_machine(node: &NodeStats, capacity: &Capacity, failed: bool, out: &mut Text) {
    let cores = u64::try_from(capacity.cpu_millis / 1000).unwrap_or(0);
    let topology = topology();
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let machine = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let labels = [("boot_id", boot.trim()), ("machine_id", machine.trim())];
    for (name, help, value) in [
        ("machine_cpu_cores", "Number of logical CPU cores.", cores),
        ("machine_cpu_physical_cores", "Number of physical CPU cores.", topology.0),
        ("machine_cpu_sockets", "Number of CPU sockets.", topology.1),
        ("machine_memory_bytes", "Amount of memory installed on the machine.", node.memory.total),
        (
            "machine_swap_bytes",
            "Amount of swap memory available on the machine.",
            u64::try_from(capacity.swap_bytes).unwrap_or(0),
        ),
    ] {
        out.family(name, "gauge", help);
        out.sample(name, &labels, value);
    }
    let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
    out.family(
        "cadvisor_version_info",
        "gauge",
        "A metric with a constant '1' value labeled by kernel version and the version of what measures.",
    );
    let version = concat!("berth-", env!("CARGO_PKG_VERSION"));
    out.sample("cadvisor_version_info", &[("kernelVersion", kernel.as_str()), ("cadvisorVersion", version)], 1);
    for (name, help) in [
        ("container_scrape_error", "1 if there was an error while getting container metrics, 0 otherwise"),
        ("machine_scrape_error", "1 if there was an error while getting machine metrics, 0 otherwise."),
    ] {
        out.family(name, "gauge", help);
        out.sample(name, &[], usize::from(failed && name.starts_with("container")));
    }
}

/// Physical cores and sockets.
fn topology() -> (u64, u64) {
    let (mut cores, mut sockets) = (std::collections::BTreeSet::new(), std::collections::BTreeSet::new());
    for cpu in std::fs::read_dir("/sys/devices/system/cpu").into_iter().flatten().flatten() {
        let read = |file: &str| std::fs::read_to_string(cpu.path().join("topology").join(file)).ok();
        if let (Some(core), Some(socket)) = (read("core_id"), read("physical_package_id")) {
            cores.insert((socket.clone(), core));
            sockets.insert(socket);
        }
    }
    (cores.len().max(1) as u64, sockets.len().max(1) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_in_one_piece_and_processor_time_is_precise() {
        let keys = ["pod", "namespace", "container", "id", "image"].map(str::to_owned).to_vec();
        let descriptor = |name: &str, more: &[&str]| cri::MetricDescriptor {
            name: name.into(),
            help: "h".into(),
            label_keys: keys.iter().cloned().chain(more.iter().map(|m| (*m).to_owned())).collect(),
        };
        let metric = |name: &str, container: &str, more: &[&str], value| cri::Metric {
            name: name.into(),
            timestamp: 1_000_000_000,
            metric_type: cri::MetricType::Gauge.into(),
            label_values: ["p", "ns", container, &format!("/kubepods/podu/{container}"), "img"]
                .into_iter()
                .chain(more.iter().copied())
                .map(str::to_owned)
                .collect(),
            value: Some(cri::UInt64Value { value }),
        };
        let stats = [cri::PodSandboxStats {
            attributes: Some(cri::PodSandboxAttributes {
                metadata: Some(cri::PodSandboxMetadata { name: "p".into(), namespace: "ns".into(), ..Default::default() }),
                ..Default::default()
            }),
            linux: Some(cri::LinuxPodSandboxStats {
                memory: Some(cri::MemoryUsage { rss_bytes: Some(cri::UInt64Value { value: 9 }), ..Default::default() }),
                containers: vec![cri::ContainerStats {
                    attributes: Some(cri::ContainerAttributes { id: "id-a".into(), ..Default::default() }),
                    cpu: Some(cri::CpuUsage {
                        usage_core_nano_seconds: Some(cri::UInt64Value { value: 1_250_000_000 }),
                        ..Default::default()
                    }),
                    ..Default::default()
                }],
                ..Default::default()
            }),
            ..Default::default()
        }];
        let mut scrape = Scrape::new(
            vec![
                descriptor("container_processes", &[]),
                descriptor(CPU, &[]),
                descriptor("container_network_receive_bytes_total", &["interface"]),
            ],
            &stats,
        );
        for name in ["a", "b"] {
            scrape.add(cri::PodSandboxMetrics {
                pod_sandbox_id: "s".into(),
                metrics: vec![metric("container_network_receive_bytes_total", "POD", &["eth0"], 5)],
                container_metrics: vec![cri::ContainerMetrics {
                    container_id: format!("id-{name}"),
                    metrics: vec![metric("container_processes", name, &[], 2), metric(CPU, name, &[], 1)],
                }],
            });
        }
        scrape.add_cgroups(&NodeStats::default(), None, &stats);
        let mut out = Text::whole();
        scrape.write(&mut out);
        let text = out.into_string();
        for line in [
            "container_cpu_usage_seconds_total{container=\"a\",id=\"/kubepods/podu/a\",image=\"img\",namespace=\"ns\",pod=\"p\",name=\"id-a\",cpu=\"total\"} 1.25 1000",
            "container_cpu_usage_seconds_total{container=\"b\",id=\"/kubepods/podu/b\",image=\"img\",namespace=\"ns\",pod=\"p\",name=\"id-b\",cpu=\"total\"} 1 1000",
            "container_network_receive_bytes_total{container=\"\",id=\"/kubepods/podu/POD\",image=\"img\",namespace=\"ns\",pod=\"p\",name=\"s\",interface=\"eth0\"} 5 1000",
            "container_memory_rss{container=\"\",id=\"/kubepods/podu\",image=\"\",namespace=\"ns\",pod=\"p\",name=\"\"} 9",
            "container_memory_rss{container=\"\",id=\"/\",image=\"\",namespace=\"\",pod=\"\",name=\"\"} 0",
        ] {
            assert!(text.contains(&format!("{line}\n")), "{line}\n{text}");
        }
        let heads: Vec<_> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
        let mut unique = heads.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(heads.len(), unique.len(), "{heads:?}");
    }
}
