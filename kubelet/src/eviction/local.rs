//! Limits that a pod sets itself for what it keeps on the node's disk. Pure.

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::rank::PodUsage;
use crate::pod;
use crate::quantity::Amount;
use crate::resources::limit;

const RESOURCE: &str = "ephemeral-storage";

/// Whether the pod limits anything that is on disk.
pub fn has_limits(pod: &Pod) -> bool {
    let volumes = pod::spec(pod).volumes.iter().flatten().filter_map(|volume| volume.empty_dir.as_ref());
    let sized = volumes.filter(|dir| dir.medium.as_deref().unwrap_or_default().is_empty()).any(|dir| dir.size_limit.is_some());
    sized || containers(pod).any(|container| limit(container, RESOURCE).is_some())
}

fn containers(pod: &Pod) -> impl Iterator<Item = &k8s_openapi::api::core::v1::Container> {
    pod::init_containers(pod).iter().chain(&pod::spec(pod).containers)
}

/// A limit that is exceeded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exceeded {
    /// As metrics call the limit, in the upstream's words.
    pub signal: &'static str,
    /// For users.
    pub message: String,
}

/// Why the pod has to go, in the upstream's words; `volumes` are its emptyDir volumes on disk with their bytes and limits.
pub fn exceeded(usage: &PodUsage, volumes: &[(String, i64, Option<Quantity>)]) -> Option<Exceeded> {
    let exceeded = |signal, message| Some(Exceeded { signal, message });
    for (name, used, limit) in volumes {
        if let Some(limit) = limit.as_ref().filter(|limit| *used > Amount::of(limit).units()) {
            let message = format!("Usage of EmptyDir volume {name:?} exceeds the limit {:?}. ", limit.0);
            return exceeded("emptydirfs.limit", message);
        }
    }
    let limits: Vec<Amount> =
        pod::spec(&usage.pod).containers.iter().filter_map(|container| limit(container, RESOURCE)).collect();
    let total: Amount = limits.iter().copied().sum();
    let all_limited = limits.len() == pod::spec(&usage.pod).containers.len();
    if all_limited && !total.is_zero() && usage.disk > total.units() {
        let shown = super::threshold::binary(total.units());
        let message = format!("Pod ephemeral local storage usage exceeds the total limit of containers {shown}. ");
        return exceeded("ephemeralpodfs.limit", message);
    }
    for container in containers(&usage.pod) {
        let Some(limit) = limit(container, RESOURCE) else { continue };
        let used = usage.containers.iter().find(|other| other.name == container.name).map_or(0, |other| other.disk);
        if used > limit.units() {
            let shown = super::threshold::binary(limit.units());
            let message = format!("Container {} exceeded its local ephemeral storage limit {shown:?}. ", container.name);
            return exceeded("ephemeralcontainerfs.limit", message);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::eviction::rank::ContainerUsage;
    use crate::source::{defaults::apply_defaults, parse::parse_manifest};

    fn pod(spec: &str) -> Arc<Pod> {
        let text = format!("{{apiVersion: v1, kind: Pod, metadata: {{name: a}}, spec: {spec}}}");
        let mut pod = parse_manifest(&text).unwrap().pods.remove(0).pod;
        apply_defaults(&mut pod);
        Arc::new(pod)
    }

    #[test]
    fn what_is_over_its_own_limit_is_named() {
        let limited = "{name: c, image: i, resources: {limits: {ephemeral-storage: 10Mi}}}";
        let one = pod(&format!("{{containers: [{limited}]}}"));
        let two = pod(&format!("{{containers: [{limited}, {{name: d, image: i}}]}}"));
        let volume = pod("{containers: [{name: c, image: i}], volumes: [{name: v, emptyDir: {sizeLimit: 5Mi}}]}");
        let free = pod("{containers: [{name: c, image: i}], volumes: [{name: v, emptyDir: {}}]}");
        assert_eq!([&one, &two, &volume, &free].map(|pod| has_limits(pod)), [true, true, true, false]);
        let usage = |pod: &Arc<Pod>, disk: i64, of_c: i64| PodUsage {
            pod: pod.clone(),
            disk: disk << 20,
            containers: vec![ContainerUsage { name: "c".into(), disk: of_c << 20, ..Default::default() }],
            ..Default::default()
        };
        let dir = |mib: i64| vec![("v".to_owned(), mib << 20, Some(Quantity("5Mi".into())))];
        for (usage, volumes, expected) in [
            (usage(&one, 10, 10), vec![], None),
            (usage(&one, 11, 9), vec![], Some("Pod ephemeral local storage usage exceeds the total limit of containers 10Mi. ")),
            (usage(&two, 50, 9), vec![], None),
            (usage(&two, 50, 11), vec![], Some("Container c exceeded its local ephemeral storage limit \"10Mi\". ")),
            (usage(&volume, 6, 0), dir(6), Some("Usage of EmptyDir volume \"v\" exceeds the limit \"5Mi\". ")),
            (usage(&volume, 5, 0), dir(5), None),
        ] {
            assert_eq!(exceeded(&usage, &volumes).map(|e| e.message).as_deref(), expected);
        }
    }
}
