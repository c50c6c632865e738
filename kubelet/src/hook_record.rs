//! Which containers are in their postStart hook, on disk: a kubelet that comes after one that was killed meanwhile runs the hook
//! again (it is delivered at least once) and does not take the container for come up. One file for each container, `hooks/<name>` in
//! the pod's folder, with the attempt; there from before the start until the hook is over. Not synced: no container outlives a boot.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::volume;

fn folder(pod_dir: &Path) -> PathBuf {
    pod_dir.join("hooks")
}

/// A container is about to be started that has such a hook.
pub(crate) fn begin(pod_dir: &Path, container: &str, attempt: u32) -> io::Result<()> {
    let folder = folder(pod_dir);
    volume::create_private_dir(&folder)?;
    fs::write(folder.join(container), attempt.to_string())
}

/// The hook is over, one way or the other.
pub(crate) fn end(pod_dir: &Path, container: &str) {
    let path = folder(pod_dir).join(container);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "a hook that is over stays on record");
        }
        _ => {}
    }
}

/// Attempts whose hooks were not over when the last kubelet ended, by container.
pub(crate) fn unfinished(pod_dir: &Path) -> BTreeMap<String, u32> {
    let entries = fs::read_dir(folder(pod_dir)).into_iter().flatten().flatten();
    let read = |entry: fs::DirEntry| {
        let attempt = fs::read_to_string(entry.path()).ok()?.parse().ok()?;
        Some((entry.file_name().into_string().ok()?, attempt))
    };
    entries.filter_map(read).collect()
}

/// Forgets all, for a pod that begins a new life.
pub(crate) fn forget(pod_dir: &Path) {
    for container in unfinished(pod_dir).into_keys() {
        end(pod_dir, &container);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_is_on_record_from_its_begin_to_its_end() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(unfinished(root.path()), BTreeMap::new());
        begin(root.path(), "c", 3).unwrap();
        begin(root.path(), "d", 0).unwrap();
        begin(root.path(), "c", 4).unwrap();
        assert_eq!(unfinished(root.path()), BTreeMap::from([("c".into(), 4), ("d".into(), 0)]));
        end(root.path(), "c");
        end(root.path(), "c");
        assert_eq!(unfinished(root.path()).len(), 1);
        forget(root.path());
        assert_eq!(unfinished(root.path()), BTreeMap::new());
    }
}
