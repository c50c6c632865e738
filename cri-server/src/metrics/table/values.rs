//! How the values of metrics are found and counted, where that takes more than a field.

use berth_cgroup::{BlockIoEntry, PressureLine};

use super::SECOND;
use crate::metrics::sample::Sample;

/// The values of one metric, each with the labels of its own.
#[derive(Default)]
pub(in crate::metrics) struct Values(pub(super) Vec<(Vec<String>, u64)>);

impl Values {
    pub(super) fn one(&mut self, value: u64) {
        self.with([], value);
    }

    pub(super) fn with<const N: usize>(&mut self, labels: [String; N], value: u64) {
        self.0.push((labels.into(), value));
    }

    pub(super) fn disk(&mut self, sample: &Sample, value: Option<u64>) {
        value.into_iter().for_each(|value| self.with([sample.disk.device.clone()], value));
    }
}

pub(super) fn seconds(ns: i64) -> u64 {
    u64::try_from(ns).unwrap_or(0) / SECOND
}

/// A limit that was asked for.
pub(super) fn asked(value: i64) -> Option<u64> {
    u64::try_from(value).ok().filter(|value| *value != 0)
}

/// cAdvisor's way to say that there is no limit is 0.
pub(super) fn limit(value: u64) -> u64 {
    if value >= 1 << 60 { 0 } else { value }
}

pub(super) fn swap_limit(s: &Sample) -> u64 {
    let memory = &s.stats.memory;
    if s.is_v2 { memory.swap_limit } else { memory.swap_limit.saturating_add(memory.limit) }
}

pub(super) fn pressure(line: Option<&PressureLine>, out: &mut Values) {
    line.into_iter().for_each(|line| out.one(line.total_ns / SECOND));
}

/// The counters include the cgroups that the container made itself; for the container alone the same is told, as cAdvisor does on v2.
pub(super) fn page_faults(s: &Sample, out: &mut Values) {
    for (kind, value) in [("pgfault", s.stats.memory.page_faults), ("pgmajfault", s.stats.memory.major_page_faults)] {
        for scope in ["container", "hierarchy"] {
            out.with([kind.to_owned(), scope.to_owned()], value);
        }
    }
}

pub(super) fn ulimits(s: &Sample, out: &mut Values) {
    s.processes.soft_limit.into_iter().for_each(|value| out.with(["max_open_files".to_owned()], value));
}

/// The devices that were used; with none, the disk of the writable layers, which then was read and written 0 times.
pub(super) fn each_device(s: &Sample, mut tell: impl FnMut(&str, &BlockIoEntry)) {
    for entry in &s.stats.io.devices {
        tell(s.devices.get(&(entry.major, entry.minor)).map_or("unknown", String::as_str), entry);
    }
    if s.stats.io.devices.is_empty() && s.counts_io {
        tell(&s.disk.device, &BlockIoEntry { major: s.disk.major, minor: s.disk.minor, ..Default::default() });
    }
}

pub(super) fn devices(s: &Sample, out: &mut Values, value: fn(&BlockIoEntry) -> u64) {
    each_device(s, |device, entry| out.with([device.to_owned()], value(entry)));
}

pub(super) fn blkio(s: &Sample, out: &mut Values) {
    each_device(s, |device, entry| {
        for (operation, value) in [("Read", entry.read_bytes), ("Write", entry.write_bytes)] {
            out.with([device.to_owned(), entry.major.to_string(), entry.minor.to_string(), operation.to_owned()], value);
        }
    });
}
