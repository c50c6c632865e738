//! Answers that hold for a while. Bounded: callers can send any number of different tokens.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// More than the distinct callers of a node; beyond it the oldest knowledge goes.
const ENTRIES: usize = 1024;

/// Remembered answers.
#[derive(Debug)]
pub(super) struct Cache<K, V>(Mutex<HashMap<K, (V, Instant)>>);

impl<K, V> Default for Cache<K, V> {
    fn default() -> Self {
        Cache(Mutex::default())
    }
}

impl<K: Eq + Hash + Clone, V: Clone> Cache<K, V> {
    /// The answer, unless it is too old.
    pub(super) fn get(&self, key: &K) -> Option<V> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(key).filter(|(_, until)| Instant::now() < *until).map(|(value, _)| value.clone())
    }

    /// Remembers an answer for so long.
    pub(super) fn put(&self, key: K, value: V, ttl: Duration) {
        if ttl.is_zero() {
            return;
        }
        let now = Instant::now();
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if all.len() >= ENTRIES {
            all.retain(|_, (_, until)| now < *until);
        }
        if all.len() >= ENTRIES
            && let Some(first) = all.iter().min_by_key(|(_, (_, until))| *until).map(|(key, _)| key.clone())
        {
            all.remove(&first);
        }
        all.insert(key, (value, now + ttl));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn answers_are_forgotten_in_time_and_are_never_too_many() {
        let cache = Cache::default();
        cache.put(0, 'a', Duration::from_secs(10));
        cache.put(-1, 'b', Duration::ZERO);
        assert_eq!((cache.get(&0), cache.get(&-1)), (Some('a'), None));
        tokio::time::advance(Duration::from_secs(11)).await;
        assert_eq!(cache.get(&0), None);
        for n in 0..5000 {
            cache.put(n, 'c', Duration::from_secs(60));
        }
        assert!(cache.0.lock().unwrap().len() <= ENTRIES);
        assert_eq!(cache.get(&4999), Some('c'));
    }
}
