//! Keeps the records: looks at what has changed a moment after it has, and writes that alone. Nothing is written while nothing changes,
//! but for the time of the last contact where pods go by it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::jiff::SignedDuration;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::record::{Kept, KeptPod, trim_node};
use super::store::{self, Write};
use super::{Offline, Pods, plan};

/// Changes come in bursts: a pod, its objects, its token.
const SETTLE: Duration = Duration::from_millis(500);
/// A write that failed is tried again after so long.
const AGAIN: Duration = Duration::from_secs(10);
/// The time of the last contact is written so often at most: limits of an age are hours, and flash wears.
const CONTACT: Duration = Duration::from_secs(3600);
/// How often it is looked whether it is due.
const CONTACT_LOOK: Duration = Duration::from_secs(300);

/// What is on disk, and where it comes from.
pub(super) struct Keeper {
    offline: Offline,
    written: Kept,
    /// Files that nobody has any more were removed.
    swept: bool,
    failing: bool,
}

impl Keeper {
    /// `written` is what is on disk.
    pub fn new(offline: Offline, written: Kept) -> Keeper {
        Keeper { offline, written, swept: false, failing: false }
    }

    /// Until `stop`; then the time of the last contact is written.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut pods = self.offline.pods.subscribe();
        // What came before this task counts too.
        pods.mark_changed();
        let mut node = self.offline.own.follow();
        let objects = self.offline.objects.clone();
        let mut contact_at = Instant::now() + CONTACT_LOOK;
        loop {
            let again = Instant::now() + AGAIN;
            tokio::select! {
                () = stop.cancelled() => break,
                Ok(()) = pods.changed() => {}
                Ok(()) = node.changed() => {}
                () = objects.changed() => {}
                () = sleep_until(again), if self.failing => {}
                () = sleep_until(contact_at) => {
                    contact_at = Instant::now() + CONTACT_LOOK;
                    self.write_contact().await;
                    continue;
                }
            }
            if stop.run_until_cancelled(sleep(SETTLE)).await.is_none() {
                break;
            }
            let current = pods.borrow_and_update().clone();
            node.borrow_and_update();
            if let Some(current) = current {
                self.look(&current).await;
            }
        }
        // What came in the last moment: a pod that was deleted in it would start again.
        let current = pods.borrow_and_update().clone();
        if let Some(current) = current {
            self.look(&current).await;
        }
        if let Some(contact) = self.offline.own.contact()
            && !self.written.pods.is_empty()
            && let Err(error) = self.offline.store.write(&Write::Contact(contact))
        {
            tracing::warn!(error = crate::execute::with_causes(&error), "the time of the last contact is not on record");
        }
    }

    /// Writes what differs from what is on disk.
    async fn look(&mut self, pods: &Pods) {
        let wanted = self.wanted(pods);
        let writes = store::plan_writes(&self.written, &wanted, self.offline.store.has_key());
        // What is sealed for a pod is not known without the key, and goes with it nevertheless.
        let gone = writes.iter().any(|write| matches!(write, Write::RemovePod(_)));
        self.write(writes).await;
        let is_due = !self.swept || (gone && !self.offline.store.has_key());
        if is_due && !self.failing {
            self.swept = true;
            let (store, kept) = (self.offline.store.clone(), self.written.clone());
            let _ = tokio::task::spawn_blocking(move || store.sweep(&kept)).await;
        }
    }

    /// What should be on disk: what is known now, and of what is not known yet what was known before.
    fn wanted(&self, pods: &Pods) -> Kept {
        let mut wanted = Kept { contact: self.offline.own.contact(), ..Kept::default() };
        wanted.node = match self.offline.own.current() {
            Some(node) => Some(Arc::new(trim_node(&node))),
            None => self.written.node.clone(),
        };
        let objects = &self.offline.objects;
        for (uid, pod) in pods {
            let before = self.written.pods.get(uid);
            wanted.pods.insert(uid.clone(), objects.kept_of(uid, pod, before));
        }
        let names = wanted.pods.values().flat_map(|pod: &KeptPod| pod.names.iter());
        let mut found = BTreeMap::new();
        for name in names {
            let now = objects.known(name).or_else(|| self.written.objects.get(name).cloned());
            if let Some(held) = now {
                found.insert(name.clone(), held);
            }
        }
        wanted.objects = found;
        let namespaces = pods.values().map(|pod| crate::pod::namespace(pod)).collect();
        wanted.services = objects.services_seen_from(&namespaces).or_else(|| self.written.services.clone());
        wanted
    }

    /// The time of the last contact alone, where any pod goes by it.
    async fn write_contact(&mut self) {
        let node = self.offline.settings.max_age;
        let limited = self.written.pods.values().any(|kept| plan::limit(&kept.pod, node).is_some());
        let Some(contact) = self.offline.own.contact().filter(|_| limited) else { return };
        let is_old = |before| contact.duration_since(before) >= SignedDuration::try_from(CONTACT).unwrap_or_default();
        if self.written.contact.is_none_or(is_old) {
            self.write(vec![Write::Contact(contact)]).await;
        }
    }

    async fn write(&mut self, writes: Vec<Write>) {
        let store = self.offline.store.clone();
        let done =
            tokio::task::spawn_blocking(move || writes.into_iter().map(|write| (store.write(&write), write)).collect::<Vec<_>>());
        let mut failed = None;
        for (result, write) in done.await.unwrap_or_default() {
            match result {
                Ok(()) => store::apply(&mut self.written, write),
                Err(error) => failed = Some(error),
            }
        }
        let was_failing = std::mem::replace(&mut self.failing, failed.is_some());
        if let Some(error) = failed.filter(|_| !was_failing) {
            let error = crate::execute::with_causes(&error);
            tracing::warn!(error, "the API server's pods are not all on record: after a restart without it some may not start");
        }
    }
}
