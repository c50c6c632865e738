//! Giving new pods what only one container can have, before they are let in: devices, processors. One pod at a time, in the order
//! in which they would start; the calls of plugins run as a task and come back as an action.

use std::collections::BTreeSet;
use std::future::pending;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use tokio::task::JoinHandle;

use super::Main;
use super::letting_in::Verdict;
use crate::admission::Rejection;
use crate::cpus::Cpus;
use crate::devices::{Devices, Refusal};
use crate::host_ports::{self, is_over};
use crate::pod::{self, PodUid};
use crate::resources::extended_resources;

/// What comes of giving a pod what it asks for.
pub(super) type Allotment = Result<(), NotAllotted>;

/// Why a pod has not got what it asks for.
#[derive(Debug)]
pub(super) enum NotAllotted {
    /// A plugin is still to come.
    Waits(String),
    /// It cannot be done.
    Rejected(Rejection),
}

fn refused(why: &str) -> NotAllotted {
    let text = format!("Allocate failed due to {why}, which is unexpected");
    NotAllotted::Rejected(Rejection::new("UnexpectedAdmissionError", text))
}

async fn allot(devices: Devices, cpus: Cpus, pod: Arc<Pod>) -> Allotment {
    devices.allocate(&pod).await.map_err(|refusal| match refusal {
        Refusal::Waits(text) => NotAllotted::Waits(text),
        Refusal::Fails(why) => refused(&why),
    })?;
    let given = tokio::task::spawn_blocking(move || cpus.allocate(&pod)).await;
    given.map_err(|error| refused(&error.to_string()))?.map_err(NotAllotted::Rejected)
}

/// Where the queued pods are with it.
#[derive(Debug, Default)]
pub(super) struct Allotting {
    running: Option<(PodUid, JoinHandle<Allotment>)>,
    /// Pods that have everything and have not been taken up yet.
    pub done: BTreeSet<PodUid>,
    /// Pods for which a plugin is still to come.
    waiting: BTreeSet<PodUid>,
    /// Pods for which another one has to end first.
    behind: BTreeSet<PodUid>,
    /// There are other devices than when the running one began.
    outdated: bool,
}

impl Allotting {
    /// What became of the running one; never where none runs.
    pub async fn next(&mut self) -> (PodUid, Allotment) {
        match &mut self.running {
            Some((uid, task)) => {
                let result = task.await.unwrap_or_else(|error| Err(refused(&error.to_string())));
                (uid.clone(), result)
            }
            None => pending().await,
        }
    }

    /// Forgets pods that nobody wants any more.
    pub fn forget(&mut self, wanted: impl Fn(&PodUid) -> bool) {
        self.done.retain(&wanted);
        self.waiting.retain(&wanted);
        self.behind.retain(&wanted);
    }

    /// A pod may have ended: who waits for that is tried again.
    pub fn others_ended(&mut self) {
        self.behind.clear();
    }

    /// There are other devices than before: who waits is tried again.
    pub fn devices_changed(&mut self) {
        self.waiting.clear();
        self.outdated = true;
    }

    fn concerns(&self, uid: &PodUid) -> bool {
        self.done.contains(uid) || self.running.as_ref().is_some_and(|(running, _)| running == uid)
    }
}

impl Main {
    /// Whether the pod asks for devices and does not have them yet. What already runs has been given its own before.
    pub(super) fn waits_for_allotment(&mut self, uid: &PodUid, pod: &Arc<Pod>) -> Verdict {
        let asks = pod::all_containers(pod).any(|container| extended_resources(container).next().is_some());
        // What runs has its devices; processors it may have to be given, where they have not been managed before.
        let lacks = asks && !self.present.contains(uid) || self.executor.cpus.lacks(pod);
        if !lacks || self.allotting.done.contains(uid) {
            return Verdict::In;
        }
        let waits = self.allotting.waiting.contains(uid) || self.allotting.behind.contains(uid);
        if self.allotting.running.is_none() && !waits {
            self.release_allotments();
            self.allotting.outdated = false;
            let (devices, cpus) = (self.executor.devices.clone(), self.executor.cpus.clone());
            self.allotting.running = Some((uid.clone(), tokio::spawn(allot(devices, cpus, pod.clone()))));
        }
        Verdict::Waits
    }

    pub(super) fn take_allotted(&mut self, uid: PodUid, result: Allotment) {
        self.allotting.running = None;
        if let Some(pod) = self.queued.get(&uid).cloned() {
            match result {
                Ok(()) => _ = self.allotting.done.insert(uid),
                Err(NotAllotted::Rejected(rejection)) if self.present.contains(&uid) => {
                    tracing::warn!(pod = %pod::format_pod(&pod), "it runs, and goes on without: {}", rejection.message);
                    self.allotting.done.insert(uid);
                }
                Err(NotAllotted::Waits(_)) if self.present.contains(&uid) => _ = self.allotting.done.insert(uid),
                Err(NotAllotted::Waits(message)) => {
                    let mut status = host_ports::waiting(&pod, message.clone());
                    status.reason = Some("UnexpectedAdmissionError".to_owned());
                    self.refuse(&uid, &pod, status, message);
                    if !self.allotting.outdated {
                        self.allotting.waiting.insert(uid);
                    }
                }
                Err(NotAllotted::Rejected(rejection)) if self.ending_pod_holds(&pod) => {
                    self.wait_for_end(&uid, &pod, &rejection);
                    self.allotting.behind.insert(uid);
                }
                Err(NotAllotted::Rejected(rejection)) => {
                    self.reject(&uid, &pod, &rejection);
                    self.queued.remove(&uid);
                }
            }
        }
        self.start_queued();
    }

    /// Whether a pod that ends has devices of a kind that this one asks for: they are given back in a moment.
    fn ending_pod_holds(&self, pod: &Pod) -> bool {
        let kinds = |pod: &Pod| -> BTreeSet<String> {
            let all = pod::all_containers(pod);
            all.flat_map(|container| extended_resources(container).map(|(name, _)| name.to_owned())).collect()
        };
        let wanted = kinds(pod);
        self.ending_pods().any(|ending| !kinds(ending).is_disjoint(&wanted))
    }

    /// Takes back the devices and processors of pods that are over.
    pub(super) fn release_allotments(&self) {
        if !self.all_listed() {
            return;
        }
        let keep = |uid: &str| {
            let Some(uid) = PodUid::new(uid) else { return false };
            let runs = self.workers.contains_key(&uid) && !is_over(self.table.status(&uid).as_ref());
            runs || self.allotting.concerns(&uid) || self.queued.contains_key(&uid) && self.present.contains(&uid)
        };
        self.executor.devices.retain(keep);
        self.executor.cpus.retain(keep);
    }
}
