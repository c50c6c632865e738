//! A berth under test: its folders, its process, its command line.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use berth_testkit::sandbox::NODE_IP;
use berth_testkit::{TempState, wait_for, wait_until};
use serde_json::Value;

use crate::crictl::Crictl;
use crate::{SOON, image, output, tools, try_output};

/// Which half of berth runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    /// `berth node`
    Node,
    /// `berth cri`
    Cri,
    /// `berth kubelet`; `flags` say over which CRI socket
    Kubelet,
}

/// A berth with folders of its own. End it with [`Berth::finish`], which also looks for leaks; a failed test just drops it, and
/// the sandbox ends everything.
pub struct Berth {
    /// The folder that holds everything of it.
    pub dir: TempState,
    /// More flags for the agent, e.g. `--pod-cidr`.
    pub flags: Vec<String>,
    half: Half,
    child: Option<Child>,
}

impl Berth {
    /// Starts a berth with the scenarios' images imported, and waits until it is ready. `web` is the `demo-web` program.
    #[must_use]
    pub fn start(half: Half, web: &str) -> Self {
        let mut berth = Self::prepare(half);
        berth.import_and_launch(web);
        berth
    }

    /// Imports the images, of which `berth.test/web:1` has the program `web`, and starts the agent.
    pub fn import_and_launch(&mut self, web: &str) {
        let archive = image::archive(&self.dir, Path::new(web));
        self.run(&["image", "import", &archive.to_string_lossy()]);
        self.launch();
    }

    /// Makes the folders only.
    #[must_use]
    pub fn prepare(half: Half) -> Self {
        let dir = TempState::new();
        for name in ["manifests", "kubelet", "logs", "links", "certs.d"] {
            dir.dir(name);
        }
        Self { dir, flags: Vec::new(), half, child: None }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }

    /// The CRI socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("state/berth.sock")
    }

    /// Starts the agent and waits until it answers.
    pub fn launch(&mut self) {
        let log = File::options().create(true).append(true).open(self.path("agent.log")).unwrap();
        let mut command = self.command();
        match self.half {
            Half::Node | Half::Kubelet => {
                let verb = if self.half == Half::Node { "node" } else { "kubelet" };
                command.args([verb, "--manifests", &self.path("manifests"), "--kubelet-root", &self.path("kubelet")]);
                command.args(["--pod-logs-dir", &self.path("logs"), "--container-logs-dir", &self.path("links")]);
                command.args(["--node-name", "e2e", "--node-ip", NODE_IP]);
                // The machine's own disk may be as full as it likes: images that a test has not used yet stay.
                command.args(["--image-gc-high-threshold=100", "--eviction-hard=memory.available<1Mi"]);
            }
            Half::Cri => {
                command.arg("cri");
            }
        }
        if self.half != Half::Kubelet {
            command.args(["--registry-config-dir", &self.path("certs.d")]);
        }
        command.args(&self.flags);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.child = Some(command.spawn().unwrap());
        let ready = wait_until(SOON, || self.answers());
        assert!(ready, "berth is not ready:\n{}", self.agent_log());
    }

    /// Whether the agent answers: its CRI, and its kubelet where it has one.
    #[must_use]
    pub fn answers(&self) -> bool {
        let (socket, verb) = match self.half {
            Half::Node | Half::Kubelet => (self.dir.path().join("state/kubelet.sock"), "pods"),
            Half::Cri => (self.socket(), "ps"),
        };
        // Without the socket `berth pods` asks the CRI server.
        socket.exists() && self.command().args([verb, "-o", "json"]).output().is_ok_and(|out| out.status.success())
    }

    fn command(&self) -> Command {
        let mut command = Command::new(tools::berth());
        command.args(["--root", &self.path("root"), "--state", &self.path("state")]);
        command
    }

    /// A berth verb on this instance, not run yet.
    #[must_use]
    pub fn verb(&self, arguments: &[&str]) -> Command {
        let mut command = self.command();
        command.args(arguments);
        command
    }

    /// Runs a berth verb on this instance and returns what it printed.
    pub fn run(&self, arguments: &[&str]) -> String {
        output(self.command().args(arguments))
    }

    /// What the agent logged.
    #[must_use]
    pub fn agent_log(&self) -> String {
        fs::read_to_string(self.path("agent.log")).unwrap_or_default()
    }

    /// The agent's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the agent runs").id()
    }

    /// `kill -9` of the agent, and nothing else.
    pub fn kill_agent(&mut self) {
        let mut child = self.child.take().expect("the agent runs");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// SIGTERM to the agent; whether it ended in time.
    pub fn terminate_agent(&mut self, within: Duration) -> bool {
        let mut child = self.child.take().expect("the agent runs");
        let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let ended = wait_until(within, || child.try_wait().unwrap().is_some());
        self.child = (!ended).then_some(child);
        ended
    }

    /// Writes a manifest at once, as editors that rename do.
    pub fn write_manifest(&self, name: &str, yaml: &str) {
        // A dot file: the kubelet ignores it until it has its name.
        let hidden = self.dir.path().join("manifests").join(format!(".{name}"));
        fs::write(&hidden, yaml).unwrap();
        fs::rename(&hidden, self.dir.path().join("manifests").join(name)).unwrap();
    }

    /// Removes a manifest.
    pub fn remove_manifest(&self, name: &str) {
        fs::remove_file(self.dir.path().join("manifests").join(name)).unwrap();
    }

    /// The pods with their statuses, as the kubelet tells them.
    #[must_use]
    pub fn pods(&self) -> Vec<Value> {
        let list: Value = serde_json::from_str(&self.run(&["pods", "-o", "json"])).unwrap();
        list["items"].as_array().cloned().unwrap_or_default()
    }

    /// The pod of this name that satisfies `wanted`, waited for.
    ///
    /// # Panics
    /// When there is none in time.
    pub fn wait_pod(&self, name: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let named = |pod: &Value| pod["metadata"]["name"] == format!("{name}-e2e") && wanted(pod);
        wait_for(SOON, || self.pods().into_iter().find(|pod| named(pod))).unwrap_or_else(|| {
            let pods = serde_json::to_string_pretty(&self.pods()).unwrap();
            panic!("pod {name} did not become {what}:\n{pods}\n{}", self.agent_log())
        })
    }

    /// The pod of this name once it is Running and all its containers are ready.
    pub fn wait_running(&self, name: &str) -> Value {
        self.wait_pod(name, "Running", is_running)
    }

    /// The log lines of a pod's only container, or of the one named `pod -c container`.
    #[must_use]
    pub fn logs(&self, pod: &str) -> Vec<String> {
        let out = try_output(self.command().arg("logs").args(pod.split(' ')));
        String::from_utf8_lossy(&out.stdout).lines().map(str::to_owned).collect()
    }

    /// crictl on this berth's socket.
    #[must_use]
    pub fn crictl(&self) -> Crictl {
        Crictl::new(&self.socket())
    }

    /// Ends the pods and the agent and asserts that nothing is left.
    pub fn finish(mut self) {
        self.run(&["stop", "--all", "--timeout", "1"]);
        if let Some(mut child) = self.child.take() {
            child.wait().unwrap();
        }
        let left = self.run(&["leaks", "--settle"]);
        assert!(left.trim().is_empty(), "leaks:\n{left}");
    }
}

/// Running, and every container ready.
#[must_use]
pub fn is_running(pod: &Value) -> bool {
    let containers = pod["status"]["containerStatuses"].as_array();
    pod["status"]["phase"] == "Running" && containers.is_some_and(|all| !all.is_empty() && all.iter().all(|c| c["ready"] == true))
}

/// The ids of a pod's containers.
#[must_use]
pub fn container_ids(pod: &Value) -> Vec<String> {
    let all = pod["status"]["containerStatuses"].as_array().into_iter().flatten();
    all.filter_map(|c| c["containerID"].as_str()).map(str::to_owned).collect()
}

/// The restarts of a pod's containers, summed.
#[must_use]
pub fn restarts(pod: &Value) -> i64 {
    let all = pod["status"]["containerStatuses"].as_array().into_iter().flatten();
    all.filter_map(|c| c["restartCount"].as_i64()).sum()
}
