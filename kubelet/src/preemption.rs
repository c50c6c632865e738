//! Pure: which pods make room for a critical one, hurting as few as can be, those with the fewest promises first.

use k8s_openapi::api::core::v1::Pod;

use crate::admission::{is_critical, resource_numbers};
use crate::node::NodeView;
use crate::pod;
use crate::resources::{QosClass, qos_class};

/// What is missing, or what a pod would give back, in the order of [`resource_numbers`], with one for the pod itself.
type Amounts = Vec<i64>;

/// The pods of `others`, by their place, that have to end for `pod` to be let in; `None` where that would not help.
pub fn victims(candidate: &Pod, others: &[&Pod], node: &NodeView, max_pods: usize) -> Option<Vec<usize>> {
    let mut missing: Amounts = resource_numbers(candidate, others, node)
        .into_iter()
        .map(|(_, [requested, used, capacity])| match requested > 0 && capacity > 0 {
            true => requested.saturating_sub(capacity.saturating_sub(used)).max(0),
            false => 0,
        })
        .collect();
    missing.push(i64::try_from((others.len() + 1).saturating_sub(max_pods)).unwrap_or(i64::MAX));
    let gives: Vec<Amounts> = others.iter().map(|other| given_back(other, node)).collect();
    let of = |class: QosClass| -> Vec<usize> {
        let lower = |i: &usize| is_lower(candidate, others[*i]) && qos_class(others[*i]) == class;
        (0..others.len()).filter(lower).collect()
    };
    let (best_effort, burstable, guaranteed) = (of(QosClass::BestEffort), of(QosClass::Burstable), of(QosClass::Guaranteed));
    // Each class gives only what the ones with fewer promises cannot.
    let both = [burstable.as_slice(), &best_effort].concat();
    let mut chosen = closest(&guaranteed, &gives, without(&missing, &both, &gives))?;
    let taken = [chosen.as_slice(), &best_effort].concat();
    chosen.extend(closest(&burstable, &gives, without(&missing, &taken, &gives))?);
    chosen.extend(closest(&best_effort, &gives, without(&missing, &chosen, &gives))?);
    (!chosen.is_empty()).then_some(chosen)
}

/// Whether `other` may be ended for `candidate`.
fn is_lower(candidate: &Pod, other: &Pod) -> bool {
    let priority = |pod: &Pod| pod::spec(pod).priority.unwrap_or(0);
    is_critical(candidate) && !is_critical(other) || priority(candidate) > priority(other)
}

fn given_back(pod: &Pod, node: &NodeView) -> Amounts {
    let mut amounts: Amounts = resource_numbers(pod, &[], node).into_iter().map(|(_, [requested, ..])| requested).collect();
    amounts.push(1);
    amounts
}

fn without(missing: &Amounts, ended: &[usize], gives: &[Amounts]) -> Amounts {
    let mut left = missing.clone();
    for pod in ended {
        left.iter_mut().zip(&gives[*pod]).for_each(|(left, given)| *left = left.saturating_sub(*given).max(0));
    }
    left
}

/// Takes, one after the other, the pod after which the least is missing, of equals the one that gives the least; `None` when
/// all of them are not enough.
fn closest(pods: &[usize], gives: &[Amounts], mut missing: Amounts) -> Option<Vec<usize>> {
    let mut left = pods.to_vec();
    let mut chosen = Vec::new();
    while missing.iter().any(|amount| *amount > 0) {
        let distance = |pod: usize| -> f64 {
            let after = without(&missing, &[pod], gives);
            let part = |(after, before): (&i64, &i64)| if *before > 0 { *after as f64 / *before as f64 } else { 0.0 };
            after.iter().zip(&missing).map(part).map(|part| part * part).sum()
        };
        let order = |a: &&usize, b: &&usize| distance(**a).total_cmp(&distance(**b)).then_with(|| gives[**a].cmp(&gives[**b]));
        let best = *left.iter().min_by(order)?;
        left.retain(|pod| *pod != best);
        missing = without(&missing, &[best], gives);
        chosen.push(best);
    }
    Some(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::Capacity;
    use crate::source::{defaults::apply_defaults, parse::parse_manifest};

    fn pod(priority: i32, resources: &str) -> Pod {
        let text = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: a}}, spec: {{priority: {priority}, containers: \
             [{{name: c, image: i, resources: {resources}}}]}}}}"
        );
        let mut pod = parse_manifest(&text).unwrap().pods.remove(0).pod;
        apply_defaults(&mut pod);
        pod
    }

    #[test]
    fn the_fewest_promises_are_broken_first_and_never_those_of_a_higher_priority() {
        let capacity = Capacity { cpu_millis: 4000, memory_bytes: 4 << 30, ..Capacity::default() };
        let node = NodeView { name: "n".into(), capacity, ..NodeView::default() };
        let guaranteed = pod(0, "{limits: {cpu: 2, memory: 1Gi}}");
        let burstable = pod(0, "{requests: {cpu: 1}}");
        let small = pod(0, "{requests: {cpu: 100m}}");
        let high = pod(9, "{requests: {cpu: 900m}}");
        let others = [&guaranteed, &burstable, &small, &high];
        let wants = |cpu: &str| pod(5, &format!("{{requests: {{cpu: {cpu}}}}}"));
        assert_eq!(victims(&wants("1"), &others, &node, 9), Some(vec![1]));
        assert_eq!(victims(&wants("50m"), &others, &node, 9), Some(vec![2]));
        assert_eq!(victims(&wants("1100m"), &others, &node, 9), Some(vec![1, 2]));
        assert_eq!(victims(&wants("3"), &others, &node, 9), Some(vec![0, 1]));
        assert_eq!(victims(&wants("3500m"), &others, &node, 9), None, "the rest has a higher priority");
        assert_eq!(victims(&pod(5, "{}"), &others, &node, 4), Some(vec![2]), "one pod less");
    }
}
