//! Which CSI drivers there are: sockets in `plugins_registry`, asked what they are; device plugins among them are handed on. Knows
//! no volume.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Pod, Volume};
use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};

use super::wire::registration::registration_client::RegistrationClient;
use super::wire::registration::{InfoRequest, PluginInfo, RegistrationStatus};
use super::wire::v1::node_client::NodeClient;
use super::wire::v1::node_service_capability::Type as CapabilityType;
use super::wire::v1::node_service_capability::rpc::Type as Rpc;
use super::wire::v1::{NodeGetCapabilitiesRequest, NodeGetInfoRequest};
use crate::devices::Devices;
use crate::pod;
use crate::volume::create_private_dir;

/// The upstream's limits of a registration: connecting, GetInfo, the answer.
const DIAL: Duration = Duration::from_secs(10);
const GET_INFO: Duration = Duration::from_secs(1);
const NOTIFY: Duration = Duration::from_secs(5);
/// The upstream's limit of a call to a driver.
pub(super) const CALL: Duration = Duration::from_secs(120);
/// The type of plugins that have devices and no volumes.
const DEVICE_PLUGIN: &str = "DevicePlugin";
/// The upstream's pauses before a socket that failed is asked again.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(122);

/// A driver that has registered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Driver {
    /// Its name.
    pub name: String,
    /// The socket of its node service.
    pub endpoint: PathBuf,
    /// What it calls this node.
    pub node_id: String,
    /// It wants volumes staged before they are published.
    pub stages: bool,
    /// It gives volumes to a group itself.
    pub gives_to_group: bool,
    /// It tells apart one and several writers on one node.
    pub knows_writers: bool,
    /// Where it says that this node is, for the scheduler.
    pub topology: BTreeMap<String, String>,
    /// How many volumes it can have on this node; 0: it does not say.
    pub max_volumes: i64,
}

impl Driver {
    /// A connection to its node service.
    pub(super) async fn connect(&self) -> Result<NodeClient<Channel>, String> {
        Ok(NodeClient::new(connect(&self.endpoint).await?))
    }
}

/// Threads of pods that wait for drivers: a call may take [`CALL`], and the agent has few threads. Pods without volumes of
/// drivers never wait for those with.
const CALLERS: usize = 4;

/// Room for callers.
#[derive(Debug)]
struct Callers(Arc<Semaphore>);

impl Default for Callers {
    fn default() -> Self {
        Callers(Arc::new(Semaphore::new(CALLERS)))
    }
}

type Locks = Mutex<BTreeMap<(String, String), Arc<Mutex<()>>>>;

/// The drivers of this node. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Drivers {
    known: Arc<RwLock<BTreeMap<String, Driver>>>,
    locks: Arc<Locks>,
    callers: Arc<Callers>,
    changed: Arc<Notify>,
}

/// One socket of the registry, as it is now: a driver that restarts makes a new one under the old name.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Socket {
    path: PathBuf,
    inode: u64,
    changed: (i64, i64),
}

/// What became of a socket.
struct Known {
    socket: Socket,
    /// What it has registered.
    plugin: Option<Registered>,
    /// When to ask again, and the pause before that.
    again: Option<(Instant, Duration)>,
}

/// What a plugin has registered.
enum Registered {
    Driver(Driver),
    /// The devices of a resource.
    Devices(String),
}

/// The folder of registration sockets.
pub fn registry(kubelet_root: &Path) -> PathBuf {
    kubelet_root.join("plugins_registry")
}

impl Drivers {
    /// The driver of a name; the error is the kubelet's message.
    pub fn get(&self, name: &str) -> Result<Driver, String> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.get(name).cloned().ok_or_else(|| format!("driver name {name} not found in the list of registered CSI drivers"))
    }

    /// All drivers, by name.
    pub fn all(&self) -> Vec<Driver> {
        self.known.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// To be held while a pod's volumes are set up or torn down on a thread: none where no driver can be asked.
    pub(crate) async fn turn(&self, pod: &Pod) -> Option<OwnedSemaphorePermit> {
        let may_be_asked = |v: &Volume| v.csi.is_some() || v.persistent_volume_claim.is_some() || v.ephemeral.is_some();
        if !pod::spec(pod).volumes.iter().flatten().any(may_be_asked) {
            return None;
        }
        self.callers.0.clone().acquire_owned().await.ok()
    }

    /// What one does with a volume at a time.
    pub(super) fn lock_of(&self, driver: &str, handle: &str) -> Arc<Mutex<()>> {
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        locks.retain(|_, lock| Arc::strong_count(lock) > 1);
        locks.entry((driver.to_owned(), handle.to_owned())).or_default().clone()
    }

    fn add(&self, driver: Driver) {
        tracing::info!(driver = driver.name, node = driver.node_id, endpoint = %driver.endpoint.display(), "CSI driver is registered");
        self.known.write().unwrap_or_else(PoisonError::into_inner).insert(driver.name.clone(), driver);
        self.changed.notify_one();
    }

    fn remove(&self, name: &str) {
        tracing::info!(driver = name, "CSI driver is gone");
        self.known.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        self.changed.notify_one();
    }

    /// Comes back when drivers have come or gone since it last did; one task waits.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The drivers whose sockets answer now, without telling them anything: for who only takes down.
    pub async fn find(kubelet_root: &Path) -> Drivers {
        let drivers = Drivers::default();
        for socket in sockets(&registry(kubelet_root)) {
            let found = async {
                let (info, _) = info_of(&socket.path).await?;
                if info.r#type == DEVICE_PLUGIN { Ok(None) } else { driver_of(&info, &socket.path).await.map(Some) }
            };
            match found.await {
                Ok(driver) => driver.into_iter().for_each(|driver| drivers.add(driver)),
                Err::<_, String>(error) => tracing::warn!(socket = %socket.path.display(), error, "a plugin does not answer"),
            }
        }
        drivers
    }

    /// Follows the registry until `stop`.
    pub(crate) async fn run(self, kubelet_root: PathBuf, devices: Devices, stop: CancellationToken) {
        let folder = registry(&kubelet_root);
        for folder in [&folder, &kubelet_root.join("plugins")] {
            if let Err(error) = create_private_dir(folder) {
                tracing::warn!(path = %folder.display(), %error, "no folder for plugins");
            }
        }
        let mut known: Vec<Known> = Vec::new();
        let watch = watch();
        loop {
            if let Some(watch) = &watch {
                add_folders(watch, &folder);
            }
            self.reconcile(&mut known, sockets(&folder), &devices, &stop).await;
            let next = known.iter().filter_map(|k| k.again.map(|(at, _)| at)).min();
            let timer = async {
                match next {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                () = changed(watch.as_ref()) => {}
                () = timer => {}
            }
        }
    }

    async fn reconcile(&self, known: &mut Vec<Known>, now: Vec<Socket>, devices: &Devices, stop: &CancellationToken) {
        known.retain(|before| {
            let stays = now.contains(&before.socket);
            match before.plugin.as_ref().filter(|_| !stays) {
                Some(Registered::Driver(driver)) => self.remove(&driver.name),
                Some(Registered::Devices(resource)) => devices.unplug(resource),
                None => {}
            }
            stays
        });
        for socket in now {
            if !known.iter().any(|k| k.socket == socket) {
                known.push(Known { socket, plugin: None, again: Some((Instant::now(), FIRST_PAUSE)) });
            }
        }
        for entry in known.iter_mut() {
            let Some((_, pause)) = entry.again.filter(|(at, _)| *at <= Instant::now()) else { continue };
            match register(&entry.socket.path, devices, stop).await {
                Ok(plugin) => {
                    if let Registered::Driver(driver) = &plugin {
                        self.add(driver.clone());
                    }
                    entry.plugin = Some(plugin);
                    entry.again = None;
                }
                Err(error) => {
                    tracing::warn!(socket = %entry.socket.path.display(), error, "a plugin is not registered");
                    entry.again = Some((Instant::now() + pause, (pause * 2).min(LONGEST_PAUSE)));
                }
            }
        }
    }
}

/// The sockets of the registry and of the folders in it.
fn sockets(folder: &Path) -> Vec<Socket> {
    let mut found = Vec::new();
    let mut folders = vec![(folder.to_owned(), true)];
    while let Some((folder, top)) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let (Ok(metadata), hidden) = (entry.metadata(), entry.file_name().to_string_lossy().starts_with('.')) else {
                continue;
            };
            if metadata.is_dir() && top && !hidden {
                folders.push((entry.path(), false));
            } else if metadata.file_type().is_socket() && !hidden {
                let changed = (metadata.ctime(), metadata.ctime_nsec());
                found.push(Socket { path: entry.path(), inode: metadata.ino(), changed });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

fn watch() -> Option<AsyncFd<OwnedFd>> {
    let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
    // `register` is unsafe for types that may lie about their descriptor; an OwnedFd cannot.
    #[expect(deprecated)]
    let watch = inotify::init(flags).map_err(std::io::Error::from).and_then(AsyncFd::new);
    watch.inspect_err(|error| tracing::warn!(%error, "no inotify: plugins are not seen")).ok()
}

/// Watches the registry and its folders; those that are watched already stay so.
fn add_folders(watch: &AsyncFd<OwnedFd>, folder: &Path) {
    let events = inotify::WatchFlags::CREATE
        | inotify::WatchFlags::MOVED_TO
        | inotify::WatchFlags::MOVED_FROM
        | inotify::WatchFlags::DELETE
        | inotify::WatchFlags::ONLYDIR;
    let below = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).filter(|path| path.is_dir());
    for path in std::iter::once(folder.to_owned()).chain(below) {
        if let Err(error) = inotify::add_watch(watch.get_ref(), &path, events) {
            tracing::warn!(path = %path.display(), %error, "plugins are not seen");
        }
    }
}

async fn changed(watch: Option<&AsyncFd<OwnedFd>>) {
    let Some(watch) = watch else { return std::future::pending().await };
    let Ok(mut ready) = watch.readable().await else { return std::future::pending().await };
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(watch.get_ref(), &mut buffer);
    while reader.next().is_ok() {}
    ready.clear_ready();
}

/// A channel to a plugin's socket, within the limit of a dial.
pub(crate) async fn connect(socket: &Path) -> Result<Channel, String> {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    let failed = |why: String| format!("connect to {}: {why}", socket.display());
    let endpoint = Endpoint::from_static("http://plugin");
    match timeout(DIAL, endpoint.connect_with_connector(connector)).await {
        Ok(connected) => connected.map_err(|e| failed(crate::execute::with_causes(&e))),
        Err(_) => Err(failed("no answer".to_owned())),
    }
}

pub(super) async fn call<T>(
    name: &str,
    limit: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, String> {
    match timeout(limit, call).await {
        Ok(answer) => {
            answer.map(tonic::Response::into_inner).map_err(|status| format!("{name}: {}", crate::cri::status_text(&status)))
        }
        Err(_) => Err(format!("{name}: no answer within {} s", limit.as_secs())),
    }
}

/// What the plugin behind a registration socket says that it is.
async fn info_of(socket: &Path) -> Result<(PluginInfo, RegistrationClient<Channel>), String> {
    let mut client = RegistrationClient::new(connect(socket).await?);
    let info = call("GetInfo", GET_INFO, client.get_info(InfoRequest {})).await?;
    Ok((info, client))
}

/// Where a plugin's service is.
fn endpoint_of(info: &PluginInfo, socket: &Path) -> PathBuf {
    match info.endpoint.as_str() {
        "" => socket.to_owned(),
        path => PathBuf::from(path.strip_prefix("unix://").unwrap_or(path)),
    }
}

async fn driver_of(info: &PluginInfo, socket: &Path) -> Result<Driver, String> {
    if info.r#type != "CSIPlugin" {
        return Err(format!("no handler registered for plugin type: {} at socket {}", info.r#type, socket.display()));
    }
    if !info.supported_versions.iter().any(|version| version.trim_start_matches('v').split('.').next() == Some("1")) {
        return Err(format!("CSI driver {}: none of its versions {:?} is 1.x", info.name, info.supported_versions));
    }
    let endpoint = endpoint_of(info, socket);
    let mut client = NodeClient::new(connect(&endpoint).await?);
    let node = call("NodeGetInfo", CALL, client.node_get_info(NodeGetInfoRequest {})).await?;
    let capabilities = call("NodeGetCapabilities", CALL, client.node_get_capabilities(NodeGetCapabilitiesRequest {})).await?;
    let has = |wanted: Rpc| {
        let types = capabilities.capabilities.iter().filter_map(|c| c.r#type.as_ref());
        types.into_iter().any(|CapabilityType::Rpc(rpc)| rpc.r#type() == wanted)
    };
    Ok(Driver {
        name: info.name.clone(),
        endpoint,
        node_id: node.node_id,
        stages: has(Rpc::StageUnstageVolume),
        gives_to_group: has(Rpc::VolumeMountGroup),
        knows_writers: has(Rpc::SingleNodeMultiWriter),
        topology: node.accessible_topology.map(|topology| topology.segments.into_iter().collect()).unwrap_or_default(),
        max_volumes: node.max_volumes_per_node,
    })
}

async fn register(socket: &Path, devices: &Devices, stop: &CancellationToken) -> Result<Registered, String> {
    let (info, mut client) = info_of(socket).await?;
    let registered = if info.r#type == DEVICE_PLUGIN {
        let plugged = devices.plug(&info.name, &info.supported_versions, endpoint_of(&info, socket), stop).await;
        plugged.map(|()| Registered::Devices(info.name))
    } else {
        driver_of(&info, socket).await.map(Registered::Driver)
    };
    let problem = registered.as_ref().err().map_or("", String::as_str);
    tell(&mut client, registered.is_ok(), problem).await;
    registered
}

async fn tell(client: &mut RegistrationClient<Channel>, registered: bool, error: &str) {
    let status = RegistrationStatus { plugin_registered: registered, error: error.to_owned() };
    if let Err(error) = call("NotifyRegistrationStatus", NOTIFY, client.notify_registration_status(status)).await {
        tracing::warn!(error, "a plugin does not hear of its registration");
    }
}
