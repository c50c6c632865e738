//! The stop of containers: preStop hooks, the order of sidecars, and what of the grace is left for each.

use berth_cri_api::v1 as cri;
use futures::future::join_all;
use k8s_openapi::api::core::v1::{Container, LifecycleHandler, Pod};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Executor, OpResult};
use crate::cri as calls;
use crate::memory::Reason;
use crate::observed::{PodObserved, State};
use crate::plan::PodOp;
use crate::pod;
use crate::record::Weight;
use crate::{hook_record, hooks};

/// What a container gets at least between SIGTERM and SIGKILL after its hook or its turn took of the grace: the upstream's minimum.
const LEAST_GRACE: i64 = 2;

/// Seconds between SIGTERM and SIGKILL, after so much of the grace. The upstream gives two seconds to those with a grace of one too; who asks for
/// one gets one here.
fn left_of(grace: i64, used: Duration) -> i64 {
    match i64::try_from(used.as_secs()).unwrap_or(i64::MAX) {
        0 => grace.max(1),
        used => grace.saturating_sub(used).max(LEAST_GRACE),
    }
}

/// One stop of a batch.
struct Stop<'a> {
    id: &'a str,
    name: &'a str,
    grace: i64,
    stage: usize,
    message: &'a str,
    over: CancellationToken,
}

impl Executor {
    /// Stops containers stage by stage. Their hooks begin at once: the grace is the pod's, not each stage's.
    pub(super) async fn stop_containers(
        &self,
        batch: &[PodOp],
        pod: &Arc<Pod>,
        observed: &PodObserved,
        cancel: &CancellationToken,
    ) -> Vec<OpResult> {
        let stops: Vec<Stop<'_>> = batch
            .iter()
            .filter_map(|op| match op {
                PodOp::StopContainer { id, name, grace, stage, message } => {
                    Some(Stop { id, name, grace: *grace, stage: *stage, message, over: CancellationToken::new() })
                }
                _ => None,
            })
            .collect();
        let run = stops.iter().map(|stop| async {
            let _over = stop.over.clone().drop_guard();
            let begun = Instant::now();
            let work = async {
                let container = Some(stop.name).filter(|name| pod::container(pod, name).is_some());
                self.recorder.event(pod, container, Weight::Normal, "Killing", stop.message);
                self.run_pre_stop(stop, pod, observed).await;
                for earlier in stops.iter().filter(|other| other.stage < stop.stage) {
                    earlier.over.cancelled().await;
                }
                self.runtime.stop_container(stop.id, left_of(stop.grace, begun.elapsed())).await
            };
            tokio::select! {
                stopped = work => match stopped {
                    Ok(()) => OpResult::Done,
                    Err(e) => {
                        let text = format!("error killing pod: {}", calls::message(&e));
                        OpResult::PodFailed(Reason::new("FailedKillPod", text))
                    }
                },
                () = cancel.cancelled() => OpResult::Cancelled,
            }
        });
        join_all(run).await
    }

    /// Runs the preStop hook of a container that is to stop.
    async fn run_pre_stop(&self, stop: &Stop<'_>, pod: &Pod, observed: &PodObserved) {
        let Some(record) = observed.containers.iter().find(|c| c.id == stop.id && c.state == State::Running) else { return };
        // Of one whose spec is lost there may be the name, but no image.
        let spec = pod::all_containers(pod).find(|c| c.name == stop.name && c.image.is_some());
        let own = spec.and_then(|c| c.lifecycle.as_ref()?.pre_stop.clone());
        // Of a pod whose spec is lost the container itself tells.
        let told = || serde_json::from_str::<LifecycleHandler>(record.pre_stop.as_deref()?).ok();
        let Some(handler) = own.or_else(|| if spec.is_none() { told() } else { None }) else { return };
        let bare = Container { name: stop.name.to_owned(), ..Container::default() };
        let ip = self.pod_ip(pod, observed);
        let subject = hooks::Subject { pod, container: spec.unwrap_or(&bare), id: stop.id, ip };
        self.pre_stop(&handler, &subject, stop.grace).await;
    }

    /// Runs a preStop hook, for at most the whole grace; without any grace there is none. A failure is told and changes nothing.
    async fn pre_stop(&self, handler: &LifecycleHandler, subject: &hooks::Subject<'_>, grace: i64) {
        if grace <= 0 {
            return;
        }
        let limit = Duration::from_secs(u64::try_from(grace).unwrap_or(0));
        let hook = hooks::run(handler, subject, &self.runtime, &self.recorder);
        let failure = match tokio::time::timeout(limit, hook).await {
            Ok(Ok(())) => return,
            Ok(Err(text)) => text,
            Err(_) => format!("the grace of {grace} s is over"),
        };
        let name = &subject.container.name;
        tracing::warn!(pod = %pod::format_pod(subject.pod), container = name, "{failure}");
        self.recorder.event(subject.pod, Some(name), Weight::Warning, "FailedPreStopHook", "PreStopHook failed");
    }

    /// The address that hooks of the pod ask.
    pub(super) fn pod_ip(&self, pod: &Pod, observed: &PodObserved) -> Option<std::net::IpAddr> {
        let ips = match pod::is_host_network(pod) {
            true => Some(&self.node.host_ips),
            false => observed.sandbox().map(|sandbox| &sandbox.ips),
        };
        ips?.first()?.parse().ok()
    }

    /// Runs the postStart hook of a container that has just been started; where it fails the container is killed.
    pub(super) async fn post_start(
        &self,
        pod: &Pod,
        container: &Container,
        id: &str,
        observed: &PodObserved,
        cancel: &CancellationToken,
    ) -> Result<(), OpResult> {
        let Some(handler) = container.lifecycle.as_ref().and_then(|l| l.post_start.as_ref()) else { return Ok(()) };
        let subject = hooks::Subject { pod, container, id, ip: self.pod_ip(pod, observed) };
        let outcome = tokio::select! {
            outcome = hooks::run(handler, &subject, &self.runtime, &self.recorder) => outcome,
            () = cancel.cancelled() => return Err(OpResult::Cancelled),
        };
        hook_record::end(&self.pod_dir(pod), &container.name);
        let Err(text) = outcome else { return Ok(()) };
        tracing::warn!(pod = %pod::format_pod(pod), container = container.name, "{text}");
        self.recorder.event(pod, Some(&container.name), Weight::Warning, "FailedPostStartHook", "PostStartHook failed");
        self.kill_failed(&subject, cancel).await;
        Err(OpResult::StartFailed(Reason::new("PostStartHookError", text)))
    }
}

impl Executor {
    /// Runs the postStart hook of a container that runs since before this kubelet did.
    pub(super) async fn post_start_again(
        &self,
        pod: &Pod,
        name: &str,
        id: &str,
        observed: &PodObserved,
        cancel: &CancellationToken,
    ) -> OpResult {
        let Some(container) = pod::all_containers(pod).find(|c| c.name == name) else { return OpResult::Done };
        tracing::info!(pod = %pod::format_pod(pod), container = name, "the postStart hook was cut off: it runs again");
        self.post_start(pod, container, id, observed, cancel).await.map_or_else(|result| result, |()| OpResult::Done)
    }

    /// Ends a container whose postStart hook has failed, its preStop hook included.
    async fn kill_failed(&self, subject: &hooks::Subject<'_>, cancel: &CancellationToken) {
        let hooks::Subject { pod, container, id, .. } = *subject;
        self.recorder.event(pod, Some(&container.name), Weight::Normal, "Killing", "FailedPostStartHook");
        let grace = pod::grace_seconds(pod);
        let begun = Instant::now();
        if let Some(handler) = container.lifecycle.as_ref().and_then(|l| l.pre_stop.as_ref()) {
            tokio::select! {
                () = self.pre_stop(handler, subject, grace) => {}
                // The pod ends: its own stop runs the hook.
                () = cancel.cancelled() => return,
            }
        }
        if let Err(e) = self.runtime.stop_container(id, left_of(grace, begun.elapsed())).await {
            tracing::warn!(pod = %pod::format_pod(pod), container = container.name, "error killing the container: {}", calls::message(&e));
        }
    }
}

/// The signal that ends a container, where its spec names one that the runtime knows.
pub(super) fn stop_signal(container: &Container) -> i32 {
    let name = container.lifecycle.as_ref().and_then(|l| l.stop_signal.as_deref()).unwrap_or_default();
    cri::Signal::from_str_name(name).unwrap_or(cri::Signal::RuntimeDefault).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_whole_grace_is_given_and_after_a_hook_at_least_two_seconds() {
        let left = |grace, used| left_of(grace, Duration::from_millis(used));
        assert_eq!([left(30, 0), left(1, 20), left(0, 0)], [30, 1, 1]);
        assert_eq!([left(30, 10_000), left(5, 4_000), left(1, 1_000), left(5, 9_000)], [20, 2, 2, 2]);
    }
}
