//! The runtime as the kubelet sees it: CRI clients with the contract's time limits. The only caller of the generated
//! clients; decides nothing about pods.

mod care;
mod serving;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use berth_cri_api::MAX_MESSAGE_BYTES;
use berth_cri_api::v1 as cri;
use berth_cri_api::v1::image_service_client::ImageServiceClient;
use berth_cri_api::v1::runtime_service_client::RuntimeServiceClient;
use tonic::transport::Channel;
use tonic::{Code, Response, Status, Streaming};

use crate::config::Timing;
use crate::metrics::calls::Counted;
use crate::metrics::{Metrics, families};
use crate::{Error, Result};

/// Label and annotation keys of the contract.
pub mod keys {
    /// Label: pod name.
    pub const POD_NAME: &str = "io.kubernetes.pod.name";
    /// Label: pod namespace.
    pub const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
    /// Label: pod UID.
    pub const POD_UID: &str = "io.kubernetes.pod.uid";
    /// Label: container name.
    pub const CONTAINER_NAME: &str = "io.kubernetes.container.name";
    /// Annotation: hash of the container's definition.
    pub const CONTAINER_HASH: &str = "io.kubernetes.container.hash";
    /// Annotation: restart count.
    pub const RESTART_COUNT: &str = "io.kubernetes.container.restartCount";
    /// Annotation: where the termination message is mounted.
    pub const MESSAGE_PATH: &str = "io.kubernetes.container.terminationMessagePath";
    /// Annotation: how the termination message is found.
    pub const MESSAGE_POLICY: &str = "io.kubernetes.container.terminationMessagePolicy";
    /// Annotation: grace period of the pod.
    pub const GRACE: &str = "io.kubernetes.pod.terminationGracePeriod";
    /// Annotation: the preStop hook as JSON, for a kubelet that has lost the pod's spec.
    pub const PRE_STOP: &str = "io.kubernetes.container.preStopHandler";
    /// Annotation of ours: size at which the log is rotated.
    pub const LOG_MAX_BYTES: &str = "berth/log-max-bytes";
    /// Annotation of ours: how many log files are kept.
    pub const LOG_MAX_FILES: &str = "berth/log-max-files";
}

/// A gRPC status as the kubelet prints it: the message, with the code unless it is Unknown.
pub fn status_text(status: &Status) -> String {
    match status.code() {
        Code::Unknown => status.message().to_owned(),
        code => format!("rpc error: code = {code:?} desc = {}", status.message()),
    }
}

/// Clients of the runtime and image services.
#[derive(Clone, Debug)]
pub struct Runtime {
    runtime: RuntimeServiceClient<Counted>,
    images: ImageServiceClient<Counted>,
    timing: Timing,
    metrics: Metrics,
    /// Nothing is begun for pods while this says so.
    ill: Arc<AtomicBool>,
}

/// Runs a call within its limit.
async fn limited<T>(call: &'static str, limit: Duration, future: impl Future<Output = Result<Response<T>, Status>>) -> Result<T> {
    let answer = match tokio::time::timeout(limit, future).await {
        Ok(answer) => answer,
        Err(_) => Err(Status::deadline_exceeded(format!("no answer within {}s", limit.as_secs()))),
    };
    answer.map(Response::into_inner).map_err(|source| Error::Cri { call, source: Box::new(source) })
}

/// The code of a failed CRI call.
pub fn code(error: &Error) -> Option<Code> {
    match error {
        Error::Cri { source, .. } => Some(source.code()),
        _ => None,
    }
}

/// The message of a failed CRI call without its code, as users are shown it.
pub fn message(error: &Error) -> String {
    match error {
        Error::Cri { source, .. } => source.message().to_owned(),
        other => other.to_string(),
    }
}

/// Absence is success.
fn unless_absent<T: Default>(result: Result<T>) -> Result<T> {
    match result {
        Err(e) if code(&e) == Some(Code::NotFound) => Ok(T::default()),
        other => other,
    }
}

fn by_uid(uid: Option<&str>) -> std::collections::HashMap<String, String> {
    uid.map(|uid| (keys::POD_UID.to_owned(), uid.to_owned())).into_iter().collect()
}

impl Runtime {
    /// Clients on one channel.
    pub fn new(channel: Channel, timing: Timing) -> Runtime {
        let metrics = Metrics::default();
        let channel = Counted::new(channel, metrics.clone());
        let runtime = RuntimeServiceClient::new(channel.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let images = ImageServiceClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        Runtime { runtime, images, timing, metrics, ill: Arc::default() }
    }

    /// Whether the runtime is well enough for work, as far as whoever watches it has said.
    pub fn is_well(&self) -> bool {
        !self.ill.load(Ordering::Relaxed)
    }

    /// Told by whoever watches the runtime; whether that is news.
    pub(crate) fn set_well(&self, well: bool) -> bool {
        self.ill.swap(!well, Ordering::Relaxed) == well
    }

    /// The kubelet's own numbers: whoever has the runtime can count.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Name and version of the runtime.
    pub async fn version(&self) -> Result<cri::VersionResponse> {
        let request = cri::VersionRequest { version: "0.1.0".to_owned() };
        limited("Version", self.timing.cri_call, self.runtime.clone().version(request)).await
    }

    /// Readiness of runtime and network.
    pub async fn status(&self) -> Result<cri::StatusResponse> {
        limited("Status", self.timing.cri_call, self.runtime.clone().status(cri::StatusRequest::default())).await
    }

    /// Whether the runtime's default handler can make mounts read-only with everything below them.
    pub async fn can_mount_recursive_read_only(&self) -> Result<bool> {
        let handlers = self.status().await?.runtime_handlers;
        let features = handlers.into_iter().find(|handler| handler.name.is_empty()).and_then(|handler| handler.features);
        Ok(features.is_some_and(|features| features.recursive_read_only_mounts))
    }

    /// Whether a handler (empty: the default one) can give a pod a user namespace.
    pub async fn has_user_namespaces(&self, handler: &str) -> Result<bool> {
        let handlers = self.status().await?.runtime_handlers;
        let features = handlers.into_iter().find(|known| known.name == handler).and_then(|known| known.features);
        Ok(features.is_some_and(|features| features.user_namespaces))
    }

    /// The cgroup driver; `None` where the runtime does not say.
    pub async fn cgroup_driver(&self) -> Result<Option<cri::CgroupDriver>> {
        let call = self.runtime.clone();
        let mut call = call;
        match limited("RuntimeConfig", self.timing.cri_call, call.runtime_config(cri::RuntimeConfigRequest {})).await {
            Ok(answer) => Ok(answer.linux.map(|linux| linux.cgroup_driver())),
            Err(e) if code(&e) == Some(Code::Unimplemented) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The stream of container events.
    pub async fn events(&self) -> Result<Streaming<cri::ContainerEventResponse>> {
        let mut client = self.runtime.clone();
        let call = client.get_container_events(cri::GetEventsRequest {});
        limited("GetContainerEvents", self.timing.cri_call, call).await
    }

    /// Makes a sandbox with a runtime handler (empty: the default one); its ID.
    pub async fn run_pod_sandbox(&self, config: cri::PodSandboxConfig, handler: String) -> Result<String> {
        let request = cri::RunPodSandboxRequest { config: Some(config), runtime_handler: handler.clone() };
        let labels = [handler.as_str()];
        let mut client = self.runtime.clone();
        let begun = tokio::time::Instant::now();
        let answer = limited("RunPodSandbox", self.timing.cri_sandbox, client.run_pod_sandbox(request)).await;
        self.metrics.observe(&families::SANDBOX_SECONDS, &labels, begun.elapsed());
        self.metrics.count(&families::STARTED_PODS, &[]);
        if answer.is_err() {
            self.metrics.count(&families::SANDBOX_ERRORS, &labels);
            self.metrics.count(&families::STARTED_PODS_ERRORS, &[]);
        }
        Ok(answer?.pod_sandbox_id)
    }

    /// Stops a sandbox; an absent one is stopped.
    pub async fn stop_pod_sandbox(&self, id: &str) -> Result<()> {
        let request = cri::StopPodSandboxRequest { pod_sandbox_id: id.to_owned() };
        let mut client = self.runtime.clone();
        unless_absent(limited("StopPodSandbox", self.timing.cri_call, client.stop_pod_sandbox(request)).await)?;
        Ok(())
    }

    /// Removes a sandbox; an absent one is removed.
    pub async fn remove_pod_sandbox(&self, id: &str) -> Result<()> {
        let request = cri::RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() };
        let mut client = self.runtime.clone();
        unless_absent(limited("RemovePodSandbox", self.timing.cri_call, client.remove_pod_sandbox(request)).await)?;
        Ok(())
    }

    /// A sandbox's status; `None` when it is gone.
    pub async fn pod_sandbox_status(&self, id: &str) -> Result<Option<cri::PodSandboxStatus>> {
        let request = cri::PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        let mut client = self.runtime.clone();
        let call = client.pod_sandbox_status(request);
        Ok(unless_absent(limited("PodSandboxStatus", self.timing.cri_call, call).await)?.status)
    }

    /// Sandboxes of one pod, or all that belong to pods.
    pub async fn list_pod_sandboxes(&self, uid: Option<&str>) -> Result<Vec<cri::PodSandbox>> {
        let filter = cri::PodSandboxFilter { label_selector: by_uid(uid), ..Default::default() };
        let request = cri::ListPodSandboxRequest { filter: Some(filter) };
        let mut client = self.runtime.clone();
        let answer = limited("ListPodSandbox", self.timing.cri_call, client.list_pod_sandbox(request)).await?;
        Ok(answer.items)
    }

    /// Containers of one pod, or all.
    pub async fn list_containers(&self, uid: Option<&str>) -> Result<Vec<cri::Container>> {
        let filter = cri::ContainerFilter { label_selector: by_uid(uid), ..Default::default() };
        let request = cri::ListContainersRequest { filter: Some(filter) };
        let mut client = self.runtime.clone();
        let answer = limited("ListContainers", self.timing.cri_call, client.list_containers(request)).await?;
        Ok(answer.containers)
    }

    /// A container's status; `None` when it is gone.
    pub async fn container_status(&self, id: &str) -> Result<Option<cri::ContainerStatus>> {
        let request = cri::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        let mut client = self.runtime.clone();
        let call = client.container_status(request);
        Ok(unless_absent(limited("ContainerStatus", self.timing.cri_call, call).await)?.status)
    }

    /// Makes a container; its ID.
    pub async fn create_container(
        &self,
        sandbox: &str,
        config: cri::ContainerConfig,
        sandbox_config: cri::PodSandboxConfig,
    ) -> Result<String> {
        let request = cri::CreateContainerRequest {
            pod_sandbox_id: sandbox.to_owned(),
            config: Some(config),
            sandbox_config: Some(sandbox_config),
        };
        let mut client = self.runtime.clone();
        let answer = limited("CreateContainer", self.timing.cri_call, client.create_container(request)).await?;
        Ok(answer.container_id)
    }

    /// Starts a container.
    pub async fn start_container(&self, id: &str) -> Result<()> {
        let request = cri::StartContainerRequest { container_id: id.to_owned() };
        let mut client = self.runtime.clone();
        limited("StartContainer", self.timing.cri_call, client.start_container(request)).await?;
        Ok(())
    }

    /// Stops a container within `grace` seconds; an absent one is stopped.
    pub async fn stop_container(&self, id: &str, grace: i64) -> Result<()> {
        let request = cri::StopContainerRequest { container_id: id.to_owned(), timeout: grace };
        let limit = self.timing.cri_call + Duration::from_secs(u64::try_from(grace).unwrap_or(0));
        let mut client = self.runtime.clone();
        unless_absent(limited("StopContainer", limit, client.stop_container(request)).await)?;
        Ok(())
    }

    /// Removes a container; an absent one is removed.
    pub async fn remove_container(&self, id: &str) -> Result<()> {
        let request = cri::RemoveContainerRequest { container_id: id.to_owned() };
        let mut client = self.runtime.clone();
        unless_absent(limited("RemoveContainer", self.timing.cri_call, client.remove_container(request)).await)?;
        Ok(())
    }

    /// Changes a running container's limits.
    pub async fn update_container_resources(&self, id: &str, linux: cri::LinuxContainerResources) -> Result<()> {
        let request =
            cri::UpdateContainerResourcesRequest { container_id: id.to_owned(), linux: Some(linux), ..Default::default() };
        let mut client = self.runtime.clone();
        let call = client.update_container_resources(request);
        limited("UpdateContainerResources", self.timing.cri_call, call).await?;
        Ok(())
    }

    /// Runs a command in a container.
    pub async fn exec_sync(&self, id: &str, cmd: Vec<String>, timeout: Duration) -> Result<cri::ExecSyncResponse> {
        let seconds = i64::try_from(timeout.as_secs().max(1)).unwrap_or(i64::MAX);
        let request = cri::ExecSyncRequest { container_id: id.to_owned(), cmd, timeout: seconds };
        let mut client = self.runtime.clone();
        limited("ExecSync", self.timing.cri_call + timeout, client.exec_sync(request)).await
    }

    /// Runs a command in a container for as long as it takes. Dropping the future gives up.
    pub async fn exec_sync_unlimited(&self, id: &str, cmd: Vec<String>) -> Result<cri::ExecSyncResponse> {
        let request = cri::ExecSyncRequest { container_id: id.to_owned(), cmd, timeout: 0 };
        let mut client = self.runtime.clone();
        let answer = client.exec_sync(request).await;
        answer.map(Response::into_inner).map_err(|source| Error::Cri { call: "ExecSync", source: Box::new(source) })
    }

    /// An image; `None` when it is absent.
    pub async fn image_status(&self, image: &str) -> Result<Option<cri::Image>> {
        let request = cri::ImageStatusRequest { image: Some(image_spec(image)), verbose: false };
        let mut client = self.images.clone();
        let answer = limited("ImageStatus", self.timing.cri_call, client.image_status(request)).await?;
        Ok(answer.image.filter(|image| !image.id.is_empty()))
    }

    /// Pulls an image without a time limit; its reference. Dropping the future gives up.
    pub async fn pull_image(
        &self,
        image: &str,
        auth: Option<cri::AuthConfig>,
        sandbox_config: cri::PodSandboxConfig,
    ) -> Result<String> {
        let request = cri::PullImageRequest { image: Some(image_spec(image)), auth, sandbox_config: Some(sandbox_config) };
        let mut client = self.images.clone();
        match client.pull_image(request).await {
            Ok(answer) => Ok(answer.into_inner().image_ref),
            Err(source) => Err(Error::Cri { call: "PullImage", source: Box::new(source) }),
        }
    }
}

fn image_spec(image: &str) -> cri::ImageSpec {
    cri::ImageSpec { image: image.to_owned(), user_specified_image: image.to_owned(), ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_codes_are_not_printed_and_others_are() {
        assert_eq!(status_text(&Status::unknown("boom")), "boom");
        assert_eq!(status_text(&Status::not_found("x")), "rpc error: code = NotFound desc = x");
    }
}
