//! The end of a pod's volumes: unmounted, then removed. What the kubelet made itself goes with its content; of all else only empty
//! folders do. No link is followed and no other mount entered: the kernel is asked at every folder.

use std::fs;
use std::io;
use std::path::Path;

use berth_linux::tree::remove_all_on_one_mount;

use super::csi::{self, drivers::Drivers};
use super::{empty_dir, mounts, sub_path};

/// The kinds of volumes whose content is the pod's alone.
const OWN: &[&str] = &[
    "kubernetes.io~empty-dir",
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];

/// Unmounts and removes everything below the pod's `volumes` folder. What somebody else mounted there is an error that names it.
pub fn tear_down(pod_dir: &Path, drivers: &Drivers) -> Result<(), String> {
    sub_path::tear_down(pod_dir)?;
    csi::tear_down(pod_dir, drivers)?;
    let volumes = pod_dir.join("volumes");
    if fs::symlink_metadata(&volumes).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
        return Ok(());
    }
    let table = mounts::below(&volumes).map_err(|e| format!("read the mount table: {e}"))?;
    // Ours are the folders of volumes themselves, `<plugin>/<volume>`.
    let root = fs::canonicalize(&volumes).map_err(|e| format!("look at {}: {e}", volumes.display()))?;
    for path in table.into_iter().rev() {
        if path.parent().and_then(Path::parent) == Some(&*root) {
            empty_dir::unmount(&path).map_err(|e| format!("unmount {}: {e}", path.display()))?;
        }
    }
    if let Some(left) = mounts::below(&volumes).map_err(|e| format!("read the mount table: {e}"))?.first() {
        return Err(format!("{} is still mounted", left.display()));
    }
    for plugin in entries(&volumes)? {
        let own = plugin.file_name().is_some_and(|name| OWN.iter().any(|own| name == *own));
        if own { remove_folder(&plugin)? } else { remove_empty(&plugin)? }
    }
    remove_dir(&volumes)
}

/// Removes a folder of the kubelet's with all that is in it, but nothing that is mounted there.
pub fn remove_folder(path: &Path) -> Result<(), String> {
    remove_all_on_one_mount(path).map_err(|e| format!("remove {}: {e}", path.display()))
}

/// The same, but for the files of these names.
pub fn remove_folder_but(path: &Path, kept: &[&str]) -> Result<(), String> {
    if fs::symlink_metadata(path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
        return Ok(());
    }
    let is_kept = |entry: &Path| entry.file_name().is_some_and(|name| kept.iter().any(|kept| name == *kept));
    entries(path)?.iter().filter(|entry| !is_kept(entry)).try_for_each(|entry| remove_folder(entry))
}

/// Removes the mount points of one kind: folders that are empty. Content is somebody's data.
fn remove_empty(plugin: &Path) -> Result<(), String> {
    for volume in entries(plugin)? {
        remove_dir(&volume)?;
    }
    remove_dir(plugin)
}

fn entries(folder: &Path) -> Result<Vec<std::path::PathBuf>, String> {
    let failed = |e: io::Error| format!("read {}: {e}", folder.display());
    fs::read_dir(folder).map_err(failed)?.map(|entry| Ok(entry.map_err(failed)?.path())).collect()
}

fn remove_dir(path: &Path) -> Result<(), String> {
    match fs::remove_dir(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(format!("remove {}: {e}", path.display())),
        _ => Ok(()),
    }
}
