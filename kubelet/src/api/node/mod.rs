//! The node's own object at the API server: registration, status, lease, CSINode; and what the rest of the kubelet reads of it
//! ([`OwnNode`]). Knows no pod; nothing here touches one.

pub mod conditions;
mod csi_node;
#[cfg(test)]
pub(super) mod fake;
mod follow;
mod lease;
pub mod machine;
pub mod object;
mod own;
pub mod patch;
mod register;
mod runtime;
mod status;
mod well;

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::Rng as _;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use self::object::KUBERNETES_VERSION;
pub use self::own::OwnNode;
use crate::api::ApiServer;
use crate::config::Config;
use crate::cri::Runtime;
use crate::devices::Devices;
use crate::node::Capacity;
use crate::node_state::NodeState;
use crate::record::{Recorder, Weight};
use crate::server::Health;
use crate::volume::csi::drivers::Drivers;

/// What an API call comes to.
type Answer<T> = Result<T, kube::Error>;

/// The limit of one call: the upstream's period of the status, after which the next one would begin.
const CALL: Duration = Duration::from_secs(10);

/// Runs a call within a limit.
async fn limited<T>(limit: Duration, call: impl Future<Output = Answer<T>>) -> Answer<T> {
    match tokio::time::timeout(limit, call).await {
        Ok(answer) => answer,
        Err(elapsed) => Err(kube::Error::Service(Box::new(elapsed))),
    }
}

/// The upstream's pauses between attempts of what has to succeed once: from 100 ms, doubling to 7 s.
fn pauses() -> impl Iterator<Item = Duration> + Send {
    let (first, longest) = (Duration::from_millis(100), Duration::from_secs(7));
    std::iter::successors(Some(first), move |pause| Some((*pause * 2).min(longest)))
}

/// A period that is longer by up to so many hundredths: nodes that were started together do not ask together for ever.
fn jittered(period: Duration, percent: u32) -> Duration {
    period.mul_f64(1.0 + rand::rng().random_range(0.0..f64::from(percent) / 100.0))
}

/// What the tasks of the node's object share.
#[derive(Clone, Debug)]
pub(crate) struct NodeAgent {
    pub(crate) config: Arc<Config>,
    pub(crate) api: ApiServer,
    pub(crate) runtime: Runtime,
    pub(crate) recorder: Recorder,
    pub(crate) state: NodeState,
    pub(crate) health: Health,
    pub(crate) devices: Devices,
    pub(crate) drivers: Drivers,
    pub(crate) own: OwnNode,
    /// The node's addresses now.
    pub(crate) addresses: watch::Receiver<Vec<IpAddr>>,
    /// What the machine has, with what is reserved.
    pub(crate) capacity: Capacity,
    pub(crate) machine: Arc<machine::Machine>,
    /// No device plugin has ever registered here.
    pub(crate) fresh_devices: bool,
    pub(crate) csi: Arc<AtomicBool>,
}

impl NodeAgent {
    fn csi_ready(&self) {
        if !self.csi.swap(true, Ordering::Relaxed) {
            self.own.wake();
        }
    }

    fn is_csi_ready(&self) -> bool {
        self.csi.load(Ordering::Relaxed)
    }

    /// Starts the tasks; they end with `stop`.
    pub(crate) fn start(self, stop: &CancellationToken) {
        self.recorder.node_event(Weight::Normal, "Starting", "Starting kubelet.");
        if !self.capacity.cgroup_v2 {
            let text = "cgroup v1 support is in maintenance mode, please migrate to cgroup v2";
            self.recorder.node_event(Weight::Warning, "CgroupV1", text);
        }
        let (seen, look) = watch::channel(runtime::Seen::default());
        let (was_ready, ready) = watch::channel(false);
        let spawn = |task: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>| {
            tokio::spawn(stop.clone().run_until_cancelled_owned(task));
        };
        spawn(Box::pin(runtime::run(self.runtime.clone(), self.own.clone(), seen, ready)));
        spawn(Box::pin(runtime::tell_pod_cidrs(self.runtime.clone(), self.own.clone())));
        spawn(Box::pin(follow::run(self.clone())));
        spawn(Box::pin(lease::run(self.clone())));
        spawn(Box::pin(csi_node::run(self.clone())));
        spawn(Box::pin(wake_on_changes(self.clone())));
        spawn(Box::pin(well::run(self.clone(), look.clone())));
        spawn(Box::pin(status::run(self, look, was_ready)));
    }
}

/// Has the status looked at when the node's conditions or addresses change. Never returns.
async fn wake_on_changes(agent: NodeAgent) {
    let (mut state, mut addresses) = (agent.state.follow(), agent.addresses.clone());
    loop {
        let changed = tokio::select! {
            changed = state.changed() => changed,
            changed = addresses.changed() => changed,
        };
        if changed.is_err() {
            return;
        }
        agent.own.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_seven_seconds() {
        let pauses: Vec<u128> = pauses().take(9).map(|pause| pause.as_millis()).collect();
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 3200, 6400, 7000, 7000]);
    }

    #[test]
    fn jitter_only_lengthens() {
        let period = Duration::from_secs(10);
        assert!((0..100).map(|_| jittered(period, 4)).all(|p| p >= period && p <= Duration::from_millis(10_400)));
    }
}
