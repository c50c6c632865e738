//! What a pass has done: successes are remembered, failures become delays and reasons. Decides no steps.

use k8s_openapi::api::core::v1::{Container, Pod};
use tokio::time::Instant;

use super::Worker;
use crate::execute::{OpResult, PassResults};
use crate::memory::{Outdated, PullFailure, Reason, ResizeFailure};
use crate::observed::{Limits, PodObserved};
use crate::plan::PodOp;
use crate::pod;
use crate::record::Weight;
use crate::resources::container_resources;
use crate::volume::csi;

/// How `berth why` is told of a container that its postStart hook has ended.
const POST_START: &str = "postStart";

impl Worker {
    /// A pass has ended: takes note of what failed and looks again.
    pub(super) fn acted(&mut self, results: PassResults) {
        self.pass = None;
        self.memory.hooked.clear();
        self.passes += 1;
        self.dirty = true;
        let timing = self.executor.config.timing;
        let now = Instant::now();
        for (op, result) in results {
            if result != OpResult::Done && result != OpResult::Cancelled {
                // What failed is tried again, however alike the plan is.
                self.last_ops.clear();
            }
            match result {
                OpResult::Done => self.succeeded(op),
                OpResult::Cancelled => self.last_ops.clear(),
                OpResult::StartFailed(reason) => self.start_failed(op, reason, now),
                OpResult::PullFailed { image, reason, pulled } => self.pull_failed(op, image, reason, pulled, now),
                OpResult::PodFailed(reason) => {
                    let again = matches!(op, PodOp::RemoveContainer { .. } | PodOp::RemoveSandbox { .. });
                    if again {
                        tracing::warn!(pod = %pod::format_pod(&self.pod), reason = reason.reason, "{}", reason.message);
                    } else {
                        self.warn(None, &reason.reason, &reason.message);
                    }
                    self.memory.pod_error = Some(reason);
                    self.hold = Some(now + timing.retry);
                }
                OpResult::Outdated { reason, usable } => {
                    self.warn(None, &reason.reason, &reason.message);
                    self.memory.pod_error = Some(reason);
                    self.memory.outdated = Some(Outdated { until: now + timing.retry, usable });
                }
                OpResult::NetworkNotReady(text) => {
                    if self.memory.pod_error.as_ref().is_none_or(|e| e.message != text) {
                        self.warn(None, "NetworkNotReady", &text);
                    }
                    self.memory.pod_error = Some(Reason::new("NetworkNotReady", text));
                    self.hold = Some(now + timing.network_retry);
                }
            }
        }
    }

    fn succeeded(&mut self, op: PodOp) {
        match op {
            PodOp::Prepare => {
                self.memory.prepared = !self.stale;
                let executor = &self.executor;
                let again = csi::is_republished(&executor.pod_dir(&self.pod), executor.objects.of(&self.pod));
                self.republish = again.then(|| Instant::now() + executor.config.timing.republish);
                self.memory.released = false;
                if self.memory.outdated.take().is_some() {
                    self.memory.pod_error = None;
                }
                if self.stale {
                    self.last_ops.clear();
                }
            }
            PodOp::Release { .. } => {
                self.memory.released = true;
                self.memory.prepared = false;
            }
            PodOp::CreateSandbox { .. } => (self.memory.pod_error, self.memory.outdated) = (None, None),
            PodOp::KeepEnd => self.memory.end_kept = true,
            PodOp::StartContainer { name, .. } => {
                self.memory.reasons.remove(&name);
                self.memory.holds.remove(&name);
                if self.resizing.remove(&name) {
                    self.tell_resized();
                }
                if let Some(image) = self.container(&name).and_then(|c| c.image.clone()) {
                    self.memory.pull_failures.remove(&image);
                    self.memory.pulls.forget(&image);
                }
            }
            PodOp::PostStart { name, .. } => {
                self.memory.unfinished_hooks.remove(&name);
                self.memory.reasons.remove(&name);
            }
            PodOp::Pin { id, cpus } => {
                self.memory.pin_failures.remove(&id);
                self.memory.pinned.insert(id, cpus);
            }
            PodOp::Resize { id, name } => {
                self.memory.resize_failures.remove(&id);
                self.note_resize(id, &name);
                self.tell_resized();
            }
            _ => {}
        }
    }

    fn tell_resized(&self) {
        let message = format!("Pod resize completed: {}", resize_summary(&self.pod, None));
        self.executor.recorder.event(&self.pod, None, Weight::Normal, "ResizeCompleted", &message);
    }

    fn warn(&self, container: Option<&str>, reason: &str, message: &str) {
        self.executor.recorder.event(&self.pod, container, Weight::Warning, reason, message);
    }

    /// Tells once of each container that has to wait before it is tried again.
    pub(super) fn tell_waiting(&self, name: &str, waiting: &Reason) {
        if self.memory.reasons.get(name).is_some_and(|before| before.reason == waiting.reason) {
            return;
        }
        match waiting.reason.as_str() {
            "CrashLoopBackOff" => {
                let message = format!("Back-off restarting failed container {name} in pod {}", pod::format_pod(&self.pod));
                self.warn(Some(name), "BackOff", &message);
            }
            "ImagePullBackOff" => {
                // The status alone has what follows the image's name.
                let image = waiting.message.split(": ").next().unwrap_or_default();
                self.executor.recorder.event(&self.pod, Some(name), Weight::Normal, "BackOff", image);
                self.warn(Some(name), "Failed", "Error: ImagePullBackOff");
            }
            _ => {}
        }
    }

    pub(super) fn container(&self, name: &str) -> Option<&Container> {
        let all = pod::init_containers(&self.pod).iter().chain(&pod::spec(&self.pod).containers);
        all.into_iter().find(|c| c.name == name)
    }

    fn note_resize(&mut self, id: String, name: &str) {
        let capacity = &self.executor.node.capacity;
        let limits = self.container(name).map(|c| Limits::from(&container_resources(&self.pod, c, capacity)));
        if let Some(limits) = limits {
            self.memory.resized.insert(id, limits);
        }
    }

    /// Whose run a failed postStart hook has ended: told for as long as there is a record of it, as a probe's verdict is.
    pub(super) fn note_hook_failures(&mut self, observed: &PodObserved) {
        let found = |name: &str, attempt| observed.containers.iter().find(|c| c.name == name && c.attempt == attempt);
        self.hook_failures.retain(|name, attempt| match found(name, *attempt) {
            Some(record) => {
                self.memory.condemned.insert(record.id.clone(), POST_START);
                false
            }
            None => true,
        });
    }

    fn start_failed(&mut self, op: PodOp, reason: Reason, now: Instant) {
        let name = match op {
            PodOp::StartContainer { name, attempt, .. } => {
                if reason.reason == "PostStartHookError" {
                    self.hook_failures.insert(name.clone(), attempt);
                }
                name
            }
            PodOp::PostStart { id, name } => {
                self.memory.unfinished_hooks.remove(&name);
                self.memory.condemned.insert(id, POST_START);
                name
            }
            PodOp::Pin { id, cpus } => {
                tracing::warn!(pod = %pod::format_pod(&self.pod), %id, cpus, "not moved to its processors: {}", reason.message);
                self.memory.pin_failures.insert(id, now + self.executor.config.cpu_manager.reconcile);
                return;
            }
            PodOp::Resize { id, .. } => {
                let message = format!("Pod resize error: {}", resize_summary(&self.pod, Some(&reason.message)));
                self.warn(None, "ResizeError", &message);
                let until = now + self.executor.config.timing.retry;
                self.memory.resize_failures.insert(id, ResizeFailure { until, message: reason.message });
                return;
            }
            _ => return,
        };
        match reason.reason.as_str() {
            // Their own events have been made.
            "PostStartHookError" => {}
            own @ ("ErrImageNeverPull" | "InspectFailed") => {
                self.warn(Some(&name), own, &reason.message);
                self.warn(Some(&name), "Failed", &format!("Error: {own}"));
            }
            "InvalidImageName" => self.warn(Some(&name), "InspectFailed", &reason.message),
            _ => self.warn(Some(&name), "Failed", &format!("Error: {}", reason.message)),
        }
        // A container that ran, or tried to, leaves a record and backs off by it.
        if !matches!(reason.reason.as_str(), "RunContainerError" | "PostStartHookError") {
            self.memory.holds.insert(name.clone(), now + self.executor.config.timing.retry);
        }
        self.memory.reasons.insert(name, reason);
    }

    fn pull_failed(&mut self, op: PodOp, image: String, reason: Reason, pulled: bool, now: Instant) {
        let PodOp::StartContainer { name, .. } = op else { return };
        if !pulled {
            if let Some(failure) = self.memory.pull_failures.get_mut(&image) {
                failure.checked_at = now;
            }
            return;
        }
        self.warn(Some(&name), "Failed", &format!("Failed to pull image {image:?}: {}", reason.message));
        self.warn(Some(&name), "Failed", &format!("Error: {}", reason.reason));
        self.memory.pulls.advance(&image, now, now);
        if self.container(&name).is_none_or(|c| c.image.as_deref() != Some(&image)) {
            // An image volume's: the container's own back-off does not know of it.
            self.memory.holds.insert(name.clone(), now + self.executor.config.timing.retry);
        }
        self.memory.pull_failures.insert(image, PullFailure { failed_at: now, checked_at: now, reason: reason.clone() });
        self.memory.reasons.insert(name, reason);
    }
}

/// What a pod's events say of its new resources.
pub(crate) fn resize_summary(pod: &Pod, error: Option<&str>) -> String {
    let entry = |c: &Container| serde_json::json!({ "name": c.name, "resources": c.resources });
    let mut summary = serde_json::Map::new();
    let sidecars: Vec<_> = pod::sidecars(pod).map(entry).collect();
    if !sidecars.is_empty() {
        summary.insert("initContainers".to_owned(), sidecars.into());
    }
    summary.insert("containers".to_owned(), pod::spec(pod).containers.iter().map(entry).collect());
    if let Some(generation) = pod.metadata.generation {
        summary.insert("generation".to_owned(), generation.into());
    }
    if let Some(error) = error {
        summary.insert("error".to_owned(), error.into());
    }
    serde_json::Value::Object(summary).to_string()
}
