//! Resources of running pods that change in place: given to the pod's worker when the node has room, kept back until then.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, PodStatus};

use super::{Main, Pending};
use crate::api::news;
use crate::host_ports;
use crate::pod::{self, PodUid};
use crate::record::Weight;
use crate::resize::{self, DEFERRED, Refusal};
use crate::worker::{Message, resize_summary};

impl Main {
    /// New versions of pods that run: those that ask for less first, they may be what the others wait for.
    pub(super) fn update(&mut self, mut updates: Vec<(PodUid, Arc<Pod>)>) {
        updates.sort_by_key(|(uid, wanted)| self.workers.get(uid).is_some_and(|handle| resize::grows(&handle.pod, wanted)));
        for (uid, wanted) in updates {
            let Some(handle) = self.workers.get(&uid) else { continue };
            if Arc::ptr_eq(handle.wanted(), &wanted) || *handle.wanted() == wanted {
                continue;
            }
            if !pod::is_static(&wanted)
                && let Some(lacking) = news(handle.wanted(), &wanted)
            {
                // It runs already: whoever changed it is told, and what can be done is done.
                let recorder = &self.executor.recorder;
                recorder.event(&wanted, None, Weight::Warning, "FailedNodeDeclaredFeaturesCheck", &lacking);
            }
            match resize::differs(&handle.pod, &wanted) && !pod::is_deleting(&wanted) {
                true => self.try_resize(&uid, wanted),
                false => self.allocate(&uid, wanted),
            }
        }
        self.retry_resizes();
    }

    /// What was deferred is looked at again.
    pub(super) fn retry_resizes(&mut self) {
        let waits = |(uid, handle): (&PodUid, &super::Handle)| {
            let pending = handle.pending.as_ref().filter(|p| p.refusal.reason == DEFERRED && !handle.ending)?;
            Some((uid.clone(), pending.wanted.clone()))
        };
        let waiting: Vec<_> = self.workers.iter().filter_map(waits).collect();
        for (uid, wanted) in waiting {
            self.try_resize(&uid, wanted);
        }
    }

    fn try_resize(&mut self, uid: &PodUid, wanted: Arc<Pod>) {
        let Some(handle) = self.workers.get(uid) else { return };
        let lives = |other: &PodUid| other != uid && !host_ports::is_over(self.table.status(other).as_ref());
        let others: Vec<&Pod> = self.workers.iter().filter(|(other, _)| lives(other)).map(|(_, h)| &*h.pod).collect();
        let (node, max_pods) = (&self.executor.node, self.executor.config.max_pods);
        match resize::judge(&wanted, &handle.pod, &others, node, max_pods, self.conditions) {
            Ok(()) => self.allocate(uid, wanted),
            Err(refusal) => self.keep_waiting(uid, wanted, refusal),
        }
    }

    fn allocate(&mut self, uid: &PodUid, wanted: Arc<Pod>) {
        if let Some(handle) = self.workers.get_mut(uid) {
            handle.pod = wanted.clone();
            handle.pending = None;
            let _ = handle.inbox.send(Message::Update(wanted));
        }
    }

    fn keep_waiting(&mut self, uid: &PodUid, wanted: Arc<Pod>, refusal: Refusal) {
        let Some(handle) = self.workers.get_mut(uid) else { return };
        let pending = Pending { wanted, refusal };
        if handle.pending.as_ref() == Some(&pending) {
            return;
        }
        let is_told = handle
            .pending
            .as_ref()
            .is_some_and(|before| before.refusal == pending.refusal && !resize::differs(&before.wanted, &pending.wanted));
        if !is_told {
            let Refusal { reason, message } = &pending.refusal;
            let text = format!("Pod resize {reason}: {}", resize_summary(&pending.wanted, Some(message)));
            self.executor.recorder.event(&pending.wanted, None, Weight::Warning, &format!("Resize{reason}"), &text);
        }
        // Labels, gates, images and added containers do not wait with it.
        let kept = resize::keep_resources(&pending.wanted, &handle.pod);
        if kept != *handle.pod {
            handle.pod = Arc::new(kept);
            let _ = handle.inbox.send(Message::Update(handle.pod.clone()));
        }
        handle.pending = Some(pending.clone());
        let _ = handle.inbox.send(Message::ResizePending(pending));
    }

    /// What a pod had been given before this kubelet, and why not more, where it waited.
    pub(super) fn resume_resize(wanted: &Arc<Pod>, saved: Option<&PodStatus>) -> (Arc<Pod>, Option<Pending>) {
        match saved.and_then(|status| resize::resume(wanted, status)) {
            Some((allocated, refusal)) => (Arc::new(allocated), Some(Pending { wanted: wanted.clone(), refusal })),
            None => (wanted.clone(), None),
        }
    }
}
