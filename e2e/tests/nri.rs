//! NRI plugins made with the stock stub, connected to `berth cri` and started by it: what they are told, what they change, and
//! what becomes of what they refuse.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command};

use berth_cri_api::v1::{self, runtime_service_client::RuntimeServiceClient};
use berth_e2e::cri::{self, PidShape};
use berth_e2e::crictl::Crictl;
use berth_e2e::node::{Berth, Half};
use berth_e2e::{SOON, memory, text, tools};
use berth_testkit::{Sandbox, wait_until};
use serde_json::{Value, json};

const WEB: &str = env!("CARGO_BIN_EXE_demo-web");

/// A plugin: a folder with its behaviour and its log.
struct Plugin {
    name: String,
    dir: PathBuf,
    child: Option<Child>,
}

impl Plugin {
    fn prepare(dir: PathBuf, name: &str, behaviour: &Value) -> Self {
        fs::create_dir_all(&dir).unwrap();
        let plugin = Self { name: name.into(), dir, child: None };
        plugin.behave(behaviour);
        plugin
    }

    /// Connects a plugin and waits until it was told what there is.
    fn connect(node: &Berth, name: &str, behaviour: &Value) -> Self {
        let mut plugin = Self::prepare(node.dir.dir(&format!("plugins/{name}")), name, behaviour);
        let (index, base) = name.split_once('-').unwrap();
        let mut command = Command::new(tools::program("nri-plugin", "nri-plugin"));
        command.arg("-socket").arg(node.dir.path().join("state/nri.sock"));
        command.args(["-name", base, "-index", index]).arg("-dir").arg(&plugin.dir);
        plugin.child = Some(command.spawn().unwrap());
        plugin.wait("Synchronize");
        plugin.joined(node);
        plugin
    }

    /// What the runtime says once the plugin is one of its own.
    fn joined(&self, node: &Berth) {
        let joined = || node.agent_log().lines().any(|l| l.contains("NRI plugin joined") && l.contains(&self.name));
        assert!(wait_until(SOON, joined), "{}", node.agent_log());
    }

    /// Takes effect at the next event.
    fn behave(&self, behaviour: &Value) {
        let new = self.dir.join("new");
        fs::write(&new, behaviour.to_string()).unwrap();
        fs::rename(new, self.dir.join("behaviour.json")).unwrap();
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    fn wait(&self, what: &str) {
        assert!(wait_until(SOON, || self.log().contains(what)), "no {what:?} in\n{}", self.log());
    }

    /// The events of what is named, in order.
    fn events(&self, of: &str) -> Vec<String> {
        let log = self.log();
        log.lines().filter(|l| l.contains(of)).filter_map(|l| l.split(' ').next()).map(str::to_owned).collect()
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A node that waits longer for its plugins than by default: a busy machine drops none.
fn node() -> Berth {
    let mut node = Berth::prepare(Half::Cri);
    let config = "apiVersion: berth/v1alpha1\nkind: NodeConfiguration\nnri: {requestTimeout: 20s}\n";
    let config = node.dir.file("config.yaml", config);
    node.flags = vec!["--config".into(), config.to_string_lossy().into_owned()];
    node.import_and_launch(WEB);
    node
}

struct Pod<'a> {
    node: &'a Berth,
    crictl: Crictl,
    config: String,
    id: String,
}

impl<'a> Pod<'a> {
    fn run(node: &'a Berth, name: &str) -> Self {
        let crictl = node.crictl();
        let config = cri::file(&node.dir, &format!("{name}-pod.json"), &cri::sandbox(&node.dir, name, PidShape::PerContainer));
        let id = crictl.run(&["runp", &config]);
        Self { node, crictl, config, id }
    }

    fn file(&self, name: &str, script: &str) -> String {
        cri::file(&self.node.dir, &format!("{name}.json"), &cri::container(name, PidShape::PerContainer, script))
    }

    fn create(&self, name: &str, script: &str) -> String {
        self.crictl.run(&["create", &self.id, &self.file(name, script), &self.config])
    }

    fn start(&self, name: &str, script: &str) -> String {
        let id = self.create(name, script);
        self.crictl.run(&["start", &id]);
        id
    }

    /// Creates what must fail; what was said.
    fn refused(&self, name: &str) -> String {
        let out = self.crictl.attempt(&["create", &self.id, &self.file(name, "true"), &self.config]);
        assert!(!out.status.success(), "{name} was created");
        text(&out.stderr)
    }

    fn output(&self, id: &str) -> String {
        assert!(wait_until(SOON, || self.crictl.run(&["logs", id]).contains("end")), "{}", self.node.agent_log());
        self.crictl.run(&["logs", id])
    }
}

#[test]
fn plugins_see_every_event_in_order_and_an_end_that_nobody_asked_for() {
    Sandbox::new().shared_root().test(|| {
        let node = node();
        let old = Pod::run(&node, "old");
        old.start("early", "sleep 1000");
        let plugin = Plugin::connect(&node, "10-sees", &json!({}));
        plugin.wait("Synchronize pods=1 containers=1");
        plugin.wait("known container=early state=CONTAINER_RUNNING args=[\"sh\" \"-c\" \"sleep 1000\"]");

        let pod = Pod::run(&node, "seen");
        assert!(plugin.log().contains(&format!("RunPodSandbox pod=default/seen id={}", pod.id)), "{}", plugin.log());
        let id = pod.start("ends", "exit 3");
        plugin.wait("StopContainer pod=default/seen");
        pod.crictl.run(&["rm", &id]);
        for _ in 0..2 {
            pod.crictl.run(&["stopp", &pod.id]);
        }
        pod.crictl.run(&["rmp", &pod.id]);
        let container = [
            "CreateContainer",
            "PostCreateContainer",
            "StartContainer",
            "PostStartContainer",
            "StopContainer",
            "RemoveContainer",
        ];
        // An end may overtake the news of the start; nothing else may change its place.
        let mut seen = plugin.events("container=ends");
        seen.retain(|e| !e.starts_with("Post") && e != "Validate");
        assert_eq!(seen, container.into_iter().filter(|e| !e.starts_with("Post")).collect::<Vec<_>>());
        assert!(plugin.log().contains("PostStartContainer pod=default/seen"));
        let pods = plugin.events("pod=default/seen id=").into_iter().filter(|e| e.contains("Sandbox")).collect::<Vec<_>>();
        assert_eq!(pods, ["RunPodSandbox", "StopPodSandbox", "RemovePodSandbox"]);
        node.finish();
    });
}

#[test]
fn adjustments_are_in_the_container_and_a_conflict_names_both_plugins() {
    Sandbox::new().shared_root().test(|| {
        let node = node();
        let shared = node.dir.dir("shared");
        let hook = node.dir.dir("hooks").join("ran");
        let adjust = json!({
            "env": [{"key": "FROM_NRI", "value": "yes"}, {"key": "-PATH_GONE"}],
            "annotations": {"nri": "was here"},
            "mounts": [{"destination": "/nri", "type": "bind", "source": shared, "options": ["rbind", "ro"]}],
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": "512", "soft": "256"}],
            "hooks": {"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", format!("cat > {}", hook.display())],
                "env": ["PATH=/usr/bin:/bin"]}]},
            "linux": {
                "devices": [{"path": "/dev/nri0", "type": "c", "major": "1", "minor": "5", "fileMode": {"value": 438}}],
                "resources": {"memory": {"limit": {"value": (48 << 20).to_string()}}, "cpu": {"shares": {"value": "300"}}},
                "oomScoreAdj": {"value": "700"},
            },
        });
        fs::write(shared.join("file"), "content").unwrap();
        let first = Plugin::connect(&node, "10-adjusts", &json!({"adjust": adjust, "only": ["adjusted", "both"]}));
        let pod = Pod::run(&node, "adjusts");
        let script = "echo env=$FROM_NRI; cat /nri/file; touch /nri/x 2>&1; ulimit -n; head -c 2 /dev/nri0 | od -An -tx1; \
                      cat /proc/self/oom_score_adj; echo end";
        let id = pod.start("adjusted", script);
        let out = pod.output(&id);
        for want in ["env=yes", "content", "Read-only file system", "256", "00 00", "700"] {
            assert!(out.contains(want), "{want}: {out}");
        }
        assert!(fs::read_to_string(&hook).unwrap().contains("was here"), "annotations are in the state that hooks read");
        let status = pod.crictl.run(&["inspect", &id]);
        let status: Value = serde_json::from_str(&status).unwrap();
        let limits = &status["status"]["resources"]["linux"];
        assert_eq!(limits["memoryLimitInBytes"].as_str().unwrap_or_default(), (48 << 20).to_string(), "{limits}");

        // A later plugin that sets the same: neither wins, and nothing is left of the container.
        let second = Plugin::connect(
            &node,
            "20-also",
            &json!({"adjust": {"env": [{"key": "FROM_NRI", "value": "no"}]}, "only": ["both"]}),
        );
        let said = pod.refused("both");
        assert!(said.contains("10-adjusts") && said.contains("20-also") && said.contains("FROM_NRI"), "{said}");
        assert_eq!(pod.crictl.run(&["ps", "-a", "-q", "--name", "both"]), "");
        // What berth does not do is refused by its name.
        second.behave(&json!({"adjust": {"linux": {"ioPriority": {"class": "IOPRIO_CLASS_RT", "priority": 3}}}, "only": ["rt"]}));
        assert!(pod.refused("rt").contains("io_priority"));
        // A validator's no.
        second.behave(&json!({"reject": "not on this node"}));
        assert!(pod.refused("adjusted2").contains("not on this node"));
        second.behave(&json!({}));
        pod.create("adjusted2", "true");
        drop(first);
        node.finish();
    });
}

#[test]
fn what_plugins_refuse_fails_and_can_be_tried_again_and_one_that_hangs_is_dropped() {
    Sandbox::new().shared_root().test(|| {
        let node = Berth::start(Half::Cri, WEB);
        let plugin = Plugin::connect(&node, "10-refuses", &json!({"refuse": ["RunPodSandbox"]}));
        let crictl = node.crictl();
        let config = cri::file(&node.dir, "pod.json", &cri::sandbox(&node.dir, "no", PidShape::PerContainer));
        let refused = crictl.attempt(&["runp", &config]);
        assert!(!refused.status.success() && text(&refused.stderr).contains("RunPodSandbox is refused by the test"));
        assert_eq!(crictl.run(&["pods", "-q"]), "");
        plugin.behave(&json!({"refuse": ["CreateContainer"]}));
        let pod = Pod::run(&node, "no");
        assert!(pod.refused("c").contains("CreateContainer is refused by the test"));
        assert_eq!(crictl.run(&["ps", "-a", "-q"]), "");
        plugin.behave(&json!({"refuse": ["StartContainer"]}));
        let id = pod.create("c", "sleep 1000");
        let start = crictl.attempt(&["start", &id]);
        assert!(!start.status.success() && text(&start.stderr).contains("StartContainer is refused by the test"));
        assert!(wait_until(SOON, || crictl.run(&["ps", "-a", "--state", "exited", "-q", "--no-trunc"]).contains(&id)));
        crictl.run(&["rm", &id]);
        plugin.behave(&json!({"hang": ["StartContainer"]}));
        let id = pod.start("d", "sleep 1000");
        plugin.wait("closed");
        assert!(crictl.run(&["ps", "-q", "--no-trunc"]).contains(&id));
        // It may come again.
        let again = Plugin::connect(&node, "10-again", &json!({}));
        again.wait("Synchronize pods=1 containers=1");
        node.finish();
    });
}

#[test]
fn limits_are_changed_on_the_way_and_unasked() {
    Sandbox::new().shared_root().test(|| {
        let node = node();
        let behaviour = json!({
            "update": {"linux": {"resources": {"cpu": {"shares": {"value": "444"}}}}},
            "unasked": [{"linux": {"resources": {"cpu": {"shares": {"value": "333"}}}}}],
        });
        let plugin = Plugin::connect(&node, "10-limits", &behaviour);
        let pod = Pod::run(&node, "limits");
        let id = pod.start("c", "sleep 1000");
        let shares = || {
            let status: Value = serde_json::from_str(&pod.crictl.run(&["inspect", &id])).unwrap();
            status["status"]["resources"]["linux"]["cpuShares"].as_str().unwrap_or_default().to_owned()
        };
        plugin.wait("unasked failed=0 error=<nil>");
        assert!(wait_until(SOON, || shares() == "333"), "{}", shares());
        pod.crictl.run(&["update", "--cpu-share", "200", &id]);
        plugin.wait("asked shares=200");
        assert_eq!(shares(), "444");
        plugin.wait("PostUpdateContainer pod=default/limits");
        node.finish();
    });
}

/// UpdatePodSandboxResources, for which crictl has no verb.
fn resize(node: &Berth, pod: &str, shares: i64) -> Result<(), tonic::Status> {
    let socket = node.dir.path().join("state/berth.sock");
    let request = v1::UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.into(),
        resources: Some(v1::LinuxContainerResources { cpu_shares: shares, ..Default::default() }),
        overhead: None,
    };
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
        });
        // The authority is never resolved: the connector ignores it.
        let endpoint = tonic::transport::Endpoint::from_static("http://localhost");
        let channel = endpoint.connect_with_connector(connector).await.unwrap();
        RuntimeServiceClient::new(channel).update_pod_sandbox_resources(request).await.map(|_| ())
    })
}

#[test]
fn a_pod_is_resized_unless_a_plugin_refuses_and_the_plugins_hear_what_it_is_then() {
    Sandbox::new().shared_root().test(|| {
        let node = node();
        let plugin = Plugin::connect(&node, "10-sizes", &json!({}));
        let pod = Pod::run(&node, "sized");
        resize(&node, &pod.id, 700).unwrap();
        plugin.wait("PostUpdatePodSandbox");
        assert!(plugin.log().contains("asked shares=700") && plugin.log().contains("now shares=700"), "{}", plugin.log());
        plugin.behave(&json!({"refuse": ["UpdatePodSandbox"]}));
        let refused = resize(&node, &pod.id, 800).unwrap_err();
        assert!(refused.message().contains("UpdatePodSandbox is refused by the test"), "{refused}");
        let why = node.verb(&["why", &pod.id]).output().unwrap();
        assert!(text(&why.stdout).contains("ask the NRI plugins"), "{}", text(&why.stdout));
        let events = plugin.events("pod=default/sized id=");
        assert_eq!(events, ["RunPodSandbox", "UpdatePodSandbox", "PostUpdatePodSandbox", "UpdatePodSandbox"]);
        node.finish();
    });
}

#[test]
fn installed_plugins_are_started_with_the_agent_and_end_with_it() {
    Sandbox::new().shared_root().test(|| {
        let mut node = Berth::prepare(Half::Cri);
        let (plugins, configs) = (node.dir.dir("installed"), node.dir.dir("conf.d"));
        let program = plugins.join("15-installed");
        fs::copy(tools::program("nri-plugin", "nri-plugin"), &program).unwrap();
        let plugin = Plugin::prepare(plugins.join("15-installed.d"), "15-installed", &json!({}));
        fs::write(configs.join("installed.conf"), "some: text").unwrap();
        let file = node.dir.path().join("config.yaml");
        let text = format!(
            "apiVersion: berth/v1alpha1\nkind: NodeConfiguration\nnri:\n  pluginPath: {}\n  pluginConfigPath: {}\n  \
             requestTimeout: 20s\n  registrationTimeout: 20s\n",
            plugins.display(),
            configs.display()
        );
        fs::write(&file, text).unwrap();
        node.flags = vec!["--config".into(), file.to_string_lossy().into_owned()];
        node.import_and_launch(WEB);
        // It joins before the agent answers anybody.
        assert!(plugin.log().contains("Configure config=\"some: text\" runtime=berth"), "{}", plugin.log());
        let pod = Pod::run(&node, "pod");
        assert!(plugin.log().contains("RunPodSandbox pod=default/pod"), "{}", plugin.log());
        drop(pod);
        let started = || memory::processes(|_, _, command| command.contains("15-installed")).len();
        assert_eq!(started(), 1);
        node.finish();
        assert!(wait_until(SOON, || started() == 0));
    });
}
