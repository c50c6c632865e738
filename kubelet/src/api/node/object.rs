//! Pure: the node's object from what is known: labels, addresses, resources, the versions, images, what the runtime can. Conditions
//! are in a file of their own.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use berth_cri_api::v1 as cri;
use k8s_openapi::api::core::v1::{
    ContainerImage, DaemonEndpoint, Node, NodeAddress, NodeDaemonEndpoints, NodeFeatures, NodeRuntimeHandler,
    NodeRuntimeHandlerFeatures, NodeSpec, NodeStatus, NodeSwapStatus, NodeSystemInfo, Taint,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::machine::Machine;
use crate::config::NodeSettings;
use crate::eviction::threshold::{Signal, Threshold, binary};
use crate::node::Capacity;

/// The release of Kubernetes whose kubelet this one stands for: the API server's rules of version skew and the scheduler read it.
pub const KUBERNETES_VERSION: &str = "v1.36.3";
/// What pods can ask for and this kubelet does, sorted: the scheduler matches pods against it. Not among them: resizes of resources
/// of whole pods.
const DECLARED_FEATURES: [&str; 2] = ["ExtendWebSocketsToKubelet", "RestartAllContainersOnContainerExits"];
/// Names of an image that are shown, as the upstream.
const NAMES_OF_AN_IMAGE: usize = 5;
/// That the controller, and not the node, attaches volumes.
pub(super) const ATTACH_DETACH: &str = "volumes.kubernetes.io/controller-managed-attach-detach";
/// The addresses that the node was given, for an external cloud's controller.
pub(super) const PROVIDED_IP: &str = "alpha.kubernetes.io/provided-node-ip";
/// Taint of a node that an external cloud's controller has yet to see.
const UNINITIALIZED: &str = "node.cloudprovider.kubernetes.io/uninitialized";

/// What is known of the node at one moment.
#[derive(Debug)]
pub struct Facts<'a> {
    /// Its name.
    pub name: &'a str,
    /// How it presents itself.
    pub settings: &'a NodeSettings,
    /// Its addresses, the primary one first.
    pub addresses: &'a [IpAddr],
    /// What the machine has and what of it is reserved.
    pub capacity: &'a Capacity,
    /// Bytes of huge pages by size.
    pub huge_pages: &'a [(u64, i64)],
    /// Thresholds of eviction.
    pub thresholds: &'a [Threshold],
    /// Disk space is counted.
    pub local_storage: bool,
    /// Most pods.
    pub max_pods: usize,
    /// Devices of each resource: all, and those that work.
    pub devices: &'a BTreeMap<String, (usize, usize)>,
    /// Resources that device plugins had in this agent's life.
    pub devices_seen: &'a BTreeSet<String>,
    /// What the machine says of itself.
    pub machine: &'a Machine,
    /// The runtime's name and version; `None`: it does not tell.
    pub runtime: Option<&'a (String, String)>,
    /// What the runtime's handlers can.
    pub handlers: &'a [cri::RuntimeHandler],
    /// What the runtime can as a whole.
    pub features: Option<&'a cri::RuntimeFeatures>,
    /// The port of the kubelet's API; 0: there is none.
    pub port: u16,
    /// The images.
    pub images: &'a [ContainerImage],
    /// The volumes in use, once they are known.
    pub volumes_in_use: Option<Vec<String>>,
}

/// The labels that the agent gives every node, and those of the command line, which do not replace them.
pub fn labels(name: &str, settings: &NodeSettings) -> BTreeMap<String, String> {
    let mut labels = settings.labels.clone();
    let arch = super::machine::go_architecture(std::env::consts::ARCH);
    for (key, value) in [
        ("kubernetes.io/hostname", name),
        ("kubernetes.io/os", "linux"),
        ("beta.kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", arch),
        ("beta.kubernetes.io/arch", arch),
    ] {
        labels.insert(key.to_owned(), value.to_owned());
    }
    labels
}

/// The object that a node is registered with; conditions are added by the caller.
pub fn node_object(facts: &Facts<'_>) -> Node {
    let settings = facts.settings;
    let mut node = Node::default();
    node.metadata.name = Some(facts.name.to_owned());
    node.metadata.labels = Some(labels(facts.name, settings));
    let annotations = annotations(facts);
    node.metadata.annotations = (!annotations.is_empty()).then_some(annotations);
    let mut taints = settings.taints.clone();
    if settings.external_cloud {
        let value = Some("true".to_owned());
        taints.push(Taint { key: UNINITIALIZED.to_owned(), value, effect: "NoSchedule".to_owned(), time_added: None });
    }
    node.spec = Some(NodeSpec {
        taints: (!taints.is_empty()).then_some(taints),
        provider_id: Some(settings.provider_id.clone()).filter(|id| !id.is_empty()),
        ..NodeSpec::default()
    });
    node.status = Some(node_status(facts, &NodeStatus::default()));
    node
}

fn annotations(facts: &Facts<'_>) -> BTreeMap<String, String> {
    let mut annotations = BTreeMap::from([(ATTACH_DETACH.to_owned(), "true".to_owned())]);
    if facts.settings.external_cloud && facts.settings.addresses_given {
        let given: Vec<String> = facts.addresses.iter().map(ToString::to_string).collect();
        annotations.insert(PROVIDED_IP.to_owned(), given.join(","));
    }
    annotations
}

/// The status as it should be, over what the object has: what others wrote there stays. Conditions are the object's.
pub fn node_status(facts: &Facts<'_>, observed: &NodeStatus) -> NodeStatus {
    let (capacity, allocatable) = resources(facts, observed);
    NodeStatus {
        addresses: Some(addresses(facts, observed)),
        capacity: Some(capacity),
        allocatable: Some(allocatable),
        node_info: Some(node_info(facts)),
        daemon_endpoints: Some(NodeDaemonEndpoints { kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(facts.port) }) }),
        images: Some(facts.images.to_vec()).filter(|images| !images.is_empty()),
        runtime_handlers: runtime_handlers(facts.handlers),
        features: facts
            .features
            .map(|features| NodeFeatures { supplemental_groups_policy: Some(features.supplemental_groups_policy) }),
        declared_features: Some(DECLARED_FEATURES.map(str::to_owned).to_vec()),
        volumes_in_use: match &facts.volumes_in_use {
            Some(volumes) => Some(volumes.clone()).filter(|volumes| !volumes.is_empty()),
            None => observed.volumes_in_use.clone(),
        },
        ..observed.clone()
    }
}

fn addresses(facts: &Facts<'_>, observed: &NodeStatus) -> Vec<NodeAddress> {
    let address = |type_: &str, address: String| NodeAddress { type_: type_.to_owned(), address };
    // A machine without a route has loopback alone, where the control plane would meet itself.
    let ips = || facts.addresses.iter().filter(|ip| !ip.is_loopback()).map(|ip| address("InternalIP", ip.to_string()));
    let hostname = || address("Hostname", facts.name.to_owned());
    if !facts.settings.external_cloud {
        return ips().chain([hostname()]).collect();
    }
    // The cloud's controller writes them; before it has, there is what is sure.
    match observed.addresses.as_ref().filter(|list| list.iter().any(|address| address.type_ != "Hostname")) {
        Some(list) => list.clone(),
        None if facts.settings.addresses_given => ips().chain([hostname()]).collect(),
        None => vec![hostname()],
    }
}

/// Whether a resource is one of devices or of somebody's own, and not of Kubernetes.
pub(super) fn is_extended(resource: &str) -> bool {
    resource.contains('/') && !resource.split('/').next().is_some_and(|domain| domain.ends_with("kubernetes.io"))
}

type Resources = BTreeMap<String, Quantity>;

/// Capacity, and what of it is for pods.
fn resources(facts: &Facts<'_>, observed: &NodeStatus) -> (Resources, Resources) {
    let (has, kept) = (facts.capacity, facts.capacity.reserved);
    let hard = |signal: Signal, capacity: i64| {
        let of = facts.thresholds.iter().find(|threshold| threshold.signal == signal && threshold.grace.is_none());
        of.map_or(0, |threshold| threshold.below.of(capacity))
    };
    let huge: i64 = facts.huge_pages.iter().map(|(_, bytes)| bytes).sum();
    let pods = i64::try_from(facts.max_pods).unwrap_or(i64::MAX);
    let memory_kept = kept.memory_bytes.saturating_add(hard(Signal::MemoryAvailable, has.memory_bytes)).saturating_add(huge);
    let mut both = vec![
        ("cpu".to_owned(), millis(has.cpu_millis), millis((has.cpu_millis - kept.cpu_millis).max(0))),
        ("memory".to_owned(), binary(has.memory_bytes), binary((has.memory_bytes - memory_kept).max(0))),
        ("pods".to_owned(), pods.to_string(), pods.to_string()),
    ];
    if facts.local_storage {
        let storage_kept = kept.storage_bytes.saturating_add(hard(Signal::NodeFsAvailable, has.storage_bytes));
        let left = (has.storage_bytes - storage_kept).max(0);
        both.push(("ephemeral-storage".to_owned(), binary(has.storage_bytes), binary(left)));
    }
    for (size, bytes) in facts.huge_pages {
        let size = binary(i64::try_from(*size).unwrap_or(i64::MAX));
        both.push((format!("hugepages-{size}"), binary(*bytes), binary(*bytes)));
    }
    // What had a plugin and has none any more is there no longer; what somebody else wrote into the capacity stays.
    for (name, quantity) in observed.capacity.iter().flatten().filter(|(name, _)| is_extended(name)) {
        let quantity = if facts.devices_seen.contains(name) { "0".to_owned() } else { quantity.0.clone() };
        both.push((name.clone(), quantity.clone(), quantity));
    }
    both.extend(facts.devices.iter().map(|(name, (all, working))| (name.clone(), all.to_string(), working.to_string())));
    let quantity = |(name, text): (&String, &String)| (name.clone(), Quantity(text.clone()));
    let capacity = both.iter().map(|(name, capacity, _)| quantity((name, capacity))).collect();
    (capacity, both.iter().map(|(name, _, allocatable)| quantity((name, allocatable))).collect())
}

/// Processors as quantities have them: `2`, `1900m`.
fn millis(millis: i64) -> String {
    if millis % 1000 == 0 { (millis / 1000).to_string() } else { format!("{millis}m") }
}

fn node_info(facts: &Facts<'_>) -> NodeSystemInfo {
    let machine = facts.machine;
    let runtime = match facts.runtime {
        Some((name, version)) => format!("{name}://{version}"),
        None => "berth://Unknown".to_owned(),
    };
    NodeSystemInfo {
        machine_id: machine.machine_id.clone(),
        system_uuid: machine.system_uuid.clone(),
        boot_id: machine.boot_id.clone(),
        kernel_version: machine.kernel.clone(),
        os_image: machine.os_image.clone(),
        operating_system: "linux".to_owned(),
        architecture: machine.architecture.clone(),
        container_runtime_version: runtime,
        kubelet_version: KUBERNETES_VERSION.to_owned(),
        kube_proxy_version: String::new(),
        swap: (facts.capacity.swap_bytes > 0).then_some(NodeSwapStatus { capacity: Some(facts.capacity.swap_bytes) }),
    }
}

fn runtime_handlers(handlers: &[cri::RuntimeHandler]) -> Option<Vec<NodeRuntimeHandler>> {
    let handler = |handler: &cri::RuntimeHandler| NodeRuntimeHandler {
        // The default handler has no name.
        name: Some(handler.name.clone()),
        features: handler.features.as_ref().map(|features| NodeRuntimeHandlerFeatures {
            recursive_read_only_mounts: Some(features.recursive_read_only_mounts),
            user_namespaces: Some(features.user_namespaces),
        }),
    };
    (!handlers.is_empty()).then(|| handlers.iter().map(handler).collect())
}

/// The images of a status: the biggest `most` (`None`: all), each with few of its names, those with digests first.
pub fn images(listed: &[cri::Image], most: Option<usize>) -> Vec<ContainerImage> {
    let mut sorted: Vec<&cri::Image> = listed.iter().collect();
    sorted.sort_by(|a, b| b.size.cmp(&a.size).then_with(|| a.id.cmp(&b.id)));
    sorted.truncate(most.unwrap_or(usize::MAX));
    let image = |image: &&cri::Image| {
        let names = image.repo_digests.iter().chain(&image.repo_tags).take(NAMES_OF_AN_IMAGE);
        ContainerImage { names: Some(names.cloned().collect()), size_bytes: Some(i64::try_from(image.size).unwrap_or(i64::MAX)) }
    };
    sorted.iter().map(image).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eviction::threshold::Quota;
    use crate::node::Reserved;

    struct Scene {
        settings: NodeSettings,
        capacity: Capacity,
        devices: BTreeMap<String, (usize, usize)>,
        seen: BTreeSet<String>,
        huge_pages: Vec<(u64, i64)>,
        machine: Machine,
    }

    impl Scene {
        fn new() -> Scene {
            let reserved = Reserved { cpu_millis: 100, memory_bytes: 128 << 20, ..Reserved::default() };
            let capacity =
                Capacity { cpu_millis: 2000, memory_bytes: 4 << 30, storage_bytes: 100 << 30, reserved, ..Capacity::default() };
            Scene {
                settings: NodeSettings::default(),
                capacity,
                devices: BTreeMap::new(),
                seen: BTreeSet::new(),
                huge_pages: Vec::new(),
                machine: Machine::default(),
            }
        }

        fn facts(&self) -> Facts<'_> {
            const THRESHOLDS: &[Threshold] = &[
                Threshold { signal: Signal::MemoryAvailable, below: Quota::Amount(100 << 20), grace: None, reclaim: None },
                Threshold { signal: Signal::NodeFsAvailable, below: Quota::Part(0.1), grace: None, reclaim: None },
            ];
            const ADDRESSES: &[IpAddr] = &[IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1))];
            Facts {
                name: "n",
                settings: &self.settings,
                addresses: ADDRESSES,
                capacity: &self.capacity,
                huge_pages: &self.huge_pages,
                thresholds: THRESHOLDS,
                local_storage: true,
                max_pods: 110,
                devices: &self.devices,
                devices_seen: &self.seen,
                machine: &self.machine,
                runtime: None,
                handlers: &[],
                features: None,
                port: 10250,
                images: &[],
                volumes_in_use: None,
            }
        }

        fn status(&self, observed: &NodeStatus) -> NodeStatus {
            node_status(&self.facts(), observed)
        }
    }

    fn of<'a>(list: &'a Option<Resources>, name: &str) -> Option<&'a str> {
        list.as_ref().unwrap().get(name).map(|quantity| quantity.0.as_str())
    }

    fn with(list: &[(&str, &str)]) -> NodeStatus {
        let capacity = list.iter().map(|(name, text)| ((*name).to_owned(), Quantity((*text).to_owned()))).collect();
        NodeStatus { capacity: Some(capacity), ..NodeStatus::default() }
    }

    #[test]
    fn what_is_reserved_and_the_thresholds_are_not_for_pods() {
        let mut scene = Scene::new();
        let status = scene.status(&NodeStatus::default());
        assert_eq!(of(&status.capacity, "cpu"), Some("2"));
        assert_eq!(of(&status.allocatable, "cpu"), Some("1900m"));
        assert_eq!((of(&status.capacity, "memory"), of(&status.allocatable, "memory")), (Some("4Gi"), Some("3868Mi")));
        assert_eq!(of(&status.allocatable, "ephemeral-storage"), Some("90Gi"));
        assert_eq!(of(&status.allocatable, "pods"), Some("110"));
        scene.huge_pages = vec![(2 << 20, 1 << 30), (1 << 30, 0)];
        let status = scene.status(&NodeStatus::default());
        assert_eq!((of(&status.capacity, "hugepages-2Mi"), of(&status.capacity, "hugepages-1Gi")), (Some("1Gi"), Some("0")));
        assert_eq!(of(&status.allocatable, "memory"), Some("2844Mi"), "huge pages are memory too");
        scene.capacity.reserved.memory_bytes = 99 << 30;
        assert_eq!(of(&scene.status(&NodeStatus::default()).allocatable, "memory"), Some("0"), "never less than nothing");
    }

    #[test]
    fn devices_count_and_what_others_wrote_stays() {
        let mut scene = Scene::new();
        scene.devices.insert("a.example/gpu".to_owned(), (4, 3));
        scene.seen.insert("a.example/gone".to_owned());
        let observed =
            with(&[("x.example/dongle", "5"), ("a.example/gone", "7"), ("a.example/gpu", "9"), ("hugepages-64Ki", "1")]);
        let status = scene.status(&observed);
        assert_eq!((of(&status.capacity, "a.example/gpu"), of(&status.allocatable, "a.example/gpu")), (Some("4"), Some("3")));
        assert_eq!(of(&status.allocatable, "x.example/dongle"), Some("5"), "what somebody else patched in can be used");
        assert_eq!(of(&status.capacity, "a.example/gone"), Some("0"), "the plugin is gone for good");
        assert_eq!(of(&status.capacity, "hugepages-64Ki"), None, "the machine has no such pages");
    }

    #[test]
    fn addresses_are_the_nodes_own_unless_a_cloud_writes_them() {
        let mut scene = Scene::new();
        let text = |status: NodeStatus| -> Vec<String> {
            status.addresses.into_iter().flatten().map(|a| format!("{} {}", a.type_, a.address)).collect()
        };
        assert_eq!(text(scene.status(&NodeStatus::default())), ["InternalIP 192.0.2.1", "Hostname n"]);
        scene.settings.external_cloud = true;
        assert_eq!(text(scene.status(&NodeStatus::default())), ["Hostname n"]);
        let address = NodeAddress { type_: "ExternalIP".into(), address: "198.51.100.7".into() };
        let cloud = NodeStatus { addresses: Some(vec![address]), ..NodeStatus::default() };
        assert_eq!(text(scene.status(&cloud)), ["ExternalIP 198.51.100.7"]);
        scene.settings.addresses_given = true;
        let node = node_object(&scene.facts());
        assert_eq!(node.metadata.annotations.unwrap()[PROVIDED_IP], "192.0.2.1");
        assert_eq!(node.spec.unwrap().taints.unwrap()[0].key, UNINITIALIZED);
    }

    #[test]
    fn labels_of_the_command_line_do_not_replace_those_that_every_node_has() {
        let given = [("disk", "ssd"), ("kubernetes.io/os", "plan9")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        let settings = NodeSettings { labels: given.into(), ..NodeSettings::default() };
        let labels = labels("n", &settings);
        assert_eq!((labels["disk"].as_str(), labels["kubernetes.io/os"].as_str()), ("ssd", "linux"));
        assert_eq!(labels["beta.kubernetes.io/arch"], labels["kubernetes.io/arch"]);
    }

    #[test]
    fn the_biggest_images_are_shown_with_few_names() {
        let image = |id: &str, size: u64| cri::Image {
            id: id.to_owned(),
            size,
            repo_tags: (0..9).map(|n| format!("{id}:{n}")).collect(),
            repo_digests: vec![format!("{id}@sha256:0")],
            ..cri::Image::default()
        };
        let shown = images(&[image("a", 1), image("b", 3), image("c", 2)], Some(2));
        assert_eq!(shown.iter().map(|image| image.size_bytes).collect::<Vec<_>>(), [Some(3), Some(2)]);
        let names = shown[0].names.as_ref().unwrap();
        assert_eq!((names.len(), names[0].as_str(), names[1].as_str()), (5, "b@sha256:0", "b:0"));
        assert!(images(&[image("a", 1)], Some(0)).is_empty());
    }
}
