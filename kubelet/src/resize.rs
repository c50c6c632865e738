//! Pure: whether a running pod may have other resources now. What it has been given (allocated) and what its source wants differ while
//! the node has no room; everything else goes by what is allocated.

use k8s_openapi::api::core::v1::{Container, Pod, PodStatus, ResourceRequirements};

use crate::admission::{NodeConditions, admit};
use crate::node::{Capacity, NodeView};
use crate::pod;
use crate::resources::{QosClass, pod_request, qos_class, request, swap_bytes};

/// The condition of a pod that waits for other resources.
pub const PENDING: &str = "PodResizePending";
/// Its reason where they may be there later.
pub const DEFERRED: &str = "Deferred";
/// Its reason where they never will.
pub const INFEASIBLE: &str = "Infeasible";

/// Why the CPU of a Guaranteed pod stays as it is where processors are given to single containers; the upstream's words.
pub const PINNED: &str = "Resize is infeasible for Guaranteed Pods alongside CPU Manager policy \"static\"";

/// Why a pod keeps the resources that it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// [`DEFERRED`] or [`INFEASIBLE`].
    pub reason: &'static str,
    /// For users.
    pub message: String,
}

/// Whether two versions of a pod differ in their containers' resources.
pub fn differs(one: &Pod, other: &Pod) -> bool {
    fn of(pod: &Pod) -> impl Iterator<Item = (&str, Option<&ResourceRequirements>)> {
        pod::all_containers(pod).map(|c| (c.name.as_str(), c.resources.as_ref()))
    }
    !of(one).eq(of(other))
}

/// Whether a version of a pod asks for more of anything.
pub fn grows(allocated: &Pod, wanted: &Pod) -> bool {
    ["cpu", "memory"].iter().any(|name| pod_request(wanted, name) > pod_request(allocated, name))
}

/// Whether the pod may have what is wanted now. `others` are the other pods that have not ended, with what they have been given.
pub fn judge(
    wanted: &Pod,
    allocated: &Pod,
    others: &[&Pod],
    node: &NodeView,
    max_pods: usize,
    conditions: NodeConditions,
) -> Result<(), Refusal> {
    let infeasible = |message: String| Err(Refusal { reason: INFEASIBLE, message });
    if swaps(wanted, allocated, &node.capacity) {
        return infeasible("In-place resize of containers with swap is not supported.".to_owned());
    }
    if node.capacity.policy.exclusive_cpus && qos_class(wanted) == QosClass::Guaranteed && changes_cpu(wanted, allocated) {
        return infeasible(PINNED.to_owned());
    }
    for name in ["cpu", "memory"] {
        let (requested, capacity) = (pod_request(wanted, name), node.capacity.amount(name));
        // A capacity that could not be read refuses nothing.
        if requested > capacity && !capacity.is_zero() {
            let number = |amount: crate::quantity::Amount| if name == "cpu" { amount.millis() } else { amount.units() };
            let (requested, capacity) = (number(requested), number(capacity));
            return infeasible(format!("Node didn't have enough capacity: {name}, requested: {requested}, capacity: {capacity}"));
        }
    }
    admit(wanted, others, node, max_pods, conditions).map_err(|refused| Refusal { reason: DEFERRED, message: refused.message })
}

/// Whether a container would get another CPU request; of a Guaranteed pod that is its limit too.
fn changes_cpu(wanted: &Pod, allocated: &Pod) -> bool {
    pod::all_containers(wanted).any(|container| {
        let before = pod::all_containers(allocated).find(|before| before.name == container.name);
        before.is_some_and(|before| request(before, "cpu") != request(container, "cpu"))
    })
}

/// Whether a container that may swap would get another memory request without being restarted: its share of the swap goes by it.
fn swaps(wanted: &Pod, allocated: &Pod, capacity: &Capacity) -> bool {
    let restarts = |container: &Container| {
        let policies = container.resize_policy.iter().flatten();
        policies.into_iter().any(|policy| policy.resource_name == "memory" && policy.restart_policy == "RestartContainer")
    };
    capacity.cgroup_v2
        && capacity.swap_bytes > 0
        && pod::all_containers(wanted).any(|container| {
            let before = pod::all_containers(allocated).find(|before| before.name == container.name);
            before.is_some_and(|before| {
                request(before, "memory") != request(container, "memory")
                    && !restarts(container)
                    && swap_bytes(allocated, before, capacity) > 0
            })
        })
}

/// A version of a pod with what its containers have been given so far: all else of it counts at once.
pub fn keep_resources(wanted: &Pod, allocated: &Pod) -> Pod {
    let mut kept = wanted.clone();
    let Some(spec) = &mut kept.spec else { return kept };
    for container in spec.init_containers.iter_mut().flatten().chain(&mut spec.containers) {
        if let Some(before) = pod::all_containers(allocated).find(|before| before.name == container.name) {
            container.resources.clone_from(&before.resources);
        }
    }
    kept
}

/// What the pod had been given when an earlier kubelet last spoke of it, and why it did not get what it wants; `None` where it had
/// nothing to wait for.
pub fn resume(wanted: &Pod, status: &PodStatus) -> Option<(Pod, Refusal)> {
    let pending = status.conditions.iter().flatten().find(|c| c.type_ == PENDING && c.status == "True")?;
    let reason = if pending.reason.as_deref() == Some(INFEASIBLE) { INFEASIBLE } else { DEFERRED };
    let refusal = Refusal { reason, message: pending.message.clone().unwrap_or_default() };
    let mut allocated = wanted.clone();
    for container in &mut allocated.spec.as_mut()?.containers {
        let known = status.container_statuses.iter().flatten().find(|s| s.name == container.name);
        if let Some(resources) = known.and_then(|status| status.resources.clone()) {
            container.resources = Some(resources);
        }
    }
    Some((allocated, refusal))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SwapBehavior;
    use crate::scene::Scene;

    fn pod(cpu: &str, memory: &str, more: &str) -> Pod {
        let resources = format!("{{requests: {{cpu: {cpu}, memory: {memory}}}, limits: {{memory: 900Mi}}}}");
        Scene::new(&format!("{{containers: [{{name: c, image: i, resources: {resources}{more}}}]}}")).pod
    }

    fn node(swap: SwapBehavior) -> NodeView {
        let mut capacity =
            Capacity { cpu_millis: 2000, memory_bytes: 1 << 30, swap_bytes: 1 << 30, cgroup_v2: true, ..Capacity::default() };
        capacity.policy.swap = swap;
        NodeView { name: "n".into(), capacity, ..NodeView::default() }
    }

    #[tokio::test]
    async fn what_has_no_room_is_deferred_and_what_never_will_is_infeasible() {
        let allocated = pod("500m", "64Mi", "");
        let other = pod("1", "64Mi", "");
        let verdict = |wanted: &Pod| {
            let judged = judge(wanted, &allocated, &[&other], &node(SwapBehavior::NoSwap), 9, NodeConditions::default());
            judged.map_or_else(|refusal| format!("{}: {}", refusal.reason, refusal.message), |()| "yes".to_owned())
        };
        assert_eq!(verdict(&pod("1", "64Mi", "")), "yes");
        let deferred = "Deferred: Node didn't have enough resource: cpu, requested: 1500, used: 1000, capacity: 2000";
        assert_eq!(verdict(&pod("1500m", "64Mi", "")), deferred);
        let infeasible = "Infeasible: Node didn't have enough capacity: cpu, requested: 2500, capacity: 2000";
        assert_eq!(verdict(&pod("2500m", "64Mi", "")), infeasible);
        assert!(differs(&allocated, &pod("1", "64Mi", "")) && !differs(&allocated, &allocated));
        assert!(grows(&allocated, &pod("1", "64Mi", "")) && !grows(&allocated, &pod("100m", "64Mi", "")));
    }

    #[tokio::test]
    async fn what_waits_for_resources_has_all_else_of_its_new_version() {
        let allocated = pod("500m", "64Mi", "");
        let mut wanted = pod("2500m", "64Mi", "");
        wanted.metadata.labels = Some([("l".to_owned(), "x".to_owned())].into());
        wanted.spec.as_mut().unwrap().containers[0].image = Some("j".to_owned());
        let kept = keep_resources(&wanted, &allocated);
        assert!(!differs(&kept, &allocated) && differs(&kept, &wanted));
        assert_eq!(kept.metadata, wanted.metadata);
        assert_eq!(kept.spec.unwrap().containers[0].image.as_deref(), Some("j"));
    }

    #[tokio::test]
    async fn with_processors_for_single_containers_the_cpu_of_guaranteed_pods_stays() {
        let guaranteed = |cpu: &str, memory: &str| {
            let resources = format!("{{limits: {{cpu: {cpu}, memory: {memory}}}}}");
            Scene::new(&format!("{{containers: [{{name: c, image: i, resources: {resources}}}]}}")).pod
        };
        let verdict = |allocated: &Pod, wanted: &Pod, exclusive_cpus| {
            let mut node = node(SwapBehavior::NoSwap);
            node.capacity.policy.exclusive_cpus = exclusive_cpus;
            judge(wanted, allocated, &[], &node, 9, NodeConditions::default())
        };
        let one = guaranteed("1", "64Mi");
        let refused = Err(Refusal { reason: INFEASIBLE, message: PINNED.to_owned() });
        assert_eq!(verdict(&one, &guaranteed("2", "64Mi"), true), refused);
        assert_eq!(verdict(&one, &guaranteed("500m", "64Mi"), true), refused, "as upstream, whether it has its own or not");
        assert_eq!(verdict(&one, &guaranteed("2", "64Mi"), false), Ok(()));
        assert_eq!(verdict(&one, &guaranteed("1000m", "128Mi"), true), Ok(()), "the memory may change");
        assert_eq!(verdict(&pod("1", "64Mi", ""), &pod("500m", "64Mi", ""), true), Ok(()), "a burstable pod shares anyway");
    }

    #[tokio::test]
    async fn memory_of_a_container_that_may_swap_changes_only_with_a_restart() {
        let restart = ", resizePolicy: [{resourceName: memory, restartPolicy: RestartContainer}]";
        let verdict = |wanted: &Pod, swap| {
            let judged = judge(wanted, &pod("1", "64Mi", ""), &[], &node(swap), 9, NodeConditions::default());
            judged.map_err(|refusal| refusal.message)
        };
        let refused = Err("In-place resize of containers with swap is not supported.".to_owned());
        assert_eq!(verdict(&pod("1", "128Mi", ""), SwapBehavior::LimitedSwap), refused);
        assert_eq!(verdict(&pod("1", "128Mi", restart), SwapBehavior::LimitedSwap), Ok(()));
        assert_eq!(verdict(&pod("100m", "64Mi", ""), SwapBehavior::LimitedSwap), Ok(()));
        assert_eq!(verdict(&pod("1", "128Mi", ""), SwapBehavior::NoSwap), Ok(()));
    }
}
