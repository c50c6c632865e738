//! Pure: whether a new pod may run on this node, and if not, the upstream's reason and message. Keeps nothing.
//!
//! Not judged here: sysctls (a manifest that asks for what the node refuses is refused with its file), host ports (the main loop
//! knows who has them).

use k8s_openapi::api::core::v1::{Pod, PodCondition, PodStatus, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use crate::node::NodeView;
use crate::pod;
use crate::quantity::Amount;
use crate::resources::{QosClass, pod_request, qos_class};
use crate::volume::claim::selects_node;

/// Pods of at least this priority are critical (`system-cluster-critical`).
pub const CRITICAL_PRIORITY: i32 = 2_000_000_000;

/// The reason of pods that choose by labels which the node does not have.
pub(crate) const NODE_AFFINITY: &str = "NodeAffinity";
const TAINT_TOLERATION: &str = "TaintToleration";

/// What the node says of itself when a pod asks to be let in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeConditions {
    /// Memory runs out.
    pub memory_pressure: bool,
    /// The disk runs out.
    pub disk_pressure: bool,
    /// Process IDs run out.
    pub pid_pressure: bool,
    /// The machine goes down: no pod is let in.
    pub shutting_down: bool,
}

/// Why a pod is not let in; it has failed then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The status' reason.
    pub reason: String,
    /// What follows `Pod was rejected: `.
    pub message: String,
    /// Resources are what is missing: pods of lower priority could make room.
    pub missing: bool,
}

impl Rejection {
    pub(crate) fn new(reason: &str, message: impl Into<String>) -> Rejection {
        Rejection { reason: reason.to_owned(), message: message.into(), missing: false }
    }

    /// Whether labels or taints of the node's object are the reason: there may be others by now.
    pub(crate) fn is_by_node_object(&self) -> bool {
        matches!(self.reason.as_str(), NODE_AFFINITY | TAINT_TOLERATION)
    }

    /// The status of a pod that is not let in.
    pub fn status(&self, pod: &Pod, now: Timestamp) -> PodStatus {
        let scheduled = PodCondition {
            type_: "PodScheduled".to_owned(),
            status: "True".to_owned(),
            last_transition_time: Some(Time(crate::observed::whole_second(now))),
            observed_generation: pod.metadata.generation,
            ..PodCondition::default()
        };
        PodStatus {
            phase: Some("Failed".to_owned()),
            reason: Some(self.reason.clone()),
            message: Some(format!("Pod was rejected: {}", self.message)),
            qos_class: Some(qos_class(pod).as_str().to_owned()),
            start_time: Some(Time(crate::observed::whole_second(now))),
            observed_generation: pod.metadata.generation,
            conditions: Some(vec![scheduled]),
            ..PodStatus::default()
        }
    }
}

/// Whether losing this pod harms the node itself: pods of its own sources, and those of critical priority.
pub fn is_critical(pod: &Pod) -> bool {
    pod::is_static(pod) || pod::spec(pod).priority.is_some_and(|priority| priority >= CRITICAL_PRIORITY)
}

/// Lets a pod in, or says why not. `others` are the pods that have been let in and have not ended.
pub fn admit(pod: &Pod, others: &[&Pod], node: &NodeView, max_pods: usize, conditions: NodeConditions) -> Result<(), Rejection> {
    check_pressure(pod, conditions)?;
    check_system(pod, node)?;
    check_resources(pod, others, node, max_pods)?;
    check_labels(pod, node)?;
    let wanted = pod::spec(pod).node_name.as_deref().filter(|name| !name.is_empty());
    if wanted.is_some_and(|name| name != node.name) {
        let text = "Predicate NodeName failed: node(s) didn't match the requested node name";
        return Err(Rejection::new("NodeName", text));
    }
    check_taints(pod, node)?;
    if conditions.shutting_down {
        return Err(Rejection::new("NodeShutdown", "Pod was rejected as the node is shutting down."));
    }
    Ok(())
}

fn check_pressure(pod: &Pod, now: NodeConditions) -> Result<(), Rejection> {
    let named = [(now.memory_pressure, "MemoryPressure"), (now.disk_pressure, "DiskPressure"), (now.pid_pressure, "PIDPressure")];
    let pressures: Vec<&str> = named.into_iter().filter_map(|(set, name)| set.then_some(name)).collect();
    if pressures.is_empty() || is_critical(pod) {
        return Ok(());
    }
    let tolerates = pod::spec(pod).tolerations.iter().flatten().any(|toleration| {
        let key = toleration.key.as_deref().unwrap_or_default();
        let effect = toleration.effect.as_deref().unwrap_or_default();
        let every = key.is_empty() && toleration.operator.as_deref() == Some("Exists");
        (every || key == "node.kubernetes.io/memory-pressure") && matches!(effect, "" | "NoSchedule")
    });
    // What gives memory back first does not come in while it runs out; the others have asked for theirs.
    if pressures == ["MemoryPressure"] && (qos_class(pod) != QosClass::BestEffort || tolerates) {
        return Ok(());
    }
    Err(Rejection::new("Evicted", format!("The node had condition: [{}]. ", pressures.join(" "))))
}

fn check_system(pod: &Pod, node: &NodeView) -> Result<(), Rejection> {
    let label = pod.metadata.labels.as_ref().and_then(|labels| labels.get("kubernetes.io/os"));
    if label.is_some_and(|os| os != "linux") {
        let text = "Failed to admit pod as the `kubernetes.io/os` label doesn't match node label";
        return Err(Rejection::new("PodOSSelectorNodeLabelDoesNotMatch", text));
    }
    if pod::spec(pod).os.as_ref().is_some_and(|os| os.name != "linux") {
        return Err(Rejection::new("PodOSNotSupported", "Failed to admit pod as the OS field doesn't match node OS"));
    }
    if !node.capacity.app_armor && wants_app_armor(pod) {
        return Err(Rejection::new("AppArmor", "Cannot enforce AppArmor: AppArmor is not enabled on the host"));
    }
    Ok(())
}

/// Taints that end pods let none in that does not tolerate them; the node's own pods tolerate all.
fn check_taints(pod: &Pod, node: &NodeView) -> Result<(), Rejection> {
    let tolerates = |taint: &Taint| {
        pod::spec(pod).tolerations.iter().flatten().any(|toleration| {
            let (key, effect) = (toleration.key.as_deref().unwrap_or_default(), toleration.effect.as_deref().unwrap_or_default());
            let exists = toleration.operator.as_deref() == Some("Exists");
            let value = toleration.value.as_deref().unwrap_or_default() == taint.value.as_deref().unwrap_or_default();
            (effect.is_empty() || effect == taint.effect) && (key == taint.key || key.is_empty() && exists) && (exists || value)
        })
    };
    let taints = node.own.taints();
    let mut ending = taints.iter().filter(|taint| taint.effect == "NoExecute");
    if pod::is_static(pod) || ending.all(tolerates) {
        return Ok(());
    }
    let text = "Predicate TaintToleration failed: node(s) had taints that the pod didn't tolerate";
    Err(Rejection::new(TAINT_TOLERATION, text))
}

/// Whether a container is to run under a profile.
fn wants_app_armor(pod: &Pod) -> bool {
    let of_pod = pod::spec(pod).security_context.as_ref().and_then(|context| context.app_armor_profile.as_ref());
    pod::all_containers(pod).any(|container| {
        let own = container.security_context.as_ref().and_then(|context| context.app_armor_profile.as_ref());
        own.or(of_pod).is_some_and(|profile| profile.type_ != "Unconfined")
    })
}

/// The node's labels are what a pod can choose by.
fn check_labels(pod: &Pod, node: &NodeView) -> Result<(), Rejection> {
    let spec = pod::spec(pod);
    let labels = node.own.labels(&node.name);
    let selected = spec.node_selector.iter().flatten().all(|(key, value)| labels.get(key) == Some(value));
    let affinity = spec.affinity.as_ref().and_then(|affinity| affinity.node_affinity.as_ref());
    let required = affinity.and_then(|affinity| affinity.required_during_scheduling_ignored_during_execution.as_ref());
    if selected && required.is_none_or(|selector| selects_node(selector, &labels, &node.name)) {
        return Ok(());
    }
    let text = "Predicate NodeAffinity failed: node(s) didn't match Pod's node affinity/selector";
    Err(Rejection::new(NODE_AFFINITY, text))
}

/// A resource as admission counts it: its name, and what of it is asked for, used and there.
pub(crate) fn resource_numbers(pod: &Pod, others: &[&Pod], node: &NodeView) -> Vec<(&'static str, [i64; 3])> {
    let number = |name: &str, amount: Amount| if name == "cpu" { amount.millis() } else { amount.units() };
    let numbers = |name: &'static str| {
        let used = others.iter().map(|other| number(name, pod_request(other, name))).fold(0i64, i64::saturating_add);
        (name, [number(name, pod_request(pod, name)), used, number(name, node.capacity.amount(name))])
    };
    ["cpu", "memory", "ephemeral-storage"].map(numbers).into()
}

fn check_resources(pod: &Pod, others: &[&Pod], node: &NodeView, max_pods: usize) -> Result<(), Rejection> {
    let out_of = |name: &str, [requested, used, capacity]: [i64; 3]| Rejection {
        reason: format!("OutOf{name}"),
        message: format!("Node didn't have enough resource: {name}, requested: {requested}, used: {used}, capacity: {capacity}"),
        missing: true,
    };
    let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
    if others.len() + 1 > max_pods {
        return Err(out_of("pods", [1, count(others.len()), count(max_pods)]));
    }
    for (name, numbers) in resource_numbers(pod, others, node) {
        let [requested, used, capacity] = numbers;
        // A capacity that could not be read refuses nobody.
        if requested > 0 && capacity > 0 && requested > capacity.saturating_sub(used) {
            return Err(out_of(name, numbers));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::Capacity;
    use crate::source::{defaults::apply_defaults, parse::parse_manifest};

    fn pod(origin: &str, spec: &str) -> Pod {
        let text = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: a, annotations: {{kubernetes.io/config.source: {origin}}}}}, spec: {spec}}}"
        );
        let mut pod = parse_manifest(&text).unwrap().pods.remove(0).pod;
        apply_defaults(&mut pod);
        pod
    }

    fn with(resources: &str) -> Pod {
        pod("api", &format!("{{containers: [{{name: c, image: i, resources: {resources}}}]}}"))
    }

    fn node() -> NodeView {
        let capacity = Capacity { cpu_millis: 2000, memory_bytes: 1 << 30, ..Capacity::default() };
        NodeView { name: "n".into(), capacity, ..NodeView::default() }
    }

    fn verdict(pod: &Pod, others: &[&Pod], conditions: NodeConditions) -> String {
        match admit(pod, others, &node(), 3, conditions) {
            Ok(()) => "in".to_owned(),
            Err(rejection) => format!("{}: {}", rejection.reason, rejection.message),
        }
    }

    #[test]
    fn a_pod_is_let_in_or_told_why_not() {
        let calm = NodeConditions::default();
        let one_cpu = with("{requests: {cpu: 1, memory: 512Mi}}");
        let (two_cpus, nothing) = (with("{requests: {cpu: 1500m}}"), with("{}"));
        let elsewhere = pod("api", "{nodeName: other, containers: [{name: c, image: i}]}");
        let cases = [
            (&one_cpu, vec![], "in"),
            (&one_cpu, vec![&one_cpu], "in"),
            (
                &two_cpus,
                vec![&one_cpu],
                "OutOfcpu: Node didn't have enough resource: cpu, requested: 1500, used: 1000, capacity: 2000",
            ),
            (
                &with("{requests: {memory: 600Mi}}"),
                vec![&one_cpu],
                "OutOfmemory: Node didn't have enough resource: memory, requested: 629145600, used: 536870912, capacity: 1073741824",
            ),
            (&nothing, vec![&one_cpu, &one_cpu], "in"),
            (
                &nothing,
                vec![&nothing, &nothing, &nothing],
                "OutOfpods: Node didn't have enough resource: pods, requested: 1, used: 3, capacity: 3",
            ),
            (&elsewhere, vec![], "NodeName: Predicate NodeName failed: node(s) didn't match the requested node name"),
        ];
        for (pod, others, expected) in cases {
            assert_eq!(verdict(pod, &others, calm), expected);
        }
    }

    #[test]
    fn pressure_keeps_out_what_it_would_drive_out_again() {
        let memory = NodeConditions { memory_pressure: true, ..NodeConditions::default() };
        let disk = NodeConditions { disk_pressure: true, ..memory };
        let (best_effort, burstable) = (with("{}"), with("{requests: {cpu: 1m}}"));
        let tolerant = pod(
            "api",
            "{tolerations: [{key: node.kubernetes.io/memory-pressure, operator: Exists}], containers: [{name: c, image: i}]}",
        );
        let own = pod("file", "{containers: [{name: c, image: i}]}");
        let refused = "Evicted: The node had condition: [MemoryPressure]. ";
        for (pod, conditions, expected) in [
            (&best_effort, memory, refused),
            (&burstable, memory, "in"),
            (&tolerant, memory, "in"),
            (&own, memory, "in"),
            (&burstable, disk, "Evicted: The node had condition: [MemoryPressure DiskPressure]. "),
            (&own, disk, "in"),
        ] {
            assert_eq!(verdict(pod, &[], conditions), expected);
        }
    }

    #[test]
    fn a_machine_that_goes_down_lets_nobody_in() {
        let down = NodeConditions { shutting_down: true, ..NodeConditions::default() };
        let own = pod("file", "{containers: [{name: c, image: i}]}");
        assert_eq!(verdict(&own, &[], down), "NodeShutdown: Pod was rejected as the node is shutting down.");
    }

    #[test]
    fn a_taint_that_ends_pods_lets_none_in_that_does_not_tolerate_it() {
        let tainted = node();
        let taint = |effect: &str| serde_json::json!({"key": "k", "value": "v", "effect": effect});
        let object = |effect: &str| serde_json::json!({"metadata": {"name": "n"}, "spec": {"taints": [taint(effect)]}});
        let cases = [
            ("api", "NoExecute", "[]", false),
            ("file", "NoExecute", "[]", true),
            ("api", "NoSchedule", "[]", true),
            ("api", "NoExecute", "[{operator: Exists}]", true),
            ("api", "NoExecute", "[{key: k, operator: Exists, effect: NoSchedule}]", false),
            ("api", "NoExecute", "[{key: k, value: v, effect: NoExecute}]", true),
            ("api", "NoExecute", "[{key: k, operator: Equal, value: w}]", false),
        ];
        for (origin, effect, tolerations, let_in) in cases {
            tainted.own.set(serde_json::from_value(object(effect)).unwrap());
            let pod = pod(origin, &format!("{{tolerations: {tolerations}, containers: [{{name: c, image: i}}]}}"));
            let verdict = admit(&pod, &[], &tainted, 3, NodeConditions::default());
            assert_eq!(verdict.is_ok(), let_in, "{origin} {effect} {tolerations}");
        }
    }

    #[test]
    fn a_profile_that_nothing_enforces_lets_no_pod_in() {
        let asking = |profile: &str| {
            let own = format!("securityContext: {{appArmorProfile: {{type: {profile}}}}}");
            [
                pod("api", &format!("{{{own}, containers: [{{name: c, image: i}}]}}")),
                pod("api", &format!("{{containers: [{{name: c, image: i, {own}}}]}}")),
            ]
        };
        for refused in asking("RuntimeDefault") {
            let rejection = admit(&refused, &[], &node(), 9, NodeConditions::default()).unwrap_err();
            assert_eq!(
                (rejection.reason.as_str(), rejection.message.as_str()),
                ("AppArmor", "Cannot enforce AppArmor: AppArmor is not enabled on the host")
            );
            let mut with = node();
            with.capacity.app_armor = true;
            assert_eq!(admit(&refused, &[], &with, 9, NodeConditions::default()), Ok(()));
        }
        assert!(asking("Unconfined").iter().all(|pod| admit(pod, &[], &node(), 9, NodeConditions::default()).is_ok()));
    }
}
