//! An in-memory runtime behind real gRPC: keeps sandboxes and containers, logs every call, and can be told to fail, to
//! hold a call until released, or to let containers end.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};

use berth_cri_api::v1 as cri;
use berth_cri_api::v1::image_service_server::{ImageService, ImageServiceServer};
use berth_cri_api::v1::runtime_service_server::{RuntimeService, RuntimeServiceServer};
use futures::{Stream, StreamExt};
use hyper_util::rt::TokioIo;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::{BroadcastStream, ReceiverStream};
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status};

type Answer<T> = Result<Response<T>, Status>;
type AnswerStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What a container does when it is started.
#[derive(Clone, Copy, Debug)]
pub enum Behaviour {
    /// Runs until it is stopped.
    Run,
    /// Ends at once with this code.
    Exit(i32),
    /// StartContainer fails.
    FailToStart,
}

#[derive(Default)]
pub struct State {
    pub sandboxes: BTreeMap<String, cri::PodSandboxStatus>,
    pub containers: BTreeMap<String, (String, cri::ContainerStatus)>,
    pub configs: HashMap<String, cri::ContainerConfig>,
    pub images: BTreeMap<String, cri::Image>,
    pub pullable: Vec<String>,
    pub calls: Vec<(Instant, String)>,
    pub network_ready: bool,
    /// It answers, and says that it is not ready.
    pub ill: bool,
    pub without_events: bool,
    pub user_namespaces: bool,
    /// Sandboxes are not listed: the runtime does not answer.
    pub mute: bool,
    /// How often sandboxes were to be listed.
    pub listings: usize,
    /// The DNS servers of each sandbox so far.
    pub resolvers: Vec<String>,
    /// What exec, attach and port-forward answer.
    pub streaming: String,
    behaviours: HashMap<String, VecDeque<Behaviour>>,
    failures: HashMap<String, VecDeque<Status>>,
    held: HashMap<String, bool>,
    busy: HashMap<String, u32>,
    pub overlaps: Vec<String>,
    next: u64,
}

/// A handle on the runtime; clones share it.
#[derive(Clone)]
pub struct FakeCri {
    state: Arc<Mutex<State>>,
    changes: watch::Sender<u64>,
    events: broadcast::Sender<cri::ContainerEventResponse>,
}

impl FakeCri {
    pub fn new() -> FakeCri {
        let state = State { network_ready: true, ..State::default() };
        let fake =
            FakeCri { state: Arc::new(Mutex::new(state)), changes: watch::Sender::new(0), events: broadcast::Sender::new(1000) };
        fake.add_image("img:1");
        fake
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// A client's channel over memory; the server lives as long as somebody uses it.
    pub async fn connect(&self) -> Channel {
        let (sender, receiver) = mpsc::channel::<std::io::Result<tokio::io::DuplexStream>>(4);
        let fake = self.clone();
        tokio::spawn(async move {
            Server::builder()
                .add_service(RuntimeServiceServer::new(fake.clone()))
                .add_service(ImageServiceServer::new(fake))
                .serve_with_incoming(ReceiverStream::new(receiver))
                .await
                .unwrap();
        });
        let connector = tower::service_fn(move |_| {
            let sender = sender.clone();
            async move {
                let (ours, theirs) = tokio::io::duplex(1 << 20);
                let gone = |_| std::io::Error::other("the fake runtime is gone");
                sender.send(Ok(theirs)).await.map_err(gone)?;
                Ok::<_, std::io::Error>(TokioIo::new(ours))
            }
        });
        Endpoint::from_static("http://fake").connect_with_connector(connector).await.unwrap()
    }

    fn changed(&self) {
        self.changes.send_modify(|n| *n += 1);
    }

    /// Waits until `condition` holds for the state; panics with the call log after a bounded time.
    pub async fn wait(&self, what: &str, mut condition: impl FnMut(&State) -> bool) {
        let mut changes = self.changes.subscribe();
        let limit = std::time::Instant::now() + std::time::Duration::from_secs(30);
        loop {
            if condition(&self.lock()) {
                return;
            }
            let waited = tokio::time::timeout(std::time::Duration::from_secs(3600), changes.changed()).await;
            if waited.is_err() || std::time::Instant::now() > limit {
                panic!("waited in vain for: {what}\n{:#?}", self.call_names());
            }
        }
    }

    pub fn call_names(&self) -> Vec<String> {
        self.lock().calls.iter().map(|(_, call)| call.clone()).collect()
    }

    /// The calls whose text begins so.
    pub fn calls(&self, prefix: &str) -> Vec<(Instant, String)> {
        self.lock().calls.iter().filter(|(_, call)| call.starts_with(prefix)).cloned().collect()
    }

    pub fn add_image(&self, name: &str) {
        let image = cri::Image { id: format!("sha256:{name}"), repo_tags: vec![name.to_owned()], ..Default::default() };
        self.lock().images.insert(name.to_owned(), image);
    }

    /// What the next starts of a container do; after the last it runs.
    pub fn behave(&self, container: &str, behaviours: impl IntoIterator<Item = Behaviour>) {
        self.lock().behaviours.entry(container.to_owned()).or_default().extend(behaviours);
    }

    /// The next calls of a method (or of `<method> <last word of the call>`) fail so.
    pub fn fail(&self, method: &str, statuses: impl IntoIterator<Item = Status>) {
        self.lock().failures.entry(method.to_owned()).or_default().extend(statuses);
    }

    /// Calls of a method wait until [`FakeCri::release`].
    pub fn hold(&self, method: &str) {
        self.lock().held.insert(method.to_owned(), true);
    }

    pub fn release(&self, method: &str) {
        self.lock().held.remove(method);
        self.changed();
    }

    /// A running container ends by itself.
    pub fn exit(&self, name: &str, code: i32) {
        let id = {
            let mut state = self.lock();
            let running = cri::ContainerState::ContainerRunning as i32;
            let found = state
                .containers
                .iter()
                .find(|(_, (_, c))| c.state == running && c.metadata.as_ref().is_some_and(|m| m.name == name));
            let id = found.map(|(id, _)| id.clone()).expect("a running container of that name");
            state.end(&id, code);
            id
        };
        self.tell(&id);
    }

    /// What a reboot does: sandboxes are not ready, running containers exited 255.
    pub fn reboot(&self) {
        let mut state = self.lock();
        for sandbox in state.sandboxes.values_mut() {
            sandbox.state = cri::PodSandboxState::SandboxNotready as i32;
            sandbox.network = Some(cri::PodSandboxNetworkStatus::default());
        }
        let running = cri::ContainerState::ContainerRunning as i32;
        let ids: Vec<String> =
            state.containers.iter().filter(|(_, (_, c))| c.state == running).map(|(id, _)| id.clone()).collect();
        for id in ids {
            state.end(&id, 255);
            state.containers.get_mut(&id).unwrap().1.reason = "Unknown".into();
        }
    }

    fn tell(&self, container: &str) {
        let event = {
            let state = self.lock();
            let sandbox = state.containers.get(container).and_then(|(s, _)| state.sandboxes.get(s)).cloned();
            cri::ContainerEventResponse { container_id: container.to_owned(), pod_sandbox_status: sandbox, ..Default::default() }
        };
        let _ = self.events.send(event);
        self.changed();
    }

    /// Logs the call, waits while the method is held, fails as told. `pod` guards against two changes at once.
    async fn enter(&self, method: &str, detail: &str, pod: Option<&str>) -> Result<Busy, Status> {
        let busy = {
            let mut state = self.lock();
            state.calls.push((Instant::now(), format!("{method} {detail}").trim().to_owned()));
            if let Some(pod) = pod {
                let count = state.busy.entry(pod.to_owned()).or_default();
                *count += 1;
                if *count > 1 && method != "StopContainer" {
                    let text = format!("{method} {detail} while another call of {pod} runs");
                    state.overlaps.push(text);
                }
            }
            Busy { fake: self.clone(), pod: pod.map(str::to_owned) }
        };
        self.changed();
        let mut changes = self.changes.subscribe();
        while self.lock().held.contains_key(method) {
            changes.changed().await.map_err(|_| Status::cancelled("the test is over"))?;
        }
        let special = format!("{method} {}", detail.rsplit(' ').next().unwrap_or_default());
        let mut state = self.lock();
        let told = [method, special.as_str()].into_iter().find_map(|key| state.failures.get_mut(key)?.pop_front());
        drop(state);
        match told {
            Some(status) => Err(status),
            None => Ok(busy),
        }
    }
}

/// A change of a pod in progress.
struct Busy {
    fake: FakeCri,
    pod: Option<String>,
}

impl Drop for Busy {
    fn drop(&mut self) {
        if let Some(pod) = &self.pod
            && let Some(count) = self.fake.lock().busy.get_mut(pod)
        {
            *count -= 1;
        }
        self.fake.changed();
    }
}

/// The streams of a call: `-o-t` is an output with a terminal.
fn flags(stdin: bool, stdout: bool, stderr: bool, tty: bool) -> String {
    [(stdin, 'i'), (stdout, 'o'), (stderr, 'e'), (tty, 't')].map(|(on, c)| if on { c } else { '-' }).into_iter().collect()
}

impl State {
    fn id(&mut self) -> String {
        self.next += 1;
        format!("{:064x}", self.next)
    }

    fn end(&mut self, id: &str, code: i32) {
        let now = i64::try_from(self.next).unwrap() * 1_000_000_000;
        if let Some((_, container)) = self.containers.get_mut(id) {
            container.state = cri::ContainerState::ContainerExited as i32;
            container.exit_code = code;
            container.finished_at = now;
            container.reason = if code == 0 { "Completed" } else { "Error" }.into();
        }
    }

    fn running_of(&self, sandbox: &str) -> Vec<&cri::ContainerStatus> {
        let running = cri::ContainerState::ContainerRunning as i32;
        self.containers.values().filter(|(s, c)| s == sandbox && c.state == running).map(|(_, c)| c).collect()
    }

    /// Every container uses a second and a half of a processor and 1000 bytes, every pod twice that.
    fn stats(&self) -> Vec<cri::PodSandboxStats> {
        let value = |value| Some(cri::UInt64Value { value });
        let cpu = |ns| {
            Some(cri::CpuUsage {
                timestamp: 5_000_000_000,
                usage_core_nano_seconds: value(ns),
                usage_nano_cores: value(7),
                psi: None,
            })
        };
        let memory = |bytes| {
            Some(cri::MemoryUsage {
                timestamp: 5_000_000_000,
                working_set_bytes: value(bytes),
                rss_bytes: value(1),
                ..Default::default()
            })
        };
        let swap =
            || Some(cri::SwapUsage { timestamp: 5_000_000_000, swap_usage_bytes: value(3), swap_available_bytes: value(4) });
        let container = |c: &&cri::ContainerStatus| cri::ContainerStats {
            attributes: Some(cri::ContainerAttributes {
                id: c.id.clone(),
                metadata: c.metadata.clone(),
                labels: c.labels.clone(),
                annotations: c.annotations.clone(),
            }),
            cpu: cpu(1_500_000_000),
            memory: memory(1000),
            swap: swap(),
            writable_layer: Some(cri::FilesystemUsage { used_bytes: value(11), inodes_used: value(2), ..Default::default() }),
            ..Default::default()
        };
        let interface =
            cri::NetworkInterfaceUsage { name: "eth0".into(), rx_bytes: value(5), tx_bytes: value(6), ..Default::default() };
        let pod = |s: &cri::PodSandboxStatus| cri::PodSandboxStats {
            attributes: Some(cri::PodSandboxAttributes {
                id: s.id.clone(),
                metadata: s.metadata.clone(),
                labels: s.labels.clone(),
                annotations: s.annotations.clone(),
            }),
            linux: Some(cri::LinuxPodSandboxStats {
                cpu: cpu(3_000_000_000),
                memory: memory(2000),
                network: Some(cri::NetworkUsage {
                    timestamp: 5_000_000_000,
                    default_interface: Some(interface.clone()),
                    interfaces: vec![interface.clone()],
                }),
                process: Some(cri::ProcessUsage { timestamp: 5_000_000_000, process_count: value(4) }),
                containers: self.running_of(&s.id).iter().map(container).collect(),
                io: None,
            }),
            windows: None,
        };
        self.sandboxes.values().map(pod).collect()
    }

    fn metrics(&self) -> Vec<cri::PodSandboxMetrics> {
        let metric = |name: &str, labels: Vec<String>, value| cri::Metric {
            name: name.into(),
            timestamp: 5_000_000_000,
            metric_type: cri::MetricType::Counter.into(),
            label_values: labels,
            value: Some(cri::UInt64Value { value }),
        };
        let pod = |s: &cri::PodSandboxStatus| {
            let meta = s.metadata.clone().unwrap_or_default();
            let labels = |container: &str, image: &str| {
                vec![
                    meta.name.clone(),
                    meta.namespace.clone(),
                    container.to_owned(),
                    format!("/kubepods/{container}"),
                    image.to_owned(),
                ]
            };
            let mut network = labels("POD", "");
            network.push("eth0".into());
            cri::PodSandboxMetrics {
                pod_sandbox_id: s.id.clone(),
                metrics: vec![metric("container_network_receive_bytes_total", network, 5)],
                container_metrics: self
                    .running_of(&s.id)
                    .iter()
                    .map(|c| {
                        let labels = || labels(&c.metadata.as_ref().unwrap().name, "img:\"1\"");
                        let metrics = vec![
                            metric("container_processes", labels(), 2),
                            metric("container_cpu_usage_seconds_total", labels(), 1),
                        ];
                        cri::ContainerMetrics { container_id: c.id.clone(), metrics }
                    })
                    .collect(),
            }
        };
        self.sandboxes.values().map(pod).collect()
    }

    fn pod_of(&self, container: &str) -> Option<String> {
        let (sandbox, _) = self.containers.get(container)?;
        self.sandboxes.get(sandbox)?.metadata.as_ref().map(|m| m.uid.clone())
    }

    fn label(&self, container: &str) -> String {
        let found = self.containers.get(container).and_then(|(_, c)| c.metadata.clone());
        found.map_or_else(|| container.to_owned(), |m| format!("{}/{}", m.name, m.attempt))
    }

    /// Running containers by name, sorted.
    pub fn running(&self) -> Vec<String> {
        let running = cri::ContainerState::ContainerRunning as i32;
        let mut names: Vec<String> =
            self.containers.values().filter(|(_, c)| c.state == running).map(|(_, c)| c.metadata.clone().unwrap().name).collect();
        names.sort();
        names
    }

    pub fn ready_sandboxes(&self) -> Vec<String> {
        let ready = cri::PodSandboxState::SandboxReady as i32;
        self.sandboxes.values().filter(|s| s.state == ready).map(|s| s.metadata.clone().unwrap().name).collect()
    }
}

fn selected(labels: &HashMap<String, String>, selector: &HashMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

macro_rules! not_faked {
    ($($name:ident($request:ident) -> $response:ty;)*) => {
        $(fn $name<'a, 'f>(&'a self, _: Request<cri::$request>) -> Pin<Box<dyn Future<Output = Answer<$response>> + Send + 'f>>
        where
            'a: 'f,
            Self: 'f,
        {
            Box::pin(async { Err(Status::unimplemented(stringify!($name))) })
        })*
    };
}

#[tonic::async_trait]
impl RuntimeService for FakeCri {
    async fn version(&self, _: Request<cri::VersionRequest>) -> Answer<cri::VersionResponse> {
        self.enter("Version", "", None).await?;
        Ok(Response::new(cri::VersionResponse {
            version: "0.1.0".into(),
            runtime_name: "fake".into(),
            runtime_version: "1.0".into(),
            runtime_api_version: "v1".into(),
        }))
    }

    async fn status(&self, _: Request<cri::StatusRequest>) -> Answer<cri::StatusResponse> {
        let condition = |kind: &str, status| cri::RuntimeCondition {
            r#type: kind.into(),
            status,
            reason: "Why".into(),
            message: "because".into(),
        };
        let (ready, network, user_namespaces) = {
            let state = self.lock();
            (!state.ill, state.network_ready, state.user_namespaces)
        };
        let conditions = vec![condition("RuntimeReady", ready), condition("NetworkReady", network)];
        let features = cri::RuntimeHandlerFeatures { recursive_read_only_mounts: false, user_namespaces };
        let runtime_handlers = vec![cri::RuntimeHandler { name: String::new(), features: Some(features) }];
        let status = Some(cri::RuntimeStatus { conditions });
        Ok(Response::new(cri::StatusResponse { status, runtime_handlers, ..Default::default() }))
    }

    async fn runtime_config(&self, _: Request<cri::RuntimeConfigRequest>) -> Answer<cri::RuntimeConfigResponse> {
        let linux = cri::LinuxRuntimeConfiguration { cgroup_driver: cri::CgroupDriver::Cgroupfs.into() };
        Ok(Response::new(cri::RuntimeConfigResponse { linux: Some(linux) }))
    }

    async fn run_pod_sandbox(&self, request: Request<cri::RunPodSandboxRequest>) -> Answer<cri::RunPodSandboxResponse> {
        let request = request.into_inner();
        let handler = request.runtime_handler;
        let config = request.config.unwrap();
        let metadata = config.metadata.clone().unwrap();
        let detail = format!("{}/{} {handler}", metadata.name, metadata.attempt);
        let _busy = self.enter("RunPodSandbox", &detail, Some(&metadata.uid)).await?;
        let id = {
            let mut state = self.lock();
            if state.sandboxes.values().any(|s| s.metadata.as_ref() == Some(&metadata)) {
                return Err(Status::already_exists("sandbox name is taken"));
            }
            let id = state.id();
            state.resolvers.extend(config.dns_config.iter().flat_map(|dns| dns.servers.clone()));
            let options = config.linux.and_then(|l| l.security_context).and_then(|s| s.namespace_options);
            let host = options.as_ref().is_some_and(|o| o.network() == cri::NamespaceMode::Node);
            let number = state.next;
            let ip = if host { String::new() } else { format!("10.0.0.{number}") };
            let status = cri::PodSandboxStatus {
                id: id.clone(),
                metadata: Some(metadata),
                state: cri::PodSandboxState::SandboxReady.into(),
                created_at: i64::try_from(number).unwrap() * 1_000_000_000,
                network: Some(cri::PodSandboxNetworkStatus { ip, additional_ips: Vec::new() }),
                linux: Some(cri::LinuxPodSandboxStatus { namespaces: Some(cri::Namespace { options }) }),
                labels: config.labels,
                annotations: config.annotations,
                runtime_handler: String::new(),
            };
            state.sandboxes.insert(id.clone(), status);
            id
        };
        self.changed();
        Ok(Response::new(cri::RunPodSandboxResponse { pod_sandbox_id: id }))
    }

    async fn stop_pod_sandbox(&self, request: Request<cri::StopPodSandboxRequest>) -> Answer<cri::StopPodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        let metadata = self.lock().sandboxes.get(&id).and_then(|s| s.metadata.clone());
        let detail = metadata.as_ref().map(|m| format!("{}/{}", m.name, m.attempt)).unwrap_or_default();
        let _busy = self.enter("StopPodSandbox", &detail, metadata.as_ref().map(|m| m.uid.as_str())).await?;
        let mut state = self.lock();
        let running = cri::ContainerState::ContainerRunning as i32;
        let inside: Vec<String> =
            state.containers.iter().filter(|(_, (s, c))| *s == id && c.state == running).map(|(i, _)| i.clone()).collect();
        for container in inside {
            state.end(&container, 137);
        }
        if let Some(sandbox) = state.sandboxes.get_mut(&id) {
            sandbox.state = cri::PodSandboxState::SandboxNotready.into();
            sandbox.network = Some(cri::PodSandboxNetworkStatus::default());
        }
        Ok(Response::new(cri::StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(&self, request: Request<cri::RemovePodSandboxRequest>) -> Answer<cri::RemovePodSandboxResponse> {
        let id = request.into_inner().pod_sandbox_id;
        let metadata = self.lock().sandboxes.get(&id).and_then(|s| s.metadata.clone());
        let detail = metadata.as_ref().map(|m| format!("{}/{}", m.name, m.attempt)).unwrap_or_default();
        let _busy = self.enter("RemovePodSandbox", &detail, metadata.as_ref().map(|m| m.uid.as_str())).await?;
        let mut state = self.lock();
        state.sandboxes.remove(&id);
        state.containers.retain(|_, (sandbox, _)| *sandbox != id);
        Ok(Response::new(cri::RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(&self, request: Request<cri::PodSandboxStatusRequest>) -> Answer<cri::PodSandboxStatusResponse> {
        let id = request.into_inner().pod_sandbox_id;
        let status = self.lock().sandboxes.get(&id).cloned().ok_or_else(|| Status::not_found("no such sandbox"))?;
        Ok(Response::new(cri::PodSandboxStatusResponse { status: Some(status), ..Default::default() }))
    }

    async fn list_pod_sandbox(&self, request: Request<cri::ListPodSandboxRequest>) -> Answer<cri::ListPodSandboxResponse> {
        let selector = request.into_inner().filter.unwrap_or_default().label_selector;
        self.lock().listings += 1;
        self.changed();
        let state = self.lock();
        if state.mute {
            return Err(Status::unavailable("not now"));
        }
        let items = state.sandboxes.values().filter(|s| selected(&s.labels, &selector)).map(|s| cri::PodSandbox {
            id: s.id.clone(),
            metadata: s.metadata.clone(),
            state: s.state,
            created_at: s.created_at,
            labels: s.labels.clone(),
            annotations: s.annotations.clone(),
            runtime_handler: String::new(),
        });
        Ok(Response::new(cri::ListPodSandboxResponse { items: items.collect() }))
    }

    async fn create_container(&self, request: Request<cri::CreateContainerRequest>) -> Answer<cri::CreateContainerResponse> {
        let request = request.into_inner();
        let config = request.config.unwrap();
        let metadata = config.metadata.clone().unwrap();
        let sandbox = request.sandbox_config.unwrap();
        let uid = sandbox.metadata.unwrap().uid;
        let detail = format!("{}/{}", metadata.name, metadata.attempt);
        let _busy = self.enter("CreateContainer", &detail, Some(&uid)).await?;
        let mut state = self.lock();
        if !state.sandboxes.contains_key(&request.pod_sandbox_id) {
            return Err(Status::not_found("no such sandbox"));
        }
        let taken = |(sandbox, c): &(String, cri::ContainerStatus)| {
            *sandbox == request.pod_sandbox_id && c.metadata.as_ref() == Some(&metadata)
        };
        if state.containers.values().any(taken) {
            return Err(Status::already_exists("container name is taken"));
        }
        let id = state.id();
        let number = i64::try_from(state.next).unwrap();
        let status = cri::ContainerStatus {
            id: id.clone(),
            metadata: Some(metadata),
            state: cri::ContainerState::ContainerCreated.into(),
            created_at: number * 1_000_000_000,
            image: config.image.clone(),
            image_ref: config.image.clone().unwrap_or_default().image,
            labels: config.labels.clone(),
            annotations: config.annotations.clone(),
            mounts: config.mounts.clone(),
            resources: Some(cri::ContainerResources {
                linux: config.linux.as_ref().and_then(|l| l.resources.clone()),
                windows: None,
            }),
            ..Default::default()
        };
        // The log is there from the start on, as a real runtime has it: a link to nothing would be tidied away.
        let log = std::path::Path::new(&sandbox.log_directory).join(&config.log_path);
        std::fs::create_dir_all(log.parent().unwrap()).unwrap();
        std::fs::write(&log, "").unwrap();
        state.configs.insert(id.clone(), config);
        state.containers.insert(id.clone(), (request.pod_sandbox_id, status));
        Ok(Response::new(cri::CreateContainerResponse { container_id: id }))
    }

    async fn start_container(&self, request: Request<cri::StartContainerRequest>) -> Answer<cri::StartContainerResponse> {
        let id = request.into_inner().container_id;
        let (detail, pod) = {
            let state = self.lock();
            (state.label(&id), state.pod_of(&id))
        };
        let _busy = self.enter("StartContainer", &detail, pod.as_deref()).await?;
        let failed = {
            let mut state = self.lock();
            let name = detail.split('/').next().unwrap().to_owned();
            let behaviour = state.behaviours.get_mut(&name).and_then(VecDeque::pop_front).unwrap_or(Behaviour::Run);
            let now = i64::try_from(state.next).unwrap() * 1_000_000_000;
            let (_, container) = state.containers.get_mut(&id).ok_or_else(|| Status::not_found("no such container"))?;
            container.state = cri::ContainerState::ContainerRunning.into();
            container.started_at = now;
            match behaviour {
                Behaviour::Run => false,
                Behaviour::Exit(code) => {
                    state.end(&id, code);
                    false
                }
                Behaviour::FailToStart => {
                    state.end(&id, 128);
                    state.containers.get_mut(&id).unwrap().1.reason = "StartError".into();
                    true
                }
            }
        };
        self.tell(&id);
        match failed {
            false => Ok(Response::new(cri::StartContainerResponse {})),
            true => Err(Status::unknown("exec: \"/nothing\": no such file or directory")),
        }
    }

    async fn stop_container(&self, request: Request<cri::StopContainerRequest>) -> Answer<cri::StopContainerResponse> {
        let request = request.into_inner();
        let (detail, pod) = {
            let state = self.lock();
            (format!("{} {}", state.label(&request.container_id), request.timeout), state.pod_of(&request.container_id))
        };
        let _busy = self.enter("StopContainer", &detail, pod.as_deref()).await?;
        let running = cri::ContainerState::ContainerRunning as i32;
        {
            let mut state = self.lock();
            if state.containers.get(&request.container_id).is_some_and(|(_, c)| c.state == running) {
                state.end(&request.container_id, 143);
            }
        }
        self.tell(&request.container_id);
        Ok(Response::new(cri::StopContainerResponse {}))
    }

    async fn remove_container(&self, request: Request<cri::RemoveContainerRequest>) -> Answer<cri::RemoveContainerResponse> {
        let id = request.into_inner().container_id;
        let (detail, pod) = {
            let state = self.lock();
            (state.label(&id), state.pod_of(&id))
        };
        let _busy = self.enter("RemoveContainer", &detail, pod.as_deref()).await?;
        self.lock().containers.remove(&id);
        Ok(Response::new(cri::RemoveContainerResponse {}))
    }

    async fn list_containers(&self, request: Request<cri::ListContainersRequest>) -> Answer<cri::ListContainersResponse> {
        let selector = request.into_inner().filter.unwrap_or_default().label_selector;
        let state = self.lock();
        let found = state.containers.values().filter(|(_, c)| selected(&c.labels, &selector));
        let containers = found.map(|(sandbox, c)| cri::Container {
            id: c.id.clone(),
            pod_sandbox_id: sandbox.clone(),
            metadata: c.metadata.clone(),
            image: c.image.clone(),
            state: c.state,
            created_at: c.created_at,
            labels: c.labels.clone(),
            annotations: c.annotations.clone(),
            ..Default::default()
        });
        Ok(Response::new(cri::ListContainersResponse { containers: containers.collect() }))
    }

    async fn container_status(&self, request: Request<cri::ContainerStatusRequest>) -> Answer<cri::ContainerStatusResponse> {
        let id = request.into_inner().container_id;
        let found = self.lock().containers.get(&id).map(|(_, c)| c.clone());
        let status = found.ok_or_else(|| Status::not_found("no such container"))?;
        Ok(Response::new(cri::ContainerStatusResponse { status: Some(status), ..Default::default() }))
    }

    async fn update_container_resources(
        &self,
        request: Request<cri::UpdateContainerResourcesRequest>,
    ) -> Answer<cri::UpdateContainerResourcesResponse> {
        let request = request.into_inner();
        let (detail, pod) = {
            let state = self.lock();
            (state.label(&request.container_id), state.pod_of(&request.container_id))
        };
        let _busy = self.enter("UpdateContainerResources", &detail, pod.as_deref()).await?;
        if let Some((_, container)) = self.lock().containers.get_mut(&request.container_id) {
            // What an update leaves out stays, as in real runtimes.
            let linux = container.resources.get_or_insert_default().linux.get_or_insert_default();
            let update = request.linux.unwrap_or_default();
            let only_cpuset = update.cpu_shares == 0 && !update.cpuset_cpus.is_empty();
            let cpuset = if update.cpuset_cpus.is_empty() { linux.cpuset_cpus.clone() } else { update.cpuset_cpus.clone() };
            *linux = cri::LinuxContainerResources { cpuset_cpus: cpuset, ..if only_cpuset { linux.clone() } else { update } };
        }
        Ok(Response::new(cri::UpdateContainerResourcesResponse {}))
    }

    async fn exec_sync(&self, request: Request<cri::ExecSyncRequest>) -> Answer<cri::ExecSyncResponse> {
        let request = request.into_inner();
        let detail = self.lock().label(&request.container_id);
        let code = match self.enter("ExecSync", &format!("{detail} {}", request.cmd.join(" ")), None).await {
            Ok(_) => 0,
            Err(status) if status.code() == tonic::Code::Aborted => 1,
            Err(status) => return Err(status),
        };
        Ok(Response::new(cri::ExecSyncResponse { stdout: b"said".to_vec(), stderr: Vec::new(), exit_code: code }))
    }

    async fn exec(&self, request: Request<cri::ExecRequest>) -> Answer<cri::ExecResponse> {
        let r = request.into_inner();
        let detail = {
            let label = self.lock().label(&r.container_id);
            format!("{label} {} {}", flags(r.stdin, r.stdout, r.stderr, r.tty), r.cmd.join(" "))
        };
        self.enter("Exec", &detail, None).await?;
        Ok(Response::new(cri::ExecResponse { url: self.lock().streaming.clone() }))
    }

    async fn attach(&self, request: Request<cri::AttachRequest>) -> Answer<cri::AttachResponse> {
        let r = request.into_inner();
        let detail = format!("{} {}", self.lock().label(&r.container_id), flags(r.stdin, r.stdout, r.stderr, r.tty));
        self.enter("Attach", &detail, None).await?;
        Ok(Response::new(cri::AttachResponse { url: self.lock().streaming.clone() }))
    }

    async fn port_forward(&self, request: Request<cri::PortForwardRequest>) -> Answer<cri::PortForwardResponse> {
        self.enter("PortForward", &format!("{:?}", request.into_inner().port), None).await?;
        Ok(Response::new(cri::PortForwardResponse { url: self.lock().streaming.clone() }))
    }

    async fn checkpoint_container(
        &self,
        request: Request<cri::CheckpointContainerRequest>,
    ) -> Answer<cri::CheckpointContainerResponse> {
        let r = request.into_inner();
        let label = self.lock().label(&r.container_id);
        self.enter("CheckpointContainer", &format!("{label} {}", r.timeout), None).await?;
        Ok(Response::new(cri::CheckpointContainerResponse {}))
    }

    async fn list_pod_sandbox_stats(
        &self,
        _: Request<cri::ListPodSandboxStatsRequest>,
    ) -> Answer<cri::ListPodSandboxStatsResponse> {
        Ok(Response::new(cri::ListPodSandboxStatsResponse { stats: self.lock().stats() }))
    }

    async fn list_container_stats(&self, _: Request<cri::ListContainerStatsRequest>) -> Answer<cri::ListContainerStatsResponse> {
        let all = self.lock().stats();
        let stats = all.into_iter().flat_map(|pod| pod.linux.unwrap_or_default().containers).collect();
        Ok(Response::new(cri::ListContainerStatsResponse { stats }))
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<cri::ListMetricDescriptorsRequest>,
    ) -> Answer<cri::ListMetricDescriptorsResponse> {
        let keys = ["pod", "namespace", "container", "id", "image", "interface"].map(str::to_owned);
        let descriptor = |name: &str, keys: &[String]| cri::MetricDescriptor {
            name: name.into(),
            help: "Of\na test".into(),
            label_keys: keys.to_vec(),
        };
        let descriptors = vec![
            descriptor("container_processes", &keys[..5]),
            descriptor("container_cpu_usage_seconds_total", &keys[..5]),
            descriptor("container_network_receive_bytes_total", &keys),
        ];
        Ok(Response::new(cri::ListMetricDescriptorsResponse { descriptors }))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<cri::ListPodSandboxMetricsRequest>,
    ) -> Answer<cri::ListPodSandboxMetricsResponse> {
        Ok(Response::new(cri::ListPodSandboxMetricsResponse { pod_metrics: self.lock().metrics() }))
    }

    type GetContainerEventsStream = AnswerStream<cri::ContainerEventResponse>;

    async fn get_container_events(&self, _: Request<cri::GetEventsRequest>) -> Answer<Self::GetContainerEventsStream> {
        if self.lock().without_events {
            return Err(Status::unimplemented("no events"));
        }
        let stream = BroadcastStream::new(self.events.subscribe()).filter_map(|event| async { event.ok().map(Ok) });
        Ok(Response::new(Box::pin(stream)))
    }

    type StreamPodSandboxesStream = AnswerStream<cri::StreamPodSandboxesResponse>;
    type StreamContainersStream = AnswerStream<cri::StreamContainersResponse>;
    type StreamContainerStatsStream = AnswerStream<cri::StreamContainerStatsResponse>;
    type StreamPodSandboxStatsStream = AnswerStream<cri::StreamPodSandboxStatsResponse>;
    type StreamPodSandboxMetricsStream = AnswerStream<cri::StreamPodSandboxMetricsResponse>;

    not_faked! {
        stream_pod_sandboxes(StreamPodSandboxesRequest) -> Self::StreamPodSandboxesStream;
        stream_containers(StreamContainersRequest) -> Self::StreamContainersStream;
        reopen_container_log(ReopenContainerLogRequest) -> cri::ReopenContainerLogResponse;
        container_stats(ContainerStatsRequest) -> cri::ContainerStatsResponse;
        stream_container_stats(StreamContainerStatsRequest) -> Self::StreamContainerStatsStream;
        pod_sandbox_stats(PodSandboxStatsRequest) -> cri::PodSandboxStatsResponse;
        stream_pod_sandbox_stats(StreamPodSandboxStatsRequest) -> Self::StreamPodSandboxStatsStream;
        update_runtime_config(UpdateRuntimeConfigRequest) -> cri::UpdateRuntimeConfigResponse;
        stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest) -> Self::StreamPodSandboxMetricsStream;
        update_pod_sandbox_resources(UpdatePodSandboxResourcesRequest) -> cri::UpdatePodSandboxResourcesResponse;
    }
}

#[tonic::async_trait]
impl ImageService for FakeCri {
    async fn image_status(&self, request: Request<cri::ImageStatusRequest>) -> Answer<cri::ImageStatusResponse> {
        let name = request.into_inner().image.unwrap_or_default().image;
        self.enter("ImageStatus", &name, None).await?;
        let state = self.lock();
        let by_id = || state.images.values().find(|i| i.id == name);
        let image = state.images.get(&name).or_else(by_id).cloned();
        Ok(Response::new(cri::ImageStatusResponse { image, ..Default::default() }))
    }

    async fn pull_image(&self, request: Request<cri::PullImageRequest>) -> Answer<cri::PullImageResponse> {
        let request = request.into_inner();
        let name = request.image.unwrap_or_default().image;
        let user = request.auth.map(|auth| format!(" {}:{}", auth.username, auth.password)).unwrap_or_default();
        self.enter("PullImage", &format!("{name}{user}"), None).await?;
        if !self.lock().pullable.contains(&name) {
            return Err(Status::not_found(format!("no such image: {name}")));
        }
        self.add_image(&name);
        Ok(Response::new(cri::PullImageResponse { image_ref: format!("sha256:{name}") }))
    }

    async fn image_fs_info(&self, _: Request<cri::ImageFsInfoRequest>) -> Answer<cri::ImageFsInfoResponse> {
        let usage = |used| cri::FilesystemUsage {
            fs_id: Some(cri::FilesystemIdentifier { mountpoint: "/".into() }),
            used_bytes: Some(cri::UInt64Value { value: used }),
            ..Default::default()
        };
        Ok(Response::new(cri::ImageFsInfoResponse {
            image_filesystems: vec![usage(1000)],
            container_filesystems: vec![usage(2000)],
        }))
    }

    async fn list_images(&self, _: Request<cri::ListImagesRequest>) -> Answer<cri::ListImagesResponse> {
        Ok(Response::new(cri::ListImagesResponse { images: self.lock().images.values().cloned().collect() }))
    }

    async fn remove_image(&self, request: Request<cri::RemoveImageRequest>) -> Answer<cri::RemoveImageResponse> {
        let id = request.into_inner().image.unwrap_or_default().image;
        self.enter("RemoveImage", &id, None).await?;
        self.lock().images.retain(|_, image| image.id != id);
        Ok(Response::new(cri::RemoveImageResponse {}))
    }

    type StreamImagesStream = AnswerStream<cri::StreamImagesResponse>;

    not_faked! {
        stream_images(StreamImagesRequest) -> Self::StreamImagesStream;
    }
}
