//! Wire ↔ domain. Protobuf types stop here; must not touch the system.

pub(crate) mod bandwidth;
pub(crate) mod request;
pub(crate) mod signal;
pub(crate) mod status;

use berth_cri_api::v1;

use crate::error::{Error, invalid};
use crate::spec::{IdMap, Map, NamespaceMode, Profile, Propagation, Resources};

pub(crate) fn map(wire: std::collections::HashMap<String, String>) -> Map {
    wire.into_iter().collect()
}

pub(crate) fn wire_map(map: &Map) -> std::collections::HashMap<String, String> {
    map.iter().map(|(k, v)| (k.clone(), v.clone())).collect()
}

pub(crate) fn mode(field: &'static str, wire: i32) -> Result<NamespaceMode, Error> {
    match v1::NamespaceMode::try_from(wire) {
        Ok(v1::NamespaceMode::Pod) => Ok(NamespaceMode::Pod),
        Ok(v1::NamespaceMode::Container) => Ok(NamespaceMode::Container),
        Ok(v1::NamespaceMode::Node) => Ok(NamespaceMode::Node),
        Ok(v1::NamespaceMode::Target) => Ok(NamespaceMode::Target),
        Err(_) => Err(invalid(field, format!("unknown namespace mode {wire}"))),
    }
}

pub(crate) fn wire_mode(mode: NamespaceMode) -> i32 {
    match mode {
        NamespaceMode::Pod => v1::NamespaceMode::Pod,
        NamespaceMode::Container => v1::NamespaceMode::Container,
        NamespaceMode::Node => v1::NamespaceMode::Node,
        NamespaceMode::Target => v1::NamespaceMode::Target,
    }
    .into()
}

pub(crate) fn propagation(wire: i32) -> Result<Propagation, Error> {
    match v1::MountPropagation::try_from(wire) {
        Ok(v1::MountPropagation::PropagationPrivate) => Ok(Propagation::Private),
        Ok(v1::MountPropagation::PropagationHostToContainer) => Ok(Propagation::HostToContainer),
        Ok(v1::MountPropagation::PropagationBidirectional) => Ok(Propagation::Bidirectional),
        Err(_) => Err(invalid("mounts.propagation", format!("unknown value {wire}"))),
    }
}

pub(crate) fn wire_propagation(propagation: Propagation) -> i32 {
    match propagation {
        Propagation::Private => v1::MountPropagation::PropagationPrivate,
        Propagation::HostToContainer => v1::MountPropagation::PropagationHostToContainer,
        Propagation::Bidirectional => v1::MountPropagation::PropagationBidirectional,
    }
    .into()
}

pub(crate) fn id_maps(wire: &[v1::IdMapping]) -> Vec<IdMap> {
    wire.iter().map(|m| IdMap { container: m.container_id, host: m.host_id, length: m.length }).collect()
}

pub(crate) fn wire_id_maps(maps: &[IdMap]) -> Vec<v1::IdMapping> {
    maps.iter().map(|m| v1::IdMapping { container_id: m.container, host_id: m.host, length: m.length }).collect()
}

pub(crate) fn profile(field: &'static str, wire: v1::SecurityProfile) -> Result<Profile, Error> {
    use v1::security_profile::ProfileType;
    match ProfileType::try_from(wire.profile_type) {
        Ok(ProfileType::RuntimeDefault) => Ok(Profile::RuntimeDefault),
        Ok(ProfileType::Unconfined) => Ok(Profile::Unconfined),
        Ok(ProfileType::Localhost) if wire.localhost_ref.is_empty() => {
            Err(invalid(field, "localhost profile without a reference"))
        }
        Ok(ProfileType::Localhost) => Ok(Profile::Localhost(wire.localhost_ref)),
        Err(_) => Err(invalid(field, format!("unknown profile type {}", wire.profile_type))),
    }
}

pub(crate) fn resources(wire: v1::LinuxContainerResources) -> Resources {
    Resources {
        cpu_period: wire.cpu_period,
        cpu_quota: wire.cpu_quota,
        cpu_shares: wire.cpu_shares,
        memory_limit: wire.memory_limit_in_bytes,
        memory_swap_limit: wire.memory_swap_limit_in_bytes,
        oom_score_adj: wire.oom_score_adj,
        cpuset_cpus: wire.cpuset_cpus,
        cpuset_mems: wire.cpuset_mems,
        hugepages: wire.hugepage_limits.into_iter().map(|h| (h.page_size, h.limit)).collect(),
        unified: map(wire.unified),
    }
}

pub(crate) fn wire_resources(resources: &Resources) -> v1::LinuxContainerResources {
    v1::LinuxContainerResources {
        cpu_period: resources.cpu_period,
        cpu_quota: resources.cpu_quota,
        cpu_shares: resources.cpu_shares,
        memory_limit_in_bytes: resources.memory_limit,
        memory_swap_limit_in_bytes: resources.memory_swap_limit,
        oom_score_adj: resources.oom_score_adj,
        cpuset_cpus: resources.cpuset_cpus.clone(),
        cpuset_mems: resources.cpuset_mems.clone(),
        hugepage_limits: resources
            .hugepages
            .iter()
            .map(|(page_size, limit)| v1::HugepageLimit { page_size: page_size.clone(), limit: *limit })
            .collect(),
        unified: wire_map(&resources.unified),
    }
}
