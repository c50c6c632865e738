//! Limits between the CRI's words and NRI's. What only NRI has is refused by its name where limits change; at the creation it
//! becomes part of the OCI spec instead (see `adjust`).

use berth_nri::api::{HugepageLimit, LinuxCpu, LinuxMemory, LinuxResources, OptionalInt64, OptionalUInt64};

use crate::error::Error;
use crate::spec::Resources;

fn signed(value: i64) -> Option<OptionalInt64> {
    (value != 0).then_some(OptionalInt64 { value })
}

fn unsigned(value: i64) -> Option<OptionalUInt64> {
    u64::try_from(value).ok().filter(|v| *v != 0).map(|value| OptionalUInt64 { value })
}

/// As plugins are told.
pub(super) fn wire(resources: &Resources) -> LinuxResources {
    LinuxResources {
        memory: Some(LinuxMemory {
            limit: signed(resources.memory_limit),
            swap: signed(resources.memory_swap_limit),
            ..Default::default()
        }),
        cpu: Some(LinuxCpu {
            shares: unsigned(resources.cpu_shares),
            quota: signed(resources.cpu_quota),
            period: unsigned(resources.cpu_period),
            cpus: resources.cpuset_cpus.clone(),
            mems: resources.cpuset_mems.clone(),
            ..Default::default()
        }),
        hugepage_limits: resources
            .hugepages
            .iter()
            .map(|(page_size, limit)| HugepageLimit { page_size: page_size.clone(), limit: *limit })
            .collect(),
        unified: resources.unified.clone(),
        ..Default::default()
    }
}

fn clamp(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// As we apply them to a container that is there.
pub(super) fn domain(wire: &LinuxResources) -> Result<Resources, Error> {
    let memory = wire.memory.unwrap_or_default();
    let cpu = wire.cpu.clone().unwrap_or_default();
    for (is_set, what) in [
        (memory.reservation.is_some(), "NRI update memory.reservation"),
        (memory.kernel.is_some(), "NRI update memory.kernel"),
        (memory.kernel_tcp.is_some(), "NRI update memory.kernel_tcp"),
        (memory.swappiness.is_some(), "NRI update memory.swappiness"),
        (memory.disable_oom_killer.is_some(), "NRI update memory.disable_oom_killer"),
        (memory.use_hierarchy.is_some(), "NRI update memory.use_hierarchy"),
        (cpu.realtime_runtime.is_some(), "NRI update cpu.realtime_runtime"),
        (cpu.realtime_period.is_some(), "NRI update cpu.realtime_period"),
        (wire.blockio_class.is_some(), "NRI update blockio_class"),
        (wire.rdt_class.is_some(), "NRI update rdt_class"),
        (!wire.devices.is_empty(), "NRI update devices"),
        (wire.pids.is_some(), "NRI update pids"),
    ] {
        if is_set {
            return Err(Error::Unsupported { what, reason: "the CRI has no such limit for containers that are there".into() });
        }
    }
    Ok(kept(wire))
}

/// What the CRI knows of limits.
pub(super) fn kept(wire: &LinuxResources) -> Resources {
    let memory = wire.memory.unwrap_or_default();
    let cpu = wire.cpu.clone().unwrap_or_default();
    Resources {
        cpu_period: cpu.period.map_or(0, |v| clamp(v.value)),
        cpu_quota: cpu.quota.map_or(0, |v| v.value),
        cpu_shares: cpu.shares.map_or(0, |v| clamp(v.value)),
        memory_limit: memory.limit.map_or(0, |v| v.value),
        memory_swap_limit: memory.swap.map_or(0, |v| v.value),
        oom_score_adj: 0,
        cpuset_cpus: cpu.cpus,
        cpuset_mems: cpu.mems,
        hugepages: wire.hugepage_limits.iter().map(|l| (l.page_size.clone(), l.limit)).collect(),
        unified: wire.unified.clone(),
    }
}

#[cfg(test)]
mod tests {
    use berth_nri::api::LinuxPids;

    use super::*;

    #[test]
    fn limits_survive_the_way_there_and_back() {
        let resources = Resources {
            cpu_quota: -1,
            cpu_shares: 512,
            memory_limit: 1 << 20,
            cpuset_cpus: "0-1".into(),
            hugepages: vec![("2MB".into(), 4)],
            ..Default::default()
        };
        assert_eq!(domain(&wire(&resources)).unwrap(), resources);
        assert_eq!(domain(&wire(&Resources::default())).unwrap(), Resources::default());
    }

    #[test]
    fn a_limit_that_can_not_be_changed_is_refused_by_its_name() {
        let wanted = LinuxResources { pids: Some(LinuxPids { limit: 3 }), ..Default::default() };
        assert!(domain(&wanted).unwrap_err().to_string().contains("pids"));
    }
}
