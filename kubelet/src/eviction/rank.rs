//! Which pod goes first, and what it is told. Pure.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;

use super::judge::Met;
use super::threshold::binary;
use crate::pod;
use crate::resources::{pod_request, request};

/// What a container uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContainerUsage {
    /// Its name in the pod.
    pub name: String,
    /// Working set, in bytes.
    pub memory: i64,
    /// Own layer and logs, in bytes.
    pub disk: i64,
    /// Files of its own layer.
    pub inodes: i64,
}

/// What a pod uses.
#[derive(Clone, Debug, Default)]
pub struct PodUsage {
    /// The pod.
    pub pod: Arc<Pod>,
    /// Working set, in bytes.
    pub memory: i64,
    /// Own layers, logs and emptyDir volumes on disk, in bytes.
    pub disk: i64,
    /// Files of both.
    pub inodes: i64,
    /// Processes.
    pub processes: i64,
    /// By container.
    pub containers: Vec<ContainerUsage>,
}

impl PodUsage {
    fn of(&self, resource: &str) -> i64 {
        match resource {
            "memory" => self.memory,
            "ephemeral-storage" => self.disk,
            "inodes" => self.inodes,
            _ => self.processes,
        }
    }

    /// What it asked for; nobody asks for inodes or processes.
    fn request(&self, resource: &str) -> i64 {
        match resource {
            "memory" | "ephemeral-storage" => pod_request(&self.pod, resource).units(),
            _ => 0,
        }
    }
}

/// Sorts the pods: the first is to go first. Those that use more than they asked for, then the less important ones, then those that
/// use most above what they asked for.
pub fn rank(pods: &mut [PodUsage], resource: &str) {
    pods.sort_by_key(|usage| {
        let (used, requested) = (usage.of(resource), usage.request(resource));
        let within = used <= requested && resource != "pids";
        let priority = pod::spec(&usage.pod).priority.unwrap_or(0);
        (within, priority, std::cmp::Reverse(used.saturating_sub(requested)))
    });
}

/// What the evicted pod is told, in the upstream's words, and then whose bytes they were.
pub fn message(met: &Met, usage: &PodUsage) -> String {
    let resource = met.threshold.signal.resource();
    let shown = |amount: i64| if resource == "inodes" || resource == "pids" { amount.to_string() } else { binary(amount) };
    let mut text = format!(
        "The node was low on resource: {resource}. Threshold quantity: {}, available: {}. ",
        shown(met.quantity()),
        shown(met.seen.available)
    );
    for container in &usage.containers {
        let used = match resource {
            "memory" => container.memory,
            "ephemeral-storage" => container.disk,
            _ => continue,
        };
        let all = pod::init_containers(&usage.pod).iter().chain(&pod::spec(&usage.pod).containers);
        let requested =
            all.into_iter().find(|c| c.name == container.name).and_then(|c| request(c, resource)).map_or(0, |a| a.units());
        if used > requested {
            text.push_str(&format!(
                "Container {} was using {}, request is {}, has larger consumption of {resource}. ",
                container.name,
                shown(used),
                shown(requested)
            ));
        }
    }
    text
}

/// The biggest users on one line, for a log where nobody may be evicted.
pub fn biggest(pods: &[PodUsage], resource: &str) -> String {
    let mut sorted: Vec<_> = pods.iter().map(|usage| (usage.of(resource), usage)).filter(|(used, _)| *used > 0).collect();
    sorted.sort_by_key(|(used, _)| std::cmp::Reverse(*used));
    let shown = |amount: i64| if resource == "inodes" || resource == "pids" { amount.to_string() } else { binary(amount) };
    let three: Vec<String> =
        sorted.iter().take(3).map(|(used, usage)| format!("{} {}", pod::format_pod(&usage.pod), shown(*used))).collect();
    if three.is_empty() { "no pod uses any".to_owned() } else { three.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eviction::judge::Observation;
    use crate::eviction::threshold::{Quota, Signal, Threshold};
    use crate::source::{defaults::apply_defaults, parse::parse_manifest};

    fn usage(name: &str, priority: i32, request: &str, memory: i64) -> PodUsage {
        let text = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: {name}}}, spec: {{priority: {priority}, containers: [{{name: c, image: i, resources: {{requests: {{memory: {request}}}}}}}]}}}}"
        );
        let mut pod = parse_manifest(&text).unwrap().pods.remove(0).pod;
        apply_defaults(&mut pod);
        let containers = vec![ContainerUsage { name: "c".into(), memory, disk: memory, inodes: 7 }];
        PodUsage { pod: Arc::new(pod), memory, disk: memory, inodes: memory, processes: memory, containers }
    }

    fn order(pods: &mut [PodUsage], resource: &str) -> String {
        rank(pods, resource);
        pods.iter().map(|usage| pod::name(&usage.pod)).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn who_uses_more_than_asked_for_goes_first_then_the_less_important_then_the_bigger() {
        let mut pods = [
            usage("within", 0, "100Mi", 50 << 20),
            usage("important", 9, "0", 900 << 20),
            usage("small", 0, "10Mi", 20 << 20),
            usage("big", 0, "100Mi", 300 << 20),
        ];
        assert_eq!(order(&mut pods, "memory"), "big small important within");
        assert_eq!(order(&mut pods, "ephemeral-storage"), "big within small important", "nothing of it was asked for");
        assert_eq!(order(&mut pods, "pids"), "big within small important");
    }

    #[test]
    fn the_message_says_whose_bytes_they_were() {
        let threshold =
            Threshold { signal: Signal::MemoryAvailable, below: Quota::Amount(100 << 20), grace: None, reclaim: None };
        let met = Met { threshold, seen: Observation { available: 80 << 20, capacity: 1 << 30 } };
        assert_eq!(
            message(&met, &usage("a", 0, "10Mi", 300 << 20)),
            "The node was low on resource: memory. Threshold quantity: 100Mi, available: 80Mi. \
             Container c was using 300Mi, request is 10Mi, has larger consumption of memory. "
        );
        assert!(message(&met, &usage("a", 0, "1Gi", 300 << 20)).ends_with("available: 80Mi. "));
        assert_eq!(
            biggest(&[usage("a", 0, "0", 1 << 20), usage("b", 0, "0", 2 << 20)], "memory"),
            "b_default() 2Mi, a_default() 1Mi"
        );
    }
}
