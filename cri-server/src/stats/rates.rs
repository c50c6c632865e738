//! Processor time as a rate: from the samples that the calls themselves take, shared by all of them.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Samples closer than this tell nothing: the last rate holds.
const APART: Duration = Duration::from_millis(500);
/// Who was not asked about for so long is gone, or its rate is a mean over too long a time.
const KEPT: Duration = Duration::from_secs(600);

struct Last {
    at: Instant,
    usage_ns: u64,
    rate: Option<u64>,
}

/// The last samples by cgroup.
#[derive(Default)]
pub(crate) struct Rates {
    last: Mutex<HashMap<String, Last>>,
}

impl Rates {
    /// Nanoseconds of processor time each second since the sample before; none for the first.
    pub(crate) fn rate(&self, cgroup: &str, usage_ns: u64, now: Instant) -> Option<u64> {
        let mut all = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(last) = all.get_mut(cgroup) else {
            all.retain(|_, last| now.saturating_duration_since(last.at) < KEPT);
            all.insert(cgroup.to_owned(), Last { at: now, usage_ns, rate: None });
            return None;
        };
        let passed = now.saturating_duration_since(last.at);
        if passed >= APART {
            let used = u128::from(usage_ns.saturating_sub(last.usage_ns)) * 1_000_000_000;
            let rate = u64::try_from(used / passed.as_nanos()).ok().filter(|_| passed < KEPT);
            *last = Last { at: now, usage_ns, rate };
        }
        last.rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_needs_two_samples_that_are_apart() {
        let (rates, start) = (Rates::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(rates.rate("/a", 100, at(0)), None);
        assert_eq!(rates.rate("/a", 999, at(10)), None);
        assert_eq!(rates.rate("/a", 2_000_000_100, at(2000)), Some(1_000_000_000));
        assert_eq!(rates.rate("/a", 2_100_000_100, at(2100)), Some(1_000_000_000), "too close: the last rate");
        assert_eq!(rates.rate("/a", 2_500_000_100, at(3000)), Some(500_000_000));
        assert_eq!(rates.rate("/b", 0, at(700_000)), None);
        assert_eq!(rates.last.lock().unwrap().len(), 1, "the old are forgotten");
    }
}
