//! Pure: the node's conditions, and the events that their changes are. Conditions of other types are not looked at.

use k8s_openapi::api::core::v1::NodeCondition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use crate::admission::NodeConditions;

/// The condition that says whether pods can run here.
pub const READY: &str = "Ready";
/// What the CSINode's absence is called.
pub const NO_CSI_NODE: &str = "CSINode is not yet initialized";
/// The machine goes down.
pub const SHUTTING_DOWN: &str = "node is shutting down";

/// The types of conditions that are the agent's, in the order in which a new node has them.
pub const OURS: [&str; 4] = ["MemoryPressure", "DiskPressure", "PIDPressure", READY];

/// What a condition says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Word {
    type_: &'static str,
    is: bool,
    reason: &'static str,
    message: String,
    /// The reason and the message of a pressure belong to its last change.
    sticks: bool,
}

fn words(now: NodeConditions, errors: &[String]) -> [Word; 4] {
    let pressure = |type_, is, [few, enough]: [(&'static str, &str); 2]| {
        let (reason, message) = if is { few } else { enough };
        Word { type_, is, reason, message: message.to_owned(), sticks: true }
    };
    let memory = [
        ("KubeletHasInsufficientMemory", "kubelet has insufficient memory available"),
        ("KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
    ];
    let disk =
        [("KubeletHasDiskPressure", "kubelet has disk pressure"), ("KubeletHasNoDiskPressure", "kubelet has no disk pressure")];
    let pids = [
        ("KubeletHasInsufficientPID", "kubelet has insufficient PID available"),
        ("KubeletHasSufficientPID", "kubelet has sufficient PID available"),
    ];
    let ready = match errors {
        [] => ("KubeletReady", "kubelet is posting ready status".to_owned()),
        [error] => ("KubeletNotReady", error.clone()),
        errors => ("KubeletNotReady", format!("[{}]", errors.join(", "))),
    };
    [
        pressure(OURS[0], now.memory_pressure, memory),
        pressure(OURS[1], now.disk_pressure, disk),
        pressure(OURS[2], now.pid_pressure, pids),
        Word { type_: READY, is: errors.is_empty(), reason: ready.0, message: ready.1, sticks: false },
    ]
}

/// The event of a condition that has changed; `before` is its status until now.
fn event(word: &Word, before: Option<&str>) -> Option<String> {
    match (word.type_, before) {
        // Whether a new node is ready is no change.
        (READY, None) => None,
        (READY, _) if word.is => Some("NodeReady".to_owned()),
        (READY, _) => Some("NodeNotReady".to_owned()),
        _ => Some(word.reason.replacen("Kubelet", "Node", 1)),
    }
}

/// The conditions of the object, with ours as they are now, and the reasons of the events that this makes. `errors`: why the node
/// is not ready.
pub fn judge(
    observed: &[NodeCondition],
    now: NodeConditions,
    errors: &[String],
    at: Timestamp,
) -> (Vec<NodeCondition>, Vec<String>) {
    let at = Time(crate::observed::whole_second(at));
    let (mut conditions, mut events) = (observed.to_vec(), Vec::new());
    for word in words(now, errors) {
        let status = if word.is { "True" } else { "False" };
        let found = conditions.iter_mut().find(|condition| condition.type_ == word.type_);
        let before = found.as_ref().map(|condition| condition.status.clone());
        let changed = before.as_deref() != Some(status);
        if changed {
            events.extend(event(&word, before.as_deref()));
        }
        let condition = match found {
            Some(condition) => condition,
            None => {
                conditions.push(NodeCondition { type_: word.type_.to_owned(), ..NodeCondition::default() });
                let last = conditions.len() - 1;
                &mut conditions[last]
            }
        };
        status.clone_into(&mut condition.status);
        condition.last_heartbeat_time = Some(at.clone());
        if changed {
            condition.last_transition_time = Some(at.clone());
        }
        if changed || !word.sticks {
            condition.reason = Some(word.reason.to_owned());
            condition.message = Some(word.message);
        }
    }
    (conditions, events)
}

/// Why a node without these is not ready.
pub fn missing_capacity(cpu_millis: i64, memory: i64) -> Option<String> {
    let missing: Vec<&str> =
        [("cpu", cpu_millis), ("memory", memory)].iter().filter(|(_, n)| *n <= 0).map(|(name, _)| *name).collect();
    (!missing.is_empty()).then(|| format!("missing node capacity for resources: {}", missing.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn text(conditions: &[NodeCondition]) -> Vec<String> {
        let reason = |c: &NodeCondition| c.reason.clone().unwrap_or_default();
        conditions.iter().map(|c| format!("{} {} {}", c.type_, c.status, reason(c))).collect()
    }

    #[test]
    fn a_new_node_has_four_conditions_with_ready_last() {
        let (conditions, events) = judge(&[], NodeConditions::default(), &[], at(5));
        assert_eq!(
            text(&conditions),
            [
                "MemoryPressure False KubeletHasSufficientMemory",
                "DiskPressure False KubeletHasNoDiskPressure",
                "PIDPressure False KubeletHasSufficientPID",
                "Ready True KubeletReady"
            ]
        );
        assert_eq!(events, ["NodeHasSufficientMemory", "NodeHasNoDiskPressure", "NodeHasSufficientPID"]);
        assert!(conditions.iter().all(|c| c.last_transition_time == Some(Time(at(5)))));
    }

    #[test]
    fn a_transition_is_a_change_of_the_status_alone() {
        let (before, _) = judge(&[], NodeConditions::default(), &["a".into()], at(5));
        let (after, events) = judge(&before, NodeConditions::default(), &["a".into(), "b".into()], at(9));
        let ready = after.last().unwrap();
        assert_eq!((ready.message.as_deref(), events.len()), (Some("[a, b]"), 0));
        assert_eq!(ready.last_transition_time, Some(Time(at(5))));
        assert_eq!(ready.last_heartbeat_time, Some(Time(at(9))));
        let pressed = NodeConditions { memory_pressure: true, ..NodeConditions::default() };
        let (after, events) = judge(&after, pressed, &[], at(11));
        assert_eq!(events, ["NodeHasInsufficientMemory", "NodeReady"]);
        assert_eq!(text(&after)[0], "MemoryPressure True KubeletHasInsufficientMemory");
        assert_eq!(after[1].last_transition_time, Some(Time(at(5))));
        let (_, events) = judge(&after, NodeConditions::default(), &["x".into()], at(12));
        assert_eq!(events, ["NodeHasSufficientMemory", "NodeNotReady"]);
    }

    #[test]
    fn conditions_of_others_are_left_alone_and_the_controllers_unknown_is_answered() {
        let other = NodeCondition { type_: "KernelDeadlock".into(), status: "True".into(), ..NodeCondition::default() };
        let unknown = NodeCondition { type_: READY.into(), status: "Unknown".into(), ..NodeCondition::default() };
        let (conditions, events) = judge(&[other.clone(), unknown], NodeConditions::default(), &[], at(1));
        assert_eq!(conditions[0], other);
        assert_eq!(text(&conditions)[1], "Ready True KubeletReady");
        assert!(events.contains(&"NodeReady".to_owned()));
    }

    #[test]
    fn what_cannot_be_counted_makes_the_node_unready() {
        assert_eq!(missing_capacity(0, 0).as_deref(), Some("missing node capacity for resources: cpu, memory"));
        assert_eq!(missing_capacity(1, 1), None);
    }
}
