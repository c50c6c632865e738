//! Device plugins and the pod resources API with a plugin of our own, over real sockets.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use berth_kubelet::devices::wire::v1beta1 as api;
use berth_kubelet::devices::wire::v1beta1::device_plugin_server::{DevicePlugin, DevicePluginServer};
use berth_kubelet::devices::wire::v1beta1::registration_client::RegistrationClient;
use berth_kubelet::pod_resources::wire::v1 as resources;
use berth_kubelet::pod_resources::wire::v1::pod_resources_lister_client::PodResourcesListerClient;
use berth_kubelet::volume::csi::wire::registration::registration_server::{
    Registration as Registry, RegistrationServer as RegistryServer,
};
use berth_kubelet::volume::csi::wire::registration::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};
use futures::{Stream, StreamExt};
use hyper_util::rt::TokioIo;
use support::{Node, eventually};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio_stream::wrappers::{UnixListenerStream, WatchStream};
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

type Answer<T> = Result<Response<T>, Status>;

const RESOURCE: &str = "example.com/thing";

/// A plugin whose devices are names.
#[derive(Clone)]
struct Plugin {
    folder: PathBuf,
    /// Names and health.
    devices: watch::Sender<Vec<(&'static str, bool)>>,
    calls: Arc<Mutex<Vec<String>>>,
    /// What it prefers; it is asked only where there is something.
    prefers: Option<&'static str>,
    /// What Allocate fails with.
    fails: Arc<Mutex<Option<Status>>>,
    stop: CancellationToken,
}

impl Plugin {
    fn new(root: &Path, devices: &[(&'static str, bool)]) -> Plugin {
        Plugin {
            folder: root.join("device-plugins"),
            devices: watch::Sender::new(devices.to_vec()),
            calls: Arc::default(),
            prefers: None,
            fails: Arc::default(),
            stop: CancellationToken::new(),
        }
    }

    /// Serves on a socket of its own and registers as soon as the kubelet lets it.
    async fn register(&self) {
        let endpoint = "thing.sock";
        let own = self.folder.join(endpoint);
        eventually("the kubelet takes registrations", || self.folder.join("kubelet.sock").exists()).await;
        let _ = std::fs::remove_file(&own);
        let incoming = UnixListenerStream::new(UnixListener::bind(&own).unwrap());
        let server = tonic::transport::Server::builder().add_service(DevicePluginServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming_shutdown(incoming, self.stop.clone().cancelled_owned()));
        self.ask("v1beta1", endpoint, RESOURCE).await.unwrap();
    }

    async fn ask(&self, version: &str, endpoint: &str, resource: &str) -> Result<(), Status> {
        let mut client = RegistrationClient::new(connect(&self.folder.join("kubelet.sock")).await);
        let (version, endpoint, resource_name) = (version.to_owned(), endpoint.to_owned(), resource.to_owned());
        let request = api::RegisterRequest { version, endpoint, resource_name, options: None };
        client.register(request).await.map(|_| ())
    }

    fn said(&self, text: String) {
        self.calls.lock().unwrap().push(text);
    }

    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

async fn connect(socket: &Path) -> Channel {
    let limit = std::time::Instant::now() + Duration::from_secs(30);
    loop {
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        match Endpoint::from_static("http://kubelet").connect_with_connector(connector).await {
            Ok(channel) => return channel,
            Err(error) => assert!(std::time::Instant::now() < limit, "{}: {error}", socket.display()),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tonic::async_trait]
impl DevicePlugin for Plugin {
    async fn get_device_plugin_options(&self, _: Request<api::Empty>) -> Answer<api::DevicePluginOptions> {
        let get_preferred_allocation_available = self.prefers.is_some();
        Ok(Response::new(api::DevicePluginOptions { pre_start_required: true, get_preferred_allocation_available }))
    }

    type ListAndWatchStream = Pin<Box<dyn Stream<Item = Result<api::ListAndWatchResponse, Status>> + Send>>;

    async fn list_and_watch(&self, _: Request<api::Empty>) -> Answer<Self::ListAndWatchStream> {
        let stop = self.stop.clone();
        let lists = WatchStream::new(self.devices.subscribe()).map(|devices| {
            let device = |(id, healthy): (&str, bool)| api::Device {
                id: id.to_owned(),
                health: if healthy { "Healthy" } else { "Unhealthy" }.to_owned(),
                topology: (id == "a").then(|| api::TopologyInfo { nodes: vec![api::NumaNode { id: 1 }] }),
            };
            Ok(api::ListAndWatchResponse { devices: devices.into_iter().map(device).collect() })
        });
        Ok(Response::new(Box::pin(lists.take_until(stop.cancelled_owned()))))
    }

    async fn get_preferred_allocation(
        &self,
        request: Request<api::PreferredAllocationRequest>,
    ) -> Answer<api::PreferredAllocationResponse> {
        let request = request.into_inner().container_requests.remove(0);
        let (from, with) = (request.available_device_i_ds.join(" "), request.must_include_device_i_ds.join(" "));
        self.said(format!("prefer {} of {from} with {with}", request.allocation_size).trim().to_owned());
        let device_i_ds = self.prefers.into_iter().map(str::to_owned).collect();
        let container_responses = vec![api::ContainerPreferredAllocationResponse { device_i_ds }];
        Ok(Response::new(api::PreferredAllocationResponse { container_responses }))
    }

    async fn allocate(&self, request: Request<api::AllocateRequest>) -> Answer<api::AllocateResponse> {
        let ids = request.into_inner().container_requests.remove(0).devices_ids;
        self.said(format!("allocate {}", ids.join(" ")));
        if let Some(status) = self.fails.lock().unwrap().take() {
            return Err(status);
        }
        let device = |id: &String| api::DeviceSpec {
            container_path: format!("/dev/thing-{id}"),
            host_path: "/dev/null".to_owned(),
            permissions: "rw".to_owned(),
        };
        let response = api::ContainerAllocateResponse {
            envs: HashMap::from([("THINGS".to_owned(), ids.join(","))]),
            mounts: vec![api::Mount { container_path: "/opt/thing".into(), host_path: "/usr".into(), read_only: true }],
            devices: ids.iter().map(device).collect(),
            annotations: HashMap::from([("example.com/things".to_owned(), ids.join(","))]),
            cdi_devices: vec![api::CdiDevice { name: format!("example.com/thing={}", ids[0]) }],
        };
        Ok(Response::new(api::AllocateResponse { container_responses: vec![response] }))
    }

    async fn pre_start_container(
        &self,
        request: Request<api::PreStartContainerRequest>,
    ) -> Answer<api::PreStartContainerResponse> {
        self.said(format!("start {}", request.into_inner().devices_ids.join(" ")));
        Ok(Response::new(api::PreStartContainerResponse {}))
    }
}

/// A pod whose only container wants so many things.
fn pod(name: &str, count: usize) -> String {
    support::pod(name, "").replace("'img:1'", &format!("'img:1', resources: {{limits: {{{RESOURCE}: {count}}}}}"))
}

async fn running(node: &Node, name: &str) -> serde_json::Value {
    node.wait_pod(name, "Running", |p| p["status"]["phase"] == "Running").await
}

async fn rejected(node: &Node, name: &str, message: &str) {
    let pod = node.wait_pod(name, "Failed", |p| p["status"]["phase"] == "Failed").await;
    assert_eq!(pod["status"]["reason"], "UnexpectedAdmissionError");
    let whole = format!("Pod was rejected: Allocate failed due to {message}, which is unexpected");
    assert_eq!(pod["status"]["message"].as_str(), Some(whole.as_str()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resource_that_no_plugin_has_ever_offered_is_ignored() {
    let mut node = Node::new();
    node.apply("web.yaml", &pod("web", 1));
    node.start().await;
    running(&node, "web-n1").await;
    assert!(node.cri.lock().configs.values().next().unwrap().devices.is_empty());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_gets_all_that_the_plugin_says() {
    let mut node = Node::new();
    let mut plugin = Plugin::new(&node.path("kubelet"), &[("a", true), ("b", true), ("broken", false)]);
    plugin.prefers = Some("b");
    node.start().await;
    plugin.register().await;
    node.apply("web.yaml", &pod("web", 1));
    let web = running(&node, "web-n1").await;
    assert_eq!(plugin.calls(), ["prefer 1 of a b with", "allocate b", "start b"]);
    let config = node.cri.lock().configs.values().next().unwrap().clone();
    let env = config.envs.iter().find(|e| e.key == "THINGS").unwrap();
    assert_eq!(env.value, b"b");
    let device = &config.devices[0];
    assert_eq!(
        (device.container_path.as_str(), device.host_path.as_str(), device.permissions.as_str()),
        ("/dev/thing-b", "/dev/null", "rw")
    );
    let mount = config.mounts.iter().find(|m| m.container_path == "/opt/thing").unwrap();
    assert!(mount.readonly && mount.host_path == "/usr");
    assert_eq!(config.annotations["example.com/things"], "b");
    assert_eq!(config.cdi_devices[0].name, "example.com/thing=b");
    let told = &web["status"]["containerStatuses"][0]["allocatedResourcesStatus"][0];
    assert_eq!((told["name"].as_str(), told["resources"][0]["resourceID"].as_str()), (Some(RESOURCE), Some("b")));
    // What breaks shows, and the container keeps it.
    plugin.devices.send_replace(vec![("a", true), ("b", false), ("broken", false)]);
    node.wait_pod("web-n1", "unhealthy", |p| {
        p["status"]["containerStatuses"][0]["allocatedResourcesStatus"][0]["resources"][0]["health"] == "Unhealthy"
    })
    .await;
    // A container that starts again keeps its device, and the plugin is told.
    node.cri.exit("c", 1);
    eventually("the container starts again", || plugin.calls.lock().unwrap().contains(&"start b".to_owned())).await;
    assert!(!plugin.calls().iter().any(|call| call.starts_with("allocate")));
    let (_, metrics) = node.get("/metrics").await;
    for name in ["registration_total", "alloc_duration_seconds_count"] {
        let told = format!("kubelet_device_plugin_{name}{{resource_name=\"{RESOURCE}\"}} 1");
        assert!(metrics.lines().any(|line| line == told), "{told} in {metrics}");
    }
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_plugin_cannot_give_is_refused_with_the_upstreams_words_and_freed_devices_are_given_again() {
    let mut node = Node::new();
    let plugin = Plugin::new(&node.path("kubelet"), &[("a", true), ("b", true)]);
    node.start().await;
    plugin.register().await;
    node.apply("one.yaml", &pod("one", 1));
    running(&node, "one-n1").await;
    node.apply("greedy.yaml", &pod("greedy", 2));
    rejected(&node, "greedy-n1", &format!("requested number of devices unavailable for {RESOURCE}. Requested: 2, Available: 1"))
        .await;
    *plugin.fails.lock().unwrap() = Some(Status::internal("on fire"));
    node.apply("unlucky.yaml", &pod("unlucky", 1));
    rejected(&node, "unlucky-n1", "rpc error: code = Internal desc = on fire").await;
    // What failed is not lost, and what ends gives back.
    node.delete("one.yaml");
    node.wait_gone("one-n1").await;
    node.delete("greedy.yaml");
    node.wait_gone("greedy-n1").await;
    node.apply("greedy.yaml", &pod("greedy", 2));
    running(&node, "greedy-n1").await;
    plugin.devices.send_replace(vec![("a", false), ("b", false)]);
    node.wait_pod("greedy-n1", "unhealthy", |p| {
        p["status"]["containerStatuses"][0]["allocatedResourcesStatus"][0]["resources"][0]["health"] == "Unhealthy"
    })
    .await;
    node.apply("late.yaml", &pod("late", 1));
    rejected(&node, "late-n1", &format!("no healthy devices present; cannot allocate unhealthy devices {RESOURCE}")).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_init_containers_devices_are_used_again_by_the_pods_containers() {
    let mut node = Node::new();
    let mut plugin = Plugin::new(&node.path("kubelet"), &[("a", true), ("b", true)]);
    plugin.prefers = Some("b");
    node.cri.behave("first", [support::fake_cri::Behaviour::Exit(0)]);
    node.start().await;
    plugin.register().await;
    let init = format!("  initContainers:\n  - {{name: first, image: 'img:1', resources: {{limits: {{{RESOURCE}: 1}}}}}}\n");
    node.apply("web.yaml", &format!("{}{init}", pod("web", 2)));
    running(&node, "web-n1").await;
    let calls = plugin.calls();
    assert_eq!(calls, ["prefer 1 of a b with", "allocate b", "prefer 2 of a b with b", "allocate a b", "start b", "start a b"],);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_kubelet_knows_who_has_what_before_the_plugin_is_back() {
    let mut node = Node::new();
    let root = node.path("kubelet");
    let plugin = Plugin::new(&root, &[("a", true), ("b", true)]);
    node.start().await;
    plugin.register().await;
    node.apply("web.yaml", &pod("web", 1));
    running(&node, "web-n1").await;
    let file = root.join("device-plugins/kubelet_internal_checkpoint");
    let kept: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let entry = &kept["Data"]["PodDeviceEntries"][0];
    assert_eq!((entry["ContainerName"].as_str(), entry["ResourceName"].as_str()), (Some("c"), Some(RESOURCE)));
    assert_eq!(entry["DeviceIDs"]["1"], serde_json::json!(["a"]));
    assert_eq!(kept["Data"]["RegisteredDevices"][RESOURCE], serde_json::json!(["a", "b"]));
    node.stop().await;
    plugin.stop.cancel();
    let starts = node.cri.calls("StartContainer").len();
    plugin.calls();
    node.start().await;
    node.wait_pod("web-n1", "Running", |p| p["status"]["phase"] == "Running").await;
    assert_eq!(node.cri.calls("StartContainer").len(), starts, "what runs goes on");
    assert!(!root.join("device-plugins/thing.sock").exists(), "old sockets go, so that plugins register again");
    // A container that has to start meanwhile gets what it had.
    node.cri.exit("c", 1);
    eventually("it starts again", || node.cri.calls("StartContainer").len() > starts).await;
    let newest = node.cri.lock().configs.values().find(|c| c.metadata.as_ref().unwrap().attempt == 1).unwrap().clone();
    assert_eq!(newest.devices[0].container_path, "/dev/thing-a");
    assert_eq!(plugin.calls(), Vec::<String>::new());
    // The other pod waits for the plugin, and does not get what the first one has.
    node.apply("next.yaml", &pod("next", 1));
    let waiting = node.wait_pod("next-n1", "waits", |p| p["status"]["phase"] == "Pending").await;
    assert_eq!(waiting["status"]["message"], format!("cannot allocate unregistered device {RESOURCE}"));
    assert!(waiting["status"]["startTime"].is_string(), "it has an age");
    let back = Plugin::new(&root, &[("a", true), ("b", true)]);
    back.register().await;
    running(&node, "next-n1").await;
    assert_eq!(back.calls(), ["allocate b", "start b"]);
    node.stop().await;
}

#[tonic::async_trait]
impl Registry for Plugin {
    async fn get_info(&self, _: Request<InfoRequest>) -> Answer<PluginInfo> {
        Ok(Response::new(PluginInfo {
            r#type: "DevicePlugin".to_owned(),
            name: RESOURCE.to_owned(),
            endpoint: String::new(),
            supported_versions: vec!["v1beta1".to_owned()],
        }))
    }

    async fn notify_registration_status(&self, status: Request<RegistrationStatus>) -> Answer<RegistrationStatusResponse> {
        let status = status.into_inner();
        self.said(format!("registered {} {}", status.plugin_registered, status.error).trim().to_owned());
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_in_the_registry_of_plugins_is_one_for_as_long_as_its_socket_is_there() {
    let mut node = Node::new();
    let root = node.path("kubelet");
    let plugin = Plugin::new(&root, &[("a", true), ("b", true)]);
    let socket = root.join("plugins_registry/thing.sock");
    std::fs::create_dir_all(socket.parent().unwrap()).unwrap();
    let incoming = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
    let server = tonic::transport::Server::builder()
        .add_service(DevicePluginServer::new(plugin.clone()))
        .add_service(RegistryServer::new(plugin.clone()));
    tokio::spawn(server.serve_with_incoming_shutdown(incoming, plugin.stop.clone().cancelled_owned()));
    node.start().await;
    eventually("it is told", || plugin.calls.lock().unwrap().contains(&"registered true".to_owned())).await;
    node.apply("web.yaml", &pod("web", 1));
    running(&node, "web-n1").await;
    std::fs::remove_file(&socket).unwrap();
    node.wait_pod("web-n1", "unhealthy", |p| {
        p["status"]["containerStatuses"][0]["allocatedResourcesStatus"][0]["resources"][0]["health"] == "Unhealthy"
    })
    .await;
    node.apply("late.yaml", &pod("late", 1));
    rejected(&node, "late-n1", &format!("no healthy devices present; cannot allocate unhealthy devices {RESOURCE}")).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn registrations_that_make_no_sense_are_refused() {
    let mut node = Node::new();
    let plugin = Plugin::new(&node.path("kubelet"), &[]);
    node.start().await;
    for (version, endpoint, resource, message) in [
        (
            "v1",
            "x.sock",
            RESOURCE,
            "requested API version \"v1\" is not supported by kubelet. Supported version is [\"v1beta1\"]",
        ),
        ("v1beta1", "x.sock", "cpu", "the ResourceName \"cpu\" is invalid"),
        ("v1beta1", "x.sock", "kubernetes.io/x", "the ResourceName \"kubernetes.io/x\" is invalid"),
        ("v1beta1", "../x.sock", RESOURCE, "the endpoint \"../x.sock\" is not the name of a socket beside this one"),
    ] {
        assert_eq!(plugin.ask(version, endpoint, resource).await.unwrap_err().message(), message);
    }
    let nobody = plugin.ask("v1beta1", "x.sock", RESOURCE).await.unwrap_err();
    assert!(nobody.message().starts_with("failed to dial device plugin: "), "{nobody}");
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pod_resources_api_tells_who_has_what() {
    let mut node = Node::new();
    let root = node.path("kubelet");
    let plugin = Plugin::new(&root, &[("a", true), ("b", true), ("broken", false)]);
    node.start().await;
    plugin.register().await;
    node.apply("web.yaml", &pod("web", 2));
    running(&node, "web-n1").await;
    node.apply("plain.yaml", &support::pod("plain", ""));
    running(&node, "plain-n1").await;
    let mut client = PodResourcesListerClient::new(connect(&root.join("pod-resources/kubelet.sock")).await);
    let all = client.list(resources::ListPodResourcesRequest {}).await.unwrap().into_inner().pod_resources;
    let names: Vec<_> = all.iter().map(|pod| (pod.name.as_str(), pod.containers[0].devices.len())).collect();
    assert_eq!(names, [("plain-n1", 0), ("web-n1", 2)]);
    let told: Vec<_> = all[1].containers[0]
        .devices
        .iter()
        .map(|d| (d.resource_name.as_str(), d.device_ids.join(" "), d.topology.as_ref().map(|t| t.nodes[0].id)))
        .collect();
    assert_eq!(told, [(RESOURCE, "b".to_owned(), None), (RESOURCE, "a".to_owned(), Some(1))]);
    let of = |name: &str| resources::GetPodResourcesRequest { pod_name: name.to_owned(), pod_namespace: "default".to_owned() };
    let one = client.get(of("web-n1")).await.unwrap().into_inner().pod_resources.unwrap();
    assert_eq!(one, all[1]);
    let missing = client.get(of("nobody")).await.unwrap_err();
    assert_eq!(missing.message(), "pod nobody in namespace default not found");
    let allocatable = client.get_allocatable_resources(resources::AllocatableResourcesRequest {}).await.unwrap().into_inner();
    let ids: Vec<_> = allocatable.devices.iter().map(|d| d.device_ids.join(" ")).collect();
    assert_eq!(ids, ["a", "b"]);
    node.stop().await;
}
