//! Carries out the steps of a plan by CRI calls and file operations. Decides nothing: what comes next is planned again
//! from what is then there.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use berth_cri_api::v1 as cri;
use futures::future::join_all;
use k8s_openapi::api::core::v1::{Container, Pod};
use tokio_util::sync::CancellationToken;

use crate::cgroup::PodCgroups;
use crate::config::Config;
use crate::container_config::{ContainerContext, container_config, mounts_at, volume_mounts};
use crate::cri::{self as calls, Runtime};
use crate::dns::NodeDns;
use crate::hosts::{self, Hostname};
use crate::memory::Reason;
use crate::node::NodeView;
use crate::observed::{Limits, PodObserved};
use crate::plan::PodOp;
use crate::pod;
use crate::resources::{container_resources, pod_limits, qos_class};
use crate::sandbox_config::{SandboxContext, sandbox_config};
use crate::security::ImageUser;
use crate::{Error, image_name, logs, volume};

/// What all workers share.
#[derive(Clone, Debug)]
pub struct Executor {
    /// The configuration.
    pub config: Arc<Config>,
    /// The runtime.
    pub runtime: Runtime,
    /// The node.
    pub node: Arc<NodeView>,
    /// The pods' cgroups.
    pub cgroups: Option<PodCgroups>,
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
    /// The pod's network is not ready.
    NetworkNotReady(String),
    /// Somebody wants something else.
    Cancelled,
}

/// The steps of a pass and what became of them; shorter than the plan when a step ended the pass.
pub type PassResults = Vec<(PodOp, OpResult)>;

/// Runs the steps in order until one fails that the next ones need.
pub async fn run_pass(
    executor: Executor,
    pod: Arc<Pod>,
    observed: Arc<PodObserved>,
    ops: Vec<PodOp>,
    cancel: CancellationToken,
) -> PassResults {
    let mut results = PassResults::new();
    let mut ops = ops.into_iter().peekable();
    while let Some(op) = ops.next() {
        if cancel.is_cancelled() {
            break;
        }
        let mut batch = vec![op];
        if matches!(batch[0], PodOp::StopContainer { .. }) {
            while let Some(next) = ops.next_if(|op| matches!(op, PodOp::StopContainer { .. })) {
                batch.push(next);
            }
        }
        let run = batch.iter().map(|op| executor.run(op, &pod, &observed, &cancel));
        let outcomes = join_all(run).await;
        let mut go_on = true;
        for (op, outcome) in batch.into_iter().zip(outcomes) {
            go_on &= match &outcome {
                OpResult::Done => true,
                OpResult::StartFailed(_) | OpResult::PullFailed { .. } => !matches!(op, PodOp::StartContainer { init: true, .. }),
                // A record that cannot be removed now is removed later.
                OpResult::PodFailed(_) => matches!(op, PodOp::RemoveContainer { .. } | PodOp::RemoveSandbox { .. }),
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

impl Executor {
    /// Folder of a pod.
    pub fn pod_dir(&self, pod: &Pod) -> PathBuf {
        volume::pod_dir(&self.config.kubelet_root, pod::uid(pod))
    }

    async fn run(&self, op: &PodOp, pod: &Arc<Pod>, observed: &PodObserved, cancel: &CancellationToken) -> OpResult {
        let failed = |reason: &str, what: &str, error: &Error| {
            OpResult::PodFailed(Reason::new(reason, format!("{what}: {}", calls::message(error))))
        };
        match op {
            PodOp::Prepare => self.prepare(pod).await,
            PodOp::StopContainer { id, grace, message, .. } => {
                tracing::info!(pod = %pod::format_pod(pod), grace, "{message}");
                let stopped = tokio::select! {
                    stopped = self.runtime.stop_container(id, *grace) => stopped,
                    () = cancel.cancelled() => return OpResult::Cancelled,
                };
                stopped.map_or_else(|e| failed("FailedKillPod", "error killing pod", &e), |()| OpResult::Done)
            }
            PodOp::StopSandbox { id } => match self.runtime.stop_pod_sandbox(id).await {
                Ok(()) => OpResult::Done,
                Err(e) => failed("FailedKillPod", "error killing pod", &e),
            },
            PodOp::CreateSandbox { attempt } => self.create_sandbox(pod, *attempt).await,
            PodOp::StartContainer { name, attempt, pull, .. } => {
                self.start_container(pod, name, *attempt, *pull, observed, cancel).await
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
            PodOp::RemoveSandbox { id } => {
                let removed = match self.runtime.stop_pod_sandbox(id).await {
                    Ok(()) => self.runtime.remove_pod_sandbox(id).await,
                    stopped => stopped,
                };
                removed.map_or_else(|e| failed("ContainerGCFailed", "error removing a sandbox", &e), |()| OpResult::Done)
            }
            PodOp::Release { forget } => self.release(pod, *forget).await,
        }
    }

    fn sandbox_config(&self, pod: &Pod, attempt: u32) -> Result<cri::PodSandboxConfig, String> {
        let dns = NodeDns {
            host: fs::read_to_string(&self.config.resolv_conf).ok(),
            cluster_servers: self.config.cluster_dns.clone(),
            cluster_domain: self.config.cluster_domain.clone(),
        };
        let cgroup_parent = self.cgroups.as_ref().map(|c| c.pod_path(qos_class(pod), pod::uid(pod))).unwrap_or_default();
        let context = SandboxContext {
            cgroup_parent: &cgroup_parent,
            logs: &self.config.pod_logs_dir,
            dns: &dns,
            capacity: &self.node.capacity,
        };
        sandbox_config(pod, attempt, &context)
    }

    /// Folders, cgroup, volumes. Idempotent.
    async fn prepare(&self, pod: &Arc<Pod>) -> OpResult {
        let (this, pod) = (self.clone(), pod.clone());
        let result = tokio::task::spawn_blocking(move || this.prepare_blocking(&pod)).await;
        match result {
            Ok(Ok(())) => OpResult::Done,
            Ok(Err(reason)) => OpResult::PodFailed(reason),
            Err(e) => OpResult::PodFailed(Reason::new("Failed", e.to_string())),
        }
    }

    fn prepare_blocking(&self, pod: &Pod) -> Result<(), Reason> {
        let dirs = |e: io::Error| Reason::new("Failed", format!("error making pod data directories: {e}"));
        let dir = self.pod_dir(pod);
        for folder in ["volumes", "plugins", "containers"] {
            volume::create_private_dir(&dir.join(folder)).map_err(dirs)?;
        }
        logs::ensure_dir(&logs::pod_log_dir(&self.config.pod_logs_dir, pod)).map_err(dirs)?;
        if let Some(cgroups) = &self.cgroups {
            let limits = pod_limits(pod, &self.node.capacity);
            cgroups.ensure_pod(qos_class(pod), pod::uid(pod), &limits).map_err(|e| {
                let text = format!("unable to ensure pod container exists: {}", with_causes(&e));
                Reason::new("FailedCreatePodContainer", text)
            })?;
        }
        volume::set_up(pod, &dir, &self.node.capacity).map_err(|e| Reason::new("FailedMount", e))
    }

    /// Volumes, cgroup and, when nothing of the pod is kept, its folder.
    async fn release(&self, pod: &Arc<Pod>, forget: bool) -> OpResult {
        let (this, pod) = (self.clone(), pod.clone());
        let release = move || -> Result<(), Reason> {
            let failed = |e: String| Reason::new("FailedKillPod", format!("error killing pod: {e}"));
            let dir = this.pod_dir(&pod);
            volume::tear_down(&dir).map_err(failed)?;
            if let Some(cgroups) = &this.cgroups {
                cgroups.remove_pod(pod::uid(&pod)).map_err(|e| failed(with_causes(&e)))?;
            }
            match fs::remove_dir_all(&dir) {
                Err(e) if forget && e.kind() != io::ErrorKind::NotFound => Err(failed(e.to_string())),
                _ => Ok(()),
            }
        };
        match tokio::task::spawn_blocking(release).await {
            Ok(Ok(())) => OpResult::Done,
            Ok(Err(reason)) => OpResult::PodFailed(reason),
            Err(e) => OpResult::PodFailed(Reason::new("FailedKillPod", e.to_string())),
        }
    }

    async fn create_sandbox(&self, pod: &Pod, attempt: u32) -> OpResult {
        let failed = |text: &str| {
            OpResult::PodFailed(Reason::new("FailedCreatePodSandBox", format!("Failed to create pod sandbox: {text}")))
        };
        if !pod::is_host_network(pod)
            && let Some(problem) = self.network_problem().await
        {
            return OpResult::NetworkNotReady(problem);
        }
        if attempt > 0 {
            tracing::info!(pod = %pod::format_pod(pod), "Pod sandbox changed, it will be killed and re-created.");
        }
        let config = match self.sandbox_config(pod, attempt) {
            Ok(config) => config,
            Err(text) => return failed(&text),
        };
        match self.runtime.run_pod_sandbox(config).await {
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

    async fn resize(&self, pod: &Pod, id: &str, name: &str) -> OpResult {
        let Some(container) = pod::spec(pod).containers.iter().find(|c| c.name == name) else { return OpResult::Done };
        let resources = container_resources(pod, container, &self.node.capacity);
        tracing::info!(pod = %pod::format_pod(pod), container = name, limits = ?Limits::from(&resources), "limits change");
        if let Some(cgroups) = self.cgroups.clone() {
            let limits = pod_limits(pod, &self.node.capacity);
            let (qos, uid) = (qos_class(pod), pod::uid(pod).to_owned());
            let applied = tokio::task::spawn_blocking(move || cgroups.ensure_pod(qos, &uid, &limits)).await;
            if let Ok(Err(e)) = applied {
                return OpResult::StartFailed(Reason::new("ResizeError", with_causes(&e)));
            }
        }
        match self.runtime.update_container_resources(id, resources).await {
            Ok(()) => OpResult::Done,
            Err(e) => OpResult::StartFailed(Reason::new("ResizeError", calls::message(&e))),
        }
    }

    async fn start_container(
        &self,
        pod: &Arc<Pod>,
        name: &str,
        attempt: u32,
        may_pull: bool,
        observed: &PodObserved,
        cancel: &CancellationToken,
    ) -> OpResult {
        let all = pod::init_containers(pod).iter().chain(&pod::spec(pod).containers);
        let Some(container) = all.into_iter().find(|c| c.name == name) else { return OpResult::Done };
        let Some(sandbox) = observed.sandbox() else { return OpResult::Cancelled };
        let config_error = |text: String| OpResult::StartFailed(Reason::new("CreateContainerConfigError", text));
        let sandbox_config = match self.sandbox_config(pod, sandbox.attempt) {
            Ok(config) => config,
            Err(text) => return config_error(text),
        };
        let image = match self.ensure_image(pod, container, may_pull, &sandbox_config, cancel).await {
            Ok(image) => image,
            Err(result) => return result,
        };
        if cancel.is_cancelled() {
            return OpResult::Cancelled;
        }
        let pod_ips = if pod::is_host_network(pod) { &self.node.host_ips } else { &sandbox.ips };
        let mounts = match self.container_files(pod, container, pod_ips).await {
            Ok(mounts) => mounts,
            Err(text) => return config_error(text),
        };
        let image_user = ImageUser { uid: image.uid.map(|u| u.value), username: image.username.clone() };
        let context = ContainerContext {
            attempt,
            image_ref: &image.id,
            image_user: &image_user,
            node_name: &self.node.name,
            host_ips: &self.node.host_ips,
            pod_ips,
            capacity: &self.node.capacity,
            seccomp_root: &self.config.kubelet_root.join("seccomp"),
            log_limits: self.config.log_limits,
            mounts: &mounts,
        };
        let config = match container_config(pod, container, &context) {
            Ok(config) => config,
            Err(text) => return config_error(text),
        };
        let id = match self.runtime.create_container(&sandbox.id, config, sandbox_config).await {
            Ok(id) => id,
            Err(e) => return OpResult::StartFailed(Reason::new("CreateContainerError", calls::message(&e))),
        };
        if let Err(e) = self.runtime.start_container(&id).await {
            return OpResult::StartFailed(Reason::new("RunContainerError", calls::message(&e)));
        }
        tracing::info!(pod = %pod::format_pod(pod), container = name, attempt, %id, "container started");
        self.link_log(pod, name, attempt, &id).await;
        OpResult::Done
    }

    /// The image by the container's pull policy.
    async fn ensure_image(
        &self,
        pod: &Pod,
        container: &Container,
        may_pull: bool,
        sandbox_config: &cri::PodSandboxConfig,
        cancel: &CancellationToken,
    ) -> Result<cri::Image, OpResult> {
        let wanted = container.image.clone().unwrap_or_default();
        let image = image_name::normalize(&wanted).map_err(|e| {
            let text = format!("Failed to apply default image tag {wanted:?}: {e}");
            OpResult::StartFailed(Reason::new("InvalidImageName", text))
        })?;
        let inspect = |e: Error| {
            let text = format!("Failed to inspect image {wanted:?}: {}", calls::message(&e));
            OpResult::StartFailed(Reason::new("ImageInspectError", text))
        };
        let policy = container.image_pull_policy.as_deref().unwrap_or("IfNotPresent");
        if policy != "Always" {
            if let Some(found) = self.runtime.image_status(&image).await.map_err(inspect)? {
                return Ok(found);
            }
            if policy == "Never" {
                let text = format!("Container image {wanted:?} is not present with pull policy of Never");
                return Err(OpResult::StartFailed(Reason::new("ErrImageNeverPull", text)));
            }
        }
        let failed = |reason: Reason, pulled| OpResult::PullFailed { image: wanted.clone(), reason, pulled };
        if !may_pull {
            return Err(failed(Reason::new("ImagePullBackOff", format!("Back-off pulling image {wanted:?}")), false));
        }
        tracing::info!(pod = %pod::format_pod(pod), image = wanted, "Pulling image");
        let pulled = tokio::select! {
            pulled = self.runtime.pull_image(&image, sandbox_config.clone()) => pulled,
            () = cancel.cancelled() => return Err(OpResult::Cancelled),
        };
        let reference = pulled.map_err(|e| failed(pull_reason(&wanted, &e), true))?;
        let found = self.runtime.image_status(&reference).await.map_err(inspect)?;
        found.ok_or_else(|| failed(Reason::new("ErrImagePull", "the pulled image is not listed"), true))
    }

    /// Hosts file, termination message file and log folder; all mounts of the container.
    async fn container_files(
        &self,
        pod: &Arc<Pod>,
        container: &Container,
        pod_ips: &[String],
    ) -> Result<Vec<cri::Mount>, String> {
        let (this, pod, container, ips) = (self.clone(), pod.clone(), container.clone(), pod_ips.to_vec());
        let files = move || this.container_files_blocking(&pod, &container, &ips);
        tokio::task::spawn_blocking(files).await.map_err(|e| e.to_string())?
    }

    fn container_files_blocking(&self, pod: &Pod, container: &Container, pod_ips: &[String]) -> Result<Vec<cri::Mount>, String> {
        let dir = self.pod_dir(pod);
        let paths = volume::paths(pod, &dir);
        let mut mounts = volume_mounts(container, |name| paths.get(name).map(String::as_str))?;
        let log_dir = logs::pod_log_dir(&self.config.pod_logs_dir, pod).join(&container.name);
        logs::ensure_dir(&log_dir).map_err(|e| format!("create log folder {}: {e}", log_dir.display()))?;
        if !mounts_at(container, "/etc/hosts") {
            let hostname = Hostname::of(pod, &self.config.cluster_domain);
            let host_file = fs::read_to_string(&self.config.hosts_file).unwrap_or_default();
            if let Some(content) = hosts::content(pod, pod_ips, &hostname, &host_file) {
                let path = hosts::write(&dir, &content).map_err(|e| format!("write the hosts file: {e}"))?;
                mounts.push(file_mount("/etc/hosts", &path));
            }
        }
        let message_path = container.termination_message_path.as_deref().unwrap_or_default();
        if !message_path.is_empty() && !mounts_at(container, message_path) {
            let file = new_message_file(&dir.join("containers").join(&container.name))
                .map_err(|e| format!("create the termination message file: {e}"))?;
            mounts.push(file_mount(message_path, &file));
        }
        Ok(mounts)
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

fn file_mount(container_path: &str, host_path: &Path) -> cri::Mount {
    cri::Mount {
        container_path: container_path.to_owned(),
        host_path: host_path.to_string_lossy().into_owned(),
        ..Default::default()
    }
}

/// A new file that any user may write; of the older ones only the two newest stay.
fn new_message_file(folder: &Path) -> io::Result<PathBuf> {
    volume::create_private_dir(folder)?;
    let mut old: Vec<(SystemTime, PathBuf)> = fs::read_dir(folder)?
        .flatten()
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    old.sort();
    for (_, path) in old.iter().rev().skip(2) {
        let _ = fs::remove_file(path);
    }
    loop {
        let mut random = [0u8; 4];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let path = folder.join(format!("{:08x}", u32::from_le_bytes(random)));
        match fs::File::create_new(&path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
            created => created?.set_permissions(fs::Permissions::from_mode(0o666))?,
        }
        return Ok(path);
    }
}

fn pull_reason(image: &str, error: &Error) -> Reason {
    let message = calls::message(error);
    for (prefix, text) in
        [("RegistryUnavailable", "the registry is unavailable"), ("SignatureValidationFailed", "the signature validation failed")]
    {
        if let Some(rest) = message.strip_prefix(prefix) {
            return Reason::new(prefix, format!("image pull failed for {image} because {text}{rest}"));
        }
    }
    let text = match error {
        Error::Cri { source, .. } => calls::status_text(source),
        other => other.to_string(),
    };
    Reason::new("ErrImagePull", text)
}

/// An error with all its causes on one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_files_are_new_writable_for_all_and_few() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("c");
        let files: Vec<_> = (0..6).map(|_| new_message_file(&folder).unwrap()).collect();
        assert!(files.windows(2).all(|w| w[0] != w[1]));
        assert_eq!(fs::metadata(&files[5]).unwrap().permissions().mode() & 0o777, 0o666);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 3);
    }

    #[test]
    fn pull_errors_name_their_reason() {
        let error = |code, text: &str| Error::Cri { call: "PullImage", source: Box::new(tonic::Status::new(code, text)) };
        let cases = [
            (error(tonic::Code::Unknown, "boom"), "ErrImagePull", "boom"),
            (error(tonic::Code::NotFound, "x"), "ErrImagePull", "rpc error: code = NotFound desc = x"),
            (
                error(tonic::Code::Unknown, "RegistryUnavailable: down"),
                "RegistryUnavailable",
                "image pull failed for i because the registry is unavailable: down",
            ),
        ];
        for (error, reason, message) in cases {
            assert_eq!(pull_reason("i", &error), Reason::new(reason, message));
        }
    }
}
