//! Requests and limits to kernel numbers: QoS class, shares, quota, memory limits, OOM scores. Pure.

use berth_cri_api::v1 as cri;
use k8s_openapi::api::core::v1::{Container, Pod};

use crate::config::SwapBehavior;
use crate::node::{Capacity, huge_page_name};
use crate::quantity::Amount;

/// The period of CPU quotas, in microseconds.
pub const CPU_PERIOD: i64 = 100_000;
const MIN_SHARES: i64 = 2;
const MAX_SHARES: i64 = 262_144;
const MIN_QUOTA: i64 = 1000;

/// Quality of service of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QosClass {
    /// Every container has limits that equal its requests.
    Guaranteed,
    /// Something is requested or limited.
    Burstable,
    /// Nothing is requested or limited.
    BestEffort,
}

impl QosClass {
    /// As the API writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            QosClass::Guaranteed => "Guaranteed",
            QosClass::Burstable => "Burstable",
            QosClass::BestEffort => "BestEffort",
        }
    }
}

/// What the pod's cgroup gets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodLimits {
    /// CPU shares.
    pub cpu_shares: i64,
    /// CPU quota in microseconds per period.
    pub cpu_quota: Option<i64>,
    /// The period, in microseconds; 0: [`CPU_PERIOD`].
    pub cpu_period: i64,
    /// Processes.
    pub pids: Option<i64>,
    /// Bytes of memory.
    pub memory: Option<i64>,
    /// Bytes of each huge page size that the machine has.
    pub huge_pages: Vec<(String, u64)>,
}

fn containers(pod: &Pod) -> impl Iterator<Item = &Container> {
    pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten().chain(&spec.containers))
}

fn list_amount(container: &Container, limits: bool, name: &str) -> Option<Amount> {
    let resources = container.resources.as_ref()?;
    let list = if limits { resources.limits.as_ref() } else { resources.requests.as_ref() };
    list?.get(name).map(Amount::of)
}

/// A container's request, if any.
pub fn request(container: &Container, name: &str) -> Option<Amount> {
    list_amount(container, false, name)
}

/// A container's limit, if any.
pub fn limit(container: &Container, name: &str) -> Option<Amount> {
    list_amount(container, true, name)
}

/// How many processors the static policy gives a container for itself: whole ones, to pods of class Guaranteed whose containers
/// ask for them one by one.
pub fn exclusive_cpus(pod: &Pod, container: &Container) -> usize {
    let millis = request(container, "cpu").map_or(0, Amount::millis);
    if millis % 1000 != 0 || has_pod_level(pod) || qos_class(pod) != QosClass::Guaranteed {
        return 0;
    }
    usize::try_from(millis / 1000).unwrap_or(0)
}

/// Whether a name is an extended resource's: a domain that is not Kubernetes' own, a slash, a name.
pub fn is_extended(name: &str) -> bool {
    let Some((domain, rest)) = name.split_once('/') else { return false };
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.contains("kubernetes.io/")
        && !name.starts_with("requests.")
        // The names of quotas put `requests.` before it, and have to be of 253 letters at most with that.
        && domain.len() + "requests.".len() <= 253
        && crate::source::validate::is_dns_subdomain(domain)
        && rest.len() <= 63
        && edge(rest.chars().next())
        && edge(rest.chars().last())
        && rest.chars().all(plain)
}

/// The extended resources that a container asks for, and how many of each.
pub fn extended_resources(container: &Container) -> impl Iterator<Item = (&str, usize)> {
    let limits = container.resources.iter().filter_map(|resources| resources.limits.as_ref()).flatten();
    let wanted = |(name, amount): (_, &_)| (name, usize::try_from(Amount::of(amount).units()).unwrap_or(0));
    limits.map(move |(name, amount)| wanted((name.as_str(), amount))).filter(|(name, count)| *count > 0 && is_extended(name))
}

fn is_sidecar(container: &Container) -> bool {
    container.restart_policy.as_deref() == Some("Always")
}

/// The pod's own limit, where its spec has one.
fn pod_level_limit(pod: &Pod, name: &str) -> Option<Amount> {
    pod.spec.as_ref()?.resources.as_ref()?.limits.as_ref()?.get(name).map(Amount::of)
}

/// The pod's own request, where its spec has one; with a limit alone, what its containers ask for, else the limit.
fn pod_level_request(pod: &Pod, name: &str) -> Option<Amount> {
    let requests = pod.spec.as_ref()?.resources.as_ref()?.requests.as_ref();
    let own = requests.and_then(|list| list.get(name)).map(Amount::of);
    own.or_else(|| {
        let limit = pod_level_limit(pod, name)?;
        let sum = pod_amount(pod, name, request);
        Some(if sum.is_zero() { limit } else { sum })
    })
}

fn has_pod_level(pod: &Pod) -> bool {
    let resources = pod.spec.as_ref().and_then(|spec| spec.resources.as_ref());
    let lists = resources.into_iter().flat_map(|r| [&r.limits, &r.requests]);
    lists.flatten().any(|list| !list.is_empty())
}

/// What the runtime itself takes for the pod, besides its containers.
pub fn overhead(pod: &Pod, name: &str) -> Amount {
    let overhead = pod.spec.as_ref().and_then(|spec| spec.overhead.as_ref());
    overhead.and_then(|list| list.get(name)).map(Amount::of).unwrap_or_default()
}

/// What the node has to have for the pod: its own request where it has one, else its containers', and the overhead.
pub fn pod_request(pod: &Pod, name: &str) -> Amount {
    pod_level_request(pod, name).unwrap_or_else(|| pod_amount(pod, name, request)) + overhead(pod, name)
}

/// The pod's QoS class.
pub fn qos_class(pod: &Pod) -> QosClass {
    let nonzero = |amount: Option<Amount>| amount.filter(|a| !a.is_zero());
    let names = ["cpu", "memory"];
    let mut any = false;
    let mut guaranteed = true;
    let mut count = |request: Option<Amount>, limit: Option<Amount>| {
        let (request, limit) = (nonzero(request), nonzero(limit));
        any |= request.is_some() || limit.is_some();
        guaranteed &= limit.is_some() && request.is_none_or(|r| Some(r) == limit);
    };
    if has_pod_level(pod) {
        names.into_iter().for_each(|name| count(pod_level_request(pod, name), pod_level_limit(pod, name)));
    } else {
        for container in containers(pod) {
            names.into_iter().for_each(|name| count(request(container, name), limit(container, name)));
        }
    }
    match (any, guaranteed) {
        (false, _) => QosClass::BestEffort,
        (true, true) => QosClass::Guaranteed,
        (true, false) => QosClass::Burstable,
    }
}

/// Sum over the pod: regular containers and sidecars together, or the greatest init step, whichever is more.
fn pod_amount(pod: &Pod, name: &str, of: fn(&Container, &str) -> Option<Amount>) -> Amount {
    let Some(spec) = &pod.spec else { return Amount::default() };
    let mut sidecars = Amount::default();
    let mut greatest_step = Amount::default();
    for init in spec.init_containers.iter().flatten() {
        let amount = of(init, name).unwrap_or_default();
        greatest_step = greatest_step.max(sidecars + amount);
        if is_sidecar(init) {
            sidecars = sidecars + amount;
        }
    }
    let regular: Amount = spec.containers.iter().map(|c| of(c, name).unwrap_or_default()).sum();
    (regular + sidecars).max(greatest_step)
}

/// The limits of the pod's cgroup.
pub fn pod_limits(pod: &Pod, capacity: &Capacity) -> PodLimits {
    let qos = qos_class(pod);
    let all_limited = |name: &str| containers(pod).all(|c| limit(c, name).is_some_and(|l| !l.is_zero()));
    let limited = |name: &str| {
        let own = pod_level_limit(pod, name).filter(|amount| !amount.is_zero());
        let sum = || (qos != QosClass::BestEffort && all_limited(name)).then(|| pod_amount(pod, name, limit));
        own.or_else(sum).map(|amount| amount + overhead(pod, name))
    };
    let huge_pages = capacity.huge_pages.iter().map(|bytes| {
        let name = huge_page_resource(*bytes);
        let total = pod_level_limit(pod, &name).unwrap_or_else(|| pod_amount(pod, &name, limit)).units();
        (huge_page_name(*bytes), u64::try_from(total).unwrap_or(0))
    });
    let any_exclusive = capacity.policy.exclusive_cpus && containers(pod).any(|c| exclusive_cpus(pod, c) > 0);
    PodLimits {
        cpu_shares: match qos {
            QosClass::BestEffort => MIN_SHARES,
            _ => cpu_shares(pod_cpu_request(pod)),
        },
        cpu_quota: limited("cpu")
            .filter(|_| capacity.policy.cfs_quota && !any_exclusive)
            .map(|a| cpu_quota(a.millis(), cpu_period(capacity))),
        cpu_period: cpu_period(capacity),
        pids: capacity.policy.pod_pids,
        memory: limited("memory").map(Amount::units),
        huge_pages: huge_pages.collect(),
    }
}

/// CPU request of a pod in thousandths, for the QoS cgroup's shares.
pub fn pod_cpu_request(pod: &Pod) -> i64 {
    pod_request(pod, "cpu").millis()
}

/// Shares of a number of CPU thousandths.
pub fn cpu_shares(millis: i64) -> i64 {
    (millis.saturating_mul(1024) / 1000).clamp(MIN_SHARES, MAX_SHARES)
}

/// Quota of a number of CPU thousandths per `period` microseconds.
pub fn cpu_quota(millis: i64, period: i64) -> i64 {
    (millis.saturating_mul(period) / 1000).max(MIN_QUOTA)
}

/// The configured period of quotas in microseconds.
fn cpu_period(capacity: &Capacity) -> i64 {
    i64::try_from(capacity.policy.cfs_period.as_micros()).unwrap_or(CPU_PERIOD)
}

/// `hugepages-2Mi` for 2 MiB.
fn huge_page_resource(bytes: u64) -> String {
    for (unit, name) in [(1u64 << 30, "Gi"), (1 << 20, "Mi"), (1 << 10, "Ki")] {
        if bytes >= unit && bytes.is_multiple_of(unit) {
            return format!("hugepages-{}{name}", bytes / unit);
        }
    }
    format!("hugepages-{bytes}")
}

/// The CRI resources of one container.
pub fn container_resources(pod: &Pod, container: &Container, capacity: &Capacity) -> cri::LinuxContainerResources {
    // A container without a limit of its own has the pod's.
    let limit = |name: &str| limit(container, name).or_else(|| pod_level_limit(pod, name));
    let cpu_request = request(container, "cpu").or_else(|| self::limit(container, "cpu")).map_or(0, Amount::millis);
    let cpu_limit = limit("cpu").map_or(0, Amount::millis);
    let memory = limit("memory").map_or(0, Amount::units);
    let policy = &capacity.policy;
    let quota = policy.cfs_quota && !(policy.exclusive_cpus && exclusive_cpus(pod, container) > 0);
    let huge = capacity.huge_pages.iter().map(|bytes| cri::HugepageLimit {
        page_size: huge_page_name(*bytes),
        limit: limit(&huge_page_resource(*bytes)).map_or(0, |a| u64::try_from(a.units()).unwrap_or(0)),
    });
    let mut resources = cri::LinuxContainerResources {
        cpu_period: if policy.cfs_quota { cpu_period(capacity) } else { 0 },
        cpu_quota: if cpu_limit > 0 && quota { cpu_quota(cpu_limit, cpu_period(capacity)) } else { 0 },
        cpu_shares: cpu_shares(cpu_request),
        memory_limit_in_bytes: memory,
        oom_score_adj: oom_score_adj(pod, container, capacity),
        hugepage_limits: huge.collect(),
        ..Default::default()
    };
    if capacity.cgroup_v2 && !policy.single_process_oom_kill.unwrap_or(false) {
        resources.unified.insert("memory.oom.group".to_owned(), "1".to_owned());
    }
    if capacity.swap_bytes > 0 {
        if capacity.cgroup_v2 {
            resources.unified.insert("memory.swap.max".to_owned(), swap_bytes(pod, container, capacity).to_string());
        } else {
            resources.memory_swap_limit_in_bytes = memory;
        }
    }
    resources
}

/// How much a container may swap with cgroup v2: of burstable pods that are not critical, the part of the swap that its memory
/// request is of the memory.
pub(crate) fn swap_bytes(pod: &Pod, container: &Container, capacity: &Capacity) -> i64 {
    let critical = pod.spec.as_ref().and_then(|s| s.priority).is_some_and(|priority| priority >= 2_000_000_000);
    let requested = request(container, "memory").or_else(|| limit(container, "memory")).map_or(0, Amount::units);
    let limited = limit(container, "memory").map(Amount::units);
    if capacity.policy.swap == SwapBehavior::NoSwap
        || qos_class(pod) != QosClass::Burstable
        || critical
        || requested <= 0
        || limited == Some(requested)
    {
        return 0;
    }
    let part = i128::from(requested) * i128::from(capacity.swap_bytes) / i128::from(capacity.memory_bytes.max(1));
    i64::try_from(part).unwrap_or(0)
}

/// How soon the kernel kills the container's processes when memory runs out.
fn oom_score_adj(pod: &Pod, container: &Container, capacity: &Capacity) -> i64 {
    let priority = pod.spec.as_ref().and_then(|s| s.priority).unwrap_or(0);
    let class = pod.spec.as_ref().and_then(|s| s.priority_class_name.as_deref());
    if priority >= 2_000_001_000 || class == Some("system-node-critical") {
        return -997;
    }
    match qos_class(pod) {
        QosClass::Guaranteed => return -997,
        QosClass::BestEffort => return 1000,
        QosClass::Burstable => {}
    }
    // What the pod asks for beyond its containers is theirs in equal parts.
    let all = i64::try_from(containers(pod).count()).unwrap_or(i64::MAX).max(1);
    let asked: i64 = containers(pod).map(|c| request(c, "memory").map_or(0, Amount::units)).sum();
    let spare = pod_level_request(pod, "memory").map_or(0, |own| own.units().saturating_sub(asked).max(0) / all);
    let score = |container: &Container| {
        let requested = request(container, "memory").map_or(0, Amount::units).saturating_add(spare);
        let capacity = capacity.memory_bytes.max(1);
        (1000 - 1000i64.saturating_mul(requested) / capacity).clamp(3, 999)
    };
    let own = score(container);
    if is_sidecar(container) {
        let regular = pod.spec.iter().flat_map(|s| &s.containers).map(score).min();
        return regular.map_or(own, |r| own.min(r));
    }
    own
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{defaults::apply_defaults, parse::parse_manifest};

    fn pod(spec: &str) -> Pod {
        let text = format!("{{apiVersion: v1, kind: Pod, metadata: {{name: a}}, spec: {spec}}}");
        let mut pod = parse_manifest(&text).unwrap().pods.remove(0).pod;
        apply_defaults(&mut pod);
        pod
    }

    fn one(resources: &str) -> Pod {
        pod(&format!("{{containers: [{{name: c, image: i, resources: {resources}}}]}}"))
    }

    fn capacity() -> Capacity {
        Capacity { cpu_millis: 4000, memory_bytes: 8 << 30, huge_pages: vec![2 << 20], ..Capacity::default() }
    }

    #[test]
    fn qos_classes_are_the_upstreams() {
        let cases = [
            ("{}", QosClass::BestEffort),
            ("{requests: {cpu: 0}}", QosClass::BestEffort),
            ("{requests: {cpu: 100m}}", QosClass::Burstable),
            ("{limits: {memory: 1Gi}}", QosClass::Burstable),
            ("{limits: {cpu: 1, memory: 1Gi}}", QosClass::Guaranteed),
            ("{limits: {cpu: 1, memory: 1Gi}, requests: {cpu: 1, memory: 1Gi}}", QosClass::Guaranteed),
            ("{limits: {cpu: 1, memory: 1Gi}, requests: {cpu: 500m}}", QosClass::Burstable),
            ("{requests: {ephemeral-storage: 1Gi}}", QosClass::BestEffort),
        ];
        for (resources, qos) in cases {
            assert_eq!(qos_class(&one(resources)), qos, "{resources}");
        }
        let mixed = "{initContainers: [{name: i, image: i}], containers: [{name: c, image: i, resources: {limits: {cpu: 1, memory: 1Gi}}}]}";
        assert_eq!(qos_class(&pod(mixed)), QosClass::Burstable);
    }

    #[test]
    fn container_numbers_follow_requests_and_limits() {
        // resources, shares, quota, memory, oom
        let cases = [
            ("{}", 2, 0, 0, 1000),
            ("{requests: {cpu: 250m, memory: 1Gi}}", 256, 0, 0, 875),
            ("{limits: {cpu: 500m}}", 512, 50_000, 0, 999),
            ("{limits: {cpu: 2, memory: 64Mi}, requests: {cpu: 1m}}", 2, 200_000, 64 << 20, 993),
            ("{limits: {cpu: 1m}}", 2, 1000, 0, 999),
            ("{limits: {cpu: 1, memory: 1Gi}}", 1024, 100_000, 1 << 30, -997),
            ("{requests: {memory: 8Gi}}", 2, 0, 0, 3),
        ];
        for (text, shares, quota, memory, oom) in cases {
            let pod = one(text);
            let r = container_resources(&pod, &pod.spec.as_ref().unwrap().containers[0], &capacity());
            let found = (r.cpu_shares, r.cpu_quota, r.memory_limit_in_bytes, r.oom_score_adj);
            assert_eq!(found, (shares, quota, memory, oom), "{text}");
            assert_eq!(r.cpu_period, CPU_PERIOD);
            assert_eq!(r.hugepage_limits, [cri::HugepageLimit { page_size: "2MB".into(), limit: 0 }]);
            assert!(r.unified.is_empty());
        }
    }

    #[test]
    fn swap_is_denied_where_there_is_some() {
        let pod = one("{limits: {memory: 64Mi}}");
        let container = &pod.spec.as_ref().unwrap().containers[0];
        let v1 = Capacity { swap_bytes: 1, ..capacity() };
        assert_eq!(container_resources(&pod, container, &v1).memory_swap_limit_in_bytes, 64 << 20);
        let v2 = Capacity { swap_bytes: 1, cgroup_v2: true, ..capacity() };
        let unified = container_resources(&pod, container, &v2).unified;
        assert_eq!(unified.get("memory.swap.max").map(String::as_str), Some("0"));
        assert_eq!(unified.get("memory.oom.group").map(String::as_str), Some("1"));
    }

    #[test]
    fn pod_limits_need_every_container_to_be_limited() {
        let two = |second: &str| {
            pod(&format!(
                "{{containers: [{{name: a, image: i, resources: {{limits: {{cpu: 1, memory: 1Gi}}}}}}, {{name: b, image: i, resources: {second}}}]}}"
            ))
        };
        let limits = pod_limits(&two("{limits: {cpu: 500m}}"), &capacity());
        assert_eq!((limits.cpu_shares, limits.cpu_quota, limits.memory), (1536, Some(150_000), None));
        let limits = pod_limits(&two("{limits: {cpu: 500m, memory: 1Gi}}"), &capacity());
        assert_eq!(limits.memory, Some(2 << 30));
        let limits = pod_limits(&one("{}"), &capacity());
        assert_eq!(
            limits,
            PodLimits { cpu_shares: 2, cpu_period: CPU_PERIOD, huge_pages: vec![("2MB".into(), 0)], ..PodLimits::default() }
        );
    }

    #[test]
    fn what_the_pod_has_as_a_whole_counts_for_it_and_for_containers_without_their_own() {
        let spec = |resources: &str| {
            pod(&format!(
                "{{resources: {resources}, overhead: {{cpu: 250m, memory: 16Mi}}, containers: [{{name: a, image: i}}, \
                 {{name: b, image: i, resources: {{limits: {{memory: 1Gi}}, requests: {{memory: 1Gi}}}}}}]}}"
            ))
        };
        let pod = spec("{requests: {cpu: 1, memory: 3Gi}, limits: {cpu: 2, memory: 4Gi}}");
        assert_eq!(qos_class(&pod), QosClass::Burstable);
        assert_eq!(qos_class(&spec("{limits: {cpu: 2, memory: 4Gi}, requests: {memory: 4Gi}}")), QosClass::Guaranteed);
        assert_eq!((pod_cpu_request(&pod), pod_request(&pod, "memory").units()), (1250, (3 << 30) + (16 << 20)));
        let limits = pod_limits(&pod, &capacity());
        assert_eq!((limits.cpu_shares, limits.cpu_quota, limits.memory), (1280, Some(225_000), Some((4 << 30) + (16 << 20))));
        let of = |i: usize| container_resources(&pod, &pod.spec.as_ref().unwrap().containers[i], &capacity());
        assert_eq!((of(0).memory_limit_in_bytes, of(1).memory_limit_in_bytes), (4 << 30, 1 << 30));
        assert_eq!((of(0).cpu_quota, of(0).cpu_shares), (200_000, 2));
        // 2 GiB of the pod's request belong to no container: half of it counts for each.
        assert_eq!((of(0).oom_score_adj, of(1).oom_score_adj), (875, 750));
    }

    #[test]
    fn a_greedy_init_container_counts_as_the_greatest_step() {
        let spec = "{initContainers: [{name: i, image: i, resources: {requests: {cpu: 3}}}], containers: [{name: a, image: i, resources: {requests: {cpu: 1}}}, {name: b, image: i, resources: {requests: {cpu: 1}}}]}";
        assert_eq!(pod_cpu_request(&pod(spec)), 3000);
    }
}
