//! `berth pods`: the pods with the status that the kubelet gives them; from the CRI server alone where no kubelet runs.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use berth_cri_api::v1::{ListPodSandboxRequest, PodSandboxState};
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::{cli, client, table};

/// One GET over a unix socket, for a server that closes the connection behind its reply.
async fn get(socket: &Path, path: &str) -> Result<Vec<u8>> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").as_bytes()).await?;
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).await?;
    let split = reply.windows(4).position(|w| w == b"\r\n\r\n").context("the kubelet's reply has no end of headers")?;
    let (head, body) = (String::from_utf8_lossy(&reply[..split]).into_owned(), reply.split_off(split + 4));
    if !head.starts_with("HTTP/1.1 200") {
        bail!("the kubelet answered {}", head.lines().next().unwrap_or_default());
    }
    if head.to_ascii_lowercase().contains("transfer-encoding: chunked") { dechunk(&body) } else { Ok(body) }
}

/// Joins the chunks of a chunked body.
fn dechunk(mut body: &[u8]) -> Result<Vec<u8>> {
    let mut whole = Vec::with_capacity(body.len());
    loop {
        let line = body.iter().position(|b| *b == b'\n').context("a chunk without a length")?;
        let length = std::str::from_utf8(&body[..line])?.trim();
        let length = usize::from_str_radix(length.split(';').next().unwrap_or_default(), 16)?;
        let rest = &body[line + 1..];
        if length == 0 {
            return Ok(whole);
        }
        whole.extend_from_slice(rest.get(..length).context("a chunk that is cut short")?);
        body = rest.get(length + 2..).context("a chunk that is cut short")?;
    }
}

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
    for (done, init) in inits.iter().enumerate() {
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
    for container in list("/status/containerStatuses").iter().rev() {
        for state in ["waiting", "terminated"] {
            if let Some(reason) = container.pointer(&format!("/state/{state}/reason")).and_then(Value::as_str) {
                text = reason.to_owned();
            }
        }
    }
    if pod.pointer("/metadata/deletionTimestamp").is_some_and(Value::is_string) {
        text = "Terminating".to_owned();
    }
    text
}

fn row(pod: &Value) -> Vec<String> {
    let at = |path: &str| pod.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
    let containers = pod.pointer("/status/containerStatuses").and_then(Value::as_array).cloned().unwrap_or_default();
    let all = pod.pointer("/spec/containers").and_then(Value::as_array).map_or(0, Vec::len);
    let ready = containers.iter().filter(|c| c["ready"].as_bool() == Some(true)).count();
    let restarts: i64 = containers.iter().filter_map(|c| c["restartCount"].as_i64()).sum();
    let ip = at("/status/podIP");
    let start = match at("/status/startTime") {
        start if start.is_empty() => at("/metadata/creationTimestamp"),
        start => start,
    };
    vec![
        at("/metadata/namespace"),
        at("/metadata/name"),
        format!("{ready}/{all}"),
        status(pod),
        restarts.to_string(),
        since(&start),
        if ip.is_empty() { "<none>".to_owned() } else { ip },
    ]
}

async fn from_kubelet(socket: &Path, json: bool) -> Result<()> {
    let list: Value = serde_json::from_slice(&get(socket, "/pods").await?).context("reading the kubelet's pods")?;
    if json {
        crate::out(&serde_json::to_string_pretty(&list)?);
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
    if kubelet.exists() && UnixStream::connect(kubelet).await.is_ok() {
        return from_kubelet(kubelet, json).await;
    }
    from_cri(cri, json).await
}

#[cfg(test)]
mod tests {
    use super::*;

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
        ] {
            assert_eq!(status(&pod), want, "{pod}");
        }
    }

    #[test]
    fn chunks_are_joined() {
        assert_eq!(dechunk(b"4\r\nWiki\r\n5;x=y\r\npedia\r\n0\r\n\r\n").expect("whole"), b"Wikipedia");
        assert!(dechunk(b"9\r\nshort\r\n").is_err());
    }
}
