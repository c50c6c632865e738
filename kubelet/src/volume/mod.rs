//! Volumes of a pod on the host: where each one is, set-up before the containers, tear-down after them. One file per
//! kind; only volumes that some container mounts are set up.

pub mod empty_dir;
pub mod host_path;
pub mod mounts;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Pod, Volume};

use crate::node::Capacity;
use crate::pod;

/// Folder of a pod below the kubelet's folder.
pub fn pod_dir(kubelet_root: &Path, uid: &str) -> PathBuf {
    kubelet_root.join("pods").join(uid)
}

/// Makes a private folder and its parents.
pub fn create_private_dir(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o750).create(path)
}

/// Volumes that some container mounts.
fn used(pod: &Pod) -> Vec<&Volume> {
    let containers = pod::init_containers(pod).iter().chain(&pod::spec(pod).containers);
    let names: BTreeSet<&str> = containers.flat_map(|c| c.volume_mounts.iter().flatten()).map(|m| m.name.as_str()).collect();
    pod::spec(pod).volumes.iter().flatten().filter(|v| names.contains(v.name.as_str())).collect()
}

/// The host path of each used volume, by name.
pub fn paths(pod: &Pod, pod_dir: &Path) -> BTreeMap<String, String> {
    let path = |volume: &Volume| match &volume.host_path {
        Some(host_path) => host_path.path.clone(),
        None => empty_dir::path(pod_dir, &volume.name).to_string_lossy().into_owned(),
    };
    used(pod).into_iter().map(|v| (v.name.clone(), path(v))).collect()
}

/// Sets up every used volume; the error is the kubelet's message. Idempotent.
pub fn set_up(pod: &Pod, pod_dir: &Path, capacity: &Capacity) -> Result<(), String> {
    for volume in used(pod) {
        let result = match (&volume.host_path, &volume.empty_dir) {
            (Some(host_path), _) => host_path::check(host_path),
            (None, Some(empty_dir)) => empty_dir::set_up(pod, volume, empty_dir, pod_dir, capacity),
            (None, None) => Err("volume type is not supported".to_owned()),
        };
        result.map_err(|e| format!("MountVolume.SetUp failed for volume {:?} : {e}", volume.name))?;
    }
    Ok(())
}

/// Unmounts and removes everything below the pod's `volumes` folder. Never crosses a mount: what somebody else mounted
/// there is an error that names it.
pub fn tear_down(pod_dir: &Path) -> Result<(), String> {
    let volumes = pod_dir.join("volumes");
    if fs::symlink_metadata(&volumes).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
        return Ok(());
    }
    let table = mounts::below(&volumes).map_err(|e| format!("read the mount table: {e}"))?;
    for path in table.into_iter().rev() {
        if path.parent().is_some_and(|p| p == empty_dir::folder(pod_dir)) {
            empty_dir::unmount(&path).map_err(|e| format!("unmount {}: {e}", path.display()))?;
        }
    }
    if let Some(left) = mounts::below(&volumes).map_err(|e| format!("read the mount table: {e}"))?.first() {
        return Err(format!("{} is still mounted", left.display()));
    }
    // Containers nested folders in there as deep as they liked.
    berth_linux::tree::remove_all(&volumes).map_err(|e| format!("remove {}: {e}", volumes.display()))
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
        for _ in 0..2 {
            set_up(&pod, &dir, &Capacity::default()).unwrap();
        }
        let paths = paths(&pod, &dir);
        assert_eq!(paths["host"], host.to_string_lossy());
        assert!(Path::new(&paths["scratch"]).is_dir() && host.is_dir() && !paths.contains_key("unused"));
        assert!(!empty_dir::path(&dir, "unused").exists());
        fs::write(Path::new(&paths["scratch"]).join("file"), "x").unwrap();
        tear_down(&dir).unwrap();
        tear_down(&dir).unwrap();
        assert!(!dir.join("volumes").exists() && host.is_dir());
    }
}
