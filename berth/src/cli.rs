//! The command line: verbs, flags, their defaults and help texts. Owns no behaviour.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// What outlives a boot, unless `--root` says otherwise.
pub const DEFAULT_ROOT: &str = "/var/lib/berth";
/// What dies with it, unless `--state` says otherwise.
pub const DEFAULT_STATE: &str = "/run/berth";

/// A Kubernetes node in one small static binary.
#[derive(Debug, Parser)]
// As with the upstream's flags the last one counts: units and their environment files name some of them twice.
#[command(name = "berth", version, about, propagate_version = true, disable_help_subcommand = true, args_override_self = true)]
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
    #[arg(long, global = true, value_name = "DIR", default_value = DEFAULT_ROOT)]
    pub root: PathBuf,
    /// What dies with the boot; on tmpfs (one is mounted there if it is not)
    #[arg(long, global = true, value_name = "DIR", default_value = DEFAULT_STATE)]
    pub state: PathBuf,
    /// KubeletConfiguration and NodeConfiguration documents (default /etc/berth/config.yaml where it exists; its NodeConfiguration counts
    /// where FILE has none)
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Where NodeConfiguration is, if not in that file. Set by `join`.
    #[arg(skip)]
    pub node_config: Option<PathBuf>,
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
    /// Makes this machine a node of a kubeadm cluster, and then is that node
    #[command(
        after_help = "Exit codes: 0 when it was ended by a signal, when the files are written (--files-only) or nothing is in the way (--check); \
        1 when it could not join, or something is in the way; 2 when the command line is wrong."
    )]
    Join(Box<Join>),
    /// Takes a join back: ends the pods and removes what the join and the node have written of the cluster
    Reset(Reset),
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
    /// Prints a script that teaches a shell our verbs and flags: `source <(berth completion bash)`
    Completion {
        /// The shell
        shell: Shell,
    },
    /// Prints the version
    Version,
}

/// Shells that learn to complete our command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Shell {
    Bash,
    Zsh,
    Fish,
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
    /// Without a CNI configuration there is no network: the node is not ready until an add-on has written one
    #[arg(long)]
    pub no_built_in_network: bool,
}

/// A Go duration.
fn duration(text: &str) -> Result<std::time::Duration, String> {
    crate::config::duration(text).map_err(|error| error.to_string())
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
    #[arg(long, value_name = "IP[,IP]", value_delimiter = ',', action = clap::ArgAction::Set)]
    pub node_ip: Vec<IpAddr>,
    /// The way to the API server that this node belongs to (none: the node stands alone)
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Credentials to ask for a client certificate with, where --kubeconfig has none yet
    #[arg(long, value_name = "FILE", requires = "kubeconfig")]
    pub bootstrap_kubeconfig: Option<PathBuf>,
    /// Remove that file when it has served: it holds a token. Set by `join`.
    #[arg(skip)]
    pub discard_bootstrap: bool,
    /// The key that secrets of API pods are sealed with on disk (default the credential berth.sealing-key of the service, else
    /// /etc/berth/sealing.key; none: pods with secrets do not start without the API server)
    #[arg(long, value_name = "FILE")]
    pub sealing_key_file: Option<PathBuf>,
    /// How long after the last contact with the API server its pods may still be started, as 12h (default: however long)
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub offline_max_age: Option<std::time::Duration>,
    /// How long the API server is waited for at the start before the pods on record are started (default 3s)
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub offline_after: Option<std::time::Duration>,
    /// Where certificates are kept (default pki in the kubelet's folder)
    #[arg(long, value_name = "DIR")]
    pub cert_dir: Option<PathBuf>,
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

#[derive(Debug, Clone, Args)]
pub struct Node {
    #[command(flatten)]
    pub cri: Cri,
    #[command(flatten)]
    pub kubelet: KubeletFlags,
}

/// What `kubeadm join` takes, and what the node that this becomes takes.
#[derive(Debug, Clone, Args)]
pub struct Join {
    /// The cluster's API server, HOST:PORT
    #[arg(value_name = "HOST:PORT")]
    pub server: Option<String>,
    /// The bootstrap token, as `kubeadm token create` prints it
    #[arg(long, aliases = ["discovery-token", "tls-bootstrap-token"], env = "BERTH_JOIN_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
    /// The hash of the cluster's authority, as `kubeadm token create --print-join-command` prints it; may be given again
    #[arg(long, value_name = "sha256:HEX", alias = "discovery-token-ca-cert-hash", value_delimiter = ',')]
    pub ca_hash: Vec<String>,
    /// Join without that hash: whoever knows the token can then pretend to be the cluster
    #[arg(long, alias = "discovery-token-unsafe-skip-ca-verification")]
    pub unsafe_skip_ca_verification: bool,
    /// A kubeconfig with the cluster's address and authority, instead of asking for them
    #[arg(long, value_name = "FILE")]
    pub discovery_file: Option<PathBuf>,
    /// Seconds that the cluster may take to answer and to sign the token
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub discovery_timeout: u64,
    /// Go on in spite of what is wrong with this machine: names of checks, or `all`
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub ignore_preflight_errors: Vec<String>,
    /// Only say what would keep this machine from joining, and what to do about it
    #[arg(long, conflicts_with = "files_only")]
    pub check: bool,
    /// Write the files and end: something else starts the node with them
    #[arg(long)]
    pub files_only: bool,
    #[command(flatten)]
    pub node: Node,
}

#[derive(Debug, Args)]
pub struct Reset {
    /// Where pods' volumes live (default /var/lib/kubelet)
    #[arg(long, value_name = "DIR", alias = "root-dir")]
    pub kubelet_root: Option<PathBuf>,
    /// Seconds that containers get to end before they are killed
    #[arg(long, default_value_t = 10, value_name = "SECONDS")]
    pub timeout: u32,
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
