//! Pods that only the runtime knows: described from their labels, so that a worker can end them. Pure.

use k8s_openapi::api::core::v1::{Pod, PodSpec};

use crate::observed::Listed;
use crate::pod::{self, PodUid};

/// The pod as far as labels and annotations tell. Its grace is its own where a container tells it.
pub fn describe(uid: &PodUid, listed: &Listed) -> Pod {
    let mut pod = Pod::default();
    pod.metadata.name = Some(listed.name.clone());
    pod.metadata.namespace = Some(listed.namespace.clone());
    pod.metadata.uid = Some(uid.as_str().to_owned());
    let source = listed.source.clone();
    pod.metadata.annotations = source.map(|source| [(pod::CONFIG_SOURCE.to_owned(), source)].into());
    pod.spec = Some(PodSpec { termination_grace_period_seconds: Some(listed.grace.unwrap_or(1)), ..PodSpec::default() });
    pod
}
