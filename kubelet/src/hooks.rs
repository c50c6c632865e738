//! Lifecycle hooks: what runs right after a container's start and right before its stop. Runs one hook and says how it failed;
//! when it runs, and what a failure means, is the executor's.

use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Container, LifecycleHandler, Pod};

use crate::cri::{self as calls, Runtime};
use crate::pod;
use crate::probe;

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
pub async fn run(handler: &LifecycleHandler, subject: &Subject<'_>, runtime: &Runtime) -> Result<(), String> {
    if let Some(exec) = &handler.exec {
        return run_exec(exec.command.as_deref().unwrap_or_default(), subject, runtime).await;
    }
    if let Some(get) = &handler.http_get {
        let asked = match probe::hook_target(get, subject.container, subject.ip) {
            Ok(target) => target.ask().await,
            Err(why) => Err(why),
        };
        return asked.map_err(|why| failed("HTTP", &probe::describe_get(get), subject, &why, ""));
    }
    if let Some(sleep) = &handler.sleep {
        tokio::time::sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0))).await;
        return Ok(());
    }
    Err(format!("Invalid handler: {} has none that is supported", subject.container.name))
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
