//! The start of one container: image, files, configuration, create, start. Each failure has its reason for the status.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use berth_cri_api::v1 as cri;
use k8s_openapi::api::core::v1::{Container, ImageVolumeSource, Pod, VolumeMount};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Executor, OpResult};
use crate::backoff::format_delay;
use crate::container_config::{
    ContainerContext, MountSource, container_config, mounts_at, volume_mounts, without_recursive_read_only,
};
use crate::cri as calls;
use crate::env::{EnvContext, Variable, container_env, expand_path, skipped_keys};
use crate::hosts::{self, Hostname};
use crate::memory::Reason;
use crate::observed::PodObserved;
use crate::pod::{self, PodUid};
use crate::pod_objects::Need;
use crate::record::Weight;
use crate::security::ImageUser;
use crate::volume::Located;
use crate::volume::sub_path::{self, Place};
use crate::{Error, hook_record, image_name, logs, pull_secret, volume};

/// For whom and with what an image is pulled.
#[derive(Clone, Copy)]
struct Pull<'a> {
    pod: &'a Pod,
    container: &'a str,
    may_pull: bool,
    sandbox_config: &'a cri::PodSandboxConfig,
    cancel: &'a CancellationToken,
}

impl Executor {
    pub(super) async fn start_container(
        &self,
        pod: &Arc<Pod>,
        name: &str,
        attempt: u32,
        may_pull: bool,
        observed: &PodObserved,
        cancel: &CancellationToken,
    ) -> OpResult {
        let Some(container) = pod::container(pod, name) else { return OpResult::Done };
        let container = &*container;
        let Some(sandbox) = observed.sandbox() else { return OpResult::Cancelled };
        let config_error = |text: String| OpResult::StartFailed(Reason::new("CreateContainerConfigError", text));
        let sandbox_config = match self.sandbox_config(pod, sandbox.attempt) {
            Ok(config) => config,
            Err(text) => return config_error(text),
        };
        let wanted = container.image.clone().unwrap_or_default();
        let policy = container.image_pull_policy.as_deref();
        let pull = Pull { pod, container: name, may_pull, sandbox_config: &sandbox_config, cancel };
        let image = match self.ensure_image(&pull, &wanted, policy).await {
            Ok(image) => image,
            Err(result) => return result,
        };
        for source in image_volumes(pod, container) {
            let wanted = source.reference.clone().unwrap_or_default();
            let policy = source.pull_policy.as_deref();
            if let Err(result) = self.ensure_image(&pull, &wanted, policy).await {
                return result;
            }
        }
        if cancel.is_cancelled() {
            return OpResult::Cancelled;
        }
        let pod_ips = if pod::is_host_network(pod) { &self.node.host_ips } else { &sandbox.ips };
        self.objects.ready(pod, Need::Environment(container), cancel).await;
        let services = match self.objects.service_variables(pod) {
            Ok(services) => services,
            Err(text) => return config_error(text),
        };
        let variables = {
            let context = EnvContext {
                pod,
                node_name: &self.node.name,
                host_ips: &self.node.host_ips,
                pod_ips,
                capacity: &self.node.capacity,
                objects: self.objects.of(pod),
                pod_dir: &self.pod_dir(pod),
                services: &services,
            };
            for text in skipped_keys(container, &context) {
                self.recorder.event(pod, Some(name), Weight::Warning, "InvalidEnvironmentVariableNames", &text);
            }
            match container_env(container, &context) {
                Ok(variables) => Arc::new(variables),
                Err(text) => return config_error(text),
            }
        };
        let mut mounts = match self.container_files(pod, container, pod_ips, &variables).await {
            Ok(mounts) => mounts,
            Err(text) => return config_error(text),
        };
        if mounts.iter().any(|mount| mount.recursive_read_only) {
            let fitted = match self.runtime.can_mount_recursive_read_only().await {
                Ok(true) => Ok(()),
                Ok(false) => without_recursive_read_only(container, &mut mounts),
                Err(e) => Err(calls::message(&e)),
            };
            if let Err(text) = fitted {
                return config_error(text);
            }
        }
        let image_user = ImageUser { uid: image.uid.map(|u| u.value), username: image.username.clone() };
        let context = ContainerContext {
            attempt,
            image_ref: &image.id,
            image_user: &image_user,
            variables: &variables,
            capacity: &self.node.capacity,
            seccomp_root: &self.config.kubelet_root.join("seccomp"),
            log_limits: self.config.log_limits,
            mounts: &mounts,
        };
        let mut config = match container_config(pod, container, &context) {
            Ok(config) => cri::ContainerConfig { stop_signal: super::stop::stop_signal(container), ..config },
            Err(text) => return config_error(text),
        };
        if let Err(text) = join_target(pod, name, observed, &mut config) {
            return config_error(text);
        }
        match self.host_ids.ensure(pod) {
            Ok(Some(first)) => crate::userns::apply_to_container(&mut config, first),
            Ok(None) => {}
            Err(text) => return config_error(text),
        }
        if let Some(cpus) = self.cpus.list_of(pod::uid(pod), name)
            && let Some(resources) = config.linux.as_mut().and_then(|linux| linux.resources.as_mut())
        {
            resources.cpuset_cpus = cpus;
        }
        match self.devices.prepare(pod, container).await {
            Ok(prepared) => prepared.apply_to(&mut config),
            Err(text) => return config_error(text),
        }
        if self.config.seccomp_default
            && let Some(security) = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut())
        {
            crate::security::default_seccomp(pod, container, security);
        }
        let id = match self.runtime.create_container(&sandbox.id, config, sandbox_config).await {
            Ok(id) => id,
            Err(e) => return OpResult::StartFailed(Reason::new("CreateContainerError", calls::message(&e))),
        };
        self.recorder.event(pod, Some(name), Weight::Normal, "Created", "Container created");
        if has_post_start(container)
            && let Err(e) = hook_record::begin(&self.pod_dir(pod), name, attempt)
        {
            return config_error(format!("keep the postStart hook on record: {e}"));
        }
        if let Err(e) = self.runtime.start_container(&id).await {
            return OpResult::StartFailed(Reason::new("RunContainerError", calls::message(&e)));
        }
        tracing::debug!(pod = %pod::format_pod(pod), container = name, attempt, %id, "started");
        self.recorder.event(pod, Some(name), Weight::Normal, "Started", "Container started");
        self.link_log(pod, name, attempt, &id).await;
        match self.post_start(pod, container, &id, observed, cancel).await {
            Ok(()) => OpResult::Done,
            Err(result) => result,
        }
    }

    /// Pulls with each of the credentials that fit until one works; without any, as nobody.
    async fn pull(&self, pod: &Pod, image: &str, sandbox_config: &cri::PodSandboxConfig) -> crate::Result<String> {
        let mut outcome = None;
        let (credentials, problems) = pull_secret::credentials(pod, image, self.objects.of(pod));
        for text in problems {
            self.recorder.event(pod, None, Weight::Warning, "FailedToRetrieveImagePullSecret", &text);
        }
        for auth in credentials {
            let pulled = self.runtime.pull_image(image, Some(auth), sandbox_config.clone()).await;
            if pulled.is_ok() {
                return pulled;
            }
            outcome = Some(pulled);
        }
        match outcome {
            Some(failed) => failed,
            None => self.runtime.pull_image(image, None, sandbox_config.clone()).await,
        }
    }

    /// The image by its pull policy.
    async fn ensure_image(&self, how: &Pull<'_>, wanted: &str, policy: Option<&str>) -> Result<cri::Image, OpResult> {
        let Pull { pod, container, may_pull, sandbox_config, cancel } = *how;
        let event = |reason: &str, message: &str| {
            self.recorder.event(pod, Some(container), Weight::Normal, reason, message);
        };
        let image = image_name::normalize(wanted).map_err(|e| {
            let text = format!("Failed to apply default image tag {wanted:?}: {e}");
            OpResult::StartFailed(Reason::new("InvalidImageName", text))
        })?;
        let inspect = |e: Error| {
            let text = format!("Failed to inspect image {wanted:?}: {}", calls::message(&e));
            OpResult::StartFailed(Reason::new("ImageInspectError", text))
        };
        let policy = policy.unwrap_or("IfNotPresent");
        if policy != "Always" {
            if let Some(found) = self.runtime.image_status(&image).await.map_err(inspect)? {
                event("Pulled", &format!("Container image {wanted:?} already present on machine"));
                return Ok(found);
            }
            if policy == "Never" {
                let text = format!("Container image {wanted:?} is not present with pull policy of Never");
                return Err(OpResult::StartFailed(Reason::new("ErrImageNeverPull", text)));
            }
        }
        let failed = |reason: Reason, pulled| OpResult::PullFailed { image: wanted.to_owned(), reason, pulled };
        if !may_pull {
            return Err(failed(Reason::new("ImagePullBackOff", format!("Back-off pulling image {wanted:?}")), false));
        }
        event("Pulling", &format!("Pulling image {wanted:?}"));
        let begun = Instant::now();
        let _pulling = PodUid::of(pod).map(|uid| self.doing.pull(&uid, container, wanted, self.config.clock.now()));
        self.objects.ready(pod, Need::PullSecrets, cancel).await;
        let pulled = tokio::select! {
            pulled = self.pull(pod, &image, sandbox_config) => pulled,
            () = cancel.cancelled() => return Err(OpResult::Cancelled),
        };
        let reference = pulled.map_err(|e| failed(pull_reason(wanted, &e), true))?;
        let found = self.runtime.image_status(&reference).await.map_err(inspect)?;
        let found = found.ok_or_else(|| failed(Reason::new("ErrImagePull", "the pulled image is not listed"), true))?;
        let (took, size) = (begun.elapsed(), found.size);
        let took = format_delay(Duration::from_millis(u64::try_from(took.as_millis()).unwrap_or(u64::MAX)));
        let pulled =
            format!("Successfully pulled image {wanted:?} in {took} ({took} including waiting). Image size: {size} bytes.");
        event("Pulled", &pulled);
        Ok(found)
    }

    /// Hosts file, termination message file and log folder; all mounts of the container.
    async fn container_files(
        &self,
        pod: &Arc<Pod>,
        container: &Container,
        pod_ips: &[String],
        variables: &Arc<Vec<Variable>>,
    ) -> Result<Vec<cri::Mount>, String> {
        let (this, pod, container, ips) = (self.clone(), pod.clone(), container.clone(), pod_ips.to_vec());
        let variables = variables.clone();
        let files = move || this.container_files_blocking(&pod, &container, &ips, &variables);
        tokio::task::spawn_blocking(files).await.map_err(|e| e.to_string())?
    }

    fn container_files_blocking(
        &self,
        pod: &Pod,
        container: &Container,
        pod_ips: &[String],
        variables: &[Variable],
    ) -> Result<Vec<cri::Mount>, String> {
        let dir = self.pod_dir(pod);
        let mut mounts = self.volume_sources(pod, &dir, container, variables)?;
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
}

impl Executor {
    /// The mounts of the container's volumes, with their subPaths set up.
    fn volume_sources(
        &self,
        pod: &Pod,
        dir: &Path,
        container: &Container,
        variables: &[Variable],
    ) -> Result<Vec<cri::Mount>, String> {
        let located = volume::locate(&self.volume_context(pod, dir));
        let volumes = || pod::spec(pod).volumes.iter().flatten();
        volume_mounts(container, |index, mount| {
            let sub_path = sub_path_of(mount, variables)?;
            if let Some(image) = volumes().find(|v| v.name == mount.name).and_then(|v| v.image.as_ref()) {
                let name = image.reference.clone().unwrap_or_default();
                let image =
                    image_name::normalize(&name).map_err(|e| format!("Failed to apply default image tag {name:?}: {e}"))?;
                let image = cri::ImageSpec { image, user_specified_image: name, ..Default::default() };
                return Ok(Some(MountSource::Image { image, sub_path }));
            }
            let Some(Located { path, read_only }) = located.get(&mount.name) else { return Ok(None) };
            let source = if *read_only { MountSource::ReadOnlyPath } else { MountSource::Path };
            if sub_path.is_empty() {
                return Ok(Some(source(path.clone())));
            }
            let place = Place { pod_dir: dir, volume: &mount.name, container: &container.name, index };
            let mounted = sub_path::set_up(Path::new(path), &sub_path, place).map_err(|e| {
                let what = format!("volumeMount {:?} of container {:?}", mount.name, container.name);
                format!("failed to prepare subPath for {what}: {e}")
            })?;
            Ok(Some(source(mounted.to_string_lossy().into_owned())))
        })
    }
}

/// A container that was added to look into another one sees that one's processes.
fn join_target(pod: &Pod, name: &str, observed: &PodObserved, config: &mut cri::ContainerConfig) -> Result<(), String> {
    let mut added = pod::spec(pod).ephemeral_containers.iter().flatten();
    let target = added.find(|container| container.name == name).and_then(|container| container.target_container_name.as_deref());
    let Some(target) = target.filter(|target| !target.is_empty()) else { return Ok(()) };
    let running = observed.newest(target).filter(|record| record.state == crate::observed::State::Running);
    let id = running.map(|record| record.id.clone()).ok_or_else(|| format!("unable to find target container {target}"))?;
    let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
    if let Some(options) = security.and_then(|security| security.namespace_options.as_mut()) {
        options.pid = cri::NamespaceMode::Target.into();
        options.target_id = id;
    }
    Ok(())
}

/// Whether the container has a postStart hook.
fn has_post_start(container: &Container) -> bool {
    container.lifecycle.as_ref().is_some_and(|lifecycle| lifecycle.post_start.is_some())
}

/// The images that the container mounts.
fn image_volumes<'a>(pod: &'a Pod, container: &'a Container) -> impl Iterator<Item = &'a ImageVolumeSource> {
    let mounted = |name: &str| container.volume_mounts.iter().flatten().any(|mount| mount.name == name);
    pod::spec(pod).volumes.iter().flatten().filter(move |v| mounted(&v.name)).filter_map(|v| v.image.as_ref())
}

/// The subPath of a mount, empty where it has none.
fn sub_path_of(mount: &VolumeMount, variables: &[Variable]) -> Result<String, String> {
    let text = match (&mount.sub_path, mount.sub_path_expr.as_deref()) {
        (_, Some(expr)) if !expr.is_empty() => expand_path(expr, variables)?,
        (sub_path, _) => sub_path.clone().unwrap_or_default(),
    };
    if text.starts_with('/') {
        return Err(format!("error SubPath `{text}` must not be an absolute path"));
    }
    if !sub_path::is_sub_path(&text) {
        return Err(format!("unable to provision SubPath `{text}`: must not contain '..'"));
    }
    Ok(text)
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
