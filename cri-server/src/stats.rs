//! Statistics of containers and pods, read from their cgroups when asked for: nothing is sampled while nobody asks.

pub(crate) mod layers;
pub(crate) mod network;
pub(crate) mod rates;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use berth_cgroup::{CpuStats, MemoryStats, Pressure, PressureLine, Stats};
use berth_cri_api::v1;

use crate::Server;
use crate::board::{ContainerState, ContainerView, SandboxView, ShownContainer, ShownSandbox};
use crate::convert::status::container_metadata;
use crate::convert::wire_map;
use crate::sandbox::holdings::Live;
use crate::sandbox::owner;
use crate::sandbox::state::Op;

/// How many are read one after another: some milliseconds' worth.
const PART: usize = 32;

/// Statistics of the containers that a predicate picks. One that is vanishing is left out.
pub(crate) async fn containers(server: &Arc<Server>, picks: impl Fn(&ContainerView) -> bool) -> Vec<v1::ContainerStats> {
    let views: Vec<_> = server.board.containers().into_iter().filter(|v| picks(v)).collect();
    in_parts(server, views, |server, views| views.iter().filter_map(|view| container(server, view)).collect()).await
}

/// Statistics of the sandboxes that a predicate picks.
pub(crate) async fn sandboxes(server: &Arc<Server>, picks: impl Fn(&SandboxView) -> bool) -> Vec<v1::PodSandboxStats> {
    let views: Vec<_> = server.board.sandboxes().into_iter().filter(|v| v.ready && picks(v)).collect();
    let this = server.as_ref();
    let views = futures::future::join_all(views.into_iter().map(|view| async move {
        let live = if view.spec.host_network() { None } else { owner::submit(this, &view.id, Op::Live).await.ok() };
        (view, live)
    }))
    .await;
    in_parts(server, views, sandboxes_now).await
}

type Looked = (ShownSandbox, Option<Arc<Live>>);

/// [`sandboxes`] of what was looked up. Blocking.
fn sandboxes_now(server: &Server, views: &[Looked]) -> Vec<v1::PodSandboxStats> {
    let has_netns = |live: &Option<Arc<Live>>| live.as_ref().is_some_and(|live| live.netns.is_some());
    let namespaces = views.iter().filter_map(|(_, live)| Some(live.as_ref()?.netns.as_ref()?.as_fd()));
    let mut networks = network::read_each(namespaces).into_iter();
    let one = |(view, live): &Looked| {
        let interfaces = if has_netns(live) { networks.next().flatten() } else { None };
        sandbox(server, view, interfaces.and_then(network))
    };
    views.iter().map(one).collect()
}

/// Runs blocking work on parts of a list at the same time, and puts the results together in order. A part is what a thread of the pool is
/// held for.
async fn in_parts<T, R>(server: &Arc<Server>, mut all: Vec<T>, work: fn(&Server, &[T]) -> Vec<R>) -> Vec<R>
where
    T: Send + 'static,
    R: Send + 'static,
{
    let mut parts = Vec::new();
    while !all.is_empty() {
        let rest = all.split_off(all.len().min(PART));
        let (this, part) = (server.clone(), std::mem::replace(&mut all, rest));
        parts.push(crate::blocking(move || Ok(work(&this, &part))));
    }
    futures::future::join_all(parts).await.into_iter().flat_map(Result::unwrap_or_default).collect()
}

fn value(value: u64) -> Option<v1::UInt64Value> {
    Some(v1::UInt64Value { value })
}

fn psi(pressure: Option<&Pressure>) -> Option<v1::PsiStats> {
    let line = |l: &PressureLine| v1::PsiData { total: l.total_ns, avg10: l.avg10, avg60: l.avg60, avg300: l.avg300 };
    pressure.map(|p| v1::PsiStats { full: Some(line(&p.full)), some: Some(line(&p.some)) })
}

fn cpu(stats: &CpuStats, rate: Option<u64>, timestamp: i64) -> v1::CpuUsage {
    v1::CpuUsage {
        timestamp,
        usage_core_nano_seconds: value(stats.usage_ns),
        usage_nano_cores: rate.and_then(value),
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
    let stats = match view.state {
        ContainerState::Exited => None,
        _ => Some(server.cgroups.brief_stats(&view.facts.cgroup)?),
    };
    Some(container_stats(server, view, stats.as_ref()))
}

fn container_stats(server: &Server, view: &ContainerView, stats: Option<&Stats>) -> v1::ContainerStats {
    let timestamp = crate::clock::now_ns();
    let rate = stats.and_then(|s| server.rates.rate(&view.facts.cgroup, s.cpu.usage_ns, Instant::now()));
    v1::ContainerStats {
        attributes: Some(attributes(view)),
        cpu: Some(stats.map_or_else(|| cpu(&CpuStats::default(), None, timestamp), |s| cpu(&s.cpu, rate, timestamp))),
        memory: Some(stats.map_or_else(
            || memory(&MemoryStats { limit: u64::MAX, ..Default::default() }, timestamp),
            |s| memory(&s.memory, timestamp),
        )),
        writable_layer: writable_layer(server, view),
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

/// None while the first count of a large layer is under way. Its time is that of the count.
fn writable_layer(server: &Server, view: &ContainerView) -> Option<v1::FilesystemUsage> {
    let kept = server.paths.kept_container(&view.id);
    let usage = server.layers.usage(&kept.join("upper"), view.state == ContainerState::Exited)?;
    Some(v1::FilesystemUsage {
        timestamp: usage.at,
        fs_id: Some(v1::FilesystemIdentifier { mountpoint: kept.to_string_lossy().into_owned() }),
        used_bytes: value(usage.bytes),
        inodes_used: value(usage.inodes),
    })
}

/// One pod: the sums of its cgroups. Blocking.
fn sandbox(server: &Server, view: &SandboxView, network: Option<v1::NetworkUsage>) -> v1::PodSandboxStats {
    let timestamp = crate::clock::now_ns();
    let parent = &view.spec.cgroup_parent;
    let containers = server.board.containers_of(&view.id);
    let each: Vec<(ShownContainer, Stats)> = containers
        .into_iter()
        .filter(|c| c.state != ContainerState::Exited)
        .filter_map(|c| server.cgroups.brief_stats(&c.facts.cgroup).map(|s| (c, s)))
        .collect();
    // The pod's own cgroup counts everything; pods without one of their own are summed up.
    let whole = if parent.is_empty() { None } else { server.cgroups.brief_stats(&server.cgroups.pod(parent)) };
    let whole =
        whole.unwrap_or_else(|| sum(each.iter().map(|(_, s)| s).chain(server.cgroups.brief_stats(&view.cgroup).as_ref())));
    let processes: usize = if parent.is_empty() {
        let cgroups = each.iter().map(|(c, _)| &c.facts.cgroup).chain([&view.cgroup]);
        cgroups.map(|cgroup| server.cgroups.process_count(cgroup)).sum()
    } else {
        server.cgroups.process_count(&server.cgroups.pod(parent))
    };
    // Not the name of a cgroup, so that it is the pod's own in any case.
    let rate = server.rates.rate(&format!("pod {}", view.id), whole.cpu.usage_ns, Instant::now());
    v1::PodSandboxStats {
        attributes: Some(v1::PodSandboxAttributes {
            id: view.id.as_str().to_owned(),
            metadata: crate::convert::status::sandbox_item(view).metadata,
            labels: wire_map(&view.spec.labels),
            annotations: wire_map(&view.spec.annotations),
        }),
        linux: Some(v1::LinuxPodSandboxStats {
            cpu: Some(cpu(&whole.cpu, rate, timestamp)),
            memory: Some(memory(&whole.memory, timestamp)),
            network,
            process: Some(v1::ProcessUsage { timestamp, process_count: value(processes as u64) }),
            containers: each.iter().map(|(c, s)| container_stats(server, c, Some(s))).collect(),
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

fn network(interfaces: Vec<network::Interface>) -> Option<v1::NetworkUsage> {
    let wire = |i: network::Interface| v1::NetworkInterfaceUsage {
        name: i.name,
        rx_bytes: value(i.rx[0]),
        rx_errors: value(i.rx[2]),
        tx_bytes: value(i.tx[0]),
        tx_errors: value(i.tx[2]),
    };
    network_usage(interfaces.into_iter().map(wire).collect())
}

/// None while the pod's interface is not there (being made or taken away): kubelets that take their stats from the runtime
/// crash on a network without a default interface.
fn network_usage(interfaces: Vec<v1::NetworkInterfaceUsage>) -> Option<v1::NetworkUsage> {
    let default_interface = Some(interfaces.iter().find(|i| i.name == "eth0")?.clone());
    Some(v1::NetworkUsage { timestamp: crate::clock::now_ns(), default_interface, interfaces })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_without_its_default_interface_is_not_told() {
        let interface = |name: &str| v1::NetworkInterfaceUsage { name: name.into(), ..Default::default() };
        assert_eq!(network_usage(vec![interface("lo")]), None);
        let told = network_usage(vec![interface("lo"), interface("eth0")]).unwrap();
        assert_eq!((told.default_interface.unwrap().name.as_str(), told.interfaces.len()), ("eth0", 2));
    }

    #[test]
    fn no_limit_means_no_available_bytes() {
        let unlimited = memory(&MemoryStats { limit: u64::MAX, ..Default::default() }, 1);
        assert_eq!(unlimited.available_bytes, None);
        let limited = memory(&MemoryStats { limit: 100, working_set: 30, ..Default::default() }, 1);
        assert_eq!(limited.available_bytes, value(70));
    }
}
