//! Limits in the files of v2.

use std::path::Path;

use rustix::io::Errno;

use super::convert::{blkio_weight_to_io, shares_to_weight, swap_to_v2};
use super::{Writer, machine_has_swap, or_max, wished, wished_count, wished_list};
use crate::cgroup::Cgroup;
use crate::resources::{BlockIo, Cpu, HugepageLimit, Memory, Resources, ThrottleDevice};
use crate::{Error, Result, devices, file};

pub(super) fn apply(cgroup: &Cgroup, resources: &Resources, writer: &mut Writer) -> Result<()> {
    let dir = cgroup.v2_dir().ok_or(Error::NotMounted)?;
    if let Some(memory) = &resources.memory {
        apply_memory(dir, memory, writer)?;
    }
    if let Some(cpu) = &resources.cpu {
        apply_cpu(dir, cpu, writer)?;
    }
    if let Some(limit) = wished(resources.pids.as_ref().and_then(|pids| pids.limit)) {
        writer.set(dir, "pids.max", &or_max(limit), "linux.resources.pids.limit")?;
    }
    for limit in &resources.hugepage_limits {
        let name = format!("linux.resources.hugepageLimits[{}]", limit.page_size);
        let known = dir.join(format!("hugetlb.{}.max", limit.page_size)).exists();
        // The kubelet lists every size with 0.
        if known || limit.limit != 0 {
            write_hugepages(dir, limit, "max", &name, writer)?;
        }
    }
    if let Some(block_io) = &resources.block_io {
        apply_block_io(dir, block_io, writer)?;
    }
    for (file, value) in &resources.unified {
        let name = format!("linux.resources.unified[{file}]");
        // One line is one command.
        let mut lines = value.lines().filter(|line| !line.is_empty()).peekable();
        if lines.peek().is_none() {
            writer.set(dir, file, "\n", &name)?;
        }
        for line in lines {
            writer.set(dir, file, line, &name)?;
        }
    }
    if !resources.devices.is_empty() {
        devices::apply_v2(dir, &resources.devices)?;
    }
    Ok(())
}

fn unsupported(wished: bool, field: &str) -> Result<()> {
    let reason = "control groups v2 do not have it";
    if wished { Err(Error::Unsupported { field: field.to_owned(), reason }) } else { Ok(()) }
}

fn apply_memory(dir: &Path, memory: &Memory, writer: &mut Writer) -> Result<()> {
    unsupported(memory.swappiness.is_some(), "linux.resources.memory.swappiness")?;
    unsupported(memory.disable_oom_killer == Some(true), "linux.resources.memory.disableOOMKiller")?;
    let (limit, swap) = (wished(memory.limit), wished(memory.swap));
    if swap.is_some_and(|swap| swap > 0) && limit.is_none_or(|limit| limit < 0) {
        return Err(Error::Invalid {
            field: "linux.resources.memory.swap".to_owned(),
            reason: "a limit of memory and swap needs a memory limit".to_owned(),
        });
    }
    if let Some(swap) = swap_to_v2(limit, swap) {
        let absent = !dir.join("memory.swap.max").exists();
        // Without accounting swap is unlimited, which is also what there is none of on a machine without swap.
        if !(absent && (swap < 0 || !machine_has_swap())) {
            writer.set(dir, "memory.swap.max", &or_max(swap), "linux.resources.memory.swap")?;
        }
    }
    if let Some(limit) = limit {
        writer.set(dir, "memory.max", &or_max(limit), "linux.resources.memory.limit")?;
    }
    if let Some(value) = wished(memory.reservation) {
        writer.set(dir, "memory.low", &or_max(value), "linux.resources.memory.reservation")?;
    }
    Ok(())
}

fn apply_cpu(dir: &Path, cpu: &Cpu, writer: &mut Writer) -> Result<()> {
    unsupported(wished_count(cpu.realtime_period).is_some(), "linux.resources.cpu.realtimePeriod")?;
    unsupported(wished(cpu.realtime_runtime).is_some(), "linux.resources.cpu.realtimeRuntime")?;
    for (value, file, name) in
        [(&cpu.cpus, "cpuset.cpus", "linux.resources.cpu.cpus"), (&cpu.mems, "cpuset.mems", "linux.resources.cpu.mems")]
    {
        if let Some(value) = wished_list(value) {
            writer.set(dir, file, value, name)?;
        }
    }
    if let Some(idle) = cpu.idle.filter(|idle| *idle != 0 || dir.join("cpu.idle").exists()) {
        writer.set(dir, "cpu.idle", &idle.to_string(), "linux.resources.cpu.idle")?;
    }
    if let Some(shares) = wished_count(cpu.shares) {
        // The weight of an idle group is fixed, and the kernel refuses to set it.
        if cpu.idle.unwrap_or(0) == 0 {
            let weight = shares_to_weight(shares).to_string();
            writer.set(dir, "cpu.weight", &weight, "linux.resources.cpu.shares")?;
        }
    }
    apply_bandwidth(dir, cpu, writer)
}

fn apply_bandwidth(dir: &Path, cpu: &Cpu, writer: &mut Writer) -> Result<()> {
    let (period, quota) = (wished_count(cpu.period), wished(cpu.quota));
    let burst_name = "linux.resources.cpu.burst";
    let mut burst = cpu.burst.filter(|burst| *burst != 0 || dir.join("cpu.max.burst").exists());
    if period.is_some() || quota.is_some() {
        // The kernel checks burst ≤ quota at each write: when lowering both, the burst goes first.
        if let Some(value) = burst {
            match writer.set(dir, "cpu.max.burst", &value.to_string(), burst_name) {
                Err(error) if error.raw_errno() == Some(Errno::INVAL.raw_os_error()) => {}
                result => {
                    result?;
                    burst = None;
                }
            }
        }
        let present = file::read_optional(&dir.join("cpu.max"))?.unwrap_or_default();
        let mut present = present.split_whitespace();
        let (present_quota, present_period) = (present.next().unwrap_or("max"), present.next().unwrap_or("100000"));
        let quota = quota.map_or_else(|| present_quota.to_owned(), or_max);
        let period = period.map_or_else(|| present_period.to_owned(), |period| period.to_string());
        writer.set(dir, "cpu.max", &format!("{quota} {period}"), "linux.resources.cpu.quota")?;
    }
    match burst {
        Some(value) => writer.set(dir, "cpu.max.burst", &value.to_string(), burst_name),
        None => Ok(()),
    }
}

/// Writes a limit of huge pages and, where the kernel has it, of their reservations. The names of v1 and v2 differ in the last part.
pub(super) fn write_hugepages(dir: &Path, limit: &HugepageLimit, suffix: &str, name: &str, writer: &mut Writer) -> Result<()> {
    let size = &limit.page_size;
    if size.is_empty() || !size.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
        return Err(Error::Invalid { field: name.to_owned(), reason: "it is no page size".to_owned() });
    }
    writer.set(dir, &format!("hugetlb.{size}.{suffix}"), &limit.limit.to_string(), name)?;
    let reserved = format!("hugetlb.{size}.rsvd.{suffix}");
    if dir.join(&reserved).exists() {
        writer.set(dir, &reserved, &limit.limit.to_string(), name)?;
    }
    Ok(())
}

fn apply_block_io(dir: &Path, block_io: &BlockIo, writer: &mut Writer) -> Result<()> {
    let bfq = dir.join("io.bfq.weight").exists();
    let (file, convert): (&str, fn(u16) -> u64) =
        if bfq { ("io.bfq.weight", u64::from) } else { ("io.weight", blkio_weight_to_io) };
    if let Some(weight) = block_io.weight.filter(|weight| *weight != 0) {
        writer.set(dir, file, &format!("default {}", convert(weight)), "linux.resources.blockIO.weight")?;
    }
    for device in &block_io.weight_device {
        if let Some(weight) = device.weight.filter(|weight| *weight != 0) {
            let line = format!("{}:{} {}", device.major, device.minor, convert(weight));
            writer.set(dir, file, &line, "linux.resources.blockIO.weightDevice")?;
        }
    }
    let rates: [(&[ThrottleDevice], &str, &str); 4] = [
        (&block_io.throttle_read_bps_device, "rbps", "ReadBps"),
        (&block_io.throttle_write_bps_device, "wbps", "WriteBps"),
        (&block_io.throttle_read_iops_device, "riops", "ReadIOPS"),
        (&block_io.throttle_write_iops_device, "wiops", "WriteIOPS"),
    ];
    for (devices, key, name) in rates {
        for device in devices {
            let rate = if device.rate == 0 { "max".to_owned() } else { device.rate.to_string() };
            let line = format!("{}:{} {key}={rate}", device.major, device.minor);
            writer.set(dir, "io.max", &line, &format!("linux.resources.blockIO.throttle{name}Device"))?;
        }
    }
    Ok(())
}
