//! What the kubelet is told from outside: names, folders, the runtime's channel, limits and times. Holds no behaviour
//! beyond defaults; every path and every duration of the crate comes from here, so that tests touch nothing of the host.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use tonic::transport::Channel;

use crate::backoff::BackoffPolicy;
use crate::clock::Clock;
use crate::server::config::ServerConfig;

/// Everything a [`crate::Kubelet`] needs to know. Make one with [`Config::new`] and change fields.
#[derive(Clone, Debug)]
pub struct Config {
    /// The node's name; static pods are called `<name>-<node name>`. Lower-cased by [`Config::new`].
    pub node_name: String,
    /// The node's own addresses, the primary one first: `hostIP` and the pod IPs of host-network pods.
    pub node_ips: Vec<IpAddr>,
    /// Folder (or one file) of static pod manifests. `None`: no file source.
    pub manifests: Option<PathBuf>,
    /// The kubelet's own folder, usually `/var/lib/kubelet`: volumes, hosts files, termination messages, accepted pods.
    pub kubelet_root: PathBuf,
    /// Where container logs live, usually `/var/log/pods`.
    pub pod_logs_dir: PathBuf,
    /// Where the links for log shippers live, usually `/var/log/containers`. `None`: no links.
    pub container_logs_dir: Option<PathBuf>,
    /// The CRI endpoint (runtime and image service on one channel).
    pub cri: Channel,
    /// The root-only unix socket of the kubelet's API. `None`: no API.
    pub socket: Option<PathBuf>,
    /// TCP port of `/healthz`, on loopback unless [`ServerConfig`] says otherwise. `None`: no TCP at all.
    pub healthz_port: Option<u16>,
    /// The servers on TCP, who may ask them, and what they show.
    pub server: ServerConfig,
    /// Where the `kubepods` cgroups hang. `None`: the kubelet makes no cgroups and passes no cgroup parent.
    pub cgroup_root: Option<String>,
    /// Addresses for pods with `dnsPolicy: ClusterFirst`; empty: such pods get the host's resolver.
    pub cluster_dns: Vec<IpAddr>,
    /// The cluster's DNS domain, empty where there is none.
    pub cluster_domain: String,
    /// The host's resolver configuration that pods inherit.
    pub resolv_conf: PathBuf,
    /// The host's hosts file, which host-network pods inherit.
    pub hosts_file: PathBuf,
    /// How many pods may run at once.
    pub max_pods: usize,
    /// Rotation limits that are passed with each container.
    pub log_limits: LogLimits,
    /// Unsafe sysctls that pods may set (exact names or prefixes ending in `*`).
    pub allowed_unsafe_sysctls: Vec<String>,
    /// Back-off of crashing containers.
    pub crash_backoff: BackoffPolicy,
    /// Back-off of failing image pulls.
    pub pull_backoff: BackoffPolicy,
    /// Periods and limits.
    pub timing: Timing,
    /// Wall clock (tests inject their own; periods follow tokio's clock).
    pub clock: Clock,
}

/// Log rotation limits of one container; they travel as annotations `berth/log-max-bytes` and `berth/log-max-files`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogLimits {
    /// A log file is rotated when it would grow beyond this.
    pub max_bytes: u64,
    /// How many files are kept, the live one included.
    pub max_files: u32,
}

impl Default for LogLimits {
    fn default() -> Self {
        LogLimits { max_bytes: 10 * 1024 * 1024, max_files: 5 }
    }
}

/// Periods and time limits of the kubelet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// Full re-read of the manifests, besides inotify.
    pub rescan: Duration,
    /// How long a manifest must be away before its removal counts.
    pub removal_settle: Duration,
    /// Repair listing of the runtime while its event stream works.
    pub relist: Duration,
    /// Repair listing while the runtime has no event stream.
    pub relist_without_events: Duration,
    /// Retry of a pod whose last pass failed.
    pub retry: Duration,
    /// Retry of a pod that waits for the network.
    pub network_retry: Duration,
    /// Removal of log folders and pod folders that nobody owns any more.
    pub garbage: Duration,
    /// Limit of an ordinary CRI call.
    pub cri_call: Duration,
    /// Limit of RunPodSandbox.
    pub cri_sandbox: Duration,
    /// Unhealthy when the main loop has not turned for this long.
    pub stuck: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            rescan: Duration::from_secs(20),
            removal_settle: Duration::from_millis(300),
            relist: Duration::from_secs(30),
            relist_without_events: Duration::from_secs(1),
            retry: Duration::from_secs(10),
            network_retry: Duration::from_secs(1),
            garbage: Duration::from_secs(60),
            cri_call: Duration::from_secs(120),
            cri_sandbox: Duration::from_secs(240),
            stuck: Duration::from_secs(300),
        }
    }
}

impl Config {
    /// A configuration with the usual paths and the upstream's times.
    pub fn new(node_name: &str, cri: Channel) -> Config {
        Config {
            node_name: node_name.trim().to_lowercase(),
            node_ips: Vec::new(),
            manifests: None,
            kubelet_root: PathBuf::from("/var/lib/kubelet"),
            pod_logs_dir: PathBuf::from("/var/log/pods"),
            container_logs_dir: Some(PathBuf::from("/var/log/containers")),
            cri,
            socket: None,
            healthz_port: None,
            server: ServerConfig::default(),
            cgroup_root: Some("/".to_owned()),
            cluster_dns: Vec::new(),
            cluster_domain: String::new(),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            hosts_file: PathBuf::from("/etc/hosts"),
            max_pods: 110,
            log_limits: LogLimits::default(),
            allowed_unsafe_sysctls: Vec::new(),
            crash_backoff: BackoffPolicy::default(),
            pull_backoff: BackoffPolicy::default(),
            timing: Timing::default(),
            clock: Clock::default(),
        }
    }
}
