//! Which processors the machine has, and which share a core, a socket and a NUMA node: read once from sysfs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use crate::node::parse_cpu_list;

/// Processors by number.
pub(crate) type CpuSet = BTreeSet<u32>;

/// Where a processor is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    pub node: u32,
    pub socket: u32,
    /// The lowest processor of its core: cores are numbered anew in each socket.
    pub core: u32,
}

/// The machine's processors.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Topology {
    pub cpus: BTreeMap<u32, Place>,
}

impl Topology {
    /// Reads it below `/sys/devices/system`; what is not told there counts as one core each, one socket, one node.
    pub fn read(system: &Path) -> Result<Topology, String> {
        let list = |path: &str| parse_cpu_list(&fs::read_to_string(system.join(path)).ok()?);
        let online = list("cpu/online").filter(|cpus| !cpus.is_empty());
        let online = online.ok_or_else(|| format!("{} is no list of processors", system.join("cpu/online").display()))?;
        let mut nodes = BTreeMap::new();
        for entry in fs::read_dir(system.join("node")).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if let Some(node) = name.strip_prefix("node").and_then(|number| number.parse::<u32>().ok()) {
                let cpus = list(&format!("node/{name}/cpulist")).unwrap_or_default();
                nodes.extend(cpus.into_iter().map(|cpu| (cpu, node)));
            }
        }
        let place = |cpu: u32| {
            let socket = fs::read_to_string(system.join(format!("cpu/cpu{cpu}/topology/physical_package_id")));
            let threads = list(&format!("cpu/cpu{cpu}/topology/thread_siblings_list")).unwrap_or_default();
            Place {
                node: nodes.get(&cpu).copied().unwrap_or(0),
                // Machines without packages say -1.
                socket: socket.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0),
                core: threads.intersection(&online).next().copied().unwrap_or(cpu),
            }
        };
        Ok(Topology { cpus: online.iter().map(|cpu| (*cpu, place(*cpu))).collect() })
    }

    /// All processors.
    pub fn all(&self) -> CpuSet {
        self.cpus.keys().copied().collect()
    }

    /// How many processors a core has.
    pub fn threads(&self) -> usize {
        let cores: BTreeSet<u32> = self.cpus.values().map(|place| place.core).collect();
        (self.cpus.len() / cores.len().max(1)).max(1)
    }

    /// The processors of all cores that have one of these.
    pub fn whole_cores(&self, cpus: &CpuSet) -> CpuSet {
        let cores: BTreeSet<u32> = cpus.iter().filter_map(|cpu| self.cpus.get(cpu)).map(|place| place.core).collect();
        self.cpus.iter().filter(|(_, place)| cores.contains(&place.core)).map(|(cpu, _)| *cpu).collect()
    }
}

/// `0-2,5` for a set.
pub(crate) fn format_cpu_list(cpus: &CpuSet) -> String {
    let mut ranges: Vec<(u32, u32)> = Vec::new();
    for cpu in cpus {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == *cpu => *last = *cpu,
            _ => ranges.push((*cpu, *cpu)),
        }
    }
    let text = |(first, last): (u32, u32)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    ranges.into_iter().map(text).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_written_as_the_kernel_reads_them() {
        for (cpus, text) in [(vec![], ""), (vec![3], "3"), (vec![0, 1, 2, 5, 7, 8], "0-2,5,7-8")] {
            let set: CpuSet = cpus.into_iter().collect();
            assert_eq!(format_cpu_list(&set), text);
            assert_eq!(parse_cpu_list(text), Some(set));
        }
    }

    #[test]
    fn threads_sockets_and_nodes_are_read_and_processors_that_are_off_left_out() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("cpu/online", "0-2,5\n");
        for (cpu, socket, threads) in [(0, "0", "0,2"), (1, "0", "1,3"), (2, "0", "0,2"), (5, "1", "4-5")] {
            write(&format!("cpu/cpu{cpu}/topology/physical_package_id"), socket);
            write(&format!("cpu/cpu{cpu}/topology/thread_siblings_list"), threads);
        }
        write("node/node0/cpulist", "0-3\n");
        write("node/node1/cpulist", "4-5\n");
        write("node/possible", "0-1\n");
        let topology = Topology::read(root.path()).unwrap();
        let places: Vec<_> = topology.cpus.iter().map(|(cpu, p)| (*cpu, p.node, p.socket, p.core)).collect();
        assert_eq!(places, [(0, 0, 0, 0), (1, 0, 0, 1), (2, 0, 0, 0), (5, 1, 1, 5)]);
        assert_eq!(topology.whole_cores(&[2].into()), [0, 2].into());
        assert!(Topology::read(&root.path().join("none")).is_err());
    }

    #[test]
    fn this_machine_has_a_topology() {
        let topology = Topology::read(Path::new("/sys/devices/system")).unwrap();
        assert!(topology.threads() >= 1 && !topology.all().is_empty());
    }
}
