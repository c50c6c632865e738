//! subPath mounts: the object inside a volume is found by one walk that cannot lead out of the volume, held by a descriptor,
//! and mounted at a place of the kubelet's own. What the container does to its volume meanwhile cannot redirect it.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, mkdirat, open, openat2};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::{create_private_dir, empty_dir, mounts};

/// The folder of a pod's subPath mounts.
pub fn folder(pod_dir: &Path) -> PathBuf {
    pod_dir.join("volume-subpaths")
}

/// A place for one mount of one container.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The pod's folder.
    pub pod_dir: &'a Path,
    /// The volume's name.
    pub volume: &'a str,
    /// The container's name.
    pub container: &'a str,
    /// The mount's place among the container's.
    pub index: usize,
}

/// How often a walk is tried again that a rename or a mount somewhere made uncertain.
const WALKS: usize = 64;

/// Opens what `path` names below `root`: links are followed as long as they stay inside.
fn walk(root: &OwnedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    for _ in 0..WALKS {
        match openat2(root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            walked => return walked,
        }
    }
    Err(Errno::AGAIN)
}

/// As [`walk`], making the folders that are missing, with the mode of the volume's root.
fn walk_or_make(root: &OwnedFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    match walk(root, path) {
        Err(Errno::NOENT) => {}
        walked => return walked,
    }
    let mode = Mode::from_raw_mode(rustix::fs::fstat(root)?.st_mode & 0o7777);
    let mut made = PathBuf::new();
    for part in path.components() {
        let Component::Normal(name) = part else { continue };
        let parent = if made.as_os_str().is_empty() { walk(root, Path::new("."))? } else { walk(root, &made)? };
        match mkdirat(&parent, name, mode) {
            Ok(()) => {
                made.push(name);
                // The umask has no say; the descriptor was opened for nothing but its place.
                let own = walk(root, &made)?;
                rustix::fs::chmodat(
                    CWD,
                    format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&own)),
                    mode,
                    AtFlags::empty(),
                )?;
            }
            Err(Errno::EXIST) => made.push(name),
            Err(error) => return Err(error),
        }
    }
    walk(root, path)
}

/// Mounts what `sub_path` names in the volume at `root`, and returns where. A mount of an earlier run is replaced.
pub fn set_up(root: &Path, sub_path: &str, place: Place<'_>) -> io::Result<PathBuf> {
    let volume = open(root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let object = walk_or_make(&volume, Path::new(sub_path)).map_err(|errno| match errno {
        // What the kernel says of a walk that would have left the volume.
        Errno::XDEV => io::Error::other("a link in it leads out of the volume"),
        errno => errno.into(),
    })?;
    let target = folder(place.pod_dir).join(place.volume).join(place.container).join(place.index.to_string());
    let parent = target.parent().unwrap_or(Path::new("/"));
    create_private_dir(parent)?;
    clear(&target)?;
    let is_dir = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&object)?.st_mode).is_dir();
    if is_dir {
        fs::create_dir(&target)?
    } else {
        fs::File::create_new(&target).map(drop)?
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = open_tree(&object, "", flags)?;
    move_mount(&tree, "", CWD, &target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(target)
}

/// Takes away what an earlier run left at the place.
fn clear(target: &Path) -> io::Result<()> {
    loop {
        let metadata = match fs::symlink_metadata(target) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            metadata => metadata?,
        };
        if mounts::is_mount_point(target)? {
            empty_dir::unmount(target)?;
        } else if metadata.is_dir() {
            // Never more than an empty folder of ours.
            return fs::remove_dir(target);
        } else {
            return fs::remove_file(target);
        }
    }
}

/// Unmounts and removes all of a pod's subPath mounts.
pub fn tear_down(pod_dir: &Path) -> Result<(), String> {
    let folder = folder(pod_dir);
    if fs::symlink_metadata(&folder).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
        return Ok(());
    }
    let table = mounts::below(&folder).map_err(|e| format!("read the mount table: {e}"))?;
    for path in table.into_iter().rev() {
        empty_dir::unmount(&path).map_err(|e| format!("unmount {}: {e}", path.display()))?;
    }
    if let Some(left) = mounts::below(&folder).map_err(|e| format!("read the mount table: {e}"))?.first() {
        return Err(format!("{} is still mounted", left.display()));
    }
    super::remove_folder(&folder)
}

/// Whether a text can be a subPath: relative, with no way up.
pub fn is_sub_path(text: &str) -> bool {
    !text.starts_with('/') && Path::new(text).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn root(path: &Path) -> OwnedFd {
        open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    #[test]
    fn links_inside_are_followed_and_links_out_are_not() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("real")).unwrap();
        std::os::unix::fs::symlink("real", dir.path().join("inside")).unwrap();
        for (name, to) in [("up", ".."), ("absolute", "/etc"), ("far", "real/../../..")] {
            std::os::unix::fs::symlink(to, dir.path().join(name)).unwrap();
        }
        let volume = root(dir.path());
        walk_or_make(&volume, Path::new("inside")).unwrap();
        for out in ["up", "absolute", "far", "up/berth-x/y", "absolute/passwd"] {
            assert!(walk_or_make(&volume, Path::new(out)).is_err(), "{out}");
        }
        assert!(!dir.path().parent().unwrap().join("berth-x").exists() && fs::read_dir(dir.path()).unwrap().count() == 5);
    }

    #[test]
    fn missing_folders_are_made_with_the_volumes_mode() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o2775)).unwrap();
        walk_or_make(&root(dir.path()), Path::new("a/b")).unwrap();
        for made in ["a", "a/b"] {
            assert_eq!(fs::metadata(dir.path().join(made)).unwrap().permissions().mode() & 0o7777, 0o2775, "{made}");
        }
    }

    #[test]
    fn a_sub_path_has_no_way_up() {
        for (text, ok) in
            [("a/b", true), ("a", true), ("./a", true), ("a..b", true), ("/a", false), ("../a", false), ("a/../b", false)]
        {
            assert_eq!(is_sub_path(text), ok, "{text}");
        }
    }
}
