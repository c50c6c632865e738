//! Stand-ins until berth-linux and berth-cgroup have these types. Not public.

/// Until `berth_cgroup::Cgroup` exists.
#[derive(Debug)]
pub struct Cgroup;

/// Until `berth_cgroup::Resources` exists.
pub type Resources = std::collections::BTreeMap<String, serde_json::Value>;
