//! Statistics from the files of v2.

use std::path::Path;

use super::{CpuStats, HugetlbStats, IoStats, MemoryStats, Pressure, PressureLine, Stats, device_entry, device_number, keys};
use crate::{Result, file};

pub(super) fn read(dir: &Path, stats: &mut Stats) -> Result<()> {
    read_cpu(dir, &mut stats.cpu)?;
    read_memory(dir, &mut stats.memory)?;
    stats.pids.current = file::read_number(&dir.join("pids.current"))?.unwrap_or(0);
    stats.pids.limit = file::read_number(&dir.join("pids.max"))?.unwrap_or(u64::MAX);
    let text = file::read_optional(&dir.join("io.stat"))?.unwrap_or_default();
    parse_io(&text, &mut stats.io);
    stats.io.psi = pressure(&dir.join("io.pressure"))?;
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let Some(size) = name.strip_prefix("hugetlb.").and_then(|rest| rest.strip_suffix(".current")) else { continue };
        if size.ends_with(".rsvd") {
            continue;
        }
        let events = file::read_optional(&dir.join(format!("hugetlb.{size}.events")))?.unwrap_or_default();
        let huge = HugetlbStats {
            usage: file::read_number(&entry.path())?.unwrap_or(0),
            max_usage: 0,
            limit_hits: file::keyed(&events, "max").unwrap_or(0),
        };
        stats.hugetlb.insert(size.to_owned(), huge);
    }
    Ok(())
}

/// See [`Cgroup::brief_stats`](crate::Cgroup::brief_stats).
pub(super) fn read_brief(dir: &Path, stats: &mut Stats) -> Result<()> {
    read_cpu(dir, &mut stats.cpu)?;
    read_memory_in_use(dir, &mut stats.memory)?;
    stats.io.psi = pressure(&dir.join("io.pressure"))?;
    Ok(())
}

fn read_cpu(dir: &Path, cpu: &mut CpuStats) -> Result<()> {
    let text = file::read_optional(&dir.join("cpu.stat"))?.unwrap_or_default();
    for (key, value) in keys(&text) {
        match key {
            "usage_usec" => cpu.usage_ns = value.saturating_mul(1000),
            "user_usec" => cpu.user_ns = value.saturating_mul(1000),
            "system_usec" => cpu.system_ns = value.saturating_mul(1000),
            "nr_periods" => cpu.periods = value,
            "nr_throttled" => cpu.throttled_periods = value,
            "throttled_usec" => cpu.throttled_ns = value.saturating_mul(1000),
            _ => {}
        }
    }
    cpu.psi = pressure(&dir.join("cpu.pressure"))?;
    Ok(())
}

fn read_memory(dir: &Path, memory: &mut MemoryStats) -> Result<()> {
    memory.max_usage = file::read_number(&dir.join("memory.peak"))?.unwrap_or(0);
    let events = file::read_optional(&dir.join("memory.events"))?.unwrap_or_default();
    memory.limit_hits = file::keyed(&events, "max").unwrap_or(0);
    read_memory_in_use(dir, memory)
}

fn read_memory_in_use(dir: &Path, memory: &mut MemoryStats) -> Result<()> {
    let number = |name: &str| file::read_number(&dir.join(name));
    memory.usage = number("memory.current")?.unwrap_or(0);
    memory.limit = number("memory.max")?.unwrap_or(u64::MAX);
    memory.swap = number("memory.swap.current")?.unwrap_or(0);
    memory.swap_limit = number("memory.swap.max")?.unwrap_or(u64::MAX);
    let text = file::read_optional(&dir.join("memory.stat"))?.unwrap_or_default();
    let mut inactive_file = 0;
    for (key, value) in keys(&text) {
        match key {
            "inactive_file" => inactive_file = value,
            "anon" => memory.rss = value,
            "file" => memory.cache = value,
            "file_mapped" => memory.mapped_file = value,
            "kernel" => memory.kernel = value,
            "pgfault" => memory.page_faults = value,
            "pgmajfault" => memory.major_page_faults = value,
            _ => {}
        }
    }
    memory.working_set = memory.usage.saturating_sub(inactive_file);
    memory.psi = pressure(&dir.join("memory.pressure"))?;
    Ok(())
}

/// Lines `maj:min rbytes=1 wbytes=2 rios=3 wios=4 ...`.
fn parse_io(text: &str, io: &mut IoStats) {
    for line in text.lines() {
        let mut fields = line.split(' ');
        let Some(device) = fields.next().and_then(device_number) else { continue };
        let entry = device_entry(&mut io.devices, device);
        for (key, value) in fields.filter_map(|field| field.split_once('=')) {
            let Ok(value) = value.parse() else { continue };
            match key {
                "rbytes" => entry.read_bytes = value,
                "wbytes" => entry.write_bytes = value,
                "rios" => entry.reads = value,
                "wios" => entry.writes = value,
                _ => {}
            }
        }
    }
}

fn pressure(path: &Path) -> Result<Option<Pressure>> {
    Ok(file::read_optional(path)?.and_then(|text| parse_pressure(&text)))
}

/// Lines `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`.
fn parse_pressure(text: &str) -> Option<Pressure> {
    let mut pressure = Pressure::default();
    let mut found = false;
    for line in text.lines() {
        let mut fields = line.split(' ');
        let target = match fields.next() {
            Some("some") => &mut pressure.some,
            Some("full") => &mut pressure.full,
            _ => continue,
        };
        found = true;
        parse_pressure_line(fields, target);
    }
    found.then_some(pressure)
}

fn parse_pressure_line<'a>(fields: impl Iterator<Item = &'a str>, line: &mut PressureLine) {
    for (key, value) in fields.filter_map(|field| field.split_once('=')) {
        match key {
            "avg10" => line.avg10 = value.parse().unwrap_or(0.0),
            "avg60" => line.avg60 = value.parse().unwrap_or(0.0),
            "avg300" => line.avg300 = value.parse().unwrap_or(0.0),
            "total" => line.total_ns = value.parse::<u64>().unwrap_or(0).saturating_mul(1000),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn io_and_pressure_lines_are_parsed() {
        let mut io = IoStats::default();
        parse_io("8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n7:0 \n", &mut io);
        assert_eq!((io.devices[0].read_bytes, io.devices[0].writes), (10, 2));
        let text = "some avg10=1.50 avg60=0.20 avg300=0.00 total=12\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=3\n";
        let pressure = parse_pressure(text).unwrap();
        assert_eq!((pressure.some.avg10, pressure.some.total_ns, pressure.full.total_ns), (1.5, 12_000, 3_000));
        assert_eq!(parse_pressure(""), None);
    }
}
