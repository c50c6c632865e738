//! Tests only: a pod, what the runtime has of it and what the worker remembers, put together in a few words.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use k8s_openapi::jiff::Timestamp;
use tokio::time::Instant;

use crate::clock::Now;
use crate::config::Config;
use crate::memory::PodMemory;
use crate::node::NodeView;
use crate::observed::{Container, PodObserved, Sandbox, State};
use crate::plan::{Plan, Situation, container_hash, plan};
use crate::source::{defaults::apply_defaults, parse::parse_manifest};
use crate::{pod, status};

/// A situation that owns its parts.
pub struct Scene {
    pub pod: Pod,
    pub observed: PodObserved,
    pub memory: PodMemory,
    pub node: NodeView,
    pub now: Now,
}

impl Scene {
    /// A prepared pod with this spec, of which the runtime has nothing.
    pub fn new(spec: &str) -> Scene {
        let text = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: web, uid: u1, annotations: {{kubernetes.io/config.source: file}}}}, spec: {spec}}}"
        );
        let mut pod = parse_manifest(&text).unwrap().pods.remove(0).pod;
        apply_defaults(&mut pod);
        let now = Now { mono: Instant::now() + Duration::from_secs(1000), wall: Timestamp::from_second(5000).unwrap() };
        let channel = tonic::transport::Endpoint::from_static("http://unused").connect_lazy();
        let mut memory = PodMemory::new(&Config::new("n", channel), now, Default::default());
        memory.prepared = true;
        let node =
            NodeView { name: "n".into(), host_ips: vec!["192.0.2.1".into()], runtime_name: "fake".into(), ..NodeView::default() };
        Scene { pod, observed: PodObserved::default(), memory, node, now }
    }

    /// One container `c` with this restart policy.
    pub fn with_policy(policy: &str) -> Scene {
        Scene::new(&format!("{{restartPolicy: {policy}, containers: [{{name: c, image: i}}]}}"))
    }

    /// Adds a sandbox as the newest.
    pub fn sandbox(mut self, attempt: u32, ready: bool) -> Scene {
        let ips = if ready { vec![format!("10.0.0.{attempt}")] } else { Vec::new() };
        let sandbox = Sandbox {
            id: format!("s{attempt}"),
            attempt,
            ready,
            ips,
            has_network: true,
            host_network: pod::is_host_network(&self.pod),
            ..Sandbox::default()
        };
        self.observed.sandboxes.insert(0, sandbox);
        self
    }

    /// Adds a container as the newest, in the newest sandbox.
    pub fn container(mut self, name: &str, attempt: u32, state: State, exit_code: i32) -> Scene {
        let all = pod::init_containers(&self.pod).iter().chain(&pod::spec(&self.pod).containers);
        let hash = all.into_iter().find(|c| c.name == name).map(container_hash).unwrap_or_default();
        let container = Container {
            id: format!("{name}{attempt}"),
            name: name.to_owned(),
            attempt,
            sandbox_id: self.observed.sandboxes.first().map(|s| s.id.clone()).unwrap_or_default(),
            state,
            exit_code,
            started_at: 1_500_000_000,
            finished_at: if state == State::Exited { 2_500_000_000 } else { 0 },
            reason: if state == State::Exited { "Completed".into() } else { String::new() },
            hash,
            ..Container::default()
        };
        self.observed.containers.insert(0, container);
        self
    }

    /// Changes what the worker remembers.
    pub fn remembering(mut self, change: impl FnOnce(&mut PodMemory, Now)) -> Scene {
        change(&mut self.memory, self.now);
        self
    }

    fn situation(&self) -> Situation<'_> {
        Situation { pod: &self.pod, observed: &self.observed, memory: &self.memory, node: &self.node, now: self.now }
    }

    /// Takes note of the records, then plans.
    pub fn plan(&mut self) -> Plan {
        let observed = self.observed.clone();
        self.memory.note(&observed, self.now);
        let plan = plan(&self.situation());
        for (name, reason) in &plan.waiting {
            self.memory.reasons.insert(name.clone(), reason.clone());
        }
        plan
    }

    /// The plan's steps in short: `start c/1`, `stop c0`, `sandbox 1`.
    pub fn steps(&mut self) -> String {
        use crate::plan::PodOp::*;
        let plan = self.plan();
        let step = |op: &crate::plan::PodOp| match op {
            Prepare => "prepare".to_owned(),
            StopContainer { id, grace, stage: 0, .. } => format!("stop {id} {grace}"),
            StopContainer { id, grace, stage, .. } => format!("stop {id} {grace} after {stage}"),
            StopSandbox { id } => format!("stop {id}"),
            CreateSandbox { attempt } => format!("sandbox {attempt}"),
            StartContainer { name, attempt, pull, .. } => {
                format!("start {name}/{attempt}{}", if *pull { "" } else { " if present" })
            }
            Pin { id, cpus } => format!("pin {id} to {cpus}"),
            Resize { id, .. } => format!("resize {id}"),
            RemoveContainer { id } => format!("remove {id}"),
            KeepEnd => "keep the end".to_owned(),
            ClearContainer { id } => format!("clear {id}"),
            RemoveSandbox { id } => format!("remove {id}"),
            PostStart { id, .. } => format!("hook {id}"),
            Release { forget, .. } => format!("release{}", if *forget { " and forget" } else { "" }),
        };
        let steps: Vec<_> = plan.ops.iter().map(step).collect();
        if plan.finished { "finished".to_owned() } else { steps.join(", ") }
    }

    /// Plans, then gives the status.
    pub fn status(&mut self) -> PodStatus {
        self.plan();
        status::status(&self.situation())
    }
}
