//! What a pod's classes give it: the priority of its PriorityClass, the overhead of its RuntimeClass. A cluster's API server
//! writes these into the spec when a pod is made; for pods of the node's own sources it is done here. Pure.

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::scheduling::v1::PriorityClass;

use crate::admission::CRITICAL_PRIORITY;
use crate::objects::Objects;
use crate::pod;

/// The priority of `system-node-critical`, which every cluster has.
pub const NODE_CRITICAL_PRIORITY: i32 = CRITICAL_PRIORITY + 1000;

/// The pod with its classes' values; `None` where they change nothing.
pub fn apply(pod: &Pod, objects: &impl Objects) -> Option<Pod> {
    let spec = pod::spec(pod);
    let priority = priority(pod, objects).filter(|_| spec.priority.is_none());
    let policy = class(pod, objects).and_then(|class| class.preemption_policy).filter(|_| spec.preemption_policy.is_none());
    let runtime = spec.runtime_class_name.as_deref().and_then(|name| objects.runtime_class(name).ok().flatten());
    let overhead = runtime.and_then(|class| class.overhead.as_ref()?.pod_fixed.clone()).filter(|_| spec.overhead.is_none());
    if priority.is_none() && policy.is_none() && overhead.is_none() {
        return None;
    }
    let mut changed = pod.clone();
    let spec = changed.spec.as_mut()?;
    spec.priority = spec.priority.or(priority);
    spec.preemption_policy = spec.preemption_policy.take().or(policy);
    spec.overhead = spec.overhead.take().or(overhead);
    Some(changed)
}

/// Why the pod's PriorityClass forbids it to run, in the words of the upstream's admission.
pub fn problem(pod: &Pod, objects: &impl Objects) -> Option<String> {
    let name = pod::spec(pod).priority_class_name.as_deref().filter(|name| !name.is_empty())?;
    let Some(computed) = priority(pod, objects) else {
        return Some(format!("no PriorityClass with name {name} was found"));
    };
    let given = pod::spec(pod).priority.filter(|given| *given != computed)?;
    Some(format!(
        "the integer value of priority ({given}) must not be provided in pod spec; priority admission controller computed \
         {computed} from the given PriorityClass name"
    ))
}

fn class(pod: &Pod, objects: &impl Objects) -> Option<PriorityClass> {
    let name = pod::spec(pod).priority_class_name.as_deref().filter(|name| !name.is_empty())?;
    objects.priority_class(name).map(|class| PriorityClass::clone(&class))
}

fn priority(pod: &Pod, objects: &impl Objects) -> Option<i32> {
    match pod::spec(pod).priority_class_name.as_deref() {
        Some("system-node-critical") => Some(NODE_CRITICAL_PRIORITY),
        Some("system-cluster-critical") => Some(CRITICAL_PRIORITY),
        _ => class(pod, objects).and_then(|class| class.value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::LocalObjects;
    use crate::scene::Scene;
    use crate::source::parse::parse_manifest;

    #[tokio::test]
    async fn classes_give_priority_and_overhead() {
        let text = "apiVersion: scheduling.k8s.io/v1\nkind: PriorityClass\nmetadata: {name: high}\nvalue: 7\npreemptionPolicy: Never\n---\n\
            apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata: {name: vm}\nhandler: vm\n\
            overhead: {podFixed: {memory: 64Mi, cpu: 1}}\n";
        let objects = LocalObjects::default();
        objects.replace(parse_manifest(text).unwrap().objects);
        let pod = |fields: &str| Scene::new(&format!("{{{fields}, containers: [{{name: c, image: i}}]}}")).pod;
        let applied = apply(&pod("priorityClassName: high, runtimeClassName: vm"), &objects).unwrap();
        let spec = applied.spec.unwrap();
        assert_eq!((spec.priority, spec.preemption_policy.as_deref()), (Some(7), Some("Never")));
        let overhead = spec.overhead.unwrap();
        assert_eq!((overhead["memory"].0.as_str(), overhead["cpu"].0.as_str()), ("64Mi", "1"));
        let critical = apply(&pod("priorityClassName: system-node-critical"), &objects).unwrap();
        assert_eq!(critical.spec.unwrap().priority, Some(2_000_001_000));
        assert_eq!(apply(&pod("priority: 3"), &objects), None);
        for (fields, problem) in [
            ("priority: 3", None),
            ("priorityClassName: high", None),
            ("priorityClassName: high, priority: 7", None),
            ("priorityClassName: none", Some("no PriorityClass with name none was found")),
        ] {
            assert_eq!(super::problem(&pod(fields), &objects).as_deref(), problem, "{fields}");
        }
        assert!(super::problem(&pod("priorityClassName: high, priority: 8"), &objects).unwrap().contains("computed 7"));
    }
}
