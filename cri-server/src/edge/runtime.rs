//! RuntimeService: each call converts, submits, awaits. Statuses and lists come from the board.

use std::sync::Arc;
use std::time::Duration;

use berth_cri_api::v1::{self, runtime_service_server::RuntimeService};
use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::sync::oneshot;
use tokio_stream::wrappers::BroadcastStream;
use tonic::{Request, Response, Status};

use super::reading::chunks;
use super::verbose;
use crate::CgroupDriver;
use crate::Server;
use crate::convert::{request, resources, status};
use crate::error::{Error, Shared, invalid};
use crate::sandbox::owner;
use crate::sandbox::state::{Op, Resize};
use crate::{checkpoint, exec, metrics, stats, streaming};

/// The edge of the RuntimeService.
#[derive(Clone)]
pub struct RuntimeEdge {
    pub(crate) server: Arc<Server>,
}

type Answer<T> = Result<Response<T>, Status>;
pub(super) type Stream<T> = BoxStream<'static, Result<T, Status>>;

fn shared(error: Arc<Error>) -> Status {
    crate::error::status(&error)
}

fn reply<T>(result: Shared<T>) -> Result<T, Status> {
    result.map_err(shared)
}

/// An operation whose subject may be unknown without harm.
fn forgiving(result: Shared<()>) -> Result<(), Status> {
    match result {
        Err(error) if matches!(*error, Error::NotFound { .. }) => Ok(()),
        other => reply(other),
    }
}

fn seconds(value: i64) -> Duration {
    Duration::from_secs(u64::try_from(value).unwrap_or(0))
}

#[tonic::async_trait]
impl RuntimeService for RuntimeEdge {
    async fn version(&self, _request: Request<v1::VersionRequest>) -> Answer<v1::VersionResponse> {
        Ok(Response::new(v1::VersionResponse {
            version: "0.1.0".into(),
            runtime_name: "berth".into(),
            runtime_version: self.server.config.version.clone(),
            runtime_api_version: "v1".into(),
        }))
    }

    /// A sandbox whose client gave up before it was told is finished, not undone: it is listed as READY, whole, and a retry with
    /// the same metadata is given it. A client that lists before it retries, as the kubelet does, finds it, and removes what it
    /// no longer wants; undoing it here would race with both.
    async fn run_pod_sandbox(&self, request: Request<v1::RunPodSandboxRequest>) -> Answer<v1::RunPodSandboxResponse> {
        let request = request.into_inner();
        let config = request.config.ok_or_else(|| invalid("config", "missing"))?;
        self.server.handlers.check(&request.runtime_handler)?;
        let mut spec = request::sandbox(config, request.runtime_handler)?;
        self.server.cgroups.check_parent(&spec.cgroup_parent)?;
        self.can_have(&spec).await?;
        let taken = self.server.board.pod_levels();
        spec.labels_of_pod = self.server.selinux.of_pod(spec.selinux.as_ref(), &taken)?;
        if self.server.closing() {
            return Err(Error::Closing.into());
        }
        let (tx, rx) = oneshot::channel();
        owner::submit_run(&self.server, spec, tx);
        let id = reply(rx.await.map_err(|_| Arc::new(Error::Closing)).and_then(|r| r))?;
        Ok(Response::new(v1::RunPodSandboxResponse { pod_sandbox_id: id.as_str().into() }))
    }

    async fn stop_pod_sandbox(&self, request: Request<v1::StopPodSandboxRequest>) -> Answer<v1::StopPodSandboxResponse> {
        if let Some(view) = self.server.board.sandbox(&request.into_inner().pod_sandbox_id) {
            forgiving(owner::submit(&self.server, &view.id, Op::Stop).await)?;
        }
        Ok(Response::new(v1::StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(&self, request: Request<v1::RemovePodSandboxRequest>) -> Answer<v1::RemovePodSandboxResponse> {
        if let Some(view) = self.server.board.sandbox(&request.into_inner().pod_sandbox_id) {
            forgiving(owner::submit(&self.server, &view.id, Op::Remove).await)?;
        }
        Ok(Response::new(v1::RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(&self, request: Request<v1::PodSandboxStatusRequest>) -> Answer<v1::PodSandboxStatusResponse> {
        let request = request.into_inner();
        let view = self.sandbox(&request.pod_sandbox_id)?;
        let containers = self.server.board.containers_of(&view.id);
        let info = if request.verbose { verbose::sandbox(&self.server, &view).await } else { Default::default() };
        Ok(Response::new(v1::PodSandboxStatusResponse {
            status: Some(status::sandbox_status(&view)),
            info,
            containers_statuses: containers.iter().map(|c| status::container_status(c)).collect(),
            timestamp: crate::clock::now_ns(),
        }))
    }

    async fn list_pod_sandbox(&self, request: Request<v1::ListPodSandboxRequest>) -> Answer<v1::ListPodSandboxResponse> {
        Ok(Response::new(v1::ListPodSandboxResponse { items: self.sandboxes(request.into_inner().filter) }))
    }

    type StreamPodSandboxesStream = Stream<v1::StreamPodSandboxesResponse>;
    async fn stream_pod_sandboxes(
        &self,
        request: Request<v1::StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        let items = self.sandboxes(request.into_inner().filter);
        Ok(chunks(items, |pod_sandboxes| v1::StreamPodSandboxesResponse { pod_sandboxes }))
    }

    async fn create_container(&self, request: Request<v1::CreateContainerRequest>) -> Answer<v1::CreateContainerResponse> {
        let request = request.into_inner();
        let view = self.sandbox(&request.pod_sandbox_id)?;
        let spec = request::container(request.config.ok_or_else(|| invalid("config", "missing"))?, &view.spec.namespaces)?;
        let log_directory = match request.sandbox_config {
            Some(config) if !config.log_directory.is_empty() => config.log_directory,
            _ => view.spec.log_directory.clone(),
        };
        let op = |reply| Op::CreateContainer { spec: Box::new(spec), log_directory, reply };
        let id = reply(owner::submit(&self.server, &view.id, op).await)?;
        Ok(Response::new(v1::CreateContainerResponse { container_id: id.as_str().into() }))
    }

    async fn start_container(&self, request: Request<v1::StartContainerRequest>) -> Answer<v1::StartContainerResponse> {
        let view = self.container(&request.into_inner().container_id)?;
        let op = |reply| Op::StartContainer { id: view.id.clone(), reply };
        reply(owner::submit(&self.server, &view.sandbox, op).await)?;
        Ok(Response::new(v1::StartContainerResponse {}))
    }

    async fn stop_container(&self, request: Request<v1::StopContainerRequest>) -> Answer<v1::StopContainerResponse> {
        let request = request.into_inner();
        if let Some(view) = self.server.board.container(&request.container_id) {
            let timeout = seconds(request.timeout);
            let op = |reply| Op::StopContainer { id: view.id.clone(), timeout, reply };
            forgiving(owner::submit(&self.server, &view.sandbox, op).await)?;
        }
        Ok(Response::new(v1::StopContainerResponse {}))
    }

    async fn remove_container(&self, request: Request<v1::RemoveContainerRequest>) -> Answer<v1::RemoveContainerResponse> {
        if let Some(view) = self.server.board.container(&request.into_inner().container_id) {
            let op = |reply| Op::RemoveContainer { id: view.id.clone(), reply };
            forgiving(owner::submit(&self.server, &view.sandbox, op).await)?;
        }
        Ok(Response::new(v1::RemoveContainerResponse {}))
    }

    async fn list_containers(&self, request: Request<v1::ListContainersRequest>) -> Answer<v1::ListContainersResponse> {
        Ok(Response::new(v1::ListContainersResponse { containers: self.containers(request.into_inner().filter) }))
    }

    type StreamContainersStream = Stream<v1::StreamContainersResponse>;
    async fn stream_containers(&self, request: Request<v1::StreamContainersRequest>) -> Answer<Self::StreamContainersStream> {
        let items = self.containers(request.into_inner().filter);
        Ok(chunks(items, |containers| v1::StreamContainersResponse { containers }))
    }

    async fn container_status(&self, request: Request<v1::ContainerStatusRequest>) -> Answer<v1::ContainerStatusResponse> {
        let request = request.into_inner();
        let view = self.container(&request.container_id)?;
        let info = if request.verbose { verbose::container(&self.server, &view).await } else { Default::default() };
        Ok(Response::new(v1::ContainerStatusResponse { status: Some(status::container_status(&view)), info }))
    }

    async fn update_container_resources(
        &self,
        request: Request<v1::UpdateContainerResourcesRequest>,
    ) -> Answer<v1::UpdateContainerResourcesResponse> {
        let request = request.into_inner();
        if request.windows.is_some() {
            return Err(Error::Unsupported { what: "windows", reason: "this node runs Linux".into() }.into());
        }
        let view = self.container(&request.container_id)?;
        if let Some(linux) = request.linux {
            let resources = Box::new(resources(linux));
            let op = |reply| Op::Update { id: view.id.clone(), resources, by_plugin: false, reply };
            reply(owner::submit(&self.server, &view.sandbox, op).await)?;
        }
        Ok(Response::new(v1::UpdateContainerResourcesResponse {}))
    }

    async fn reopen_container_log(
        &self,
        request: Request<v1::ReopenContainerLogRequest>,
    ) -> Answer<v1::ReopenContainerLogResponse> {
        let view = self.container(&request.into_inner().container_id)?;
        let op = |reply| Op::ReopenLog { id: view.id.clone(), reply };
        reply(owner::submit(&self.server, &view.sandbox, op).await)?;
        Ok(Response::new(v1::ReopenContainerLogResponse {}))
    }

    async fn exec_sync(&self, request: Request<v1::ExecSyncRequest>) -> Answer<v1::ExecSyncResponse> {
        let request = request.into_inner();
        if request.cmd.is_empty() {
            return Err(invalid("cmd", "empty").into());
        }
        let timeout = (request.timeout > 0).then(|| seconds(request.timeout));
        let output = exec::sync(&self.server, &request.container_id, request.cmd, timeout).await.map_err(shared)?;
        Ok(Response::new(v1::ExecSyncResponse { stdout: output.stdout, stderr: output.stderr, exit_code: output.code }))
    }

    async fn exec(&self, request: Request<v1::ExecRequest>) -> Answer<v1::ExecResponse> {
        let url = streaming::prepare_exec(&self.server, request.into_inner()).await.map_err(shared)?;
        Ok(Response::new(v1::ExecResponse { url }))
    }

    async fn attach(&self, request: Request<v1::AttachRequest>) -> Answer<v1::AttachResponse> {
        let url = streaming::prepare_attach(&self.server, request.into_inner()).await.map_err(shared)?;
        Ok(Response::new(v1::AttachResponse { url }))
    }

    async fn port_forward(&self, request: Request<v1::PortForwardRequest>) -> Answer<v1::PortForwardResponse> {
        let url = streaming::prepare_port_forward(&self.server, request.into_inner()).await.map_err(shared)?;
        Ok(Response::new(v1::PortForwardResponse { url }))
    }

    async fn container_stats(&self, request: Request<v1::ContainerStatsRequest>) -> Answer<v1::ContainerStatsResponse> {
        let view = self.container(&request.into_inner().container_id)?;
        let id = view.id.clone();
        let stats = stats::containers(&self.server, move |other| other.id == id).await.into_iter().next();
        let stats = stats.ok_or_else(|| Error::NotFound { kind: "container", id: view.id.as_str().into() })?;
        Ok(Response::new(v1::ContainerStatsResponse { stats: Some(stats) }))
    }

    async fn list_container_stats(
        &self,
        request: Request<v1::ListContainerStatsRequest>,
    ) -> Answer<v1::ListContainerStatsResponse> {
        let filter = status::ContainerFilter::of_stats(request.into_inner().filter);
        Ok(Response::new(v1::ListContainerStatsResponse { stats: RuntimeEdge::container_stats(self, filter).await }))
    }

    type StreamContainerStatsStream = Stream<v1::StreamContainerStatsResponse>;
    async fn stream_container_stats(
        &self,
        request: Request<v1::StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        let filter = status::ContainerFilter::of_stats(request.into_inner().filter);
        let items = RuntimeEdge::container_stats(self, filter).await;
        Ok(chunks(items, |container_stats| v1::StreamContainerStatsResponse { container_stats }))
    }

    async fn pod_sandbox_stats(&self, request: Request<v1::PodSandboxStatsRequest>) -> Answer<v1::PodSandboxStatsResponse> {
        let view = self.sandbox(&request.into_inner().pod_sandbox_id)?;
        let id = view.id.clone();
        let stats = stats::sandboxes(&self.server, move |other| other.id == id).await.into_iter().next();
        Ok(Response::new(v1::PodSandboxStatsResponse { stats }))
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<v1::ListPodSandboxStatsRequest>,
    ) -> Answer<v1::ListPodSandboxStatsResponse> {
        Ok(Response::new(v1::ListPodSandboxStatsResponse { stats: self.sandbox_stats(request.into_inner().filter).await }))
    }

    type StreamPodSandboxStatsStream = Stream<v1::StreamPodSandboxStatsResponse>;
    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<v1::StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        let items = self.sandbox_stats(request.into_inner().filter).await;
        Ok(chunks(items, |pod_sandbox_stats| v1::StreamPodSandboxStatsResponse { pod_sandbox_stats }))
    }

    async fn update_runtime_config(
        &self,
        request: Request<v1::UpdateRuntimeConfigRequest>,
    ) -> Answer<v1::UpdateRuntimeConfigResponse> {
        let config = request.into_inner().runtime_config.and_then(|c| c.network_config).unwrap_or_default();
        if !config.pod_cidr.is_empty() {
            let cidrs = config
                .pod_cidr
                .split(',')
                .map(|c| c.trim().parse().map_err(|_| invalid("pod_cidr", format!("{c:?} is not a CIDR"))))
                .collect::<Result<Vec<berth_cni::Cidr>, Error>>()?;
            // Who has named the range of the built-in network has done so because the cluster's is another network's.
            if self.server.config.pod_cidrs.is_empty() {
                self.server.network.set_pod_cidrs(cidrs).map_err(|e| invalid("pod_cidr", e.to_string()))?;
            } else {
                tracing::info!(told = config.pod_cidr, named = ?self.server.config.pod_cidrs, "the pods' addresses stay as configured");
            }
        }
        Ok(Response::new(v1::UpdateRuntimeConfigResponse {}))
    }

    async fn status(&self, request: Request<v1::StatusRequest>) -> Answer<v1::StatusResponse> {
        let network = self.server.network.status().await;
        let condition = |kind: &str, status: bool, reason: &str, message: &str| v1::RuntimeCondition {
            r#type: kind.into(),
            status,
            reason: reason.into(),
            message: message.into(),
        };
        Ok(Response::new(v1::StatusResponse {
            status: Some(v1::RuntimeStatus {
                conditions: vec![
                    condition("RuntimeReady", true, "", ""),
                    condition("NetworkReady", network.ready, &network.reason, &network.message),
                ],
            }),
            info: if request.into_inner().verbose { verbose::server(&self.server, &network) } else { Default::default() },
            runtime_handlers: self.runtime_handlers().await,
            features: Some(v1::RuntimeFeatures { supplemental_groups_policy: true, user_namespaces_host_network: false }),
        }))
    }

    async fn checkpoint_container(
        &self,
        request: Request<v1::CheckpointContainerRequest>,
    ) -> Answer<v1::CheckpointContainerResponse> {
        let request = request.into_inner();
        let view = self.container(&request.container_id)?;
        let wanted = Box::new(checkpoint::Wanted::parse(&view, &request.location, request.timeout)?);
        let op = |reply| Op::Checkpoint { id: view.id.clone(), wanted, reply };
        reply(owner::submit(&self.server, &view.sandbox, op).await)?;
        Ok(Response::new(v1::CheckpointContainerResponse {}))
    }

    type GetContainerEventsStream = Stream<v1::ContainerEventResponse>;
    async fn get_container_events(&self, _request: Request<v1::GetEventsRequest>) -> Answer<Self::GetContainerEventsStream> {
        // Events that a slow client missed are skipped: its next list repairs that.
        let events = BroadcastStream::new(self.server.events.listen())
            .filter_map(|event| async move { event.ok().map(|event| Ok(Arc::unwrap_or_clone(event))) });
        Ok(Response::new(events.take_until(self.server.closed()).boxed()))
    }

    async fn list_metric_descriptors(
        &self,
        _request: Request<v1::ListMetricDescriptorsRequest>,
    ) -> Answer<v1::ListMetricDescriptorsResponse> {
        let server = self.server.clone();
        let descriptors = crate::blocking(move || Ok(metrics::descriptors(&server))).await?;
        Ok(Response::new(v1::ListMetricDescriptorsResponse { descriptors }))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _request: Request<v1::ListPodSandboxMetricsRequest>,
    ) -> Answer<v1::ListPodSandboxMetricsResponse> {
        Ok(Response::new(v1::ListPodSandboxMetricsResponse { pod_metrics: metrics::pods(&self.server).await }))
    }

    type StreamPodSandboxMetricsStream = Stream<v1::StreamPodSandboxMetricsResponse>;
    async fn stream_pod_sandbox_metrics(
        &self,
        _request: Request<v1::StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        let items = metrics::pods(&self.server).await;
        Ok(chunks(items, |pod_sandbox_metrics| v1::StreamPodSandboxMetricsResponse { pod_sandbox_metrics }))
    }

    async fn runtime_config(&self, _request: Request<v1::RuntimeConfigRequest>) -> Answer<v1::RuntimeConfigResponse> {
        let driver = match self.server.cgroups.driver() {
            CgroupDriver::Cgroupfs => v1::CgroupDriver::Cgroupfs.into(),
            CgroupDriver::Systemd => v1::CgroupDriver::Systemd.into(),
        };
        Ok(Response::new(v1::RuntimeConfigResponse { linux: Some(v1::LinuxRuntimeConfiguration { cgroup_driver: driver }) }))
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<v1::UpdatePodSandboxResourcesRequest>,
    ) -> Answer<v1::UpdatePodSandboxResourcesResponse> {
        // The kubelet has resized the pod's cgroup itself: here the new limits are only put on record.
        let request = request.into_inner();
        let view = self.sandbox(&request.pod_sandbox_id)?;
        let resize = Box::new(Resize { resources: request.resources.map(resources), overhead: request.overhead.map(resources) });
        reply(owner::submit(&self.server, &view.id, |reply| Op::Resize { resize, reply }).await)?;
        Ok(Response::new(v1::UpdatePodSandboxResourcesResponse {}))
    }
}
