//! Bounded, level-triggered waits: a test states what must become true and by when, never how long to sleep.

use std::num::NonZeroU32;
use std::time::{Duration, Instant};

/// Polls `condition` until it holds; false when `timeout` passed first. The condition is looked at once more at the end.
#[must_use = "a wait that ran out is a failure: assert on it"]
pub fn wait_until(timeout: Duration, mut condition: impl FnMut() -> bool) -> bool {
    wait_for(timeout, || condition().then_some(())).is_some()
}

/// How many times longer than elsewhere a bound is on this machine: `$BERTH_TEST_PATIENCE`, which an emulated one sets; 1 without it.
#[must_use]
pub fn patience() -> u32 {
    let Ok(factor) = std::env::var("BERTH_TEST_PATIENCE") else { return 1 };
    let factor: NonZeroU32 = factor.parse().expect("BERTH_TEST_PATIENCE is a whole number from 1 on");
    factor.get()
}

/// Polls `probe` until it yields a value; none when `timeout` (more where the processor is emulated) passed first.
#[must_use = "a wait that ran out is a failure: assert on it"]
pub fn wait_for<T>(timeout: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + timeout * patience();
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(value) = probe() {
            return Some(value);
        }
        let now = Instant::now();
        if now >= deadline {
            return None;
        }
        std::thread::sleep(pause.min(deadline - now));
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yields_the_value_as_soon_as_there_is_one() {
        let mut calls = 0;
        let value = wait_for(Duration::from_secs(5), || {
            calls += 1;
            (calls == 3).then_some(calls)
        });
        assert_eq!(value, Some(3));
    }

    #[test]
    fn gives_up_at_the_deadline() {
        let begun = Instant::now();
        assert!(!wait_until(Duration::from_millis(30), || false));
        assert!(begun.elapsed() >= Duration::from_millis(30));
    }
}
