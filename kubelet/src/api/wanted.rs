//! Which objects a pod of the API refers to: those that are followed while it is on this node, and those that one step of a pass
//! looks up. Pure.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{Container, PersistentVolume, Pod};

use crate::objects::ObjectName;
use crate::pod;
use crate::pod_objects::Need;
use crate::source::references::references;
use crate::volume::{self, payload};

/// The kinds that are followed. Claims and volumes are asked for once, and PriorityClasses are the API server's own business.
const FOLLOWED: [&str; 3] = ["ConfigMap", "Secret", "RuntimeClass"];

/// The CSI driver's own object.
pub(super) fn csi_driver(name: &str) -> ObjectName {
    ObjectName { kind: "CSIDriver", namespace: String::new(), name: name.to_owned() }
}

fn secret(namespace: &str, name: &str) -> ObjectName {
    ObjectName { kind: "Secret", namespace: namespace.to_owned(), name: name.to_owned() }
}

/// Every name that the pod's spec has, with the field that has it.
fn named(pod: &Pod) -> Vec<(String, ObjectName)> {
    let references = references(pod).into_iter().filter(|reference| FOLLOWED.contains(&reference.object.kind));
    let mut found: Vec<(String, ObjectName)> = references.map(|reference| (reference.path, reference.object)).collect();
    for (i, volume) in pod::spec(pod).volumes.iter().flatten().enumerate() {
        let Some(source) = &volume.csi else { continue };
        let path = format!("spec.volumes[{i}].csi");
        if let Some(reference) = &source.node_publish_secret_ref {
            found.push((path.clone(), secret(pod::namespace(pod), &reference.name)));
        }
        found.push((path, csi_driver(&source.driver)));
    }
    found
}

/// What is followed for the pod.
pub(super) fn followed(pod: &Pod) -> BTreeSet<ObjectName> {
    named(pod).into_iter().map(|(_, object)| object).collect()
}

/// What a step looks up.
pub(super) fn needed(pod: &Pod, need: Need<'_>) -> BTreeSet<ObjectName> {
    let prefix = match need {
        Need::Volumes | Need::VolumesAgain => "spec.volumes[".to_owned(),
        Need::RuntimeClass => "spec.runtimeClassName".to_owned(),
        Need::PullSecrets => "spec.imagePullSecrets[".to_owned(),
        Need::Environment(container) => {
            let spec = pod::spec(pod);
            let place = |list: &[Container]| list.iter().position(|c| c.name == container.name);
            let ephemeral = || spec.ephemeral_containers.iter().flatten().position(|c| c.name == container.name);
            match (place(&spec.containers), place(pod::init_containers(pod))) {
                (Some(i), _) => format!("spec.containers[{i}]."),
                (None, Some(i)) => format!("spec.initContainers[{i}]."),
                (None, None) => ephemeral().map_or_else(|| "-".to_owned(), |i| format!("spec.ephemeralContainers[{i}].")),
            }
        }
    };
    named(pod).into_iter().filter(|(path, _)| path.starts_with(&prefix)).map(|(_, object)| object).collect()
}

/// What is followed for a PersistentVolume of the pod: its driver, and the Secrets that its calls are made with.
pub(super) fn of_volume(volume: &PersistentVolume) -> BTreeSet<ObjectName> {
    let Some(source) = volume.spec.as_ref().and_then(|spec| spec.csi.as_ref()) else { return BTreeSet::new() };
    let secrets = [&source.node_stage_secret_ref, &source.node_publish_secret_ref].into_iter().flatten();
    let secrets = secrets.map(|r| secret(r.namespace.as_deref().unwrap_or_default(), r.name.as_deref().unwrap_or_default()));
    secrets.chain([csi_driver(&source.driver)]).collect()
}

/// Audience and life of each token that the pod's mounted volumes show.
pub(super) fn tokens(pod: &Pod) -> BTreeSet<(String, i64)> {
    let projected = volume::used(pod).into_iter().filter_map(|volume| volume.projected.as_ref());
    let parts = projected.flat_map(|source| source.sources.iter().flatten());
    let wanted = parts.filter_map(|part| part.service_account_token.as_ref()).map(payload::wanted_token);
    wanted.map(|(audience, seconds)| (audience.to_owned(), seconds)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod() -> Pod {
        serde_json::from_value(serde_json::json!({"metadata": {"name": "a", "namespace": "ns", "uid": "u"}, "spec": {
            "runtimeClassName": "vm", "priorityClassName": "high", "imagePullSecrets": [{"name": "pull"}],
            "initContainers": [{"name": "i", "envFrom": [{"secretRef": {"name": "first"}}]}],
            "containers": [
                {"name": "c", "env": [{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "m", "key": "k"}}}],
                 "volumeMounts": [{"name": "api", "mountPath": "/a"}]},
                {"name": "d"}],
            "volumes": [
                {"name": "v", "csi": {"driver": "disk.example", "nodePublishSecretRef": {"name": "login"}}},
                {"name": "unused", "projected": {"sources": [{"serviceAccountToken": {"path": "t", "audience": "other"}}]}},
                {"name": "api", "projected": {"sources": [
                    {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
                    {"serviceAccountToken": {"path": "vault", "audience": "vault", "expirationSeconds": 600}},
                    {"configMap": {"name": "kube-root-ca.crt"}}]}}]}}))
        .unwrap()
    }

    fn texts(names: BTreeSet<ObjectName>) -> Vec<String> {
        names.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn each_step_waits_for_what_it_looks_up_and_all_of_it_is_followed() {
        let pod = pod();
        let volumes = ["CSIDriver disk.example", "ConfigMap ns/kube-root-ca.crt", "Secret ns/login"];
        assert_eq!(texts(needed(&pod, Need::Volumes)), volumes);
        let of = |i: usize| texts(needed(&pod, Need::Environment(pod::all_containers(&pod).nth(i).unwrap())));
        assert_eq!((of(0), of(1), of(2)), (vec!["Secret ns/first".to_owned()], vec!["ConfigMap ns/m".to_owned()], Vec::new()));
        assert_eq!(texts(needed(&pod, Need::RuntimeClass)), ["RuntimeClass vm"]);
        assert_eq!(texts(needed(&pod, Need::PullSecrets)), ["Secret ns/pull"]);
        assert_eq!(
            texts(followed(&pod)),
            [
                "CSIDriver disk.example",
                "ConfigMap ns/kube-root-ca.crt",
                "ConfigMap ns/m",
                "RuntimeClass vm",
                "Secret ns/first",
                "Secret ns/login",
                "Secret ns/pull"
            ],
            "the priority class is the API server's own business"
        );
    }

    #[test]
    fn only_tokens_of_mounted_volumes_are_asked_for() {
        assert_eq!(tokens(&pod()), [(String::new(), 3607), ("vault".to_owned(), 600)].into());
    }

    #[test]
    fn a_volumes_driver_and_secrets_are_followed_too() {
        let volume = serde_json::json!({"spec": {"csi": {"driver": "d", "volumeHandle": "h",
            "nodeStageSecretRef": {"name": "s", "namespace": "system"}, "controllerPublishSecretRef": {"name": "c", "namespace": "system"}}}});
        let volume: PersistentVolume = serde_json::from_value(volume).unwrap();
        assert_eq!(texts(of_volume(&volume)), ["CSIDriver d", "Secret system/s"]);
        assert!(of_volume(&PersistentVolume::default()).is_empty());
    }
}
