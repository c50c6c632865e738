//! What pods keep on disk: volumes, logs. Folders are walked at most once a minute, whoever asks; a volume that is a file
//! system of its own is asked instead. Follows no links and leaves no file system.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, Volume};
use tokio::time::Instant;

use super::node::FileSystem;
use crate::{pod, volume};

/// Bytes on the disk and inodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
}

/// The last walks.
#[derive(Debug)]
pub(crate) struct Walks {
    keep: Duration,
    last: Mutex<HashMap<PathBuf, (Instant, Usage)>>,
}

impl Walks {
    /// Remembers for so long.
    pub(crate) fn new(keep: Duration) -> Walks {
        Walks { keep, last: Mutex::default() }
    }

    /// What is in a folder. Blocking.
    pub(crate) fn usage(&self, folder: &Path) -> Usage {
        let now = Instant::now();
        let known = |last: &HashMap<PathBuf, (Instant, Usage)>| {
            last.get(folder).filter(|(at, _)| now.saturating_duration_since(*at) < self.keep).map(|(_, usage)| *usage)
        };
        if let Some(usage) = known(&self.last.lock().unwrap_or_else(PoisonError::into_inner)) {
            return usage;
        }
        let usage = walk(folder);
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.retain(|_, (at, _)| now.saturating_duration_since(*at) < self.keep);
        last.insert(folder.to_owned(), (now, usage));
        usage
    }
}

/// Counts without recursion, and hard links once for each name: as `du` would, it is a measure and not a balance.
fn walk(folder: &Path) -> Usage {
    let mut usage = Usage::default();
    let Ok(top) = fs::symlink_metadata(folder) else { return usage };
    let mut todo = vec![folder.to_owned()];
    usage.inodes += 1;
    usage.bytes += top.blocks() * 512;
    while let Some(folder) = todo.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            if meta.dev() != top.dev() {
                continue;
            }
            usage.bytes += meta.blocks() * 512;
            usage.inodes += 1;
            if meta.is_dir() {
                todo.push(entry.path());
            }
        }
    }
    usage
}

/// A pod's volume.
pub(crate) struct VolumeUsage<'a> {
    pub(crate) volume: &'a Volume,
    pub(crate) fs: FileSystem,
    pub(crate) usage: Usage,
    /// Its bytes are the node's own.
    pub(crate) on_node: bool,
}

/// The volumes of a pod that have a folder of their own. Blocking.
pub(crate) fn of_pod<'a>(kubelet_root: &Path, pod: &'a Pod, walks: &Walks) -> Vec<VolumeUsage<'a>> {
    let volumes = volume::pod_dir(kubelet_root, pod::uid(pod)).join("volumes");
    let plugins: Vec<PathBuf> = fs::read_dir(&volumes).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    let root = fs::metadata(kubelet_root).map_or(0, |m| m.dev());
    let one = |volume: &'a Volume| {
        let folder = plugins.iter().map(|plugin| plugin.join(&volume.name)).find(|path| path.exists())?;
        let (fs, device) = (FileSystem::of(&folder)?, fs::metadata(&folder).ok()?.dev());
        let on_node = device == root;
        let usage = match on_node {
            true => walks.usage(&folder),
            false => Usage { bytes: fs.used, inodes: fs.inodes.saturating_sub(fs.inodes_free) },
        };
        Some(VolumeUsage { volume, fs, usage, on_node })
    };
    pod::spec(pod).volumes.iter().flatten().filter_map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_counted_once_a_minute_and_links_are_not_followed() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("sub")).unwrap();
        fs::write(root.path().join("sub/a"), vec![1; 100_000]).unwrap();
        std::os::unix::fs::symlink("/usr", root.path().join("link")).unwrap();
        let walks = Walks::new(Duration::from_secs(60));
        let first = walks.usage(root.path());
        assert!(first.bytes >= 100_000 && first.bytes < 200_000 && first.inodes == 4, "{first:?}");
        fs::write(root.path().join("b"), vec![1; 100_000]).unwrap();
        assert_eq!(walks.usage(root.path()), first, "remembered");
        assert!(Walks::new(Duration::ZERO).usage(root.path()).bytes >= 200_000);
    }
}
