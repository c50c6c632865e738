//! The probers of a pod's running containers, and what they tell.

use super::Worker;
use crate::clock::Now;
use crate::memory::{ProbeResults, Unhealthy};
use crate::observed::State;
use crate::pod;
use crate::probe::{Kind, Subject, Tools};
use crate::status;

impl Worker {
    pub(super) fn probed(&mut self, id: String, kind: Kind, well: bool, grace: Option<i64>) {
        if let Some(results) = self.memory.probes.get_mut(&id) {
            match kind {
                Kind::Startup => results.started |= well,
                Kind::Readiness => results.ready = well,
                Kind::Liveness => {}
            }
        }
        if !well && kind != Kind::Readiness {
            self.memory.condemned.insert(id.clone(), kind.as_str());
            self.memory.unhealthy.insert(id, Unhealthy { probe: kind.as_str(), grace });
        }
    }

    /// Starts the probers of containers that run, ends those of others.
    pub(super) fn keep_probers(&mut self, now: Now) {
        let observed = self.observed.clone();
        let running = |id: &str| observed.containers.iter().any(|c| c.id == id && c.state == State::Running);
        let ending = self.memory.terminating.is_some();
        self.probers.retain(|id, kind| running(id) && (!ending || kind == Kind::Readiness));
        let addresses = match pod::is_host_network(&self.pod) {
            true => &self.executor.node.host_ips,
            false => &self.memory.ips,
        };
        let ip = addresses.first().and_then(|ip| ip.parse().ok());
        for container in pod::spec(&self.pod).containers.iter().chain(pod::sidecars(&self.pod)) {
            let Some(record) = observed.newest(&container.name).filter(|c| c.state == State::Running) else { continue };
            if self.memory.is_hooked(record) {
                continue;
            }
            let since = self.memory.running.get(&record.id).copied().unwrap_or(now.mono);
            let age = now.mono.saturating_duration_since(since);
            let up = now.mono.saturating_duration_since(self.executor.began);
            let adopted = self.memory.adopted.contains(&record.id).then_some(up);
            let subject = Subject { pod: &self.pod, container, id: &record.id, age, adopted, ip };
            // What an earlier kubelet has found out of this very container holds until a probe says otherwise.
            let known = status::known(&self.memory, &self.executor.node, record);
            let results = self.memory.probes.entry(record.id.clone()).or_insert(ProbeResults {
                started: container.startup_probe.is_none() || known.is_some_and(|(started, _)| started),
                ready: container.readiness_probe.is_none() || known.is_some_and(|(_, ready)| ready),
            });
            let kinds: &[Kind] = match (results.started, ending) {
                (_, true) => &[],
                (false, _) => &[Kind::Startup],
                (true, _) => &[Kind::Liveness, Kind::Readiness],
            };
            for kind in kinds {
                let tools = || Tools {
                    runtime: self.executor.runtime.clone(),
                    recorder: self.executor.recorder.clone(),
                    inbox: self.own_inbox.clone(),
                };
                self.probers.ensure(&subject, *kind, tools);
            }
        }
    }
}
