//! Names, identity and small questions about a v1 Pod. Holds no state.

use std::fmt;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

/// Annotation: where the pod came from (`file`).
pub const CONFIG_SOURCE: &str = "kubernetes.io/config.source";
/// Annotation: hash of the whole document.
pub const CONFIG_HASH: &str = "kubernetes.io/config.hash";
/// Annotation: when the source first saw it.
pub const CONFIG_SEEN: &str = "kubernetes.io/config.seen";

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
