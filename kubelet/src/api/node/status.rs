//! Sends the node's status: at once when something changes, else a whole report every five minutes. Gathers what there is to say and
//! leaves the judging to the pure files beside it.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ContainerImage, Node, NodeStatus};
use kube::Api;
use kube::api::{Patch, PatchParams};
use rand::Rng as _;
use tokio::sync::watch;
use tokio::time::Instant;

use super::own::status_of;
use super::runtime::{FAST, FAST_START, Seen};
use super::{Answer, CALL, NodeAgent, conditions, jittered, limited, object, patch, pauses, register};
use crate::cri as calls;
use crate::node::Capacity;
use crate::record::Weight;

/// The list of images is asked for anew after so long, as upstream.
const IMAGES_KEPT: Duration = Duration::from_secs(30);
/// Attempts of one pass, as upstream.
const TRIES: u32 = 5;

/// How long a node that was Ready is not called otherwise by an agent that has just started: it does not know yet.
const STARTING: Duration = Duration::from_secs(5);

/// What became of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Passed {
    /// The API server has what there is to say.
    Sent,
    /// There is no object to say it of.
    NoObject,
    /// It was not taken, or there was no answer.
    Refused,
}

/// How soon the next pass comes where it comes sooner than in the ordinary period: while the node is not Ready yet. What is refused now is
/// mostly refused again, and asked less and less often.
fn hurry(passed: Passed, is_starting: bool, refusals: usize) -> Option<Duration> {
    match passed {
        Passed::Sent if is_starting => Some(FAST),
        Passed::Refused if is_starting => pauses().nth(refusals),
        _ => None,
    }
}

/// Whether a status says that the node is ready.
fn says_ready(status: &NodeStatus) -> bool {
    status.conditions.iter().flatten().any(|condition| condition.type_ == conditions::READY && condition.status == "True")
}

/// What a pass remembers of those before.
struct Reporter {
    agent: NodeAgent,
    started: Instant,
    seen: watch::Receiver<Seen>,
    runtime: Option<(String, String)>,
    images: Vec<ContainerImage>,
    images_at: Option<Instant>,
    devices_seen: BTreeSet<String>,
    /// When a whole report is due.
    report_at: Option<Instant>,
    compared_boot: bool,
    was_ready: watch::Sender<bool>,
}

/// Registers the node and keeps its status. Never returns.
pub(super) async fn run(agent: NodeAgent, seen: watch::Receiver<Seen>, was_ready: watch::Sender<bool>) {
    let runtime = match agent.runtime.version().await {
        Ok(version) => Some((version.runtime_name, version.runtime_version)),
        Err(error) => {
            tracing::warn!(error = %calls::message(&error), "the runtime does not tell its version");
            None
        }
    };
    let mut reporter = Reporter {
        agent: agent.clone(),
        started: Instant::now(),
        seen,
        runtime,
        images: Vec::new(),
        images_at: None,
        devices_seen: BTreeSet::new(),
        report_at: None,
        compared_boot: false,
        was_ready,
    };
    reporter.look_at_images().await;
    if agent.config.node.register {
        reporter.register().await;
    }
    let fast_until = Instant::now() + FAST_START;
    let mut refusals = 0;
    loop {
        let passed = reporter.pass().await;
        refusals = if passed == Passed::Refused { refusals + 1 } else { 0 };
        let is_starting = !*reporter.was_ready.borrow() && Instant::now() < fast_until;
        let period = hurry(passed, is_starting, refusals).unwrap_or_else(|| jittered(agent.config.node.update, 4));
        tokio::select! {
            () = agent.own.woken() => {}
            () = tokio::time::sleep(period) => {}
        }
    }
}

impl Reporter {
    async fn look_at_images(&mut self) {
        let now = Instant::now();
        if self.images_at.is_some_and(|at| now.saturating_duration_since(at) < IMAGES_KEPT) {
            return;
        }
        match self.agent.runtime.list_images().await {
            Ok(listed) => {
                self.images = object::images(&listed, self.agent.config.node.max_images);
                self.images_at = Some(now);
            }
            Err(error) => tracing::warn!(error = %calls::message(&error), "the runtime does not list its images"),
        }
    }

    fn with_facts<T>(&self, use_: impl FnOnce(&object::Facts<'_>) -> T) -> T {
        let agent = &self.agent;
        let (addresses, seen, devices) = (agent.addresses.borrow().clone(), self.seen.borrow().clone(), agent.devices.capacity());
        let huge_pages = super::machine::huge_pages(&agent.capacity.huge_pages, Path::new("/sys/kernel/mm/hugepages"));
        let server = &agent.config.server;
        use_(&object::Facts {
            name: &agent.config.node_name,
            settings: &agent.config.node,
            addresses: &addresses,
            capacity: &agent.capacity,
            huge_pages: &huge_pages,
            thresholds: &agent.config.eviction.thresholds,
            local_storage: agent.config.eviction.local_storage,
            max_pods: agent.config.max_pods,
            devices: &devices,
            devices_seen: &self.devices_seen,
            machine: &agent.machine,
            runtime: self.runtime.as_ref(),
            handlers: &seen.handlers,
            features: seen.features.as_ref(),
            port: server.port.filter(|_| server.enabled).unwrap_or(0),
            images: &self.images,
            volumes_in_use: agent.own.volumes_in_use(),
        })
    }

    /// Why the node is not ready now.
    fn errors(&self) -> Vec<String> {
        let agent = &self.agent;
        let Capacity { cpu_millis, memory_bytes, .. } = agent.capacity;
        let mut errors = self.seen.borrow().errors(agent.health.listed(), Instant::now());
        errors.extend(conditions::missing_capacity(cpu_millis, memory_bytes));
        if !agent.is_csi_ready() {
            errors.push(conditions::NO_CSI_NODE.to_owned());
        }
        if agent.state.current().shutting_down {
            errors.push(conditions::SHUTTING_DOWN.to_owned());
        }
        errors
    }

    fn judged(&self, mut status: NodeStatus) -> (NodeStatus, Vec<String>) {
        let observed = status.conditions.take().unwrap_or_default();
        let now = self.agent.config.clock.now();
        let (conditions, events) = conditions::judge(&observed, self.agent.state.current(), &self.errors(), now);
        status.conditions = Some(conditions);
        (status, events)
    }

    /// Makes the object with a whole status, or takes the one that is there.
    async fn register(&self) {
        let nodes: Api<Node> = Api::all(self.agent.api.client.clone());
        for pause in pauses() {
            let mut node = self.with_facts(object::node_object);
            let (status, events) = self.judged(status_of(&node));
            node.status = Some(status);
            match register::register(&nodes, &node, self.agent.fresh_devices).await {
                Ok((node, made)) => {
                    self.agent.own.set(node);
                    if made {
                        self.tell(events);
                    }
                    return;
                }
                Err(error) => tracing::warn!(node = self.agent.config.node_name, %error, "the node is not registered yet"),
            }
            tokio::time::sleep(pause).await;
        }
    }

    fn tell(&self, reasons: Vec<String>) {
        for reason in reasons {
            let message = format!("Node {} status is now: {reason}", self.agent.config.node_name);
            self.agent.recorder.node_event(Weight::Normal, &reason, &message);
        }
    }

    /// Compares what is with what the object says, and sends what has to be.
    async fn pass(&mut self) -> Passed {
        self.look_at_images().await;
        let nodes: Api<Node> = Api::all(self.agent.api.heartbeats.clone());
        let mut problem = String::new();
        for attempt in 0..TRIES {
            let observed = match self.agent.own.current().filter(|_| attempt == 0) {
                Some(node) => node,
                None => match limited(CALL, nodes.get_opt(&self.agent.config.node_name)).await {
                    Ok(Some(node)) => node.into(),
                    Ok(None) => {
                        tracing::debug!(node = self.agent.config.node_name, "there is no such node: its status is not sent");
                        return Passed::NoObject;
                    }
                    Err(error) => {
                        problem = error.to_string();
                        continue;
                    }
                },
            };
            match self.report(&nodes, &observed).await {
                Ok(()) => return Passed::Sent,
                Err(error) => problem = error.to_string(),
            }
        }
        tracing::warn!(node = self.agent.config.node_name, problem, "the API server does not take the node's status");
        if self.agent.own.current().is_some() { Passed::Refused } else { Passed::NoObject }
    }

    async fn report(&mut self, nodes: &Api<Node>, observed: &Node) -> Answer<()> {
        let before = status_of(observed);
        self.compare_boot(&before);
        let (wanted, events) = self.judged(self.with_facts(|facts| object::node_status(facts, &before)));
        let is_ready = says_ready(&wanted);
        let starts = !*self.was_ready.borrow() && self.started.elapsed() < STARTING;
        if starts && says_ready(&before) && !is_ready {
            return Ok(());
        }
        let devices = self.agent.devices.capacity();
        self.devices_seen.extend(devices.into_keys());
        let now = Instant::now();
        let due = self.report_at.is_none_or(|at| now >= at);
        if let Some(changes) = patch::plan_patch(&wanted, &before, due) {
            let name = &self.agent.config.node_name;
            let sent = limited(CALL, nodes.patch_status(name, &PatchParams::default(), &Patch::Strategic(changes))).await?;
            self.agent.own.set(sent);
            let report = self.agent.config.node.report;
            // After a change the next whole report comes at another time than those of the other nodes.
            self.report_at = Some(now + if due { report } else { report.mul_f64(rand::rng().random_range(0.5..1.5)) });
            self.tell(events);
        }
        if is_ready {
            self.was_ready.send_if_modified(|ready| !std::mem::replace(ready, true));
        }
        Ok(())
    }

    /// Says once when the machine has been started again since the last report.
    fn compare_boot(&mut self, before: &NodeStatus) {
        let boot = before.node_info.as_ref().map(|info| info.boot_id.as_str()).unwrap_or_default();
        let now = &self.agent.machine.boot_id;
        if !std::mem::replace(&mut self.compared_boot, true) && !boot.is_empty() && boot != now {
            let name = &self.agent.config.node_name;
            let message = format!("Node {name} has been rebooted, boot id: {now}");
            self.agent.recorder.node_event(Weight::Warning, "Rebooted", &message);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_in_a_hurry_unless_the_server_refuses() {
        for (passed, is_starting, refusals, expected) in [
            (Passed::Sent, true, 0, Some(100)),
            (Passed::Sent, false, 0, None),
            (Passed::NoObject, true, 0, None),
            (Passed::Refused, true, 1, Some(200)),
            (Passed::Refused, true, 4, Some(1600)),
            (Passed::Refused, true, 50, Some(7000)),
            (Passed::Refused, false, 1, None),
        ] {
            let found = hurry(passed, is_starting, refusals).map(|period| period.as_millis());
            assert_eq!(found, expected, "{passed:?} {is_starting} {refusals}");
        }
    }
}
