//! Statistics from the files of v1.

use std::path::Path;

use super::{CpuStats, HugetlbStats, IoStats, MemoryStats, Stats, device_entry, device_number, keys};
use crate::cgroup::Cgroup;
use crate::{Result, file};

/// The kernel's clock tick for user space, the same on all architectures of today.
const NS_PER_TICK: u64 = 1_000_000_000 / 100;
/// v1 writes "no limit" as the largest number of pages.
const NO_LIMIT: u64 = 1 << 62;

pub(super) fn read(cgroup: &Cgroup, stats: &mut Stats) -> Result<()> {
    read_cpu(cgroup, &mut stats.cpu)?;
    read_memory(cgroup, &mut stats.memory)?;
    if let Some(dir) = cgroup.v1_dir("pids") {
        stats.pids.current = file::read_number(&dir.join("pids.current"))?.unwrap_or(0);
        stats.pids.limit = file::read_number(&dir.join("pids.max"))?.unwrap_or(u64::MAX);
    }
    if let Some(dir) = cgroup.v1_dir("blkio") {
        read_io(dir, &mut stats.io)?;
    }
    if let Some(dir) = cgroup.v1_dir("hugetlb") {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let Some(size) = name.strip_prefix("hugetlb.").and_then(|rest| rest.strip_suffix(".usage_in_bytes")) else {
                continue;
            };
            if size.ends_with(".rsvd") {
                continue;
            }
            let number = |what: &str| file::read_number(&dir.join(format!("hugetlb.{size}.{what}")));
            let huge = HugetlbStats {
                usage: number("usage_in_bytes")?.unwrap_or(0),
                max_usage: number("max_usage_in_bytes")?.unwrap_or(0),
                limit_hits: number("failcnt")?.unwrap_or(0),
            };
            stats.hugetlb.insert(size.to_owned(), huge);
        }
    }
    Ok(())
}

/// See [`Cgroup::brief_stats`].
pub(super) fn read_brief(cgroup: &Cgroup, stats: &mut Stats) -> Result<()> {
    if let Some(dir) = cgroup.v1_dir("cpuacct") {
        stats.cpu.usage_ns = file::read_number(&dir.join("cpuacct.usage"))?.unwrap_or(0);
    }
    match cgroup.v1_dir("memory") {
        Some(dir) => read_memory_in_use(dir, &mut stats.memory),
        None => Ok(()),
    }
}

fn read_cpu(cgroup: &Cgroup, cpu: &mut CpuStats) -> Result<()> {
    if let Some(dir) = cgroup.v1_dir("cpuacct") {
        cpu.usage_ns = file::read_number(&dir.join("cpuacct.usage"))?.unwrap_or(0);
        let text = file::read_optional(&dir.join("cpuacct.stat"))?.unwrap_or_default();
        for (key, value) in keys(&text) {
            match key {
                "user" => cpu.user_ns = value * NS_PER_TICK,
                "system" => cpu.system_ns = value * NS_PER_TICK,
                _ => {}
            }
        }
    }
    if let Some(dir) = cgroup.v1_dir("cpu") {
        let text = file::read_optional(&dir.join("cpu.stat"))?.unwrap_or_default();
        for (key, value) in keys(&text) {
            match key {
                "nr_periods" => cpu.periods = value,
                "nr_throttled" => cpu.throttled_periods = value,
                "throttled_time" => cpu.throttled_ns = value,
                _ => {}
            }
        }
    }
    Ok(())
}

fn read_memory(cgroup: &Cgroup, memory: &mut MemoryStats) -> Result<()> {
    let Some(dir) = cgroup.v1_dir("memory") else { return Ok(()) };
    let number = |name: &str| file::read_number(&dir.join(name));
    memory.max_usage = number("memory.max_usage_in_bytes")?.unwrap_or(0);
    // With the same limit for memory alone and with swap it is the second that is met.
    let hits = [number("memory.failcnt")?, number("memory.memsw.failcnt")?];
    memory.limit_hits = hits.into_iter().flatten().sum();
    memory.kernel = number("memory.kmem.usage_in_bytes")?.unwrap_or(0);
    read_memory_in_use(dir, memory)
}

fn read_memory_in_use(dir: &Path, memory: &mut MemoryStats) -> Result<()> {
    let unlimited = |value: u64| if value >= NO_LIMIT { u64::MAX } else { value };
    memory.usage = file::read_number(&dir.join("memory.usage_in_bytes"))?.unwrap_or(0);
    let text = file::read_optional(&dir.join("memory.stat"))?.unwrap_or_default();
    let mut inactive_file = 0;
    let mut memsw_limit = u64::MAX;
    for (key, value) in keys(&text) {
        match key {
            "total_inactive_file" => inactive_file = value,
            "total_rss" => memory.rss = value,
            "total_cache" => memory.cache = value,
            "total_mapped_file" => memory.mapped_file = value,
            "total_swap" => memory.swap = value,
            "total_pgfault" => memory.page_faults = value,
            "total_pgmajfault" => memory.major_page_faults = value,
            "hierarchical_memory_limit" => memory.limit = unlimited(value),
            "hierarchical_memsw_limit" => memsw_limit = unlimited(value),
            _ => {}
        }
    }
    memory.working_set = memory.usage.saturating_sub(inactive_file);
    // Of a limit on both together, what remains when all of the memory limit is used.
    if memsw_limit != u64::MAX && memory.limit != u64::MAX {
        memory.swap_limit = memsw_limit.saturating_sub(memory.limit);
    }
    Ok(())
}

fn read_io(dir: &Path, io: &mut IoStats) -> Result<()> {
    for (name, bytes) in [("io_service_bytes", true), ("io_serviced", false)] {
        let text = file::read_optional(&dir.join(format!("blkio.throttle.{name}_recursive")))?.unwrap_or_default();
        parse_io(&text, bytes, io);
    }
    Ok(())
}

/// Lines `maj:min Operation count`.
fn parse_io(text: &str, bytes: bool, io: &mut IoStats) {
    for line in text.lines() {
        let mut fields = line.split(' ');
        let (Some(device), Some(operation), Some(value)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let (Some(device), Ok(value)) = (device_number(device), value.parse::<u64>()) else { continue };
        let entry = device_entry(&mut io.devices, device);
        match (operation, bytes) {
            ("Read", true) => entry.read_bytes = value,
            ("Write", true) => entry.write_bytes = value,
            ("Read", false) => entry.reads = value,
            ("Write", false) => entry.writes = value,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_io_lines_are_summed_by_device() {
        let mut io = IoStats::default();
        parse_io("254:0 Read 4096\n254:0 Write 512\n254:0 Sync 4608\n254:0 Total 4608\nTotal 4608\n", true, &mut io);
        parse_io("254:0 Read 2\n8:16 Write 1\n", false, &mut io);
        assert_eq!(io.devices.len(), 2);
        assert_eq!((io.devices[0].read_bytes, io.devices[0].write_bytes, io.devices[0].reads), (4096, 512, 2));
        assert_eq!((io.devices[1].major, io.devices[1].minor, io.devices[1].writes), (8, 16, 1));
    }
}
