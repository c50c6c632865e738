//! The wall clock as a value, and the time since the boot for what has to outlive the process. Timers and back-off use tokio's
//! (monotonic) clock; the wall clock only stamps statuses, so that a jump of it restarts nothing and ends nothing.

use std::fmt;
use std::fs;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use k8s_openapi::jiff::Timestamp;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// A point of the kernel's monotonic clock that means something to another process too.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uptime {
    /// The kernel's ID of the boot: points of two boots have nothing to do with each other.
    pub boot: String,
    /// Milliseconds of the clock that [`std::time::Instant`] reads.
    pub millis: u64,
}

/// Source of wall-clock time, and of the time since the boot.
#[derive(Clone)]
pub struct Clock {
    wall: Arc<dyn Fn() -> Timestamp + Send + Sync>,
    uptime: Arc<dyn Fn() -> Uptime + Send + Sync>,
}

impl Clock {
    /// A clock that asks `now` each time.
    pub fn from_fn(now: impl Fn() -> Timestamp + Send + Sync + 'static) -> Clock {
        // The boot does not change while a process lives.
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned();
        let uptime = move || {
            let since = clock_gettime(ClockId::Monotonic);
            let millis = since.tv_sec.saturating_mul(1000).saturating_add(since.tv_nsec / 1_000_000);
            Uptime { boot: boot.clone(), millis: u64::try_from(millis).unwrap_or(0) }
        };
        Clock { wall: Arc::new(now), uptime: Arc::new(uptime) }
    }

    /// The same clock on a machine that has been up for what `uptime` says.
    pub fn with_uptime(self, uptime: impl Fn() -> Uptime + Send + Sync + 'static) -> Clock {
        Clock { uptime: Arc::new(uptime), ..self }
    }

    /// The wall-clock time now.
    pub fn now(&self) -> Timestamp {
        (self.wall)()
    }

    /// The time since the boot.
    pub fn uptime(&self) -> Uptime {
        (self.uptime)()
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
