//! emptyDir volumes: a folder, a tmpfs of bounded size or huge pages, and how much is in them.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, Pod, Volume};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount, unmount as sys_unmount,
};

use super::ownership::walk;
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

/// Where it says that the volume has been made.
fn ready_mark(pod_dir: &Path, volume: &str) -> PathBuf {
    pod_dir.join("plugins").join("kubernetes.io~empty-dir").join(volume).join("ready")
}

/// Whether the volume has been made, and is mounted where it is no folder of the disk.
pub(super) fn is_there(volume: &Volume, pod_dir: &Path) -> bool {
    let on_disk = volume.empty_dir.as_ref().is_some_and(|e| e.medium.as_deref().unwrap_or_default().is_empty());
    let path = path(pod_dir, &volume.name);
    let in_place = path.is_dir() && (on_disk || mounts::is_mount_point(&path).unwrap_or(false));
    in_place && ready_mark(pod_dir, &volume.name).exists()
}

/// Makes the volume unless it is there.
pub fn set_up(
    pod: &Pod,
    volume: &Volume,
    source: &EmptyDirVolumeSource,
    pod_dir: &Path,
    capacity: &Capacity,
) -> Result<(), String> {
    let medium = match source.medium.as_deref().unwrap_or_default() {
        "" => Medium::Disk,
        "Memory" => Medium::Memory(tmpfs_size(pod, source, capacity)),
        huge => Medium::HugePages(page_size(pod, huge)?),
    };
    let path = path(pod_dir, &volume.name);
    let ready = ready_mark(pod_dir, &volume.name);
    let fail = |what: &str, e: io::Error| format!("{what} {}: {e}", path.display());
    let in_place = match medium {
        Medium::Disk => path.is_dir(),
        _ => path.is_dir() && mounts::is_mount_point(&path).map_err(|e| fail("look at", e))?,
    };
    // Once made it is the pod's: what a container did to its mode stays over restarts of the kubelet.
    if in_place && ready.exists() {
        return Ok(());
    }
    make_folder(pod, &path, medium, capacity)?;
    let mark = || {
        create_private_dir(ready.parent().unwrap_or(&ready))?;
        fs::File::create(&ready).map(drop)
    };
    mark().map_err(|e| format!("create {}: {e}", ready.display()))
}

/// What an emptyDir is kept on.
#[derive(Clone, Copy, Debug)]
enum Medium {
    Disk,
    /// A tmpfs of so many bytes.
    Memory(i64),
    /// Huge pages of so many bytes each.
    HugePages(i64),
}

/// The pages of a medium `HugePages` or `HugePages-<size>`: the pod has to ask for them.
fn page_size(pod: &Pod, medium: &str) -> Result<i64, String> {
    let containers = pod::init_containers(pod).iter().chain(&pod::spec(pod).containers);
    let requests = containers.flat_map(|c| c.resources.iter().flat_map(|r| r.requests.iter().flatten()));
    let of_pod = pod::spec(pod).resources.iter().flat_map(|r| r.requests.iter().flatten());
    let sizes = requests.chain(of_pod).filter_map(|(name, _)| Amount::parse(name.strip_prefix("hugepages-")?).ok());
    let asked: BTreeSet<i64> = sizes.map(Amount::units).collect();
    let Some(size) = medium.strip_prefix("HugePages-") else {
        return match (asked.first(), asked.len()) {
            (Some(size), 1) => Ok(*size),
            (None, _) => Err(format!("medium {medium}: no container requests huge pages")),
            _ => Err(format!("medium {medium} can be used only if all containers use one page size")),
        };
    };
    let size = Amount::parse(size).map_err(|e| format!("medium {medium}: {e}"))?.units();
    if asked.contains(&size) { Ok(size) } else { Err(format!("medium {medium}: no container requests such pages")) }
}

/// How much is in a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of blocks.
    pub bytes: u64,
    /// Files and folders.
    pub inodes: u64,
}

/// What is in a folder, other mounts and links apart; each file counts once, however many names it has.
pub fn usage(folder: &Path) -> io::Result<Usage> {
    let top = rustix::fs::open(folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut usage = Usage::default();
    let mut seen = BTreeSet::new();
    let mut count = |stat: &Stat| {
        if stat.st_nlink < 2 || FileType::from_raw_mode(stat.st_mode).is_dir() || seen.insert((stat.st_dev, stat.st_ino)) {
            // stat(2): blocks are of 512 bytes, whatever the filesystem's are.
            usage.bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
            usage.inodes += 1;
        }
    };
    count(&rustix::fs::fstat(&top)?);
    walk(&top, &mut |_, _, stat| {
        count(stat);
        Ok(())
    })?;
    Ok(usage)
}

/// The emptyDir volumes of a pod that are on disk, with what is in them and their limits: what eviction asks. A volume that
/// cannot be read is left out. Blocking.
pub fn disk_usage(pod: &Pod, pod_dir: &Path) -> Vec<(String, Usage, Option<Quantity>)> {
    let volumes = pod::spec(pod).volumes.iter().flatten();
    let on_disk =
        volumes.filter_map(|v| Some((v, v.empty_dir.as_ref().filter(|e| e.medium.as_deref().unwrap_or_default().is_empty())?)));
    let read = |(volume, source): (&Volume, &EmptyDirVolumeSource)| {
        let usage = usage(&path(pod_dir, &volume.name)).ok()?;
        let limit = source.size_limit.clone().filter(|limit| !Amount::of(limit).is_zero());
        Some((volume.name.clone(), usage, limit))
    };
    on_disk.filter_map(read).collect()
}

/// Makes the folder of a volume that berth fills itself, as an emptyDir is made.
pub(super) fn make(pod: &Pod, path: &Path, in_memory: bool, capacity: &Capacity) -> Result<(), String> {
    let source = EmptyDirVolumeSource::default();
    let medium = if in_memory { Medium::Memory(tmpfs_size(pod, &source, capacity)) } else { Medium::Disk };
    make_folder(pod, path, medium, capacity)
}

/// The group that may use the pod's volumes.
pub(super) fn fs_group(pod: &Pod) -> Option<u32> {
    let group = pod::spec(pod).security_context.as_ref().and_then(|s| s.fs_group);
    group.and_then(|group| u32::try_from(group).ok())
}

/// Makes a folder that every user may use. Idempotent.
fn make_folder(pod: &Pod, path: &Path, medium: Medium, capacity: &Capacity) -> Result<(), String> {
    let fail = |what: &str, e: io::Error| format!("{what} {}: {e}", path.display());
    create_private_dir(path.parent().unwrap_or(path)).map_err(|e| fail("create", e))?;
    match fs::create_dir(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(fail("create", e)),
        _ => {}
    }
    if !matches!(medium, Medium::Disk) && !mounts::is_mount_point(path).map_err(|e| fail("look at", e))? {
        match medium {
            Medium::Disk => {}
            Medium::Memory(size) => {
                mount_tmpfs(path, size, capacity.swap_bytes > 0).map_err(|e| fail("mount tmpfs on", e))?;
            }
            Medium::HugePages(size) => mount_huge_pages(path, size).map_err(|e| fail("mount hugetlbfs on", e))?,
        }
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

fn mount_huge_pages(path: &Path, size: i64) -> io::Result<()> {
    let context = fsopen("hugetlbfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", "nodev")?;
    fsconfig_set_string(&context, "pagesize", size.to_string())?;
    fsconfig_create(&context)?;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    move_mount(&mount, "", rustix::fs::CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(())
}

/// Unmounts a volume; one that is busy is detached, since its pod has ended.
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

    fn pod(requests: &str, volume: &str) -> Pod {
        let value = serde_json::json!({"spec": {
            "volumes": [{"name": "v", "emptyDir": serde_json::from_str::<serde_json::Value>(volume).unwrap()}],
            "containers": [{"name": "c", "resources": {"requests": serde_json::from_str::<serde_json::Value>(requests).unwrap()}}],
        }});
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn huge_pages_have_to_be_asked_for() {
        let page_size = |requests: &str, medium: &str| page_size(&pod(requests, "{}"), medium);
        assert_eq!(page_size(r#"{"hugepages-2Mi": "4Mi"}"#, "HugePages"), Ok(2 << 20));
        assert_eq!(page_size(r#"{"hugepages-2Mi": "4Mi", "hugepages-1Gi": "1Gi"}"#, "HugePages-1Gi"), Ok(1 << 30));
        for (requests, medium) in
            [("{}", "HugePages"), (r#"{"hugepages-2Mi": "4Mi", "hugepages-1Gi": "1Gi"}"#, "HugePages"), ("{}", "HugePages-2Mi")]
        {
            assert!(page_size(requests, medium).unwrap_err().starts_with(&format!("medium {medium}")), "{requests}");
        }
    }

    #[test]
    fn what_a_container_did_to_its_volumes_mode_stays() {
        let dir = tempfile::tempdir().unwrap();
        let pod = pod("{}", "{}");
        let volume = pod::spec(&pod).volumes.as_ref().unwrap()[0].clone();
        let set_up = || set_up(&pod, &volume, volume.empty_dir.as_ref().unwrap(), dir.path(), &Capacity::default()).unwrap();
        let mode = || fs::metadata(path(dir.path(), "v")).unwrap().permissions().mode() & 0o7777;
        set_up();
        assert_eq!(mode(), 0o777);
        fs::set_permissions(path(dir.path(), "v"), fs::Permissions::from_mode(0o700)).unwrap();
        set_up();
        assert_eq!(mode(), 0o700);
        // Cut short before it was ready: made whole.
        fs::remove_dir_all(dir.path().join("plugins")).unwrap();
        set_up();
        assert_eq!(mode(), 0o777);
    }

    #[test]
    fn usage_counts_blocks_and_each_file_once() {
        let dir = tempfile::tempdir().unwrap();
        let pod = pod("{}", r#"{"sizeLimit": "1Mi"}"#);
        let root = path(dir.path(), "v");
        fs::create_dir_all(root.join("a")).unwrap();
        fs::write(root.join("a/big"), vec![1; 1 << 20]).unwrap();
        fs::hard_link(root.join("a/big"), root.join("again")).unwrap();
        std::os::unix::fs::symlink("/", root.join("all")).unwrap();
        let found = disk_usage(&pod, dir.path());
        let [(name, usage, Some(limit))] = &found[..] else { panic!("{found:?}") };
        assert_eq!((name.as_str(), limit.0.as_str(), usage.inodes), ("v", "1Mi", 4));
        assert!((1 << 20..2 << 20).contains(&usage.bytes), "{usage:?}");
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
