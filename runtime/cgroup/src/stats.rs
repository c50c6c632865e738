//! What a cgroup uses. Numbers only; a controller that is not there leaves its part at the default.

mod v1;
mod v2;

use std::collections::BTreeMap;

use crate::Result;
use crate::cgroup::Cgroup;

/// What a cgroup uses, with all cgroups below it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stats {
    /// Processor time.
    pub cpu: CpuStats,
    /// Memory.
    pub memory: MemoryStats,
    /// Processes.
    pub pids: PidsStats,
    /// Block devices.
    pub io: IoStats,
    /// Huge pages by size (`2MB`).
    pub hugetlb: BTreeMap<String, HugetlbStats>,
}

/// Processor time in nanoseconds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CpuStats {
    /// Used in all.
    pub usage_ns: u64,
    /// In programs.
    pub user_ns: u64,
    /// In the kernel.
    pub system_ns: u64,
    /// Periods in which a quota counted.
    pub periods: u64,
    /// Periods in which it was used up.
    pub throttled_periods: u64,
    /// Time for which it was used up.
    pub throttled_ns: u64,
    /// Pressure, where the kernel measures it.
    pub psi: Option<Pressure>,
}

/// Memory in bytes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MemoryStats {
    /// Used in all, page cache included.
    pub usage: u64,
    /// The most that was ever used; 0 where the kernel does not tell.
    pub max_usage: u64,
    /// The use without the page cache that could go at once.
    pub working_set: u64,
    /// Anonymous memory.
    pub rss: u64,
    /// Page cache.
    pub cache: u64,
    /// Mapped files.
    pub mapped_file: u64,
    /// The kernel's memory for the cgroup.
    pub kernel: u64,
    /// Swap.
    pub swap: u64,
    /// The limit of swap; `u64::MAX` is none.
    pub swap_limit: u64,
    /// Page faults.
    pub page_faults: u64,
    /// Page faults that had to read.
    pub major_page_faults: u64,
    /// The limit; `u64::MAX` is none.
    pub limit: u64,
    /// How often the limit was met.
    pub limit_hits: u64,
    /// How many processes were killed for it.
    pub oom_kills: u64,
    /// Pressure, where the kernel measures it.
    pub psi: Option<Pressure>,
}

/// Processes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PidsStats {
    /// Processes and threads now.
    pub current: u64,
    /// How many there may be; `u64::MAX` is any number.
    pub limit: u64,
}

/// Block devices.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct IoStats {
    /// By device.
    pub devices: Vec<BlockIoEntry>,
    /// Pressure, where the kernel measures it.
    pub psi: Option<Pressure>,
}

/// What was read and written on a block device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockIoEntry {
    /// Its major number.
    pub major: u32,
    /// Its minor number.
    pub minor: u32,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

/// Huge pages in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HugetlbStats {
    /// Used now.
    pub usage: u64,
    /// The most that was ever used; 0 where the kernel does not tell.
    pub max_usage: u64,
    /// How often the limit was met.
    pub limit_hits: u64,
}

/// Time lost for want of something.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Pressure {
    /// Some processes waited.
    pub some: PressureLine,
    /// All processes waited.
    pub full: PressureLine,
}

/// A line of a pressure file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PressureLine {
    /// Percent over the last 10 seconds.
    pub avg10: f64,
    /// Percent over the last minute.
    pub avg60: f64,
    /// Percent over the last five minutes.
    pub avg300: f64,
    /// All the time, in nanoseconds (the kernel's file has microseconds).
    pub total_ns: u64,
}

impl Stats {
    /// Of a cgroup that uses nothing and may use all.
    fn unlimited() -> Self {
        let mut stats = Self::default();
        stats.memory.limit = u64::MAX;
        stats.memory.swap_limit = u64::MAX;
        stats.pids.limit = u64::MAX;
        stats
    }
}

impl Cgroup {
    /// Reads what the cgroup uses. A cgroup that is gone uses nothing.
    pub fn stats(&self) -> Result<Stats> {
        let mut stats = Stats::unlimited();
        if self.is_v2() {
            if let Some(dir) = self.v2_dir() {
                v2::read(dir, &mut stats)?;
            }
        } else {
            v1::read(self, &mut stats)?;
        }
        stats.memory.oom_kills = self.oom_kills()?;
        Ok(stats)
    }

    /// Reads what CRI's statistics tell, which kubelets ask for again and again: processor time in all, memory and swap in use, faults, limits and
    /// pressure. The rest of the numbers stays at the default: reading it would cost four times as much.
    pub fn brief_stats(&self) -> Result<Stats> {
        let mut stats = Stats::unlimited();
        if self.is_v2() {
            if let Some(dir) = self.v2_dir() {
                v2::read_brief(dir, &mut stats)?;
            }
        } else {
            v1::read_brief(self, &mut stats)?;
        }
        Ok(stats)
    }
}

/// Lines `key value`, for files from which several are wanted.
fn keys(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key, value.trim().parse().ok()?))
    })
}

/// `maj:min`.
fn device_number(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The entry of a device, made when it is new.
fn device_entry(devices: &mut Vec<BlockIoEntry>, (major, minor): (u32, u32)) -> &mut BlockIoEntry {
    let index = devices.iter().position(|entry| entry.major == major && entry.minor == minor);
    let index = index.unwrap_or_else(|| {
        devices.push(BlockIoEntry { major, minor, ..BlockIoEntry::default() });
        devices.len() - 1
    });
    &mut devices[index]
}
