//! The network's state: the configuration in use, the threads, the operations under way.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde_json::Value;
use tokio::sync::watch;

use super::config::{NetworkConfig, NetworkStatus};
use crate::cache::{Cache, CachedResult};
use crate::chain::Chain;
use crate::conf::{self, Loaded, NetworkConf, Signature};
use crate::doing::Underway;
use crate::exec::PluginBinaries;
use crate::host::{Deletion, Host};
use crate::kernel::{Kernel, Worker};
use crate::names::Names;
use crate::netlink::{Socket, link, route};
use crate::plugins::Builtin;
use crate::plugins::host_local::Owner;
use crate::plugins::portmap;
use crate::reaper::Reaper;
use crate::result::{CniResult, CniVersion};
use crate::{Attachment, Cidr, Error, Result, default_network, nft, records, sysctl};

/// The file of a state folder that says of which boot it is.
const BOOT_MARK: &str = "boot_id";

/// The outcome of an operation that several callers may wait for.
pub(super) type Outcome = Option<Result<Option<Attachment>>>;

/// An operation under way.
#[derive(Debug, Clone)]
pub(super) struct Operation {
    pub is_attach: bool,
    pub outcome: watch::Receiver<Outcome>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pub config: NetworkConfig,
    pub host: Host,
    pub reaper: Reaper,
    pub cache: Cache,
    /// By container id and interface.
    pub operations: Mutex<HashMap<Owner, Operation>>,
    loaded: Mutex<(Option<Signature>, Loaded)>,
    pod_cidrs: Mutex<Vec<Cidr>>,
    _watch: nft::Stop,
}

/// The networks in use: by which file, and how it is run.
#[derive(Debug, Clone)]
pub(super) struct Current {
    pub source: Option<PathBuf>,
    pub conf: Arc<NetworkConf>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is inside is replaced as a whole: a panic elsewhere leaves nothing half-made.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    pub(super) fn open(config: NetworkConfig) -> Result<Self> {
        let names = Names::of_instance(&config.instance)?;
        let boot_id = records::boot_id()?;
        forget_other_boots(&config.state_dir, &boot_id)?;
        let reaper = Reaper::spawn(pending_dir(&config.state_dir), boot_id.clone())?;
        let kernel = Kernel::open(&names.table, config.state_dir.join("nat.json"))?;
        let own = HashSet::from([kernel.netfilter_port()?]);
        let (watch, stop) = nft::watch(&names.table, own)?;
        let worker = Worker::spawn(kernel)?;
        repair_on_loss(watch, worker.clone());
        let host = Host {
            worker,
            names,
            binaries: PluginBinaries { dirs: config.bin_dirs.clone(), timeout: config.plugin_timeout },
            deletion: Deletion::Deferred(reaper.clone()),
            lease_dir: config.state_dir.join("leases"),
            boot_id,
            doing: Underway::default(),
        };
        let inner = Self {
            cache: Cache::new(&config.state_dir, &config.cache_dir),
            pod_cidrs: Mutex::new(config.pod_cidrs.clone()),
            config,
            host,
            reaper,
            operations: Mutex::default(),
            loaded: Mutex::default(),
            _watch: stop,
        };
        inner.remember_host_ports()?;
        inner.reload();
        inner.refuse_taken_cidrs()?;
        Ok(inner)
    }

    pub(super) fn chain<'a>(&'a self, conf: &'a NetworkConf) -> Chain<'a> {
        Chain { host: &self.host, conf, prefer_external: self.config.prefer_external }
    }

    /// Host ports that are in the kernel already: the worker must know them to repair them.
    fn remember_host_ports(&self) -> Result<()> {
        for cached in self.cached()? {
            let ports = portmap::cached_mappings(&cached.capability_args);
            let result = CniResult::parse(&cached.result, CniVersion::V1_1_0, "cached result");
            let conf = cached.config_bytes().and_then(|bytes| NetworkConf::parse(&bytes, "cached result", None));
            let is_ours = conf.is_ok_and(|conf| self.chain(&conf).runs(Builtin::Portmap));
            if let (Ok(result), true, false) = (result, is_ours, ports.is_empty())
                && let Ok(ports) = portmap::host_ports(&ports, &result)
            {
                let owner = portmap::owner_text(&owner_of(&cached));
                self.host.worker.submit(move |kernel| kernel.remember_host_ports(&owner, ports))?;
            }
        }
        Ok(())
    }

    /// The cached results of this instance. `cache_dir` may be shared with other instances: theirs are left alone only by having
    /// folders of their own, as the configuration is expected to give them.
    pub(super) fn cached(&self) -> Result<Vec<CachedResult>> {
        self.cache.list(|_| true)
    }

    /// Reads the folder again if it has changed.
    pub(super) fn reload(&self) {
        let signature = conf::signature(&self.config.conf_dir);
        let mut loaded = lock(&self.loaded);
        if loaded.0.as_ref() == Some(&signature) {
            return;
        }
        let new = conf::load(&self.config.conf_dir, |conf| self.chain(conf).check_config());
        for (path, error) in &new.invalid {
            tracing::warn!(path = %path.display(), error, "network configuration is not used");
        }
        *loaded = (Some(signature), new);
    }

    /// The network that new pods are attached to.
    pub(super) fn current(&self) -> Result<Current> {
        self.reload();
        {
            let loaded = lock(&self.loaded);
            if let Some((path, conf)) = &loaded.1.network {
                return Ok(Current { source: Some(path.clone()), conf: Arc::new(conf.clone()) });
            }
            if loaded.1.any {
                let reasons: Vec<String> =
                    loaded.1.invalid.iter().map(|(path, error)| format!("{}: {error}", path.display())).collect();
                return Err(Error::NotReady { reason: reasons.join("; ") });
            }
        }
        if !self.config.built_in {
            return Err(Error::NotReady { reason: format!("no network configuration in {}", self.config.conf_dir.display()) });
        }
        let conf = default_network::conf(&self.host.names, &self.subnets()?)?;
        Ok(Current { source: None, conf: Arc::new(conf) })
    }

    /// Subnets of the built-in network: as configured, else as chosen before in this boot, else chosen now.
    fn subnets(&self) -> Result<Vec<Cidr>> {
        let mut configured = lock(&self.pod_cidrs);
        if !configured.is_empty() {
            return Ok(configured.clone());
        }
        let path = self.config.state_dir.join("subnets.json");
        if let Some(chosen) = records::read::<Vec<Cidr>>(&path)?.filter(|chosen| !chosen.is_empty()) {
            configured.clone_from(&chosen);
            return Ok(chosen);
        }
        let chosen = default_network::choose_subnets(&self.config.instance, &self.used_subnets()?, sysctl::has_ipv6())?;
        records::write(&path, &chosen)?;
        configured.clone_from(&chosen);
        Ok(chosen)
    }

    /// Refuses configured subnets that the node is in itself: the bridge would take its address. Where a configuration of CNI is
    /// there they are not ours to use. A subnet that our bridge is in already has pods, which an agent must come back to.
    fn refuse_taken_cidrs(&self) -> Result<()> {
        let cidrs = lock(&self.pod_cidrs).clone();
        if cidrs.is_empty() || !self.config.built_in || lock(&self.loaded).1.any {
            return Ok(());
        }
        let open = Socket::open(berth_linux::netlink::ROUTE);
        let mut socket = open.map_err(|e| Error::netlink("open", "netlink socket")(e.into()))?;
        let links = link::dump_links(&mut socket).map_err(Error::netlink("list", "links"))?;
        let addresses = route::dump_addresses(&mut socket).map_err(Error::netlink("list", "addresses"))?;
        let name = |index| links.iter().find(|link| link.index == index).map(|link| link.name.clone()).unwrap_or_default();
        let in_use = addresses.into_iter().map(|(index, address)| (name(index), address));
        let (own, others): (Vec<_>, Vec<_>) = in_use.partition(|(link, _)| *link == self.host.names.bridge);
        let (old, new): (Vec<_>, Vec<_>) =
            cidrs.into_iter().partition(|cidr| own.iter().any(|(_, ours)| cidr.contains(ours.addr())));
        if let Err(error) = default_network::refuse_taken(&old, &others) {
            tracing::warn!(%error, "pods are in this subnet already");
        }
        default_network::refuse_taken(&new, &others)
    }

    /// Destinations of the host's routes, those of our own bridge excepted.
    fn used_subnets(&self) -> Result<Vec<Cidr>> {
        let open = Socket::open(berth_linux::netlink::ROUTE);
        let mut socket = open.map_err(|e| Error::netlink("open", "netlink socket")(e.into()))?;
        let bridge = link::link_by_name(&mut socket, &self.host.names.bridge).map_err(Error::netlink("look at", "bridge"))?;
        let own = bridge.map(|bridge| bridge.index);
        let routes = route::dump_destinations(&mut socket).map_err(Error::netlink("list", "routes"))?;
        Ok(routes.into_iter().filter(|(index, _)| Some(*index) != own).map(|(_, cidr)| cidr).collect())
    }

    pub(super) fn set_pod_cidrs(&self, pod_cidrs: Vec<Cidr>) -> Result<()> {
        if pod_cidrs.is_empty() {
            return Ok(());
        }
        // Refuses what the built-in network could not use.
        let conf = default_network::conf(&self.host.names, &pod_cidrs)?;
        self.chain(&conf).check_config()?;
        *lock(&self.pod_cidrs) = pod_cidrs;
        Ok(())
    }

    /// Whether pods have to wait for a configuration.
    pub(super) fn has_no_network(&self) -> bool {
        !self.config.built_in && self.current().is_err()
    }

    pub(super) fn needs_netns_path(&self) -> bool {
        self.current().is_ok_and(|current| self.chain(&current.conf).has_external())
    }

    pub(super) fn limits_bandwidth(&self) -> bool {
        self.current().is_ok_and(|current| current.conf.limits_bandwidth())
    }

    pub(super) async fn status(&self) -> NetworkStatus {
        let current = self.current();
        let mut status = NetworkStatus { invalid: lock(&self.loaded).1.invalid.clone(), ..NetworkStatus::default() };
        let outcome = match &current {
            Ok(current) => {
                status.network.clone_from(&current.conf.name);
                status.source.clone_from(&current.source);
                self.chain(&current.conf).status().await
            }
            Err(error) => Err(error.clone()),
        };
        match outcome {
            Ok(()) => status.ready = true,
            Err(error) => {
                status.reason = "NetworkPluginNotReady".to_owned();
                status.message = error.chain_text();
            }
        }
        status
    }

    pub(super) fn attachment(&self, sandbox_id: &str, ifname: &str) -> Option<Attachment> {
        let cached = self.cache.find(sandbox_id, ifname).ok()?.filter(|cached| !cached.is_undo())?;
        attachment_of(&cached.result, ifname).ok()
    }
}

/// Who a cached result belongs to.
pub(super) fn owner_of(cached: &CachedResult) -> Owner {
    Owner { container_id: cached.container_id.clone(), ifname: cached.if_name.clone() }
}

/// A result as the caller sees it.
pub(super) fn attachment_of(result: &Value, ifname: &str) -> Result<Attachment> {
    let parsed = CniResult::parse(result, CniVersion::V1_1_0, "result")?;
    let inside = |i: &&crate::result::Interface| !i.sandbox.is_empty() && i.name == ifname;
    let mac = parsed.interfaces.iter().find(inside).map(|i| i.mac.clone()).filter(|mac| !mac.is_empty());
    Ok(Attachment { ips: parsed.pod_ips().map(|ip| ip.address).collect(), mac, result_json: result.to_string() })
}

/// Everything in the state folder is of this boot or void.
fn forget_other_boots(state_dir: &Path, boot_id: &str) -> Result<()> {
    if is_of_boot(state_dir, boot_id) {
        return Ok(());
    }
    for name in ["leases", "pending", "results"] {
        let folder = state_dir.join(name);
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(Error::file("delete", &folder)(error)),
            _ => {}
        }
    }
    for name in ["nat.json", "subnets.json"] {
        records::remove(&state_dir.join(name))?;
    }
    fs::create_dir_all(state_dir).map_err(Error::file("create folder", state_dir))?;
    let mark = state_dir.join(BOOT_MARK);
    fs::write(&mark, boot_id).map_err(Error::file("write", &mark))
}

/// Whether what is in a state folder is of this boot.
pub(super) fn is_of_boot(state_dir: &Path, boot_id: &str) -> bool {
    fs::read_to_string(state_dir.join(BOOT_MARK)).ok().as_deref() == Some(boot_id)
}

/// The folder of the deletions on record.
pub(super) fn pending_dir(state_dir: &Path) -> PathBuf {
    state_dir.join("pending")
}

/// Puts rules back that somebody else removed, until the watch is stopped.
fn repair_on_loss(watch: nft::Watch, worker: Worker) {
    let repair = |kernel: &mut Kernel| {
        if kernel.uses_nat()
            && let Err(error) = kernel.repair()
        {
            tracing::warn!(error = error.chain_text(), "nf_tables rules are not repaired");
        }
    };
    // A worker that has ended has nothing to repair.
    let run = move || watch.run(|| drop(worker.submit(repair)));
    if let Err(error) = std::thread::Builder::new().name("berth-net-watch".to_owned()).spawn(run) {
        tracing::warn!(%error, "nf_tables rules are not watched");
    }
}
