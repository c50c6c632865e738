//! The workloads of a node under an API server: a pod until a watch shows it running, a deployment until all its pods are, idle pods
//! and what their node asks the server. The server is reached by `kubectl proxy`: it is the same detour for both sides.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures::TryStreamExt;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Node, Pod, ServiceAccount};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use crate::meter::Meter;

/// How long anything may take that is waited for.
const PATIENCE: Duration = Duration::from_secs(180);
/// Conditions of nodes and pods that nobody measures are looked at so often.
const SLOW_POLL: Duration = Duration::from_millis(100);
/// The namespace of all pods.
const NAMESPACE: &str = "default";
/// The node that nobody runs.
const FAKE: &str = "fake";

/// What the workloads need.
pub struct ApiBench {
    /// The way to the server.
    pub client: kube::Client,
    /// Samples.
    pub meter: Meter,
    /// The image of all pods.
    pub image: &'static str,
    /// The API server's audit log of the node's calls.
    pub audit: PathBuf,
}

impl ApiBench {
    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    fn spec(&self, command: &str, grace: u32) -> Value {
        json!({"terminationGracePeriodSeconds": grace, "containers": [{"name": "c", "image": self.image, "imagePullPolicy": "IfNotPresent",
            "command": ["sh", "-c", command]}]})
    }

    /// Waits until a node has no taint, so that pods are scheduled on it, and the namespace has its service account.
    pub async fn ready(&self, node: &str) -> Result<()> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), NAMESPACE);
        wait("a node that takes pods", async || {
            let free = nodes.get_opt(node).await?.is_some_and(|node| {
                let ready = node.status.and_then(|s| s.conditions).unwrap_or_default();
                node.spec.and_then(|s| s.taints).unwrap_or_default().is_empty()
                    && ready.iter().any(|c| c.type_ == "Ready" && c.status == "True")
            });
            Ok((free && accounts.get_opt("default").await?.is_some()).then_some(()))
        })
        .await
    }

    /// So many pods, one after the other: from the call that creates one until a watch shows it running, and from the call that deletes it
    /// until a watch shows it gone. Its process ignores SIGTERM and has a second of grace.
    pub async fn single(&self, count: usize) -> Result<()> {
        // The first pulls the image and makes the network.
        for n in 0..=count {
            let name = format!("single{n}");
            let pods = self.pods();
            let params = WatchParams::default().fields(&format!("metadata.name={name}")).timeout(280);
            let mut seen = Box::pin(pods.watch(&params, "0").await?);
            let spec = self.spec("trap '' TERM; while :; do sleep 3600 & wait; done", 1);
            let pod = serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec}))?;
            let begun = Instant::now();
            pods.create(&PostParams::default(), &pod).await?;
            let shown = until(&mut seen, |event| matches!(event, WatchEvent::Modified(pod) if is_running(pod))).await?;
            ensure!(shown, "the watch of a pod ended");
            let running = begun.elapsed();
            // It shall be at its trap when the signal comes: what is measured is the grace.
            sleep(Duration::from_millis(200)).await;
            let begun = Instant::now();
            pods.delete(&name, &DeleteParams::default()).await?;
            ensure!(until(&mut seen, |event| matches!(event, WatchEvent::Deleted(_))).await?, "the watch of a pod ended");
            if n > 0 {
                self.meter.add("single.running", running.as_secs_f64() * 1e3);
                self.meter.add("single.gone over grace", begun.elapsed().as_secs_f64() * 1e3 - 1e3);
            }
        }
        Ok(())
    }

    /// A deployment of so many pods, from the call that creates it until a watch has shown all of them running. Returns ms.
    async fn deploy(&self, name: &str, count: usize, pod: Value) -> Result<f64> {
        let deployments: Api<Deployment> = Api::namespaced(self.client.clone(), NAMESPACE);
        let params = WatchParams::default().labels(&format!("app={name}")).timeout(280);
        let mut seen = Box::pin(self.pods().watch(&params, "0").await?);
        let deployment = serde_json::from_value(json!({"metadata": {"name": name}, "spec": {"replicas": count,
            "selector": {"matchLabels": {"app": name}}, "template": {"metadata": {"labels": {"app": name}}, "spec": pod}}}))?;
        let begun = Instant::now();
        deployments.create(&PostParams::default(), &deployment).await?;
        let mut running = HashSet::new();
        let mut all = |event: &WatchEvent<Pod>| {
            if let WatchEvent::Added(pod) | WatchEvent::Modified(pod) = event
                && is_running(pod)
            {
                running.extend(pod.metadata.name.clone());
            }
            running.len() == count
        };
        // The server ends the watch of a reader that it finds slow: a new one shows everything again.
        while !until(&mut seen, &mut all).await? {
            seen = Box::pin(self.pods().watch(&params, "0").await?);
        }
        Ok(begun.elapsed().as_secs_f64() * 1e3)
    }

    /// Ends a deployment; returns when its pods are gone.
    async fn undeploy(&self, name: &str) -> Result<()> {
        let deployments: Api<Deployment> = Api::namespaced(self.client.clone(), NAMESPACE);
        deployments.delete(name, &DeleteParams::background()).await?;
        let params = ListParams::default().labels(&format!("app={name}"));
        let pods = self.pods();
        wait("the end of a deployment's pods", async || Ok(pods.list(&params).await?.items.is_empty().then_some(()))).await
    }

    /// The burst on a node that says at once of every pod that it runs: what the control plane takes, in ms. No agent may run yet.
    pub async fn fake_burst(&self, count: usize) -> Result<f64> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let node = serde_json::from_value(json!({"metadata": {"name": FAKE}}))?;
        nodes.create(&PostParams::default(), &node).await?;
        let size = json!({"cpu": "64", "memory": "64Gi", "pods": "250", "ephemeral-storage": "64Gi"});
        let status = json!({"status": {"capacity": size, "allocatable": size,
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "",
                "lastHeartbeatTime": k8s_openapi::apimachinery::pkg::apis::meta::v1::Time::from(k8s_openapi::jiff::Timestamp::now()),
                "lastTransitionTime": k8s_openapi::apimachinery::pkg::apis::meta::v1::Time::from(k8s_openapi::jiff::Timestamp::now())}]}});
        nodes.patch_status(FAKE, &PatchParams::default(), &Patch::Strategic(status)).await?;
        self.ready(FAKE).await?;
        let kubelet = tokio::spawn(fake_kubelet(self.pods()));
        let spent = self.deploy("burst-fake", count, self.spec("exec sleep 100000", 0)).await;
        let ended = self.undeploy("burst-fake").await;
        kubelet.abort();
        nodes.delete(FAKE, &DeleteParams::default()).await?;
        ended.and(spent)
    }

    /// A deployment of so many pods; `fake` ms are what the control plane takes of it.
    pub async fn burst(&self, count: usize, fake: f64) -> Result<()> {
        let spent = self.deploy("burst", count, self.spec("exec sleep 100000", 0)).await?;
        self.meter.add("burst50.fake", fake / 1e3);
        self.meter.add("burst50.all", spent / 1e3);
        self.meter.add("burst50.net", (spent - fake).max(1.0) / 1e3);
        self.undeploy("burst").await
    }

    /// So many idle pods with an HTTP probe; `measure` sees them when all are ready.
    pub async fn with_idle(&self, count: usize, measure: impl AsyncFnOnce(&Self) -> Result<()>) -> Result<()> {
        let mut pod = self.spec("mkdir /www; touch /www/ok; exec httpd -f -p 8080 -h /www", 0);
        pod["containers"][0]["readinessProbe"] = json!({"httpGet": {"path": "/ok", "port": 8080}});
        self.deploy("idle", count, pod).await?;
        let deployments: Api<Deployment> = Api::namespaced(self.client.clone(), NAMESPACE);
        wait("all pods to be ready", async || {
            let status = deployments.get("idle").await?.status.unwrap_or_default();
            Ok((status.ready_replicas == Some(count as i32)).then_some(()))
        })
        .await?;
        measure(self).await?;
        self.undeploy("idle").await
    }

    /// What the node asks in `window`: calls a minute, a line for each kind in the log.
    pub async fn calls(&self, window: Duration) -> Result<()> {
        let before = self.audit_lines()?;
        let begun = Instant::now();
        sleep(window).await;
        let minutes = begun.elapsed().as_secs_f64() / 60.0;
        let mut kinds = BTreeMap::<String, usize>::new();
        let mut known: HashSet<String> = before.into_iter().map(|line| line.id).collect();
        for line in self.audit_lines()? {
            if known.insert(line.id) {
                *kinds.entry(line.kind).or_default() += 1;
            }
        }
        eprintln!("calls of the node in {minutes:.1} minutes: {kinds:?}");
        self.meter.add("api-idle.calls", kinds.values().sum::<usize>() as f64 / minutes);
        Ok(())
    }

    fn audit_lines(&self) -> Result<Vec<Call>> {
        let file = File::open(&self.audit).with_context(|| format!("open {}", self.audit.display()))?;
        let mut calls = Vec::new();
        for line in BufReader::new(file).lines() {
            // The last one may be half written.
            let Ok(call) = serde_json::from_str::<Value>(&line?) else { continue };
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let object = &call["objectRef"];
            let kind = format!("{} {} {}", text(&call["verb"]), text(&object["resource"]), text(&object["subresource"]));
            calls.push(Call { id: text(&call["auditID"]), kind });
        }
        ensure!(!calls.is_empty(), "the API server's audit log is empty");
        Ok(calls)
    }
}

/// A line of the audit log; a watch has two with one id.
struct Call {
    id: String,
    kind: String,
}

/// Says of every pod on its node that it runs, and lets go of those that are deleted.
async fn fake_kubelet(pods: Api<Pod>) -> Result<()> {
    let params = WatchParams::default().fields(&format!("spec.nodeName={FAKE}")).timeout(280);
    let mut seen = Box::pin(pods.watch(&params, "0").await?);
    let mut told = HashSet::new();
    while let Some(event) = seen.try_next().await? {
        let (WatchEvent::Added(pod) | WatchEvent::Modified(pod)) = event else { continue };
        let Some(name) = pod.metadata.name else { continue };
        let pods = pods.clone();
        if pod.metadata.deletion_timestamp.is_some() {
            tokio::spawn(async move { pods.delete(&name, &DeleteParams::default().grace_period(0)).await.map(drop) });
        } else if told.insert(name.clone()) {
            let status = json!({"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}});
            tokio::spawn(
                async move { pods.patch_status(&name, &PatchParams::default(), &Patch::Strategic(status)).await.map(drop) },
            );
        }
    }
    bail!("the watch of the fake node's pods ended")
}

fn is_running(pod: &Pod) -> bool {
    pod.status.as_ref().and_then(|s| s.phase.as_deref()) == Some("Running")
}

/// Reads a watch until something is seen; false: it has ended before.
async fn until(
    seen: &mut (impl futures::TryStream<Ok = WatchEvent<Pod>, Error = kube::Error> + Unpin),
    mut is_it: impl FnMut(&WatchEvent<Pod>) -> bool,
) -> Result<bool> {
    let found = async {
        while let Some(event) = seen.try_next().await? {
            if is_it(&event) {
                return Ok(true);
            }
        }
        Ok(false)
    };
    timeout(PATIENCE, found).await.context("gave up waiting for a watch's event")?
}

/// Looks again and again until there is what is waited for.
async fn wait<T>(what: &str, mut look: impl AsyncFnMut() -> Result<Option<T>>) -> Result<T> {
    let begun = Instant::now();
    while begun.elapsed() < PATIENCE {
        if let Some(found) = look().await? {
            return Ok(found);
        }
        sleep(SLOW_POLL).await;
    }
    bail!("gave up waiting for {what}")
}
