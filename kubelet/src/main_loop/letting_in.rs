//! Which of the wanted pods get a worker now: name and ports have to be free, their classes there, and the node has to have room.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::{Main, second_look};
use crate::admission::{NODE_AFFINITY, Rejection, admit, is_critical};
use crate::api::refusal;
use crate::control::{Ending, Looked};
use crate::metrics::families;
use crate::observed::Listing;
use crate::pod::{self, FullName, PodUid};
use crate::record::Weight;
use crate::saved_status::SavedStatus;
use crate::source::{OFFLINE, SourceName, Withheld};
use crate::status::is_terminal_phase;
use crate::table::PodTable;
use crate::{classes, host_ports, preemption};

/// What one look at a queued pod comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing keeps it from its worker.
    In,
    /// It stays in the queue.
    Waits,
    /// It has failed, and nothing else is asked about it.
    Rejected,
}

impl Main {
    /// The pod with what its classes give it; without a class that is not there.
    pub(super) fn with_classes(&self, pod: &Arc<Pod>) -> Arc<Pod> {
        let objects = &self.executor.objects;
        if objects.is_admitted(pod) {
            return pod.clone();
        }
        classes::apply(pod, objects.local()).map_or_else(|| pod.clone(), Arc::new)
    }

    /// Starts the queued pods whose name and UID are free. Before a listing that their source was ready for nobody knows which are: the runtime
    /// may have pods whose manifests went, or changed, while the kubelet was away.
    pub(super) fn start_queued(&mut self) {
        let Some(listed) = &self.listed else { return };
        let is_listed = |pod: &Pod| SourceName::of(pod).is_none_or(|source| listed.contains(&source));
        let all = std::mem::take(&mut self.queued);
        let (mut queued, unlisted): (Vec<_>, Vec<_>) = all.into_iter().partition(|(_, pod)| is_listed(pod));
        self.queued.extend(unlisted);
        let age = |pod: &Pod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0);
        queued.sort_by_key(|(uid, pod)| (!self.present.contains(uid), age(pod)));
        for (uid, pod) in queued {
            match self.judge(&uid, &pod) {
                Verdict::Waits => _ = self.queued.insert(uid, pod),
                Verdict::Rejected => {}
                Verdict::In => {
                    self.refused.remove(&uid);
                    self.allotting.done.remove(&uid);
                    self.spawn(uid, pod);
                }
            }
        }
    }

    /// Whether the pod gets a worker. The first word against it is the last: for one that is rejected nobody is ended and nothing else is
    /// said. Ports come before room, so that no pod is ended for one that could not start for another reason.
    fn judge(&mut self, uid: &PodUid, pod: &Arc<Pod>) -> Verdict {
        if self.is_name_taken(uid, pod) {
            return Verdict::Waits;
        }
        if pod::is_deleting(pod) || self.was_over(uid, pod) {
            return Verdict::In;
        }
        let questions =
            [Main::lacks_feature, Main::lacks_class, Main::lacks_port, Main::waits_for_room, Main::waits_for_allotment];
        let verdicts = questions.into_iter().map(|asks| asks(self, uid, pod));
        verdicts.into_iter().find(|verdict| *verdict != Verdict::In).unwrap_or(Verdict::In)
    }

    /// Whether a worker has the pod's UID or name. A pod that has to wait for another one of its name says so.
    fn is_name_taken(&mut self, uid: &PodUid, pod: &Arc<Pod>) -> bool {
        if self.workers.contains_key(uid) {
            return true;
        }
        let name = FullName::of(pod);
        let Some((other, _)) = self.workers.iter().find(|(_, handle)| handle.name == name) else { return false };
        let is_news = !pod::is_static(pod) && !self.present.contains(uid);
        if is_news && !host_ports::is_over(self.table.status(other).as_ref()) {
            // Deleted by force most likely: the API server knows nothing of it any more.
            let message = format!("another pod of this name, with the UID {other}, has not ended yet");
            let mut status = host_ports::waiting(pod, message.clone());
            status.reason = Some("NameTaken".to_owned());
            self.refuse(uid, pod, status, message);
        }
        true
    }

    /// Pods that are not started before their source is heard again are told, by name. What runs of them stays; where it may, somebody
    /// looks after it.
    pub(super) fn judge_withheld(&mut self, listing: &Listing) {
        for (uid, Withheld { pod, why, runs_on }) in std::mem::take(&mut self.withheld) {
            match listing.get(uid.as_str()).is_some_and(|listed| listed.is_ready) {
                true if runs_on => _ = self.queued.insert(uid, pod),
                true => {
                    tracing::warn!(pod = %pod::format_pod(&pod), why, "the pod runs on and nobody looks after it before the API server is back")
                }
                false => {
                    let message = format!("The pod is not started while the API server is away: {why}");
                    self.executor.recorder.event(&pod, None, Weight::Warning, OFFLINE, &message);
                    let mut status = host_ports::waiting(&pod, message.clone());
                    status.reason = Some(OFFLINE.to_owned());
                    self.refuse(&uid, &pod, status, message);
                }
            }
        }
    }

    /// Whether the pod had ended before this kubelet: it asks for nothing.
    fn was_over(&self, uid: &PodUid, pod: &Pod) -> bool {
        if is_terminal_phase(pod.status.as_ref().and_then(|status| status.phase.as_deref())) {
            return true;
        }
        let saved = SavedStatus::new(&self.executor.pod_dir(pod)).load();
        !self.fresh.contains(uid.as_str()) && saved.is_some_and(|saved| saved.is_over(self.present.contains(uid)))
    }

    /// Whether another pod has a port of the host that this one asks for; its status then says which. Beside a pod that stays it has
    /// failed; without a control plane nobody makes it again, so that it is let in when the port is free after all.
    fn lacks_port(&mut self, uid: &PodUid, pod: &Arc<Pod>) -> Verdict {
        let others: Vec<_> =
            self.workers.iter().filter(|(uid, _)| !host_ports::is_over(self.table.status(uid).as_ref())).collect();
        let taken = |stays: bool| {
            let ends = |uid, handle: &super::Handle| handle.ending || self.table.is_ending(uid);
            let others = others.iter().filter(|(uid, handle)| ends(uid, handle) != stays);
            host_ports::conflict(pod, others.map(|(_, handle)| &*handle.pod))
        };
        let (by_one_that_stays, by_one_that_ends) = (taken(true), taken(false));
        if let Some(message) = by_one_that_stays.as_ref().filter(|_| !pod::is_static(pod)) {
            // Its controller makes another one.
            return self.reject(uid, pod, &host_ports::rejection(message));
        }
        if let Some(message) = by_one_that_stays {
            if self.refused.get(uid) != Some(&message) {
                let rejection = host_ports::rejection(&message);
                self.tell_rejection(pod, &rejection);
                self.refuse(uid, pod, rejection.status(pod, self.executor.config.clock.now()), message);
            }
            return Verdict::Waits;
        }
        let Some(message) = by_one_that_ends else { return Verdict::In };
        self.refuse(uid, pod, host_ports::waiting(pod, message.clone()), message);
        Verdict::Waits
    }

    /// Whether the pod of a cluster asks for what berth cannot do: it is rejected then. What a manifest asks for is judged where it is
    /// read, and what runs already has been let in.
    fn lacks_feature(&mut self, uid: &PodUid, pod: &Arc<Pod>) -> Verdict {
        if pod::is_static(pod) || self.present.contains(uid) {
            return Verdict::In;
        }
        match refusal(pod, &self.executor.config.allowed_unsafe_sysctls) {
            Some(rejection) => self.reject(uid, pod, &rejection),
            None => Verdict::In,
        }
    }

    /// Whether the pod's PriorityClass is missing: a cluster would not have taken the pod, here it waits for the class.
    fn lacks_class(&mut self, uid: &PodUid, pod: &Arc<Pod>) -> Verdict {
        let objects = &self.executor.objects;
        if objects.is_admitted(pod) {
            return Verdict::In;
        }
        let Some(message) = classes::problem(pod, objects.local()) else { return Verdict::In };
        let mut status = host_ports::waiting(pod, message.clone());
        status.reason = Some("PriorityClass".to_owned());
        self.refuse(uid, pod, status, message);
        Verdict::Waits
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
    fn waits_for_room(&mut self, uid: &PodUid, pod: &Arc<Pod>) -> Verdict {
        if self.present.contains(uid) {
            return Verdict::In;
        }
        let active: Vec<(PodUid, Arc<Pod>)> = self
            .workers
            .iter()
            .filter(|(uid, _)| !host_ports::is_over(self.table.status(uid).as_ref()))
            .map(|(uid, handle)| (uid.clone(), handle.pod.clone()))
            .collect();
        let others: Vec<&Pod> = active.iter().map(|(_, pod)| &**pod).collect();
        let (node, max_pods) = (self.executor.node.clone(), self.executor.config.max_pods);
        let Err(rejection) = admit(pod, &others, &node, max_pods, self.conditions) else {
            self.second_looks.forget(uid);
            return Verdict::In;
        };
        if rejection.is_by_node_object()
            && let Some(verdict) = self.look_twice(uid, pod)
        {
            return verdict;
        }
        if rejection.missing {
            let stay: Vec<&Pod> = active.iter().filter(|(uid, _)| !self.ends(uid)).map(|(_, pod)| &**pod).collect();
            if stay.len() < others.len() && admit(pod, &stay, &node, max_pods, self.conditions).is_ok() {
                // What ends gives its room back: nobody has to be ended for it, and the pod is not lost.
                self.wait_for_end(uid, pod, &rejection);
                return Verdict::Waits;
            }
        }
        let victims = match rejection.missing && is_critical(pod) {
            true => preemption::victims(pod, &others, &node, max_pods),
            false => None,
        };
        let Some(victims) = victims else { return self.reject(uid, pod, &rejection) };
        let victims: Vec<PodUid> = victims.into_iter().map(|i| active[i].0.clone()).collect();
        self.preempt(&victims);
        Verdict::Waits
    }

    /// Of a pod of the API that the node's labels or taints would refuse: whether it waits for a second look at the object. `None`: it has been
    /// looked, and the refusal stands.
    fn look_twice(&mut self, uid: &PodUid, pod: &Arc<Pod>) -> Option<Verdict> {
        let client = self.executor.config.api.as_ref().filter(|_| !pod::is_static(pod))?.client.clone();
        let (node, control) = (self.executor.node.clone(), self.control.clone());
        let begin = || second_look::begin(client, node.name.clone(), node.own.clone(), uid.clone(), control);
        match self.second_looks.outcome(uid, begin) {
            None => {
                if self.executor.node.own.current().is_none() {
                    let message = "the node's own object is not known: neither are its labels".to_owned();
                    let mut status = host_ports::waiting(pod, message.clone());
                    status.reason = Some(NODE_AFFINITY.to_owned());
                    self.refuse(uid, pod, status, message);
                }
                Some(Verdict::Waits)
            }
            // Nobody can say what the labels are: whoever bound the pod has seen them.
            Some(Looked::Unanswered) if self.executor.node.own.current().is_none() => Some(Verdict::In),
            Some(_) => {
                self.second_looks.forget(uid);
                None
            }
        }
    }

    /// Whether the pod of this worker is to end.
    fn ends(&self, uid: &PodUid) -> bool {
        self.workers.get(uid).is_some_and(|handle| handle.ending) || self.table.is_ending(uid)
    }

    /// The pods that end and still have what they were given.
    pub(super) fn ending_pods(&self) -> impl Iterator<Item = &Pod> {
        let ends = |uid: &PodUid| self.ends(uid) && !host_ports::is_over(self.table.status(uid).as_ref());
        self.workers.iter().filter(move |(uid, _)| ends(uid)).map(|(_, handle)| &*handle.pod)
    }

    /// The pod waits for what another one, which ends, still has.
    pub(super) fn wait_for_end(&mut self, uid: &PodUid, pod: &Arc<Pod>, rejection: &Rejection) {
        let message = format!("{}; a pod that has it ends", rejection.message);
        let mut status = host_ports::waiting(pod, message.clone());
        status.reason = Some(rejection.reason.clone());
        self.refuse(uid, pod, status, message);
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

    pub(super) fn reject(&mut self, uid: &PodUid, pod: &Arc<Pod>, rejection: &Rejection) -> Verdict {
        self.tell_rejection(pod, rejection);
        self.table.set(uid, pod, rejection.status(pod, self.executor.config.clock.now()));
        self.rejected.insert(uid.clone());
        Verdict::Rejected
    }

    /// Pods that waited or were rejected, and are wanted no more, leave the table.
    pub(super) fn forget_refusals(&mut self, is_wanted: impl Fn(&PodUid, &PodTable) -> bool) {
        let (workers, table) = (&self.workers, &self.table);
        let keep = |uid: &PodUid| {
            let wanted = is_wanted(uid, table);
            if !wanted && !workers.contains_key(uid) {
                table.remove(uid);
            }
            wanted
        };
        self.refused.retain(|uid, _| keep(uid));
        self.rejected.retain(|uid| keep(uid));
    }
}
