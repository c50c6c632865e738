//! A CRI server over a real socket with the real shim, in namespaces of its own, and a client of it.
#![allow(dead_code, clippy::unwrap_used, clippy::print_stderr)]

pub mod streams;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use berth_cri_api::v1;
use berth_cri_api::v1::image_service_client::ImageServiceClient;
use berth_cri_api::v1::runtime_service_client::RuntimeServiceClient;
use berth_cri_server::{Config, CriServer};
use berth_testkit::image::{Layer, Layout};
use berth_testkit::{TempState, wait_for};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint, Server};

pub const IMAGE: &str = "docker.io/test/busybox:1";

/// The shim of this checkout, built when it is missing or old.
fn shim() -> &'static [u8] {
    static SHIM: OnceLock<&'static [u8]> = OnceLock::new();
    SHIM.get_or_init(|| {
        let out = Command::new(env!("CARGO"))
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
            .args(["build", "--quiet", "-p", "berth-shim", "--bin", "berth-shim", "--message-format=json"])
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let path = String::from_utf8_lossy(&out.stdout)
            .lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .find_map(|m| m["executable"].as_str().map(PathBuf::from))
            .unwrap();
        std::fs::read(path).unwrap().leak()
    })
}

/// An agent that can be killed and started again on the same folders.
pub struct Agent {
    pub root: PathBuf,
    pub state: PathBuf,
    _temp: TempState,
    running: Option<(Runtime, CriServer)>,
    pub client: Runtime,
    channel: Option<Channel>,
    /// Changes the configuration of each start.
    tune: fn(&mut Config),
}

impl Agent {
    pub fn start() -> Self {
        Self::tuned(|_| ())
    }

    /// With another configuration.
    pub fn tuned(tune: fn(&mut Config)) -> Self {
        let temp = TempState::new();
        let (root, state) = (temp.dir("root"), temp.dir("state"));
        let client = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut agent = Self { root, state, _temp: temp, running: None, client, channel: None, tune };
        agent.import();
        agent.run();
        agent
    }

    fn import(&self) {
        let mut layer = Layer::new();
        for dir in ["bin", "etc", "dev", "proc", "sys", "tmp"] {
            layer = layer.dir(dir, 0o755);
        }
        layer = layer.copy("bin/busybox", 0o755, Path::new("/bin/busybox"));
        for applet in ["sh", "echo", "cat", "sleep", "id", "env", "printf", "true", "ls", "head"] {
            layer = layer.hardlink(&format!("bin/{applet}"), "bin/busybox");
        }
        let layer = layer.file("etc/passwd", 0o644, "root:x:0:0::/root:/bin/sh\nweb:x:33:33::/:/bin/sh\n").file(
            "etc/group",
            0o644,
            "web:x:33:\nmore:x:77:web\n",
        );
        let folder = self.layout(IMAGE, &[layer.into_tar()]);
        let images = self.root.join("images");
        self.client.block_on(async {
            let store = berth_image::ImageStore::open(berth_image::StoreConfig::new(images)).await.unwrap();
            store.import(&folder, None).await.unwrap();
        });
        std::fs::remove_dir_all(folder).unwrap();
    }

    fn layout(&self, name: &str, layers: &[Vec<u8>]) -> PathBuf {
        let folder = self.root.join("layout");
        let config = serde_json::json!({ "Cmd": ["sleep", "1000"], "Env": ["PATH=/bin"] });
        Layout::create(&folder).image(name, layers, &config);
        folder
    }

    /// Gives the running agent one more image, the lowest layer first.
    pub fn import_image(&self, name: &str, layers: &[Vec<u8>]) {
        let folder = self.layout(name, layers);
        self.client.block_on(self.running.as_ref().unwrap().1.import(&folder)).unwrap();
        std::fs::remove_dir_all(folder).unwrap();
    }

    /// Starts the agent; returns how long it took.
    pub fn run(&mut self) -> Duration {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let mut config = Config::new(&self.root, &self.state, shim());
        config.cni_conf_dir = self.root.join("cni");
        config.pod_cidrs = vec!["10.99.0.0/16".into()];
        (self.tune)(&mut config);
        // The threads of an agent that was "killed" let go of its locks within a moment; a real one's go with the process.
        let started = wait_for(Duration::from_secs(20), || {
            let begun = std::time::Instant::now();
            let server = runtime.block_on(CriServer::start(config.clone()));
            if let Err(error) = &server {
                eprintln!("start: {error:?}");
            }
            server.ok().map(|server| (server, begun.elapsed()))
        });
        let (server, took) = started.unwrap();
        let (runtime_service, image_service) = server.services();
        let path = self.state.join("berth.sock");
        let _ = std::fs::remove_file(&path);
        runtime.block_on(async {
            let listener = tokio::net::UnixListener::bind(&path).unwrap();
            let incoming = tokio_stream::wrappers::UnixListenerStream::new(listener);
            tokio::spawn(Server::builder().add_service(runtime_service).add_service(image_service).serve_with_incoming(incoming));
        });
        let channel = self.client.block_on(async {
            Endpoint::from_static("http://localhost")
                .connect_with_connector(tower::service_fn(move |_| {
                    let path = path.clone();
                    async move { tokio::net::UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) }
                }))
                .await
                .unwrap()
        });
        self.channel = Some(channel);
        self.running = Some((runtime, server));
        took
    }

    /// Ends the agent without a word, as SIGKILL does: every task of it is gone.
    pub fn kill(&mut self) {
        let (runtime, server) = self.running.take().unwrap();
        drop(server);
        runtime.shutdown_timeout(Duration::from_secs(5));
    }

    /// Ends the agent in order; the pods stay.
    pub fn shut_down(&mut self) {
        let (runtime, server) = self.running.take().unwrap();
        runtime.block_on(server.shutdown());
        drop(server);
        runtime.shutdown_timeout(Duration::from_secs(5));
    }

    pub fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone().unwrap()).max_decoding_message_size(berth_cri_api::MAX_MESSAGE_BYTES)
    }

    pub fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone().unwrap())
    }

    pub fn leaks(&self) -> Vec<String> {
        let (runtime, server) = self.running.as_ref().unwrap();
        runtime.block_on(server.leaks(true))
    }

    /// What `berth why` says, as text.
    pub fn why(&self, wanted: &str) -> String {
        let (runtime, server) = self.running.as_ref().unwrap();
        match runtime.block_on(server.why(wanted)) {
            Ok(answers) => answers.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"),
            Err(error) => format!("error: {error}"),
        }
    }

    /// What `berth leaks` says where no agent runs.
    pub fn leaks_on_record(&self) -> Vec<String> {
        let mut config = Config::new(&self.root, &self.state, shim());
        config.cni_conf_dir = self.root.join("cni");
        self.client.block_on(CriServer::leaks_on_record(config)).unwrap()
    }

    /// Everything ends, and nothing is left.
    pub fn finish(mut self) {
        let (runtime, server) = self.running.as_ref().unwrap();
        runtime.block_on(server.stop_all(Duration::ZERO)).unwrap();
        assert_eq!(self.leaks(), Vec::<String>::new());
        self.kill();
    }

    pub fn sandbox_config(&self, name: &str) -> v1::PodSandboxConfig {
        v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: name.into(),
                uid: format!("uid-{name}"),
                namespace: "test".into(),
                attempt: 0,
            }),
            hostname: name.into(),
            log_directory: self.root.join("logs").join(name).to_string_lossy().into_owned(),
            labels: HashMap::from([("app".to_owned(), name.to_owned())]),
            ..Default::default()
        }
    }

    pub fn run_sandbox(&self, name: &str) -> String {
        let config = self.sandbox_config(name);
        let mut client = self.runtime();
        let request = v1::RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() };
        self.client.block_on(client.run_pod_sandbox(request)).unwrap().into_inner().pod_sandbox_id
    }

    pub fn create(&self, sandbox: &str, pod: &str, config: v1::ContainerConfig) -> Result<String, tonic::Status> {
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: sandbox.into(),
            config: Some(config),
            sandbox_config: Some(self.sandbox_config(pod)),
        };
        let mut client = self.runtime();
        self.client.block_on(client.create_container(request)).map(|r| r.into_inner().container_id)
    }

    pub fn start_container(&self, id: &str) -> Result<(), tonic::Status> {
        let mut client = self.runtime();
        let request = v1::StartContainerRequest { container_id: id.into() };
        self.client.block_on(client.start_container(request)).map(drop)
    }

    /// A container that runs a script.
    pub fn run_script(&self, sandbox: &str, pod: &str, name: &str, script: &str) -> String {
        let id = self.create(sandbox, pod, container(name, &["sh", "-c", script])).unwrap();
        self.start_container(&id).unwrap();
        id
    }

    pub fn exec(&self, id: &str, command: &[&str], timeout: i64) -> Result<v1::ExecSyncResponse, tonic::Status> {
        let request =
            v1::ExecSyncRequest { container_id: id.into(), cmd: command.iter().map(|c| (*c).to_owned()).collect(), timeout };
        let mut client = self.runtime();
        self.client.block_on(client.exec_sync(request)).map(tonic::Response::into_inner)
    }

    pub fn container_status(&self, id: &str) -> v1::ContainerStatus {
        let mut client = self.runtime();
        let request = v1::ContainerStatusRequest { container_id: id.into(), verbose: false };
        self.client.block_on(client.container_status(request)).unwrap().into_inner().status.unwrap()
    }

    pub fn sandbox_status(&self, id: &str) -> v1::PodSandboxStatus {
        let mut client = self.runtime();
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.into(), verbose: false };
        self.client.block_on(client.pod_sandbox_status(request)).unwrap().into_inner().status.unwrap()
    }

    /// The first process of a container.
    pub fn container_pid(&self, id: &str) -> i32 {
        self.container_info(id)["pid"].as_i64().unwrap() as i32
    }

    /// What the verbose status tells of a container.
    pub fn container_info(&self, id: &str) -> serde_json::Value {
        let mut client = self.runtime();
        let request = v1::ContainerStatusRequest { container_id: id.into(), verbose: true };
        let info = self.client.block_on(client.container_status(request)).unwrap().into_inner().info;
        serde_json::from_str(&info["info"]).unwrap()
    }

    /// The process that pins a sandbox.
    pub fn shim_pid(&self, id: &str) -> i32 {
        self.sandbox_info(id)["shimPid"].as_i64().unwrap() as i32
    }

    /// What the verbose status tells of a sandbox.
    pub fn sandbox_info(&self, id: &str) -> serde_json::Value {
        let mut client = self.runtime();
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: id.into(), verbose: true };
        let info = self.client.block_on(client.pod_sandbox_status(request)).unwrap().into_inner().info;
        serde_json::from_str(&info["info"]).unwrap()
    }
}

pub fn container(name: &str, command: &[&str]) -> v1::ContainerConfig {
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: name.into(), attempt: 0 }),
        image: Some(v1::ImageSpec { image: IMAGE.into(), ..Default::default() }),
        command: command.iter().map(|c| (*c).to_owned()).collect(),
        log_path: format!("{name}.log"),
        ..Default::default()
    }
}

pub fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}
