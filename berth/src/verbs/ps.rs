//! `berth ps`: the containers that the CRI server knows.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use berth_cri_api::v1::{Container, ContainerState};

use crate::cli;
use crate::{client, find, table};

fn age(created_at: i64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    table::age(now.saturating_sub(Duration::from_nanos(created_at.max(0).unsigned_abs())))
}

fn state(container: &Container) -> &'static str {
    match container.state() {
        ContainerState::ContainerCreated => "Created",
        ContainerState::ContainerRunning => "Running",
        ContainerState::ContainerExited => "Exited",
        ContainerState::ContainerUnknown => "Unknown",
    }
}

fn row(container: &Container) -> Vec<String> {
    let image = container
        .image
        .as_ref()
        .map_or("", |i| if i.user_specified_image.is_empty() { i.image.as_str() } else { i.user_specified_image.as_str() });
    let (namespace, pod) = find::pod_of(container);
    vec![
        container.id.chars().take(13).collect(),
        image.to_owned(),
        age(container.created_at),
        state(container).to_owned(),
        find::container_name(container).to_owned(),
        container.metadata.as_ref().map_or(0, |m| m.attempt).to_string(),
        container.pod_sandbox_id.chars().take(13).collect(),
        pod.to_owned(),
        namespace.to_owned(),
    ]
}

/// Prints the table, or JSON.
pub async fn run(socket: &std::path::Path, args: &cli::Ps) -> Result<()> {
    let mut client = client::runtime(client::connect(socket).await?);
    let mut all = find::containers(&mut client).await?;
    all.retain(|c| args.all || c.state() == ContainerState::ContainerRunning);
    all.sort_by_key(|c| std::cmp::Reverse(c.created_at));
    if args.output.output == "json" {
        let list: Vec<serde_json::Value> = all
            .iter()
            .map(|c| {
                let (namespace, pod) = find::pod_of(c);
                serde_json::json!({
                    "id": c.id, "podSandboxId": c.pod_sandbox_id, "name": find::container_name(c), "state": state(c),
                    "attempt": c.metadata.as_ref().map_or(0, |m| m.attempt), "createdAt": c.created_at,
                    "image": c.image.as_ref().map(|i| i.image.clone()), "imageId": c.image_id, "pod": pod, "namespace": namespace,
                })
            })
            .collect();
        crate::out(&serde_json::to_string_pretty(&list)?);
        return Ok(());
    }
    let rows: Vec<Vec<String>> = all.iter().map(row).collect();
    let header = ["CONTAINER", "IMAGE", "AGE", "STATE", "NAME", "ATTEMPT", "POD ID", "POD", "NAMESPACE"];
    crate::out(table::render(&header, &rows).trim_end());
    Ok(())
}
