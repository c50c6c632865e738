//! `berth pods`: the pods with the status that the kubelet gives them; from the CRI server alone where no kubelet runs.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use berth_cri_api::v1::{ListPodSandboxRequest, PodSandboxState};
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::{cli, client, kubelet_api, table};

fn since(timestamp: &str) -> String {
    match OffsetDateTime::parse(timestamp, &Rfc3339) {
        Ok(then) => table::age(Duration::try_from(OffsetDateTime::now_utc() - then).unwrap_or_default()),
        Err(_) => "<unknown>".to_owned(),
    }
}

/// The STATUS column as kubectl computes it: the most telling reason among phase, init containers and containers.
fn status(pod: &Value) -> String {
    let at = |path: &str| pod.pointer(path).and_then(Value::as_str).unwrap_or_default();
    let mut text = match at("/status/reason") {
        "" => at("/status/phase").to_owned(),
        reason => reason.to_owned(),
    };
    let list = |path: &str| pod.pointer(path).and_then(Value::as_array).cloned().unwrap_or_default();
    let inits = list("/status/initContainerStatuses");
    let specs = list("/spec/initContainers");
    let is_sidecar = |name: &Value| specs.iter().any(|c| c["name"] == *name && c["restartPolicy"] == "Always");
    for (done, init) in inits.iter().enumerate() {
        if !at("/metadata/deletionTimestamp").is_empty() {
            break;
        }
        // A sidecar that has started holds nothing up.
        if is_sidecar(&init["name"]) && init["started"] == true {
            continue;
        }
        let reason = |state: &str| init.pointer(&format!("/state/{state}/reason")).and_then(Value::as_str);
        if let Some(ended) = init.pointer("/state/terminated") {
            if ended["exitCode"].as_i64() == Some(0) {
                continue;
            }
            return format!("Init:{}", reason("terminated").unwrap_or("Error"));
        }
        return match reason("waiting") {
            Some(why) if why != "PodInitializing" => format!("Init:{why}"),
            _ => format!("Init:{done}/{}", inits.len()),
        };
    }
    let mut runs = false;
    for container in list("/status/containerStatuses").iter().rev() {
        runs |= container["ready"] == true && container.pointer("/state/running").is_some();
        for state in ["waiting", "terminated"] {
            if let Some(reason) = container.pointer(&format!("/state/{state}/reason")).and_then(Value::as_str) {
                text = reason.to_owned();
            }
        }
    }
    if text == "Completed" && runs {
        let is_ready = |condition: &Value| condition["type"] == "Ready" && condition["status"] == "True";
        text = if list("/status/conditions").iter().any(is_ready) { "Running" } else { "NotReady" }.to_owned();
    }
    let over = matches!(at("/status/phase"), "Succeeded" | "Failed");
    if !over && !at("/metadata/deletionTimestamp").is_empty() {
        text = "Terminating".to_owned();
    }
    text
}

/// READY and RESTARTS as kubectl counts them: sidecars are among the containers, and while a pod initializes its restarts are
/// those of its init containers.
fn counts(pod: &Value) -> (String, i64) {
    let list = |path: &str| pod.pointer(path).and_then(Value::as_array).into_iter().flatten();
    let is_sidecar = |name: &Value| list("/spec/initContainers").any(|c| c["name"] == *name && c["restartPolicy"] == "Always");
    let inits = || list("/status/initContainerStatuses");
    let sidecars = || inits().filter(|s| is_sidecar(&s["name"]));
    let regular = || list("/status/containerStatuses");
    let all = list("/spec/containers").count() + list("/spec/initContainers").filter(|c| is_sidecar(&c["name"])).count();
    let is_ready = |status: &&Value| status["ready"] == true && status.pointer("/state/running").is_some();
    let ready = regular().filter(is_ready).count() + sidecars().filter(|s| s["started"] == true).filter(is_ready).count();
    let is_over = |status: &Value| match is_sidecar(&status["name"]) {
        true => status["started"] == true,
        false => status.pointer("/state/terminated/exitCode").and_then(Value::as_i64) == Some(0),
    };
    let restarts = |s: &Value| s["restartCount"].as_i64().unwrap_or_default();
    let restarts = match inits().all(is_over) {
        true => regular().chain(sidecars()).map(restarts).sum(),
        false => inits().map(restarts).sum(),
    };
    (format!("{ready}/{all}"), restarts)
}

fn row(pod: &Value) -> Vec<String> {
    let at = |path: &str| pod.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (ready, restarts) = counts(pod);
    let ip = at("/status/podIP");
    let start = match at("/status/startTime") {
        start if start.is_empty() => at("/metadata/creationTimestamp"),
        start => start,
    };
    vec![
        at("/metadata/namespace"),
        at("/metadata/name"),
        ready,
        status(pod),
        restarts.to_string(),
        since(&start),
        if ip.is_empty() { "<none>".to_owned() } else { ip },
    ]
}

fn from_kubelet(list: &Value, json: bool) -> Result<()> {
    if json {
        crate::out(&serde_json::to_string_pretty(list)?);
        return Ok(());
    }
    let mut rows: Vec<Vec<String>> = list["items"].as_array().into_iter().flatten().map(row).collect();
    rows.sort();
    crate::out(table::render(&["NAMESPACE", "NAME", "READY", "STATUS", "RESTARTS", "AGE", "IP"], &rows).trim_end());
    Ok(())
}

async fn from_cri(socket: &Path, json: bool) -> Result<()> {
    let mut client = client::runtime(client::connect(socket).await?);
    let items = client.list_pod_sandbox(ListPodSandboxRequest::default()).await?.into_inner().items;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut rows = Vec::new();
    let mut values = Vec::new();
    for item in &items {
        let metadata = item.metadata.clone().unwrap_or_default();
        let state = if item.state() == PodSandboxState::SandboxReady { "Ready" } else { "NotReady" };
        values
            .push(serde_json::json!({"id": item.id, "namespace": metadata.namespace, "name": metadata.name, "uid": metadata.uid,
            "attempt": metadata.attempt, "state": state, "createdAt": item.created_at}));
        let age = now.saturating_sub(Duration::from_nanos(item.created_at.max(0).unsigned_abs()));
        rows.push(vec![
            metadata.namespace,
            metadata.name,
            item.id.chars().take(13).collect(),
            state.to_owned(),
            metadata.attempt.to_string(),
            table::age(age),
        ]);
    }
    rows.sort();
    if json {
        crate::out(&serde_json::to_string_pretty(&values)?);
    } else {
        crate::out(table::render(&["NAMESPACE", "NAME", "POD ID", "STATE", "ATTEMPT", "AGE"], &rows).trim_end());
    }
    Ok(())
}

/// Prints the pods; the kubelet's view where its socket answers, else the CRI server's.
pub async fn run(kubelet: &Path, cri: &Path, args: &cli::Output) -> Result<()> {
    let json = args.output == "json";
    match kubelet_api::pods(kubelet).await? {
        Some(list) => from_kubelet(&list, json),
        None => from_cri(cri, json).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sidecars_count_as_containers_and_a_pod_that_initializes_counts_its_init_containers() {
        let spec = serde_json::json!({"initContainers": [{"name": "i"}, {"name": "s", "restartPolicy": "Always"}], "containers": [{"name": "a"}]});
        let running = serde_json::json!({"running": {}});
        let sidecar = serde_json::json!({"name": "s", "started": true, "ready": true, "restartCount": 2, "state": running});
        let done = serde_json::json!({"name": "i", "ready": true, "restartCount": 4, "state": {"terminated": {"exitCode": 0}}});
        let pod = serde_json::json!({"spec": spec, "status": {"initContainerStatuses": [done, sidecar],
            "containerStatuses": [{"name": "a", "ready": true, "restartCount": 1, "state": running}]}});
        assert_eq!(counts(&pod), ("2/2".to_owned(), 3));
        let waiting = serde_json::json!({"name": "s", "ready": false, "restartCount": 0, "state": {"waiting": {}}});
        let first = serde_json::json!({"name": "i", "ready": false, "restartCount": 4, "state": running});
        let pod = serde_json::json!({"spec": spec, "status": {"initContainerStatuses": [first, waiting],
            "containerStatuses": [{"name": "a", "ready": false, "restartCount": 0, "state": {"waiting": {}}}]}});
        assert_eq!(counts(&pod), ("0/2".to_owned(), 4));
    }

    #[test]
    fn status_tells_the_most_of_all_states() {
        for (pod, want) in [
            (serde_json::json!({"status": {"phase": "Running"}}), "Running"),
            (
                serde_json::json!({"status": {"phase": "Running", "containerStatuses": [{"state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}}),
                "CrashLoopBackOff",
            ),
            (
                serde_json::json!({"status": {"phase": "Pending", "initContainerStatuses": [
                    {"state": {"terminated": {"exitCode": 0, "reason": "Completed"}}}, {"state": {"running": {}}}]}}),
                "Init:1/2",
            ),
            (
                serde_json::json!({"status": {"phase": "Pending", "initContainerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff"}}}]}}),
                "Init:ImagePullBackOff",
            ),
            (serde_json::json!({"status": {"phase": "Failed", "reason": "Evicted"}}), "Evicted"),
            (
                serde_json::json!({"status": {"phase": "Running", "containerStatuses": [
                    {"ready": true, "state": {"running": {}}},
                    {"ready": false, "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}}]}}),
                "NotReady",
            ),
            (
                serde_json::json!({"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}],
                    "containerStatuses": [{"ready": false, "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}},
                    {"ready": true, "state": {"running": {}}}]}}),
                "Running",
            ),
            (
                serde_json::json!({"status": {"phase": "Succeeded", "containerStatuses": [
                    {"ready": false, "state": {"terminated": {"exitCode": 0, "reason": "Completed"}}}]}}),
                "Completed",
            ),
            (
                serde_json::json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}, "status": {"phase": "Running"}}),
                "Terminating",
            ),
            (
                serde_json::json!({"spec": {"initContainers": [{"name": "s", "restartPolicy": "Always"}, {"name": "i"}]},
                    "status": {"phase": "Pending", "initContainerStatuses": [
                    {"name": "s", "started": true, "state": {"running": {}}}, {"name": "i", "state": {"running": {}}}]}}),
                "Init:1/2",
            ),
        ] {
            assert_eq!(status(&pod), want, "{pod}");
        }
    }
}
