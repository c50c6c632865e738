//! What the tasks share that take care of the node while it runs: eviction, images, logs. Starts them; they decide for themselves.

use std::sync::{Arc, Mutex};

use tokio_util::sync::CancellationToken;

use crate::cgroup::PodCgroups;
use crate::config::Config;
use crate::cri::Runtime;
use crate::node_state::NodeState;
use crate::record::Recorder;
use crate::table::PodTable;
use crate::{eviction, image_gc, log_rotation, oom};

/// The runtime's name whose log writers rotate by themselves.
const OURS: &str = "berth";

/// What the tasks share.
#[derive(Clone, Debug)]
pub(crate) struct Care {
    pub(crate) config: Arc<Config>,
    pub(crate) runtime: Runtime,
    pub(crate) table: PodTable,
    pub(crate) state: NodeState,
    pub(crate) recorder: Recorder,
    pub(crate) cgroups: Option<PodCgroups>,
    /// What is known of images; never locked across a wait.
    pub(crate) images: Arc<Mutex<image_gc::Memory>>,
}

/// Starts the tasks; they end with `stop`.
pub(crate) fn start(care: &Care, runtime_name: &str, stop: &CancellationToken) {
    tokio::spawn(stop.clone().run_until_cancelled_owned(eviction::run(care.clone())));
    tokio::spawn(stop.clone().run_until_cancelled_owned(image_gc::run(care.clone())));
    tokio::spawn(stop.clone().run_until_cancelled_owned(oom::run(care.clone())));
    if runtime_name != OURS && care.config.log_limits.max_bytes != u64::MAX {
        tokio::spawn(stop.clone().run_until_cancelled_owned(log_rotation::run(care.config.clone(), care.runtime.clone())));
    }
}
