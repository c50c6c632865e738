//! Which PersistentVolume a pod's claim has: a control plane has bound it, the node asks and believes nothing that does not fit
//! together. Asks once for each claim of a pod; holds nothing.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use kube::{Api, Client};

use super::follow::trim;
use crate::pod;

/// The limit of a request: a step of a pass waits for it.
const REQUEST: Duration = Duration::from_secs(10);

/// A claim of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Claim {
    /// Its name.
    pub(super) name: String,
    /// It has been made for the pod, which has to own it.
    pub(super) generated: bool,
}

/// The name of the claim's volume. The error is the kubelet's message.
fn volume_name<'a>(claim: &'a PersistentVolumeClaim, pod: &Pod, generated: bool) -> Result<&'a str, String> {
    let name = claim.metadata.name.as_deref().unwrap_or_default();
    let mut owners = claim.metadata.owner_references.iter().flatten();
    if generated && !owners.any(|owner| owner.uid == pod::uid(pod) && owner.controller == Some(true)) {
        let pod = format!("{}/{}", pod::namespace(pod), pod::name(pod));
        return Err(format!("PVC {name} was not created for pod {pod} (pod is not owner)"));
    }
    if claim.metadata.deletion_timestamp.is_some() {
        return Err("PVC is being deleted".to_owned());
    }
    let spec = claim.spec.as_ref();
    if spec.and_then(|s| s.volume_mode.as_deref()) == Some("Block") {
        return Err("PVC is for a block volume, which berth does not support".to_owned());
    }
    let bound = claim.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Bound");
    let volume = spec.and_then(|s| s.volume_name.as_deref()).unwrap_or_default();
    if !bound || volume.is_empty() {
        return Err("PVC is not bound".to_owned());
    }
    Ok(volume)
}

/// Whether the volume is the claim's. The error is the kubelet's message.
fn belongs(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> Result<(), String> {
    let name = volume.metadata.name.as_deref().unwrap_or_default();
    let Some(reference) = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref()) else {
        return Err(format!("found PV object {name} with no claimRef: it is not bound to the claim yet"));
    };
    let (held, wanted) = (reference.uid.as_deref().unwrap_or_default(), claim.metadata.uid.as_deref().unwrap_or_default());
    match held == wanted {
        true => Ok(()),
        false => Err(format!("found PV object {name} whose claimRef.uid {held:?} is not the claim's {wanted:?}")),
    }
}

/// Waits for an answer; the error is the upstream's words, or that there is none.
pub(super) async fn answer<T>(asked: impl Future<Output = kube::Result<T>>) -> Result<T, String> {
    match tokio::time::timeout(REQUEST, asked).await {
        Ok(answered) => answered.map_err(|error| super::message(&error)),
        Err(_) => Err("the API server does not answer".to_owned()),
    }
}

/// The volume of a pod's claim. The error is the kubelet's message.
pub(super) async fn bound(client: &Client, pod: &Pod, claim: &Claim) -> Result<Arc<PersistentVolume>, String> {
    let namespace = pod::namespace(pod);
    let failed = |why: String| format!("error processing PVC {namespace}/{}: {why}", claim.name);
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), namespace);
    let found = answer(claims.get(&claim.name)).await;
    let found = found.map_err(|e| failed(format!("failed to fetch PVC from API server: {e}")))?;
    let name = volume_name(&found, pod, claim.generated).map_err(failed)?;
    let volumes: Api<PersistentVolume> = Api::all(client.clone());
    let volume = answer(volumes.get(name)).await;
    let mut volume = volume.map_err(|e| failed(format!("failed to fetch PV {name} from API server: {e}")))?;
    belongs(&volume, &found).map_err(failed)?;
    trim(&mut volume.metadata);
    volume.status = None;
    Ok(Arc::new(volume))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(extra: serde_json::Value) -> PersistentVolumeClaim {
        let mut value = serde_json::json!({"metadata": {"name": "data", "uid": "c1"}, "spec": {"volumeName": "pv1"}, "status": {"phase": "Bound"}});
        for (key, extra) in extra.as_object().unwrap() {
            value[key].as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        }
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn only_a_bound_claim_that_stays_has_a_volume() {
        let pod: Pod = serde_json::from_value(serde_json::json!({"metadata": {"name": "a", "uid": "u1"}})).unwrap();
        let owner = |uid: &str| {
            serde_json::json!({"metadata": {"ownerReferences":
                [{"apiVersion": "v1", "kind": "Pod", "name": "a", "uid": uid, "controller": true}]}})
        };
        for (extra, generated, expected) in [
            (serde_json::json!({}), false, Ok("pv1")),
            (serde_json::json!({"status": {"phase": "Pending"}}), false, Err("PVC is not bound")),
            (serde_json::json!({"spec": {"volumeName": ""}}), false, Err("PVC is not bound")),
            (serde_json::json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}), false, Err("PVC is being deleted")),
            (
                serde_json::json!({"spec": {"volumeMode": "Block"}}),
                false,
                Err("PVC is for a block volume, which berth does not support"),
            ),
            (serde_json::json!({}), true, Err("PVC data was not created for pod default/a (pod is not owner)")),
            (owner("u1"), true, Ok("pv1")),
            (owner("u2"), true, Err("PVC data was not created for pod default/a (pod is not owner)")),
        ] {
            let claim = claim(extra);
            assert_eq!(volume_name(&claim, &pod, generated), expected.map_err(str::to_owned), "{claim:?}");
        }
    }

    #[test]
    fn a_volume_is_believed_only_when_it_names_the_claim() {
        let volume = |spec: serde_json::Value| -> PersistentVolume {
            serde_json::from_value(serde_json::json!({"metadata": {"name": "pv1"}, "spec": spec})).unwrap()
        };
        let claim = claim(serde_json::json!({}));
        assert_eq!(belongs(&volume(serde_json::json!({"claimRef": {"name": "data", "uid": "c1"}})), &claim), Ok(()));
        let other = belongs(&volume(serde_json::json!({"claimRef": {"name": "data", "uid": "c0"}})), &claim).unwrap_err();
        assert!(other.contains("\"c0\"") && other.contains("\"c1\""), "{other}");
        assert!(belongs(&volume(serde_json::json!({})), &claim).unwrap_err().contains("not bound"));
    }
}
