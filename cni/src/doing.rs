//! Which plugin runs for whom at this moment, and since when. Written by the chain, read by those who ask why something takes
//! long. Must not decide anything.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// One call of a plugin that has not ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Doing {
    /// The plugin's type.
    pub plugin: String,
    /// The network's name.
    pub network: String,
    /// The CNI command.
    pub verb: &'static str,
    /// Run by this process, not by a binary.
    pub in_process: bool,
    /// When it began.
    pub since: Instant,
    /// How long it may take: it is killed then. None for what runs in this process, which only waits for the kernel.
    pub limit: Option<Duration>,
}

#[derive(Debug, Default)]
struct Calls {
    next: u64,
    /// By container id.
    under_way: BTreeMap<(String, u64), Doing>,
}

/// The register of calls.
#[derive(Debug, Clone, Default)]
pub(crate) struct Underway(Arc<Mutex<Calls>>);

/// A call under way; dropping it ends it.
#[derive(Debug)]
pub(crate) struct Call {
    register: Underway,
    key: (String, u64),
}

impl Drop for Call {
    fn drop(&mut self) {
        self.register.lock().under_way.remove(&self.key);
    }
}

impl Underway {
    fn lock(&self) -> MutexGuard<'_, Calls> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call begins.
    pub(crate) fn begin(&self, container_id: &str, doing: Doing) -> Call {
        let mut calls = self.lock();
        calls.next += 1;
        let key = (container_id.to_owned(), calls.next);
        calls.under_way.insert(key.clone(), doing);
        drop(calls);
        Call { register: self.clone(), key }
    }

    /// What runs for a container, the oldest first.
    pub(crate) fn of(&self, container_id: &str) -> Vec<Doing> {
        let calls = self.lock();
        let first = (container_id.to_owned(), 0);
        let mine = calls.under_way.range(first..).take_while(|((id, _), _)| id == container_id);
        mine.map(|(_, doing)| doing.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_known_for_its_own_container_until_it_ends() {
        let register = Underway::default();
        let doing = Doing {
            plugin: "ptp".into(),
            network: "net".into(),
            verb: "DEL",
            in_process: false,
            since: Instant::now(),
            limit: Some(Duration::from_secs(60)),
        };
        let call = register.begin("a", doing.clone());
        assert_eq!((register.of("a"), register.of("aa")), (vec![doing], vec![]));
        drop(call);
        assert!(register.of("a").is_empty());
    }
}
