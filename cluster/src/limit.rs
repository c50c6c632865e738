//! How often may be asked: a bucket of tokens that fills at a rate, as client-go's. Pure but for the waiting.

use std::sync::{Mutex, PoisonError};

use tokio::time::{Duration, Instant};

/// So many requests a second, and so many at once.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limit {
    /// Requests a second; 0 or less: no limit.
    pub per_second: f64,
    /// How many may come at once.
    pub burst: u32,
}

impl Limit {
    /// No limit at all.
    pub const NONE: Limit = Limit { per_second: 0.0, burst: 0 };
}

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

impl Bucket {
    /// Takes a token and says how long to wait for it: tokens may be owed.
    fn take(&mut self, limit: Limit, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = now;
        self.tokens = (self.tokens + passed * limit.per_second).min(f64::from(limit.burst.max(1))) - 1.0;
        Duration::from_secs_f64((-self.tokens).max(0.0) / limit.per_second)
    }
}

/// The bucket of one client.
#[derive(Debug)]
pub(crate) struct Limiter {
    limit: Limit,
    bucket: Mutex<Bucket>,
}

impl Limiter {
    pub(crate) fn new(limit: Limit) -> Limiter {
        Limiter { limit, bucket: Mutex::new(Bucket { tokens: f64::from(limit.burst.max(1)), at: Instant::now() }) }
    }

    /// Waits for this request's turn.
    pub(crate) async fn turn(&self) {
        if self.limit.per_second <= 0.0 {
            return;
        }
        let wait = self.bucket.lock().unwrap_or_else(PoisonError::into_inner).take(self.limit, Instant::now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_the_rate_counts() {
        let limit = Limit { per_second: 10.0, burst: 3 };
        let start = Instant::now();
        let mut bucket = Bucket { tokens: 3.0, at: start };
        let waits: Vec<u128> = (0..5).map(|_| bucket.take(limit, start).as_millis()).collect();
        assert_eq!(waits, [0, 0, 0, 100, 200]);
        // Two were owed; after a second it is full again.
        let later = start + Duration::from_secs(1);
        let waits: Vec<u128> = (0..4).map(|_| bucket.take(limit, later).as_millis()).collect();
        assert_eq!(waits, [0, 0, 0, 100]);
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_rate_nobody_waits() {
        let limiter = Limiter::new(Limit::NONE);
        let start = Instant::now();
        for _ in 0..1000 {
            limiter.turn().await;
        }
        assert_eq!(Instant::now(), start);
    }
}
