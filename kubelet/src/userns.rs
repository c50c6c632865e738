//! User namespaces of pods: which user and group IDs of the host each has, on record in its folder, and what the runtime is told
//! of them. A range is free again when its pod's folder is gone and nothing on the machine runs with it.

use std::collections::BTreeSet;
use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
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

/// The kubelet's folder on a machine with one kubelet: its pods have the upstream's ranges.
const USUAL_ROOT: &str = "/var/lib/kubelet";
/// Ranges that pods can have where no subordinate IDs are named: below 2³¹, which not every program takes for an ID.
const RANGES: u32 = (1 << 31) / LENGTH - 1;

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
    /// Where processes tell which IDs they are mapped to.
    proc: PathBuf,
    first: u32,
    blocks: u32,
    /// One choice at a time: two pods do not find the same range free.
    choosing: Arc<Mutex<()>>,
}

impl HostIds {
    /// For pods below the kubelet's folder: the IDs that `subuid` and `subgid` give the user `kubelet` alike, else those from
    /// 65536 on, enough for `max_pods`. A kubelet with another folder than the usual one takes its own share of all IDs: one
    /// beside it does not know its records.
    pub fn new(kubelet_root: &Path, subuid: &Path, subgid: &Path, max_pods: usize) -> HostIds {
        let own = subordinate(subuid).filter(|range| Some(*range) == subordinate(subgid));
        let usable = |(first, count): (u32, u32)| {
            (first % LENGTH == 0 && first >= LENGTH && count >= LENGTH).then_some((first, count / LENGTH))
        };
        let blocks = u32::try_from(max_pods).unwrap_or(RANGES).clamp(1, RANGES);
        let (first, blocks) =
            own.and_then(usable).unwrap_or_else(|| (LENGTH * (1 + share(kubelet_root, RANGES / blocks) * blocks), blocks));
        HostIds { root: kubelet_root.to_owned(), proc: PathBuf::from("/proc"), first, blocks, choosing: Arc::default() }
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
        let used = ranges_in_use(&self.proc);
        let free =
            (0..self.blocks).map(|n| self.first + n * LENGTH).find(|first| !taken.contains(first) && !used.contains(first));
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

/// Which of `shares` equal parts of the ranges a kubelet with this folder takes: the first one for the usual folder.
fn share(kubelet_root: &Path, shares: u32) -> u32 {
    if kubelet_root == Path::new(USUAL_ROOT) || shares < 2 {
        return 0;
    }
    // The same in each process: this hasher has no secret of its own.
    let mut hasher = DefaultHasher::new();
    kubelet_root.hash(&mut hasher);
    u32::try_from(hasher.finish() % u64::from(shares - 1)).unwrap_or(0) + 1
}

/// The beginnings of the ranges that processes of this machine are mapped to, whoever started them: another kubelet's pods, and
/// what is left of a pod whose folder is gone. A process that ends meanwhile has none.
fn ranges_in_use(proc: &Path) -> BTreeSet<u32> {
    let processes = fs::read_dir(proc).into_iter().flatten().flatten();
    let maps = processes.filter_map(|process| fs::read_to_string(process.path().join("uid_map")).ok());
    maps.flat_map(|map| map.lines().flat_map(ranges_of).collect::<Vec<_>>()).collect()
}

/// The ranges that one line of a map touches: IDs inside, IDs of the host, how many. Who keeps the host's numbers takes none away.
fn ranges_of(line: &str) -> Vec<u32> {
    let mut numbers = line.split_whitespace().map(|number| number.parse::<u64>().unwrap_or(0));
    let (Some(inside), Some(first), Some(length)) = (numbers.next(), numbers.next(), numbers.next()) else { return Vec::new() };
    if inside == first || length == 0 {
        return Vec::new();
    }
    let length_of_all = u64::from(LENGTH);
    let touched = first / length_of_all..(first + length).div_ceil(length_of_all);
    touched.filter_map(|range| u32::try_from(range * length_of_all).ok()).collect()
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
        let ids = || HostIds { first: LENGTH, proc: none.clone(), ..HostIds::new(root.path(), &none, &none, 2) };
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
    fn kubelets_with_other_folders_take_other_ids_and_nobody_takes_what_processes_have() {
        let none = Path::new("/none");
        let of = |root: &str| HostIds::new(Path::new(root), none, none, 110);
        assert_eq!((of(USUAL_ROOT).first, of(USUAL_ROOT).blocks), (LENGTH, 110));
        let others = ["/a", "/b", "/srv/kubelet"].map(|root| of(root).first);
        assert_eq!(others, ["/a", "/b", "/srv/kubelet"].map(|root| of(root).first), "the same with each start");
        for (n, first) in others.iter().enumerate() {
            assert!(*first >= 111 * LENGTH && first % LENGTH == 0 && u64::from(*first) + 110 * 65536 <= 1 << 31, "{first}");
            assert!(!others[..n].contains(first), "{others:?}");
        }
        let root = tempfile::tempdir().unwrap();
        for (pid, map) in
            [("1", "0 0 4294967295"), ("2", "1 1 4294967294"), ("20", "0 65536 65536"), ("21", "0 200000 65536"), ("self", "x")]
        {
            fs::create_dir_all(root.path().join("proc").join(pid)).unwrap();
            fs::write(root.path().join("proc").join(pid).join("uid_map"), format!("{map}\n")).unwrap();
        }
        assert_eq!(ranges_in_use(&root.path().join("proc")), [65536, 196_608, 262_144].into());
        let ids = HostIds { first: LENGTH, proc: root.path().join("proc"), ..HostIds::new(root.path(), none, none, 9) };
        assert_eq!(ids.ensure(&pod(root.path(), "a")), Ok(Some(131_072)), "the first one that nobody has");
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
            let ids = HostIds::new(Path::new(USUAL_ROOT), &uid, &file("subgid", gid), 9);
            assert_eq!(ids.first, first, "{gid}");
        }
        let odd = file("odd", "kubelet:100000:65536\n");
        assert_eq!(HostIds::new(Path::new(USUAL_ROOT), &odd, &odd, 9).first, 65536, "not a multiple of the length");
    }
}
