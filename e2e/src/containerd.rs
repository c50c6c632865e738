//! A containerd of our own making: as the caller of `berth oci`, and as a CRI server under `berth kubelet`.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command};

use berth_testkit::{TempState, wait_until};

use crate::crictl::Crictl;
use crate::{SOON, output, tools, try_output};

/// A running containerd; it ends when dropped, its containers do not.
pub struct Containerd {
    /// The folder that holds everything of it.
    pub dir: TempState,
    bin: PathBuf,
    child: Child,
}

const NETWORK: &str = r#"{"cniVersion": "1.0.0", "name": "test", "plugins": [
  {"type": "bridge", "bridge": "peer0", "isGateway": true, "ipMasq": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.88.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}"#;

impl Containerd {
    /// Starts containerd. `runtime` is the command line of its OCI runtime, e.g. `/usr/sbin/runc` or `/bin/berth oci`.
    ///
    /// # Panics
    /// When the tools were not built or containerd does not start.
    #[must_use]
    pub fn start(runtime: &str) -> Self {
        let dir = TempState::new();
        let bin = tools::dir("containerd").expect("containerd is not in the tools' cache: run e2e/tools.sh");
        let at = |name: &str| dir.path().join(name).display().to_string();
        // BinaryName is one program: this one.
        let program = dir.file("runtime", format!("#!/bin/sh\nexec {runtime} \"$@\"\n"));
        fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        dir.file("net.d/10-test.conflist", NETWORK);
        let config = dir.file("config.toml", config(&at));
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

    /// Its socket, also of its CRI.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("containerd.sock")
    }

    /// The program that calls the runtime.
    #[must_use]
    pub fn runtime(&self) -> String {
        self.dir.path().join("runtime").display().to_string()
    }

    /// A ctr command, not run yet.
    #[must_use]
    pub fn ctr(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.bin.join("ctr"));
        command.arg("--address").arg(self.socket()).args(arguments);
        command
    }

    /// Runs ctr and returns what it printed.
    pub fn run(&self, arguments: &[&str]) -> String {
        output(&mut self.ctr(arguments))
    }

    /// crictl on its CRI.
    #[must_use]
    pub fn crictl(&self) -> Crictl {
        Crictl::new(&self.socket())
    }
}

fn config(at: &dyn Fn(&str) -> String) -> String {
    format!(
        "version = 3\nroot = '{}'\nstate = '{}'\n[grpc]\naddress = '{}'\n\
         [plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '{}'\n\
         [plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = 'registry.k8s.io/pause:3.10'\n\
         [plugins.'io.containerd.cri.v1.runtime']\nrestrict_oom_score_adj = true\n\
         [plugins.'io.containerd.cri.v1.runtime'.cni]\nbin_dirs = ['/usr/lib/cni', '/opt/cni/bin']\nconf_dir = '{}'\n\
         [plugins.'io.containerd.cri.v1.runtime'.containerd]\ndefault_runtime_name = 'runc'\n\
         [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n\
         [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]\nBinaryName = '{}'\n",
        at("root"),
        at("state"),
        at("containerd.sock"),
        at("certs.d"),
        at("net.d"),
        at("runtime")
    )
}

impl Drop for Containerd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
