//! What nobody owns any more: pod folders, log folders, dead log links, pod cgroups. Deletes only below the configured
//! roots, never across a mount.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::cgroup::{Driver, PodCgroups};
use crate::config::Config;
use crate::pod::PodUid;
use crate::{logs, volume};

/// Removes what belongs to no pod of `known`.
pub fn collect(config: &Config, cgroups: Option<&PodCgroups>, known: &[PodUid]) {
    let is_known = |uid: &str| known.iter().any(|k| k.as_str() == uid);
    logs::remove_orphans(&config.pod_logs_dir, is_known, config.timing.garbage);
    if let Some(links) = &config.container_logs_dir {
        logs::remove_dead_links(links);
    }
    for entry in fs::read_dir(config.kubelet_root.join("pods")).into_iter().flatten().flatten() {
        let Ok(uid) = entry.file_name().into_string() else { continue };
        if is_known(&uid) || PodUid::new(&uid).is_none() || !is_old(&entry, config.timing.garbage) {
            continue;
        }
        if let Err(error) = volume::tear_down(&entry.path()) {
            tracing::warn!(uid, error, "orphaned pod's volumes stay");
            continue;
        }
        if let Err(error) = fs::remove_dir_all(entry.path()) {
            tracing::warn!(uid, %error, "orphaned pod's folder stays");
        }
    }
    let Some(cgroups) = cgroups else { return };
    // A pod has its folder before its cgroup: where there is one, the pod is new, or its folder could not go either.
    let has_folder = |uid: &str| fs::symlink_metadata(volume::pod_dir(&config.kubelet_root, uid)).is_ok();
    for uid in cgroups.pods().unwrap_or_default().into_iter().filter(|uid| !is_known(uid) && !has_folder(uid)) {
        tracing::info!(uid, "cgroup of an unknown pod is removed");
        if let Err(error) = cgroups.remove_pod(&uid) {
            tracing::warn!(uid, %error, "orphaned pod's cgroup stays");
        }
    }
}

/// Removes the folders, volumes and cgroups of all pods, once none of them runs any more: what `berth stop --all` leaves to
/// the kubelet's side. Returns what could not go.
pub fn remove_all(kubelet_root: &Path, cgroup_root: Option<&str>) -> Vec<String> {
    let mut stays = Vec::new();
    for entry in fs::read_dir(kubelet_root.join("pods")).into_iter().flatten().flatten() {
        let path = entry.path();
        let gone = volume::tear_down(&path).and_then(|()| fs::remove_dir_all(&path).map_err(|e| e.to_string()));
        stays.extend(gone.err().map(|error| format!("{}: {error}", path.display())));
    }
    let Some(cgroups) = cgroup_root.map(|root| PodCgroups::new(root, Driver::Cgroupfs)) else { return stays };
    let remove = || -> Result<(), berth_cgroup::Error> {
        for uid in cgroups.pods()? {
            cgroups.remove_pod(&uid)?;
        }
        cgroups.remove_empty()
    };
    stays.extend(remove().err().map(|error| format!("the pods' cgroups: {error}")));
    stays
}

/// Whether the folder has been left alone for `age`. A pod that came after `known` was made is not in it and not old.
fn is_old(entry: &fs::DirEntry, age: Duration) -> bool {
    let modified = entry.metadata().and_then(|metadata| metadata.modified());
    modified.is_ok_and(|modified| modified.elapsed().is_ok_and(|elapsed| elapsed >= age))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    #[test]
    fn stopping_everything_leaves_no_pod_folder() {
        let root = tempfile::tempdir().unwrap();
        let volumes = root.path().join("pods/u1/volumes/kubernetes.io~empty-dir/v");
        fs::create_dir_all(&volumes).unwrap();
        fs::write(volumes.join("data"), "x").unwrap();
        fs::create_dir_all(root.path().join("static-pods")).unwrap();
        assert_eq!(remove_all(root.path(), None), Vec::<String>::new());
        assert_eq!(fs::read_dir(root.path().join("pods")).unwrap().count(), 0);
        assert!(root.path().join("static-pods").exists(), "what was accepted is no pod's");
    }

    #[test]
    fn only_old_folders_are_left_overs() {
        let root = tempfile::tempdir().unwrap();
        for name in ["new", "old"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        let an_hour_ago = SystemTime::now() - Duration::from_secs(3600);
        fs::File::open(root.path().join("old")).unwrap().set_modified(an_hour_ago).unwrap();
        for entry in fs::read_dir(root.path()).unwrap().map(Result::unwrap) {
            assert_eq!(is_old(&entry, Duration::from_secs(60)), entry.file_name() == "old");
        }
    }
}
