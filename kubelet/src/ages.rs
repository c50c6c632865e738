//! What the monotonic clock has measured of a pod, as it is kept beside the pod's status: how long it has been active, how long
//! its containers have run or been dead, how long they back off. A new kubelet counts on from it whatever the wall clock says.
//! Pure; [`crate::saved_status`] writes it.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::backoff::Kept;
use crate::clock::Uptime;

/// Ages in milliseconds, all at one point in time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Ages {
    /// When they were taken.
    pub at: Uptime,
    /// How long the pod has been on the node: its active deadline counts from there.
    pub active: u64,
    /// How long containers have run, by ID.
    pub running: BTreeMap<String, u64>,
    /// How long ago containers were first seen to have ended, by ID.
    pub exits: BTreeMap<String, u64>,
    /// Delays of crashing containers, by name.
    pub delays: BTreeMap<String, Kept>,
}

/// How long ago something was, for a record.
pub(crate) fn age(since: Instant, now: Instant) -> u64 {
    u64::try_from(now.saturating_duration_since(since).as_millis()).unwrap_or(u64::MAX)
}

/// When something was that is as old as a record says. The clock may be younger than that.
pub(crate) fn before(now: Instant, millis: u64) -> Instant {
    now.checked_sub(Duration::from_millis(millis)).unwrap_or(now)
}

impl Ages {
    /// The same ages now. Of another boot only the time is left that the pod was active in it: how long the machine was off nobody
    /// knows, and what ran or waited then does not any more.
    pub fn at(mut self, now: &Uptime) -> Ages {
        if self.at.boot.is_empty() || self.at.boot != now.boot {
            return Ages { at: now.clone(), active: self.active, ..Ages::default() };
        }
        let passed = now.millis.saturating_sub(self.at.millis);
        let waited = self.delays.values_mut().map(|kept| &mut kept.age);
        let lived = self.running.values_mut().chain(self.exits.values_mut()).chain([&mut self.active]);
        lived.chain(waited).for_each(|age| *age = age.saturating_add(passed));
        Ages { at: now.clone(), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ages() -> Ages {
        let one = |age| BTreeMap::from([("c".to_owned(), age)]);
        let delays = BTreeMap::from([("c".to_owned(), Kept { delay: 10_000, age: 4000 })]);
        Ages { at: uptime("a", 50_000), active: 1000, running: one(2000), exits: one(3000), delays }
    }

    fn uptime(boot: &str, millis: u64) -> Uptime {
        Uptime { boot: boot.into(), millis }
    }

    #[test]
    fn ages_grow_with_the_uptime_and_only_the_active_time_outlives_a_boot() {
        let later = ages().at(&uptime("a", 57_000));
        assert_eq!((later.active, later.running["c"], later.exits["c"]), (8000, 9000, 10_000));
        assert_eq!(later.delays["c"], Kept { delay: 10_000, age: 11_000 });
        let booted = ages().at(&uptime("b", 2000));
        assert_eq!(booted, Ages { at: uptime("b", 2000), active: 1000, ..Ages::default() });
    }

    #[test]
    fn the_kept_form_is_this_one() {
        let golden = r#"{"at":{"boot":"a","millis":50000},"active":1000,"running":{"c":2000},"exits":{"c":3000},"delays":{"c":{"delay":10000,"age":4000}}}"#;
        assert_eq!(serde_json::to_string(&ages()).unwrap(), golden);
        assert_eq!(serde_json::from_str::<Ages>(golden).unwrap(), ages());
        assert_eq!(serde_json::from_str::<Ages>("{}").unwrap(), Ages::default());
    }
}
