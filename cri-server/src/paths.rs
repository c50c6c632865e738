//! Where things are: every path under the root and state folders, in one place.

use std::path::{Path, PathBuf};

use crate::id::{ContainerId, SandboxId};

/// The folders of an instance.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    root: PathBuf,
    state: PathBuf,
}

impl Paths {
    pub(crate) fn new(root: &Path, state: &Path) -> Self {
        Self { root: root.into(), state: state.into() }
    }

    /// Durable identity of sandboxes.
    pub(crate) fn kept_sandboxes(&self) -> PathBuf {
        self.root.join("sandboxes")
    }

    /// Durable identity of one sandbox.
    pub(crate) fn kept_sandbox(&self, id: &SandboxId) -> PathBuf {
        self.kept_sandboxes().join(id.as_str())
    }

    /// Durable identity and writable layers of containers.
    pub(crate) fn kept_containers(&self) -> PathBuf {
        self.root.join("containers")
    }

    /// One container: record, `upper`, `work`.
    pub(crate) fn kept_container(&self, id: &ContainerId) -> PathBuf {
        self.kept_containers().join(id.as_str())
    }

    /// Folders on their way out, on the same file system as the containers.
    pub(crate) fn trash(&self) -> PathBuf {
        self.root.join("trash")
    }

    /// Per-boot folders of sandboxes.
    pub(crate) fn live_sandboxes(&self) -> PathBuf {
        self.state.join("sandboxes")
    }

    /// Per-boot folder of one sandbox: socket, exit records, the files it adds to containers.
    pub(crate) fn live_sandbox(&self, id: &SandboxId) -> PathBuf {
        self.live_sandboxes().join(id.as_str())
    }

    /// The shim's socket.
    pub(crate) fn socket(&self, id: &SandboxId) -> PathBuf {
        self.live_sandbox(id).join("shim.sock")
    }

    /// Per-boot folder of one container: its record and OCI spec.
    pub(crate) fn live_container(&self, sandbox: &SandboxId, id: &ContainerId) -> PathBuf {
        self.live_sandbox(sandbox).join("containers").join(id.as_str())
    }

    /// The OCI spec a container was made from.
    pub(crate) fn oci_spec(&self, sandbox: &SandboxId, id: &ContainerId) -> PathBuf {
        self.live_container(sandbox, id).join("config.json")
    }

    /// The exit record that the shim writes.
    pub(crate) fn exit_record(&self, sandbox: &SandboxId, id: &ContainerId) -> PathBuf {
        self.live_sandbox(sandbox).join(format!("{id}.exit"))
    }

    /// Where the network keeps what dies with the boot.
    pub(crate) fn network_state(&self) -> PathBuf {
        self.state.join("network")
    }

    /// Where the network keeps cached results.
    pub(crate) fn network_cache(&self) -> PathBuf {
        self.root.join("network")
    }

    /// Our AppArmor profile, as it was loaded.
    pub(crate) fn apparmor(&self) -> PathBuf {
        self.state.join("apparmor")
    }

    /// The image store.
    pub(crate) fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// The shim as a file, where memfds may not be executed.
    pub(crate) fn shim_folder(&self) -> PathBuf {
        self.root.join("shim")
    }
}

/// The record file in a folder.
pub(crate) fn record(folder: &Path) -> PathBuf {
    folder.join("record.json")
}
