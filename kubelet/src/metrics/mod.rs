//! What the kubelet counts about itself, and how it is told: numbers in memory, text made for each question. Knows no server;
//! who measures something calls [`Metrics::count`] or [`Metrics::observe`] with a family of [`families`].

pub(crate) mod cadvisor;
pub(crate) mod calls;
pub mod certificates;
pub mod families;
pub(crate) mod own;
pub(crate) mod process;
pub(crate) mod resource;
pub(crate) mod text;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub use families::Family;
use text::Text;

/// The kubelet's own numbers; clones share them.
#[derive(Clone, Debug, Default)]
pub struct Metrics(Arc<Mutex<Families>>);

type Families = BTreeMap<&'static str, BTreeMap<Labels, Value>>;

type Labels = Vec<Box<str>>;

#[derive(Clone, Debug)]
enum Value {
    Count(u64),
    Spread { buckets: Box<[u64]>, count: u64, sum: f64 },
}

impl Metrics {
    fn lock(&self) -> MutexGuard<'_, Families> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more. The labels are the family's, in its order.
    pub fn count(&self, family: &'static Family, labels: &[&str]) {
        self.change(family, labels, |value| {
            if let Value::Count(count) = value {
                *count += 1;
            }
        });
    }

    /// So many now.
    pub fn set(&self, family: &'static Family, labels: &[&str], now: u64) {
        self.change(family, labels, |value| *value = Value::Count(now));
    }

    /// How long something took.
    pub fn observe(&self, family: &'static Family, labels: &[&str], took: Duration) {
        let seconds = took.as_secs_f64();
        self.change(family, labels, |value| {
            if let Value::Spread { buckets, count, sum } = value {
                let bounds = family.buckets.iter().zip(buckets.iter_mut());
                bounds.filter(|(bound, _)| seconds <= **bound).for_each(|(_, bucket)| *bucket += 1);
                *count += 1;
                *sum += seconds;
            }
        });
    }

    fn change(&self, family: &'static Family, labels: &[&str], change: impl FnOnce(&mut Value)) {
        debug_assert_eq!(labels.len(), family.labels.len(), "{}", family.name);
        let mut all = self.lock();
        let series = all.entry(family.name).or_default();
        let labels = labels.iter().map(|label| Box::from(*label)).collect();
        let new = || match family.buckets {
            [] => Value::Count(0),
            bounds => Value::Spread { buckets: vec![0; bounds.len()].into(), count: 0, sum: 0.0 },
        };
        change(series.entry(labels).or_insert_with(new));
    }

    /// Forgets the series whose labels are no longer of anything.
    pub(crate) fn retain(&self, family: &'static Family, keep: impl Fn(&[Box<str>]) -> bool) {
        if let Some(series) = self.lock().get_mut(family.name) {
            series.retain(|labels, _| keep(labels));
        }
    }

    /// Writes a family; one without labels is there from the start. A copy is written: who reads slowly must not hold up those
    /// who count.
    pub(crate) fn write(&self, family: &'static Family, out: &mut Text) {
        let series = self.lock().get(family.name).cloned();
        if series.as_ref().is_none_or(BTreeMap::is_empty) && !(family.labels.is_empty() && family.buckets.is_empty()) {
            return;
        }
        out.family(family.name, family.kind(), family.help);
        let Some(series) = series else { return out.sample(family.name, &[], 0) };
        for (values, value) in &series {
            let labels: Vec<(&str, &str)> = family.labels.iter().copied().zip(values.iter().map(AsRef::as_ref)).collect();
            match value {
                Value::Count(count) => out.sample(family.name, &labels, count),
                Value::Spread { buckets, count, sum } => out.spread(family, &labels, buckets, *count, *sum),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(metrics: &Metrics, family: &'static Family) -> String {
        let mut out = Text::whole();
        metrics.write(family, &mut out);
        out.into_string()
    }

    #[tokio::test]
    async fn a_client_that_stops_reading_holds_up_nobody_who_counts() {
        let metrics = Metrics::default();
        for n in 0..2000 {
            metrics.count(&families::OPERATIONS, &[&format!("operation_{n}")]);
        }
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        let (full, written) = (sender.clone(), metrics.clone());
        let later = tokio::time::Instant::now() + Duration::from_secs(60);
        let writer = tokio::task::spawn_blocking(move || written.write(&families::OPERATIONS, &mut Text::sent(sender, later).0));
        while full.capacity() > 0 {
            tokio::task::yield_now().await;
        }
        let counting = tokio::task::spawn_blocking(move || metrics.count(&families::STARTED_PODS, &[]));
        let counted = tokio::time::timeout(Duration::from_secs(10), counting).await;
        assert!(!writer.is_finished(), "nobody has read");
        drop(receiver);
        assert!(counted.is_ok(), "the count waits for the reader");
    }

    #[test]
    fn counts_and_times_are_written_as_prometheus_reads_them() {
        let metrics = Metrics::default();
        assert!(written(&metrics, &families::STARTED_PODS).ends_with("kubelet_started_pods_total 0\n"));
        assert_eq!(written(&metrics, &families::OPERATIONS), "", "which operations there are is not known before");
        metrics.count(&families::STARTED_PODS, &[]);
        metrics.count(&families::OPERATIONS, &["exec_sync"]);
        metrics.count(&families::OPERATIONS, &["exec_sync"]);
        assert_eq!(
            written(&metrics, &families::OPERATIONS).lines().collect::<Vec<_>>()[1..],
            [
                "# TYPE kubelet_runtime_operations_total counter",
                "kubelet_runtime_operations_total{operation_type=\"exec_sync\"} 2"
            ]
        );
        metrics.observe(&families::OPERATION_SECONDS, &["version"], Duration::from_millis(15));
        let text = written(&metrics, &families::OPERATION_SECONDS);
        for line in [
            "_bucket{operation_type=\"version\",le=\"0.005\"} 0",
            "_bucket{operation_type=\"version\",le=\"+Inf\"} 1",
            "_sum{operation_type=\"version\"} 0.015",
            "_count{operation_type=\"version\"} 1",
        ] {
            assert!(text.contains(&format!("kubelet_runtime_operations_duration_seconds{line}\n")), "{line}: {text}");
        }
        metrics.retain(&families::OPERATIONS, |labels| &*labels[0] != "exec_sync");
        assert_eq!(written(&metrics, &families::OPERATIONS), "");
    }
}
