//! What the CRI server is told at start: every path, the shim's bytes, the clock stays the kernel's.

use std::path::PathBuf;
use std::time::Duration;

use berth_cni::Cidr;

use crate::error::{Error, invalid};

/// A RuntimeClass handler: an OCI runtime with runc's command line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RuntimeHandler {
    /// What RuntimeClasses name.
    pub name: String,
    /// Its program.
    pub path: PathBuf,
    /// Arguments before all others.
    pub args: Vec<String>,
    /// How long one call of it may take; the shim's own limit when absent.
    pub deadline: Option<std::time::Duration>,
}

/// Configuration of a [`crate::CriServer`].
#[derive(Debug, Clone)]
pub struct Config {
    /// What outlives a boot: images, identity and exit records, container uppers. Default `/var/lib/berth`.
    pub root: PathBuf,
    /// What dies with the boot (tmpfs): sandbox folders, sockets. Default `/run/berth`. The instance id is a hash of it.
    pub state: PathBuf,
    /// The bytes of the shim's binary, run from a sealed memfd.
    pub shim: &'static [u8],
    /// Folder of CNI conflists.
    pub cni_conf_dir: PathBuf,
    /// Folders of CNI plugin binaries, first match wins.
    pub cni_bin_dirs: Vec<PathBuf>,
    /// `certs.d` trees with registry hosts, first match wins.
    pub registry_config_dirs: Vec<PathBuf>,
    /// Who makes the cgroups of pods and containers; the kubelet asks for it.
    pub cgroup_driver: crate::CgroupDriver,
    /// Pods get the built-in network where `cni_conf_dir` holds no configuration.
    pub built_in_network: bool,
    /// Pod CIDRs of the built-in network; empty for its default.
    pub pod_cidrs: Vec<String>,
    /// The runtime's version as Version reports it.
    pub version: String,
    /// The host's resolver configuration, copied into pods without a DNS configuration.
    pub resolv_conf: PathBuf,
    /// The host's hosts file, copied into pods.
    pub hosts: PathBuf,
    /// Folders of CDI spec files; the last one's devices win.
    pub cdi_spec_dirs: Vec<PathBuf>,
    /// RuntimeClass handlers besides the built-in one.
    pub runtime_handlers: Vec<RuntimeHandler>,
    /// NRI plugins. Off here: the socket is one for the machine.
    pub nri: berth_nri::Config,
    /// Address of the streaming server (exec, attach, port-forward); port 0 is any free one.
    pub streaming: std::net::SocketAddr,
    /// A streaming connection on which nothing travels for that long is closed. Default 4 h, as in containerd and the kubelet.
    pub streaming_idle: Duration,
    /// How long a streaming client may take to send its request, to open its streams and to complete a pair of a port-forward.
    /// Default 30 s, as in containerd.
    pub streaming_patience: Duration,
    /// How long steps may take.
    pub deadlines: crate::Deadlines,
}

impl Config {
    /// The defaults of the architecture page for a root folder, a state folder and the shim's bytes.
    pub fn new(root: impl Into<PathBuf>, state: impl Into<PathBuf>, shim: &'static [u8]) -> Self {
        Self {
            root: root.into(),
            state: state.into(),
            shim,
            cni_conf_dir: "/etc/cni/net.d".into(),
            cni_bin_dirs: vec!["/opt/cni/bin".into()],
            registry_config_dirs: vec!["/etc/berth/certs.d".into(), "/etc/containerd/certs.d".into()],
            cgroup_driver: crate::CgroupDriver::default(),
            built_in_network: true,
            pod_cidrs: Vec::new(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            resolv_conf: "/etc/resolv.conf".into(),
            hosts: "/etc/hosts".into(),
            cdi_spec_dirs: vec!["/etc/cdi".into(), "/var/run/cdi".into()],
            runtime_handlers: Vec::new(),
            nri: berth_nri::Config { disable: true, ..Default::default() },
            streaming: std::net::SocketAddr::from(([127, 0, 0, 1], 0)),
            streaming_idle: Duration::from_secs(4 * 60 * 60),
            streaming_patience: Duration::from_secs(30),
            deadlines: crate::Deadlines::default(),
        }
    }

    /// Whether a server could start with it, as far as the configuration itself can tell.
    ///
    /// # Errors
    /// With what it could not start with.
    pub fn check(&self) -> Result<(), Error> {
        self.cidrs().map(|_| ())
    }

    /// The pods' ranges.
    pub(crate) fn cidrs(&self) -> Result<Vec<Cidr>, Error> {
        let parsed = |c: &String| c.parse().map_err(|_| invalid("pod_cidr", format!("{c:?} is not a CIDR")));
        self.pod_cidrs.iter().map(parsed).collect()
    }
}
