//! Pods that only the runtime knows: described from their labels, so that a worker can end them. Pure.

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

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
    let container = |name: &String| Container { name: name.clone(), ..Container::default() };
    pod.spec = Some(PodSpec {
        // Without an image: more than their names is not known.
        containers: listed.containers.iter().map(container).collect(),
        termination_grace_period_seconds: Some(listed.grace.unwrap_or(1)),
        ..PodSpec::default()
    });
    pod
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_without_its_spec_still_has_its_containers() {
        let listed = Listed { name: "web".into(), containers: ["a".into(), "b".into()].into(), ..Listed::default() };
        let pod = describe(&PodUid::new("u1").unwrap(), &listed);
        let names: Vec<&str> = pod::spec(&pod).containers.iter().map(|c| c.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
    }
}
