//! emptyDir volumes: a folder, or a tmpfs of bounded size.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, Pod, Volume};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount, unmount as sys_unmount,
};

use super::{create_private_dir, mounts};
use crate::node::Capacity;
use crate::pod;
use crate::quantity::Amount;
use crate::resources::pod_limits;

/// The folder of a pod's emptyDir volumes.
pub fn folder(pod_dir: &Path) -> PathBuf {
    pod_dir.join("volumes").join("kubernetes.io~empty-dir")
}

/// The folder of one.
pub fn path(pod_dir: &Path, volume: &str) -> PathBuf {
    folder(pod_dir).join(volume)
}

/// Makes the volume unless it is there.
pub fn set_up(
    pod: &Pod,
    volume: &Volume,
    source: &EmptyDirVolumeSource,
    pod_dir: &Path,
    capacity: &Capacity,
) -> Result<(), String> {
    let size = (source.medium.as_deref() == Some("Memory")).then(|| tmpfs_size(pod, source, capacity));
    make_folder(pod, &path(pod_dir, &volume.name), size, capacity)
}

/// Makes the folder of a volume that berth fills itself, as an emptyDir is made.
pub(super) fn make(pod: &Pod, path: &Path, in_memory: bool, capacity: &Capacity) -> Result<(), String> {
    let source = EmptyDirVolumeSource::default();
    make_folder(pod, path, in_memory.then(|| tmpfs_size(pod, &source, capacity)), capacity)
}

/// The group that may use the pod's volumes.
pub(super) fn fs_group(pod: &Pod) -> Option<u32> {
    let group = pod::spec(pod).security_context.as_ref().and_then(|s| s.fs_group);
    group.and_then(|group| u32::try_from(group).ok())
}

/// Makes a folder that every user may use; with a size it is a tmpfs. Idempotent.
fn make_folder(pod: &Pod, path: &Path, tmpfs: Option<i64>, capacity: &Capacity) -> Result<(), String> {
    let fail = |what: &str, e: io::Error| format!("{what} {}: {e}", path.display());
    create_private_dir(path.parent().unwrap_or(path)).map_err(|e| fail("create", e))?;
    match fs::create_dir(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(fail("create", e)),
        _ => {}
    }
    if let Some(size) = tmpfs
        && !mounts::is_mount_point(path).map_err(|e| fail("look at", e))?
    {
        mount_tmpfs(path, size, capacity.swap_bytes > 0).map_err(|e| fail("mount tmpfs on", e))?;
    }
    give_access(path, fs_group(pod)).map_err(|e| fail("set the mode of", e))
}

/// Mode 0777; with an fsGroup also that group and setgid.
fn give_access(path: &Path, group: Option<u32>) -> io::Result<()> {
    let metadata = fs::metadata(path)?;
    if let Some(group) = group.filter(|g| *g != metadata.gid()) {
        std::os::unix::fs::chown(path, None, Some(group))?;
    }
    let mode = if group.is_some() { 0o2777 } else { 0o777 };
    if metadata.permissions().mode() & 0o7777 != mode {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    }
    Ok(())
}

/// The smallest of the node's memory, the pod's limit and the volume's own.
fn tmpfs_size(pod: &Pod, source: &EmptyDirVolumeSource, capacity: &Capacity) -> i64 {
    let own = source.size_limit.as_ref().map(Amount::of).filter(|a| !a.is_zero()).map(Amount::units);
    let limits = [own, pod_limits(pod, capacity).memory, Some(capacity.memory_bytes)];
    limits.into_iter().flatten().filter(|bytes| *bytes > 0).min().unwrap_or(0)
}

fn mount_tmpfs(path: &Path, size: i64, swap: bool) -> io::Result<()> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", "tmpfs")?;
    fsconfig_set_string(&context, "mode", "0777")?;
    if size > 0 {
        fsconfig_set_string(&context, "size", size.to_string())?;
    }
    if swap {
        // Kernels before 6.4 do not know the option: the content may then be swapped out.
        let _ = fsconfig_set_flag(&context, "noswap");
    }
    fsconfig_create(&context)?;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    move_mount(&mount, "", rustix::fs::CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(())
}

/// Unmounts a tmpfs; one that is busy is detached, since its pod has ended.
pub fn unmount(path: &Path) -> io::Result<()> {
    match sys_unmount(path, UnmountFlags::NOFOLLOW) {
        Err(rustix::io::Errno::BUSY) => {
            tracing::warn!(path = %path.display(), "busy volume is detached");
            Ok(sys_unmount(path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH)?)
        }
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

    #[test]
    fn the_smallest_limit_bounds_a_tmpfs() {
        let capacity = Capacity { memory_bytes: 1 << 30, ..Capacity::default() };
        let source = |limit: Option<&str>| EmptyDirVolumeSource {
            medium: Some("Memory".into()),
            size_limit: limit.map(|l| Quantity(l.into())),
        };
        assert_eq!(tmpfs_size(&Pod::default(), &source(None), &capacity), 1 << 30);
        assert_eq!(tmpfs_size(&Pod::default(), &source(Some("64Mi")), &capacity), 64 << 20);
        assert_eq!(tmpfs_size(&Pod::default(), &source(Some("0")), &capacity), 1 << 30);
    }

    #[test]
    fn folders_are_open_to_every_user() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("v");
        fs::create_dir(&dir).unwrap();
        give_access(&dir, None).unwrap();
        assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o7777, 0o777);
    }
}
