//! Giving new pods what only one container can have, before they are let in: devices. One pod at a time, in the order
//! in which they would start; the calls of plugins run as a task and come back as an action.

use std::collections::BTreeSet;
use std::future::pending;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use tokio::task::JoinHandle;

use super::Main;
use crate::admission::Rejection;
use crate::devices::Refusal;
use crate::host_ports::{self, is_over};
use crate::pod::{self, PodUid};
use crate::resources::extended_resources;

/// Where the queued pods are with it.
#[derive(Debug, Default)]
pub(super) struct Allotting {
    running: Option<(PodUid, JoinHandle<Result<(), Refusal>>)>,
    /// Pods that have everything and have not been taken up yet.
    pub done: BTreeSet<PodUid>,
    /// Pods for which a plugin is still to come.
    waiting: BTreeSet<PodUid>,
    /// There are other devices than when the running one began.
    outdated: bool,
}

impl Allotting {
    /// What became of the running one; never where none runs.
    pub async fn next(&mut self) -> (PodUid, Result<(), Refusal>) {
        match &mut self.running {
            Some((uid, task)) => {
                let result = task.await.unwrap_or_else(|error| Err(Refusal::Fails(error.to_string())));
                (uid.clone(), result)
            }
            None => pending().await,
        }
    }

    /// Forgets pods that nobody wants any more.
    pub fn forget(&mut self, wanted: impl Fn(&PodUid) -> bool) {
        self.done.retain(&wanted);
        self.waiting.retain(&wanted);
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
    pub(super) fn waits_for_allotment(&mut self, uid: &PodUid, pod: &Arc<Pod>) -> bool {
        let asks = pod::all_containers(pod).any(|container| extended_resources(container).next().is_some());
        if !asks || self.present.contains(uid) || self.rejected.contains(uid) || self.allotting.done.contains(uid) {
            return false;
        }
        if self.allotting.running.is_none() && !self.allotting.waiting.contains(uid) {
            self.release_devices();
            self.allotting.outdated = false;
            let (devices, pod) = (self.executor.devices.clone(), pod.clone());
            self.allotting.running = Some((uid.clone(), tokio::spawn(async move { devices.allocate(&pod).await })));
        }
        true
    }

    pub(super) fn take_allotted(&mut self, uid: PodUid, result: Result<(), Refusal>) {
        self.allotting.running = None;
        if let Some(pod) = self.queued.get(&uid).cloned() {
            match result {
                Ok(()) => _ = self.allotting.done.insert(uid),
                Err(Refusal::Waits(message)) => {
                    let mut status = host_ports::waiting(&pod, message.clone());
                    status.reason = Some("UnexpectedAdmissionError".to_owned());
                    self.refuse(&uid, &pod, status, message);
                    if !self.allotting.outdated {
                        self.allotting.waiting.insert(uid);
                    }
                }
                Err(Refusal::Fails(why)) => {
                    let text = format!("Allocate failed due to {why}, which is unexpected");
                    self.reject(&uid, &pod, &Rejection::new("UnexpectedAdmissionError", text));
                    self.queued.remove(&uid);
                }
            }
        }
        self.start_queued();
    }

    /// Takes back the devices of pods that are over.
    pub(super) fn release_devices(&self) {
        if !self.listed || !self.all_sources_ready() {
            return;
        }
        self.executor.devices.retain(|uid| {
            let Some(uid) = PodUid::new(uid) else { return false };
            let runs = self.workers.contains_key(&uid) && !is_over(self.table.status(&uid).as_ref());
            runs || self.allotting.concerns(&uid) || self.queued.contains_key(&uid) && self.present.contains(&uid)
        });
    }
}
