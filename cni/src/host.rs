//! What plugins that run in this process work with.

use std::path::PathBuf;

use crate::doing::Underway;
use crate::exec::PluginBinaries;
use crate::kernel::Worker;
use crate::names::Names;
use crate::reaper::Reaper;

/// How links are deleted.
#[derive(Debug, Clone)]
pub(crate) enum Deletion {
    /// In batches, later: inside the agent.
    Deferred(Reaper),
    /// At once: in a plugin binary, which ends.
    AtOnce,
}

/// The surroundings of a plugin: names, folders, the kernel.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    pub worker: Worker,
    pub names: Names,
    pub binaries: PluginBinaries,
    pub deletion: Deletion,
    /// Where leases are when the configuration does not say.
    pub lease_dir: PathBuf,
    pub boot_id: String,
    /// Which plugin runs for whom.
    pub doing: Underway,
}

impl Host {
    /// Whether this is the agent of an instance, and not a plugin binary.
    pub(crate) fn is_agent(&self) -> bool {
        matches!(self.deletion, Deletion::Deferred(_))
    }
}
