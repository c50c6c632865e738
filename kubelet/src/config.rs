//! What the kubelet is told from outside: names, folders, the runtime's channel, limits and times. Holds no behaviour
//! beyond defaults; every path and every duration of the crate comes from here, so that tests touch nothing of the host.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::api::core::v1::Taint;
use tonic::transport::Channel;

use crate::addresses::AddressSource;
use crate::api::node::OwnNode;
use crate::api::offline::OfflineSettings;
use crate::api::{ApiServer, ApiSettings};
use crate::backoff::BackoffPolicy;
use crate::clock::Clock;
use crate::eviction::threshold::{self, Threshold};
use crate::metrics::certificates::CertificateSource;
use crate::quantity::Amount;
use crate::server::config::ServerConfig;

/// Everything a [`crate::Kubelet`] needs to know. Make one with [`Config::new`] and change fields.
#[derive(Clone, Debug)]
pub struct Config {
    /// The node's name; static pods are called `<name>-<node name>`. Lower-cased by [`Config::new`].
    pub node_name: String,
    /// The node's own addresses, the primary one first: `hostIP` and the pod IPs of host-network pods.
    pub node_ips: Vec<IpAddr>,
    /// Where they are found anew while the kubelet runs; `None`: they stay.
    pub node_ip_source: Option<AddressSource>,
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
    /// The API server that this node belongs to. `None`: it stands alone.
    pub api: Option<ApiServer>,
    /// What KubeletConfiguration says of the way to it.
    pub api_settings: ApiSettings,
    /// The node's own object there, once it is known.
    pub own_node: OwnNode,
    /// Who knows the certificates that the cluster gives this node. `None`: it gives none.
    pub certificates: Option<CertificateSource>,
    /// How the node lives while that one is away.
    pub offline: OfflineSettings,
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
    /// What they inherit where that one names only a resolver on loopback, which no pod can reach; `None`: nothing else.
    pub resolv_conf_uplink: Option<PathBuf>,
    /// The host's hosts file, which host-network pods inherit.
    pub hosts_file: PathBuf,
    /// The kernel's log, which names the processes that it kills for want of memory.
    pub kernel_log: PathBuf,
    /// How many pods may run at once.
    pub max_pods: usize,
    /// The host's files of subordinate user and group IDs: what the user `kubelet` has there is for pods with `hostUsers: false`.
    pub subordinate_ids: [PathBuf; 2],
    /// Rotation limits that are passed with each container.
    pub log_limits: LogLimits,
    /// Unsafe sysctls that pods may set (exact names or prefixes ending in `*`).
    pub allowed_unsafe_sysctls: Vec<String>,
    /// Back-off of crashing containers.
    pub crash_backoff: BackoffPolicy,
    /// Back-off of failing image pulls.
    pub pull_backoff: BackoffPolicy,
    /// The CRI endpoint that the configuration names, for whoever makes the channel.
    pub runtime_endpoint: Option<String>,
    /// Most pods for each processor; 0: no such limit.
    pub pods_per_core: u32,
    /// How what the machine has is given to pods.
    pub policy: ResourcePolicy,
    /// What pods do not get.
    pub reservations: Reservations,
    /// When pods have to go.
    pub eviction: Eviction,
    /// When unused images go.
    pub image_gc: ImageGc,
    /// Grace of pods at the machine's shutdown, by ascending priority; none: shutdown is not watched for.
    pub shutdown_steps: Vec<ShutdownStep>,
    /// How the node presents itself to the API server.
    pub node: NodeSettings,
    /// Containers without a seccomp profile get the runtime's default one.
    pub seccomp_default: bool,
    /// Do not start on a machine that swaps.
    pub fail_swap_on: bool,
    /// Do not start on a machine without cgroup v2.
    pub fail_cgroup_v1: bool,
    /// Do not start where kernel parameters are not what the kubelet wants.
    pub protect_kernel_defaults: bool,
    /// Make the chain by which containers find out which iptables the host uses. Whoever runs the kubelet does it: here is no netlink.
    pub make_iptables_hint: bool,
    /// The kubelet's own OOM score; `None`: as it is.
    pub oom_score_adj: Option<i16>,
    /// Whether containers can have processors for themselves.
    pub cpu_manager: CpuManager,
    /// Where the kernel tells of processors and nodes, usually `/sys/devices/system`.
    pub sys_devices: PathBuf,
    /// Periods and limits.
    pub timing: Timing,
    /// Wall clock (tests inject their own; periods follow tokio's clock).
    pub clock: Clock,
}

/// How processors are given to containers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CpuPolicy {
    /// All share all.
    #[default]
    None,
    /// Guaranteed containers that ask for whole processors get them for themselves.
    Static,
}

/// The CPU manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuManager {
    /// How processors are given.
    pub policy: CpuPolicy,
    /// `full-pcpus-only`: whole cores or nothing.
    pub full_cores: bool,
    /// When a container that could not be moved to its processors is tried again. Changes are made at once.
    pub reconcile: Duration,
}

impl Default for CpuManager {
    fn default() -> Self {
        CpuManager { policy: CpuPolicy::None, full_cores: false, reconcile: Duration::from_secs(10) }
    }
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

/// How limits of pods become limits of cgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResourcePolicy {
    /// CPU limits are enforced.
    pub cfs_quota: bool,
    /// The period of CPU quotas.
    pub cfs_period: Duration,
    /// Most processes of a pod.
    pub pod_pids: Option<i64>,
    /// Who may swap.
    pub swap: SwapBehavior,
    /// The kernel ends one process at a time when a container is out of memory; `None`: with cgroup v1 alone.
    pub single_process_oom_kill: Option<bool>,
    /// Containers that have processors for themselves have no CPU quota: it could only throttle them on their own.
    pub exclusive_cpus: bool,
}

impl Default for ResourcePolicy {
    fn default() -> Self {
        ResourcePolicy {
            cfs_quota: true,
            cfs_period: Duration::from_millis(100),
            pod_pids: None,
            swap: SwapBehavior::NoSwap,
            single_process_oom_kill: None,
            exclusive_cpus: false,
        }
    }
}

/// Who may swap, on a machine that does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SwapBehavior {
    /// No container.
    #[default]
    NoSwap,
    /// Containers of burstable pods, by the part of the memory that they request.
    LimitedSwap,
}

/// What of the machine is not for pods.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reservations {
    /// `systemReserved`, by resource.
    pub system: BTreeMap<String, Amount>,
    /// `kubeReserved`, by resource.
    pub kube: BTreeMap<String, Amount>,
    /// `reservedSystemCPUs`.
    pub cpus: Option<BTreeSet<u32>>,
    /// The pods' cgroup is limited to what is left.
    pub enforce_pods: bool,
}

impl Default for Reservations {
    fn default() -> Self {
        Reservations { system: BTreeMap::new(), kube: BTreeMap::new(), cpus: None, enforce_pods: true }
    }
}

impl Reservations {
    /// What is reserved of a resource.
    pub fn of(&self, resource: &str) -> Amount {
        if let ("cpu", Some(cpus)) = (resource, &self.cpus) {
            return Amount::parse(&cpus.len().to_string()).unwrap_or_default();
        }
        [&self.system, &self.kube].into_iter().filter_map(|list| list.get(resource)).copied().sum()
    }
}

/// When pods have to go.
#[derive(Clone, Debug, PartialEq)]
pub struct Eviction {
    /// What must not get too low.
    pub thresholds: Vec<Threshold>,
    /// How long the node's condition stays after the signal was last low.
    pub pressure_transition: Duration,
    /// Most seconds that a pod gets to end at a soft threshold; -1: its own grace.
    pub max_pod_grace: i64,
    /// Limits of local storage are enforced.
    pub local_storage: bool,
    /// Pods of files go too when the node runs short. The upstream never evicts them, since nothing starts them elsewhere.
    pub static_pods: bool,
}

impl Default for Eviction {
    fn default() -> Self {
        let given = threshold::Given { allocatable: true, ..Default::default() };
        Eviction {
            thresholds: threshold::thresholds(&given).unwrap_or_default(),
            pressure_transition: Duration::from_secs(300),
            max_pod_grace: 0,
            local_storage: true,
            static_pods: false,
        }
    }
}

/// When unused images go. The numbers are the upstream's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageGc {
    /// Images are removed when their file system is as full as this.
    pub high_percent: u8,
    /// Until it is no fuller than this.
    pub low_percent: u8,
    /// An image is left alone for so long.
    pub min_age: Duration,
    /// An image that was not used for so long goes in any case.
    pub max_age: Option<Duration>,
}

impl Default for ImageGc {
    fn default() -> Self {
        ImageGc { high_percent: 85, low_percent: 80, min_age: Duration::from_secs(120), max_age: None }
    }
}

/// Pods of this priority and more, up to the next step's, have so long at the machine's shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShutdownStep {
    /// The least priority.
    pub priority: i32,
    /// Their time.
    pub grace: Duration,
}

/// How the node presents itself to the API server. The times are the upstream's.
#[derive(Clone, Debug, PartialEq)]
pub struct NodeSettings {
    /// The node's object is made where there is none.
    pub register: bool,
    /// The taints that it is made with.
    pub taints: Vec<Taint>,
    /// More labels that it is made with.
    pub labels: BTreeMap<String, String>,
    /// What the cloud calls the machine; empty: nothing.
    pub provider_id: String,
    /// A controller of a cloud outside of Kubernetes finishes the object.
    pub external_cloud: bool,
    /// The node's addresses were named, not found.
    pub addresses_given: bool,
    /// How many images the status shows; `None`: all.
    pub max_images: Option<usize>,
    /// How often the status is looked at.
    pub update: Duration,
    /// How often it is sent when nothing has changed.
    pub report: Duration,
    /// How long the node's lease holds; it is renewed in a quarter of that.
    pub lease_seconds: i32,
}

impl Default for NodeSettings {
    fn default() -> Self {
        NodeSettings {
            register: true,
            taints: Vec::new(),
            labels: BTreeMap::new(),
            provider_id: String::new(),
            external_cloud: false,
            addresses_given: false,
            max_images: Some(50),
            update: Duration::from_secs(10),
            report: Duration::from_secs(300),
            lease_seconds: 40,
        }
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
    /// Volumes whose driver wants that are published again, as often as the upstream looks at a pod of which nothing is heard.
    pub republish: Duration,
    /// Retry of a pod that waits for the network.
    pub network_retry: Duration,
    /// Removal of log folders and pod folders that nobody owns any more.
    pub garbage: Duration,
    /// Signals of eviction are looked at.
    pub eviction: Duration,
    /// Images are looked at.
    pub image_gc: Duration,
    /// The node's own addresses are looked at, as often as the upstream reports its node's status.
    pub addresses: Duration,
    /// Logs are looked at, where the runtime does not rotate them itself.
    pub log_monitor: Duration,
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
            republish: Duration::from_secs(60),
            network_retry: Duration::from_secs(1),
            garbage: Duration::from_secs(60),
            eviction: Duration::from_secs(10),
            image_gc: Duration::from_secs(300),
            addresses: Duration::from_secs(10),
            log_monitor: Duration::from_secs(10),
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
            node_ip_source: None,
            manifests: None,
            kubelet_root: PathBuf::from("/var/lib/kubelet"),
            pod_logs_dir: PathBuf::from("/var/log/pods"),
            container_logs_dir: Some(PathBuf::from("/var/log/containers")),
            cri,
            api: None,
            offline: OfflineSettings::default(),
            api_settings: ApiSettings::default(),
            own_node: OwnNode::default(),
            certificates: None,
            socket: None,
            healthz_port: None,
            server: ServerConfig::default(),
            cgroup_root: Some("/".to_owned()),
            cluster_dns: Vec::new(),
            cluster_domain: String::new(),
            resolv_conf: PathBuf::from("/etc/resolv.conf"),
            // Where systemd-resolved keeps the servers that it asks itself.
            resolv_conf_uplink: Some(PathBuf::from("/run/systemd/resolve/resolv.conf")),
            hosts_file: PathBuf::from("/etc/hosts"),
            kernel_log: PathBuf::from("/dev/kmsg"),
            max_pods: 110,
            subordinate_ids: ["/etc/subuid", "/etc/subgid"].map(PathBuf::from),
            log_limits: LogLimits::default(),
            allowed_unsafe_sysctls: Vec::new(),
            crash_backoff: BackoffPolicy::default(),
            pull_backoff: BackoffPolicy::default(),
            runtime_endpoint: None,
            pods_per_core: 0,
            policy: ResourcePolicy::default(),
            reservations: Reservations::default(),
            eviction: Eviction::default(),
            image_gc: ImageGc::default(),
            shutdown_steps: Vec::new(),
            node: NodeSettings::default(),
            seccomp_default: false,
            fail_swap_on: false,
            fail_cgroup_v1: false,
            protect_kernel_defaults: false,
            make_iptables_hint: true,
            oom_score_adj: None,
            cpu_manager: CpuManager::default(),
            sys_devices: PathBuf::from("/sys/devices/system"),
            timing: Timing::default(),
            clock: Clock::default(),
        }
    }
}
