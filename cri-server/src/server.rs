//! What the parts of the server share. No behaviour of its own: a table of contents of the running server.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use berth_cni::{Network, NetworkConfig};
use berth_image::{ImageStore, StoreConfig};
use berth_linux::caps::CapSet;
use berth_linux::instance::InstanceId;
use berth_nri::Nri;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tokio_util::task::TaskTracker;

use crate::board::Board;
use crate::cdi::Registry;
use crate::cgroups::Cgroups;
use crate::config::Config;
use crate::container::apparmor::AppArmor;
use crate::container::security::FilterCache;
use crate::container::selinux::SeLinuxHost;
use crate::error::{Error, file};
use crate::events::Events;
use crate::exec::Repeated;
use crate::handlers::Handlers;
use crate::paths::Paths;
use crate::progress::Progress;
use crate::reaper::Reaper;
use crate::records::Durable;
use crate::sandbox::owner::Owners;
use crate::shim::Program;
use crate::stats::layers::Layers;
use crate::stats::rates::Rates;
use crate::streaming::Tokens;

/// How many different warnings are remembered.
const WARNINGS: usize = 256;

/// The parts.
pub(crate) struct Server {
    pub(crate) config: Config,
    /// Six hex digits, from the state folder.
    pub(crate) instance: String,
    /// The kernel's id of this boot.
    pub(crate) boot: String,
    pub(crate) paths: Paths,
    pub(crate) board: Board,
    pub(crate) owners: Owners,
    pub(crate) events: Events,
    /// What goes on.
    pub(crate) progress: Arc<Progress>,
    pub(crate) durable: Durable,
    pub(crate) reaper: Reaper,
    pub(crate) cgroups: Cgroups,
    pub(crate) images: Arc<ImageStore>,
    pub(crate) network: Network,
    pub(crate) program: Program,
    pub(crate) filters: FilterCache,
    /// What is run in containers again and again.
    pub(crate) repeated: Repeated,
    pub(crate) cdi: Registry,
    pub(crate) apparmor: AppArmor,
    pub(crate) selinux: SeLinuxHost,
    pub(crate) nri: Nri,
    pub(crate) tokens: Tokens,
    /// What writable layers take.
    pub(crate) layers: Layers,
    /// Processor time as a rate.
    pub(crate) rates: Rates,
    /// What this process may give at most.
    pub(crate) bounding: CapSet,
    pub(crate) features: Features,
    pub(crate) handlers: Arc<Handlers>,
    /// Operations under way.
    pub(crate) tasks: TaskTracker,
    closing: CancellationToken,
    said: Mutex<BTreeSet<String>>,
}

impl Server {
    /// Opens everything. Nothing is recovered yet.
    pub(crate) async fn open(mut config: Config) -> Result<Self, Error> {
        for folder in [&mut config.root, &mut config.state] {
            std::fs::create_dir_all(&*folder).map_err(file("create", &*folder))?;
            *folder = std::fs::canonicalize(&*folder).map_err(file("resolve", &*folder))?;
        }
        let paths = Paths::new(&config.root, &config.state);
        for folder in [paths.kept_sandboxes(), paths.kept_containers(), paths.live_sandboxes()] {
            std::fs::create_dir_all(&folder).map_err(file("create", &folder))?;
        }
        let instance = InstanceId::of_state_dir(&config.state).to_string();
        let boot =
            berth_linux::boot::boot_id().map_err(|e| Error::Linux { action: "read the boot id".into(), source: Box::new(e) })?;
        let images = open_images(&config, &paths).await?;
        Ok(Self {
            network: open_network(&config, &paths, &instance)?,
            durable: Durable::start()?,
            reaper: Reaper::start(paths.trash())?,
            cgroups: Cgroups::new(&instance, config.cgroup_driver)?,
            program: Program::new(config.shim, paths.shim_folder()),
            board: Board::default(),
            owners: Owners::default(),
            events: Events::default(),
            progress: Arc::new(Progress::new(config.deadlines)),
            filters: FilterCache::default(),
            repeated: Repeated::default(),
            nri: Nri::new(config.nri.clone()),
            cdi: Registry::new(config.cdi_spec_dirs.clone()),
            apparmor: AppArmor::new(paths.apparmor()),
            selinux: SeLinuxHost::detect(),
            tokens: Tokens::default(),
            layers: Layers::default(),
            rates: Rates::default(),
            bounding: berth_linux::caps::bounding(),
            features: Features::detect(),
            handlers: Arc::new(Handlers::new(&config.runtime_handlers)?),
            closing: CancellationToken::new(),
            tasks: TaskTracker::new(),
            said: Mutex::default(),
            images,
            paths,
            boot,
            instance,
            config,
        })
    }

    /// Whether a warning is new: what every container meets on a machine is said once.
    pub(crate) fn is_news(&self, warning: &str) -> bool {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        said.len() < WARNINGS && said.insert(warning.to_owned())
    }

    /// Whether no new work is taken.
    pub(crate) fn closing(&self) -> bool {
        self.closing.is_cancelled()
    }

    /// Takes no new work from here on.
    pub(crate) fn close(&self) {
        self.closing.cancel();
    }

    /// Cancelled when the server closes.
    pub(crate) fn closing_token(&self) -> CancellationToken {
        self.closing.clone()
    }

    /// Ends when the server closes.
    pub(crate) fn closed(&self) -> WaitForCancellationFutureOwned {
        self.closing.clone().cancelled_owned()
    }
}

async fn open_images(config: &Config, paths: &Paths) -> Result<Arc<ImageStore>, Error> {
    let mut store = StoreConfig::new(paths.images());
    store.registry.config_dirs.clone_from(&config.registry_config_dirs);
    let images = ImageStore::open(store).await.map_err(|e| Error::Image {
        action: "open the store of",
        image: "all".into(),
        source: Box::new(e),
    })?;
    for problem in images.problems() {
        tracing::warn!(path = %problem.path.display(), reason = problem.reason, "image store");
    }
    Ok(images)
}

fn open_network(config: &Config, paths: &Paths, instance: &str) -> Result<Network, Error> {
    let failed = |error| Error::Network { action: "open the", id: "all".into(), source: Box::new(error) };
    Network::load(network_config(config, paths, instance)?).map_err(failed)
}

/// What the instance's network is told.
pub(crate) fn network_config(config: &Config, paths: &Paths, instance: &str) -> Result<NetworkConfig, Error> {
    let pod_cidrs = config.cidrs()?;
    Ok(NetworkConfig {
        conf_dir: config.cni_conf_dir.clone(),
        bin_dirs: config.cni_bin_dirs.clone(),
        instance: instance.to_owned(),
        state_dir: paths.network_state(),
        cache_dir: paths.network_cache(),
        pod_cidrs,
        built_in: config.built_in_network,
        prefer_external: false,
        plugin_timeout: config.deadlines.cni_plugin,
    })
}

/// What the kernel can do for containers, found out once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Features {
    pub(crate) recursive_readonly: bool,
    pub(crate) user_namespaces: bool,
}

impl Features {
    /// Looks at the kernel. mount_setattr came with 5.12, idmapped overlay layers with 5.19.
    pub(crate) fn detect() -> Self {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let version = version(&release);
        let namespaces = std::path::Path::new("/proc/self/ns/user").exists();
        Self { recursive_readonly: version >= (5, 12), user_namespaces: namespaces && version >= (5, 19) }
    }
}

fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Runs something that blocks on a thread for that.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Error> + Send + 'static) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) if e.is_cancelled() => Err(Error::Closing),
        Err(e) => Err(Error::File { action: "run", path: "worker".into(), source: std::io::Error::other(e) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_versions_are_compared_as_numbers() {
        for (text, want) in [("6.18.5-cloud-amd64", (6, 18)), ("5.4.0", (5, 4)), ("6.1-rc3", (6, 1)), ("x", (0, 0))] {
            assert_eq!(version(text), want, "{text}");
        }
    }
}
