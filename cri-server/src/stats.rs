//! Statistics of containers and pods, read from their cgroups when asked for: nothing is sampled while nobody asks.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_cgroup::{CpuStats, MemoryStats, Pressure, PressureLine, Stats};
use berth_cri_api::v1;

use crate::Server;
use crate::board::{ContainerState, ContainerView, SandboxView};
use crate::convert::status::container_metadata;
use crate::convert::wire_map;
use crate::sandbox::owner;
use crate::sandbox::state::Op;

/// Statistics of the containers that a predicate picks. One that is vanishing is left out.
pub(crate) async fn containers(server: &Arc<Server>, picks: impl Fn(&ContainerView) -> bool) -> Vec<v1::ContainerStats> {
    let views: Vec<_> = server.board.containers().into_iter().filter(|v| picks(v)).collect();
    let this = server.clone();
    let read = move || Ok(views.iter().filter_map(|view| container(&this, view)).collect());
    crate::blocking(read).await.unwrap_or_default()
}

/// Statistics of the sandboxes that a predicate picks.
pub(crate) async fn sandboxes(server: &Arc<Server>, picks: impl Fn(&SandboxView) -> bool) -> Vec<v1::PodSandboxStats> {
    let views: Vec<_> = server.board.sandboxes().into_iter().filter(|v| v.ready && picks(v)).collect();
    let mut out = Vec::with_capacity(views.len());
    for view in views {
        let live = if view.spec.host_network() { None } else { owner::submit(server, &view.id, Op::Live).await.ok() };
        let this = server.clone();
        let read = move || {
            let network = live.and_then(|live| network(live.netns.as_ref()?));
            Ok(sandbox(&this, &view, network))
        };
        if let Ok(stats) = crate::blocking(read).await {
            out.push(stats);
        }
    }
    out
}

fn value(value: u64) -> Option<v1::UInt64Value> {
    Some(v1::UInt64Value { value })
}

fn psi(pressure: Option<&Pressure>) -> Option<v1::PsiStats> {
    let line = |l: &PressureLine| v1::PsiData { total: l.total_ns, avg10: l.avg10, avg60: l.avg60, avg300: l.avg300 };
    pressure.map(|p| v1::PsiStats { full: Some(line(&p.full)), some: Some(line(&p.some)) })
}

fn cpu(stats: &CpuStats, timestamp: i64) -> v1::CpuUsage {
    v1::CpuUsage {
        timestamp,
        usage_core_nano_seconds: value(stats.usage_ns),
        usage_nano_cores: None,
        psi: psi(stats.psi.as_ref()),
    }
}

fn memory(stats: &MemoryStats, timestamp: i64) -> v1::MemoryUsage {
    // No limit is reported as absent; v1 writes it as a number near the largest.
    let limited = stats.limit < 1 << 60;
    v1::MemoryUsage {
        timestamp,
        working_set_bytes: value(stats.working_set),
        available_bytes: limited.then(|| v1::UInt64Value { value: stats.limit.saturating_sub(stats.working_set) }),
        usage_bytes: value(stats.usage),
        rss_bytes: value(stats.rss),
        page_faults: value(stats.page_faults),
        major_page_faults: value(stats.major_page_faults),
        psi: psi(stats.psi.as_ref()),
    }
}

fn attributes(view: &ContainerView) -> v1::ContainerAttributes {
    v1::ContainerAttributes {
        id: view.id.as_str().to_owned(),
        metadata: Some(container_metadata(&view.facts.spec)),
        labels: wire_map(&view.facts.spec.labels),
        annotations: wire_map(&view.facts.spec.annotations),
    }
}

/// One container; none when it is being removed. Blocking.
fn container(server: &Server, view: &ContainerView) -> Option<v1::ContainerStats> {
    let kept = server.paths.kept_container(&view.id);
    let stats = match view.state {
        ContainerState::Exited => None,
        _ => Some(server.cgroups.stats(&view.facts.cgroup)?),
    };
    Some(container_stats(view, stats.as_ref(), Some(&kept)))
}

fn container_stats(view: &ContainerView, stats: Option<&Stats>, kept: Option<&Path>) -> v1::ContainerStats {
    let timestamp = crate::clock::now_ns();
    v1::ContainerStats {
        attributes: Some(attributes(view)),
        cpu: Some(stats.map_or_else(|| cpu(&CpuStats::default(), timestamp), |s| cpu(&s.cpu, timestamp))),
        memory: Some(stats.map_or_else(
            || memory(&MemoryStats { limit: u64::MAX, ..Default::default() }, timestamp),
            |s| memory(&s.memory, timestamp),
        )),
        writable_layer: kept.map(|kept| writable_layer(kept, timestamp)),
        swap: stats.map(|s| v1::SwapUsage {
            timestamp,
            swap_available_bytes: value(if s.memory.swap_limit < 1 << 60 {
                s.memory.swap_limit.saturating_sub(s.memory.swap)
            } else {
                0
            }),
            swap_usage_bytes: value(s.memory.swap),
        }),
        io: stats.filter(|s| s.io.psi.is_some()).map(|s| v1::IoUsage { timestamp, psi: psi(s.io.psi.as_ref()) }),
    }
}

fn writable_layer(kept: &Path, timestamp: i64) -> v1::FilesystemUsage {
    let (bytes, inodes) = usage(&kept.join("upper"));
    v1::FilesystemUsage {
        timestamp,
        fs_id: Some(v1::FilesystemIdentifier { mountpoint: kept.to_string_lossy().into_owned() }),
        used_bytes: value(bytes),
        inodes_used: value(inodes),
    }
}

/// Bytes and inodes of a folder. Links are not followed; what vanishes meanwhile does not count.
fn usage(folder: &Path) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt;
    let (mut bytes, mut inodes) = (0, 0);
    let mut todo: Vec<PathBuf> = vec![folder.to_owned()];
    while let Some(folder) = todo.pop() {
        inodes += 1;
        for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            bytes += meta.blocks() * 512;
            if meta.is_dir() {
                todo.push(entry.path());
            } else {
                inodes += 1;
            }
        }
    }
    (bytes, inodes)
}

/// One pod: the sums of its cgroups. Blocking.
fn sandbox(server: &Server, view: &SandboxView, network: Option<v1::NetworkUsage>) -> v1::PodSandboxStats {
    let timestamp = crate::clock::now_ns();
    let parent = &view.spec.cgroup_parent;
    let containers = server.board.containers_of(&view.id);
    let each: Vec<(Arc<ContainerView>, Stats)> = containers
        .into_iter()
        .filter(|c| c.state != ContainerState::Exited)
        .filter_map(|c| server.cgroups.stats(&c.facts.cgroup).map(|s| (c, s)))
        .collect();
    // The pod's own cgroup counts everything; pods without one of their own are summed up.
    let whole = if parent.is_empty() { None } else { server.cgroups.stats(&server.cgroups.pod(parent)) };
    let whole = whole.unwrap_or_else(|| sum(each.iter().map(|(_, s)| s).chain(server.cgroups.stats(&view.cgroup).as_ref())));
    v1::PodSandboxStats {
        attributes: Some(v1::PodSandboxAttributes {
            id: view.id.as_str().to_owned(),
            metadata: crate::convert::status::sandbox_item(view).metadata,
            labels: wire_map(&view.spec.labels),
            annotations: wire_map(&view.spec.annotations),
        }),
        linux: Some(v1::LinuxPodSandboxStats {
            cpu: Some(cpu(&whole.cpu, timestamp)),
            memory: Some(memory(&whole.memory, timestamp)),
            network,
            process: Some(v1::ProcessUsage { timestamp, process_count: value(whole.pids.current) }),
            containers: each
                .iter()
                .map(|(c, s)| container_stats(c, Some(s), Some(&server.paths.kept_container(&c.id))))
                .collect(),
            io: whole.io.psi.is_some().then(|| v1::IoUsage { timestamp, psi: psi(whole.io.psi.as_ref()) }),
        }),
        windows: None,
    }
}

fn sum<'a>(parts: impl Iterator<Item = &'a Stats>) -> Stats {
    let mut out = Stats::default();
    out.memory.limit = u64::MAX;
    for part in parts {
        out.cpu.usage_ns += part.cpu.usage_ns;
        out.memory.usage += part.memory.usage;
        out.memory.working_set += part.memory.working_set;
        out.memory.rss += part.memory.rss;
        out.memory.page_faults += part.memory.page_faults;
        out.memory.major_page_faults += part.memory.major_page_faults;
        out.pids.current += part.pids.current;
    }
    out
}

/// The interfaces of a network namespace. Blocking.
fn network(netns: &std::os::fd::OwnedFd) -> Option<v1::NetworkUsage> {
    use std::os::fd::AsFd;
    let text = berth_linux::ns::with_netns(netns.as_fd(), || std::fs::read_to_string("/proc/thread-self/net/dev")).ok()?.ok()?;
    let interfaces = interfaces(&text);
    Some(v1::NetworkUsage {
        timestamp: crate::clock::now_ns(),
        default_interface: interfaces.iter().find(|i| i.name == "eth0").cloned(),
        interfaces,
    })
}

/// The lines of /proc/net/dev, without the loopback.
fn interfaces(text: &str) -> Vec<v1::NetworkInterfaceUsage> {
    text.lines()
        .skip(2)
        .filter_map(|line| {
            let (name, numbers) = line.split_once(':')?;
            let n: Vec<u64> = numbers.split_whitespace().map(|n| n.parse().unwrap_or(0)).collect();
            let at = |i: usize| value(n.get(i).copied().unwrap_or(0));
            Some(v1::NetworkInterfaceUsage {
                name: name.trim().to_owned(),
                rx_bytes: at(0),
                rx_errors: at(2),
                tx_bytes: at(8),
                tx_errors: at(10),
            })
        })
        .filter(|i| i.name != "lo")
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_read_from_the_kernels_table() {
        let text = "Inter-|   Receive                                                |  Transmit\n face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0: 100 2 3 0 0 0 0 0 200 4 5 0 0 0 0 0\n";
        let got = interfaces(text);
        assert_eq!(got.len(), 1);
        let n = |v: &Option<v1::UInt64Value>| v.as_ref().unwrap().value;
        assert_eq!((n(&got[0].rx_bytes), n(&got[0].rx_errors), n(&got[0].tx_bytes), n(&got[0].tx_errors)), (100, 3, 200, 5));
    }

    #[test]
    fn no_limit_means_no_available_bytes() {
        let unlimited = memory(&MemoryStats { limit: u64::MAX, ..Default::default() }, 1);
        assert_eq!(unlimited.available_bytes, None);
        let limited = memory(&MemoryStats { limit: 100, working_set: 30, ..Default::default() }, 1);
        assert_eq!(limited.available_bytes, value(70));
    }

    #[test]
    fn a_folders_usage_counts_its_entries() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), vec![1u8; 10_000]).unwrap();
        std::fs::create_dir(dir.path().join("b")).unwrap();
        let (bytes, inodes) = usage(dir.path());
        assert!(bytes >= 10_000, "{bytes}");
        assert_eq!(inodes, 3);
    }
}
