//! The command line: verbs, flags, their defaults and help texts. Owns no behaviour.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// A Kubernetes node in one small static binary.
#[derive(Debug, Parser)]
#[command(name = "berth", version, about, propagate_version = true, disable_help_subcommand = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Verb,
}

/// Flags of every verb.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// What outlives a boot: images, identities and exit records
    #[arg(long, global = true, value_name = "DIR", default_value = "/var/lib/berth")]
    pub root: PathBuf,
    /// What dies with the boot; on tmpfs (one is mounted there if it is not)
    #[arg(long, global = true, value_name = "DIR", default_value = "/run/berth")]
    pub state: PathBuf,
    /// KubeletConfiguration and NodeConfiguration documents (default /etc/berth/config.yaml where it exists)
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// error, warn, info, debug, trace, or a tracing filter (default info; of `stop` warn)
    #[arg(long, global = true, value_name = "LEVEL", env = "BERTH_LOG")]
    pub log_level: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Runs the whole node: CRI server and kubelet
    Node(Node),
    /// Runs only the CRI server, for a stock kubelet or crictl
    Cri(Cri),
    /// Runs only the kubelet, over any CRI socket
    Kubelet(Kubelet),
    /// Ends the agent of this instance and then its pods (SIGTERM alone ends the agent and leaves the pods running)
    Stop(Stop),
    /// Says what manifests would do: defaults, errors, warnings, changes of what runs; does nothing else
    Plan(Plan),
    /// Lists pods, as `kubectl get pods -A` does
    Pods(Output),
    /// Lists containers
    Ps(Ps),
    /// Prints the log of a container
    Logs(Logs),
    /// Runs a command in a container
    Exec(Exec),
    /// Images: ls, pull, import, rm
    #[command(subcommand)]
    Image(Image),
    /// Lists images (`image ls`)
    Images(Output),
    /// Loads an OCI layout, an OCI archive or a `docker save` archive (`image import`)
    Import(ImageImport),
    /// Runs containers with runc's command line (for containerd's BinaryName and for people)
    #[command(disable_help_flag = true)]
    Oci(Rest),
    /// Runs one CNI plugin (bridge, host-local, loopback, portmap) with the standard protocol
    Cni {
        /// The plugin's type
        plugin: String,
    },
    /// Says what this machine lacks and what will not work without it
    Doctor(Output),
    /// Prints every mount, netns, link, address, rule, cgroup, snapshot and process of ours without an owner
    Leaks(Leaks),
    /// Says what a pod or container is doing, since when, what it waits for and how it failed last
    Why(Why),
    /// Prints the version
    Version,
}

/// Who makes cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CgroupDriver {
    /// berth
    Cgroupfs,
    /// systemd
    Systemd,
}

/// The CRI server's flags.
#[derive(Debug, Clone, Default, Args)]
pub struct Cri {
    /// The socket to serve the CRI on (default unix://STATE/berth.sock)
    #[arg(long, value_name = "unix://PATH")]
    pub listen: Option<String>,
    /// Registry hosts: a certs.d tree (default /etc/berth/certs.d, else containerd's)
    #[arg(long, value_name = "DIR")]
    pub registry_config_dir: Vec<PathBuf>,
    /// CNI configurations
    #[arg(long, value_name = "DIR")]
    pub cni_conf_dir: Option<PathBuf>,
    /// CNI plugin binaries; may be given again
    #[arg(long, value_name = "DIR")]
    pub cni_bin_dir: Vec<PathBuf>,
    /// A RuntimeClass handler: an OCI runtime with runc's command line; may be given again
    #[arg(long, value_name = "NAME=PATH", value_parser = runtime_handler)]
    pub runtime_handler: Vec<(String, PathBuf)>,
    /// Who makes the cgroups of pods and containers: cgroupfs (berth itself) or systemd (scopes, over D-Bus) (default cgroupfs)
    #[arg(long, value_name = "DRIVER")]
    pub cgroup_driver: Option<CgroupDriver>,
    /// The pods' addresses on the built-in network; one IPv4 and one IPv6 range, with a comma; none that an interface of the node is in
    #[arg(long, value_name = "CIDR[,CIDR]")]
    pub pod_cidr: Option<String>,
}

/// The parts of `NAME=PATH`.
fn runtime_handler(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, path)) if !name.is_empty() && !path.is_empty() => Ok((name.to_owned(), path.into())),
        _ => Err("not NAME=PATH".to_owned()),
    }
}

/// The kubelet's flags.
#[derive(Debug, Clone, Default, Args)]
pub struct KubeletFlags {
    /// The folder of static pod manifests (default /etc/kubernetes/manifests)
    #[arg(long, value_name = "DIR", alias = "pod-manifest-path")]
    pub manifests: Option<PathBuf>,
    /// Where pods' volumes live (default /var/lib/kubelet)
    #[arg(long, value_name = "DIR", alias = "root-dir")]
    pub kubelet_root: Option<PathBuf>,
    /// Where container logs are written (default /var/log/pods)
    #[arg(long, value_name = "DIR")]
    pub pod_logs_dir: Option<PathBuf>,
    /// Where links to container logs are kept (default /var/log/containers)
    #[arg(long, value_name = "DIR")]
    pub container_logs_dir: Option<PathBuf>,
    /// This node's name (default the host's name)
    #[arg(long, value_name = "NAME", alias = "hostname-override")]
    pub node_name: Option<String>,
    /// This node's address, or one of each family (default the address of the default route; 0.0.0.0 or :: picks the family)
    #[arg(long, value_name = "IP[,IP]", value_delimiter = ',')]
    pub node_ip: Vec<IpAddr>,
    /// Serve /healthz on 127.0.0.1 at this port too (0: not on TCP)
    #[arg(long, value_name = "PORT")]
    pub healthz_port: Option<u16>,
    /// KubeletConfiguration drop-ins: *.conf files, in lexical order (the upstream's other flags are taken too)
    #[arg(long, value_name = "DIR")]
    pub config_dir: Option<PathBuf>,
    /// Comes last: it leaves out what is declared above.
    #[command(flatten)]
    pub upstream: crate::upstream_flags::UpstreamFlags,
}

#[derive(Debug, Args)]
pub struct Node {
    #[command(flatten)]
    pub cri: Cri,
    #[command(flatten)]
    pub kubelet: KubeletFlags,
}

#[derive(Debug, Args)]
pub struct Kubelet {
    /// The CRI socket (default containerRuntimeEndpoint of the configuration, else unix:///run/containerd/containerd.sock)
    #[arg(long, value_name = "unix://PATH")]
    pub container_runtime_endpoint: Option<String>,
    #[command(flatten)]
    pub kubelet: KubeletFlags,
}

#[derive(Debug, Args)]
pub struct Stop {
    /// End the agent and every pod of this instance, and take its network down; no preStop hook runs
    #[arg(long, required = true)]
    pub all: bool,
    /// Seconds that containers get to end before they are killed
    #[arg(long, default_value_t = 10, value_name = "SECONDS")]
    pub timeout: u32,
}

#[derive(Debug, Args)]
pub struct Plan {
    /// Manifests, or folders of them
    #[arg(required = true)]
    pub paths: Vec<PathBuf>,
    /// Fields that the API does not know are errors too
    #[arg(long)]
    pub strict: bool,
    /// The node that they would run on (default this host's name)
    #[arg(long, value_name = "NAME")]
    pub node_name: Option<String>,
}

#[derive(Debug, Args)]
pub struct Output {
    /// table or json
    #[arg(short, long, default_value = "table", value_parser = ["table", "json"])]
    pub output: String,
}

#[derive(Debug, Args)]
pub struct Why {
    /// A sandbox's or container's id (or its beginning), a pod's name, NAMESPACE/NAME, or NAMESPACE/NAME/CONTAINER
    pub name: String,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, Args)]
pub struct Ps {
    /// Those that ended too
    #[arg(short, long)]
    pub all: bool,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, Args)]
pub struct Logs {
    /// A pod's name ([NAMESPACE/]NAME) or a container's id
    pub name: String,
    /// The container, where the pod has several (default its kubectl.kubernetes.io/default-container, else the first)
    #[arg(short, long)]
    pub container: Option<String>,
    /// Go on as the log grows
    #[arg(short, long)]
    pub follow: bool,
    /// Only the last lines, also of files that were rotated away (-1: all of the newest file)
    #[arg(long, value_name = "LINES", default_value_t = -1, allow_negative_numbers = true, value_parser = clap::value_parser!(i64).range(-1..))]
    pub tail: i64,
    /// The log of the run before
    #[arg(short, long)]
    pub previous: bool,
    /// Each line's time in front of it
    #[arg(long)]
    pub timestamps: bool,
}

#[derive(Debug, Args)]
pub struct Exec {
    /// A pod's name ([NAMESPACE/]NAME) or a container's id
    pub name: String,
    /// The container, where the pod has several (default its kubectl.kubernetes.io/default-container, else the first)
    #[arg(short, long)]
    pub container: Option<String>,
    /// Pass standard input to the command
    #[arg(short = 'i', long)]
    pub stdin: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Seconds that the command may take (0: no limit); its output comes when it has ended
    #[arg(long, default_value_t = 0, value_name = "SECONDS", conflicts_with_all = ["stdin", "tty"])]
    pub timeout: i64,
    /// The command
    #[arg(last = true, required = true)]
    pub command: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub enum Image {
    /// Lists images
    Ls(Output),
    /// Pulls an image from a registry
    Pull {
        /// The image
        reference: String,
        /// USER:PASSWORD for the registry
        #[arg(long, value_name = "USER:PASSWORD", env = "BERTH_REGISTRY_CREDENTIALS", hide_env_values = true)]
        creds: Option<String>,
    },
    /// Loads an OCI layout, an OCI archive or a `docker save` archive; works with and without a running agent
    Import(ImageImport),
    /// Removes names, and images with their last name or by their id
    Rm {
        /// Names or ids
        #[arg(required = true)]
        images: Vec<String>,
        /// Images that containers use too: their files stay until those are gone
        #[arg(short, long)]
        force: bool,
    },
}

#[derive(Debug, Args)]
pub struct ImageImport {
    /// A folder or an archive
    #[arg(required = true)]
    pub paths: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub struct Leaks {
    /// Wait up to five seconds for deletions that are under way
    #[arg(long)]
    pub settle: bool,
}

#[derive(Debug, Args)]
pub struct Rest {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub args: Vec<std::ffi::OsString>,
}
