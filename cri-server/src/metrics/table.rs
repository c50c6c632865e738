//! The metrics: name, help, labels and where the value is, in one place, so that none has the one without the other.

use berth_cgroup::{BlockIoEntry, PressureLine};
use berth_cri_api::v1;
use berth_cri_api::v1::MetricType::{self, Counter, Gauge};

use super::LABELS;
use super::sample::Sample;
use crate::stats::network::Interface;

const SECOND: u64 = 1_000_000_000;

/// What a metric needs of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Needs {
    Nothing,
    Pressure,
    HugePages,
    HugePagePeak,
}

/// A metric. `F` finds the value.
pub(super) struct Descriptor<F> {
    pub(super) name: &'static str,
    pub(super) help: &'static str,
    pub(super) kind: MetricType,
    /// After those of every metric.
    pub(super) labels: &'static [&'static str],
    pub(super) needs: Needs,
    pub(super) values: F,
}

impl<F> Descriptor<F> {
    fn wire(&self) -> v1::MetricDescriptor {
        let label_keys = LABELS.iter().chain(self.labels).map(|key| (*key).to_owned()).collect();
        v1::MetricDescriptor { name: self.name.to_owned(), help: self.help.to_owned(), label_keys }
    }

    /// A value of it.
    pub(super) fn metric(&self, label_values: Vec<String>, value: u64, timestamp: i64) -> v1::Metric {
        v1::Metric {
            name: self.name.to_owned(),
            timestamp,
            metric_type: self.kind.into(),
            label_values,
            value: Some(v1::UInt64Value { value }),
        }
    }
}

/// The values of one metric, each with the labels of its own.
#[derive(Default)]
pub(super) struct Values(Vec<(Vec<String>, u64)>);

impl Values {
    fn one(&mut self, value: u64) {
        self.with([], value);
    }

    fn with<const N: usize>(&mut self, labels: [String; N], value: u64) {
        self.0.push((labels.into(), value));
    }

    fn disk(&mut self, sample: &Sample, value: Option<u64>) {
        value.into_iter().for_each(|value| self.with([sample.disk.device.clone()], value));
    }
}

type OfContainer = fn(&Sample, &mut Values);

/// All descriptors that a machine can fill.
pub(super) fn descriptors(available: impl Fn(Needs) -> bool) -> Vec<v1::MetricDescriptor> {
    let containers = CONTAINER.iter().filter(|d| available(d.needs)).map(Descriptor::wire);
    containers.chain(POD.iter().map(Descriptor::wire)).collect()
}

/// The metrics of a container.
pub(super) fn metrics(
    table: &[Descriptor<OfContainer>],
    sample: &Sample,
    labels: &[String],
    available: impl Fn(Needs) -> bool,
) -> Vec<v1::Metric> {
    let mut out = Vec::with_capacity(table.len());
    for descriptor in table.iter().filter(|d| available(d.needs)) {
        let mut values = Values::default();
        (descriptor.values)(sample, &mut values);
        for (own, value) in values.0 {
            out.push(descriptor.metric([labels, &own].concat(), value, sample.now));
        }
    }
    out
}

fn seconds(ns: i64) -> u64 {
    u64::try_from(ns).unwrap_or(0) / SECOND
}

/// A limit that was asked for.
fn asked(value: i64) -> Option<u64> {
    u64::try_from(value).ok().filter(|value| *value != 0)
}

/// cAdvisor's way to say that there is no limit is 0.
fn limit(value: u64) -> u64 {
    if value >= 1 << 60 { 0 } else { value }
}

fn swap_limit(s: &Sample) -> u64 {
    let memory = &s.stats.memory;
    if s.is_v2 { memory.swap_limit } else { memory.swap_limit.saturating_add(memory.limit) }
}

fn pressure(line: Option<&PressureLine>, out: &mut Values) {
    line.into_iter().for_each(|line| out.one(line.total_ns / SECOND));
}

/// The counters include the cgroups that the container made itself; for the container alone the same is told, as cAdvisor does on v2.
fn page_faults(s: &Sample, out: &mut Values) {
    for (kind, value) in [("pgfault", s.stats.memory.page_faults), ("pgmajfault", s.stats.memory.major_page_faults)] {
        for scope in ["container", "hierarchy"] {
            out.with([kind.to_owned(), scope.to_owned()], value);
        }
    }
}

fn ulimits(s: &Sample, out: &mut Values) {
    s.processes.soft_limit.into_iter().for_each(|value| out.with(["max_open_files".to_owned()], value));
}

/// The devices that were used; with none, the disk of the writable layers, which then was read and written 0 times.
fn each_device(s: &Sample, mut tell: impl FnMut(&str, &BlockIoEntry)) {
    for entry in &s.stats.io.devices {
        tell(s.devices.get(&(entry.major, entry.minor)).map_or("unknown", String::as_str), entry);
    }
    if s.stats.io.devices.is_empty() && s.counts_io {
        tell(&s.disk.device, &BlockIoEntry { major: s.disk.major, minor: s.disk.minor, ..Default::default() });
    }
}

fn devices(s: &Sample, out: &mut Values, value: fn(&BlockIoEntry) -> u64) {
    each_device(s, |device, entry| out.with([device.to_owned()], value(entry)));
}

fn blkio(s: &Sample, out: &mut Values) {
    each_device(s, |device, entry| {
        for (operation, value) in [("Read", entry.read_bytes), ("Write", entry.write_bytes)] {
            out.with([device.to_owned(), entry.major.to_string(), entry.minor.to_string(), operation.to_owned()], value);
        }
    });
}

type PodDescriptor = Descriptor<fn(&Interface) -> u64>;

/// Of a pod: one value for each interface.
pub(super) const POD: &[PodDescriptor] = &[
    Descriptor {
        name: "container_network_receive_bytes_total",
        help: "Bytes received.",
        kind: Counter,
        labels: &["interface"],
        needs: Needs::Nothing,
        values: |i| i.rx[0],
    },
    Descriptor {
        name: "container_network_receive_errors_total",
        help: "Errors while packets were received.",
        kind: Counter,
        labels: &["interface"],
        needs: Needs::Nothing,
        values: |i| i.rx[2],
    },
    Descriptor {
        name: "container_network_receive_packets_dropped_total",
        help: "Packets dropped while they were received.",
        kind: Counter,
        labels: &["interface"],
        needs: Needs::Nothing,
        values: |i| i.rx[3],
    },
    Descriptor {
        name: "container_network_receive_packets_total",
        help: "Packets received.",
        kind: Counter,
        labels: &["interface"],
        needs: Needs::Nothing,
        values: |i| i.rx[1],
    },
    Descriptor {
        name: "container_network_transmit_bytes_total",
        help: "Bytes sent.",
        kind: Counter,
        labels: &["interface"],
        needs: Needs::Nothing,
        values: |i| i.tx[0],
    },
    Descriptor {
        name: "container_network_transmit_errors_total",
        help: "Errors while packets were sent.",
        kind: Counter,
        labels: &["interface"],
        needs: Needs::Nothing,
        values: |i| i.tx[2],
    },
    Descriptor {
        name: "container_network_transmit_packets_dropped_total",
        help: "Packets dropped while they were sent.",
        kind: Counter,
        labels: &["interface"],
        needs: Needs::Nothing,
        values: |i| i.tx[3],
    },
    Descriptor {
        name: "container_network_transmit_packets_total",
        help: "Packets sent.",
        kind: Counter,
        labels: &["interface"],
        needs: Needs::Nothing,
        values: |i| i.tx[1],
    },
];

/// Of a container.
pub(super) const CONTAINER: &[Descriptor<OfContainer>] = &[
    Descriptor {
        name: "container_blkio_device_usage_total",
        help: "Bytes read from and written to block devices.",
        kind: Counter,
        labels: &["device", "major", "minor", "operation"],
        needs: Needs::Nothing,
        values: blkio,
    },
    Descriptor {
        name: "container_cpu_cfs_periods_total",
        help: "Periods in which the CPU quota counted.",
        kind: Counter,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(s.stats.cpu.periods),
    },
    Descriptor {
        name: "container_cpu_cfs_throttled_periods_total",
        help: "Periods in which the CPU quota was used up.",
        kind: Counter,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(s.stats.cpu.throttled_periods),
    },
    Descriptor {
        name: "container_cpu_cfs_throttled_seconds_total",
        help: "Seconds for which the container was throttled.",
        kind: Counter,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(s.stats.cpu.throttled_ns / SECOND),
    },
    Descriptor {
        name: "container_cpu_system_seconds_total",
        help: "Seconds of CPU time in the kernel.",
        kind: Counter,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(s.stats.cpu.system_ns / SECOND),
    },
    Descriptor {
        name: "container_cpu_usage_seconds_total",
        help: "Seconds of CPU time in all.",
        kind: Counter,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(s.stats.cpu.usage_ns / SECOND),
    },
    Descriptor {
        name: "container_cpu_user_seconds_total",
        help: "Seconds of CPU time in programs.",
        kind: Counter,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(s.stats.cpu.user_ns / SECOND),
    },
    Descriptor {
        name: "container_file_descriptors",
        help: "Open file descriptors.",
        kind: Gauge,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(s.processes.descriptors),
    },
    Descriptor {
        name: "container_fs_inodes_free",
        help: "Free inodes of the file system with the writable layer.",
        kind: Gauge,
        labels: &["device"],
        needs: Needs::Nothing,
        values: |s, out| out.disk(s, Some(s.disk.inodes_free)),
    },
    Descriptor {
        name: "container_fs_inodes_total",
        help: "Inodes of the file system with the writable layer.",
        kind: Gauge,
        labels: &["device"],
        needs: Needs::Nothing,
        values: |s, out| out.disk(s, Some(s.disk.inodes)),
    },
    Descriptor {
        name: "container_fs_limit_bytes",
        help: "Size of the file system with the writable layer in bytes.",
        kind: Gauge,
        labels: &["device"],
        needs: Needs::Nothing,
        values: |s, out| out.disk(s, Some(s.disk.bytes)),
    },
    Descriptor {
        name: "container_fs_reads_bytes_total",
        help: "Bytes read.",
        kind: Counter,
        labels: &["device"],
        needs: Needs::Nothing,
        values: |s, out| devices(s, out, |e| e.read_bytes),
    },
    Descriptor {
        name: "container_fs_reads_total",
        help: "Reads.",
        kind: Counter,
        labels: &["device"],
        needs: Needs::Nothing,
        values: |s, out| devices(s, out, |e| e.reads),
    },
    Descriptor {
        name: "container_fs_usage_bytes",
        help: "Bytes that the writable layer takes.",
        kind: Gauge,
        labels: &["device"],
        needs: Needs::Nothing,
        values: |s, out| out.disk(s, s.layer.map(|l| l.bytes)),
    },
    Descriptor {
        name: "container_fs_writes_bytes_total",
        help: "Bytes written.",
        kind: Counter,
        labels: &["device"],
        needs: Needs::Nothing,
        values: |s, out| devices(s, out, |e| e.write_bytes),
    },
    Descriptor {
        name: "container_fs_writes_total",
        help: "Writes.",
        kind: Counter,
        labels: &["device"],
        needs: Needs::Nothing,
        values: |s, out| devices(s, out, |e| e.writes),
    },
    Descriptor {
        name: "container_hugetlb_max_usage_bytes",
        help: "The most bytes of huge pages ever used.",
        kind: Gauge,
        labels: &["pagesize"],
        needs: Needs::HugePagePeak,
        values: |s, out| s.stats.hugetlb.iter().for_each(|(size, huge)| out.with([size.clone()], huge.max_usage)),
    },
    Descriptor {
        name: "container_hugetlb_usage_bytes",
        help: "Bytes of huge pages used.",
        kind: Gauge,
        labels: &["pagesize"],
        needs: Needs::HugePages,
        values: |s, out| s.stats.hugetlb.iter().for_each(|(size, huge)| out.with([size.clone()], huge.usage)),
    },
    Descriptor {
        name: "container_last_seen",
        help: "When the container was last seen, in seconds since 1970.",
        kind: Gauge,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(seconds(s.now)),
    },
    Descriptor {
        name: "container_memory_cache",
        help: "Bytes of page cache.",
        kind: Gauge,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(s.stats.memory.cache),
    },
    Descriptor {
        name: "container_memory_failcnt",
        help: "How often the memory limit was met.",
        kind: Counter,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(s.stats.memory.limit_hits),
    },
    Descriptor {
        name: "container_memory_failures_total",
        help: "Page faults.",
        kind: Counter,
        labels: &["failure_type", "scope"],
        needs: Needs::Nothing,
        values: page_faults,
    },
    Descriptor {
        name: "container_memory_kernel_usage",
        help: "Bytes of the kernel's memory for the container.",
        kind: Gauge,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(s.stats.memory.kernel),
    },
    Descriptor {
        name: "container_memory_mapped_file",
        help: "Bytes of mapped files.",
        kind: Gauge,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(s.stats.memory.mapped_file),
    },
    Descriptor {
        name: "container_memory_max_usage_bytes",
        help: "The most bytes of memory ever used.",
        kind: Gauge,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(s.stats.memory.max_usage),
    },
    Descriptor {
        name: "container_memory_rss",
        help: "Bytes of anonymous memory.",
        kind: Gauge,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(s.stats.memory.rss),
    },
    Descriptor {
        name: "container_memory_swap",
        help: "Bytes of swap.",
        kind: Gauge,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(s.stats.memory.swap),
    },
    Descriptor {
        name: "container_memory_usage_bytes",
        help: "Bytes of memory used, page cache included.",
        kind: Gauge,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(s.stats.memory.usage),
    },
    Descriptor {
        name: "container_memory_working_set_bytes",
        help: "Bytes of memory used, without the page cache that could go at once.",
        kind: Gauge,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(s.stats.memory.working_set),
    },
    Descriptor {
        name: "container_oom_events_total",
        help: "Processes killed because memory ran out.",
        kind: Counter,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(s.stats.memory.oom_kills),
    },
    Descriptor {
        name: "container_pressure_cpu_stalled_seconds_total",
        help: "Seconds for which all processes waited for CPU time.",
        kind: Counter,
        labels: &[],
        needs: Needs::Pressure,
        values: |s, out| pressure(s.stats.cpu.psi.as_ref().map(|p| &p.full), out),
    },
    Descriptor {
        name: "container_pressure_cpu_waiting_seconds_total",
        help: "Seconds for which some processes waited for CPU time.",
        kind: Counter,
        labels: &[],
        needs: Needs::Pressure,
        values: |s, out| pressure(s.stats.cpu.psi.as_ref().map(|p| &p.some), out),
    },
    Descriptor {
        name: "container_pressure_io_stalled_seconds_total",
        help: "Seconds for which all processes waited for input and output.",
        kind: Counter,
        labels: &[],
        needs: Needs::Pressure,
        values: |s, out| pressure(s.stats.io.psi.as_ref().map(|p| &p.full), out),
    },
    Descriptor {
        name: "container_pressure_io_waiting_seconds_total",
        help: "Seconds for which some processes waited for input and output.",
        kind: Counter,
        labels: &[],
        needs: Needs::Pressure,
        values: |s, out| pressure(s.stats.io.psi.as_ref().map(|p| &p.some), out),
    },
    Descriptor {
        name: "container_pressure_memory_stalled_seconds_total",
        help: "Seconds for which all processes waited for memory.",
        kind: Counter,
        labels: &[],
        needs: Needs::Pressure,
        values: |s, out| pressure(s.stats.memory.psi.as_ref().map(|p| &p.full), out),
    },
    Descriptor {
        name: "container_pressure_memory_waiting_seconds_total",
        help: "Seconds for which some processes waited for memory.",
        kind: Counter,
        labels: &[],
        needs: Needs::Pressure,
        values: |s, out| pressure(s.stats.memory.psi.as_ref().map(|p| &p.some), out),
    },
    Descriptor {
        name: "container_processes",
        help: "Processes.",
        kind: Gauge,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(s.processes.count),
    },
    Descriptor {
        name: "container_sockets",
        help: "Open sockets.",
        kind: Gauge,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(s.processes.sockets),
    },
    Descriptor {
        name: "container_spec_cpu_period",
        help: "The CPU quota's period in microseconds.",
        kind: Gauge,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(asked(s.resources.cpu_period).unwrap_or(100_000)),
    },
    Descriptor {
        name: "container_spec_cpu_quota",
        help: "The CPU quota in microseconds; absent without one.",
        kind: Gauge,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| asked(s.resources.cpu_quota).into_iter().for_each(|quota| out.one(quota)),
    },
    Descriptor {
        name: "container_spec_cpu_shares",
        help: "CPU shares.",
        kind: Gauge,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(asked(s.resources.cpu_shares).unwrap_or(1024)),
    },
    Descriptor {
        name: "container_spec_memory_limit_bytes",
        help: "The memory limit in bytes; 0 is none.",
        kind: Gauge,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(limit(s.stats.memory.limit)),
    },
    Descriptor {
        name: "container_spec_memory_reservation_limit_bytes",
        help: "The memory reservation in bytes; 0 is none.",
        kind: Gauge,
        labels: &[],
        needs: Needs::Nothing,
        values: |_, out| out.one(0),
    },
    Descriptor {
        name: "container_spec_memory_swap_limit_bytes",
        help: "The swap limit in bytes, on cgroup v1 with the memory; 0 is none.",
        kind: Gauge,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(limit(swap_limit(s))),
    },
    Descriptor {
        name: "container_start_time_seconds",
        help: "When the container started, in seconds since 1970.",
        kind: Gauge,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(seconds(s.started_at)),
    },
    Descriptor {
        name: "container_threads",
        help: "Processes and threads.",
        kind: Gauge,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(s.stats.pids.current),
    },
    Descriptor {
        name: "container_threads_max",
        help: "How many processes and threads there may be; 0 is any number.",
        kind: Gauge,
        labels: &[],
        needs: Needs::Nothing,
        values: |s, out| out.one(limit(s.stats.pids.limit)),
    },
    Descriptor {
        name: "container_ulimits_soft",
        help: "Soft limits of the first process.",
        kind: Gauge,
        labels: &["ulimit"],
        needs: Needs::Nothing,
        values: ulimits,
    },
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use berth_cgroup::{HugetlbStats, Pressure};

    use super::*;

    fn sample() -> Sample {
        let mut sample = Sample { layer: Some(Default::default()), counts_io: true, ..Default::default() };
        sample.resources.cpu_quota = 20_000;
        sample.processes.soft_limit = Some(1024);
        let psi = || Some(Pressure::default());
        (sample.stats.cpu.psi, sample.stats.memory.psi, sample.stats.io.psi) = (psi(), psi(), psi());
        sample.stats.hugetlb.insert("2MB".into(), HugetlbStats::default());
        sample
    }

    fn base() -> Vec<String> {
        LABELS.map(str::to_owned).to_vec()
    }

    #[test]
    fn every_descriptor_has_help_a_name_of_its_own_and_labels() {
        let all = descriptors(|_| true);
        assert_eq!(all.iter().map(|d| d.name.as_str()).collect::<BTreeSet<_>>().len(), all.len());
        assert_eq!(all.len(), 56);
        assert!(all.iter().all(|d| !d.help.is_empty() && d.label_keys[..5] == LABELS && d.name.starts_with("container_")));
        let plain = descriptors(|needs| needs == Needs::Nothing);
        assert!(!plain.iter().any(|d| d.name.contains("pressure") || d.name.contains("hugetlb")));
    }

    #[test]
    fn every_descriptor_of_a_container_has_values_with_as_many_labels_as_keys() {
        let metrics = metrics(CONTAINER, &sample(), &base(), |_| true);
        for descriptor in CONTAINER {
            let values: Vec<_> = metrics.iter().filter(|m| m.name == descriptor.name).collect();
            assert!(!values.is_empty(), "{}", descriptor.name);
            let keys = descriptor.wire().label_keys.len();
            assert!(values.iter().all(|m| m.label_values.len() == keys && m.value.is_some()), "{}", descriptor.name);
        }
        assert!(metrics.iter().all(|m| CONTAINER.iter().any(|d| d.name == m.name)));
    }

    #[test]
    fn no_limit_is_zero_and_swap_is_counted_with_memory_on_v1() {
        let mut sample = sample();
        assert_eq!(limit(u64::MAX), 0);
        (sample.stats.memory.limit, sample.stats.memory.swap_limit) = (64 << 20, 0);
        assert_eq!(swap_limit(&sample), 64 << 20);
        sample.is_v2 = true;
        assert_eq!(swap_limit(&sample), 0);
        sample.is_v2 = false;
        (sample.stats.memory.limit, sample.stats.memory.swap_limit) = (u64::MAX, u64::MAX);
        assert_eq!(limit(swap_limit(&sample)), 0);
    }
}
