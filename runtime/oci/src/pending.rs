//! Stand-ins until berth-linux and berth-cgroup have these types. Not public.

/// Until `berth_linux::ns::NamespaceKind` exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum NamespaceKind { Net, Ipc, Uts, Pid, Mount, User, Cgroup, Time }

/// Until `berth_cgroup::Cgroup` exists.
#[derive(Debug)]
pub struct Cgroup;

/// Until `berth_cgroup::Resources` exists.
pub type Resources = std::collections::BTreeMap<String, serde_json::Value>;
