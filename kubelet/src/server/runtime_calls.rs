//! Endpoints that are one call of the runtime, or a value: run, checkpoint, configz.

use std::time::Duration;

use http::{Response, StatusCode};
use serde_json::json;

use super::lookup::Asked;
use super::query::{self, first};
use super::{Api, Body, json as json_response, text};
use crate::cri;

/// `/configz`: the configuration in effect.
pub(super) fn configz(api: &Api) -> Response<Body> {
    let mut kubelet = (*api.config.server.configz).clone();
    if kubelet.is_null() {
        kubelet = json!({});
    }
    if let Some(map) = kubelet.as_object_mut() {
        map.entry("kind").or_insert_with(|| "KubeletConfiguration".into());
        map.entry("apiVersion").or_insert_with(|| "kubelet.config.k8s.io/v1beta1".into());
    }
    json_response(StatusCode::OK, &json!({ "kubeletconfig": kubelet }))
}

/// `/run/…?cmd=`: a command without streams; its output when it has ended well.
pub(super) async fn run(api: &Api, asked: &Asked<'_>, query: Option<&str>) -> Response<Body> {
    let pairs = query::pairs(query);
    let cmd: Vec<String> = first(&pairs, "cmd").unwrap_or_default().split(' ').map(str::to_owned).collect();
    let (_, container) = match asked.running(api).await {
        Ok(found) => found,
        Err(refused) => return *refused,
    };
    let words = cmd.join(" ");
    match api.runtime.exec_sync_unlimited(&container.id, cmd).await {
        Ok(answer) if answer.exit_code == 0 => {
            let mut output = answer.stdout;
            output.extend(answer.stderr);
            text(StatusCode::OK, String::from_utf8_lossy(&output))
        }
        Ok(answer) => {
            let said = String::from_utf8_lossy(&answer.stderr).into_owned();
            let problem = format!("command '{words}' exited with {}: {said}", answer.exit_code);
            text(StatusCode::INTERNAL_SERVER_ERROR, problem)
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, cri::message(&error)),
    }
}

/// `/checkpoint/…?timeout=`: a running container's state as an archive in the kubelet's folder.
pub(super) async fn checkpoint(api: &Api, asked: &Asked<'_>, query: Option<&str>) -> Response<Body> {
    let pairs = query::pairs(query);
    let timeout = match first(&pairs, "timeout").map(str::parse::<u64>) {
        None => Duration::ZERO,
        Some(Ok(seconds)) => Duration::from_secs(seconds),
        Some(Err(_)) => return text(StatusCode::INTERNAL_SERVER_ERROR, "cannot parse value of timeout parameter"),
    };
    let pod = match asked.pod(api) {
        Ok(pod) => pod,
        Err(refused) => return *refused,
    };
    if crate::pod::container(&pod, asked.container).is_none() {
        let problem = format!("container {}/{}/{} does not exist", asked.namespace, asked.pod, asked.container);
        return text(StatusCode::NOT_FOUND, problem);
    }
    let container = match asked.running(api).await {
        Ok((_, container)) => container,
        Err(refused) => return *refused,
    };
    let folder = api.config.kubelet_root.join("checkpoints");
    if let Err(error) = crate::volume::create_private_dir(&folder) {
        return text(StatusCode::INTERNAL_SERVER_ERROR, format!("{}: {error}", folder.display()));
    }
    let now = api.config.clock.now();
    let name = format!("checkpoint-{}_{}-{}-{now:.0}.tar", asked.pod, asked.namespace, asked.container);
    let location = folder.join(name).display().to_string();
    match api.runtime.checkpoint_container(&container.id, location.clone(), timeout).await {
        Ok(()) => json_response(StatusCode::OK, &json!({ "items": [location] })),
        Err(error) => {
            let what = format!("checkpointing of {}/{}/{} failed", asked.namespace, asked.pod, asked.container);
            text(StatusCode::INTERNAL_SERVER_ERROR, format!("{what} ({error})"))
        }
    }
}
