//! What nobody owns any more: pod folders, log folders, dead log links, pod cgroups. Deletes only below the configured
//! roots, never across a mount, and nothing of another kubelet's: pod folders tell whose they are, what runs is let run.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::Instant;

use crate::cgroup::{Driver, PodCgroups};
use crate::config::Config;
use crate::execute::with_causes;
use crate::pod::PodUid;
use crate::volume::csi::drivers::Drivers;
use crate::{logs, volume};

/// Folders that belonged to no pod when they were looked at, and since when. By the monotonic clock: their own times say nothing when
/// the wall clock jumps.
#[derive(Debug, Default)]
pub struct Strays {
    since: BTreeMap<PathBuf, Instant>,
    /// Pods' folders without our mark that have been named.
    told: BTreeSet<PathBuf>,
    /// Pods' folders that were there before this process: whoever made them is gone.
    left: BTreeSet<PathBuf>,
}

impl Strays {
    /// Those that an earlier kubelet may have left. Blocking; to be called before there is any pod.
    pub fn at_start(kubelet_root: &Path) -> Strays {
        let entries = fs::read_dir(kubelet_root.join("pods")).into_iter().flatten().flatten();
        Strays { left: entries.map(|entry| entry.path()).collect(), ..Strays::default() }
    }

    /// Whether a folder has belonged to nobody for `age`. A pod that came after the known ones were listed belongs to somebody the
    /// next time.
    pub fn is_old(&mut self, path: &Path, now: Instant, age: Duration) -> bool {
        let since = *self.since.entry(path.to_owned()).or_insert(now);
        now.saturating_duration_since(since) >= age || self.left.contains(path)
    }

    /// Forgets those that are gone or belong to somebody.
    fn retain(&mut self, is_stray: impl Fn(&str) -> bool) {
        // Folders of logs end in the UID, as those of pods are called.
        let uid = |path: &Path| path.file_name().and_then(|name| name.to_str()?.rsplit('_').next().map(str::to_owned));
        let stays = |path: &Path| path.exists() && uid(path).is_some_and(|uid| is_stray(&uid));
        self.since.retain(|path, _| stays(path));
        self.left.retain(|path| stays(path));
        self.told.retain(|path| self.since.contains_key(path));
    }

    /// Which of these have not been named yet.
    fn untold(&mut self, paths: Vec<PathBuf>) -> Vec<PathBuf> {
        paths.into_iter().filter(|path| self.told.insert(path.clone())).collect()
    }
}

/// Removes what belongs to no pod of `known`, and has not for a while.
pub fn collect(config: &Config, cgroups: Option<&PodCgroups>, drivers: &Drivers, known: &[PodUid], strays: &mut Strays) {
    let (now, age) = (Instant::now(), config.timing.garbage);
    let is_known = |uid: &str| known.iter().any(|k| k.as_str() == uid);
    strays.retain(|uid| !is_known(uid));
    if let Some(links) = &config.container_logs_dir {
        logs::remove_dead_links(links);
    }
    let mut foreign = Vec::new();
    for entry in fs::read_dir(config.kubelet_root.join("pods")).into_iter().flatten().flatten() {
        let Ok(uid) = entry.file_name().into_string() else { continue };
        if is_known(&uid) || PodUid::new(&uid).is_none() || !strays.is_old(&entry.path(), now, age) {
            continue;
        }
        if !volume::is_ours(&entry.path()) {
            foreign.push(entry.path());
            continue;
        }
        // Slices are found by their pods' folders alone.
        if let Some(Err(error)) = cgroups.map(|cgroups| cgroups.remove_pod(&uid)) {
            tracing::warn!(uid, %error, "orphaned pod's cgroup stays");
            continue;
        }
        if let Err(error) = volume::tear_down(&entry.path(), drivers) {
            tracing::warn!(uid, error, "orphaned pod's volumes stay");
            continue;
        }
        if let Err(error) = volume::remove_folder(&entry.path()) {
            tracing::warn!(uid, error, "orphaned pod's folder stays");
        }
    }
    let foreign = strays.untold(foreign);
    if !foreign.is_empty() {
        // Whether anybody still wants what is in them, nobody here can know.
        tracing::warn!(folders = ?foreign, "folders of pods that are not ours stay: of another kubelet, which may be gone; remove them where it is");
    }
    volume::csi::collect(&config.kubelet_root, drivers);
    let has_folder = |uid: &str| fs::symlink_metadata(volume::pod_dir(&config.kubelet_root, uid)).is_ok();
    logs::remove_orphans(&config.pod_logs_dir, |uid| is_known(uid) || has_folder(uid), |path| strays.is_old(path, now, age));
    let Some(cgroups) = cgroups else { return };
    // A pod has its folder before its cgroup: where there is one, the pod is new, or its folder could not go either. What
    // runs in a pod that neither we nor our runtime know is another kubelet's: the cgroups of all have one parent.
    let runs = |uid: &str| cgroups.has_processes(uid).unwrap_or(true);
    let unknown = |uid: &String| !is_known(uid) && !has_folder(uid) && !runs(uid);
    for uid in cgroups.pods().unwrap_or_default().into_iter().filter(unknown) {
        tracing::info!(uid, "cgroup of an unknown pod is removed");
        if let Err(error) = cgroups.remove_pod(&uid) {
            tracing::warn!(uid, %error, "orphaned pod's cgroup stays");
        }
    }
}

/// Removes the folders, volumes and cgroups of all our pods, once none of them runs any more: what `berth stop --all` leaves to
/// the kubelet's side. Pods of other kubelets that use the same folders stay. Returns what could not go.
pub fn remove_all(kubelet_root: &Path, cgroup_root: Option<&str>) -> Vec<String> {
    let mut stays = Vec::new();
    let mut kinds = vec![Driver::Cgroupfs];
    if berth_cgroup::systemd::is_running() {
        kinds.push(Driver::Systemd);
    }
    let cgroups: Vec<PodCgroups> =
        cgroup_root.into_iter().flat_map(|root| kinds.iter().map(|driver| PodCgroups::new(root, *driver))).collect();
    let drivers = csi_drivers(kubelet_root);
    for entry in fs::read_dir(kubelet_root.join("pods")).into_iter().flatten().flatten() {
        let path = entry.path();
        if !volume::is_ours(&path) {
            continue;
        }
        // The folder goes last: the next try finds the cgroup by it.
        let uid = entry.file_name().to_string_lossy().into_owned();
        let gone = cgroups.iter().try_for_each(|cgroups| cgroups.remove_pod(&uid)).map_err(|e| with_causes(&e));
        let gone = gone.and_then(|()| volume::tear_down(&path, &drivers));
        let gone = gone.and_then(|()| volume::remove_folder(&path));
        stays.extend(gone.err().map(|error| format!("{}: {error}", path.display())));
    }
    if stays.is_empty()
        && let Err(error) = volume::mounts::end_sharing(kubelet_root)
    {
        stays.push(format!("{}: {error}", kubelet_root.display()));
    }
    for error in cgroups.iter().filter_map(|cgroups| cgroups.remove_empty().err()) {
        stays.push(format!("the pods' cgroups: {}", with_causes(&error)));
    }
    stays
}

/// The drivers that answer without an agent: those that are no pods of ours.
fn csi_drivers(kubelet_root: &Path) -> Drivers {
    match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(Drivers::find(kubelet_root)),
        Err(error) => {
            tracing::warn!(%error, "CSI drivers are not asked");
            Drivers::default()
        }
    }
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
        volume::mark_ours(&root.path().join("pods/u1")).unwrap();
        fs::create_dir_all(root.path().join("static-pods")).unwrap();
        let foreign = root.path().join("pods/u2/volumes/kubernetes.io~empty-dir/v");
        fs::create_dir_all(&foreign).unwrap();
        assert_eq!(remove_all(root.path(), None), Vec::<String>::new());
        assert_eq!(fs::read_dir(root.path().join("pods")).unwrap().count(), 1);
        assert!(foreign.exists(), "another kubelet's pod stays");
        assert!(root.path().join("static-pods").exists(), "what was accepted is no pod's");
    }

    #[test]
    fn what_an_earlier_kubelet_left_need_not_grow_old_unless_it_is_somebodys() {
        let root = tempfile::tempdir().unwrap();
        let folder = |uid: &str| root.path().join("pods").join(uid);
        for uid in ["left", "wanted"] {
            fs::create_dir_all(folder(uid)).unwrap();
        }
        let (mut strays, now, age) = (Strays::at_start(root.path()), Instant::now(), Duration::from_secs(60));
        fs::create_dir_all(folder("new")).unwrap();
        strays.retain(|uid| uid != "wanted");
        let old = |strays: &mut Strays, uid| strays.is_old(&folder(uid), now, age);
        assert_eq!(["left", "wanted", "new"].map(|uid| old(&mut strays, uid)), [true, false, false]);
    }

    #[test]
    fn only_what_has_long_been_nobodys_is_a_left_over_whatever_its_own_times_say() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("u1");
        fs::create_dir(&folder).unwrap();
        fs::File::open(&folder).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        let (mut strays, start, age) = (Strays::default(), Instant::now(), Duration::from_secs(60));
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(!strays.is_old(&folder, at(0), age));
        assert!(!strays.is_old(&folder, at(59), age));
        strays.retain(|uid| uid == "u1");
        assert!(strays.is_old(&folder, at(60), age));
        strays.retain(|uid| uid != "u1");
        assert!(!strays.is_old(&folder, at(61), age), "it has been somebody's meanwhile");
        assert_eq!(strays.untold(vec![folder.clone()]), std::slice::from_ref(&folder));
        assert!(strays.untold(vec![folder.clone()]).is_empty(), "each is named once");
        fs::remove_dir(&folder).unwrap();
        strays.retain(|uid| uid == "u1");
        assert_eq!(strays.untold(vec![folder.clone()]), [folder], "another one of that name is another folder");
    }
}
