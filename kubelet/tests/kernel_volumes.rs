//! Volumes and pod cgroups with the real kernel, in namespaces of their own.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use berth_cgroup::{Cgroup, CgroupPath, Layout};
use berth_kubelet::cgroup::{Driver, PodCgroups};
use berth_kubelet::hosts;
use berth_kubelet::node::Capacity;
use berth_kubelet::objects::{LocalObjects, Object};
use berth_kubelet::resources::{PodLimits, QosClass};
use berth_kubelet::volume::bindings::Bindings;
use berth_kubelet::volume::csi::drivers::Drivers;
use berth_kubelet::volume::sub_path::{self, Place};
use berth_kubelet::volume::{self, Located, Services, VolumeContext, empty_dir, mounts};
use berth_testkit::{TempState, in_namespaces};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;

fn pod() -> Pod {
    serde_json::from_value(serde_json::json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "uid": "u1"},
        "spec": {
            "securityContext": {"fsGroup": 4000},
            "volumes": [{"name": "mem", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}, {"name": "disk", "emptyDir": {}}],
            "containers": [{"name": "c", "image": "i", "volumeMounts": [{"name": "mem", "mountPath": "/m"}, {"name": "disk", "mountPath": "/d"}]}],
        },
    }))
    .unwrap()
}

fn set_up(pod: &Pod, dir: &Path, capacity: &Capacity) {
    set_up_with(pod, dir, capacity, &LocalObjects::default());
}

fn set_up_with(pod: &Pod, dir: &Path, capacity: &Capacity, objects: &LocalObjects) {
    try_set_up(pod, dir, capacity, objects, &Services::default()).unwrap();
}

fn try_set_up(pod: &Pod, dir: &Path, capacity: &Capacity, objects: &LocalObjects, services: &Services) -> Result<(), String> {
    volume::set_up(&VolumeContext { pod, dir, capacity, objects, services }, false, Timestamp::UNIX_EPOCH)
}

/// Where the pod's volumes are.
fn paths(pod: &Pod, dir: &Path) -> BTreeMap<String, String> {
    let (capacity, objects, services) = (Capacity::default(), LocalObjects::default(), Services::default());
    let located = volume::locate(&VolumeContext { pod, dir, capacity: &capacity, objects: &objects, services: &services });
    located.into_iter().map(|(name, Located { path, .. })| (name, path)).collect()
}

fn secret(password: &str) -> Object {
    let value = serde_json::json!({"metadata": {"name": "s"}, "stringData": {}, "data": {"password": password}});
    Object::Secret(serde_json::from_value(value).unwrap())
}

fn pod_of_files() -> Pod {
    serde_json::from_value(serde_json::json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "uid": "u1", "labels": {"app": "x"}},
        "spec": {
            "securityContext": {"fsGroup": 4000},
            "volumes": [
                {"name": "secret", "secret": {"secretName": "s", "defaultMode": 0o400}},
                {"name": "all", "projected": {"sources": [{"secret": {"name": "s"}}]}},
                {"name": "labels", "downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
            ],
            "containers": [{"name": "c", "image": "i", "volumeMounts": [
                {"name": "secret", "mountPath": "/s"}, {"name": "all", "mountPath": "/a"}, {"name": "labels", "mountPath": "/l"}]}],
        },
    }))
    .unwrap()
}

#[test]
fn secrets_live_in_memory_change_at_once_and_go_with_the_pod() {
    in_namespaces(|| {
        let state = TempState::new();
        let dir = volume::pod_dir(state.path(), "u1");
        let objects = LocalObjects::default();
        objects.replace(vec![secret("b2xk")]);
        let pod = pod_of_files();
        for _ in 0..2 {
            set_up_with(&pod, &dir, &Capacity::default(), &objects);
        }
        assert_eq!(mounts::below(state.path()).unwrap().len(), 3, "each on a tmpfs of its own, mounted once");
        let paths = paths(&pod, &dir);
        let read = |volume: &str, name: &str| fs::read_to_string(Path::new(&paths[volume]).join(name)).unwrap();
        assert_eq!(
            (read("secret", "password"), read("all", "password"), read("labels", "labels")),
            ("old".into(), "old".into(), "app=\"x\"".into())
        );
        use std::os::unix::fs::{MetadataExt, PermissionsExt};
        let file = fs::metadata(Path::new(&paths["secret"]).join("password")).unwrap();
        assert_eq!((file.gid(), file.permissions().mode() & 0o7777), (4000, 0o440), "the group of the pod may read");
        objects.replace(vec![secret("bmV3")]);
        set_up_with(&pod, &dir, &Capacity::default(), &objects);
        assert_eq!((read("secret", "password"), read("all", "password")), ("new".into(), "new".into()));
        // One that went leaves a running pod its files.
        objects.replace(Vec::new());
        set_up_with(&pod, &dir, &Capacity::default(), &objects);
        assert_eq!(read("secret", "password"), "new");
        volume::tear_down(&dir, &Drivers::default()).unwrap();
        assert!(mounts::below(state.path()).unwrap().is_empty() && !dir.join("volumes").exists());
    });
}

/// Documents as the manifests' folder has them.
fn objects(documents: serde_json::Value) -> LocalObjects {
    let objects = LocalObjects::default();
    let kinds = documents.as_array().unwrap().iter().map(|document| match document["kind"].as_str().unwrap() {
        "PersistentVolume" => Object::PersistentVolume(serde_json::from_value(document.clone()).unwrap()),
        _ => Object::PersistentVolumeClaim(serde_json::from_value(document.clone()).unwrap()),
    });
    objects.replace(kinds.collect());
    objects
}

fn local_volume(path: &Path) -> LocalObjects {
    objects(serde_json::json!([
        {"kind": "PersistentVolume", "apiVersion": "v1", "metadata": {"name": "disk"}, "spec": {
            "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "local": {"path": path}}},
        {"kind": "PersistentVolumeClaim", "apiVersion": "v1", "metadata": {"name": "data"}, "spec": {
            "accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}},
    ]))
}

fn pod_of_claim(read_only: bool) -> Pod {
    serde_json::from_value(serde_json::json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "uid": "u1"},
        "spec": {
            "securityContext": {"fsGroup": 4000, "fsGroupChangePolicy": "OnRootMismatch"},
            "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "data", "readOnly": read_only}}],
            "containers": [{"name": "c", "image": "i", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}],
        },
    }))
    .unwrap()
}

#[test]
fn a_local_volume_is_mounted_given_to_the_group_and_never_emptied() {
    in_namespaces(|| {
        use std::os::unix::fs::MetadataExt;
        let state = TempState::new();
        let (dir, disk) = (volume::pod_dir(state.path(), "u1"), state.dir("disk"));
        fs::create_dir(disk.join("sub")).unwrap();
        fs::write(disk.join("sub/file"), "precious").unwrap();
        let (capacity, objects) = (Capacity::default(), local_volume(&disk));
        let services = Services { node_name: "n1".into(), claims: Bindings::load(state.path()), drivers: Default::default() };
        let pod = pod_of_claim(false);
        for _ in 0..2 {
            try_set_up(&pod, &dir, &capacity, &objects, &services).unwrap();
        }
        let context = VolumeContext { pod: &pod, dir: &dir, capacity: &capacity, objects: &objects, services: &services };
        let located = volume::locate(&context)["v"].clone();
        assert_eq!(Path::new(&located.path), dir.join("volumes/kubernetes.io~local-volume/disk"));
        assert_eq!(mounts::below(state.path()).unwrap(), [Path::new(&located.path)], "mounted once");
        let file = Path::new(&located.path).join("sub/file");
        assert_eq!(fs::metadata(&file).unwrap().gid(), 4000);
        fs::write(&file, "changed").unwrap();
        // The kubelet that mounted it was killed: the next one takes it down from what is there.
        volume::tear_down(&dir, &Drivers::default()).unwrap();
        assert!(mounts::below(state.path()).unwrap().is_empty() && !dir.join("volumes").exists());
        assert_eq!(fs::read_to_string(disk.join("sub/file")).unwrap(), "changed");
        let read_only = pod_of_claim(true);
        try_set_up(&read_only, &dir, &capacity, &objects, &services).unwrap();
        let error = fs::write(dir.join("volumes/kubernetes.io~local-volume/disk/new"), "x").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        volume::tear_down(&dir, &Drivers::default()).unwrap();
        // Without its folder it is not mounted, and nothing is made in its place.
        fs::rename(&disk, state.path().join("elsewhere")).unwrap();
        let error = try_set_up(&pod, &dir, &capacity, &objects, &services).unwrap_err();
        assert_eq!(error, format!("MountVolume.SetUp failed for volume \"v\" : path {:?} does not exist", disk.display()));
    });
}

#[test]
fn nothing_that_is_mounted_in_a_volume_is_removed_with_it() {
    in_namespaces(|| {
        let state = TempState::new();
        let (dir, data) = (volume::pod_dir(state.path(), "u1"), state.dir("data"));
        fs::write(data.join("precious"), "x").unwrap();
        for folder in ["volumes/kubernetes.io~empty-dir/v/deep", "containers/c"] {
            fs::create_dir_all(dir.join(folder)).unwrap();
            rustix::mount::mount_bind(&data, dir.join(folder)).unwrap();
        }
        assert!(volume::tear_down(&dir, &Drivers::default()).unwrap_err().ends_with("is still mounted"));
        // Also where the mount table was not looked at: it is the same filesystem, only another mount.
        assert!(volume::remove_folder(&dir).is_err());
        assert!(data.join("precious").exists());
        for folder in ["volumes/kubernetes.io~empty-dir/v/deep", "containers/c"] {
            rustix::mount::unmount(dir.join(folder), rustix::mount::UnmountFlags::empty()).unwrap();
        }
        // What lies in the place of a mount point is data of somebody: it stays, and is named.
        let stray = dir.join("volumes/kubernetes.io~local-volume/disk");
        fs::create_dir_all(&stray).unwrap();
        fs::write(stray.join("file"), "x").unwrap();
        assert!(volume::tear_down(&dir, &Drivers::default()).unwrap_err().contains("kubernetes.io~local-volume/disk"));
        assert!(stray.join("file").exists());
        fs::remove_file(stray.join("file")).unwrap();
        volume::tear_down(&dir, &Drivers::default()).unwrap();
        volume::remove_folder(&dir).unwrap();
        assert!(!dir.exists());
    });
}

#[test]
fn a_volume_of_huge_pages_has_the_pages_that_the_pod_asks_for() {
    in_namespaces(|| {
        if !Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB").exists() {
            berth_testkit::skip!("the kernel has no huge pages of 2 MiB");
        }
        let state = TempState::new();
        let dir = volume::pod_dir(state.path(), "u1");
        let pod: Pod = serde_json::from_value(serde_json::json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "uid": "u1"},
            "spec": {
                "volumes": [{"name": "v", "emptyDir": {"medium": "HugePages"}}],
                "containers": [{"name": "c", "image": "i", "volumeMounts": [{"name": "v", "mountPath": "/v"}],
                    "resources": {"requests": {"hugepages-2Mi": "2Mi"}, "limits": {"hugepages-2Mi": "2Mi"}}}],
            },
        }))
        .unwrap();
        set_up(&pod, &dir, &Capacity::default());
        let mounted = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = mounted.lines().find(|line| line.contains("kubernetes.io~empty-dir/v ")).unwrap();
        assert!(line.contains(" - hugetlbfs ") && line.contains("pagesize=2M"), "{line}");
        volume::tear_down(&dir, &Drivers::default()).unwrap();
        assert!(mounts::below(state.path()).unwrap().is_empty());
    });
}

#[test]
fn what_is_mounted_in_a_volume_is_not_its_usage() {
    in_namespaces(|| {
        let state = TempState::new();
        let root = state.dir("v");
        fs::create_dir(root.join("other")).unwrap();
        fs::write(root.join("file"), vec![1; 100_000]).unwrap();
        rustix::mount::mount_bind("/proc", root.join("other")).unwrap();
        let usage = empty_dir::usage(&root).unwrap();
        assert!((100_000..1 << 20).contains(&usage.bytes) && usage.inodes == 2, "{usage:?}");
        rustix::mount::unmount(root.join("other"), rustix::mount::UnmountFlags::empty()).unwrap();
    });
}

#[test]
fn a_sub_path_is_what_was_found_and_nothing_put_in_its_place() {
    in_namespaces(|| {
        let state = TempState::new();
        let (dir, root) = (state.dir("pod"), state.dir("volume"));
        let place = |index| Place { pod_dir: &dir, volume: "v", container: "c", index };
        fs::create_dir(root.join("data")).unwrap();
        fs::write(root.join("data/file"), "inside").unwrap();
        let mounted = sub_path::set_up(&root, "data", place(0)).unwrap();
        let file = sub_path::set_up(&root, "data/file", place(1)).unwrap();
        // The container swaps the folder for a link out of the volume.
        fs::rename(root.join("data"), root.join("moved")).unwrap();
        std::os::unix::fs::symlink("/etc", root.join("data")).unwrap();
        assert_eq!(fs::read_to_string(mounted.join("file")).unwrap(), "inside");
        assert_eq!(fs::read_to_string(&file).unwrap(), "inside");
        assert!(sub_path::set_up(&root, "data", place(0)).is_err(), "a link out is not followed");
        let again = sub_path::set_up(&root, "made/deep", place(0)).unwrap();
        fs::write(again.join("x"), "").unwrap();
        assert!(root.join("made/deep/x").exists(), "another run's mount replaces the old one");
        volume::tear_down(&dir, &Drivers::default()).unwrap();
        assert!(mounts::below(state.path()).unwrap().is_empty() && !sub_path::folder(&dir).exists());
        assert!(root.join("moved/file").exists(), "what is in the volume stays");
    });
}

#[test]
fn a_memory_volume_is_a_tmpfs_of_its_size_and_goes_with_the_pod() {
    in_namespaces(|| {
        let state = TempState::new();
        let dir = volume::pod_dir(state.path(), "u1");
        let capacity = Capacity { memory_bytes: 1 << 30, ..Capacity::default() };
        for _ in 0..2 {
            set_up(&pod(), &dir, &capacity);
        }
        let paths = paths(&pod(), &dir);
        let memory = Path::new(&paths["mem"]);
        assert!(mounts::is_mount_point(memory).unwrap());
        assert_eq!(mounts::below(state.path()).unwrap().len(), 1, "mounted once");
        let full = fs::write(memory.join("big"), vec![0; 2 << 20]).unwrap_err();
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
        for path in paths.values() {
            let metadata = fs::metadata(path).unwrap();
            use std::os::unix::fs::{MetadataExt, PermissionsExt};
            assert_eq!((metadata.gid(), metadata.permissions().mode() & 0o7777), (4000, 0o2777), "{path}");
        }
        volume::tear_down(&dir, &Drivers::default()).unwrap();
        assert!(mounts::below(state.path()).unwrap().is_empty() && !dir.join("volumes").exists());
    });
}

#[test]
fn a_busy_memory_volume_is_detached_and_a_foreign_mount_is_named() {
    in_namespaces(|| {
        let state = TempState::new();
        let dir = volume::pod_dir(state.path(), "u1");
        set_up(&pod(), &dir, &Capacity::default());
        let paths = paths(&pod(), &dir);
        let open = fs::File::create(Path::new(&paths["mem"]).join("open")).unwrap();
        let foreign = Path::new(&paths["disk"]).join("foreign");
        fs::create_dir(&foreign).unwrap();
        rustix::mount::mount_bind("/proc/self", &foreign).unwrap();
        let error = volume::tear_down(&dir, &Drivers::default()).unwrap_err();
        assert_eq!(error, format!("{} is still mounted", foreign.display()));
        rustix::mount::unmount(&foreign, rustix::mount::UnmountFlags::empty()).unwrap();
        volume::tear_down(&dir, &Drivers::default()).unwrap();
        drop(open);
        assert!(!dir.join("volumes").exists());
    });
}

#[test]
fn pod_cgroups_carry_the_pods_limits_and_go_with_it() {
    in_namespaces(|| {
        let root = format!("/berth-kubelet-test-{}", std::process::id());
        let cgroups = PodCgroups::new(&root, Driver::Cgroupfs);
        cgroups.update_qos(500).unwrap();
        let limits = PodLimits { cpu_shares: 512, cpu_quota: Some(50_000), memory: Some(64 << 20), ..PodLimits::default() };
        for _ in 0..2 {
            cgroups.ensure_pod(QosClass::Burstable, "u1", &limits).unwrap();
        }
        let layout = Layout::detect().unwrap();
        let open = |path: &str| Cgroup::at(&layout, &CgroupPath::parse(path).unwrap()).unwrap();
        let read = |cgroup: &Cgroup, controller: &str, file: &str| {
            let dir = cgroup.v1_dir(controller).or(cgroup.v2_dir()).unwrap();
            fs::read_to_string(dir.join(file)).unwrap_or_default().trim().to_owned()
        };
        let pod = open(&cgroups.pod_path(QosClass::Burstable, "u1"));
        assert!(pod.exists());
        assert_eq!(cgroups.pods().unwrap(), ["u1"]);
        if !layout.is_v2() {
            assert_eq!(read(&pod, "memory", "memory.limit_in_bytes"), (64 << 20).to_string());
            assert_eq!(read(&pod, "cpu", "cpu.cfs_quota_us"), "50000");
            assert_eq!(read(&open(&format!("{root}/kubepods/burstable")), "cpu", "cpu.shares"), "512");
        }
        // Larger again, then without limits.
        let freed = PodLimits { cpu_shares: 2, ..PodLimits::default() };
        cgroups.ensure_pod(QosClass::Burstable, "u1", &freed).unwrap();
        if !layout.is_v2() {
            assert_eq!(read(&pod, "cpu", "cpu.cfs_quota_us"), "-1");
        }
        cgroups.remove_empty().unwrap();
        assert!(pod.exists(), "a parent with a pod in it stays");
        assert!(!cgroups.has_processes("u1").unwrap());
        let mut runs = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        pod.attach(rustix::process::Pid::from_child(&runs)).unwrap();
        assert!(cgroups.has_processes("u1").unwrap());
        for _ in 0..2 {
            cgroups.remove_pod("u1").unwrap();
        }
        assert!(!runs.wait().unwrap().success(), "what ran in it has ended with it");
        cgroups.remove_empty().unwrap();
        assert!(!open(&format!("{root}/kubepods")).exists());
        open(&root).delete().unwrap();
    });
}

#[test]
fn a_hosts_file_without_room_for_its_new_content_keeps_the_old() {
    in_namespaces(|| {
        let state = TempState::new();
        let folder = state.path().join("small");
        fs::create_dir(&folder).unwrap();
        rustix::mount::mount("t", &folder, "tmpfs", rustix::mount::MountFlags::empty(), Some(c"size=8k")).unwrap();
        let old = "127.0.0.1\tlocalhost\n";
        let path = hosts::write(&folder, old).unwrap();
        fs::write(folder.join("filling"), vec![0; 4096]).unwrap();
        assert!(hosts::write(&folder, &"192.0.2.1\tx\n".repeat(1000)).is_err());
        assert_eq!(fs::read_to_string(path).unwrap(), old);
    });
}
