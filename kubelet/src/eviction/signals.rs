//! Reads the signals of this machine and what pods use. Reads only; decides nothing.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_cri_api::v1 as cri;
use k8s_openapi::api::core::v1::Pod;

use super::judge::{Observation, Observations};
use super::rank::{ContainerUsage, PodUsage};
use super::threshold::Signal;
use crate::cgroup::PodCgroups;
use crate::config::Config;
use crate::cri::{Runtime, keys};
use crate::{logs, pod, volume};

/// Where the runtime keeps what is measured.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// A folder of the file system with the images.
    pub images: Option<PathBuf>,
    /// A folder of the file system with containers' own layers.
    pub containers: Option<PathBuf>,
}

impl Places {
    /// Asks the runtime; places that do not exist here are left out.
    pub async fn ask(runtime: &Runtime) -> crate::Result<Places> {
        let answer = runtime.image_fs_info().await?;
        let first = |list: Vec<cri::FilesystemUsage>| {
            let place = list.into_iter().find_map(|usage| usage.fs_id).map(|id| PathBuf::from(id.mountpoint));
            place.filter(|path| path.exists())
        };
        Ok(Places { images: first(answer.image_filesystems), containers: first(answer.container_filesystems) })
    }
}

/// Reads all signals; what cannot be read is left out. Blocking.
pub fn observe(config: &Config, cgroups: Option<&PodCgroups>, places: &Places) -> Observations {
    let mut seen = Observations::new();
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    if let Some(memory) = memory(&meminfo) {
        seen.insert(Signal::MemoryAvailable, memory);
        let allocatable = memory.capacity.saturating_sub(config.reservations.of("memory").units());
        if let Some(used) = cgroups.and_then(|cgroups| cgroups.working_set().ok().flatten()) {
            let available = allocatable.saturating_sub(i64::try_from(used).unwrap_or(i64::MAX));
            seen.insert(Signal::AllocatableMemoryAvailable, Observation { available, capacity: allocatable });
        }
    }
    let mut file_system = |path: &Path, bytes: Signal, inodes: Signal| {
        if let Some([of_bytes, of_inodes]) = file_system(path) {
            seen.insert(bytes, of_bytes);
            // btrfs and others count none.
            if of_inodes.capacity > 0 {
                seen.insert(inodes, of_inodes);
            }
        }
    };
    file_system(&config.kubelet_root, Signal::NodeFsAvailable, Signal::NodeFsInodesFree);
    if let Some(path) = &places.images {
        file_system(path, Signal::ImageFsAvailable, Signal::ImageFsInodesFree);
    }
    if let Some(path) = &places.containers {
        file_system(path, Signal::ContainerFsAvailable, Signal::ContainerFsInodesFree);
    }
    let read = |path: &str| fs::read_to_string(path).ok();
    if let Some(processes) =
        processes(read("/proc/loadavg"), read("/proc/sys/kernel/pid_max"), read("/proc/sys/kernel/threads-max"))
    {
        seen.insert(Signal::PidAvailable, processes);
    }
    seen
}

/// Memory that is free, or page cache that could go at once: the machine's capacity without its working set.
fn memory(meminfo: &str) -> Option<Observation> {
    let value = |key: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(key))?;
        line.split_whitespace().next()?.parse::<i64>().ok()?.checked_mul(1024)
    };
    let available = value("MemFree:")?.saturating_add(value("Inactive(file):")?);
    Some(Observation { available, capacity: value("MemTotal:")? })
}

/// Bytes and inodes of a file system, as unprivileged users could use them.
pub fn file_system(path: &Path) -> Option<[Observation; 2]> {
    let stat = rustix::fs::statvfs(path).ok()?;
    let bytes = |blocks: u64| i64::try_from(blocks.saturating_mul(stat.f_frsize)).unwrap_or(i64::MAX);
    let count = |inodes: u64| i64::try_from(inodes).unwrap_or(i64::MAX);
    Some([
        Observation { available: bytes(stat.f_bavail), capacity: bytes(stat.f_blocks) },
        Observation { available: count(stat.f_favail), capacity: count(stat.f_files) },
    ])
}

/// Process numbers from `0.00 0.01 0.05 1/123 4567` and the two limits.
fn processes(loadavg: Option<String>, pid_max: Option<String>, threads_max: Option<String>) -> Option<Observation> {
    let running: i64 = loadavg?.split_whitespace().nth(3)?.split_once('/')?.1.parse().ok()?;
    let limits = [pid_max, threads_max].into_iter().flatten().filter_map(|text| text.trim().parse::<i64>().ok());
    let capacity = limits.min()?;
    Some(Observation { available: capacity.saturating_sub(running), capacity })
}

fn value(value: Option<&cri::UInt64Value>) -> i64 {
    value.map_or(0, |value| i64::try_from(value.value).unwrap_or(i64::MAX))
}

/// What the pods use, by the runtime's statistics, their logs and their emptyDir volumes. Blocking.
pub fn usage_of_pods(config: &Config, pods: &[Arc<Pod>], stats: &[cri::PodSandboxStats]) -> Vec<PodUsage> {
    let mut by_uid: BTreeMap<&str, Vec<&cri::LinuxPodSandboxStats>> = BTreeMap::new();
    for sandbox in stats {
        let uid = sandbox.attributes.as_ref().and_then(|a| a.labels.get(keys::POD_UID).map(String::as_str));
        if let (Some(uid), Some(linux)) = (uid, &sandbox.linux) {
            by_uid.entry(uid).or_default().push(linux);
        }
    }
    pods.iter().map(|pod| usage_of(config, pod, by_uid.get(pod::uid(pod)).map_or(&[][..], Vec::as_slice))).collect()
}

fn usage_of(config: &Config, pod: &Arc<Pod>, sandboxes: &[&cri::LinuxPodSandboxStats]) -> PodUsage {
    let mut usage = PodUsage { pod: pod.clone(), ..PodUsage::default() };
    let log_dir = logs::pod_log_dir(&config.pod_logs_dir, pod);
    for linux in sandboxes {
        usage.memory += linux.memory.as_ref().map_or(0, |memory| value(memory.working_set_bytes.as_ref()));
        usage.processes += linux.process.as_ref().map_or(0, |process| value(process.process_count.as_ref()));
        for container in &linux.containers {
            let name =
                container.attributes.as_ref().and_then(|a| a.labels.get(keys::CONTAINER_NAME)).cloned().unwrap_or_default();
            let layer = container.writable_layer.as_ref();
            let own = ContainerUsage {
                memory: container.memory.as_ref().map_or(0, |memory| value(memory.working_set_bytes.as_ref())),
                disk: layer.map_or(0, |layer| value(layer.used_bytes.as_ref())),
                inodes: layer.map_or(0, |layer| value(layer.inodes_used.as_ref())),
                name,
            };
            usage.inodes += own.inodes;
            match usage.containers.iter_mut().find(|other| other.name == own.name) {
                Some(other) => {
                    other.memory += own.memory;
                    other.disk += own.disk;
                }
                None => usage.containers.push(own),
            }
        }
    }
    for container in &mut usage.containers {
        let logs = volume::empty_dir::usage(&log_dir.join(&container.name)).unwrap_or_default();
        container.disk += i64::try_from(logs.bytes).unwrap_or(0);
        usage.disk += container.disk;
    }
    for (_, of_volume, _) in volume::empty_dir::disk_usage(pod, &volume::pod_dir(&config.kubelet_root, pod::uid(pod))) {
        usage.disk += i64::try_from(of_volume.bytes).unwrap_or(0);
        usage.inodes += i64::try_from(of_volume.inodes).unwrap_or(0);
    }
    usage
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_files_are_read_as_the_upstream_counts() {
        let text = "MemTotal: 1000 kB\nMemFree: 100 kB\nMemAvailable: 900 kB\nInactive(file): 50 kB\n";
        assert_eq!(memory(text), Some(Observation { available: 150 << 10, capacity: 1000 << 10 }));
        let some = |text: &str| Some(text.to_owned());
        let found = processes(some("0.00 0.01 0.05 1/123 4567\n"), some("32768\n"), some("1000\n"));
        assert_eq!(found, Some(Observation { available: 877, capacity: 1000 }));
        assert_eq!((memory("nonsense"), processes(None, some("1"), None)), (None, None));
    }

    #[test]
    fn this_machine_has_all_signals_of_its_own() {
        let [bytes, inodes] = file_system(Path::new("/")).unwrap();
        assert!(bytes.capacity > bytes.available && inodes.capacity > 0);
    }

    #[tokio::test]
    async fn a_pods_usage_is_what_its_containers_logs_and_volumes_use() {
        let root = tempfile::tempdir().unwrap();
        let channel = tonic::transport::Endpoint::from_static("http://unused").connect_lazy();
        let config =
            Config { pod_logs_dir: root.path().join("logs"), kubelet_root: root.path().join("k"), ..Config::new("n", channel) };
        let text = "{apiVersion: v1, kind: Pod, metadata: {name: a, namespace: default, uid: u1}, spec: {containers: [{name: c, image: i}], volumes: [{name: v, emptyDir: {}}]}}";
        let pod = Arc::new(crate::source::parse::parse_manifest(text).unwrap().pods.remove(0).pod);
        for path in [
            logs::pod_log_dir(&config.pod_logs_dir, &pod).join("c/0.log"),
            root.path().join("k/pods/u1/volumes/kubernetes.io~empty-dir/v/f"),
        ] {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, vec![1; 1 << 20]).unwrap();
        }
        let number = |value: u64| Some(cri::UInt64Value { value });
        let container = cri::ContainerStats {
            attributes: Some(cri::ContainerAttributes {
                labels: [(keys::CONTAINER_NAME.to_owned(), "c".to_owned())].into(),
                ..Default::default()
            }),
            memory: Some(cri::MemoryUsage { working_set_bytes: number(5), ..Default::default() }),
            writable_layer: Some(cri::FilesystemUsage { used_bytes: number(3 << 20), ..Default::default() }),
            ..Default::default()
        };
        let stats = cri::PodSandboxStats {
            attributes: Some(cri::PodSandboxAttributes {
                labels: [(keys::POD_UID.to_owned(), "u1".to_owned())].into(),
                ..Default::default()
            }),
            linux: Some(cri::LinuxPodSandboxStats {
                memory: Some(cri::MemoryUsage { working_set_bytes: number(6), ..Default::default() }),
                process: Some(cri::ProcessUsage { process_count: number(2), ..Default::default() }),
                containers: vec![container],
                ..Default::default()
            }),
            ..Default::default()
        };
        let usage = &usage_of_pods(&config, &[pod], &[stats])[0];
        assert_eq!((usage.memory, usage.processes, usage.containers[0].memory), (6, 2, 5));
        assert!((5 << 20..6 << 20).contains(&usage.disk), "{}", usage.disk);
        assert!((4 << 20..5 << 20).contains(&usage.containers[0].disk), "logs are the container's");
    }
}
