//! The end of the machine: pods end in the order of their priority, each with its hooks and its grace, up to the time that its group has.
//! Told by logind where there is one, else by SIGTERM. Without configured times nothing here does anything.

mod logind;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use tokio_util::sync::CancellationToken;

use crate::config::ShutdownStep;
use crate::control::Ending;
use crate::node_state::NodeState;
use crate::pod;
use crate::record::{Recorder, Weight};

/// Where message buses listen, and logind is asked.
pub const SYSTEM_BUS: &str = "/run/dbus/system_bus_socket";
/// Between attempts to reach a bus that was there.
const AGAIN: Duration = Duration::from_secs(5);
/// What a pod that ended for this is told, as the upstream has it.
const MESSAGE: &str = "Pod was terminated in response to imminent node shutdown.";
/// After its grace a pod's processes are killed and its volumes released: so long is waited beyond the group's time.
const CLEAN_UP: Duration = Duration::from_secs(5);

/// Ends pods when the machine goes down. Clones are the same.
#[derive(Clone, Debug)]
pub struct Shutdown {
    steps: Arc<[ShutdownStep]>,
    state: NodeState,
    recorder: Recorder,
    bus: PathBuf,
    /// logind tells; a SIGTERM is then for the agent alone.
    watched: Arc<AtomicBool>,
}

/// The step of a pod's priority: the last one that does not ask for more, else the first.
fn step_of(steps: &[ShutdownStep], priority: i32) -> usize {
    steps.iter().rposition(|step| step.priority <= priority).unwrap_or(0)
}

/// How a pod of the step `at` ends; `None`: it is not its turn.
fn ending(steps: &[ShutdownStep], at: usize, pod: &Pod) -> Option<Ending> {
    if step_of(steps, pod::spec(pod).priority.unwrap_or(0)) != at {
        return None;
    }
    let most = i64::try_from(steps[at].grace.as_secs()).unwrap_or(i64::MAX);
    Some(Ending {
        grace: Some(pod::grace_seconds(pod).min(most)),
        reason: "Terminated".to_owned(),
        message: MESSAGE.to_owned(),
        disruption: Some(MESSAGE.to_owned()),
    })
}

impl Shutdown {
    pub(crate) fn new(steps: &[ShutdownStep], state: NodeState, recorder: Recorder) -> Shutdown {
        Shutdown { steps: steps.into(), state, recorder, bus: PathBuf::from(SYSTEM_BUS), watched: Arc::default() }
    }

    /// What SIGTERM means for pods: nothing where no times are configured, or where logind tells of shutdowns; else they end.
    /// Whether they have.
    pub async fn on_sigterm(&self) -> bool {
        let ends = !self.steps.is_empty() && !self.watched.load(Ordering::Relaxed);
        if ends {
            self.end_pods().await;
        }
        ends
    }

    /// Ends all pods, group by group; comes back when they have ended or their time is over.
    async fn end_pods(&self) {
        self.recorder.node_event(Weight::Normal, "Shutdown", "Shutdown manager detected shutdown event");
        self.state.change(|conditions| conditions.shutting_down = true);
        for (at, step) in self.steps.iter().enumerate() {
            let steps = self.steps.clone();
            let ended = self.state.control().end(move |pod| ending(&steps, at, pod));
            if tokio::time::timeout(step.grace + CLEAN_UP, ended).await.is_err() {
                tracing::warn!(priority = step.priority, "pods were still ending when their time was over");
            }
        }
    }

    /// Takes logind's inhibitor and ends the pods when it says that the machine goes down. Comes back when `stop` is cancelled.
    pub(crate) async fn watch(self, stop: CancellationToken) {
        if self.steps.is_empty() || !Path::new(&self.bus).exists() {
            return;
        }
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                result = self.follow() => if let Err(error) = result {
                    tracing::warn!(%error, bus = %self.bus.display(), "logind does not tell of shutdowns; SIGTERM ends the pods meanwhile");
                },
            }
            self.watched.store(false, Ordering::Relaxed);
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(AGAIN) => {}
            }
        }
    }

    async fn follow(&self) -> Result<(), logind::Failure> {
        let mut logind = logind::Logind::connect(&self.bus).await?;
        let wanted: Duration = self.steps.iter().map(|step| step.grace).sum();
        let most = logind.longest_delay().await?;
        if most < wanted {
            tracing::warn!(
                "logind delays a shutdown by at most {} s and pods may need {} s: set InhibitDelayMaxSec={} in /etc/systemd/logind.conf.d",
                most.as_secs(),
                wanted.as_secs(),
                wanted.as_secs()
            );
        }
        let mut inhibitor = Some(logind.inhibit().await?);
        self.watched.store(true, Ordering::Relaxed);
        tracing::info!("logind tells of shutdowns");
        loop {
            if logind.prepare_for_shutdown().await? {
                self.end_pods().await;
                // Closing it lets the machine go down.
                inhibitor = None;
            } else {
                if self.state.change(|conditions| conditions.shutting_down = false).shutting_down {
                    self.recorder.node_event(Weight::Normal, "Shutdown", "Shutdown manager detected shutdown cancellation");
                }
                if inhibitor.is_none() {
                    inhibitor = Some(logind.inhibit().await?);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::control::PodControl;
    use crate::source::{defaults::apply_defaults, parse::parse_manifest};

    fn steps() -> Vec<ShutdownStep> {
        let step = |priority, seconds| ShutdownStep { priority, grace: Duration::from_secs(seconds) };
        vec![step(0, 20), step(1000, 5), step(2_000_000_000, 10)]
    }

    #[test]
    fn a_pod_has_the_time_of_its_priority_and_no_more_than_its_own_grace() {
        let pod = |priority: i32| {
            let text = format!(
                "{{apiVersion: v1, kind: Pod, metadata: {{name: a}}, spec: {{priority: {priority}, terminationGracePeriodSeconds: 15, containers: [{{name: c, image: i}}]}}}}"
            );
            let mut pod = parse_manifest(&text).unwrap().pods.remove(0).pod;
            apply_defaults(&mut pod);
            pod
        };
        let when = |priority| {
            let turns: Vec<_> = (0..3).filter_map(|at| Some((at, ending(&steps(), at, &pod(priority))?.grace?))).collect();
            assert_eq!(turns.len(), 1, "each pod has one turn");
            turns[0]
        };
        assert_eq!([when(-5), when(0), when(999), when(1000), when(2_000_001_000)], [(0, 15), (0, 15), (0, 15), (1, 5), (2, 10)]);
    }

    #[tokio::test]
    async fn sigterm_ends_pods_only_where_times_are_configured_and_logind_is_silent() {
        let run = async |steps: &[ShutdownStep], watched: bool| {
            let (control, mut orders) = PodControl::new();
            let state = NodeState::new(control);
            let shutdown = Shutdown::new(steps, state, Recorder::new("n", Clock::default()));
            shutdown.watched.store(watched, Ordering::Relaxed);
            // Nobody carries out the orders: dropping them is the end of each.
            let count = tokio::spawn(async move {
                let mut told = 0;
                while orders.recv().await.is_some() {
                    told += 1;
                }
                told
            });
            shutdown.on_sigterm().await;
            drop(shutdown);
            count.await.unwrap()
        };
        assert_eq!(run(&steps(), false).await, 4, "the node's condition, and three groups");
        assert_eq!((run(&[], false).await, run(&steps(), true).await), (0, 0));
    }
}
