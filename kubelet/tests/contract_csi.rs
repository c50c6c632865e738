//! CSI volumes with a driver of our own: registration, staging, publishing and their undoing, over real sockets with real mounts.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use berth_kubelet::volume::csi::drivers::{Drivers, registry};
use berth_kubelet::volume::csi::wire::registration::registration_server::{Registration, RegistrationServer};
use berth_kubelet::volume::csi::wire::registration::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};
use berth_kubelet::volume::csi::wire::v1 as csi;
use berth_kubelet::volume::csi::wire::v1::node_server::{Node as NodeService, NodeServer};
use berth_kubelet::volume::csi::{collect, orphans};
use berth_kubelet::volume::mounts;
use berth_testkit::in_namespaces;
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use support::{Node, eventually};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Request, Response, Status};

type Answer<T> = Result<Response<T>, Status>;

/// A driver whose volumes are folders of the machine, bound where the kubelet wants them.
#[derive(Clone)]
struct Driver {
    data: PathBuf,
    endpoint: PathBuf,
    calls: Arc<Mutex<Vec<String>>>,
    /// What was asked for last.
    published: Arc<Mutex<csi::NodePublishVolumeRequest>>,
    /// Publishes nothing, and does not say so.
    hangs: bool,
}

impl Driver {
    fn new(node: &Node) -> Driver {
        Driver {
            data: node.path("data"),
            endpoint: node.path("kubelet/plugins/test.csi/csi.sock"),
            calls: Arc::default(),
            published: Arc::default(),
            hangs: false,
        }
    }

    fn said(&self, text: String) {
        self.calls.lock().unwrap().push(text);
    }

    fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }

    /// Serves both services; the registration's socket comes last, as with real drivers.
    fn serve(&self, kubelet_root: &Path) {
        fs::create_dir_all(self.endpoint.parent().unwrap()).unwrap();
        fs::create_dir_all(registry(kubelet_root)).unwrap();
        let node = UnixListenerStream::new(UnixListener::bind(&self.endpoint).unwrap());
        let plugin = UnixListenerStream::new(UnixListener::bind(registry(kubelet_root).join("test.csi-reg.sock")).unwrap());
        let server = tonic::transport::Server::builder().add_service(NodeServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming(node));
        let server = tonic::transport::Server::builder().add_service(RegistrationServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming(plugin));
    }
}

#[tonic::async_trait]
impl Registration for Driver {
    async fn get_info(&self, _: Request<InfoRequest>) -> Answer<PluginInfo> {
        let endpoint = self.endpoint.to_string_lossy().into_owned();
        let (r#type, name) = ("CSIPlugin".to_owned(), "test.csi".to_owned());
        Ok(Response::new(PluginInfo { r#type, name, endpoint, supported_versions: vec!["1.9.0".to_owned()] }))
    }

    async fn notify_registration_status(&self, status: Request<RegistrationStatus>) -> Answer<RegistrationStatusResponse> {
        let status = status.into_inner();
        self.said(format!("registered {} {}", status.plugin_registered, status.error).trim().to_owned());
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}

#[tonic::async_trait]
impl NodeService for Driver {
    async fn node_stage_volume(&self, r: Request<csi::NodeStageVolumeRequest>) -> Answer<csi::NodeStageVolumeResponse> {
        let r = r.into_inner();
        let capability = r.volume_capability.unwrap();
        let mode = capability.access_mode.unwrap().mode().as_str_name();
        let Some(csi::volume_capability::AccessType::Mount(mount)) = capability.access_type else { panic!("not a mount") };
        let (fs, key) = (mount.fs_type, r.secrets.get("key").cloned().unwrap_or_default());
        self.said(format!("stage {} {mode} {fs} {} {key}", r.volume_id, mount.mount_flags.join(",")));
        let data = self.data.join(&r.volume_id);
        fs::create_dir_all(&data)?;
        mount_bind(&data, &r.staging_target_path).map_err(std::io::Error::from)?;
        Ok(Response::new(csi::NodeStageVolumeResponse {}))
    }

    async fn node_unstage_volume(&self, r: Request<csi::NodeUnstageVolumeRequest>) -> Answer<csi::NodeUnstageVolumeResponse> {
        let r = r.into_inner();
        self.said(format!("unstage {}", r.volume_id));
        // What is not mounted is a success: calls are repeated.
        let _ = unmount(&r.staging_target_path, UnmountFlags::empty());
        Ok(Response::new(csi::NodeUnstageVolumeResponse {}))
    }

    async fn node_publish_volume(&self, r: Request<csi::NodePublishVolumeRequest>) -> Answer<csi::NodePublishVolumeResponse> {
        let r = r.into_inner();
        self.said(format!("publish {} {}", &r.volume_id[..6.min(r.volume_id.len())], if r.readonly { "ro" } else { "rw" }));
        *self.published.lock().unwrap() = r.clone();
        if self.hangs {
            std::future::pending::<()>().await;
        }
        let data = self.data.join(&r.volume_id);
        fs::create_dir_all(&data)?;
        let source = if r.staging_target_path.is_empty() { data } else { r.staging_target_path.into() };
        // Making the target is the driver's, its parent the kubelet's. What is published is a success: calls are repeated.
        match fs::create_dir(&r.target_path) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                return Ok(Response::new(csi::NodePublishVolumeResponse {}));
            }
            made => made?,
        }
        mount_bind(&source, &r.target_path).map_err(std::io::Error::from)?;
        Ok(Response::new(csi::NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        r: Request<csi::NodeUnpublishVolumeRequest>,
    ) -> Answer<csi::NodeUnpublishVolumeResponse> {
        let r = r.into_inner();
        self.said(format!("unpublish {}", &r.volume_id[..6.min(r.volume_id.len())]));
        let _ = unmount(&r.target_path, UnmountFlags::empty());
        let _ = fs::remove_dir(&r.target_path);
        Ok(Response::new(csi::NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<csi::NodeGetCapabilitiesRequest>,
    ) -> Answer<csi::NodeGetCapabilitiesResponse> {
        use csi::node_service_capability::{Rpc, Type, rpc};
        let rpc = Rpc { r#type: rpc::Type::StageUnstageVolume.into() };
        let capabilities = vec![csi::NodeServiceCapability { r#type: Some(Type::Rpc(rpc)) }];
        Ok(Response::new(csi::NodeGetCapabilitiesResponse { capabilities }))
    }

    async fn node_get_info(&self, _: Request<csi::NodeGetInfoRequest>) -> Answer<csi::NodeGetInfoResponse> {
        Ok(Response::new(csi::NodeGetInfoResponse { node_id: "node-7".to_owned(), ..Default::default() }))
    }
}

const OBJECTS: &str = "
apiVersion: storage.k8s.io/v1
kind: CSIDriver
metadata: {name: test.csi}
spec: {attachRequired: false, podInfoOnMount: true, fsGroupPolicy: File, volumeLifecycleModes: [Persistent, Ephemeral]}
---
apiVersion: v1
kind: Secret
metadata: {name: key}
stringData: {key: hunter2}
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: pv}
spec:
  capacity: {storage: 1Gi}
  accessModes: [ReadWriteOnce]
  mountOptions: [noatime]
  csi: {driver: test.csi, volumeHandle: vol-1, fsType: ext4, nodeStageSecretRef: {name: key, namespace: default}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data}
spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}
";

const WEB: &str = "
apiVersion: v1
kind: Pod
metadata: {name: web}
spec:
  terminationGracePeriodSeconds: 1
  securityContext: {fsGroup: 4000}
  volumes: [{name: v, persistentVolumeClaim: {claimName: data}}]
  containers: [{name: c, image: 'img:1', volumeMounts: [{name: v, mountPath: /v}]}]
";

const INLINE: &str = "
apiVersion: v1
kind: Pod
metadata: {name: inline}
spec:
  terminationGracePeriodSeconds: 1
  volumes: [{name: own, csi: {driver: test.csi, readOnly: true, volumeAttributes: {size: small}}}]
  containers: [{name: c, image: 'img:1', volumeMounts: [{name: own, mountPath: /v}]}]
";

/// A pod's own volume with everything that can be said of one, a field each.
const SAID: [&str; 4] = ["readOnly: true", "fsType: xfs", "volumeAttributes: {size: small}", "nodePublishSecretRef: {name: key}"];

async fn start(node: &mut Node) {
    let mut config = node.config().await;
    config.timing.retry = Duration::from_millis(200);
    node.start_with(config);
}

fn is_running(pod: &serde_json::Value) -> bool {
    pod["status"]["phase"] == "Running"
}

async fn a_volume_through_its_life() {
    let mut node = Node::new();
    let root = node.path("kubelet");
    let driver = Driver::new(&node);
    node.apply("objects.yaml", OBJECTS);
    node.apply("web.yaml", WEB);
    start(&mut node).await;
    node.wait_pod("web-n1", "Pending", |p| p["status"]["phase"] == "Pending").await;
    assert!(node.cri.calls("RunPodSandbox").is_empty(), "without its driver the pod waits");
    driver.serve(&root);
    let pod = node.wait_pod("web-n1", "Running", is_running).await;
    assert_eq!(driver.calls(), ["registered true", "stage vol-1 SINGLE_NODE_WRITER ext4 noatime hunter2", "publish vol-1 rw"]);
    let uid = pod["metadata"]["uid"].as_str().unwrap();
    let folder = root.join("pods").join(uid).join("volumes/kubernetes.io~csi/pv");
    let data: serde_json::Value = serde_json::from_slice(&fs::read(folder.join("vol_data.json")).unwrap()).unwrap();
    assert_eq!(
        (
            data["specVolID"].as_str(),
            data["volumeHandle"].as_str(),
            data["nodeName"].as_str(),
            data["volumeLifecycleMode"].as_str()
        ),
        (Some("pv"), Some("vol-1"), Some("node-7"), Some("Persistent"))
    );
    assert_eq!(driver.published.lock().unwrap().volume_context["csi.storage.k8s.io/pod.name"], "web-n1");
    let mount = node.cri.lock().configs.values().next().unwrap().mounts[0].clone();
    assert_eq!(Path::new(&mount.host_path), folder.join("mount"));
    use std::os::unix::fs::MetadataExt;
    assert_eq!(fs::metadata(node.path("data/vol-1")).unwrap().gid(), 4000, "the pod's group has it");
    fs::write(folder.join("mount/file"), "precious").unwrap();
    assert_eq!(data.get("berthGroupPending"), None, "it has been given");
    // The next kubelet finds it mounted and asks nobody for it, whether its driver is there or not; one that was killed before the
    // volume was given to the group has left word.
    node.stop().await;
    let mut unfinished = data.clone();
    unfinished["berthGroupPending"] = "true".into();
    fs::write(folder.join("vol_data.json"), unfinished.to_string()).unwrap();
    std::os::unix::fs::chown(node.path("data/vol-1"), None, Some(0)).unwrap();
    start(&mut node).await;
    node.wait_pod("web-n1", "Running", is_running).await;
    eventually("the pod's group has it", || fs::metadata(node.path("data/vol-1")).unwrap().gid() == 4000).await;
    let on_record = || fs::read_to_string(folder.join("vol_data.json")).unwrap();
    eventually("it is on record", || !on_record().contains("berthGroupPending")).await;
    eventually("the driver is registered again", || driver.calls().iter().filter(|c| *c == "registered true").count() == 2).await;
    assert_eq!(driver.calls().iter().filter(|c| c.starts_with("publish")).count(), 1);
    node.apply("inline.yaml", INLINE);
    node.wait_pod("inline-n1", "Running", is_running).await;
    assert!(driver.calls().last().unwrap().starts_with("publish csi-") && driver.calls().last().unwrap().ends_with(" ro"));
    {
        let context = &driver.published.lock().unwrap().volume_context;
        assert_eq!((context["csi.storage.k8s.io/ephemeral"].as_str(), context["size"].as_str()), ("true", "small"));
    }
    driver.calls.lock().unwrap().clear();
    node.delete("inline.yaml");
    node.wait_gone("inline-n1").await;
    assert_eq!(driver.calls().len(), 1, "{:?}", driver.calls());
    assert!(driver.calls()[0].starts_with("unpublish csi-"));
    node.delete("web.yaml");
    node.wait_gone("web-n1").await;
    assert_eq!(driver.calls()[1..], ["unpublish vol-1", "unstage vol-1"]);
    assert!(mounts::below(&root).unwrap().is_empty() && fs::read_dir(root.join("pods")).unwrap().next().is_none());
    assert_eq!(fs::read_to_string(node.path("data/vol-1/file")).unwrap(), "precious");
    node.stop().await;
    undo_what_a_killed_kubelet_left(&root, &driver).await;
}

/// Staged, and killed before it was published.
async fn undo_what_a_killed_kubelet_left(root: &Path, driver: &Driver) {
    assert!(orphans(root).is_empty());
    let data = serde_json::json!({"specVolID": "pv2", "volumeHandle": "vol-2", "driverName": "test.csi", "nodeName": "node-7",
        "attachmentID": "csi-x", "volumeLifecycleMode": "Persistent"});
    use sha2::{Digest, Sha256};
    let hash: String = Sha256::digest(b"vol-2").iter().map(|byte| format!("{byte:02x}")).collect();
    let staged = root.join("plugins/kubernetes.io/csi/test.csi").join(hash);
    fs::create_dir_all(staged.join("globalmount")).unwrap();
    fs::write(staged.join("vol_data.json"), data.to_string()).unwrap();
    assert_eq!(orphans(root), std::slice::from_ref(&staged));
    driver.calls.lock().unwrap().clear();
    let drivers = Drivers::find(root).await;
    let folder = root.to_owned();
    tokio::task::spawn_blocking(move || collect(&folder, &drivers)).await.unwrap();
    assert_eq!(driver.calls(), ["unstage vol-2"]);
    assert!(!staged.exists() && orphans(root).is_empty());
}

/// What the driver is told by each of [`SAID`], when all but the field at `left_out` are.
async fn told_without(node: &mut Node, driver: &Driver, left_out: usize) -> [bool; 4] {
    let name = format!("inline-{left_out}");
    let fields: Vec<&str> = SAID.iter().enumerate().filter(|(i, _)| *i != left_out).map(|(_, field)| *field).collect();
    let volume = format!("{{driver: test.csi, {}}}", fields.join(", "));
    node.apply(
        "inline.yaml",
        &format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  terminationGracePeriodSeconds: 1\n  volumes: [{{name: own, csi: {volume}}}]\n  \
             containers: [{{name: c, image: 'img:1', volumeMounts: [{{name: own, mountPath: /v}}]}}]\n"
        ),
    );
    let pod = node.wait_pod(&format!("{name}-n1"), "Running", is_running).await;
    let asked = driver.published.lock().unwrap().clone();
    let Some(csi::volume_capability::AccessType::Mount(mount)) = asked.volume_capability.unwrap().access_type else { panic!() };
    let uid = pod["metadata"]["uid"].as_str().unwrap();
    assert_eq!(asked.volume_context["csi.storage.k8s.io/pod.uid"], uid);
    let configs = node.cri.lock().configs.clone();
    let config = configs.values().find(|config| config.labels["io.kubernetes.pod.uid"] == uid).unwrap();
    assert_eq!(config.mounts[0].readonly, asked.readonly, "the container's mount is as the volume");
    let told = [
        asked.readonly,
        mount.fs_type == "xfs",
        asked.volume_context.get("size").is_some_and(|size| size == "small"),
        asked.secrets.get("key").is_some_and(|key| key == "hunter2"),
    ];
    assert_eq!(mount.fs_type.is_empty(), !told[1]);
    node.delete("inline.yaml");
    node.wait_gone(&format!("{name}-n1")).await;
    told
}

async fn each_field_of_an_inline_volume() {
    let mut node = Node::new();
    let driver = Driver::new(&node);
    driver.serve(&node.path("kubelet"));
    node.apply("objects.yaml", OBJECTS);
    start(&mut node).await;
    for left_out in 0..=SAID.len() {
        let told = told_without(&mut node, &driver, left_out).await;
        assert_eq!(told, [0, 1, 2, 3].map(|field| field != left_out), "without {:?}", SAID.get(left_out));
    }
    node.stop().await;
}

/// A driver that renews what it gives: its pods' volumes are published again and again, others' are not.
async fn volumes_that_are_published_again() {
    let mut node = Node::new();
    let driver = Driver::new(&node);
    driver.serve(&node.path("kubelet"));
    node.apply("objects.yaml", &OBJECTS.replace("attachRequired: false,", "attachRequired: false, requiresRepublish: true,"));
    node.apply("inline.yaml", INLINE);
    let mut config = node.config().await;
    config.timing.republish = Duration::from_millis(100);
    node.start_with(config);
    node.wait_pod("inline-n1", "Running", is_running).await;
    let published = || driver.calls().iter().filter(|call| call.starts_with("publish")).count();
    eventually("it is published again and again", || published() >= 4).await;
    assert_eq!(node.cri.calls("StartContainer").len(), 1, "the container runs on");
    node.delete("inline.yaml");
    node.wait_gone("inline-n1").await;
    node.stop().await;
}

#[test]
fn a_volume_whose_driver_wants_that_is_published_again_and_again() {
    in_namespaces(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(volumes_that_are_published_again());
    });
}

#[test]
fn an_inline_volumes_driver_is_told_all_that_the_pod_says() {
    in_namespaces(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(each_field_of_an_inline_volume());
    });
}

#[test]
fn a_csi_volume_is_staged_and_published_once_and_undone_in_order() {
    in_namespaces(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(a_volume_through_its_life());
    });
}

/// On as few threads as an agent has.
#[test]
fn a_driver_that_hangs_keeps_no_other_pod_from_starting() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).max_blocking_threads(8).enable_all().build();
    let runtime = runtime.unwrap();
    runtime.block_on(async {
        let mut node = Node::new();
        let root = node.path("kubelet");
        let driver = Driver { hangs: true, ..Driver::new(&node) };
        node.apply("objects.yaml", OBJECTS);
        driver.serve(&root);
        start(&mut node).await;
        eventually("the driver is there", || driver.calls().iter().any(|call| call.starts_with("registered"))).await;
        for n in 0..12 {
            node.apply(&format!("inline{n}.yaml"), &INLINE.replace("name: inline", &format!("name: inline{n}")));
        }
        eventually("pods wait for the driver", || driver.calls().iter().filter(|call| call.starts_with("publish")).count() >= 4)
            .await;
        node.apply("web.yaml", &support::pod("web", ""));
        node.wait_pod("web-n1", "runs", is_running).await;
    });
    runtime.shutdown_background();
}
