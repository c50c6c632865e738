//! CSI volumes: which drivers there are ([`drivers`]), what is said to them for a volume, and what of it is on disk. A volume's
//! `vol_data.json` is written before its driver is asked for anything: whoever comes after a crash knows whom to ask to undo it.

pub mod drivers;
mod request;
pub mod wire;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use k8s_openapi::api::core::v1::PersistentVolume;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use self::drivers::{CALL, Driver, Drivers, call};
use self::wire::v1::{NodeUnpublishVolumeRequest, NodeUnstageVolumeRequest};
use super::ownership::{self, Ownership};
use super::{VolumeContext, create_private_dir, mounts};
use crate::atomic_file;
use crate::objects::Objects;
use crate::pod::{self, PodUid};

pub(super) use self::request::CsiVolume;
pub(crate) use self::request::token_requests;

/// The folder of a pod's CSI volumes.
pub(super) const PLUGIN: &str = "kubernetes.io~csi";
const DATA: &str = "vol_data.json";

/// A driver's volume.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Handle {
    /// The driver.
    pub(crate) driver: String,
    /// The volume's handle.
    pub(crate) handle: String,
}

impl Handle {
    /// Of a PersistentVolume of a driver.
    pub(crate) fn of(volume: &PersistentVolume) -> Option<Handle> {
        let source = volume.spec.as_ref()?.csi.as_ref()?;
        Some(Handle { driver: source.driver.clone(), handle: source.volume_handle.clone() })
    }
}

/// What is on disk of a volume, with the upstream's keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct VolumeData {
    #[serde(rename = "specVolID")]
    spec_vol_id: String,
    volume_handle: String,
    driver_name: String,
    node_name: String,
    #[serde(rename = "attachmentID")]
    attachment_id: String,
    volume_lifecycle_mode: String,
    #[serde(default, rename = "seLinuxMountContext")]
    selinux_mount_context: String,
    /// Ours: what is published has yet to be given to the pod's group. Not empty: so it is.
    #[serde(default, rename = "berthGroupPending", skip_serializing_if = "String::is_empty")]
    group_pending: String,
}

impl VolumeData {
    fn of(volume: &CsiVolume, driver: &Driver) -> VolumeData {
        let attachment = hash(&format!("{}{}{}", volume.handle, driver.name, driver.node_id));
        VolumeData {
            spec_vol_id: volume.name.clone(),
            volume_handle: volume.handle.clone(),
            driver_name: driver.name.clone(),
            node_name: driver.node_id.clone(),
            attachment_id: format!("csi-{attachment}"),
            volume_lifecycle_mode: if volume.ephemeral { "Ephemeral" } else { "Persistent" }.to_owned(),
            selinux_mount_context: String::new(),
            group_pending: String::new(),
        }
    }

    fn load(folder: &Path) -> io::Result<Option<VolumeData>> {
        match fs::read(folder.join(DATA)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn save(&self, folder: &Path) -> io::Result<()> {
        create_private_dir(folder)?;
        atomic_file::replace(&folder.join(DATA), &serde_json::to_vec(self)?, 0o600)
    }
}

/// A handle as a folder name, and in names that have to be of one length.
fn hash(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The folder of a pod's volume.
pub(super) fn folder(pod_dir: &Path, name: &str) -> PathBuf {
    pod_dir.join("volumes").join(PLUGIN).join(name)
}

/// Where the pod's containers find it.
pub(super) fn path(pod_dir: &Path, name: &str) -> PathBuf {
    folder(pod_dir, name).join("mount")
}

fn staging(kubelet_root: &Path) -> PathBuf {
    kubelet_root.join("plugins/kubernetes.io/csi")
}

fn kubelet_root(pod_dir: &Path) -> &Path {
    pod_dir.parent().and_then(Path::parent).unwrap_or(pod_dir)
}

/// Waits for calls of a driver from a thread that may block.
fn wait<T>(calls: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) => runtime.block_on(calls),
        // Of a verb that runs without an agent.
        Err(_) => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.map_err(|e| format!("start a runtime: {e}"))?.block_on(calls)
        }
    }
}

/// Whether the driver of a volume that the pod has wants to publish it again now and then.
pub(crate) fn is_republished(pod_dir: &Path, objects: &dyn Objects) -> bool {
    let drivers =
        folders(&pod_dir.join("volumes").join(PLUGIN)).into_iter().filter_map(|folder| VolumeData::load(&folder).ok()?);
    let wants = |data: VolumeData| objects.csi_driver(&data.driver_name).ok()?.and_then(|driver| driver.spec.requires_republish);
    drivers.into_iter().any(|data| wants(data) == Some(true))
}

/// Has the volume staged and published, unless it is. Blocking.
pub(super) fn set_up(context: &VolumeContext<'_>, volume: &CsiVolume) -> Result<(), String> {
    let drivers = &context.services.drivers;
    let lock = drivers.lock_of(&volume.driver, &volume.handle);
    let _one_at_a_time = lock.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = folder(context.dir, &volume.name);
    let target = folder.join("mount");
    let failed = |what: &str, path: &Path, e: io::Error| format!("{what} {}: {e}", path.display());
    let is_mounted = |path: &Path| match path.exists() {
        true => mounts::is_mount_point(path).map_err(|e| failed("look at", path, e)),
        false => Ok(false),
    };
    let on_record = VolumeData::load(&folder).map_err(|e| failed("read the record of", &folder, e))?;
    let on_record = on_record.filter(|r| r.driver_name == volume.driver && r.volume_handle == volume.handle);
    let pending = on_record.as_ref().is_some_and(|r| !r.group_pending.is_empty());
    let document = context.objects.csi_driver(&volume.driver)?;
    let again = document.as_ref().is_some_and(|d| d.spec.requires_republish == Some(true));
    // A pod that runs needs no driver.
    let published = on_record.is_some() && is_mounted(&target)? && !again;
    if published && !pending {
        return Ok(());
    }
    let driver = drivers.get(&volume.driver)?;
    let data = VolumeData::of(volume, &driver);
    let ownership = volume.ownership(&driver, document.as_deref(), context);
    if published {
        return give(&folder, &target, &data, ownership);
    }
    let secrets = request::Secrets::of(volume, document.as_deref(), context)?;
    // Whoever finds it published after a crash knows that it may be nobody's yet.
    let group_pending = ownership.map(|_| "true".to_owned()).unwrap_or_default();
    let record = VolumeData { group_pending, ..data.clone() };
    record.save(&folder).map_err(|e| failed("write the record of", &folder, e))?;
    let mut staged = None;
    if driver.stages && !volume.ephemeral {
        let folder = staging(kubelet_root(context.dir)).join(&driver.name).join(hash(&volume.handle));
        let mount = folder.join("globalmount");
        data.save(&folder).map_err(|e| failed("write the record of", &folder, e))?;
        create_private_dir(&mount).map_err(|e| failed("create", &mount, e))?;
        if !is_mounted(&mount)? {
            let request = volume.stage_request(&driver, &mount, &secrets, context);
            let stage = async { call("NodeStageVolume", CALL, driver.connect().await?.node_stage_volume(request)).await };
            wait(stage).map_err(|e| format!("MountDevice failed for volume {:?} : {e}", volume.name))?;
        }
        staged = Some(mount);
    }
    let request = volume.publish_request(&driver, staged.as_deref(), &target, &secrets, context);
    wait(async { call("NodePublishVolume", CALL, driver.connect().await?.node_publish_volume(request)).await })?;
    if ownership.is_none() { Ok(()) } else { give(&folder, &target, &data, ownership) }
}

/// Gives what is published to the pod's group, then takes down that it has been.
fn give(folder: &Path, target: &Path, data: &VolumeData, ownership: Option<Ownership>) -> Result<(), String> {
    if let Some(ownership) = ownership {
        ownership::apply(target, ownership).map_err(|e| format!("give {} to the fsGroup: {e}", target.display()))?;
    }
    data.save(folder).map_err(|e| format!("write the record of {}: {e}", folder.display()))
}

/// Has a pod's CSI volumes unpublished and, where no other pod has them, unstaged. Blocking.
pub(super) fn tear_down(pod_dir: &Path, drivers: &Drivers) -> Result<(), String> {
    let plugin = pod_dir.join("volumes").join(PLUGIN);
    for folder in folders(&plugin) {
        let target = folder.join("mount");
        let Some(data) = VolumeData::load(&folder).map_err(|e| format!("read the record of {}: {e}", folder.display()))? else {
            // Without a record no driver was asked for anything.
            remove_dirs(&[&target, &folder])?;
            continue;
        };
        let lock = drivers.lock_of(&data.driver_name, &data.volume_handle);
        let _one_at_a_time = lock.lock().unwrap_or_else(PoisonError::into_inner);
        let driver = drivers.get(&data.driver_name).map_err(|e| format!("volume {:?}: {e}", data.spec_vol_id))?;
        let request = NodeUnpublishVolumeRequest {
            volume_id: data.volume_handle.clone(),
            target_path: target.to_string_lossy().into_owned(),
        };
        wait(async { call("NodeUnpublishVolume", CALL, driver.connect().await?.node_unpublish_volume(request)).await })
            .map_err(|e| format!("volume {:?}: {e}", data.spec_vol_id))?;
        remove_dirs(&[&target])?;
        unstage(kubelet_root(pod_dir), &data, &driver, Some(&folder))?;
        // Last: as long as it is there somebody has to ask the driver.
        remove_file(&folder.join(DATA))?;
        remove_dirs(&[&folder])?;
    }
    Ok(())
}

/// Unstages the volume unless a pod has it. `except` is the folder of a pod that is done with it.
fn unstage(kubelet_root: &Path, data: &VolumeData, driver: &Driver, except: Option<&Path>) -> Result<(), String> {
    let staged = staging(kubelet_root).join(&data.driver_name).join(hash(&data.volume_handle));
    if !staged.join(DATA).exists() || is_used(kubelet_root, data, except) {
        return Ok(());
    }
    let mount = staged.join("globalmount");
    let request = NodeUnstageVolumeRequest {
        volume_id: data.volume_handle.clone(),
        staging_target_path: mount.to_string_lossy().into_owned(),
    };
    wait(async { call("NodeUnstageVolume", CALL, driver.connect().await?.node_unstage_volume(request)).await })
        .map_err(|e| format!("volume {:?}: {e}", data.spec_vol_id))?;
    remove_dirs(&[&mount])?;
    remove_file(&staged.join(DATA))?;
    remove_dirs(&[&staged])
}

/// Whether a pod's folder has the volume.
fn is_used(kubelet_root: &Path, data: &VolumeData, except: Option<&Path>) -> bool {
    let pods = folders(&kubelet_root.join("pods"));
    let volumes = pods.iter().flat_map(|pod| folders(&pod.join("volumes").join(PLUGIN)));
    volumes.filter(|folder| Some(folder.as_path()) != except).any(|folder| match VolumeData::load(&folder) {
        Ok(other) => other.is_some_and(|o| o.driver_name == data.driver_name && o.volume_handle == data.volume_handle),
        // Nobody knows whose it is.
        Err(_) => true,
    })
}

/// The volumes of drivers that pods have on this machine, but for those that are a pod's alone.
pub(crate) fn mounted(kubelet_root: &Path) -> Vec<(PodUid, Handle)> {
    let pods = folders(&kubelet_root.join("pods"));
    let of_pod = |pod: &PathBuf| {
        let uid = PodUid::new(pod.file_name()?.to_str()?)?;
        let loaded =
            folders(&pod.join("volumes").join(PLUGIN)).into_iter().filter_map(|folder| VolumeData::load(&folder).ok()?);
        let lasting = loaded.filter(|data| data.volume_lifecycle_mode == "Persistent");
        let handles = lasting.map(|data| Handle { driver: data.driver_name, handle: data.volume_handle });
        Some(handles.map(move |handle| (uid.clone(), handle)).collect::<Vec<_>>())
    };
    pods.iter().filter_map(of_pod).flatten().collect()
}

/// Staged volumes that no pod has: what a kubelet left that ended between two steps.
pub fn orphans(kubelet_root: &Path) -> Vec<PathBuf> {
    staged(kubelet_root).into_iter().filter(|(_, data)| !is_used(kubelet_root, data, None)).map(|(folder, _)| folder).collect()
}

fn staged(kubelet_root: &Path) -> Vec<(PathBuf, VolumeData)> {
    let drivers = folders(&staging(kubelet_root));
    let all = drivers.iter().flat_map(|driver| folders(driver));
    all.filter_map(|folder| VolumeData::load(&folder).ok().flatten().map(|data| (folder, data))).collect()
}

/// Has those unstaged whose drivers are there. Blocking.
pub fn collect(kubelet_root: &Path, drivers: &Drivers) {
    for (folder, data) in staged(kubelet_root) {
        let Ok(driver) = drivers.get(&data.driver_name) else { continue };
        let lock = drivers.lock_of(&data.driver_name, &data.volume_handle);
        let _one_at_a_time = lock.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = unstage(kubelet_root, &data, &driver, None) {
            tracing::warn!(path = %folder.display(), error, "orphaned volume stays");
        }
    }
}

fn folders(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).map(|entry| entry.path()).collect()
}

/// Removes folders that are empty and not mounted: what is in them is somebody's data.
fn remove_dirs(paths: &[&Path]) -> Result<(), String> {
    for path in paths {
        match fs::remove_dir(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(format!("remove {}: {e}", path.display())),
            _ => {}
        }
    }
    Ok(())
}

fn remove_file(path: &Path) -> Result<(), String> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(format!("remove {}: {e}", path.display())),
        _ => Ok(()),
    }
}

/// The context of a pod that drivers may ask for.
fn pod_info(context: &VolumeContext<'_>, ephemeral: bool) -> Vec<(String, String)> {
    let account = pod::spec(context.pod).service_account_name.as_deref().unwrap_or_default();
    [
        ("pod.name", pod::name(context.pod)),
        ("pod.namespace", pod::namespace(context.pod)),
        ("pod.uid", pod::uid(context.pod)),
        ("serviceAccount.name", account),
        ("ephemeral", if ephemeral { "true" } else { "false" }),
    ]
    .into_iter()
    .map(|(key, value)| (format!("csi.storage.k8s.io/{key}"), value.to_owned()))
    .collect()
}
