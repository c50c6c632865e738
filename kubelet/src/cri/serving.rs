//! The calls that only the kubelet's servers make: streaming URLs, checkpoints, statistics.

use std::time::Duration;

use berth_cri_api::v1 as cri;

use super::{Runtime, limited};
use crate::Result;

impl Runtime {
    /// Where the streams of an exec are.
    pub async fn exec_url(&self, request: cri::ExecRequest) -> Result<String> {
        let mut client = self.runtime.clone();
        Ok(limited("Exec", self.timing.cri_call, client.exec(request)).await?.url)
    }

    /// Where the streams of an attach are.
    pub async fn attach_url(&self, request: cri::AttachRequest) -> Result<String> {
        let mut client = self.runtime.clone();
        Ok(limited("Attach", self.timing.cri_call, client.attach(request)).await?.url)
    }

    /// Where the streams of a port-forward are.
    pub async fn port_forward_url(&self, request: cri::PortForwardRequest) -> Result<String> {
        let mut client = self.runtime.clone();
        Ok(limited("PortForward", self.timing.cri_call, client.port_forward(request)).await?.url)
    }

    /// Writes a running container's state to a file; `timeout` of zero: the runtime's own.
    pub async fn checkpoint_container(&self, id: &str, location: String, timeout: Duration) -> Result<()> {
        let seconds = i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX);
        let request = cri::CheckpointContainerRequest { container_id: id.to_owned(), location, timeout: seconds };
        let limit = if timeout.is_zero() { self.timing.cri_call } else { timeout };
        let mut client = self.runtime.clone();
        limited("CheckpointContainer", limit, client.checkpoint_container(request)).await?;
        Ok(())
    }

    /// Statistics of all sandboxes and their containers.
    pub async fn list_pod_sandbox_stats(&self) -> Result<Vec<cri::PodSandboxStats>> {
        let mut client = self.runtime.clone();
        let call = client.list_pod_sandbox_stats(cri::ListPodSandboxStatsRequest::default());
        Ok(limited("ListPodSandboxStats", self.timing.cri_call, call).await?.stats)
    }

    /// Statistics of all containers, the file systems of ended ones included.
    pub async fn list_container_stats(&self) -> Result<Vec<cri::ContainerStats>> {
        let mut client = self.runtime.clone();
        let call = client.list_container_stats(cri::ListContainerStatsRequest::default());
        Ok(limited("ListContainerStats", self.timing.cri_call, call).await?.stats)
    }

    /// The file systems of images and of containers' writable layers.
    pub async fn image_fs_info(&self) -> Result<cri::ImageFsInfoResponse> {
        let mut client = self.images.clone();
        limited("ImageFsInfo", self.timing.cri_call, client.image_fs_info(cri::ImageFsInfoRequest {})).await
    }

    /// Names, helps and labels of the runtime's metrics.
    pub async fn metric_descriptors(&self) -> Result<Vec<cri::MetricDescriptor>> {
        let mut client = self.runtime.clone();
        let call = client.list_metric_descriptors(cri::ListMetricDescriptorsRequest {});
        Ok(limited("ListMetricDescriptors", self.timing.cri_call, call).await?.descriptors)
    }

    /// The metrics of all sandboxes in parts, as a stream where the runtime has one.
    pub async fn pod_sandbox_metrics(&self, mut take: impl FnMut(cri::PodSandboxMetrics)) -> Result<()> {
        let mut client = self.runtime.clone();
        let call = client.stream_pod_sandbox_metrics(cri::StreamPodSandboxMetricsRequest {});
        let limit = self.timing.cri_call;
        match limited("StreamPodSandboxMetrics", limit, call).await {
            Ok(mut parts) => loop {
                let next = async { parts.message().await.map(tonic::Response::new) };
                match limited("StreamPodSandboxMetrics", limit, next).await? {
                    Some(part) => part.pod_sandbox_metrics.into_iter().for_each(&mut take),
                    None => return Ok(()),
                }
            },
            Err(e) if super::code(&e) == Some(tonic::Code::Unimplemented) => {
                let mut client = self.runtime.clone();
                let call = client.list_pod_sandbox_metrics(cri::ListPodSandboxMetricsRequest {});
                let all = limited("ListPodSandboxMetrics", limit, call).await?;
                all.pod_metrics.into_iter().for_each(take);
                Ok(())
            }
            Err(e) => Err(e),
        }
    }
}
