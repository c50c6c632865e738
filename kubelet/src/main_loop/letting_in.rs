//! Which of the wanted pods get a worker now: name and ports have to be free, their classes there, and the node has to have room.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::Main;
use crate::admission::{Rejection, admit, is_critical};
use crate::control::Ending;
use crate::metrics::families;
use crate::pod::{self, FullName, PodUid};
use crate::record::Weight;
use crate::saved_status::SavedStatus;
use crate::{classes, host_ports, preemption};

impl Main {
    /// The pod with what its classes give it; without a class that is not there.
    pub(super) fn with_classes(&self, pod: &Arc<Pod>) -> Arc<Pod> {
        classes::apply(pod, &self.executor.objects).map_or_else(|| pod.clone(), Arc::new)
    }

    /// Starts the queued pods whose name and UID are free. Before the first listing nobody knows which are: the runtime
    /// may have pods whose manifests went, or changed, while the kubelet was away.
    pub(super) fn start_queued(&mut self) {
        if !self.listed {
            return;
        }
        let mut queued: Vec<_> = std::mem::take(&mut self.queued).into_iter().collect();
        let age = |pod: &Pod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0);
        queued.sort_by_key(|(uid, pod)| (!self.present.contains(uid), age(pod)));
        for (uid, pod) in queued {
            let name = FullName::of(&pod);
            let taken = self.workers.contains_key(&uid) || self.workers.values().any(|h| h.name == name);
            let waits = |main: &mut Main| {
                main.lacks_class(&uid, &pod)
                    || main.lacks_port(&uid, &pod)
                    || main.waits_for_room(&uid, &pod)
                    || main.waits_for_allotment(&uid, &pod)
            };
            if taken || !self.was_over(&uid, &pod) && waits(self) {
                self.queued.insert(uid, pod);
            } else if !self.rejected.contains(&uid) {
                self.refused.remove(&uid);
                self.allotting.done.remove(&uid);
                self.spawn(uid, pod);
            }
        }
    }

    /// Whether the pod had ended before this kubelet: it asks for nothing.
    fn was_over(&self, uid: &PodUid, pod: &Pod) -> bool {
        let saved = SavedStatus::new(&self.executor.pod_dir(pod)).load();
        !self.fresh.contains(uid.as_str()) && saved.is_some_and(|saved| saved.is_over(self.present.contains(uid)))
    }

    /// Whether another pod has a port of the host that this one asks for; its status then says which. Beside a pod that stays it has
    /// failed; without a control plane nobody makes it again, so that it is let in when the port is free after all.
    fn lacks_port(&mut self, uid: &PodUid, pod: &Arc<Pod>) -> bool {
        let others: Vec<_> =
            self.workers.iter().filter(|(uid, _)| !host_ports::is_over(self.table.status(uid).as_ref())).collect();
        let taken = |stays: bool| {
            let ends = |uid, handle: &super::Handle| handle.ending || self.table.is_ending(uid);
            let others = others.iter().filter(|(uid, handle)| ends(uid, handle) != stays);
            host_ports::conflict(pod, others.map(|(_, handle)| &*handle.pod))
        };
        let (by_one_that_stays, by_one_that_ends) = (taken(true), taken(false));
        if let Some(message) = by_one_that_stays {
            if self.refused.get(uid) != Some(&message) {
                let rejection = host_ports::rejection(&message);
                self.tell_rejection(pod, &rejection);
                self.refuse(uid, pod, rejection.status(pod, self.executor.config.clock.now()), message);
            }
            return true;
        }
        let Some(message) = by_one_that_ends else { return false };
        self.refuse(uid, pod, host_ports::waiting(pod, message.clone()), message);
        true
    }

    /// Whether the pod's PriorityClass is missing: a cluster would not have taken the pod, here it waits for the class.
    fn lacks_class(&mut self, uid: &PodUid, pod: &Arc<Pod>) -> bool {
        let Some(message) = classes::problem(pod, &self.executor.objects) else { return false };
        let mut status = host_ports::waiting(pod, message.clone());
        status.reason = Some("PriorityClass".to_owned());
        self.refuse(uid, pod, status, message);
        true
    }

    pub(super) fn refuse(&mut self, uid: &PodUid, pod: &Arc<Pod>, mut status: PodStatus, message: String) {
        if self.refused.get(uid) != Some(&message) {
            // It is as old as the first time that it was seen.
            let first = self.table.status(uid).and_then(|before| before.start_time);
            let now = || Time(crate::observed::whole_second(self.executor.config.clock.now()));
            status.start_time = Some(first.unwrap_or_else(now));
            tracing::warn!(pod = %pod::format_pod(pod), "{message}: the pod waits");
            self.table.set(uid, pod, status);
            self.refused.insert(uid.clone(), message);
        }
    }

    /// Whether pods are being ended to make room for this one. One for which there is no room at all is rejected. What already runs has
    /// been let in before.
    fn waits_for_room(&mut self, uid: &PodUid, pod: &Arc<Pod>) -> bool {
        if self.present.contains(uid) {
            return false;
        }
        let active: Vec<(PodUid, Arc<Pod>)> = self
            .workers
            .iter()
            .filter(|(uid, _)| !host_ports::is_over(self.table.status(uid).as_ref()))
            .map(|(uid, handle)| (uid.clone(), handle.pod.clone()))
            .collect();
        let others: Vec<&Pod> = active.iter().map(|(_, pod)| &**pod).collect();
        let (node, max_pods) = (&self.executor.node, self.executor.config.max_pods);
        let Err(rejection) = admit(pod, &others, node, max_pods, self.conditions) else { return false };
        let victims = match rejection.missing && is_critical(pod) {
            true => preemption::victims(pod, &others, node, max_pods),
            false => None,
        };
        let Some(victims) = victims else {
            self.reject(uid, pod, &rejection);
            return false;
        };
        let victims: Vec<PodUid> = victims.into_iter().map(|i| active[i].0.clone()).collect();
        self.preempt(&victims);
        true
    }

    /// Ends pods to make room; what waits for it is looked at again when they have ended.
    fn preempt(&self, victims: &[PodUid]) {
        let message = "Preempted in order to admit critical pod";
        let ending = Ending {
            grace: None,
            reason: "Preempting".to_owned(),
            message: message.to_owned(),
            disruption: Some("Pod was preempted by Kubelet to accommodate a critical pod.".to_owned()),
        };
        for handle in victims.iter().filter_map(|uid| self.workers.get(uid)).filter(|handle| !handle.ending) {
            self.executor.recorder.event(&handle.pod, None, Weight::Warning, "Preempting", message);
        }
        let victims = victims.to_vec();
        let control = self.control.clone();
        tokio::spawn(async move {
            control.end(move |pod| PodUid::of(pod).filter(|uid| victims.contains(uid)).map(|_| ending.clone())).await;
            control.look_again();
        });
    }

    fn tell_rejection(&self, pod: &Pod, rejection: &Rejection) {
        self.executor.runtime.metrics().count(&families::ADMISSION_REJECTIONS, &[&rejection.reason]);
        self.executor.recorder.event(pod, None, Weight::Warning, &rejection.reason, &rejection.message);
    }

    pub(super) fn reject(&mut self, uid: &PodUid, pod: &Arc<Pod>, rejection: &Rejection) {
        self.tell_rejection(pod, rejection);
        self.table.set(uid, pod, rejection.status(pod, self.executor.config.clock.now()));
        self.rejected.insert(uid.clone());
    }

    /// Pods that waited or were rejected, and are wanted no more, leave the table.
    pub(super) fn forget_refusals(&mut self, wanted: &BTreeMap<PodUid, Arc<Pod>>) {
        let (workers, table) = (&self.workers, &self.table);
        let keep = |uid: &PodUid| {
            let wanted = wanted.contains_key(uid);
            if !wanted && !workers.contains_key(uid) {
                table.remove(uid);
            }
            wanted
        };
        self.refused.retain(|uid, _| keep(uid));
        self.rejected.retain(|uid| keep(uid));
    }
}
