//! What is known of devices: which resources there are, who has which devices. Pure; who asks plugins and writes files is
//! [`super::Devices`].

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;

use super::choose::Pool;
use super::plugin::Plugin;
use super::wire::v1beta1::{ContainerAllocateResponse, ListAndWatchResponse};

/// A resource whose plugin stays away for so long is none any more. The upstream's number.
const FORGET_AFTER: Duration = Duration::from_secs(300);
/// The NUMA node of devices that are at none.
const NO_NODE: i64 = -1;

/// What one container has of one resource.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Allocation {
    /// The devices by NUMA node.
    pub by_node: BTreeMap<i64, Vec<String>>,
    /// How the plugin wants them given to the container.
    pub response: ContainerAllocateResponse,
    /// The answer is from before the last reboot: the plugin has to be asked again.
    pub stale: bool,
}

impl Allocation {
    /// The devices.
    pub fn ids(&self) -> BTreeSet<String> {
        self.by_node.values().flatten().cloned().collect()
    }
}

/// What containers have: by pod's UID, container's name and resource.
pub(crate) type Allocations = BTreeMap<String, BTreeMap<String, BTreeMap<String, Allocation>>>;

/// A device of a plugin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Device {
    pub healthy: bool,
    pub nodes: Vec<i64>,
}

/// Where a resource's plugin is.
#[derive(Clone, Debug)]
pub(crate) enum Link {
    /// It was there before this kubelet's start.
    Expected(Instant),
    /// It is there; `listed` once it has told its devices.
    Up { plugin: Plugin, generation: u64, listed: bool },
    /// It has gone away.
    Down(Instant),
}

/// A resource.
#[derive(Clone, Debug)]
pub(crate) struct Resource {
    pub link: Link,
    pub devices: BTreeMap<String, Device>,
}

impl Resource {
    fn works(&self) -> bool {
        matches!(self.link, Link::Up { listed: true, .. })
    }

    fn healthy(&self) -> BTreeSet<String> {
        let works = self.works();
        self.devices.iter().filter(|(_, device)| works && device.healthy).map(|(id, _)| id.clone()).collect()
    }
}

/// All of it.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub resources: BTreeMap<String, Resource>,
    pub allocations: Allocations,
    /// Devices that have been chosen and not been given yet, by resource.
    held: BTreeMap<String, BTreeSet<String>>,
    generations: u64,
}

impl State {
    /// From what an earlier kubelet has kept.
    pub fn resume(allocations: Allocations, resources: impl IntoIterator<Item = String>, now: Instant) -> State {
        let expected = |name| (name, Resource { link: Link::Expected(now), devices: BTreeMap::new() });
        State { allocations, resources: resources.into_iter().map(expected).collect(), ..State::default() }
    }

    /// Takes a plugin for a resource; an earlier one is replaced. Its number tells its messages from those of others.
    pub fn connected(&mut self, name: &str, plugin: Plugin) -> u64 {
        self.generations += 1;
        let link = Link::Up { plugin, generation: self.generations, listed: false };
        match self.resources.get_mut(name) {
            Some(resource) => {
                if let Link::Up { plugin, .. } = std::mem::replace(&mut resource.link, link) {
                    plugin.replaced.cancel();
                }
            }
            None => _ = self.resources.insert(name.to_owned(), Resource { link, devices: BTreeMap::new() }),
        }
        self.generations
    }

    /// Takes a plugin's list of devices; whether anything is different now.
    pub fn listed(&mut self, name: &str, number: u64, list: ListAndWatchResponse) -> bool {
        let Some(resource) = self.resources.get_mut(name) else { return false };
        let Link::Up { generation, listed, .. } = &mut resource.link else { return false };
        if *generation != number {
            return false;
        }
        let device = |d: super::wire::v1beta1::Device| {
            let nodes = d.topology.into_iter().flat_map(|topology| topology.nodes).map(|node| node.id).collect();
            (d.id, Device { healthy: d.health == "Healthy", nodes })
        };
        let devices = list.devices.into_iter().map(device).collect();
        let changed = !*listed || resource.devices != devices;
        *listed = true;
        resource.devices = devices;
        changed
    }

    /// A plugin's connection has ended; whether that is news.
    pub fn disconnected(&mut self, name: &str, number: u64, now: Instant) -> bool {
        match self.resources.get_mut(name) {
            Some(resource) if matches!(resource.link, Link::Up { generation, .. } if generation == number) => {
                resource.link = Link::Down(now);
                true
            }
            _ => false,
        }
    }

    /// Forgets resources whose plugins stay away; whether there was one.
    pub fn forget_lost(&mut self, now: Instant) -> bool {
        let before = self.resources.len();
        self.resources.retain(|_, resource| match resource.link {
            Link::Expected(since) | Link::Down(since) => now.duration_since(since) < FORGET_AFTER,
            Link::Up { .. } => true,
        });
        before != self.resources.len()
    }

    /// Whether the plugin of a resource that there has been is still to come.
    pub fn awaits(&self, name: &str) -> bool {
        let up = |resource: &Resource| matches!(resource.link, Link::Up { listed: true, .. } | Link::Down(_));
        self.resources.get(name).is_some_and(|resource| !up(resource))
    }

    /// Whether any plugin has offered this resource, or did for an earlier kubelet.
    pub fn knows(&self, name: &str) -> bool {
        self.resources.contains_key(name)
    }

    /// The plugin of a resource, where it is there.
    pub fn plugin(&self, name: &str) -> Option<Plugin> {
        match &self.resources.get(name)?.link {
            Link::Up { plugin, .. } => Some(plugin.clone()),
            _ => None,
        }
    }

    /// What there is to choose from.
    pub fn pool(&self, name: &str) -> Pool {
        let healthy = self.resources.get(name).map(Resource::healthy).unwrap_or_default();
        let given = self.allocations.values().flat_map(BTreeMap::values).filter_map(|resources| resources.get(name));
        let mut taken: BTreeSet<String> = given.flat_map(Allocation::ids).collect();
        taken.extend(self.held.get(name).into_iter().flatten().cloned());
        Pool { healthy, taken }
    }

    /// What a container has of a resource.
    pub fn allocation(&self, uid: &str, container: &str, resource: &str) -> Option<&Allocation> {
        self.allocations.get(uid)?.get(container)?.get(resource)
    }

    /// Keeps devices from others until they are given or let go.
    pub fn hold(&mut self, resource: &str, ids: &BTreeSet<String>) {
        self.held.entry(resource.to_owned()).or_default().extend(ids.iter().cloned());
    }

    /// Lets go of what was held.
    pub fn let_go(&mut self, resource: &str, ids: &BTreeSet<String>) {
        if let Some(held) = self.held.get_mut(resource) {
            held.retain(|id| !ids.contains(id));
        }
    }

    /// Gives devices to a container.
    pub fn give(
        &mut self,
        (uid, container, name): (&str, &str, &str),
        ids: &BTreeSet<String>,
        response: ContainerAllocateResponse,
    ) {
        let mut by_node: BTreeMap<i64, Vec<String>> = BTreeMap::new();
        let devices = self.resources.get(name).map(|resource| &resource.devices);
        for id in ids {
            let nodes = devices.and_then(|devices| devices.get(id)).map(|device| device.nodes.as_slice()).unwrap_or_default();
            for node in if nodes.is_empty() { &[NO_NODE] } else { nodes } {
                by_node.entry(*node).or_default().push(id.clone());
            }
        }
        let containers = self.allocations.entry(uid.to_owned()).or_default();
        let allocation = Allocation { by_node, response, stale: false };
        containers.entry(container.to_owned()).or_default().insert(name.to_owned(), allocation);
        self.let_go(name, ids);
    }

    /// Takes back what pods have that are not among these; whether there was any.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) -> bool {
        let before = self.allocations.len();
        self.allocations.retain(|uid, _| keep(uid));
        before != self.allocations.len()
    }

    /// How many devices of each resource there are, and how many work.
    pub fn capacity(&self) -> BTreeMap<String, (usize, usize)> {
        let count = |(name, resource): (&String, &Resource)| (name.clone(), (resource.devices.len(), resource.healthy().len()));
        self.resources.iter().map(count).collect()
    }

    /// The healthy devices of each resource.
    pub fn registered(&self) -> BTreeMap<String, Vec<String>> {
        self.resources.iter().map(|(name, resource)| (name.clone(), resource.healthy().into_iter().collect())).collect()
    }

    /// A device's health as a status has it.
    pub fn health(&self, resource: &str, id: &str) -> &'static str {
        let Some(resource) = self.resources.get(resource) else { return "Unknown" };
        match (&resource.link, resource.devices.get(id)) {
            (Link::Expected(_) | Link::Up { listed: false, .. }, _) => "Unknown",
            (Link::Up { .. }, Some(device)) if device.healthy => "Healthy",
            _ => "Unhealthy",
        }
    }
}
