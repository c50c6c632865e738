//! The connection to a CRI server, and the configurations of the pods: what a kubelet sends for a BestEffort-like pod with limits.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use berth_cri_api::MAX_MESSAGE_BYTES;
use berth_cri_api::v1::image_service_client::ImageServiceClient;
use berth_cri_api::v1::runtime_service_client::RuntimeServiceClient;
use berth_cri_api::v1::{
    ContainerConfig, ContainerMetadata, DnsConfig, ImageSpec, LinuxContainerConfig, LinuxContainerResources,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption,
    PodSandboxConfig, PodSandboxMetadata, SecurityProfile, security_profile::ProfileType,
};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// Nothing here takes this long; a server that does is stuck.
const CALL_TIMEOUT: Duration = Duration::from_secs(180);
/// The container's memory limit: checked in its cgroup.
pub const MEMORY_LIMIT: i64 = 64 << 20;
/// The container's CPU shares: checked in its cgroup.
pub const CPU_SHARES: i64 = 102;
/// What the container says first: checked in its log.
pub const GREETING: &str = "the container is up";
/// The paths that a kubelet asks to mask with the default procMount.
pub const MASKED_PATHS: [&str; 12] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
/// The paths that it asks to make read-only.
pub const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Whose PID namespace the containers of a pod have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Each its own, as kubelets ask.
    PerContainer,
    /// One for the pod, crictl's default.
    Shared,
}

/// Both services over one connection, as a kubelet has them.
#[derive(Debug, Clone)]
pub struct Cri {
    /// Pods and containers.
    pub runtime: RuntimeServiceClient<Channel>,
    /// Images.
    pub images: ImageServiceClient<Channel>,
}

impl Cri {
    /// Connects to a server's socket.
    pub async fn connect(socket: &Path) -> Result<Self> {
        let path = socket.to_owned();
        // The authority is never resolved: the connector ignores it.
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://localhost").timeout(CALL_TIMEOUT);
        let channel =
            endpoint.connect_with_connector(connector).await.with_context(|| format!("connect {}", socket.display()))?;
        Ok(Self {
            runtime: RuntimeServiceClient::new(channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES),
            images: ImageServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES),
        })
    }
}

fn namespaces(shape: Shape) -> NamespaceOption {
    let pid = if shape == Shape::Shared { NamespaceMode::Pod } else { NamespaceMode::Container };
    NamespaceOption { pid: pid.into(), ..Default::default() }
}

fn seccomp() -> SecurityProfile {
    SecurityProfile { profile_type: ProfileType::RuntimeDefault.into(), localhost_ref: String::new() }
}

/// A pod's configuration.
pub fn sandbox(name: &str, shape: Shape, logs: &Path, cgroup_parent: &str) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.to_owned(),
            uid: format!("uid-{name}"),
            namespace: "bench".to_owned(),
            attempt: 0,
        }),
        hostname: name.to_owned(),
        log_directory: logs.display().to_string(),
        dns_config: Some(DnsConfig {
            servers: vec!["10.96.0.10".to_owned()],
            searches: ["bench.svc.cluster.local", "svc.cluster.local", "cluster.local"].map(str::to_owned).into(),
            options: vec!["ndots:5".to_owned()],
        }),
        labels: [("app", "bench"), ("io.kubernetes.pod.name", name)].map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: cgroup_parent.to_owned(),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(namespaces(shape)),
                seccomp: Some(seccomp()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A container's configuration that runs a shell script.
pub fn container(name: &str, shape: Shape, image: &str, script: &str) -> ContainerConfig {
    let owned = |paths: &[&str]| paths.iter().map(|&p| p.to_owned()).collect();
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(ImageSpec { image: image.to_owned(), ..Default::default() }),
        command: ["sh", "-c", script].map(str::to_owned).into(),
        labels: [("io.kubernetes.container.name".to_owned(), name.to_owned())].into(),
        log_path: format!("{name}.log"),
        linux: Some(LinuxContainerConfig {
            resources: Some(LinuxContainerResources {
                cpu_period: 100_000,
                cpu_quota: 200_000,
                cpu_shares: CPU_SHARES,
                memory_limit_in_bytes: MEMORY_LIMIT,
                oom_score_adj: 900,
                ..Default::default()
            }),
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(namespaces(shape)),
                seccomp: Some(seccomp()),
                no_new_privs: true,
                masked_paths: owned(&MASKED_PATHS),
                readonly_paths: owned(&READONLY_PATHS),
                ..Default::default()
            }),
        }),
        ..Default::default()
    }
}
