//! Pods that only the runtime knows: described from their labels, so that a worker can end them.

use k8s_openapi::api::core::v1::{Pod, PodSpec};

use crate::cri::{Runtime, keys};
use crate::pod::{self, PodUid};

/// The pod as far as labels and annotations tell; `None` when there is nothing (any more).
pub async fn describe(runtime: &Runtime, uid: &PodUid) -> Option<Pod> {
    let sandboxes = runtime.list_pod_sandboxes(Some(uid.as_str())).await.ok()?;
    let containers = runtime.list_containers(Some(uid.as_str())).await.ok()?;
    let labels = sandboxes.first().map(|s| &s.labels).or(containers.first().map(|c| &c.labels))?;
    let grace = containers.iter().filter_map(|c| c.annotations.get(keys::GRACE)?.parse::<i64>().ok()).max();
    let mut pod = Pod::default();
    pod.metadata.name = labels.get(keys::POD_NAME).cloned();
    pod.metadata.namespace = labels.get(keys::POD_NAMESPACE).cloned();
    pod.metadata.uid = Some(uid.as_str().to_owned());
    let source = sandboxes.iter().find_map(|s| s.annotations.get(pod::CONFIG_SOURCE).cloned());
    pod.metadata.annotations = source.map(|source| [(pod::CONFIG_SOURCE.to_owned(), source)].into());
    pod.spec = Some(PodSpec { termination_grace_period_seconds: Some(grace.unwrap_or(1)), ..PodSpec::default() });
    Some(pod)
}
