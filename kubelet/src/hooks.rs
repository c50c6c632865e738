//! Lifecycle hooks: what runs right after a container's start and right before its stop. Runs one hook and says how it failed;
//! when it runs, and what a failure means, is the executor's.

use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, HTTPGetAction, LifecycleHandler, Pod};

use crate::cri::{self as calls, Runtime};
use crate::pod;
use crate::probe;
use crate::record::{Recorder, Weight};

/// The container whose hook runs.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// The container's spec.
    pub container: &'a Container,
    /// The running container's id.
    pub id: &'a str,
    /// The pod's first address.
    pub ip: Option<IpAddr>,
}

/// Runs a hook to its end; it has no time limit of its own. The error is for users.
pub async fn run(
    handler: &LifecycleHandler,
    subject: &Subject<'_>,
    runtime: &Runtime,
    recorder: &Recorder,
) -> Result<(), String> {
    if let Some(exec) = &handler.exec {
        return run_exec(exec.command.as_deref().unwrap_or_default(), subject, runtime).await;
    }
    if let Some(get) = &handler.http_get {
        return run_http(get, subject, recorder)
            .await
            .map_err(|why| failed("HTTP", &probe::describe_get(get), subject, &why, ""));
    }
    if let Some(tcp) = &handler.tcp_socket {
        let connected = probe::connect_hook(tcp, subject.container, subject.ip).await;
        return connected.map_err(|why| failed("TCP", &probe::describe_port(tcp.host.as_deref(), &tcp.port), subject, &why, ""));
    }
    if let Some(sleep) = &handler.sleep {
        tokio::time::sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0))).await;
        return Ok(());
    }
    Err(format!("Invalid handler: {} has none that is supported", subject.container.name))
}

/// Asks; a server that does not speak the TLS that it is asked in is asked without, as the upstream does.
async fn run_http(get: &HTTPGetAction, subject: &Subject<'_>, recorder: &Recorder) -> Result<(), String> {
    let target = probe::hook_target(get, subject.container, subject.ip)?;
    let error = match target.ask().await {
        Ok(()) => return Ok(()),
        Err(error) => error,
    };
    let Some(plain) = target.without_tls().filter(|_| probe::is_plain_answer(&error)) else { return Err(error) };
    let (outcome, what) = match plain.ask().await {
        Ok(()) => (Ok(()), "request to HTTPS lifecycle hook got HTTP response, retry with HTTP succeeded".to_owned()),
        Err(again) => (Err(error), format!("request to HTTPS lifecycle hook got HTTP response, retry with HTTP failed: {again}")),
    };
    recorder.event(subject.pod, Some(&subject.container.name), Weight::Warning, "LifecycleHTTPFallback", &what);
    outcome
}

async fn run_exec(command: &[String], subject: &Subject<'_>, runtime: &Runtime) -> Result<(), String> {
    let shown = command.join(" ");
    match runtime.exec_sync_unlimited(subject.id, command.to_vec()).await {
        Ok(answer) if answer.exit_code == 0 => Ok(()),
        Ok(answer) => {
            let mut output = answer.stdout;
            output.extend(answer.stderr);
            let why = format!("command '{shown}' exited with {}", answer.exit_code);
            Err(failed("Exec", &shown, subject, &why, &String::from_utf8_lossy(&output)))
        }
        Err(e) => Err(failed("Exec", &shown, subject, &calls::message(&e), "")),
    }
}

fn failed(kind: &str, what: &str, subject: &Subject<'_>, why: &str, output: &str) -> String {
    let (container, pod) = (&subject.container.name, pod::format_pod(subject.pod));
    format!(
        "{kind} lifecycle hook ([{what}]) for Container {container:?} in Pod {pod:?} failed - error: {why}, message: {output:?}"
    )
}
