//! Volumes of a pod on the host: where each one is, set-up before the containers, tear-down after them. One file per
//! kind; only volumes that some container mounts are set up.

pub mod atomic;
pub mod bindings;
pub mod claim;
pub mod csi;
pub mod empty_dir;
pub mod host_path;
pub mod mounts;
mod nfs;
pub mod ownership;
pub mod payload;
pub(crate) mod persistent;
pub mod sub_path;
mod tear_down;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Pod, Volume};
use k8s_openapi::jiff::Timestamp;

use crate::node::Capacity;
use crate::objects::Objects;
use crate::pod;

pub use self::tear_down::{remove_folder, remove_folder_but, tear_down};

/// What volumes need of the node, the same for all pods. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Services {
    /// The node's name.
    pub node_name: String,
    /// Which claim has which volume.
    pub claims: bindings::Bindings,
    /// The CSI drivers.
    pub drivers: csi::drivers::Drivers,
}

/// Folder of a pod below the kubelet's folder.
pub fn pod_dir(kubelet_root: &Path, uid: &str) -> PathBuf {
    kubelet_root.join("pods").join(uid)
}

/// The file that says that a pod's folder is ours: other kubelets keep theirs in the same place.
pub(crate) const OURS: &str = ".berth";

/// Marks a pod's folder as ours. Idempotent.
pub fn mark_ours(pod_dir: &Path) -> io::Result<()> {
    match fs::File::create_new(pod_dir.join(OURS)) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Whether a pod's folder is ours.
pub fn is_ours(pod_dir: &Path) -> bool {
    fs::symlink_metadata(pod_dir.join(OURS)).is_ok()
}

/// Makes a private folder and its parents.
pub fn create_private_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o750).create(path)
}

/// Volumes that some container mounts.
pub(crate) fn used(pod: &Pod) -> Vec<&Volume> {
    let containers = pod::init_containers(pod).iter().chain(&pod::spec(pod).containers);
    let added = pod::spec(pod).ephemeral_containers.iter().flatten().map(|c| &c.volume_mounts);
    let mounts = containers.map(|c| &c.volume_mounts).chain(added).flatten().flatten();
    let names: BTreeSet<&str> = mounts.map(|m| m.name.as_str()).collect();
    pod::spec(pod).volumes.iter().flatten().filter(|v| names.contains(v.name.as_str())).collect()
}

/// What setting up a pod's volumes needs.
#[derive(Clone, Copy, Debug)]
pub struct VolumeContext<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// Its folder.
    pub dir: &'a Path,
    /// The machine.
    pub capacity: &'a Capacity,
    /// What it refers to by name.
    pub objects: &'a dyn Objects,
    /// What all pods share.
    pub services: &'a Services,
}

/// A volume as containers mount it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located {
    /// Where it is on the host.
    pub path: String,
    /// No container may write it, whatever its mount says.
    pub read_only: bool,
}

/// The folder of a volume whose files berth writes; `None` for other kinds. Its second part: it is kept in memory.
fn files_folder(pod_dir: &Path, volume: &Volume) -> Option<(PathBuf, bool)> {
    let (plugin, in_memory) = match volume {
        Volume { config_map: Some(_), .. } => ("configmap", false),
        Volume { secret: Some(_), .. } => ("secret", true),
        Volume { downward_api: Some(_), .. } => ("downward-api", true),
        Volume { projected: Some(_), .. } => ("projected", true),
        _ => return None,
    };
    Some((pod_dir.join("volumes").join(format!("kubernetes.io~{plugin}")).join(&volume.name), in_memory))
}

/// Where each used volume is that is on the host, by name. One whose source cannot be found is left out.
pub fn locate(context: &VolumeContext<'_>) -> BTreeMap<String, Located> {
    let located = |volume: &Volume| -> Option<Located> {
        let (path, read_only) = if let Some(host_path) = &volume.host_path {
            (PathBuf::from(&host_path.path), false)
        } else if let Some((folder, _)) = files_folder(context.dir, volume) {
            // The kubelet follows the links in there itself.
            (folder, true)
        } else if volume.empty_dir.is_some() {
            (empty_dir::path(context.dir, &volume.name), false)
        } else {
            let found = persistent::find(context, volume)?.ok()?;
            (found.path(context.dir), found.read_only)
        };
        Some(Located { path: path.to_string_lossy().into_owned(), read_only })
    };
    used(context.pod).into_iter().filter_map(|v| Some((v.name.clone(), located(v)?))).collect()
}

/// Sets up every used volume, and brings those that show objects up to date; the error is the kubelet's message for the first that
/// fails. `begun`: containers of the pod have them already, so that paths of the host are not judged again. Idempotent.
pub fn set_up(context: &VolumeContext<'_>, begun: bool, now: Timestamp) -> Result<(), String> {
    let VolumeContext { pod, dir, capacity, .. } = *context;
    share_mounts(pod, dir)?;
    let mut outcome = Ok(());
    for volume in used(pod) {
        let result = if let Some(host_path) = &volume.host_path {
            host_path::set_up(host_path, begun)
        } else if let Some(empty_dir) = &volume.empty_dir {
            empty_dir::set_up(pod, volume, empty_dir, dir, capacity)
        } else if volume.image.is_some() {
            Ok(())
        } else if let Some((folder, in_memory)) = files_folder(dir, volume) {
            set_up_files(context, volume, &folder, in_memory, now)
        } else if let Some(found) = persistent::find(context, volume) {
            found.and_then(|found| persistent::set_up(context, &found, begun))
        } else {
            Err(unsupported(volume))
        };
        // The others do not wait for it: what of them changes reaches a pod that runs.
        let failed = |e| format!("MountVolume.SetUp failed for volume {:?} : {e}", volume.name);
        outcome = outcome.and(result.map_err(failed));
    }
    outcome
}

/// Names the volume's type, which is the field beside its name.
fn unsupported(volume: &Volume) -> String {
    let fields = serde_json::to_value(volume).unwrap_or_default();
    let kind = fields.as_object().and_then(|fields| fields.keys().find(|field| *field != "name"));
    format!("volume type {} is not supported", kind.map_or("(none)", String::as_str))
}

/// Whether every used volume was set up once and still is, be it with old content: a container that starts finds it.
pub fn are_there(context: &VolumeContext<'_>) -> bool {
    used(context.pod).into_iter().all(|volume| {
        if volume.host_path.is_some() || volume.image.is_some() {
            true
        } else if volume.empty_dir.is_some() {
            empty_dir::is_there(volume, context.dir)
        } else if let Some((folder, _)) = files_folder(context.dir, volume) {
            atomic::is_written(&folder)
        } else {
            persistent::find(context, volume).is_some_and(|found| found.is_ok_and(|found| found.is_there(context.dir)))
        }
    })
}

/// A container that mounts volumes for others, a CSI driver, does it below the kubelet's folder: that has to be a shared mount.
fn share_mounts(pod: &Pod, pod_dir: &Path) -> Result<(), String> {
    let Some(kubelet_root) = pod_dir.parent().and_then(Path::parent) else { return Ok(()) };
    let below = |name: &str| {
        let volume = pod::spec(pod).volumes.iter().flatten().find(|volume| volume.name == name);
        volume.and_then(|v| v.host_path.as_ref()).is_some_and(|host| Path::new(&host.path).starts_with(kubelet_root))
    };
    let mounts =
        pod::init_containers(pod).iter().chain(&pod::spec(pod).containers).flat_map(|c| c.volume_mounts.iter().flatten());
    let mut both_ways = mounts.filter(|m| m.mount_propagation.as_deref() == Some("Bidirectional"));
    if both_ways.any(|mount| below(&mount.name)) {
        mounts::ensure_shared(kubelet_root).map_err(|e| format!("share the mounts of {}: {e}", kubelet_root.display()))?;
    }
    Ok(())
}

fn set_up_files(
    context: &VolumeContext<'_>,
    volume: &Volume,
    folder: &Path,
    in_memory: bool,
    now: Timestamp,
) -> Result<(), String> {
    let collected = payload::collect(context, volume).unwrap_or_else(|| Err(unsupported(volume)));
    let files = match collected {
        Ok(files) => files,
        // What a running pod has been given stays, whatever became of where it came from.
        Err(error) if atomic::is_written(folder) => {
            tracing::warn!(pod = %pod::format_pod(context.pod), volume = volume.name, error, "the volume keeps its old files");
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    empty_dir::make(context.pod, folder, in_memory, context.capacity)?;
    let group = empty_dir::fs_group(context.pod);
    let changed = atomic::write(folder, &files, group, now).map_err(|e| format!("write {}: {e}", folder.display()))?;
    if changed {
        tracing::info!(pod = %pod::format_pod(context.pod), volume = volume.name, files = files.len(), "volume is up to date");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{defaults::apply_defaults, parse::parse_manifest};

    #[test]
    fn only_used_volumes_are_set_up_and_all_are_removed() {
        let root = tempfile::tempdir().unwrap();
        let host = root.path().join("host");
        let text = format!(
            "
apiVersion: v1
kind: Pod
metadata: {{name: a, uid: u1}}
spec:
  volumes: [{{name: scratch}}, {{name: unused}}, {{name: host, hostPath: {{path: {}, type: DirectoryOrCreate}}}}]
  containers:
  - {{name: c, image: i, volumeMounts: [{{name: scratch, mountPath: /s}}, {{name: host, mountPath: /h}}]}}
",
            host.display()
        );
        let mut pod = parse_manifest(&text).unwrap().pods.remove(0).pod;
        apply_defaults(&mut pod);
        let dir = pod_dir(root.path(), "u1");
        let mut paths = BTreeMap::new();
        for _ in 0..2 {
            let objects = crate::objects::LocalObjects::default();
            let services = Services::default();
            let capacity = Capacity::default();
            let context = VolumeContext { pod: &pod, dir: &dir, capacity: &capacity, objects: &objects, services: &services };
            set_up(&context, false, Timestamp::UNIX_EPOCH).unwrap();
            assert!(are_there(&context));
            paths = locate(&context);
        }
        assert_eq!(paths["host"].path, host.to_string_lossy());
        assert!(Path::new(&paths["scratch"].path).is_dir() && host.is_dir() && !paths.contains_key("unused"));
        assert!(!empty_dir::path(&dir, "unused").exists());
        fs::write(Path::new(&paths["scratch"].path).join("file"), "x").unwrap();
        tear_down(&dir, &csi::drivers::Drivers::default()).unwrap();
        tear_down(&dir, &csi::drivers::Drivers::default()).unwrap();
        assert!(!dir.join("volumes").exists() && host.is_dir());
    }
}
