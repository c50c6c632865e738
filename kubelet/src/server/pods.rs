//! `/pods` and `/runningpods`: lists of v1 pods as JSON.

use http::{Response, StatusCode};
use serde_json::json;

use super::{Api, Body, bytes, json as json_response, text};
use crate::cri::keys;

/// All pods that the kubelet knows, with their current status. Each becomes text before the next is looked at: as trees all of them
/// are many times what they are as text.
pub(crate) fn list(api: &Api) -> Response<Body> {
    let mut list = br#"{"kind":"PodList","apiVersion":"v1","metadata":{},"items":["#.to_vec();
    let items = api.table.each().filter_map(|pod| serde_json::to_value(pod.as_ref()).ok());
    for (at, mut item) in items.enumerate() {
        // Items of a typed list carry neither.
        if let Some(map) = item.as_object_mut() {
            map.shift_remove("apiVersion");
            map.shift_remove("kind");
        }
        if at > 0 {
            list.push(b',');
        }
        list.extend(item.to_string().into_bytes());
    }
    list.extend(b"]}");
    bytes(StatusCode::OK, "application/json", list)
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
