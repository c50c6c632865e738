//! Pods that have to go because the node runs short, or because they are over a limit of their own: signals are read, judged,
//! answered. Owns the order of the answers; reading, judging and ranking are in files of their own.

pub mod judge;
pub mod local;
pub mod rank;
pub mod signals;
pub mod threshold;

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use tokio::time::Instant;

use self::judge::{Judge, Met, Observations};
use self::local::Exceeded;
use self::rank::PodUsage;
use self::signals::Places;
use crate::admission::CRITICAL_PRIORITY;
use crate::care::Care;
use crate::config::Eviction;
use crate::control::{EVICTED, Ending};
use crate::cri as calls;
use crate::metrics::families;
use crate::pod::{self, PodUid};
use crate::record::Weight;
use crate::{host_ports, image_gc, volume};

/// How long a round waits for the evicted pod to be gone, as the upstream.
const CLEAN_UP: Duration = Duration::from_secs(30);
/// Where the runtime keeps its files hardly changes.
const PLACES_KEPT: Duration = Duration::from_secs(300);
/// Measuring folders may take one part of the time in so many.
const MEASURING_PART: u32 = 20;

/// Judges the node every [`crate::Timing::eviction`]. Never returns.
pub(crate) async fn run(care: Care) {
    let mut evictor = Evictor { care, judge: Judge::default(), places: None, announced: None, measure_at: Instant::now() };
    loop {
        tokio::time::sleep(evictor.care.config.timing.eviction).await;
        evictor.round().await;
    }
}

struct Evictor {
    care: Care,
    judge: Judge,
    places: Option<(Places, Instant)>,
    /// The signal that was last spoken of.
    announced: Option<threshold::Signal>,
    /// When pods' own limits are looked at next.
    measure_at: Instant,
}

/// Whether a pod may be evicted because the node runs short: never what the node needs itself, and pods of files only where the
/// configuration says so, since nothing starts them elsewhere.
fn may_go(pod: &Pod, eviction: &Eviction) -> bool {
    let critical = pod::spec(pod).priority.is_some_and(|priority| priority >= CRITICAL_PRIORITY);
    !critical && (eviction.static_pods || !pod::is_static(pod))
}

/// The upstream's reason of the event that a pressure has come or gone.
fn condition_reason(name: &str, is: bool) -> &'static str {
    match (name, is) {
        ("MemoryPressure", true) => "NodeHasInsufficientMemory",
        ("MemoryPressure", false) => "NodeHasSufficientMemory",
        ("DiskPressure", true) => "NodeHasDiskPressure",
        ("DiskPressure", false) => "NodeHasNoDiskPressure",
        (_, true) => "NodeHasInsufficientPID",
        (_, false) => "NodeHasSufficientPID",
    }
}

/// Seconds that an evicted pod gets: at a hard threshold none to speak of, at a soft one its own, up to the configured most.
fn grace(met: &Met, pod: &Pod, eviction: &Eviction) -> i64 {
    let own = pod::grace_seconds(pod);
    match met.threshold.grace {
        None => 1,
        Some(_) if eviction.max_pod_grace < 0 => own,
        Some(_) => own.min(eviction.max_pod_grace).max(1),
    }
}

impl Evictor {
    async fn observe(&mut self) -> Observations {
        let now = Instant::now();
        if self.places.as_ref().is_none_or(|(_, asked)| now.saturating_duration_since(*asked) >= PLACES_KEPT) {
            match Places::ask(&self.care.runtime).await {
                Ok(places) => self.places = Some((places, now)),
                Err(error) => tracing::debug!(error = %calls::message(&error), "the runtime does not tell where images are"),
            }
        }
        let places = self.places.as_ref().map(|(places, _)| places.clone()).unwrap_or_default();
        let (config, cgroups) = (self.care.config.clone(), self.care.cgroups.clone());
        let observe = move || signals::observe(&config, cgroups.as_ref(), &places);
        tokio::task::spawn_blocking(observe).await.unwrap_or_default()
    }

    fn judge(&mut self, seen: &Observations) -> Vec<Met> {
        let eviction = &self.care.config.eviction;
        let verdict = self.judge.round(&eviction.thresholds, seen, eviction.pressure_transition, Instant::now());
        let before = self.care.state.change(|conditions| {
            let shutting_down = conditions.shutting_down;
            *conditions = verdict.conditions;
            conditions.shutting_down = shutting_down;
        });
        for (name, was, is) in [
            ("MemoryPressure", before.memory_pressure, verdict.conditions.memory_pressure),
            ("DiskPressure", before.disk_pressure, verdict.conditions.disk_pressure),
            ("PIDPressure", before.pid_pressure, verdict.conditions.pid_pressure),
        ] {
            if was != is {
                let reason = condition_reason(name, is);
                let message = format!("Node {} status is now: {reason}", self.care.config.node_name);
                // With an API server the event belongs to the condition in the node's object.
                if self.care.config.api.is_none() {
                    self.care.recorder.node_event(Weight::Normal, reason, &message);
                }
            }
        }
        verdict.met
    }

    async fn round(&mut self) {
        let seen = self.observe().await;
        let met = self.judge(&seen);
        self.enforce_own_limits().await;
        let Some(first) = met.first().copied() else {
            self.announced = None;
            return;
        };
        let resource = first.threshold.signal.resource();
        if self.announced != Some(first.threshold.signal) {
            let text = format!("Attempting to reclaim {resource}");
            self.care.recorder.node_event(Weight::Warning, "EvictionThresholdMet", &text);
        }
        let mut tried = String::new();
        if matches!(resource, "ephemeral-storage" | "inodes") {
            // What is dead goes before what may be wanted again.
            let cleared = tokio::time::timeout(CLEAN_UP, self.care.state.control().clear_ended()).await;
            if cleared.is_err() {
                tracing::warn!("dead containers are not all gone yet");
            }
            if !self.is_still_met(&first).await {
                tracing::info!(resource, "dead containers removed: no image and no pod has to go");
                return;
            }
            let removed = image_gc::remove_unused(&self.care).await;
            tried = format!("dead containers and {removed} unused images removed; ");
            if !self.is_still_met(&first).await {
                tracing::info!(resource, "{tried}no pod has to go");
                return;
            }
        }
        self.evict_one(&first, &tried).await;
        self.announced = Some(first.threshold.signal);
    }

    async fn is_still_met(&mut self, first: &Met) -> bool {
        let seen = self.observe().await;
        self.judge(&seen).iter().any(|met| met.threshold == first.threshold)
    }

    /// Pods that run, with what they use.
    async fn usage(&self, wanted: impl Fn(&Pod) -> bool) -> Vec<PodUsage> {
        let runs = |pod: &Arc<Pod>| {
            let ends = PodUid::of(pod).is_none_or(|uid| self.care.table.is_ending(&uid));
            !host_ports::is_over(pod.status.as_ref()) && !ends && wanted(pod)
        };
        let pods: Vec<Arc<Pod>> = self.care.table.list().into_iter().filter(runs).collect();
        if pods.is_empty() {
            return Vec::new();
        }
        let stats = match self.care.runtime.list_pod_sandbox_stats().await {
            Ok(stats) => stats,
            Err(error) => {
                tracing::warn!(error = %calls::message(&error), "the runtime does not tell what pods use");
                Vec::new()
            }
        };
        let config = self.care.config.clone();
        let measure = move || signals::usage_of_pods(&config, &pods, &stats);
        tokio::task::spawn_blocking(measure).await.unwrap_or_default()
    }

    async fn evict_one(&self, met: &Met, tried: &str) {
        let mut pods = self.usage(|_| true).await;
        let resource = met.threshold.signal.resource();
        rank::rank(&mut pods, resource);
        let eviction = &self.care.config.eviction;
        let Some(victim) = pods.iter().find(|usage| may_go(&usage.pod, eviction)) else {
            if self.announced != Some(met.threshold.signal) {
                let signal = met.threshold.signal.name();
                let text = format!(
                    "{signal} is {} and should be {}: {tried}no pod may be evicted. Biggest users: {}",
                    met.seen.available,
                    met.quantity(),
                    rank::biggest(&pods, resource)
                );
                self.care.recorder.node_event(Weight::Warning, "EvictionImpossible", &text);
            }
            return;
        };
        let message = rank::message(met, victim);
        tracing::warn!(resource, tried, biggest = rank::biggest(&pods, resource), "a pod is evicted");
        self.care.runtime.metrics().count(&families::EVICTIONS, &[met.threshold.signal.name()]);
        let disruption = Some(message.clone());
        self.evict(&victim.pod, grace(met, &victim.pod, eviction), message, disruption).await;
    }

    async fn evict(&self, pod: &Arc<Pod>, grace: i64, message: String, disruption: Option<String>) {
        self.care.recorder.event(pod, None, Weight::Warning, "Evicted", &message);
        let ending = Ending { grace: Some(grace), reason: EVICTED.to_owned(), message, disruption };
        let Some(uid) = PodUid::of(pod) else { return };
        let ended = self.care.state.control().end(move |pod| (PodUid::of(pod).as_ref() == Some(&uid)).then(|| ending.clone()));
        let waited = tokio::time::timeout(CLEAN_UP + Duration::from_secs(grace.unsigned_abs()), ended).await;
        if waited.is_err() {
            let text = "Container runtime did not kill the pod within specified grace period.";
            self.care.recorder.event(pod, None, Weight::Warning, "ExceededGracePeriod", text);
        }
    }

    /// Ends pods that keep more on disk than they said they would.
    async fn enforce_own_limits(&mut self) {
        if !self.care.config.eviction.local_storage || Instant::now() < self.measure_at {
            return;
        }
        let begun = Instant::now();
        let critical = |pod: &Pod| pod::spec(pod).priority.is_some_and(|priority| priority >= CRITICAL_PRIORITY);
        let pods = self.usage(|pod| local::has_limits(pod) && !critical(pod)).await;
        for usage in pods {
            let (pod, root) = (usage.pod.clone(), self.care.config.kubelet_root.clone());
            let measure = move || volume::empty_dir::disk_usage(&pod, &volume::pod_dir(&root, pod::uid(&pod)));
            let volumes = tokio::task::spawn_blocking(measure).await.unwrap_or_default();
            let volumes: Vec<_> = volumes
                .into_iter()
                .map(|(name, used, limit)| (name, i64::try_from(used.bytes).unwrap_or(i64::MAX), limit))
                .collect();
            if let Some(Exceeded { signal, message }) = local::exceeded(&usage, &volumes) {
                self.care.runtime.metrics().count(&families::EVICTIONS, &[signal]);
                self.evict(&usage.pod, 1, message, None).await;
            }
        }
        self.measure_at = Instant::now() + begun.elapsed() * MEASURING_PART;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eviction::judge::Observation;
    use crate::eviction::threshold::{Quota, Signal, Threshold};

    fn pod(source: &str, spec: &str) -> Pod {
        let text = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: a, annotations: {{kubernetes.io/config.source: {source}}}}}, spec: {spec}}}"
        );
        let mut pod = crate::source::parse::parse_manifest(&text).unwrap().pods.remove(0).pod;
        crate::source::defaults::apply_defaults(&mut pod);
        pod
    }

    #[test]
    fn pods_of_files_go_only_where_that_is_configured_and_critical_ones_never() {
        let spec = |priority: i32| format!("{{priority: {priority}, containers: [{{name: c, image: i}}]}}");
        let own = Eviction::default();
        let every = Eviction { static_pods: true, ..Eviction::default() };
        let pods = [
            pod("api", &spec(0)),
            pod("file", &spec(0)),
            pod("api", &spec(CRITICAL_PRIORITY)),
            pod("file", &spec(CRITICAL_PRIORITY)),
        ];
        assert_eq!(pods.each_ref().map(|pod| may_go(pod, &own)), [true, false, false, false]);
        assert_eq!(pods.each_ref().map(|pod| may_go(pod, &every)), [true, true, false, false]);
    }

    #[test]
    fn a_soft_threshold_leaves_pods_time_and_a_hard_one_does_not() {
        let pod = pod("api", "{terminationGracePeriodSeconds: 40, containers: [{name: c, image: i}]}");
        let met = |grace: Option<u64>| Met {
            threshold: Threshold {
                signal: Signal::MemoryAvailable,
                below: Quota::Amount(1),
                grace: grace.map(Duration::from_secs),
                reclaim: None,
            },
            seen: Observation { available: 0, capacity: 1 },
        };
        let most = |max_pod_grace| Eviction { max_pod_grace, ..Eviction::default() };
        assert_eq!(grace(&met(None), &pod, &most(30)), 1);
        assert_eq!(grace(&met(Some(1)), &pod, &most(30)), 30);
        assert_eq!(grace(&met(Some(1)), &pod, &most(90)), 40);
        assert_eq!(grace(&met(Some(1)), &pod, &most(-1)), 40);
    }
}
