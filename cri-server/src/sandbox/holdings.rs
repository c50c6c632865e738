//! What a sandbox holds of the system, and how it is given back: network, netns name, shim, cgroup. Giving back remembers what
//! is done, takes "gone" for success and can be called again.

use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use berth_linux::pidfd::PidFd;
use berth_shim::protocol::Request;
use tokio_util::sync::CancellationToken;

use crate::Server;
use crate::convert::bandwidth;
use crate::error::{Error, file};
use crate::id::SandboxId;
use crate::shim::ShimClient;
use crate::spec::SandboxSpec;
use crate::steps::Step;

/// The process of a shim, living or dead.
pub(crate) struct ShimProcess {
    pub(crate) pid: i32,
    pub(crate) pidfd: PidFd,
    /// Cancelled when the process has ended (and was reaped, if it is our child).
    pub(crate) ended: CancellationToken,
}

/// The holdings of one sandbox.
pub(crate) struct Live {
    pub(crate) id: SandboxId,
    pub(crate) spec: Arc<SandboxSpec>,
    /// Leaf cgroup of the shim.
    pub(crate) cgroup: String,
    pub(crate) process: Option<Arc<ShimProcess>>,
    pub(crate) shim: Option<Arc<ShimClient>>,
    pub(crate) netns: Option<OwnedFd>,
    /// The pod's user namespace, if it has one.
    pub(crate) userns: Option<OwnedFd>,
    /// PID 1 of the pod's PID namespace, if it shares one: a process in all namespaces of the pod.
    pub(crate) pause: Option<i32>,
    pub(crate) netns_path: Option<PathBuf>,
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) returned: AtomicU8,
}

/// How long a shim that said it ends may take: it has only to return from its loop.
const GOES: Duration = Duration::from_secs(2);

/// The file system of namespaces: NSFS_MAGIC of linux/magic.h.
const NSFS: rustix::fs::FsWord = 0x6e73_6673;

const NETWORK: u8 = 1;
const SHIM: u8 = 2;
const CGROUP: u8 = 4;

impl Live {
    /// Nothing held yet.
    pub(crate) fn new(id: SandboxId, spec: Arc<SandboxSpec>, cgroup: String) -> Self {
        Self {
            id,
            spec,
            cgroup,
            process: None,
            shim: None,
            netns: None,
            userns: None,
            pause: None,
            netns_path: None,
            ips: Vec::new(),
            returned: AtomicU8::new(0),
        }
    }

    /// The connection to the shim.
    pub(crate) fn shim(&self) -> Result<&Arc<ShimClient>, Error> {
        let reason = || match self.process.as_ref().filter(|p| !p.ended.is_cancelled()) {
            Some(process) => format!("its process {} lives and does not answer", process.pid),
            None => "there is none".to_owned(),
        };
        self.shim.as_ref().ok_or_else(|| Error::ShimGone { id: self.id.as_str().into(), reason: reason() })
    }

    /// Whether the shim's process lives and was found silent: nothing can be asked of it.
    pub(crate) fn is_silent(&self) -> bool {
        self.shim.is_none() && !self.is_dead()
    }

    /// Whether the shim has ended.
    pub(crate) fn is_dead(&self) -> bool {
        self.process.as_ref().is_some_and(|p| p.ended.is_cancelled())
    }

    fn is_done(&self, step: u8) -> bool {
        self.returned.load(Ordering::Acquire) & step != 0
    }

    fn set_done(&self, step: u8) {
        self.returned.fetch_or(step, Ordering::AcqRel);
    }

    /// The network namespace as the CNI library wants it.
    pub(crate) fn cni_netns(&self) -> Option<berth_cni::Netns> {
        let fd = self.netns.as_ref()?.as_fd().try_clone_to_owned().ok()?;
        Some(berth_cni::Netns { fd, path: self.netns_path.clone() })
    }

    /// The network namespace by its name, where the shim can not be asked for it any more. A file without a namespace is none.
    fn named_netns(&self) -> Option<berth_cni::Netns> {
        let path = self.netns_path.clone()?;
        let fd = OwnedFd::from(std::fs::File::open(&path).ok()?);
        let is_namespace = rustix::fs::fstatfs(&fd).is_ok_and(|fs| fs.f_type == NSFS);
        is_namespace.then_some(berth_cni::Netns { fd, path: Some(path) })
    }

    /// The pod as the CNI library wants it.
    pub(crate) fn pod_network(&self) -> berth_cni::PodNetwork {
        pod_network(&self.id, &self.spec, &self.cgroup)
    }

    /// Gives everything back, in reverse. What fails stays for the next call.
    pub(crate) async fn give_back(&self, server: &Server) -> Result<(), Error> {
        if !self.is_done(NETWORK) {
            self.detach(server).await?;
            self.set_done(NETWORK);
        }
        if !self.is_done(SHIM) {
            self.end_shim(server).await?;
            self.set_done(SHIM);
        }
        if !self.is_done(CGROUP) {
            let remove = server.cgroups.remove(&self.cgroup, self.id.as_str());
            server.progress.step(self.id.as_str(), Step::RemoveCgroup, self.cgroup.clone(), remove).await?;
            self.set_done(CGROUP);
        }
        Ok(())
    }

    async fn detach(&self, server: &Server) -> Result<(), Error> {
        if !self.spec.host_network() {
            let shim_lives = self.process.as_ref().is_some_and(|p| !p.ended.is_cancelled());
            let netns = self.cni_netns().filter(|_| shim_lives || self.netns_path.is_some()).or_else(|| self.named_netns());
            let pod = self.pod_network();
            let detach = async {
                server.network.detach(&pod, netns).await.map_err(|e| Error::Network {
                    action: "tear down",
                    id: self.id.as_str().into(),
                    source: Box::new(e),
                })
            };
            server.progress.step(self.id.as_str(), Step::DetachNetwork, "CNI DEL", detach).await?;
        }
        if let Some(path) = self.netns_path.clone() {
            let object = path.display().to_string();
            let unbind = crate::blocking(move || unbind(&path));
            server.progress.step(self.id.as_str(), Step::DetachNetwork, object, unbind).await?;
        }
        Ok(())
    }

    /// Ends the shim: asked, then by force.
    async fn end_shim(&self, server: &Server) -> Result<(), Error> {
        let Some(process) = &self.process else { return Ok(()) };
        if let Some(shim) = self.shim.as_ref().filter(|_| !process.ended.is_cancelled()) {
            match shim.call("end the shim", Request::Shutdown { force: true }, Vec::new()).await {
                // It goes of itself now.
                Ok(_) => {
                    let _ = tokio::time::timeout(GOES, process.ended.cancelled()).await;
                }
                Err(error) => tracing::info!(sandbox = %self.id, error = %crate::error::text(&error), "the shim is killed"),
            }
        }
        self.kill_shim(server).await
    }

    /// Kills the shim; success when it is reaped. With a shim that answers nobody, everything else of the pod can still be ended.
    pub(crate) async fn kill_shim(&self, server: &Server) -> Result<(), Error> {
        let Some(process) = self.process.as_ref().filter(|p| !p.ended.is_cancelled()) else { return Ok(()) };
        let _ = process.pidfd.signal(9);
        let reaped = async {
            process.ended.cancelled().await;
            Ok(())
        };
        server.progress.step(self.id.as_str(), Step::ReapShim, format!("shim {}", process.pid), reaped).await
    }
}

/// The pod as the CNI library wants it.
pub(crate) fn pod_network(id: &SandboxId, spec: &SandboxSpec, cgroup: &str) -> berth_cni::PodNetwork {
    let protocol = |name: &str| match name {
        "udp" => berth_cni::Protocol::Udp,
        "sctp" => berth_cni::Protocol::Sctp,
        _ => berth_cni::Protocol::Tcp,
    };
    berth_cni::PodNetwork {
        sandbox_id: id.as_str().into(),
        namespace: spec.metadata.namespace.clone(),
        name: spec.metadata.name.clone(),
        uid: spec.metadata.uid.clone(),
        port_mappings: spec
            .port_mappings
            .iter()
            .map(|p| berth_cni::PortMapping {
                host_port: p.host_port,
                container_port: p.container_port,
                protocol: protocol(&p.protocol),
                host_ip: p.host_ip.parse().ok(),
            })
            .collect(),
        bandwidth: bandwidth(spec),
        dns: spec.dns.as_ref().filter(|d| !d.is_empty()).map(|d| berth_cni::Dns {
            servers: d.servers.clone(),
            searches: d.searches.clone(),
            options: d.options.clone(),
        }),
        cgroup_path: Some(cgroup.to_owned()),
        annotations: spec.annotations.clone(),
        ..Default::default()
    }
}

fn bandwidth(spec: &SandboxSpec) -> Option<berth_cni::Bandwidth> {
    // Checked when the pod was asked for. What older versions took and did not understand stays without a limit.
    let rate = |name: &str| spec.annotations.get(name).and_then(|text| bandwidth::rate(text).ok()).unwrap_or(0);
    let (ingress_rate, egress_rate) = (rate(bandwidth::INGRESS), rate(bandwidth::EGRESS));
    // The burst that containerd gives: as much as the counters hold.
    let burst = |rate: u64| if rate > 0 { u64::from(u32::MAX) } else { 0 };
    (ingress_rate > 0 || egress_rate > 0).then(|| berth_cni::Bandwidth {
        ingress_rate,
        ingress_burst: burst(ingress_rate),
        egress_rate,
        egress_burst: burst(egress_rate),
    })
}

/// Binds a network namespace to a name in the host's mount namespace, for foreign plugins. Blocking.
pub(crate) fn bind(netns: &OwnedFd, path: &std::path::Path) -> Result<(), Error> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(file("create", parent))?;
    }
    std::fs::File::create(path).map_err(file("create", path))?;
    let source = PathBuf::from(berth_linux::memfd::proc_path(netns.as_fd()));
    let bound = rustix::mount::mount_bind(&source, path).map_err(|e| file("bind", path)(e.into()));
    if bound.is_err() {
        let _ = std::fs::remove_file(path);
    }
    bound
}

/// Takes the name away again; gone is success. Blocking.
pub(crate) fn unbind(path: &std::path::Path) -> Result<(), Error> {
    use rustix::io::Errno;
    match rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH | rustix::mount::UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::NOENT | Errno::INVAL) => {}
        Err(e) => return Err(file("unmount", path)(e.into())),
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(file("remove", path)(e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bandwidth_is_told_to_plugins_with_containerds_burst() {
        let spec = SandboxSpec { annotations: [(bandwidth::INGRESS.to_owned(), "1M".to_owned())].into(), ..Default::default() };
        let got = bandwidth(&spec).unwrap();
        assert_eq!((got.ingress_rate, got.ingress_burst), (1_000_000, u64::from(u32::MAX)));
        assert_eq!((got.egress_rate, got.egress_burst), (0, 0));
        assert_eq!(bandwidth(&SandboxSpec::default()), None);
    }
}
