//! `/pods` and `/runningpods`: lists of v1 pods as JSON.

use http::{Response, StatusCode};
use serde_json::json;

use super::{Api, Body, json as json_response, text};
use crate::cri::keys;

/// All pods that the kubelet knows, with their current status.
pub(crate) fn list(api: &Api) -> Response<Body> {
    let items: Vec<serde_json::Value> = api
        .table
        .list()
        .iter()
        .filter_map(|pod| serde_json::to_value(pod.as_ref()).ok())
        .map(|mut pod| {
            // Items of a typed list carry neither.
            if let Some(map) = pod.as_object_mut() {
                map.shift_remove("apiVersion");
                map.shift_remove("kind");
            }
            pod
        })
        .collect();
    json_response(StatusCode::OK, &pod_list(items))
}

/// What keeps the kubelet from doing as it is told: manifests that it refuses, and pods that can not go on, by UID; and what
/// it is doing for containers meanwhile.
pub(crate) fn problems(api: &Api) -> serde_json::Value {
    let one = |reason: &crate::memory::Reason| json!({"reason": reason.reason, "message": reason.message});
    let pods: serde_json::Map<String, serde_json::Value> =
        api.table.troubles().iter().map(|(uid, reason)| (uid.as_str().to_owned(), one(reason))).collect();
    json!({"problems": api.health.problems(), "pods": pods, "doing": api.table.doing().as_json()})
}

/// What the runtime runs, whoever wants it.
pub(crate) async fn running(api: &Api) -> Response<Body> {
    let containers = match api.runtime.list_containers(None).await {
        Ok(containers) => containers,
        Err(error) => return text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    };
    let mut pods: std::collections::BTreeMap<String, serde_json::Value> = std::collections::BTreeMap::new();
    for container in containers {
        let label = |key: &str| container.labels.get(key).cloned().unwrap_or_default();
        let uid = label(keys::POD_UID);
        if container.state() != berth_cri_api::v1::ContainerState::ContainerRunning || uid.is_empty() {
            continue;
        }
        let image = container.image.clone().map(|i| i.image).unwrap_or_default();
        let entry = pods.entry(uid.clone()).or_insert_with(|| {
            json!({
                "metadata": {"name": label(keys::POD_NAME), "namespace": label(keys::POD_NAMESPACE), "uid": uid},
                "spec": {"containers": []},
                "status": {},
            })
        });
        if let Some(list) = entry.pointer_mut("/spec/containers").and_then(|l| l.as_array_mut()) {
            list.push(json!({"name": label(keys::CONTAINER_NAME), "image": image, "resources": {}}));
        }
    }
    json_response(StatusCode::OK, &pod_list(pods.into_values().collect()))
}

fn pod_list(items: Vec<serde_json::Value>) -> serde_json::Value {
    json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": items})
}
