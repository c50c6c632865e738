//! `/stats/summary`: node, pods and containers as dashboards and older autoscalers read them. Written pod by pod: the whole
//! is never in memory.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use berth_cri_api::v1 as cri;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use k8s_openapi::jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::node::{FileSystem, NodeStats, Pressure};
use super::volumes::{self, Usage, Walks};
use crate::cri::keys;
use crate::metrics::text::Text;
use crate::{logs, pod};

/// What a summary is made of.
pub(crate) struct Source<'a> {
    pub(crate) node_name: &'a str,
    pub(crate) node: &'a NodeStats,
    pub(crate) node_nano_cores: Option<u64>,
    /// Nanoseconds of processor time, resident bytes and rate of this process.
    pub(crate) own: (u64, u64),
    pub(crate) kubelet_root: &'a Path,
    pub(crate) pod_logs: &'a Path,
    pub(crate) walks: &'a Walks,
    /// Of images and of writable layers: the file system, and what the runtime uses of it in bytes and inodes.
    pub(crate) runtime_fs: [Option<(FileSystem, u64, u64)>; 2],
    pub(crate) pods: &'a [Arc<Pod>],
    pub(crate) stats: &'a [cri::PodSandboxStats],
    /// Names, processors, memory and swap only.
    pub(crate) brief: bool,
}

type Fields = Map<String, Value>;

/// Writes the summary. Blocking: folders are walked.
pub(crate) fn write(source: &Source<'_>, out: &mut Text) {
    out.push(&format!("{{\"node\":{},\"pods\":[", Value::Object(node(source))));
    let mut newest: BTreeMap<&str, &cri::PodSandboxStats> = BTreeMap::new();
    for stats in source.stats {
        let Some(metadata) = stats.attributes.as_ref().and_then(|a| a.metadata.as_ref()) else { continue };
        let attempt = |s: &cri::PodSandboxStats| s.attributes.as_ref().and_then(|a| a.metadata.as_ref()).map(|m| m.attempt);
        let entry = newest.entry(&metadata.uid).or_insert(stats);
        if attempt(stats) >= attempt(entry) {
            *entry = stats;
        }
    }
    let mut comma = "";
    for pod in source.pods {
        let Some(stats) = newest.get(pod::uid(pod)) else { continue };
        out.push(&format!("{comma}{}", Value::Object(of_pod(source, pod, stats))));
        comma = ",";
        if out.is_unread() {
            return;
        }
    }
    out.push("]}");
}

fn time(ns: i64) -> Value {
    let time = Timestamp::from_nanosecond(i128::from(ns)).unwrap_or(Timestamp::UNIX_EPOCH);
    // Seconds, as the API writes times.
    format!("{:.0}", time).into()
}

fn put(fields: &mut Fields, name: &str, value: Option<impl Into<Value>>) {
    if let Some(value) = value {
        fields.insert(name.to_owned(), value.into());
    }
}

fn value(value: Option<&cri::UInt64Value>) -> Option<u64> {
    value.map(|v| v.value)
}

fn file_system(ns: i64, fs: &FileSystem, used: Usage) -> Value {
    json!({
        "time": time(ns), "availableBytes": fs.available, "capacityBytes": fs.capacity, "usedBytes": used.bytes,
        "inodesFree": fs.inodes_free, "inodes": fs.inodes, "inodesUsed": used.inodes,
    })
}

fn own_pressure(pressure: Option<&Pressure>) -> Option<Value> {
    let line =
        |l: &super::node::PressureLine| json!({"total": l.total_ns, "avg10": l.avg10, "avg60": l.avg60, "avg300": l.avg300});
    pressure.map(|p| json!({"full": line(&p.full), "some": line(&p.some)}))
}

fn runtime_pressure(psi: Option<&cri::PsiStats>) -> Option<Value> {
    let line = |l: Option<&cri::PsiData>| {
        let l = l.copied().unwrap_or_default();
        json!({"total": l.total, "avg10": l.avg10, "avg60": l.avg60, "avg300": l.avg300})
    };
    psi.map(|p| json!({"full": line(p.full.as_ref()), "some": line(p.some.as_ref())}))
}

fn node(source: &Source<'_>) -> Fields {
    let (node, memory) = (source.node, &source.node.memory);
    let now = time(node.time_ns);
    let mut cpu = Fields::new();
    put(&mut cpu, "time", Some(now.clone()));
    put(&mut cpu, "usageNanoCores", source.node_nano_cores);
    put(&mut cpu, "usageCoreNanoSeconds", Some(node.cpu_ns));
    put(&mut cpu, "psi", own_pressure(node.pressure[0].as_ref()));
    let mut mem = Fields::new();
    put(&mut mem, "time", Some(now.clone()));
    put(&mut mem, "availableBytes", Some(memory.total.saturating_sub(memory.working_set)));
    put(&mut mem, "usageBytes", Some(memory.usage));
    put(&mut mem, "workingSetBytes", Some(memory.working_set));
    put(&mut mem, "rssBytes", Some(memory.rss));
    put(&mut mem, "pageFaults", Some(memory.page_faults));
    put(&mut mem, "majorPageFaults", Some(memory.major_page_faults));
    put(&mut mem, "psi", own_pressure(node.pressure[1].as_ref()));
    let mut out = Fields::new();
    put(&mut out, "nodeName", Some(source.node_name));
    put(&mut out, "systemContainers", Some(system_containers(source)));
    put(&mut out, "startTime", Some(time(node.boot_time.saturating_mul(1_000_000_000))));
    put(&mut out, "cpu", Some(cpu));
    put(&mut out, "memory", Some(mem));
    put(&mut out, "swap", Some(json!({"time": now, "swapAvailableBytes": node.swap_free, "swapUsageBytes": node.swap_used})));
    if source.brief {
        return out;
    }
    put(&mut out, "io", own_pressure(node.pressure[2].as_ref()).map(|psi| json!({"time": now, "psi": psi})));
    let interface = |i: &super::node::Interface| json!({"name": i.name, "rxBytes": i.rx.0, "rxErrors": i.rx.1, "txBytes": i.tx.0, "txErrors": i.tx.1});
    let default = node.interfaces.iter().find(|i| i.name == node.default_interface).map(interface);
    let mut network = default.and_then(|v| v.as_object().cloned()).unwrap_or_default();
    put(&mut network, "time", Some(now.clone()));
    put(&mut network, "interfaces", Some(node.interfaces.iter().map(interface).collect::<Vec<_>>()));
    put(&mut out, "network", Some(network));
    let whole = |fs: &FileSystem| Usage { bytes: fs.used, inodes: fs.inodes.saturating_sub(fs.inodes_free) };
    put(&mut out, "fs", FileSystem::of(source.kubelet_root).map(|fs| file_system(node.time_ns, &fs, whole(&fs))));
    let mut runtime = Fields::new();
    for (name, found) in ["imageFs", "containerFs"].into_iter().zip(&source.runtime_fs) {
        let told =
            found.as_ref().map(|(fs, bytes, inodes)| file_system(node.time_ns, fs, Usage { bytes: *bytes, inodes: *inodes }));
        put(&mut runtime, name, told);
    }
    put(&mut out, "runtime", Some(runtime));
    put(&mut out, "rlimit", Some(json!({"time": now, "maxpid": node.pids.0, "curproc": node.pids.1})));
    out
}

/// The kubelet, and the runtime with it where both are one process; and all pods together.
fn system_containers(source: &Source<'_>) -> Value {
    let now = time(source.node.time_ns);
    let entry = |name: &str, cpu: u64, memory: u64| {
        json!({
            "name": name, "startTime": now,
            "cpu": {"time": now, "usageCoreNanoSeconds": cpu},
            "memory": {"time": now, "usageBytes": memory, "workingSetBytes": memory, "rssBytes": memory},
        })
    };
    let sum = |of: fn(&cri::LinuxPodSandboxStats) -> Option<u64>| {
        source.stats.iter().filter_map(|pod| of(pod.linux.as_ref()?)).sum::<u64>()
    };
    let cpu = sum(|linux| value(linux.cpu.as_ref()?.usage_core_nano_seconds.as_ref()));
    let memory = sum(|linux| value(linux.memory.as_ref()?.working_set_bytes.as_ref()));
    json!([entry("kubelet", source.own.0, source.own.1), entry("pods", cpu, memory)])
}

fn cpu(usage: &cri::CpuUsage) -> Value {
    let mut out = Fields::new();
    put(&mut out, "time", Some(time(usage.timestamp)));
    put(&mut out, "usageNanoCores", value(usage.usage_nano_cores.as_ref()));
    put(&mut out, "usageCoreNanoSeconds", value(usage.usage_core_nano_seconds.as_ref()));
    put(&mut out, "psi", runtime_pressure(usage.psi.as_ref()));
    Value::Object(out)
}

fn memory(usage: &cri::MemoryUsage) -> Value {
    let mut out = Fields::new();
    put(&mut out, "time", Some(time(usage.timestamp)));
    for (name, told) in [
        ("availableBytes", &usage.available_bytes),
        ("usageBytes", &usage.usage_bytes),
        ("workingSetBytes", &usage.working_set_bytes),
        ("rssBytes", &usage.rss_bytes),
        ("pageFaults", &usage.page_faults),
        ("majorPageFaults", &usage.major_page_faults),
    ] {
        put(&mut out, name, value(told.as_ref()));
    }
    put(&mut out, "psi", runtime_pressure(usage.psi.as_ref()));
    Value::Object(out)
}

fn swap(usage: &cri::SwapUsage) -> Value {
    let mut out = Fields::new();
    put(&mut out, "time", Some(time(usage.timestamp)));
    put(&mut out, "swapAvailableBytes", value(usage.swap_available_bytes.as_ref()));
    put(&mut out, "swapUsageBytes", value(usage.swap_usage_bytes.as_ref()));
    Value::Object(out)
}

fn network(usage: &cri::NetworkUsage) -> Value {
    let interface = |i: &cri::NetworkInterfaceUsage| {
        let mut out = Fields::new();
        put(&mut out, "name", Some(i.name.as_str()));
        for (name, told) in
            [("rxBytes", &i.rx_bytes), ("rxErrors", &i.rx_errors), ("txBytes", &i.tx_bytes), ("txErrors", &i.tx_errors)]
        {
            put(&mut out, name, value(told.as_ref()));
        }
        out
    };
    let mut out = usage.default_interface.as_ref().map(interface).unwrap_or_default();
    put(&mut out, "time", Some(time(usage.timestamp)));
    put(&mut out, "interfaces", Some(usage.interfaces.iter().map(interface).collect::<Vec<_>>()));
    Value::Object(out)
}

fn of_pod(source: &Source<'_>, pod: &Pod, stats: &cri::PodSandboxStats) -> Fields {
    let mut out = Fields::new();
    let reference = json!({"name": pod::name(pod), "namespace": pod::namespace(pod), "uid": pod::uid(pod)});
    put(&mut out, "podRef", Some(reference));
    let status = pod.status.as_ref();
    put(&mut out, "startTime", status.and_then(|s| s.start_time.as_ref()).map(|t| format!("{:.0}", t.0)));
    let Some(linux) = &stats.linux else { return out };
    let folder = logs::pod_log_dir(source.pod_logs, pod);
    let mut own = Usage::default();
    let mut containers = Vec::new();
    for stats in &linux.containers {
        let Some(name) = stats.attributes.as_ref().and_then(|a| a.labels.get(keys::CONTAINER_NAME)) else { continue };
        let log = (!source.brief).then(|| source.walks.usage(&folder.join(name)));
        let layer = stats.writable_layer.as_ref();
        let layer = Usage {
            bytes: layer.and_then(|l| value(l.used_bytes.as_ref())).unwrap_or(0),
            inodes: layer.and_then(|l| value(l.inodes_used.as_ref())).unwrap_or(0),
        };
        own.bytes += layer.bytes + log.map_or(0, |log| log.bytes);
        own.inodes += layer.inodes + log.map_or(0, |log| log.inodes);
        containers.push(container(source, pod, name, stats, layer, log));
    }
    put(&mut out, "containers", Some(containers));
    put(&mut out, "cpu", linux.cpu.as_ref().map(cpu));
    put(&mut out, "memory", linux.memory.as_ref().map(memory));
    put(&mut out, "swap", pod_swap(linux));
    if source.brief {
        return out;
    }
    put(
        &mut out,
        "io",
        linux.io.as_ref().map(|io| json!({"time": time(io.timestamp), "psi": runtime_pressure(io.psi.as_ref())})),
    );
    put(&mut out, "network", linux.network.as_ref().map(network));
    let count = linux.process.as_ref().and_then(|p| value(p.process_count.as_ref()));
    put(&mut out, "process_stats", count.map(|count| json!({"process_count": count})));
    let mut listed = Vec::new();
    for found in volumes::of_pod(source.kubelet_root, pod, source.walks) {
        let mut entry = file_system(source.node.time_ns, &found.fs, found.usage);
        entry["name"] = found.volume.name.as_str().into();
        if let Some(claim) = &found.volume.persistent_volume_claim {
            entry["pvcRef"] = json!({"name": claim.claim_name, "namespace": pod::namespace(pod)});
        } else if found.on_node {
            own.bytes += found.usage.bytes;
            own.inodes += found.usage.inodes;
        }
        listed.push(entry);
    }
    put(&mut out, "volume", (!listed.is_empty()).then_some(listed));
    let root = FileSystem::of(source.kubelet_root);
    put(&mut out, "ephemeral-storage", root.map(|fs| file_system(source.node.time_ns, &fs, own)));
    out
}

fn pod_swap(linux: &cri::LinuxPodSandboxStats) -> Option<Value> {
    let mut sum: Option<cri::SwapUsage> = None;
    for swap in linux.containers.iter().filter_map(|c| c.swap.as_ref()) {
        let add = |a: Option<cri::UInt64Value>, b: Option<cri::UInt64Value>| {
            Some(cri::UInt64Value { value: a.map_or(0, |v| v.value).saturating_add(b.map_or(0, |v| v.value)) })
        };
        let so_far = sum.take().unwrap_or_default();
        sum = Some(cri::SwapUsage {
            timestamp: swap.timestamp,
            swap_available_bytes: add(so_far.swap_available_bytes, swap.swap_available_bytes),
            swap_usage_bytes: add(so_far.swap_usage_bytes, swap.swap_usage_bytes),
        });
    }
    sum.as_ref().map(swap)
}

fn container(
    source: &Source<'_>,
    pod: &Pod,
    name: &str,
    stats: &cri::ContainerStats,
    layer: Usage,
    log: Option<Usage>,
) -> Fields {
    let mut out = Fields::new();
    put(&mut out, "name", Some(name));
    let status = pod.status.as_ref();
    let all = status.into_iter().flat_map(|s| [&s.container_statuses, &s.init_container_statuses]).flatten().flatten();
    let running = |s: &ContainerStatus| s.state.as_ref()?.running.as_ref()?.started_at.as_ref().map(|t| format!("{:.0}", t.0));
    put(&mut out, "startTime", all.into_iter().find(|s| s.name == name).and_then(running));
    put(&mut out, "cpu", stats.cpu.as_ref().map(cpu));
    put(&mut out, "memory", stats.memory.as_ref().map(memory));
    put(&mut out, "swap", stats.swap.as_ref().map(swap));
    if source.brief {
        return out;
    }
    put(
        &mut out,
        "io",
        stats.io.as_ref().map(|io| json!({"time": time(io.timestamp), "psi": runtime_pressure(io.psi.as_ref())})),
    );
    let layers = source.runtime_fs[1].as_ref().or(source.runtime_fs[0].as_ref()).map(|(fs, ..)| *fs);
    put(&mut out, "rootfs", layers.map(|fs| file_system(source.node.time_ns, &fs, layer)));
    let logs = FileSystem::of(source.pod_logs).zip(log);
    put(&mut out, "logs", logs.map(|(fs, log)| file_system(source.node.time_ns, &fs, log)));
    out
}
