//! Exponential delays of crashing containers and failing pulls. Pure: the caller passes monotonic time in.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::ages;

/// First delay, greatest delay; an entry that was not used for twice the greatest delay starts afresh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackoffPolicy {
    /// The first delay.
    pub base: Duration,
    /// The greatest delay.
    pub max: Duration,
}

impl Default for BackoffPolicy {
    fn default() -> Self {
        BackoffPolicy { base: Duration::from_secs(10), max: Duration::from_secs(300) }
    }
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    delay: Duration,
    last_update: Instant,
}

/// An entry as it is kept over a restart of the kubelet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// The delay in force, in milliseconds.
    pub delay: u64,
    /// How long ago the last attempt was, in milliseconds.
    pub age: u64,
}

/// The delays of one pod, by key (container name, or image).
#[derive(Clone, Debug, Default)]
pub struct Backoff {
    policy: BackoffPolicy,
    entries: BTreeMap<String, Entry>,
}

/// An attempt that has to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// The delay that applies, as users are told.
    pub delay: Duration,
    /// When the attempt may be made.
    pub until: Instant,
}

impl Backoff {
    /// No delays yet.
    pub fn new(policy: BackoffPolicy) -> Backoff {
        Backoff { policy, entries: BTreeMap::new() }
    }

    /// Whether an attempt after a failure at `failed_at` has to wait longer than until `now`.
    pub fn check(&self, key: &str, failed_at: Instant, now: Instant) -> Option<Waiting> {
        let entry = self.entries.get(key)?;
        if self.expired(entry, failed_at) {
            return None;
        }
        let until = failed_at + entry.delay;
        (now < until).then_some(Waiting { delay: entry.delay, until })
    }

    /// Records that an attempt is being made after a failure at `failed_at`: the next delay doubles.
    pub fn advance(&mut self, key: &str, failed_at: Instant, now: Instant) {
        let delay = match self.entries.get(key) {
            Some(entry) if !self.expired(entry, failed_at) => (entry.delay * 2).min(self.policy.max),
            _ => self.policy.base.min(self.policy.max),
        };
        self.entries.insert(key.to_owned(), Entry { delay, last_update: now });
    }

    /// Forgets a key.
    pub fn forget(&mut self, key: &str) {
        self.entries.remove(key);
    }

    /// The entries as they are kept.
    pub fn kept(&self, now: Instant) -> BTreeMap<String, Kept> {
        let millis = |delay: Duration| u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        let kept = |entry: &Entry| Kept { delay: millis(entry.delay), age: ages::age(entry.last_update, now) };
        self.entries.iter().map(|(key, entry)| (key.clone(), kept(entry))).collect()
    }

    /// Goes on from what was kept.
    pub fn resume(&mut self, kept: BTreeMap<String, Kept>, now: Instant) {
        self.entries = kept
            .into_iter()
            .map(|(key, Kept { delay, age })| {
                let delay = Duration::from_millis(delay).min(self.policy.max);
                (key, Entry { delay, last_update: ages::before(now, age) })
            })
            .collect();
    }

    fn expired(&self, entry: &Entry, failed_at: Instant) -> bool {
        failed_at.saturating_duration_since(entry.last_update) > self.policy.max * 2
    }
}

/// A duration as the kubelet prints it: `10s`, `2m40s`, `5m0s`.
pub fn format_delay(delay: Duration) -> String {
    let secs = delay.as_secs();
    if secs == 0 {
        return format!("{}ms", delay.as_millis());
    }
    match (secs / 3600, secs / 60 % 60, secs % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s}s"),
        (h, m, s) => format!("{h}h{m}m{s}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_to_the_maximum_and_the_first_restart_is_free() {
        let mut backoff = Backoff::new(BackoffPolicy::default());
        let mut now = Instant::now();
        let mut delays = Vec::new();
        for _ in 0..8 {
            let failed = now;
            let waiting = backoff.check("c", failed, now);
            delays.push(waiting.map_or(0, |w| w.delay.as_secs()));
            if let Some(waiting) = waiting {
                now = waiting.until;
                assert_eq!(backoff.check("c", failed, now), None);
            }
            backoff.advance("c", failed, now);
            now += Duration::from_secs(1);
        }
        assert_eq!(delays, [0, 10, 20, 40, 80, 160, 300, 300]);
    }

    #[test]
    fn a_container_that_ran_for_more_than_ten_minutes_starts_afresh() {
        let mut backoff = Backoff::new(BackoffPolicy::default());
        let start = Instant::now();
        backoff.advance("c", start, start);
        backoff.advance("c", start, start);
        let soon = start + Duration::from_secs(600);
        assert_eq!(backoff.check("c", soon, soon).map(|w| w.delay.as_secs()), Some(20));
        let late = start + Duration::from_secs(601);
        assert_eq!(backoff.check("c", late, late), None);
        backoff.advance("c", late, late);
        assert_eq!(backoff.check("c", late, late).map(|w| w.delay.as_secs()), Some(10));
    }

    #[test]
    fn kept_delays_go_on_where_they_were() {
        let (mut backoff, start) = (Backoff::new(BackoffPolicy::default()), Instant::now());
        backoff.advance("c", start, start);
        backoff.advance("c", start, start);
        let later = start + Duration::from_secs(7);
        let mut resumed = Backoff::new(BackoffPolicy::default());
        resumed.resume(backoff.kept(later), later);
        assert_eq!(resumed.check("c", start, later), backoff.check("c", start, later));
        assert_eq!(resumed.kept(later)["c"], Kept { delay: 20_000, age: 7000 });
    }

    #[test]
    fn delays_are_printed_as_go_does() {
        for (secs, text) in [(10, "10s"), (160, "2m40s"), (300, "5m0s"), (3600, "1h0m0s")] {
            assert_eq!(format_delay(Duration::from_secs(secs)), text);
        }
        assert_eq!(format_delay(Duration::from_millis(50)), "50ms");
    }
}
