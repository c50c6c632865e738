//! Limits that plugins ask for: claimed field by field, then laid over what there is.

use crate::Error;
use crate::api::{Field, LinuxCpu, LinuxMemory, LinuxResources};
use crate::owners::Owners;

/// Claims every limit that is set.
pub(crate) fn claim(owners: &mut Owners, id: &str, wanted: &LinuxResources, plugin: &str) -> Result<(), Error> {
    let memory = wanted.memory.as_ref();
    let cpu = wanted.cpu.as_ref();
    let set = [
        (memory.is_some_and(|m| m.limit.is_some()), Field::MemLimit),
        (memory.is_some_and(|m| m.reservation.is_some()), Field::MemReservation),
        (memory.is_some_and(|m| m.swap.is_some()), Field::MemSwapLimit),
        (memory.is_some_and(|m| m.kernel.is_some()), Field::MemKernelLimit),
        (memory.is_some_and(|m| m.kernel_tcp.is_some()), Field::MemTcplimit),
        (memory.is_some_and(|m| m.swappiness.is_some()), Field::MemSwappiness),
        (memory.is_some_and(|m| m.disable_oom_killer.is_some()), Field::MemDisableOomKiller),
        (memory.is_some_and(|m| m.use_hierarchy.is_some()), Field::MemUseHierarchy),
        (cpu.is_some_and(|c| c.shares.is_some()), Field::Cpushares),
        (cpu.is_some_and(|c| c.quota.is_some()), Field::Cpuquota),
        (cpu.is_some_and(|c| c.period.is_some()), Field::Cpuperiod),
        (cpu.is_some_and(|c| c.realtime_runtime.is_some()), Field::CpurealtimeRuntime),
        (cpu.is_some_and(|c| c.realtime_period.is_some()), Field::CpurealtimePeriod),
        (cpu.is_some_and(|c| !c.cpus.is_empty()), Field::CpusetCpus),
        (cpu.is_some_and(|c| !c.mems.is_empty()), Field::CpusetMems),
        (wanted.blockio_class.is_some(), Field::BlockioClass),
        (wanted.rdt_class.is_some(), Field::RdtClass),
        (wanted.pids.is_some(), Field::PidsLimit),
    ];
    for (_, field) in set.into_iter().filter(|(is_set, _)| *is_set) {
        owners.claim(id, field, None, plugin)?;
    }
    for limit in &wanted.hugepage_limits {
        owners.claim(id, Field::HugepageLimits, Some(&limit.page_size), plugin)?;
    }
    for name in wanted.unified.keys() {
        owners.claim(id, Field::CgroupsUnified, Some(name), plugin)?;
    }
    Ok(())
}

/// Lays limits over others: what is set wins.
pub(crate) fn overlay(target: &mut LinuxResources, wanted: &LinuxResources) {
    fn put<T: Clone>(target: &mut Option<T>, wanted: &Option<T>) {
        if wanted.is_some() {
            target.clone_from(wanted);
        }
    }
    fn text(target: &mut String, wanted: &str) {
        if !wanted.is_empty() {
            wanted.clone_into(target);
        }
    }
    if let Some(from) = &wanted.memory {
        let to: &mut LinuxMemory = target.memory.get_or_insert_default();
        put(&mut to.limit, &from.limit);
        put(&mut to.reservation, &from.reservation);
        put(&mut to.swap, &from.swap);
        put(&mut to.kernel, &from.kernel);
        put(&mut to.kernel_tcp, &from.kernel_tcp);
        put(&mut to.swappiness, &from.swappiness);
        put(&mut to.disable_oom_killer, &from.disable_oom_killer);
        put(&mut to.use_hierarchy, &from.use_hierarchy);
    }
    if let Some(from) = &wanted.cpu {
        let to: &mut LinuxCpu = target.cpu.get_or_insert_default();
        put(&mut to.shares, &from.shares);
        put(&mut to.quota, &from.quota);
        put(&mut to.period, &from.period);
        put(&mut to.realtime_runtime, &from.realtime_runtime);
        put(&mut to.realtime_period, &from.realtime_period);
        text(&mut to.cpus, &from.cpus);
        text(&mut to.mems, &from.mems);
    }
    for limit in &wanted.hugepage_limits {
        target.hugepage_limits.retain(|l| l.page_size != limit.page_size);
        target.hugepage_limits.push(limit.clone());
    }
    put(&mut target.blockio_class, &wanted.blockio_class);
    put(&mut target.rdt_class, &wanted.rdt_class);
    put(&mut target.pids, &wanted.pids);
    target.unified.extend(wanted.unified.clone());
    target.devices.extend(wanted.devices.iter().cloned());
}
