//! Names, identity and small questions about a v1 Pod. Holds no state.

use std::borrow::Cow;
use std::fmt;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

/// Annotation: where the pod came from (`file`).
pub const CONFIG_SOURCE: &str = "kubernetes.io/config.source";
/// Annotation: hash of the whole document.
pub const CONFIG_HASH: &str = "kubernetes.io/config.hash";
/// Annotation: when the source first saw it.
pub const CONFIG_SEEN: &str = "kubernetes.io/config.seen";

/// Annotation of a pod in the API that only shows a static pod of a node: the static pod's hash.
pub const CONFIG_MIRROR: &str = "kubernetes.io/config.mirror";

/// A pod's UID: one worker, one set of folders, one cgroup each.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PodUid(String);

impl PodUid {
    /// From text that is not empty and can be a folder name.
    pub fn new(text: &str) -> Option<PodUid> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_' || c == '.';
        (!text.is_empty() && text.len() <= 128 && text.chars().all(plain) && !text.starts_with('.'))
            .then(|| PodUid(text.to_owned()))
    }

    /// The UID of a pod.
    pub fn of(pod: &Pod) -> Option<PodUid> {
        PodUid::new(pod.metadata.uid.as_deref()?)
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PodUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Namespace and name: at most one running pod has them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FullName {
    /// The namespace.
    pub namespace: String,
    /// The name.
    pub name: String,
}

impl FullName {
    /// The full name of a pod.
    pub fn of(pod: &Pod) -> FullName {
        FullName { namespace: namespace(pod).to_owned(), name: name(pod).to_owned() }
    }
}

impl fmt::Display for FullName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// The pod's name, empty when it has none.
pub fn name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

/// The pod's namespace, `default` when it has none.
pub fn namespace(pod: &Pod) -> &str {
    pod.metadata.namespace.as_deref().unwrap_or("default")
}

/// The pod's UID as text, empty when it has none.
pub fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

/// `<name>_<namespace>(<uid>)`, as the kubelet's messages have it.
pub fn format_pod(pod: &Pod) -> String {
    format!("{}_{}({})", name(pod), namespace(pod), uid(pod))
}

/// The spec; an empty one when there is none (validation refuses such pods).
pub fn spec(pod: &Pod) -> &PodSpec {
    static EMPTY: std::sync::LazyLock<PodSpec> = std::sync::LazyLock::new(PodSpec::default);
    pod.spec.as_ref().unwrap_or(&EMPTY)
}

/// Init containers in order.
pub fn init_containers(pod: &Pod) -> &[Container] {
    spec(pod).init_containers.as_deref().unwrap_or_default()
}

/// All containers that a manifest can name, init containers first.
pub fn all_containers(pod: &Pod) -> impl Iterator<Item = &Container> {
    init_containers(pod).iter().chain(&spec(pod).containers)
}

/// Whether an init container is a sidecar: it is started in its turn and then runs as long as the pod.
pub fn is_sidecar(init: &Container) -> bool {
    init.restart_policy.as_deref() == Some("Always")
}

/// The sidecars in order.
pub fn sidecars(pod: &Pod) -> impl Iterator<Item = &Container> {
    init_containers(pod).iter().filter(|container| is_sidecar(container))
}

/// Whether the pod shares the host's network.
pub fn is_host_network(pod: &Pod) -> bool {
    spec(pod).host_network == Some(true)
}

/// Whether the pod comes from a source of this node, not from the API.
pub fn is_static(pod: &Pod) -> bool {
    annotation(pod, CONFIG_SOURCE).is_some_and(|source| source != "api")
}

/// An annotation's value.
pub fn annotation<'a>(pod: &'a Pod, key: &str) -> Option<&'a str> {
    pod.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

/// The grace period of the pod's termination, in seconds.
pub fn grace_seconds(pod: &Pod) -> i64 {
    spec(pod).termination_grace_period_seconds.unwrap_or(30)
}

/// The same once somebody has asked for its deletion: what was asked for counts.
pub fn deletion_grace_seconds(pod: &Pod) -> i64 {
    pod.metadata.deletion_grace_period_seconds.unwrap_or_else(|| grace_seconds(pod))
}

/// Whether somebody has asked the API server for the pod's deletion.
pub fn is_deleting(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// Containers that somebody has added to the running pod to look into it, as containers: they have the same fields.
pub fn ephemeral_containers(pod: &Pod) -> impl Iterator<Item = Container> {
    let as_container = |container| serde_json::from_value(serde_json::to_value(container).ok()?).ok();
    spec(pod).ephemeral_containers.iter().flatten().filter_map(as_container)
}

/// Whether this is the name of a container that was added to the running pod.
pub fn is_ephemeral(pod: &Pod, name: &str) -> bool {
    spec(pod).ephemeral_containers.iter().flatten().any(|container| container.name == name)
}

/// The container of this name, whatever its kind.
pub fn container<'a>(pod: &'a Pod, name: &str) -> Option<Cow<'a, Container>> {
    let found = all_containers(pod).find(|container| container.name == name).map(Cow::Borrowed);
    found.or_else(|| ephemeral_containers(pod).find(|container| container.name == name).map(Cow::Owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uid_can_be_a_folder_name() {
        for (text, ok) in [("0a1b", true), ("a-b", true), ("", false), ("a/b", false), ("..", false), (".", false)] {
            assert_eq!(PodUid::new(text).is_some(), ok, "{text}");
        }
    }
}
