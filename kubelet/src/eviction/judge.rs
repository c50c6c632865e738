//! Which thresholds count now. Pure but for its memory of when each was met: soft thresholds have to be met for a while, and the
//! node's conditions stay for a while. All times are monotonic.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::threshold::{Signal, Threshold};
use crate::admission::NodeConditions;

/// What a signal is, and what it could be at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Observation {
    /// What is left.
    pub available: i64,
    /// All there is.
    pub capacity: i64,
}

/// The signals that could be read.
pub type Observations = BTreeMap<Signal, Observation>;

/// A threshold that counts now.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Met {
    /// The threshold.
    pub threshold: Threshold,
    /// What was seen.
    pub seen: Observation,
}

impl Met {
    /// The threshold in units of the signal.
    pub fn quantity(&self) -> i64 {
        self.threshold.below.of(self.seen.capacity)
    }
}

/// What a round has found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Verdict {
    /// Thresholds that have to be answered, memory first.
    pub met: Vec<Met>,
    /// What the node says of itself.
    pub conditions: NodeConditions,
}

/// What is remembered from round to round.
#[derive(Clone, Debug, Default)]
pub struct Judge {
    /// Since when a threshold is met, by its place in the configuration.
    since: BTreeMap<usize, Instant>,
    /// When a condition was last true.
    pressure: BTreeMap<&'static str, Instant>,
}

impl Judge {
    /// Judges the signals of one round.
    pub fn round(&mut self, thresholds: &[Threshold], seen: &Observations, stays: Duration, now: Instant) -> Verdict {
        let mut met = Vec::new();
        for (place, threshold) in thresholds.iter().enumerate() {
            let Some(seen) = seen.get(&threshold.signal).copied() else { continue };
            let below = threshold.below.of(seen.capacity);
            // What was met is over when so much more is free as is to be reclaimed.
            let reclaim = threshold.reclaim.map_or(0, |quota| quota.of(seen.capacity));
            let over = below.saturating_add(if self.since.contains_key(&place) { reclaim } else { 0 });
            if seen.available >= over {
                self.since.remove(&place);
                continue;
            }
            let since = *self.since.entry(place).or_insert(now);
            if seen.available < below || threshold.grace.is_none() {
                self.pressure.insert(threshold.signal.condition(), now);
            }
            if threshold.grace.is_none_or(|grace| now.saturating_duration_since(since) >= grace) {
                met.push(Met { threshold: *threshold, seen });
            }
        }
        // Memory is what the machine cannot wait for.
        met.sort_by_key(|met| (met.threshold.signal.resource() != "memory", met.threshold.grace.is_some()));
        self.pressure.retain(|_, last| now.saturating_duration_since(*last) < stays);
        let is = |name: &str| self.pressure.contains_key(name);
        let conditions = NodeConditions {
            memory_pressure: is("MemoryPressure"),
            disk_pressure: is("DiskPressure"),
            pid_pressure: is("PIDPressure"),
            shutting_down: false,
        };
        Verdict { met, conditions }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eviction::threshold::Quota;

    fn threshold(signal: Signal, below: i64, grace: Option<u64>, reclaim: Option<i64>) -> Threshold {
        Threshold {
            signal,
            below: Quota::Amount(below),
            grace: grace.map(Duration::from_secs),
            reclaim: reclaim.map(Quota::Amount),
        }
    }

    fn seen(pairs: &[(Signal, i64)]) -> Observations {
        pairs.iter().map(|(signal, available)| (*signal, Observation { available: *available, capacity: 1000 })).collect()
    }

    const STAYS: Duration = Duration::from_secs(300);

    #[test]
    fn a_soft_threshold_counts_after_its_grace_and_a_hard_one_at_once() {
        let thresholds =
            [threshold(Signal::MemoryAvailable, 100, None, None), threshold(Signal::MemoryAvailable, 300, Some(60), None)];
        let (mut judge, start) = (Judge::default(), Instant::now());
        let mut met = |available: i64, at: u64| {
            let now = start + Duration::from_secs(at);
            judge.round(&thresholds, &seen(&[(Signal::MemoryAvailable, available)]), STAYS, now).met.len()
        };
        assert_eq!((met(500, 0), met(200, 10), met(200, 60), met(200, 70)), (0, 0, 0, 1));
        assert_eq!((met(400, 80), met(200, 90)), (0, 0), "it begins anew");
        assert_eq!(met(50, 100), 1, "hard");
    }

    #[test]
    fn what_is_met_is_over_when_enough_has_been_reclaimed() {
        let thresholds = [threshold(Signal::NodeFsAvailable, 100, None, Some(50))];
        let (mut judge, now) = (Judge::default(), Instant::now());
        let mut met =
            |available| !judge.round(&thresholds, &seen(&[(Signal::NodeFsAvailable, available)]), STAYS, now).met.is_empty();
        assert_eq!((met(120), met(90), met(120), met(150), met(120)), (false, true, true, false, false));
    }

    #[test]
    fn a_condition_stays_for_a_while_and_memory_comes_first() {
        let thresholds = [
            threshold(Signal::NodeFsAvailable, 100, None, None),
            threshold(Signal::PidAvailable, 100, None, None),
            threshold(Signal::MemoryAvailable, 100, None, None),
        ];
        let (mut judge, start) = (Judge::default(), Instant::now());
        let low = seen(&[(Signal::NodeFsAvailable, 1), (Signal::PidAvailable, 1), (Signal::MemoryAvailable, 1)]);
        let verdict = judge.round(&thresholds, &low, STAYS, start);
        assert_eq!(verdict.met[0].threshold.signal, Signal::MemoryAvailable);
        let all = NodeConditions { memory_pressure: true, disk_pressure: true, pid_pressure: true, shutting_down: false };
        assert_eq!(verdict.conditions, all);
        let fine = seen(&[(Signal::NodeFsAvailable, 900), (Signal::PidAvailable, 900), (Signal::MemoryAvailable, 900)]);
        let later = judge.round(&thresholds, &fine, STAYS, start + Duration::from_secs(299));
        assert_eq!((later.met.len(), later.conditions), (0, all));
        let later = judge.round(&thresholds, &fine, STAYS, start + Duration::from_secs(300));
        assert_eq!(later.conditions, NodeConditions::default());
    }

    #[test]
    fn signals_that_could_not_be_read_evict_nobody() {
        let thresholds = [threshold(Signal::ImageFsAvailable, 100, None, None)];
        assert_eq!(Judge::default().round(&thresholds, &Observations::new(), STAYS, Instant::now()), Verdict::default());
    }
}
