//! The metrics: name, help, labels and where the value is, in one place, so that none has the one without the other.

mod container;
mod pod;
mod values;

use berth_cri_api::v1;
use berth_cri_api::v1::MetricType;

pub(super) use container::CONTAINER;
pub(super) use pod::POD;
use values::Values;

use super::LABELS;
use super::sample::Sample;

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

/// Finds the values of one of a container's metrics.
pub(super) type OfContainer = fn(&Sample, &mut Values);

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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use berth_cgroup::{HugetlbStats, Pressure};

    use super::values::{limit, swap_limit};
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
