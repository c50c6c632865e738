//! Pure: which processors a container gets for itself. Whole NUMA nodes and sockets where it wants so many, then whole cores, then
//! single threads; of several possibilities the fullest, so that large pieces stay whole. The upstream's packed order.

use std::collections::BTreeMap;

use super::topology::{CpuSet, Place, Topology};

/// What a machine is divided by.
type Part = fn(&Place) -> u32;

struct Taking<'a> {
    topology: &'a Topology,
    free: CpuSet,
    taken: CpuSet,
    needed: usize,
    /// The larger of sockets and nodes, the smaller, cores.
    parts: [Part; 3],
}

/// Takes `count` of the available processors; the error is the upstream's.
pub(crate) fn take(topology: &Topology, available: &CpuSet, count: usize) -> Result<CpuSet, String> {
    if available.len() < count {
        let there = available.len();
        return Err(format!("not enough cpus available to satisfy request: requested={count}, available={there}"));
    }
    let number = |part: Part| topology.cpus.values().map(part).collect::<std::collections::BTreeSet<_>>().len();
    let (node, socket, core): (Part, Part, Part) = (|place| place.node, |place| place.socket, |place| place.core);
    let (outer, inner) = if number(socket) >= number(node) { (node, socket) } else { (socket, node) };
    let mut taking =
        Taking { topology, free: available.clone(), taken: CpuSet::new(), needed: count, parts: [outer, inner, core] };
    for level in 0..3 {
        taking.take_whole(level);
    }
    for cpu in taking.sorted_cpus() {
        if taking.needed > 0 {
            taking.take(&[cpu].into());
        }
    }
    Ok(taking.taken)
}

impl Taking<'_> {
    fn take(&mut self, cpus: &CpuSet) {
        self.free.retain(|cpu| !cpus.contains(cpu));
        self.taken.extend(cpus);
        self.needed -= cpus.len();
    }

    /// Free parts of a level that are as large as what is still needed.
    fn take_whole(&mut self, level: usize) {
        let part = self.parts[level];
        for id in self.sorted(level) {
            let of = |(cpu, place): (&u32, &Place)| (part(place) == id).then_some(*cpu);
            let whole: CpuSet = self.topology.cpus.iter().filter_map(of).collect();
            if whole.is_subset(&self.free) && self.needed >= whole.len() {
                self.take(&whole);
            }
        }
    }

    /// The parts of a level that have free processors: those of the fullest larger part first, in it the fullest first.
    fn sorted(&self, level: usize) -> Vec<u32> {
        let mut free: [BTreeMap<u32, usize>; 3] = Default::default();
        let mut chains: Vec<[u32; 3]> = Vec::new();
        for place in self.free.iter().filter_map(|cpu| self.topology.cpus.get(cpu)) {
            let chain = self.parts.map(|part| part(place));
            (0..3).for_each(|i| *free[i].entry(chain[i]).or_default() += 1);
            chains.push(chain);
        }
        let key = |chain: &[u32; 3]| -> Vec<(usize, u32)> { (0..=level).map(|i| (free[i][&chain[i]], chain[i])).collect() };
        chains.sort_by_key(key);
        let mut ids: Vec<u32> = Vec::new();
        for chain in chains {
            if !ids.contains(&chain[level]) {
                ids.push(chain[level]);
            }
        }
        ids
    }

    fn sorted_cpus(&self) -> Vec<u32> {
        let core = self.parts[2];
        let of = |id: u32| self.free.iter().filter(move |cpu| self.topology.cpus.get(cpu).is_some_and(|place| core(place) == id));
        self.sorted(2).into_iter().flat_map(of).copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::topology::format_cpu_list;
    use super::*;
    use crate::node::parse_cpu_list;

    /// Sockets of so many cores of so many threads; the second threads are numbered after all first ones, as on real machines.
    fn machine(sockets: u32, cores: u32, threads: u32, nodes_per_socket: u32) -> Topology {
        let all = sockets * cores;
        let place = |cpu: u32| {
            let core = cpu % all;
            Place { node: core * nodes_per_socket / cores, socket: core / cores, core }
        };
        Topology { cpus: (0..all * threads).map(|cpu| (cpu, place(cpu))).collect() }
    }

    fn taken(topology: &Topology, available: &str, count: usize) -> String {
        match take(topology, &parse_cpu_list(available).unwrap(), count) {
            Ok(cpus) => format_cpu_list(&cpus),
            Err(text) => text,
        }
    }

    #[test]
    fn without_hyperthreads_the_lowest_processors_are_taken() {
        let plain = machine(1, 4, 1, 1);
        assert_eq!(taken(&plain, "0-3", 2), "0-1");
        assert_eq!(taken(&plain, "1-3", 2), "1-2");
        assert_eq!(taken(&plain, "0-3", 4), "0-3");
        assert_eq!(taken(&plain, "0-3", 0), "");
        let missing = "not enough cpus available to satisfy request: requested=5, available=4";
        assert_eq!(taken(&plain, "0-3", 5), missing);
    }

    #[test]
    fn whole_cores_come_before_single_threads_and_broken_cores_before_whole_ones() {
        // Core n has the threads n and n + 4.
        let smt = machine(1, 4, 2, 1);
        assert_eq!(taken(&smt, "0-7", 2), "0,4");
        assert_eq!(taken(&smt, "0-7", 3), "0-1,4");
        // Half of core 0 is gone: one thread comes from there, two are a whole core.
        assert_eq!(taken(&smt, "1-7", 1), "4");
        assert_eq!(taken(&smt, "1-7", 2), "1,5");
        assert_eq!(taken(&smt, "1-7", 3), "1,4-5");
        // Nothing but halves.
        assert_eq!(taken(&smt, "1-4", 3), "1-2,4");
        assert_eq!(taken(&smt, "4-7", 2), "4-5");
    }

    #[test]
    fn whole_sockets_are_taken_where_they_fit_and_the_fullest_socket_otherwise() {
        // Socket 0: 0-3 and 8-11, socket 1: 4-7 and 12-15.
        let two = machine(2, 4, 2, 1);
        assert_eq!(taken(&two, "0-15", 8), "0-3,8-11");
        assert_eq!(taken(&two, "1-15", 8), "4-7,12-15");
        assert_eq!(taken(&two, "0-15", 10), "0-4,8-12");
        // Of socket 1 less is free: small pieces come from there, so that socket 0 stays whole.
        assert_eq!(taken(&two, "0-3,5-15", 2), "5,13");
        assert_eq!(taken(&two, "0-3,5-15", 1), "12");
        assert_eq!(taken(&two, "0-3,6-11,14-15", 6), "0,6-8,14-15");
    }

    #[test]
    fn whole_nodes_of_a_socket_are_taken_where_a_socket_is_too_much() {
        // One socket, two nodes: 0-1 and 4-5, 2-3 and 6-7.
        let nodes = machine(1, 4, 2, 2);
        assert_eq!(nodes.cpus[&6], Place { node: 1, socket: 0, core: 2 });
        assert_eq!(taken(&nodes, "0-7", 4), "0-1,4-5");
        assert_eq!(taken(&nodes, "1-7", 4), "2-3,6-7");
        assert_eq!(taken(&nodes, "1-7", 2), "1,5");
    }
}
