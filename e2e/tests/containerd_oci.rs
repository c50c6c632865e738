//! containerd with `berth oci` as its OCI runtime; with E2E_OCI_RUNTIME=/path/to/runc the peer, which proves the test.
#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command};

use berth_e2e::{SOON, image, output, text, tools, try_output};
use berth_testkit::{Sandbox, TempState, wait_until};

const WEB: &str = env!("CARGO_BIN_EXE_demo-web");

struct Containerd {
    dir: TempState,
    bin: PathBuf,
    child: Child,
}

impl Containerd {
    fn start() -> Self {
        let dir = TempState::new();
        let bin = tools::dir("containerd").expect("containerd is not in the tools' cache: run e2e/tools.sh");
        let at = |name: &str| dir.path().join(name).display().to_string();
        let config = format!(
            "version = 3\nroot = '{}'\nstate = '{}'\ndisabled_plugins = ['io.containerd.grpc.v1.cri', 'io.containerd.cri.v1.runtime', \
             'io.containerd.cri.v1.images']\n[grpc]\naddress = '{}'\n",
            at("root"),
            at("state"),
            at("containerd.sock")
        );
        let config = dir.file("config.toml", config);
        // BinaryName is one program: this one.
        let program = std::env::var("E2E_OCI_RUNTIME").unwrap_or_else(|_| format!("{} oci", tools::berth().display()));
        let runtime = dir.file("runtime", format!("#!/bin/sh\nexec {program} \"$@\"\n"));
        fs::set_permissions(&runtime, PermissionsExt::from_mode(0o755)).unwrap();
        let log = File::create(dir.path().join("log")).unwrap();
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new(bin.join("containerd"));
        command.arg("--config").arg(config).env("PATH", path).stdout(log.try_clone().unwrap()).stderr(log);
        let child = command.spawn().unwrap();
        let containerd = Self { dir, bin, child };
        let ready = wait_until(SOON, || try_output(&mut containerd.ctr(&["version"])).status.success());
        assert!(ready, "{}", fs::read_to_string(containerd.dir.path().join("log")).unwrap());
        containerd
    }

    fn ctr(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.bin.join("ctr"));
        command.arg("--address").arg(self.dir.path().join("containerd.sock")).args(arguments);
        command
    }

    fn run(&self, arguments: &[&str]) -> String {
        output(&mut self.ctr(arguments))
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn ctr_runs_execs_kills_and_deletes_a_container_by_berth_oci() {
    Sandbox::new().test(|| {
        let containerd = Containerd::start();
        let archive = image::archive(&containerd.dir, WEB.as_ref());
        containerd.run(&["images", "import", "--all-platforms", &archive.to_string_lossy()]);
        let runtime = containerd.dir.path().join("runtime").display().to_string();
        let run = |id: &str, flags: &[&str], command: &[&str]| {
            let mut all = vec!["run", "--runc-binary", runtime.as_str()];
            all.extend(flags);
            all.extend([image::BUSYBOX_IMAGE, id]);
            all.extend(command);
            try_output(&mut containerd.ctr(&all))
        };

        let once = run("once", &["--rm"], &["sh", "-c", "echo hello from $(hostname); exit 4"]);
        assert_eq!(text(&once.stdout).trim().split(' ').take(2).collect::<Vec<_>>(), ["hello", "from"], "{once:?}");
        assert_eq!(once.status.code(), Some(4), "{once:?}");

        let long = run("long", &["-d"], &["sleep", "1000"]);
        assert!(long.status.success(), "{long:?}");
        assert!(containerd.run(&["tasks", "ls"]).contains("RUNNING"));
        let uid = containerd.run(&["tasks", "exec", "--exec-id", "x1", "long", "id", "-u"]);
        assert_eq!(uid.trim(), "0");
        let failed = try_output(&mut containerd.ctr(&["tasks", "exec", "--exec-id", "x2", "long", "sh", "-c", "exit 6"]));
        assert_eq!(failed.status.code(), Some(6), "{failed:?}");
        assert!(containerd.run(&["tasks", "ps", "long"]).lines().count() >= 2);
        containerd.run(&["tasks", "kill", "-s", "SIGKILL", "long"]);
        assert!(wait_until(SOON, || containerd.run(&["tasks", "ls"]).contains("STOPPED")));
        let deleted = try_output(&mut containerd.ctr(&["tasks", "delete", "long"]));
        assert!(text(&deleted.stderr).contains("exit code 137"), "{deleted:?}");
        containerd.run(&["containers", "delete", "long"]);
        assert_eq!(containerd.run(&["containers", "ls", "-q"]).trim(), "");

        let wrong = run("wrong", &["--rm"], &["not-there"]);
        assert!(!wrong.status.success());
        assert!(text(&wrong.stderr).contains("executable file not found in $PATH"), "{wrong:?}");
    });
}
