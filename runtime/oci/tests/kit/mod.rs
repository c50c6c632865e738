//! What the kernel tests of this crate share: a bundle with a busybox root, and the command line as a program.
#![allow(dead_code, missing_docs)]

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use berth_oci::spec::{Capabilities, Linux, Mount, Namespace, NamespaceType, Process, Root, Spec};
use berth_testkit::TempState;
use berth_testkit::rootfs::busybox_rootfs;

pub const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program that is built next to this test.
pub fn example(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("own path");
    own.parent().and_then(|deps| deps.parent()).expect("target folder").join("examples").join(name)
}

pub struct Bundle {
    pub temp: TempState,
    pub spec: Spec,
    /// The command line's program.
    pub program: PathBuf,
}

pub fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        destination: destination.into(),
        kind: kind.into(),
        source: source.into(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..Mount::default()
    }
}

pub fn namespace(kind: NamespaceType) -> Namespace {
    Namespace { kind, path: String::new() }
}

pub fn capabilities(names: &[&str]) -> Capabilities {
    let set: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    Capabilities { bounding: set.clone(), effective: set.clone(), permitted: set, ..Capabilities::default() }
}

impl Bundle {
    /// A bundle that runs a shell script with the mounts, namespaces and capabilities that containers usually have.
    pub fn new(script: &str) -> Self {
        let temp = TempState::new();
        busybox_rootfs(&temp.dir("b/rootfs"));
        let spec = Spec {
            oci_version: "1.2.0".into(),
            process: Some(Process {
                args: vec!["sh".into(), "-c".into(), script.into()],
                env: vec![PATH.into()],
                cwd: "/".into(),
                capabilities: Some(capabilities(&["CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_DAC_OVERRIDE"])),
                ..Process::default()
            }),
            root: Some(Root { path: "rootfs".into(), readonly: false }),
            mounts: vec![
                mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
                mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
                mount(
                    "/dev/pts",
                    "devpts",
                    "devpts",
                    &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
                ),
                mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            ],
            linux: Linux {
                namespaces: [
                    NamespaceType::Pid,
                    NamespaceType::Network,
                    NamespaceType::Ipc,
                    NamespaceType::Uts,
                    NamespaceType::Mount,
                    NamespaceType::Cgroup,
                ]
                .map(namespace)
                .to_vec(),
                ..Linux::default()
            },
            ..Spec::default()
        };
        Self { temp, spec, program: example("berth-oci") }
    }

    pub fn process(&mut self) -> &mut Process {
        self.spec.process.as_mut().expect("a process")
    }

    pub fn rootfs(&self) -> PathBuf {
        self.temp.path().join("b/rootfs")
    }

    pub fn write(&self) {
        let text = serde_json::to_vec_pretty(&self.spec).expect("spec");
        self.temp.file("b/config.json", text);
    }

    /// The command line with this bundle's state folder.
    pub fn oci(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(self.temp.path().join("state")).args(args);
        command.stdin(Stdio::null()).current_dir(self.temp.path().join("b"));
        command
    }

    pub fn output(&self, args: &[&str]) -> Output {
        self.oci(args).output().expect("run berth-oci")
    }

    /// What a command that must succeed prints.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.output(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A command that must succeed and leaves a process behind that keeps the standard streams: they are this file's.
    pub fn detached(&self, args: &[&str]) -> String {
        let path = self.temp.path().join("streams");
        let file = std::fs::File::create(&path).expect("streams");
        let mut command = self.oci(args);
        command.stdout(file.try_clone().expect("streams")).stderr(file);
        let status = command.status().expect("run berth-oci");
        let text = std::fs::read_to_string(&path).expect("streams");
        assert!(status.success(), "{args:?}: {text}");
        text
    }

    /// What a command that must fail says.
    pub fn fails(&self, args: &[&str]) -> String {
        let output = self.output(args);
        assert!(!output.status.success(), "{args:?} succeeded: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// Runs the container and returns what it prints. It must exit with 0.
    pub fn run(&self) -> String {
        self.write();
        self.ok(&["run", "c"])
    }

    /// Runs it where it must fail; returns the error.
    pub fn run_fails(&self) -> String {
        self.write();
        self.fails(&["run", "c"])
    }

    /// The pid of a container, from its state.
    pub fn pid(&self, id: &str) -> i32 {
        let state: serde_json::Value = serde_json::from_str(&self.ok(&["state", id])).expect("state");
        state["pid"].as_i64().expect("pid") as i32
    }

    pub fn status(&self, id: &str) -> String {
        let state: serde_json::Value = serde_json::from_str(&self.ok(&["state", id])).expect("state");
        state["status"].as_str().expect("status").to_owned()
    }

    /// Runs it through the library's interface. `more`: further fields of the request.
    pub fn launch(&self, more: serde_json::Value) -> Output {
        let mut request = serde_json::json!({ "spec": self.spec });
        for (key, value) in more.as_object().expect("an object") {
            request[key] = value.clone();
        }
        request["spec"]["root"]["path"] = self.rootfs().to_string_lossy().into();
        let path = self.temp.file("request.json", request.to_string());
        Command::new(example("launch")).arg(path).stdin(Stdio::null()).output().expect("run launch")
    }

    pub fn launch_ok(&self, more: serde_json::Value) -> String {
        let output = self.launch(more);
        assert!(output.status.success(), "{:?} {}", output.status, String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

/// The value behind a name in the form of /proc/self/status.
pub fn field<'a>(text: &'a str, name: &str) -> &'a str {
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .unwrap_or_else(|| panic!("no {name} in {text}"))
        .trim()
}

/// What a foreign tool prints.
pub fn tool(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
