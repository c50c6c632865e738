//! Debian's docker-registry on loopback, with the images of `e2e/mkimages`.

use std::fs::{self, File};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use berth_testkit::{TempState, wait_until};

use crate::{SOON, tools};

/// Where the registry listens.
pub const ADDRESS: &str = "127.0.0.1:5000";

/// A running registry; it ends when dropped.
pub struct Registry(Child);

impl Registry {
    /// Starts it and writes the folders of `certs` that mirror the public registries to it.
    ///
    /// # Panics
    /// When the images were not made or the registry does not start.
    #[must_use]
    pub fn start(state: &TempState, certs: &Path) -> Self {
        let images = tools::dir("images").expect("the images are not in the tools' cache: run e2e/tools.sh");
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}/registry}}}}\nhttp: {{addr: {ADDRESS}}}\n",
            images.display()
        );
        let config = state.file("registry.yml", config);
        let log = File::create(state.path().join("registry.log")).unwrap();
        let mut command = Command::new("docker-registry");
        let child = command.arg("serve").arg(config).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        for host in ["registry.k8s.io", "gcr.io", "docker.io"] {
            let hosts =
                format!("server = \"http://{ADDRESS}\"\n[host.\"http://{ADDRESS}\"]\n  capabilities = [\"pull\", \"resolve\"]\n");
            fs::create_dir_all(certs.join(host)).unwrap();
            fs::write(certs.join(host).join("hosts.toml"), hosts).unwrap();
        }
        assert!(wait_until(SOON, || TcpStream::connect(ADDRESS).is_ok()), "the registry does not start");
        Self(child)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
