//! Carries out the steps of a plan by CRI calls and file operations. Decides nothing: what comes next is planned again
//! from what is then there.

mod resolver;
mod start;
mod stop;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_cri_api::v1 as cri;
use futures::future::join_all;
use k8s_openapi::api::core::v1::Pod;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::cgroup::PodCgroups;
use crate::config::Config;
use crate::cpus::Cpus;
use crate::cri::{self as calls, Runtime};
use crate::devices::Devices;
use crate::dns::{self, NodeDns};
use crate::doing::Doing;
use crate::memory::Reason;
use crate::metrics::families;
use crate::node::NodeView;
use crate::observed::{Limits, PodObserved};
use crate::plan::PodOp;
use crate::pod::{self, PodUid};
use crate::pod_objects::{Need, PodObjects};
use crate::record::{Recorder, Weight};
use crate::resources::{container_resources, pod_limits, qos_class};
use crate::sandbox_config::{SandboxContext, sandbox_config};
use crate::saved_status::{STATUS, STATUS_NEW, SavedStatus};
use crate::userns::{self, HostIds};
use crate::volume::VolumeContext;
use crate::{Error, logs, resize, volume};

/// What all workers share.
#[derive(Clone, Debug)]
pub struct Executor {
    /// When this kubelet began.
    pub began: Instant,
    /// The configuration.
    pub config: Arc<Config>,
    /// The runtime.
    pub runtime: Runtime,
    /// The node.
    pub node: Arc<NodeView>,
    /// What pods refer to by name.
    pub objects: PodObjects,
    /// What volumes need of the node.
    pub volumes: volume::Services,
    /// The pods' cgroups.
    pub cgroups: Option<PodCgroups>,
    /// Where it is told what is being done for containers.
    pub doing: Doing,
    /// Where events go.
    pub recorder: Recorder,
    /// User and group IDs of pods with user namespaces of their own.
    pub host_ids: HostIds,
    /// The devices of plugins.
    pub devices: Devices,
    /// The processors of single containers.
    pub cpus: Cpus,
}

/// What became of one step.
#[derive(Clone, Debug, PartialEq)]
pub enum OpResult {
    /// Done.
    Done,
    /// The container could not be started.
    StartFailed(Reason),
    /// The container's image could not be had.
    PullFailed {
        /// The image.
        image: String,
        /// As the status shows it.
        reason: Reason,
        /// A pull was made; otherwise only its presence was checked.
        pulled: bool,
    },
    /// The pod as a whole could not go on.
    PodFailed(Reason),
    /// A pod that runs could not be brought up to date; what else there is to do goes on.
    Outdated {
        /// Why.
        reason: Reason,
        /// All volumes are there: containers may start.
        usable: bool,
    },
    /// The pod's network is not ready.
    NetworkNotReady(String),
    /// Somebody wants something else.
    Cancelled,
}

/// The steps of a pass and what became of them; shorter than the plan when a step ended the pass.
pub type PassResults = Vec<(PodOp, OpResult)>;

/// Runs the steps in order until one fails that the next ones need.
pub(crate) async fn run_pass(
    executor: Executor,
    pod: Arc<Pod>,
    observed: Arc<PodObserved>,
    saved: SavedStatus,
    ops: Vec<PodOp>,
    cancel: CancellationToken,
) -> PassResults {
    let mut results = PassResults::new();
    let begun = observed.has_begun() && !ops.iter().any(|op| matches!(op, PodOp::CreateSandbox { .. }));
    let (mut may_start, pass) = (true, PassOf { pod: &pod, observed: &observed, saved: &saved, begun, cancel: &cancel });
    let mut ops = ops.into_iter().peekable();
    while let Some(op) = ops.next() {
        if cancel.is_cancelled() {
            break;
        }
        if !may_start && matches!(op, PodOp::StartContainer { .. }) {
            continue;
        }
        let mut batch = vec![op];
        if matches!(batch[0], PodOp::StopContainer { .. }) {
            while let Some(next) = ops.next_if(|op| matches!(op, PodOp::StopContainer { .. })) {
                batch.push(next);
            }
        }
        let outcomes = if matches!(batch[0], PodOp::StopContainer { .. }) {
            executor.stop_containers(&batch, &pod, &observed, &cancel).await
        } else {
            join_all(batch.iter().map(|op| executor.run(op, &pass))).await
        };
        let mut go_on = true;
        for (op, outcome) in batch.into_iter().zip(outcomes) {
            go_on &= match &outcome {
                OpResult::Done => true,
                OpResult::StartFailed(_) | OpResult::PullFailed { .. } => !matches!(op, PodOp::StartContainer { init: true, .. }),
                // A record that cannot be removed now is removed later.
                OpResult::PodFailed(_) => matches!(op, PodOp::RemoveContainer { .. } | PodOp::RemoveSandbox { .. }),
                OpResult::Outdated { usable, .. } => {
                    may_start = *usable;
                    true
                }
                OpResult::NetworkNotReady(_) | OpResult::Cancelled => false,
            };
            results.push((op, outcome));
        }
        if !go_on {
            break;
        }
    }
    results
}

/// What the steps of a pass are carried out for.
struct PassOf<'a> {
    pod: &'a Arc<Pod>,
    observed: &'a PodObserved,
    saved: &'a SavedStatus,
    /// The pod has containers in the sandbox that it keeps.
    begun: bool,
    cancel: &'a CancellationToken,
}

impl Executor {
    /// Counts a container's start, under the upstream's labels.
    fn count_start(&self, pod: &Pod, name: &str, result: &OpResult) {
        let is_init = pod::init_containers(pod).iter().any(|c| c.name == name);
        let kind = if is_init { "init_container" } else { "container" };
        let metrics = self.runtime.metrics();
        match result {
            OpResult::StartFailed(reason) => {
                metrics.count(&families::STARTED_CONTAINERS, &[kind]);
                metrics.count(&families::STARTED_CONTAINERS_ERRORS, &[kind, &reason.reason]);
            }
            OpResult::Done => metrics.count(&families::STARTED_CONTAINERS, &[kind]),
            _ => {}
        }
    }

    /// Folder of a pod.
    pub fn pod_dir(&self, pod: &Pod) -> PathBuf {
        volume::pod_dir(&self.config.kubelet_root, pod::uid(pod))
    }

    /// What the pod's volumes need.
    fn volume_context<'a>(&'a self, pod: &'a Pod, dir: &'a Path) -> VolumeContext<'a> {
        VolumeContext { pod, dir, capacity: &self.node.capacity, objects: self.objects.of(pod), services: &self.volumes }
    }

    async fn run(&self, op: &PodOp, pass: &PassOf<'_>) -> OpResult {
        let PassOf { pod, observed, saved, begun, cancel } = *pass;
        let failed = |reason: &str, what: &str, error: &Error| {
            OpResult::PodFailed(Reason::new(reason, format!("{what}: {}", calls::message(error))))
        };
        match op {
            PodOp::Prepare => self.prepare(pod, observed.is_alive(), begun, cancel).await,
            // Stops come in batches.
            PodOp::StopContainer { .. } => OpResult::Cancelled,
            PodOp::StopSandbox { id } => match self.runtime.stop_pod_sandbox(id).await {
                Ok(()) => OpResult::Done,
                Err(e) => failed("FailedKillPod", "error killing pod", &e),
            },
            PodOp::CreateSandbox { attempt } => self.create_sandbox(pod, *attempt, cancel).await,
            PodOp::StartContainer { name, attempt, pull, .. } => {
                let result = self.start_container(pod, name, *attempt, *pull, observed, cancel).await;
                self.count_start(pod, name, &result);
                result
            }
            PodOp::Pin { id, cpus } => {
                let resources = cri::LinuxContainerResources { cpuset_cpus: cpus.clone(), ..Default::default() };
                match self.runtime.update_container_resources(id, resources).await {
                    Ok(()) => OpResult::Done,
                    Err(e) => OpResult::StartFailed(Reason::new("PinError", calls::message(&e))),
                }
            }
            PodOp::Resize { id, name } => self.resize(pod, id, name).await,
            PodOp::RemoveContainer { id } => match self.runtime.remove_container(id).await {
                Ok(()) => {
                    if let Some(gone) = observed.containers.iter().find(|c| c.id == *id) {
                        self.forget_logs(pod, &gone.name, gone.attempt, id).await;
                    }
                    OpResult::Done
                }
                Err(e) => failed("ContainerGCFailed", "error removing a container", &e),
            },
            PodOp::ClearContainer { id } => match self.runtime.remove_container(id).await {
                Ok(()) => {
                    let gone = observed.containers.iter().find(|c| c.id == *id);
                    // The last log before this one stays: no more than one for each container.
                    if let Some((gone, before)) = gone.and_then(|gone| Some((gone, gone.attempt.checked_sub(1)?))) {
                        self.forget_logs(pod, &gone.name, before, id).await;
                    }
                    OpResult::Done
                }
                Err(e) => failed("FailedKillPod", "error killing pod", &e),
            },
            PodOp::KeepEnd => {
                let saved = saved.clone();
                match tokio::task::spawn_blocking(move || saved.keep_end()).await {
                    Ok(Ok(())) => OpResult::Done,
                    Ok(Err(e)) => {
                        OpResult::PodFailed(Reason::new("FailedKillPod", format!("error keeping how the pod ended: {e}")))
                    }
                    Err(e) => OpResult::PodFailed(Reason::new("FailedKillPod", e.to_string())),
                }
            }
            PodOp::RemoveSandbox { id } => {
                let removed = match self.runtime.stop_pod_sandbox(id).await {
                    Ok(()) => self.runtime.remove_pod_sandbox(id).await,
                    stopped => stopped,
                };
                removed.map_or_else(|e| failed("ContainerGCFailed", "error removing a sandbox", &e), |()| OpResult::Done)
            }
            PodOp::PostStart { id, name } => self.post_start_again(pod, name, id, observed, cancel).await,
            PodOp::Release { forget, keep_status } => self.release(pod, *forget, *keep_status).await,
        }
    }

    fn node_dns(&self) -> NodeDns {
        NodeDns {
            host: host_resolver(&self.config).0,
            cluster_servers: self.config.cluster_dns.clone(),
            cluster_domain: self.config.cluster_domain.clone(),
        }
    }

    fn sandbox_config(&self, pod: &Pod, attempt: u32) -> Result<cri::PodSandboxConfig, String> {
        let dns = self.node_dns();
        let cgroup_parent = self.cgroups.as_ref().map(|c| c.pod_path(qos_class(pod), pod::uid(pod))).unwrap_or_default();
        let context = SandboxContext {
            cgroup_parent: &cgroup_parent,
            logs: &self.config.pod_logs_dir,
            dns: &dns,
            capacity: &self.node.capacity,
        };
        let mut config = sandbox_config(pod, attempt, &context)?;
        if let Some(first) = self.host_ids.ensure(pod)? {
            userns::apply_to_sandbox(&mut config, first);
        }
        Ok(config)
    }

    /// Folders, cgroup, volumes. Idempotent.
    async fn prepare(&self, pod: &Arc<Pod>, alive: bool, begun: bool, cancel: &CancellationToken) -> OpResult {
        let (this, pod) = (self.clone(), pod.clone());
        let need = if begun { Need::VolumesAgain } else { Need::Volumes };
        self.objects.ready(&pod, need, cancel).await;
        if cancel.is_cancelled() {
            return OpResult::Cancelled;
        }
        let turn = self.volumes.drivers.turn(&pod).await;
        let prepare = move || {
            let _turn = turn;
            this.prepare_blocking(&pod, alive, begun).map_err(|reason| match begun {
                true => OpResult::Outdated { reason, usable: volume::are_there(&this.volume_context(&pod, &this.pod_dir(&pod))) },
                false => OpResult::PodFailed(reason),
            })
        };
        match tokio::task::spawn_blocking(prepare).await {
            Ok(Ok(())) => OpResult::Done,
            Ok(Err(failed)) => failed,
            Err(e) => OpResult::PodFailed(Reason::new("Failed", e.to_string())),
        }
    }

    fn prepare_blocking(&self, pod: &Pod, alive: bool, begun: bool) -> Result<(), Reason> {
        let dirs = |e: io::Error| Reason::new("Failed", format!("error making pod data directories: {e}"));
        let dir = self.pod_dir(pod);
        for folder in ["volumes", "plugins", "containers"] {
            volume::create_private_dir(&dir.join(folder)).map_err(dirs)?;
        }
        volume::mark_ours(&dir).map_err(dirs)?;
        let log_dir = logs::pod_log_dir(&self.config.pod_logs_dir, pod);
        logs::ensure_dir(&log_dir).and_then(|()| volume::mark_ours(&log_dir)).map_err(dirs)?;
        if let Some(cgroups) = &self.cgroups {
            let limits = pod_limits(pod, &self.node.capacity);
            match cgroups.ensure_pod(qos_class(pod), pod::uid(pod), &limits) {
                // Limits that shrink: the containers' have to shrink first.
                Err(error) if alive => {
                    tracing::info!(pod = %pod::format_pod(pod), %error, "the pod's limits wait for its containers'")
                }
                Err(e) => {
                    let text = format!("unable to ensure pod container exists: {}", with_causes(&e));
                    return Err(Reason::new("FailedCreatePodContainer", text));
                }
                Ok(()) => {}
            }
        }
        let context = self.volume_context(pod, &dir);
        volume::set_up(&context, begun, self.config.clock.now()).map_err(|e| Reason::new("FailedMount", e))
    }

    /// Volumes and cgroup, and the pod's folder but for what says how it ended.
    async fn release(&self, pod: &Arc<Pod>, forget: bool, keep_status: bool) -> OpResult {
        let (this, pod) = (self.clone(), pod.clone());
        let turn = self.volumes.drivers.turn(&pod).await;
        let (objects, uid) = (self.objects.clone(), PodUid::of(&pod));
        let release = move || -> Result<(), Reason> {
            let _turn = turn;
            let failed = |e: String| Reason::new("FailedKillPod", format!("error killing pod: {e}"));
            let dir = this.pod_dir(&pod);
            volume::tear_down(&dir, &this.volumes.drivers).map_err(failed)?;
            if let Some(uid) = &uid {
                // A pod that has ended stays known for as long as the API server has it.
                objects.release(uid);
            }
            if let Some(cgroups) = &this.cgroups {
                cgroups.remove_pod(pod::uid(&pod)).map_err(|e| failed(with_causes(&e)))?;
            }
            if forget {
                // The containers' logs went with their records: what is left are folders.
                logs::remove_pod(&this.config.pod_logs_dir, &pod);
            }
            let kept: &[&str] = if keep_status { &[volume::OURS, STATUS, STATUS_NEW] } else { &[] };
            let removed = match kept {
                [] => volume::remove_folder(&dir),
                kept => volume::remove_folder_but(&dir, kept),
            };
            match removed {
                Err(e) if forget => Err(failed(e)),
                _ => Ok(()),
            }
        };
        match tokio::task::spawn_blocking(release).await {
            Ok(Ok(())) => OpResult::Done,
            Ok(Err(reason)) => OpResult::PodFailed(reason),
            Err(e) => OpResult::PodFailed(Reason::new("FailedKillPod", e.to_string())),
        }
    }

    async fn create_sandbox(&self, pod: &Pod, attempt: u32, cancel: &CancellationToken) -> OpResult {
        let failed = |text: &str| {
            OpResult::PodFailed(Reason::new("FailedCreatePodSandBox", format!("Failed to create pod sandbox: {text}")))
        };
        if !pod::is_host_network(pod)
            && let Some(problem) = self.network_problem().await
        {
            return OpResult::NetworkNotReady(problem);
        }
        if attempt > 0 {
            let text = "Pod sandbox changed, it will be killed and re-created.";
            self.recorder.event(pod, None, Weight::Normal, "SandboxChanged", text);
        }
        let config = match self.sandbox_config(pod, attempt) {
            Ok(config) => config,
            Err(text) => return failed(&text),
        };
        self.objects.ready(pod, Need::RuntimeClass, cancel).await;
        let handler = match pod::spec(pod).runtime_class_name.as_deref().filter(|name| !name.is_empty()) {
            None => String::new(),
            Some(name) => match self.objects.of(pod).runtime_class(name) {
                Ok(Some(class)) => class.handler.clone(),
                Err(text) => return failed(&format!("failed to lookup RuntimeClass {name}: {text}")),
                Ok(None) => {
                    return failed(&format!("failed to lookup RuntimeClass {name}: runtimeclass.node.k8s.io {name:?} not found"));
                }
            },
        };
        if pod::spec(pod).host_users == Some(false) {
            match self.runtime.has_user_namespaces(&handler).await {
                Ok(true) => {}
                Ok(false) if handler.is_empty() => {
                    return failed("can't set `spec.hostUsers: false`, runtime does not support user namespaces");
                }
                Ok(false) => return failed(&format!("RuntimeClass handler {handler:?} does not support user namespaces")),
                Err(e) => return failed(&calls::message(&e)),
            }
        }
        self.tell_resolver(pod, &self.node_dns());
        match self.runtime.run_pod_sandbox(config, handler).await {
            Ok(_) => OpResult::Done,
            Err(e) => failed(&calls::message(&e)),
        }
    }

    /// What the runtime says of its network, when it is not ready.
    async fn network_problem(&self) -> Option<String> {
        let status = self.runtime.status().await.ok()?.status?;
        let network = status.conditions.into_iter().find(|c| c.r#type == "NetworkReady" && !c.status)?;
        Some(format!(
            "network is not ready: container runtime network not ready: NetworkReady=false reason:{} message:{}",
            network.reason, network.message
        ))
    }

    /// The container's limits, and the pod's after them where they shrink: what grows has room by then, preparing made it.
    async fn resize(&self, pod: &Pod, id: &str, name: &str) -> OpResult {
        let Some(container) = pod::all_containers(pod).find(|c| c.name == name) else { return OpResult::Done };
        if !self.cpus.fits(pod, container) {
            // Edited while no kubelet ran: nobody has judged that.
            return OpResult::StartFailed(Reason::new("ResizeError", resize::PINNED));
        }
        let resources = container_resources(pod, container, &self.node.capacity);
        tracing::info!(pod = %pod::format_pod(pod), container = name, limits = ?Limits::from(&resources), "limits change");
        if let Err(e) = self.runtime.update_container_resources(id, resources).await {
            return OpResult::StartFailed(Reason::new("ResizeError", calls::message(&e)));
        }
        let Some(cgroups) = self.cgroups.clone() else { return OpResult::Done };
        let limits = pod_limits(pod, &self.node.capacity);
        let (qos, uid) = (qos_class(pod), pod::uid(pod).to_owned());
        match tokio::task::spawn_blocking(move || cgroups.ensure_pod(qos, &uid, &limits)).await {
            Ok(Err(e)) => OpResult::StartFailed(Reason::new("ResizeError", with_causes(&e))),
            _ => OpResult::Done,
        }
    }

    async fn link_log(&self, pod: &Arc<Pod>, name: &str, attempt: u32, id: &str) {
        let Some(links) = self.config.container_logs_dir.clone() else { return };
        let target = logs::pod_log_dir(&self.config.pod_logs_dir, pod).join(logs::relative_log_path(name, attempt));
        let link = logs::link_name(pod, name, id);
        let linked = tokio::task::spawn_blocking(move || logs::link(&links, &link, &target)).await;
        if let Ok(Err(error)) = linked {
            tracing::warn!(pod = %pod::format_pod(pod), container = name, %error, "no link to the log");
        }
    }

    async fn forget_logs(&self, pod: &Pod, name: &str, attempt: u32, id: &str) {
        let folder = logs::pod_log_dir(&self.config.pod_logs_dir, pod);
        let link = self.config.container_logs_dir.as_ref().map(|links| links.join(logs::link_name(pod, name, id)));
        let name = name.to_owned();
        let removed = tokio::task::spawn_blocking(move || {
            logs::remove_attempt(&folder, &name, attempt);
            link.map(fs::remove_file)
        });
        if let Ok(Some(Err(error))) = removed.await
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "a log link stays");
        }
    }
}

/// The resolver configuration that pods inherit, and what is to be said of it.
pub(crate) fn host_resolver(config: &Config) -> (Option<String>, Option<String>) {
    let host = fs::read_to_string(&config.resolv_conf).ok();
    if !host.as_deref().is_some_and(dns::is_stub) {
        return (host, None);
    }
    let stub = config.resolv_conf.display();
    let uplink = config.resolv_conf_uplink.as_ref().and_then(|path| Some((path, fs::read_to_string(path).ok()?)));
    match uplink.filter(|(_, text)| !dns::is_stub(text)) {
        Some((path, text)) => {
            let notice = format!("{stub} names only a resolver on loopback: pods get the servers of {}", path.display());
            (Some(text), Some(notice))
        }
        None => (host, Some(format!("{stub} names only a resolver on loopback, which pods cannot reach: set resolvConf"))),
    }
}

/// An error with all its causes on one line.
pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}
