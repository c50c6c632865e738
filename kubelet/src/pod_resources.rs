//! The pod resources API (v1) on `pod-resources/kubelet.sock`: which devices and processors the containers have. Reads only; who
//! gets what is decided elsewhere.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use k8s_openapi::api::core::v1::{Container, Pod};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use self::wire::v1 as api;
use self::wire::v1::pod_resources_lister_server::{PodResourcesLister, PodResourcesListerServer};
use crate::cpus::Cpus;
use crate::devices::Devices;
use crate::host_ports::is_over;
use crate::pod;
use crate::socket;
use crate::table::PodTable;
use crate::volume::create_private_dir;

/// The generated contract. No behaviour.
pub mod wire {
    /// Pod resources, package `v1`.
    #[allow(missing_docs, clippy::all, clippy::pedantic, unreachable_pub)]
    pub mod v1 {
        tonic::include_proto!("v1");
    }
}

/// The upstream's limit of requests: so many a second, so many at once.
const RATE: f64 = 100.0;
const BURST: f64 = 10.0;

/// The socket below the kubelet's folder.
pub fn socket_path(kubelet_root: &Path) -> PathBuf {
    kubelet_root.join("pod-resources/kubelet.sock")
}

/// Serves until `stop`.
pub(crate) async fn run(kubelet_root: PathBuf, (devices, cpus): (Devices, Cpus), table: PodTable, stop: CancellationToken) {
    let path = socket_path(&kubelet_root);
    if let Some(folder) = path.parent()
        && let Err(error) = create_private_dir(folder)
    {
        tracing::warn!(path = %folder.display(), %error, "no folder for the pod resources API");
        return;
    }
    let bucket = Arc::new(Mutex::new(Bucket { left: BURST, at: Instant::now() }));
    let limit = move |request: Request<()>| {
        let may = bucket.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now());
        if may { Ok(request) } else { Err(Status::resource_exhausted("rejected by rate limit")) }
    };
    let service = PodResourcesListerServer::with_interceptor(Service { devices, cpus, table }, limit);
    socket::serve(tonic::transport::Server::builder().add_service(service), &path, stop).await;
}

/// Requests that may be made now.
#[derive(Debug)]
struct Bucket {
    left: f64,
    at: Instant,
}

impl Bucket {
    fn take(&mut self, now: Instant) -> bool {
        let passed = now.duration_since(self.at).as_secs_f64();
        (self.left, self.at) = ((self.left + passed * RATE).min(BURST), now);
        let may = self.left >= 1.0;
        self.left -= f64::from(u8::from(may));
        may
    }
}

struct Service {
    devices: Devices,
    cpus: Cpus,
    table: PodTable,
}

impl Service {
    fn of_pod(&self, pod: &Pod) -> api::PodResources {
        let containers = pod::sidecars(pod).chain(&pod::spec(pod).containers);
        api::PodResources {
            name: pod::name(pod).to_owned(),
            namespace: pod::namespace(pod).to_owned(),
            containers: containers.map(|container| self.of_container(pod, container)).collect(),
        }
    }

    fn of_container(&self, pod: &Pod, container: &Container) -> api::ContainerResources {
        let mut devices = Vec::new();
        for (resource_name, by_node) in self.devices.of(pod::uid(pod), &container.name) {
            for (node, device_ids) in by_node {
                let topology = topology(if node < 0 { &[] } else { std::slice::from_ref(&node) });
                devices.push(api::ContainerDevices { resource_name: resource_name.clone(), device_ids, topology });
            }
        }
        let cpu_ids = self.cpus.own(pod::uid(pod), &container.name).into_iter().map(i64::from).collect();
        api::ContainerResources { name: container.name.clone(), devices, cpu_ids, ..api::ContainerResources::default() }
    }
}

fn topology(nodes: &[i64]) -> Option<api::TopologyInfo> {
    let nodes: Vec<_> = nodes.iter().map(|id| api::NumaNode { id: *id }).collect();
    (!nodes.is_empty()).then_some(api::TopologyInfo { nodes })
}

#[tonic::async_trait]
impl PodResourcesLister for Service {
    async fn list(&self, _: Request<api::ListPodResourcesRequest>) -> Result<Response<api::ListPodResourcesResponse>, Status> {
        let pods = self.table.list();
        let active = pods.iter().filter(|pod| !is_over(pod.status.as_ref()));
        let pod_resources = active.map(|pod| self.of_pod(pod)).collect();
        Ok(Response::new(api::ListPodResourcesResponse { pod_resources }))
    }

    async fn get_allocatable_resources(
        &self,
        _: Request<api::AllocatableResourcesRequest>,
    ) -> Result<Response<api::AllocatableResourcesResponse>, Status> {
        let devices = self.devices.allocatable().into_iter().map(|(resource_name, id, nodes)| api::ContainerDevices {
            resource_name,
            device_ids: vec![id],
            topology: topology(&nodes),
        });
        Ok(Response::new(api::AllocatableResourcesResponse {
            devices: devices.collect(),
            cpu_ids: self.cpus.allocatable().into_iter().map(i64::from).collect(),
            ..api::AllocatableResourcesResponse::default()
        }))
    }

    async fn get(&self, request: Request<api::GetPodResourcesRequest>) -> Result<Response<api::GetPodResourcesResponse>, Status> {
        let api::GetPodResourcesRequest { pod_name, pod_namespace } = request.into_inner();
        let pods = self.table.list();
        let found = pods.iter().find(|pod| pod::name(pod) == pod_name && pod::namespace(pod) == pod_namespace);
        let missing = || Status::unknown(format!("pod {pod_name} in namespace {pod_namespace} not found"));
        let pod_resources = Some(self.of_pod(found.ok_or_else(missing)?));
        Ok(Response::new(api::GetPodResourcesResponse { pod_resources }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn ten_requests_pass_at_once_and_then_a_hundred_a_second() {
        let now = Instant::now();
        let mut bucket = Bucket { left: BURST, at: now };
        assert_eq!((0..20).filter(|_| bucket.take(now)).count(), 10);
        let later = now + Duration::from_millis(51);
        assert_eq!((0..20).filter(|_| bucket.take(later)).count(), 5);
    }
}
