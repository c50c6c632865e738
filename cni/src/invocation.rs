//! One call of a plugin: the verb and the parameters that the protocol passes in the environment.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use crate::plugins::host_local::Owner;

/// A command of the plugin protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Add,
    Del,
    Check,
    Status,
    Gc,
    Version,
}

impl Verb {
    pub(crate) const ALL: [Self; 6] = [Self::Add, Self::Del, Self::Check, Self::Status, Self::Gc, Self::Version];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Status => "STATUS",
            Self::Gc => "GC",
            Self::Version => "VERSION",
        }
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whose interface is added, deleted or checked.
#[derive(Debug, Clone)]
pub(crate) struct Invocation {
    pub container_id: String,
    pub ifname: String,
    /// The namespace; none where it is gone.
    pub netns: Option<Arc<OwnedFd>>,
    /// Its path, for external plugins and for the results.
    pub netns_path: Option<PathBuf>,
    /// `CNI_ARGS`, in order.
    pub args: Vec<(String, String)>,
}

impl Invocation {
    pub(crate) fn owner(&self) -> Owner {
        Owner { container_id: self.container_id.clone(), ifname: self.ifname.clone() }
    }

    /// `K=V;K=V`
    pub(crate) fn args_text(&self) -> String {
        self.args.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(";")
    }

    /// What results call the namespace: its path, or the container where there is none.
    pub(crate) fn sandbox(&self) -> String {
        self.netns_path.as_ref().map_or_else(|| self.container_id.clone(), |path| path.display().to_string())
    }
}
