//! Statistics of the node, its pods and containers: the kernel's for the node, the runtime's for the rest, read when asked
//! for. Nothing is sampled while nobody asks; what walks folders is remembered for a minute.

pub mod node;
pub(crate) mod summary;
pub(crate) mod volumes;

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Samples closer than this tell nothing: the last rate holds.
const APART: Duration = Duration::from_millis(500);
/// A rate is no mean over a longer time.
const TOO_LONG: Duration = Duration::from_secs(600);

/// Processor time as a rate, from the samples that the questions themselves take.
#[derive(Debug, Default)]
pub(crate) struct Rate(Mutex<Option<(Instant, u64, Option<u64>)>>);

impl Rate {
    /// Nanoseconds of processor time each second since the sample before; none for the first.
    pub(crate) fn of(&self, usage_ns: u64, now: Instant) -> Option<u64> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let rate = match *last {
            None => None,
            Some((at, _, rate)) if now.saturating_duration_since(at) < APART => return rate,
            Some((at, usage, _)) => {
                let passed = now.saturating_duration_since(at);
                let used = u128::from(usage_ns.saturating_sub(usage)) * 1_000_000_000;
                u64::try_from(used / passed.as_nanos().max(1)).ok().filter(|_| passed < TOO_LONG)
            }
        };
        *last = Some((now, usage_ns, rate));
        rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_needs_two_samples_that_are_apart() {
        let (rate, start) = (Rate::default(), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(rate.of(100, at(0)), None);
        assert_eq!(rate.of(999, at(10)), None);
        assert_eq!(rate.of(2_000_000_100, at(2000)), Some(1_000_000_000));
        assert_eq!(rate.of(2_100_000_100, at(2100)), Some(1_000_000_000), "too close: the last rate");
        assert_eq!(rate.of(2_500_000_100, at(3000)), Some(500_000_000));
        assert_eq!(rate.of(9_500_000_100, at(900_000)), None, "too far apart");
    }
}
