//! The wall clock as a value. Timers and back-off use tokio's (monotonic) clock; the wall clock only stamps statuses,
//! so that a jump of it restarts nothing.

use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use k8s_openapi::jiff::Timestamp;

/// Source of wall-clock time.
#[derive(Clone)]
pub struct Clock(Arc<dyn Fn() -> Timestamp + Send + Sync>);

impl Clock {
    /// A clock that asks `now` each time.
    pub fn from_fn(now: impl Fn() -> Timestamp + Send + Sync + 'static) -> Clock {
        Clock(Arc::new(now))
    }

    /// The wall-clock time now.
    pub fn now(&self) -> Timestamp {
        (self.0)()
    }
}

impl Default for Clock {
    fn default() -> Self {
        Clock::from_fn(|| {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            Timestamp::from_nanosecond(i128::try_from(since.as_nanos()).unwrap_or(0)).unwrap_or(Timestamp::UNIX_EPOCH)
        })
    }
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Clock")
    }
}

/// A point in time as plans and statuses see it: both clocks, read once.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// Monotonic time, for delays.
    pub mono: tokio::time::Instant,
    /// Wall-clock time, for statuses.
    pub wall: Timestamp,
}
