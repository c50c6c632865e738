//! Shared content and who uses it: each user has a [`Pin`], and what has no pin is idle.
//!
//! Finding, placing and taking away happen under one lock, so that content that is being deleted is never found.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::reaper::Signal;

/// Content of one kind by key.
pub(crate) struct Pool<K: Ord + Clone, V> {
    slots: Mutex<BTreeMap<K, Slot<V>>>,
    signal: Arc<Signal>,
}

struct Slot<V> {
    value: Arc<V>,
    pins: usize,
}

/// Keeps one piece of content.
pub(crate) struct Pin<K: Ord + Clone, V> {
    pool: Arc<Pool<K, V>>,
    pub key: K,
    pub value: Arc<V>,
}

impl<K: Ord + Clone, V> Pool<K, V> {
    pub(crate) fn new(signal: Arc<Signal>) -> Arc<Self> {
        Arc::new(Pool { slots: Mutex::new(BTreeMap::new()), signal })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<K, Slot<V>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Content that is there.
    pub(crate) fn pin(self: &Arc<Self>, key: &K) -> Option<Pin<K, V>> {
        let mut slots = self.lock();
        let slot = slots.get_mut(key)?;
        slot.pins += 1;
        Some(Pin { pool: self.clone(), key: key.clone(), value: slot.value.clone() })
    }

    /// Content that is there, or that `make` puts there. `make` sees all other content and must be quick.
    pub(crate) fn place<E>(
        self: &Arc<Self>,
        key: K,
        make: impl FnOnce(&mut dyn Iterator<Item = &V>) -> Result<V, E>,
    ) -> Result<Pin<K, V>, E> {
        let mut slots = self.lock();
        if let Some(slot) = slots.get_mut(&key) {
            slot.pins += 1;
            return Ok(Pin { pool: self.clone(), key, value: slot.value.clone() });
        }
        let value = Arc::new(make(&mut slots.values().map(|slot| &*slot.value))?);
        slots.insert(key.clone(), Slot { value: value.clone(), pins: 1 });
        Ok(Pin { pool: self.clone(), key, value })
    }

    /// Takes idle content out; where `take` fails the content stays for another time. Returns how many were taken.
    pub(crate) fn take_idle(&self, mut take: impl FnMut(&K, &V) -> bool) -> usize {
        let mut slots = self.lock();
        let before = slots.len();
        slots.retain(|key, slot| slot.pins > 0 || !take(key, &slot.value));
        before - slots.len()
    }

    pub(crate) fn fold<T>(&self, start: T, mut each: impl FnMut(T, &K, &V) -> T) -> T {
        let mut total = start;
        for (key, slot) in self.lock().iter() {
            total = each(total, key, &slot.value);
        }
        total
    }
}

impl<K: Ord + Clone, V> Clone for Pin<K, V> {
    fn clone(&self) -> Self {
        if let Some(slot) = self.pool.lock().get_mut(&self.key) {
            slot.pins += 1;
        }
        Pin { pool: self.pool.clone(), key: self.key.clone(), value: self.value.clone() }
    }
}

impl<K: Ord + Clone, V> Drop for Pin<K, V> {
    fn drop(&mut self) {
        let mut slots = self.pool.lock();
        if let Some(slot) = slots.get_mut(&self.key) {
            slot.pins -= 1;
            if slot.pins == 0 {
                drop(slots);
                self.pool.signal.idle();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_content_without_pins_is_taken() {
        let pool: Arc<Pool<u8, &str>> = Pool::new(Signal::new());
        let one = pool.place(1, |_| Ok::<_, ()>("one")).unwrap();
        let again = pool.place(1, |_| Err(())).unwrap();
        assert_eq!(*again.value, "one");
        let two = pool.place(2, |others| Ok::<_, ()>(if others.count() == 1 { "two" } else { "?" })).unwrap();
        drop(two);
        drop(one);
        assert_eq!(pool.take_idle(|_, _| false), 0);
        let mut taken = Vec::new();
        pool.take_idle(|key, _| {
            taken.push(*key);
            true
        });
        assert_eq!(taken, [2]);
        assert!(pool.pin(&2).is_none());
        let third = again.clone();
        drop(again);
        assert_eq!(pool.take_idle(|_, _| true), 0);
        drop(third);
        assert_eq!(pool.take_idle(|_, _| true), 1);
    }
}
