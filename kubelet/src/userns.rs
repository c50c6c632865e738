//! User namespaces of pods: which user and group IDs of the host each has, on record in its folder, and what the runtime is told
//! of them. A range is free again when its pod's folder is gone.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use berth_cri_api::v1 as cri;
use k8s_openapi::api::core::v1::Pod;
use serde::{Deserialize, Serialize};

use crate::{atomic_file, pod, volume};

/// IDs of one pod, as the upstream's default; ranges begin at its multiples.
const LENGTH: u32 = 65536;
/// The user whose subordinate IDs are the pods', where the host names any.
const OWNER: &str = "kubelet";

/// The record `pods/<uid>/userns`, in the upstream's form.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Record {
    uid_mappings: Vec<Mapping>,
    gid_mappings: Vec<Mapping>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mapping {
    host_id: u32,
    container_id: u32,
    length: u32,
}

/// The host's IDs for pods, and the records of those that are taken.
#[derive(Clone, Debug)]
pub struct HostIds {
    root: PathBuf,
    first: u32,
    blocks: u32,
    /// One choice at a time: two pods do not find the same range free.
    choosing: Arc<Mutex<()>>,
}

impl HostIds {
    /// For pods below the kubelet's folder: the IDs that `subuid` and `subgid` give the user `kubelet` alike, else those from
    /// 65536 on, enough for `max_pods`.
    pub fn new(kubelet_root: &Path, subuid: &Path, subgid: &Path, max_pods: usize) -> HostIds {
        let own = subordinate(subuid).filter(|range| Some(*range) == subordinate(subgid));
        let usable = |(first, count): (u32, u32)| {
            (first % LENGTH == 0 && first >= LENGTH && count >= LENGTH).then_some((first, count / LENGTH))
        };
        let most = u32::MAX / LENGTH - 1;
        let (first, blocks) =
            own.and_then(usable).unwrap_or_else(|| (LENGTH, u32::try_from(max_pods).unwrap_or(most).clamp(1, most)));
        HostIds { root: kubelet_root.to_owned(), first, blocks, choosing: Arc::default() }
    }

    /// The first host ID of a pod with a user namespace of its own: the recorded one, or a free one that is recorded now.
    pub fn ensure(&self, pod: &Pod) -> Result<Option<u32>, String> {
        if pod::spec(pod).host_users != Some(false) {
            return Ok(None);
        }
        let _one = self.choosing.lock().unwrap_or_else(PoisonError::into_inner);
        let path = volume::pod_dir(&self.root, pod::uid(pod)).join("userns");
        match read(&path) {
            Ok(Some(first)) => return Ok(Some(first)),
            Ok(None) => {}
            Err(e) => return Err(format!("cannot read the pod's user namespace in {}: {e}", path.display())),
        }
        let taken = self.taken().map_err(|e| format!("cannot read which user namespaces are taken: {e}"))?;
        let free = (0..self.blocks).map(|n| self.first + n * LENGTH).find(|first| !taken.contains(first));
        let first = free.ok_or("could not find an empty slot to allocate a user namespace")?;
        let mapping = vec![Mapping { host_id: first, container_id: 0, length: LENGTH }];
        let record = Record { uid_mappings: mapping.clone(), gid_mappings: mapping };
        let content = serde_json::to_vec(&record).map_err(|e| e.to_string())?;
        atomic_file::replace(&path, &content, 0o600).map_err(|e| format!("cannot record the pod's user namespace: {e}"))?;
        Ok(Some(first))
    }

    /// What the records of all pods have. One that cannot be read may have any: none is given then.
    fn taken(&self) -> io::Result<BTreeSet<u32>> {
        let folders = match fs::read_dir(self.root.join("pods")) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            folders => folders?,
        };
        let first = |folder: io::Result<fs::DirEntry>| {
            let path = folder?.path().join("userns");
            read(&path).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))
        };
        folders.filter_map(|folder| first(folder).transpose()).collect()
    }
}

fn read(path: &Path) -> io::Result<Option<u32>> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(None),
        Err(e) => return Err(e),
    };
    let record: Record = serde_json::from_slice(&text)?;
    let usable = |m: &&Mapping| m.container_id == 0 && m.length == LENGTH && m.host_id >= LENGTH;
    let first = record.uid_mappings.first().filter(usable).filter(|m| record.gid_mappings.first() == Some(*m));
    first.map(|m| Some(m.host_id)).ok_or_else(|| io::Error::other("the mappings are not a pod's"))
}

/// First ID and count of the owner's first line in a file of subordinate IDs.
fn subordinate(path: &Path) -> Option<(u32, u32)> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(OWNER)?.strip_prefix(':'))?;
    let (first, count) = line.split_once(':')?;
    Some((first.trim().parse().ok()?, count.trim().parse().ok()?))
}

fn options(first: u32) -> cri::UserNamespace {
    cri::UserNamespace { mode: cri::NamespaceMode::Pod.into(), uids: mappings(first), gids: mappings(first) }
}

fn mappings(first: u32) -> Vec<cri::IdMapping> {
    vec![cri::IdMapping { host_id: first, container_id: 0, length: LENGTH }]
}

/// Gives a sandbox its user namespace.
pub fn apply_to_sandbox(config: &mut cri::PodSandboxConfig, first: u32) {
    let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
    if let Some(namespaces) = security.and_then(|security| security.namespace_options.as_mut()) {
        namespaces.userns_options = Some(options(first));
    }
}

/// Puts a container into its pod's user namespace; what it mounts is owned there by whom it is owned here.
pub fn apply_to_container(config: &mut cri::ContainerConfig, first: u32) {
    let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
    if let Some(namespaces) = security.and_then(|security| security.namespace_options.as_mut()) {
        namespaces.userns_options = Some(options(first));
    }
    for mount in &mut config.mounts {
        (mount.uid_mappings, mount.gid_mappings) = (mappings(first), mappings(first));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(root: &Path, uid: &str) -> Pod {
        fs::create_dir_all(root.join("pods").join(uid)).unwrap();
        let mut pod = Pod::default();
        pod.metadata.uid = Some(uid.to_owned());
        pod.spec.get_or_insert_default().host_users = Some(false);
        pod
    }

    #[test]
    fn each_pod_has_ids_of_its_own_and_keeps_them_over_restarts() {
        let root = tempfile::tempdir().unwrap();
        let none = root.path().join("none");
        let ids = || HostIds::new(root.path(), &none, &none, 2);
        let (a, b, c) = (pod(root.path(), "a"), pod(root.path(), "b"), pod(root.path(), "c"));
        assert_eq!(ids().ensure(&a), Ok(Some(65536)));
        assert_eq!(ids().ensure(&b), Ok(Some(131_072)));
        assert_eq!(ids().ensure(&a), Ok(Some(65536)), "from the record");
        assert!(ids().ensure(&c).unwrap_err().starts_with("could not find an empty slot"));
        let text = fs::read_to_string(root.path().join("pods/a/userns")).unwrap();
        let mapping = r#"[{"hostId":65536,"containerId":0,"length":65536}]"#;
        assert_eq!(text, format!("{{\"uidMappings\":{mapping},\"gidMappings\":{mapping}}}"));
        fs::remove_dir_all(root.path().join("pods/a")).unwrap();
        assert_eq!(ids().ensure(&c), Ok(Some(65536)), "it is free again");
        assert_eq!(ids().ensure(&Pod::default()), Ok(None));
        fs::write(root.path().join("pods/b/userns"), "{}").unwrap();
        assert!(ids().ensure(&b).is_err(), "another range would own the pod's files no more");
        let refused = ids().ensure(&pod(root.path(), "d")).unwrap_err();
        assert!(refused.contains("pods/b/userns"), "nobody knows which range is free: {refused}");
    }

    #[test]
    fn the_hosts_own_range_is_used_where_it_fits() {
        let root = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = root.path().join(name);
            fs::write(&path, text).unwrap();
            path
        };
        let uid = file("subuid", "root:1:2\nkubelet:655360:131072\n");
        for (gid, first) in [("kubelet:655360:131072\n", 655_360), ("kubelet:65536:131072\n", 65536), ("", 65536)] {
            let ids = HostIds::new(root.path(), &uid, &file("subgid", gid), 9);
            assert_eq!(ids.first, first, "{gid}");
        }
        let odd = file("odd", "kubelet:100000:65536\n");
        assert_eq!(HostIds::new(root.path(), &odd, &odd, 9).first, 65536, "not a multiple of the length");
    }
}
