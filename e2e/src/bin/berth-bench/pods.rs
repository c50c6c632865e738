//! One pod with one container: made, looked at and ended, each call timed.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use berth_cri_api::v1::{
    ContainerStatusRequest, CreateContainerRequest, PodSandboxConfig, PodSandboxStatusRequest, RemoveContainerRequest,
    RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest, StopContainerRequest, StopPodSandboxRequest,
};
use futures::{StreamExt, TryStreamExt, stream};

use crate::checks::{self, Suspect};
use crate::cri::{self, Cri, Shape};
use crate::machine::Accounting;
use crate::meter::Meter;
use crate::traces::{Hierarchies, Traces};

/// The cgroup that holds the pods'.
pub const PODS_CGROUP: &str = "bench-pods";
/// The grace of a stop, in seconds: a kubelet's default. The containers obey at once.
const GRACE: i64 = 30;
/// How often a container's log is looked at for its first line, a millisecond apart.
const GREETED_POLLS: usize = 10_000;

/// A side under measurement, and what a workload needs to measure it.
pub struct Bench {
    /// The side's socket.
    pub cri: Cri,
    /// The image that containers run, as the server named it.
    pub image: String,
    /// A folder for files.
    pub dir: PathBuf,
    /// CPU time.
    pub accounting: Accounting,
    /// The cgroup hierarchies.
    pub hierarchies: Hierarchies,
    /// What there is without pods.
    pub baseline: Traces,
    /// Where samples go.
    pub meter: Meter,
    /// Numbers the pods.
    pub next: AtomicU32,
}

/// A pod before it is made: its folder and its cgroup exist.
#[derive(Debug, Clone)]
pub struct Plan {
    name: String,
    cgroup: String,
    shape: Shape,
    config: PodSandboxConfig,
    logs: PathBuf,
    script: String,
    mounts: Vec<berth_cri_api::v1::Mount>,
}

/// A pod whose container runs.
#[derive(Debug, Clone)]
pub struct Pod {
    /// The sandbox's id.
    pub sandbox: String,
    /// The container's id.
    pub container: String,
    /// The container's log.
    pub log: PathBuf,
    name: String,
    cgroup: String,
}

/// A container that says hello and obeys SIGTERM, also as PID 1.
pub fn idle_script() -> String {
    format!("trap 'exit 0' TERM; echo {}; sleep 100000 & wait", cri::GREETING)
}

impl Bench {
    /// Prepares a pod that idles.
    pub fn plan(&self, shape: Shape) -> Result<Plan> {
        self.plan_script(shape, &idle_script())
    }

    /// Prepares a pod that runs a script.
    pub fn plan_script(&self, shape: Shape, script: &str) -> Result<Plan> {
        let name = format!("pod-{}", self.next.fetch_add(1, Ordering::Relaxed));
        let logs = self.dir.join("logs").join(&name);
        std::fs::create_dir_all(&logs).with_context(|| format!("make {}", logs.display()))?;
        let cgroup = format!("{PODS_CGROUP}/{name}");
        self.hierarchies.make(&cgroup)?;
        let config = cri::sandbox(&name, shape, &logs, &format!("/{cgroup}"));
        Ok(Plan { name, cgroup, shape, config, logs, script: script.to_owned(), mounts: Vec::new() })
    }

    /// Makes a pod's sandbox.
    pub async fn run_sandbox(&self, plan: &Plan, key: &str) -> Result<String> {
        let mut runtime = self.cri.runtime.clone();
        let request = RunPodSandboxRequest { config: Some(plan.config.clone()), runtime_handler: String::new() };
        let run = self.meter.time(&format!("{key}.RunPodSandbox"), runtime.run_pod_sandbox(request)).await;
        Ok(run.with_context(|| format!("RunPodSandbox {}", plan.name))?.into_inner().pod_sandbox_id)
    }

    /// Creates the container in a sandbox.
    pub async fn create(&self, plan: &Plan, sandbox: String, key: &str) -> Result<Pod> {
        let mut config = cri::container("main", plan.shape, &self.image, &plan.script);
        config.mounts.clone_from(&plan.mounts);
        let request = CreateContainerRequest {
            pod_sandbox_id: sandbox.clone(),
            config: Some(config),
            sandbox_config: Some(plan.config.clone()),
        };
        let mut runtime = self.cri.runtime.clone();
        let create = self.meter.time(&format!("{key}.CreateContainer"), runtime.create_container(request)).await;
        let container = create.with_context(|| format!("CreateContainer of {}", plan.name))?.into_inner().container_id;
        Ok(Pod { sandbox, container, log: plan.logs.join("main.log"), name: plan.name.clone(), cgroup: plan.cgroup.clone() })
    }

    /// Starts a pod's container.
    pub async fn start(&self, pod: &Pod, key: &str) -> Result<()> {
        let mut runtime = self.cri.runtime.clone();
        let request = StartContainerRequest { container_id: pod.container.clone() };
        let start = self.meter.time(&format!("{key}.StartContainer"), runtime.start_container(request)).await;
        start.with_context(|| format!("StartContainer of {}", pod.name))?;
        Ok(())
    }

    /// Makes a pod whose container runs.
    pub async fn up(&self, plan: &Plan, key: &str) -> Result<Pod> {
        let begun = Instant::now();
        let sandbox = self.run_sandbox(plan, key).await?;
        let made = Instant::now();
        let pod = self.create(plan, sandbox, key).await?;
        self.start(&pod, key).await?;
        let ended = Instant::now();
        self.meter.add(&format!("{key}.Create+Start"), (ended - made).as_secs_f64() * 1e3);
        self.meter.add(&format!("{key}.up"), (ended - begun).as_secs_f64() * 1e3);
        Ok(pod)
    }

    /// Stops a pod's container within its grace.
    pub async fn stop_container(&self, pod: &Pod, key: &str, timeout: i64) -> Result<()> {
        let mut runtime = self.cri.runtime.clone();
        let request = StopContainerRequest { container_id: pod.container.clone(), timeout };
        let stop = self.meter.time(&format!("{key}.StopContainer"), runtime.stop_container(request)).await;
        stop.with_context(|| format!("StopContainer of {}", pod.name))?;
        Ok(())
    }

    /// Stops a pod.
    pub async fn stop(&self, pod: &Pod, key: &str) -> Result<()> {
        let mut runtime = self.cri.runtime.clone();
        let request = StopPodSandboxRequest { pod_sandbox_id: pod.sandbox.clone() };
        let stop = self.meter.time(&format!("{key}.StopPodSandbox"), runtime.stop_pod_sandbox(request)).await;
        stop.with_context(|| format!("StopPodSandbox {}", pod.name))?;
        Ok(())
    }

    /// Removes a stopped pod, its container first.
    pub async fn remove(&self, pod: &Pod, key: &str) -> Result<()> {
        let mut runtime = self.cri.runtime.clone();
        let request = RemoveContainerRequest { container_id: pod.container.clone() };
        let remove = self.meter.time(&format!("{key}.RemoveContainer"), runtime.remove_container(request)).await;
        remove.with_context(|| format!("RemoveContainer of {}", pod.name))?;
        let request = RemovePodSandboxRequest { pod_sandbox_id: pod.sandbox.clone() };
        let remove = self.meter.time(&format!("{key}.RemovePodSandbox"), runtime.remove_pod_sandbox(request)).await;
        remove.with_context(|| format!("RemovePodSandbox {}", pod.name))?;
        Ok(())
    }

    /// Waits, untimed, until the container has written its first line: before its shell has set the trap a PID 1 ignores SIGTERM, and the
    /// stop would take the whole grace.
    async fn wait_greeted(&self, pod: &Pod) {
        for _ in 0..GREETED_POLLS {
            if std::fs::metadata(&pod.log).is_ok_and(|log| log.len() > 0) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Ends a pod in a kubelet's order.
    pub async fn down(&self, pod: &Pod, key: &str) -> Result<()> {
        self.wait_greeted(pod).await;
        self.stop_container(pod, key, GRACE).await?;
        self.stop(pod, key).await?;
        self.remove(pod, key).await
    }

    /// Makes pods, so many at a time.
    pub async fn up_all(&self, count: usize, ways: usize, shape: Shape, key: &str) -> Result<Vec<Pod>> {
        let plans = (0..count).map(|_| self.plan(shape)).collect::<Result<Vec<_>>>()?;
        stream::iter(&plans).map(|plan| self.up(plan, key)).buffer_unordered(ways).try_collect().await
    }

    /// Ends pods, so many at a time, untimed, and waits until nothing of them is left.
    pub async fn down_all(&self, pods: &[Pod], ways: usize) -> Result<()> {
        stream::iter(pods).map(|pod| self.down(pod, "")).buffer_unordered(ways).try_collect::<()>().await?;
        self.settle("pods that were ended", pods.iter()).await;
        Ok(())
    }

    /// Waits until everything is as it was without pods; else the round is void.
    pub async fn settle(&self, what: &str, pods: impl Iterator<Item = &Pod>) {
        self.settle_to(&self.baseline, what, pods).await;
    }

    /// Removes the cgroups of removed pods and waits until everything is as it was; else the round is void.
    pub async fn settle_to(&self, traces: &Traces, what: &str, pods: impl Iterator<Item = &Pod>) {
        pods.for_each(|pod| self.release(pod));
        if let Err(left) = traces.wait_same(&self.hierarchies).await {
            self.meter.fail(format!("{what}: {left}"));
        }
    }

    /// Removes a removed pod's cgroup, which is the kubelet's, that is ours.
    pub fn release(&self, pod: &Pod) {
        self.hierarchies.remove(&pod.cgroup);
    }

    /// Looks at a running pod; what is wrong voids the round.
    pub async fn check(&self, pod: &Pod, key: &str) -> Result<()> {
        let mut runtime = self.cri.runtime.clone();
        let request = ContainerStatusRequest { container_id: pod.container.clone(), verbose: true };
        let info = runtime.container_status(request).await?.into_inner().info;
        let info: serde_json::Value = serde_json::from_str(info.get("info").map_or("{}", String::as_str))?;
        let request = PodSandboxStatusRequest { pod_sandbox_id: pod.sandbox.clone(), verbose: false };
        let network = runtime.pod_sandbox_status(request).await?.into_inner().status.and_then(|s| s.network).unwrap_or_default();
        let suspect = Suspect { pid: info["pid"].as_i64().unwrap_or(0), ip: network.ip, log: pod.log.clone() };
        let hierarchies = self.hierarchies.clone();
        // Not on this thread: the other pods' calls are being timed.
        let result = tokio::task::spawn_blocking(move || checks::check(&suspect, &hierarchies)).await?;
        if let Err(error) = result {
            self.meter.fail(format!("{key}: {}: {error:#}", pod.name));
        }
        Ok(())
    }
}

impl Plan {
    /// Gives the container a file of the host, read-only.
    #[must_use]
    pub fn mount(mut self, host: &std::path::Path, container: &str) -> Self {
        self.mounts.push(berth_cri_api::v1::Mount {
            container_path: container.to_owned(),
            host_path: host.display().to_string(),
            readonly: true,
            ..Default::default()
        });
        self
    }
}

/// Three of so many, other ones each time.
pub fn three_of(count: usize) -> Vec<usize> {
    use std::hash::{BuildHasher, RandomState};
    let random = RandomState::new();
    let mut chosen: Vec<usize> = (0..count).collect();
    chosen.sort_by_key(|n| random.hash_one(n));
    chosen.truncate(3);
    chosen
}
