//! Limits in the files of v1, in the order that the kernel's checks ask for.

use std::path::Path;

use rustix::io::Errno;

use super::{Writer, machine_has_swap, missing, wished, wished_count, wished_list};
use crate::cgroup::Cgroup;
use crate::resources::{BlockIo, Cpu, HugepageLimit, Memory, Resources, ThrottleDevice};
use crate::{Error, Result, devices, file};

pub(super) fn apply(cgroup: &Cgroup, resources: &Resources, writer: &mut Writer) -> Result<()> {
    if !resources.unified.is_empty() {
        let reason = "the control groups of this machine are v1";
        return Err(Error::Unsupported { field: "linux.resources.unified".to_owned(), reason });
    }
    if let Some(memory) = &resources.memory {
        apply_memory(cgroup, memory, writer)?;
    }
    if let Some(cpu) = &resources.cpu {
        apply_cpuset(cgroup, cpu, writer)?;
        apply_cpu(cgroup, cpu, writer)?;
    }
    if let Some(limit) = wished(resources.pids.as_ref().and_then(|pids| pids.limit)) {
        let name = "linux.resources.pids.limit";
        writer.set(folder(cgroup, "pids", name)?, "pids.max", &super::or_max(limit), name)?;
    }
    for limit in &resources.hugepage_limits {
        apply_hugepages(cgroup, limit, writer)?;
    }
    if let Some(block_io) = &resources.block_io {
        apply_block_io(cgroup, block_io, writer)?;
    }
    if !resources.devices.is_empty() {
        devices::apply_v1(folder(cgroup, "devices", "linux.resources.devices")?, &resources.devices)?;
    }
    Ok(())
}

fn folder<'a>(cgroup: &'a Cgroup, controller: &str, limit: &str) -> Result<&'a Path> {
    cgroup
        .v1_dir(controller)
        .ok_or_else(|| Error::MissingController { controller: controller.to_owned(), limit: limit.to_owned() })
}

const MEMORY_LIMIT: &str = "memory.limit_in_bytes";
const MEMSW_LIMIT: &str = "memory.memsw.limit_in_bytes";

/// The order in which the two memory limits must be written: the limit may never be above that of memory and swap.
#[derive(Debug, PartialEq, Eq)]
enum MemoryWrite {
    Limit(i64),
    MemorySwap(i64),
}

fn memory_writes(limit: Option<i64>, swap: Option<i64>, has_memsw: bool, present_memsw: u64) -> Vec<MemoryWrite> {
    let swap = match (limit, swap) {
        // Unlimited memory within limited memory and swap cannot be.
        (Some(limit), None) if limit < 0 && has_memsw => Some(-1),
        (_, swap) => swap,
    };
    let raises = swap.is_some_and(|swap| swap < 0 || swap as u64 > present_memsw);
    let limit = limit.map(MemoryWrite::Limit);
    let swap = swap.map(MemoryWrite::MemorySwap);
    let (first, second) = if raises { (swap, limit) } else { (limit, swap) };
    first.into_iter().chain(second).collect()
}

fn apply_memory(cgroup: &Cgroup, memory: &Memory, writer: &mut Writer) -> Result<()> {
    let limit_name = "linux.resources.memory.limit";
    let swap_name = "linux.resources.memory.swap";
    let (limit, mut swap) = (wished(memory.limit), wished(memory.swap));
    if limit.is_some() || swap.is_some() {
        let dir = folder(cgroup, "memory", limit_name)?;
        let present_memsw = file::read_number(&dir.join(MEMSW_LIMIT))?;
        if present_memsw.is_none() && swap.is_some() {
            // Without accounting swap is unlimited, which is also what there is none of on a machine without swap.
            if swap.is_some_and(|swap| swap > 0) && machine_has_swap() {
                return Err(missing(MEMSW_LIMIT, swap_name));
            }
            swap = None;
        }
        for write in memory_writes(limit, swap, present_memsw.is_some(), present_memsw.unwrap_or(0)) {
            match write {
                MemoryWrite::Limit(value) => writer.set(dir, MEMORY_LIMIT, &value.to_string(), limit_name)?,
                MemoryWrite::MemorySwap(value) => writer.set(dir, MEMSW_LIMIT, &value.to_string(), swap_name)?,
            }
        }
    }
    if let Some(value) = wished(memory.reservation) {
        let name = "linux.resources.memory.reservation";
        writer.set(folder(cgroup, "memory", name)?, "memory.soft_limit_in_bytes", &value.to_string(), name)?;
    }
    if let Some(value) = memory.swappiness {
        let name = "linux.resources.memory.swappiness";
        writer.set(folder(cgroup, "memory", name)?, "memory.swappiness", &value.to_string(), name)?;
    }
    if let Some(value) = memory.disable_oom_killer {
        let name = "linux.resources.memory.disableOOMKiller";
        match folder(cgroup, "memory", name) {
            // The file reads as several lines, so that it is set back by hand when needed: it is the last of the memory files.
            Ok(dir) => writer.set(dir, "memory.oom_control", if value { "1" } else { "0" }, name)?,
            Err(error) if value => return Err(error),
            Err(_) => {}
        }
    }
    Ok(())
}

fn apply_cpuset(cgroup: &Cgroup, cpu: &Cpu, writer: &mut Writer) -> Result<()> {
    for (value, file, name) in
        [(&cpu.cpus, "cpuset.cpus", "linux.resources.cpu.cpus"), (&cpu.mems, "cpuset.mems", "linux.resources.cpu.mems")]
    {
        if let Some(value) = wished_list(value) {
            writer.set(folder(cgroup, "cpuset", name)?, file, value, name)?;
        }
    }
    Ok(())
}

fn apply_cpu(cgroup: &Cgroup, cpu: &Cpu, writer: &mut Writer) -> Result<()> {
    let name = "linux.resources.cpu.idle";
    if let Some(idle) = cpu.idle {
        match folder(cgroup, "cpu", name) {
            Ok(dir) if idle != 0 || dir.join("cpu.idle").exists() => {
                writer.set(dir, "cpu.idle", &idle.to_string(), name)?;
            }
            Err(error) if idle != 0 => return Err(error),
            _ => {}
        }
    }
    if let Some(shares) = wished_count(cpu.shares) {
        let name = "linux.resources.cpu.shares";
        // The weight of an idle group is fixed, and the kernel refuses to set it.
        if cpu.idle.unwrap_or(0) == 0 {
            writer.set(folder(cgroup, "cpu", name)?, "cpu.shares", &shares.to_string(), name)?;
        }
    }
    apply_bandwidth(cgroup, cpu, writer)?;
    for (value, file, name) in [
        (cpu.realtime_period.map(|value| value as i64), "cpu.rt_period_us", "linux.resources.cpu.realtimePeriod"),
        (cpu.realtime_runtime, "cpu.rt_runtime_us", "linux.resources.cpu.realtimeRuntime"),
    ] {
        if let Some(value) = wished(value) {
            writer.set(folder(cgroup, "cpu", name)?, file, &value.to_string(), name)?;
        }
    }
    Ok(())
}

/// The kernel checks burst ≤ quota, and quota / period against the parent's, at each write: what is refused at first is tried again after the
/// other.
fn apply_bandwidth(cgroup: &Cgroup, cpu: &Cpu, writer: &mut Writer) -> Result<()> {
    let (period, quota) = (wished_count(cpu.period), wished(cpu.quota));
    let burst =
        cpu.burst.filter(|burst| *burst != 0 || cgroup.v1_dir("cpu").is_some_and(|dir| dir.join("cpu.cfs_burst_us").exists()));
    let (burst_name, period_name) = ("linux.resources.cpu.burst", "linux.resources.cpu.period");
    let is_refusal = |error: &Error| error.raw_errno() == Some(Errno::INVAL.raw_os_error());

    let mut burst_left = burst;
    if let (Some(value), Some(_)) = (burst, quota) {
        match writer.set(folder(cgroup, "cpu", burst_name)?, "cpu.cfs_burst_us", &value.to_string(), burst_name) {
            Err(error) if is_refusal(&error) => {}
            result => {
                result?;
                burst_left = None;
            }
        }
    }
    let mut period_left = period;
    if let Some(value) = period {
        match writer.set(folder(cgroup, "cpu", period_name)?, "cpu.cfs_period_us", &value.to_string(), period_name) {
            Err(error) if is_refusal(&error) && quota.is_some() => {}
            result => {
                result?;
                period_left = None;
            }
        }
    }
    if let Some(value) = quota {
        let name = "linux.resources.cpu.quota";
        writer.set(folder(cgroup, "cpu", name)?, "cpu.cfs_quota_us", &value.to_string(), name)?;
    }
    if let Some(value) = period_left {
        writer.set(folder(cgroup, "cpu", period_name)?, "cpu.cfs_period_us", &value.to_string(), period_name)?;
    }
    if let Some(value) = burst_left {
        writer.set(folder(cgroup, "cpu", burst_name)?, "cpu.cfs_burst_us", &value.to_string(), burst_name)?;
    }
    Ok(())
}

fn apply_hugepages(cgroup: &Cgroup, limit: &HugepageLimit, writer: &mut Writer) -> Result<()> {
    let name = format!("linux.resources.hugepageLimits[{}]", limit.page_size);
    let Some(dir) = cgroup.v1_dir("hugetlb") else {
        // The kubelet lists every size with 0.
        return if limit.limit == 0 { Ok(()) } else { folder(cgroup, "hugetlb", &name).map(drop) };
    };
    super::v2::write_hugepages(dir, limit, "limit_in_bytes", &name, writer)
}

fn apply_block_io(cgroup: &Cgroup, block_io: &BlockIo, writer: &mut Writer) -> Result<()> {
    let name = "linux.resources.blockIO.weight";
    let prefix = |dir: &Path| if dir.join("blkio.weight").exists() { "blkio" } else { "blkio.bfq" };
    if let Some(weight) = block_io.weight.filter(|weight| *weight != 0) {
        let dir = folder(cgroup, "blkio", name)?;
        writer.set(dir, &format!("{}.weight", prefix(dir)), &weight.to_string(), name)?;
    }
    for device in &block_io.weight_device {
        if let Some(weight) = device.weight.filter(|weight| *weight != 0) {
            let name = "linux.resources.blockIO.weightDevice";
            let dir = folder(cgroup, "blkio", name)?;
            let line = format!("{}:{} {weight}", device.major, device.minor);
            writer.set(dir, &format!("{}.weight_device", prefix(dir)), &line, name)?;
        }
    }
    let rates: [(&[ThrottleDevice], &str, &str); 4] = [
        (&block_io.throttle_read_bps_device, "read_bps", "ReadBps"),
        (&block_io.throttle_write_bps_device, "write_bps", "WriteBps"),
        (&block_io.throttle_read_iops_device, "read_iops", "ReadIOPS"),
        (&block_io.throttle_write_iops_device, "write_iops", "WriteIOPS"),
    ];
    for (devices, file, name) in rates {
        for device in devices {
            let name = format!("linux.resources.blockIO.throttle{name}Device");
            let line = format!("{}:{} {}", device.major, device.minor, device.rate);
            let dir = folder(cgroup, "blkio", &name)?;
            writer.set(dir, &format!("blkio.throttle.{file}_device"), &line, &name)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::MemoryWrite::{Limit, MemorySwap};
    use super::*;

    #[test]
    fn memory_and_swap_are_written_in_the_order_that_never_crosses() {
        for (limit, swap, present, writes) in [
            // Raising: room first.
            (Some(200), Some(200), 100, vec![MemorySwap(200), Limit(200)]),
            (Some(200), Some(-1), 100, vec![MemorySwap(-1), Limit(200)]),
            // Lowering: the part before the whole.
            (Some(50), Some(60), 100, vec![Limit(50), MemorySwap(60)]),
            (Some(50), Some(100), 100, vec![Limit(50), MemorySwap(100)]),
            (Some(50), None, 100, vec![Limit(50)]),
            (None, Some(80), 100, vec![MemorySwap(80)]),
            // Unlimited takes the swap limit along.
            (Some(-1), None, 100, vec![MemorySwap(-1), Limit(-1)]),
            (None, None, 100, vec![]),
        ] {
            assert_eq!(memory_writes(limit, swap, true, present), writes, "{limit:?} {swap:?} {present}");
        }
        assert_eq!(memory_writes(Some(-1), None, false, 0), [Limit(-1)]);
    }
}
