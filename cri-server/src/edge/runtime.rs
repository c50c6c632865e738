//! stub
use std::sync::Arc;
use berth_cri_api::v1::{self, runtime_service_server::RuntimeService};
use futures::stream::BoxStream;
use tonic::{Request, Response, Status};

/// The runtime edge.
#[derive(Clone)]
pub struct RuntimeEdge {
    #[allow(dead_code)]
    pub(crate) server: Arc<crate::Server>,
}

#[tonic::async_trait]
impl RuntimeService for RuntimeEdge {
    async fn version(&self, _request: Request<v1::VersionRequest>) -> Result<Response<v1::VersionResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn run_pod_sandbox(&self, _request: Request<v1::RunPodSandboxRequest>) -> Result<Response<v1::RunPodSandboxResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn stop_pod_sandbox(&self, _request: Request<v1::StopPodSandboxRequest>) -> Result<Response<v1::StopPodSandboxResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn remove_pod_sandbox(&self, _request: Request<v1::RemovePodSandboxRequest>) -> Result<Response<v1::RemovePodSandboxResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn pod_sandbox_status(&self, _request: Request<v1::PodSandboxStatusRequest>) -> Result<Response<v1::PodSandboxStatusResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn list_pod_sandbox(&self, _request: Request<v1::ListPodSandboxRequest>) -> Result<Response<v1::ListPodSandboxResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    type StreamPodSandboxesStream = BoxStream<'static, Result<v1::StreamPodSandboxesResponse, Status>>;
    async fn stream_pod_sandboxes(&self, _request: Request<v1::StreamPodSandboxesRequest>) -> Result<Response<Self::StreamPodSandboxesStream>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn create_container(&self, _request: Request<v1::CreateContainerRequest>) -> Result<Response<v1::CreateContainerResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn start_container(&self, _request: Request<v1::StartContainerRequest>) -> Result<Response<v1::StartContainerResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn stop_container(&self, _request: Request<v1::StopContainerRequest>) -> Result<Response<v1::StopContainerResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn remove_container(&self, _request: Request<v1::RemoveContainerRequest>) -> Result<Response<v1::RemoveContainerResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn list_containers(&self, _request: Request<v1::ListContainersRequest>) -> Result<Response<v1::ListContainersResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    type StreamContainersStream = BoxStream<'static, Result<v1::StreamContainersResponse, Status>>;
    async fn stream_containers(&self, _request: Request<v1::StreamContainersRequest>) -> Result<Response<Self::StreamContainersStream>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn container_status(&self, _request: Request<v1::ContainerStatusRequest>) -> Result<Response<v1::ContainerStatusResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn update_container_resources(&self, _request: Request<v1::UpdateContainerResourcesRequest>) -> Result<Response<v1::UpdateContainerResourcesResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn reopen_container_log(&self, _request: Request<v1::ReopenContainerLogRequest>) -> Result<Response<v1::ReopenContainerLogResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn exec_sync(&self, _request: Request<v1::ExecSyncRequest>) -> Result<Response<v1::ExecSyncResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn exec(&self, _request: Request<v1::ExecRequest>) -> Result<Response<v1::ExecResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn attach(&self, _request: Request<v1::AttachRequest>) -> Result<Response<v1::AttachResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn port_forward(&self, _request: Request<v1::PortForwardRequest>) -> Result<Response<v1::PortForwardResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn container_stats(&self, _request: Request<v1::ContainerStatsRequest>) -> Result<Response<v1::ContainerStatsResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn list_container_stats(&self, _request: Request<v1::ListContainerStatsRequest>) -> Result<Response<v1::ListContainerStatsResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    type StreamContainerStatsStream = BoxStream<'static, Result<v1::StreamContainerStatsResponse, Status>>;
    async fn stream_container_stats(&self, _request: Request<v1::StreamContainerStatsRequest>) -> Result<Response<Self::StreamContainerStatsStream>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn pod_sandbox_stats(&self, _request: Request<v1::PodSandboxStatsRequest>) -> Result<Response<v1::PodSandboxStatsResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn list_pod_sandbox_stats(&self, _request: Request<v1::ListPodSandboxStatsRequest>) -> Result<Response<v1::ListPodSandboxStatsResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    type StreamPodSandboxStatsStream = BoxStream<'static, Result<v1::StreamPodSandboxStatsResponse, Status>>;
    async fn stream_pod_sandbox_stats(&self, _request: Request<v1::StreamPodSandboxStatsRequest>) -> Result<Response<Self::StreamPodSandboxStatsStream>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn update_runtime_config(&self, _request: Request<v1::UpdateRuntimeConfigRequest>) -> Result<Response<v1::UpdateRuntimeConfigResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn status(&self, _request: Request<v1::StatusRequest>) -> Result<Response<v1::StatusResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn checkpoint_container(&self, _request: Request<v1::CheckpointContainerRequest>) -> Result<Response<v1::CheckpointContainerResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    type GetContainerEventsStream = BoxStream<'static, Result<v1::ContainerEventResponse, Status>>;
    async fn get_container_events(&self, _request: Request<v1::GetEventsRequest>) -> Result<Response<Self::GetContainerEventsStream>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn list_metric_descriptors(&self, _request: Request<v1::ListMetricDescriptorsRequest>) -> Result<Response<v1::ListMetricDescriptorsResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn list_pod_sandbox_metrics(&self, _request: Request<v1::ListPodSandboxMetricsRequest>) -> Result<Response<v1::ListPodSandboxMetricsResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    type StreamPodSandboxMetricsStream = BoxStream<'static, Result<v1::StreamPodSandboxMetricsResponse, Status>>;
    async fn stream_pod_sandbox_metrics(&self, _request: Request<v1::StreamPodSandboxMetricsRequest>) -> Result<Response<Self::StreamPodSandboxMetricsStream>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn runtime_config(&self, _request: Request<v1::RuntimeConfigRequest>) -> Result<Response<v1::RuntimeConfigResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
    async fn update_pod_sandbox_resources(&self, _request: Request<v1::UpdatePodSandboxResourcesRequest>) -> Result<Response<v1::UpdatePodSandboxResourcesResponse>, Status> {
        Err(Status::unavailable("not wired yet"))
    }
}
