//! What the machine has: processors, memory, huge page sizes. Read once at start.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::api::node::OwnNode;
use crate::config::{Reservations, ResourcePolicy};
use crate::quantity::Amount;

/// The node as plans and statuses see it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeView {
    /// The node's name.
    pub name: String,
    /// Its addresses, primary first.
    pub host_ips: Vec<String>,
    /// Scheme of container IDs.
    pub runtime_name: String,
    /// What the machine has.
    pub capacity: Capacity,
    /// Its object at the API server.
    pub own: OwnNode,
}

/// Capacity of the node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    /// Logical processors, in thousandths.
    pub cpu_millis: i64,
    /// Bytes of memory.
    pub memory_bytes: i64,
    /// Bytes of swap.
    pub swap_bytes: i64,
    /// Bytes of the file system that holds the kubelet's folder.
    pub storage_bytes: i64,
    /// Huge page sizes in bytes.
    pub huge_pages: Vec<u64>,
    /// Whether the memory controller is a cgroup v2 one.
    pub cgroup_v2: bool,
    /// Whether the kernel enforces AppArmor profiles.
    pub app_armor: bool,
    /// Thermal throttling counters of each processor: hidden from containers.
    pub thermal_paths: Vec<String>,
    /// How it is given to pods.
    pub policy: ResourcePolicy,
    /// What of it is not for pods.
    pub reserved: Reserved,
}

/// What is kept from pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reserved {
    /// Processors, in thousandths.
    pub cpu_millis: i64,
    /// Bytes of memory.
    pub memory_bytes: i64,
    /// Bytes of disk.
    pub storage_bytes: i64,
    /// Processes.
    pub pids: i64,
}

impl Reserved {
    /// By the configuration.
    pub fn of(reservations: &Reservations) -> Reserved {
        Reserved {
            cpu_millis: reservations.of("cpu").millis(),
            memory_bytes: reservations.of("memory").units(),
            storage_bytes: reservations.of("ephemeral-storage").units(),
            pids: reservations.of("pid").units(),
        }
    }
}

impl Capacity {
    /// Reads the capacity of this machine; what cannot be read is zero.
    pub fn read(kubelet_root: &Path, sys_devices: &Path) -> Capacity {
        let online = fs::read_to_string(sys_devices.join("cpu/online")).unwrap_or_default();
        let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let storage = rustix::fs::statvfs(kubelet_root)
            .map(|s| i64::try_from(s.f_blocks.saturating_mul(s.f_frsize)).unwrap_or(i64::MAX))
            .unwrap_or(0);
        let mut huge_pages: Vec<u64> = fs::read_dir("/sys/kernel/mm/hugepages")
            .into_iter()
            .flatten()
            .filter_map(|entry| huge_page_bytes(entry.ok()?.file_name().to_str()?))
            .collect();
        huge_pages.sort_unstable();
        Capacity {
            cpu_millis: count_cpus(&online).max(1) * 1000,
            memory_bytes: meminfo_bytes(&meminfo, "MemTotal:"),
            swap_bytes: meminfo_bytes(&meminfo, "SwapTotal:"),
            storage_bytes: storage,
            huge_pages,
            cgroup_v2: Path::new("/sys/fs/cgroup/cgroup.controllers").exists(),
            app_armor: fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with('Y')),
            thermal_paths: (0..count_cpus(&online))
                .map(|n| format!("/sys/devices/system/cpu/cpu{n}/thermal_throttle"))
                .filter(|path| Path::new(path).exists())
                .collect(),
            policy: ResourcePolicy::default(),
            reserved: Reserved::default(),
        }
    }

    /// What pods can have of a resource by its Kubernetes name; zero when unknown.
    pub fn amount(&self, resource: &str) -> Amount {
        let text = match resource {
            "cpu" => format!("{}m", (self.cpu_millis - self.reserved.cpu_millis).max(0)),
            "memory" => (self.memory_bytes - self.reserved.memory_bytes).max(0).to_string(),
            "ephemeral-storage" => (self.storage_bytes - self.reserved.storage_bytes).max(0).to_string(),
            _ => return Amount::default(),
        };
        Amount::parse(&text).unwrap_or_default()
    }
}

/// `0-3,8` → the numbers; `None` where it is no such list.
pub fn parse_cpu_list(list: &str) -> Option<BTreeSet<u32>> {
    let mut cpus = BTreeSet::new();
    for part in list.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.trim().parse::<u32>().ok()?, last.trim().parse::<u32>().ok()?);
        // The kernel's largest machine has 8192 processors.
        if first > last || last >= 8192 {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

/// `0-3,8` → 5.
fn count_cpus(list: &str) -> i64 {
    let range = |part: &str| -> Option<i64> {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(last.parse::<i64>().ok()? - first.parse::<i64>().ok()? + 1)
    };
    list.trim().split(',').filter_map(range).sum()
}

fn meminfo_bytes(meminfo: &str, key: &str) -> i64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
    line.split_whitespace().next().and_then(|n| n.parse::<i64>().ok()).unwrap_or(0).saturating_mul(1024)
}

/// `hugepages-2048kB` → bytes.
fn huge_page_bytes(folder: &str) -> Option<u64> {
    folder.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

/// A huge page size as CRI and cgroups write it: `2MB`, `1GB`.
pub fn huge_page_name(bytes: u64) -> String {
    let units = [(1u64 << 30, "GB"), (1 << 20, "MB"), (1 << 10, "KB")];
    for (unit, name) in units {
        if bytes >= unit && bytes.is_multiple_of(unit) {
            return format!("{}{name}", bytes / unit);
        }
    }
    format!("{bytes}B")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_files_are_read_right() {
        assert_eq!(count_cpus("0-3,8\n"), 5);
        assert_eq!(count_cpus("0\n"), 1);
        assert_eq!(meminfo_bytes("MemTotal:       1024 kB\nSwapTotal: 0 kB\n", "MemTotal:"), 1 << 20);
        assert_eq!(huge_page_bytes("hugepages-2048kB"), Some(2 << 20));
        assert_eq!(huge_page_name(2 << 20), "2MB");
        assert_eq!(huge_page_name(1 << 30), "1GB");
        assert_eq!(huge_page_name(64 << 10), "64KB");
    }

    #[test]
    fn pods_can_have_what_is_not_reserved() {
        let reserved = Reserved { cpu_millis: 500, memory_bytes: 1 << 30, ..Reserved::default() };
        let capacity = Capacity { cpu_millis: 2000, memory_bytes: 4 << 30, reserved, ..Capacity::default() };
        assert_eq!((capacity.amount("cpu").millis(), capacity.amount("memory").units()), (1500, 3 << 30));
    }

    #[test]
    fn processor_lists_are_sets() {
        assert_eq!(parse_cpu_list("0-2,5").map(|cpus| cpus.into_iter().collect::<Vec<_>>()), Some(vec![0, 1, 2, 5]));
        assert_eq!((parse_cpu_list("2-1"), parse_cpu_list("a"), parse_cpu_list("0-99999")), (None, None, None));
    }

    #[test]
    fn this_machine_has_processors_and_memory() {
        let capacity = Capacity::read(Path::new("/"), Path::new("/sys/devices/system"));
        assert!(capacity.cpu_millis >= 1000 && capacity.memory_bytes > 0 && capacity.storage_bytes > 0);
    }
}
