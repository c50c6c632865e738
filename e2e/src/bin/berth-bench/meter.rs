//! What a leg saw: samples by metric, costs by workload, failures; and its JSON.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::machine::Cost;

/// What a workload cost, for so many operations.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Spent {
    /// Operations, e.g. pods.
    pub operations: usize,
    /// CPU time of the side's processes per operation.
    pub side_ms: f64,
    /// CPU time of the whole machine per operation.
    pub machine_ms: f64,
    /// The whole stretch by the clock.
    pub wall_ms: f64,
}

/// One run of one side, as it is written.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Leg {
    /// The side.
    pub side: String,
    /// The round; 0 is the warm-up.
    pub round: u32,
    /// Which of its round: legs are read in the order of their file names.
    #[serde(default)]
    pub leg: u32,
    /// Tiny counts.
    pub quick: bool,
    /// How busy the machine was with other things before the leg.
    pub busy_percent: f64,
    /// Why the round does not count; empty when it does.
    pub failures: Vec<String>,
    /// Samples by metric.
    pub metrics: BTreeMap<String, Vec<f64>>,
    /// Costs by workload.
    pub costs: BTreeMap<String, Spent>,
}

/// Collects what a leg sees. Used by one thread.
#[derive(Debug, Default)]
pub struct Meter(RefCell<Leg>);

impl Meter {
    /// A meter for a leg.
    pub fn new(leg: Leg) -> Self {
        Self(RefCell::new(leg))
    }

    /// Adds a sample. Metrics of no workload (".StopContainer") are dropped: that work is done between the workloads.
    pub fn add(&self, metric: &str, value: f64) {
        if metric.starts_with('.') {
            return;
        }
        // Microseconds are enough, and keep the file small.
        let value = (value * 1e3).round() / 1e3;
        self.0.borrow_mut().metrics.entry(metric.to_owned()).or_default().push(value);
    }

    /// The least sample of a metric.
    pub fn min(&self, metric: &str) -> Option<f64> {
        self.0.borrow().metrics.get(metric)?.iter().copied().reduce(f64::min)
    }

    /// Awaits an operation and adds its duration in ms when it succeeds.
    pub async fn time<T, E>(&self, metric: &str, operation: impl Future<Output = Result<T, E>>) -> Result<T, E> {
        let begun = Instant::now();
        let result = operation.await;
        if result.is_ok() {
            self.add(metric, begun.elapsed().as_secs_f64() * 1e3);
        }
        result
    }

    /// Adds what a workload cost.
    pub fn spent(&self, workload: &str, operations: usize, cost: Cost) {
        let each = |ms: f64| (ms / operations.max(1) as f64 * 1e3).round() / 1e3;
        let spent =
            Spent { operations, side_ms: each(cost.side_ms), machine_ms: each(cost.machine_ms), wall_ms: cost.wall_ms.round() };
        self.0.borrow_mut().costs.insert(workload.to_owned(), spent);
    }

    /// Voids the round.
    pub fn fail(&self, reason: String) {
        eprintln!("void: {reason}");
        self.0.borrow_mut().failures.push(reason);
    }

    /// What was collected.
    pub fn into_leg(self) -> Leg {
        self.0.into_inner()
    }
}

/// The value below which a share of the samples lies; none of no samples.
pub fn quantile(values: &[f64], share: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    sorted.get((share * last as f64).round() as usize).copied()
}

/// The median: of an even number the mean of the two in the middle.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    let upper = sorted.get(half).copied()?;
    Some(if sorted.len() % 2 == 1 { upper } else { f64::midpoint(sorted[half - 1], upper) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_quantiles_of_few_and_of_no_samples() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0]), Some(2.0));
        assert_eq!(median(&[3.0, 1.0, 9.0]), Some(3.0));
        assert_eq!(quantile(&[1.0, 2.0, 3.0], 0.99), Some(3.0));
        assert_eq!(quantile(&[], 0.5), None);
    }
}
