//! The node as the kernel counts it: processor time, memory, swap, network, file systems, processes, pressure. Parsing is
//! pure; what cannot be read is zero or absent.

use std::fs;
use std::path::Path;

use crate::cri::Runtime;

/// The kernel counts processor time for /proc in hundredths of a second on every architecture.
const TICK_NS: u64 = 10_000_000;

/// One look at the node.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeStats {
    /// Nanoseconds since the epoch.
    pub time_ns: i64,
    /// Processor time used since the boot, in nanoseconds.
    pub cpu_ns: u64,
    /// Memory.
    pub memory: Memory,
    /// Bytes of swap in use.
    pub swap_used: u64,
    /// Bytes of swap left.
    pub swap_free: u64,
    /// Interfaces of the host, without loopback.
    pub interfaces: Vec<Interface>,
    /// The interface of the default route.
    pub default_interface: String,
    /// The largest process ID, and how many tasks there are.
    pub pids: (u64, u64),
    /// Pressure of cpu, memory and io, where the kernel tells.
    pub pressure: [Option<Pressure>; 3],
    /// When the machine was started, in seconds since the epoch.
    pub boot_time: i64,
}

/// Memory of the node, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// All there is.
    pub total: u64,
    /// In use, caches included.
    pub usage: u64,
    /// In use without file pages that the kernel would drop first.
    pub working_set: u64,
    /// Anonymous pages.
    pub rss: u64,
    /// Page faults since the boot.
    pub page_faults: u64,
    /// Those of them that read from a disk.
    pub major_page_faults: u64,
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Received bytes and errors.
    pub rx: (u64, u64),
    /// Sent bytes and errors.
    pub tx: (u64, u64),
}

/// One file of /proc/pressure.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pressure {
    /// Some tasks wait.
    pub some: PressureLine,
    /// All tasks wait.
    pub full: PressureLine,
}

/// One line of it; the total in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[allow(missing_docs, reason = "the kernel's names")]
pub struct PressureLine {
    pub total_ns: u64,
    pub avg10: f64,
    pub avg60: f64,
    pub avg300: f64,
}

/// Size and use of a file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileSystem {
    /// Bytes of it.
    pub capacity: u64,
    /// Bytes that ordinary users can still write.
    pub available: u64,
    /// Bytes in use.
    pub used: u64,
    /// Inodes of it.
    pub inodes: u64,
    /// Inodes left.
    pub inodes_free: u64,
}

impl FileSystem {
    /// Of the file system that a path is on.
    pub fn of(path: &Path) -> Option<FileSystem> {
        let fs = rustix::fs::statvfs(path).ok()?;
        let bytes = |blocks: u64| blocks.saturating_mul(fs.f_frsize);
        Some(FileSystem {
            capacity: bytes(fs.f_blocks),
            available: bytes(fs.f_bavail),
            used: bytes(fs.f_blocks.saturating_sub(fs.f_bfree)),
            inodes: fs.f_files,
            inodes_free: fs.f_ffree,
        })
    }
}

impl NodeStats {
    /// Reads /proc. Some milliseconds.
    pub fn read(time_ns: i64) -> NodeStats {
        let file = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let (meminfo, stat) = (file("/proc/meminfo"), file("/proc/stat"));
        let kib = |key| kib(&meminfo, key);
        let pressure = ["cpu", "memory", "io"].map(|of| fs::read_to_string(format!("/proc/pressure/{of}")).ok());
        NodeStats {
            time_ns,
            cpu_ns: cpu_ns(&stat),
            memory: memory(&meminfo, &file("/proc/vmstat")),
            swap_used: kib("SwapTotal:").saturating_sub(kib("SwapFree:")),
            swap_free: kib("SwapFree:"),
            interfaces: interfaces(&file("/proc/net/dev")),
            default_interface: default_interface(&file("/proc/net/route")),
            pids: (file("/proc/sys/kernel/pid_max").trim().parse().unwrap_or(0), tasks(&file("/proc/loadavg"))),
            pressure: pressure.map(|text| text.map(|text| parse_pressure(&text))),
            boot_time: stat.lines().find_map(|l| l.strip_prefix("btime ")?.trim().parse().ok()).unwrap_or(0),
        }
    }
}

/// The runtime's file systems: of images, and of containers' writable layers. Used bytes and inodes are the runtime's own
/// count, the rest is the file system's.
pub(crate) async fn runtime_file_systems(runtime: &Runtime) -> [Option<(FileSystem, u64, u64)>; 2] {
    let Ok(info) = runtime.image_fs_info().await else { return [None, None] };
    [info.image_filesystems, info.container_filesystems].map(|all| {
        let first = all.into_iter().next()?;
        let fs = FileSystem::of(Path::new(&first.fs_id?.mountpoint))?;
        let value = |v: Option<berth_cri_api::v1::UInt64Value>| v.map_or(0, |v| v.value);
        Some((fs, value(first.used_bytes), value(first.inodes_used)))
    })
}

/// A value of /proc/meminfo, in bytes.
fn kib(meminfo: &str, key: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
    line.split_whitespace().next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0).saturating_mul(1024)
}

fn memory(meminfo: &str, vmstat: &str) -> Memory {
    let count = |key: &str| {
        let mut lines = vmstat.lines().filter_map(|line| line.split_once(' '));
        lines.find(|(name, _)| *name == key).and_then(|(_, value)| value.trim().parse().ok()).unwrap_or(0)
    };
    let total = kib(meminfo, "MemTotal:");
    let usage = total.saturating_sub(kib(meminfo, "MemFree:"));
    Memory {
        total,
        usage,
        working_set: usage.saturating_sub(kib(meminfo, "Inactive(file):")),
        rss: kib(meminfo, "AnonPages:"),
        page_faults: count("pgfault"),
        major_page_faults: count("pgmajfault"),
    }
}

/// All but idle and waiting; guests' time is in the users'.
fn cpu_ns(stat: &str) -> u64 {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu ")).unwrap_or_default();
    let ticks: Vec<u64> = line.split_whitespace().map(|n| n.parse().unwrap_or(0)).collect();
    [0, 1, 2, 5, 6, 7].iter().filter_map(|at| ticks.get(*at)).sum::<u64>().saturating_mul(TICK_NS)
}

fn interfaces(dev: &str) -> Vec<Interface> {
    let one = |line: &str| {
        let (name, rest) = line.split_once(':')?;
        let numbers: Vec<u64> = rest.split_whitespace().map(|n| n.parse().unwrap_or(0)).collect();
        let at = |n: usize| numbers.get(n).copied();
        Some(Interface { name: name.trim().to_owned(), rx: (at(0)?, at(2)?), tx: (at(8)?, at(10)?) })
    };
    dev.lines().skip(2).filter_map(one).filter(|i| i.name != "lo" && !i.name.starts_with("veth")).collect()
}

/// Of the route to nowhere in particular; the kernel writes addresses in hexadecimal.
fn default_interface(route: &str) -> String {
    let mut lines = route.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    lines.find(|fields| fields.get(1) == Some(&"00000000")).and_then(|f| f.first().copied()).unwrap_or_default().to_owned()
}

/// `0.00 0.01 0.05 2/345 6789` → 345.
fn tasks(loadavg: &str) -> u64 {
    let field = loadavg.split(' ').nth(3).and_then(|field| field.split_once('/'));
    field.and_then(|(_, all)| all.parse().ok()).unwrap_or(0)
}

fn parse_pressure(text: &str) -> Pressure {
    let mut pressure = Pressure::default();
    for line in text.lines() {
        let mut fields = line.split_whitespace();
        let target = match fields.next() {
            Some("some") => &mut pressure.some,
            Some("full") => &mut pressure.full,
            _ => continue,
        };
        for (key, value) in fields.filter_map(|field| field.split_once('=')) {
            match key {
                "avg10" => target.avg10 = value.parse().unwrap_or(0.0),
                "avg60" => target.avg60 = value.parse().unwrap_or(0.0),
                "avg300" => target.avg300 = value.parse().unwrap_or(0.0),
                // Microseconds.
                "total" => target.total_ns = value.parse::<u64>().unwrap_or(0).saturating_mul(1000),
                _ => {}
            }
        }
    }
    pressure
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_files_are_read_right() {
        assert_eq!(cpu_ns("cpu  10 2 3 1000 50 1 2 4 0 0\ncpu0 1 2\n"), 22 * TICK_NS);
        let meminfo = "MemTotal: 1000 kB\nMemFree: 200 kB\nInactive(file):  300 kB\nAnonPages: 50 kB\n";
        let found = memory(meminfo, "pgfault 7\npgmajfault 2\n");
        assert_eq!((found.usage, found.working_set, found.rss), (800 << 10, 500 << 10, 50 << 10));
        assert_eq!((found.page_faults, found.major_page_faults), (7, 2));
        let dev = "Inter-|\n face |\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n  eth0:10 1 2 0 0 0 0 0 30 1 4 0 0 0 0 0\n";
        assert_eq!(interfaces(dev), [Interface { name: "eth0".into(), rx: (10, 2), tx: (30, 4) }]);
        let route = "Iface Destination Gateway\neth1 0000000A 0\neth0 00000000 0100A8C0\n";
        assert_eq!(default_interface(route), "eth0");
        assert_eq!(tasks("0.00 0.01 0.05 2/345 6789\n"), 345);
        let psi =
            parse_pressure("some avg10=1.50 avg60=0.20 avg300=0.00 total=12\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=3\n");
        assert_eq!((psi.some.avg10, psi.some.total_ns, psi.full.total_ns), (1.5, 12_000, 3_000));
    }

    #[test]
    fn this_node_has_used_its_processors_and_memory() {
        let node = NodeStats::read(1);
        assert!(node.cpu_ns > 0 && node.boot_time > 0 && node.pids.1 > 0, "{node:?}");
        let memory = node.memory;
        assert!(memory.working_set > 0 && memory.working_set <= memory.usage && memory.usage <= memory.total, "{memory:?}");
        assert!(FileSystem::of(Path::new("/")).is_some_and(|fs| fs.capacity >= fs.used));
    }
}
