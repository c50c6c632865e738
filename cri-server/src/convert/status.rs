//! Views → replies: list items, statuses, filters.

use berth_cri_api::v1;

use super::{map, wire_id_maps, wire_map, wire_mode, wire_propagation, wire_resources};
use crate::board::{ContainerState, ContainerView, SandboxView};
use crate::spec::{ContainerSpec, Map, Namespaces, SandboxMetadata};

fn sandbox_metadata(m: &SandboxMetadata) -> v1::PodSandboxMetadata {
    v1::PodSandboxMetadata { name: m.name.clone(), uid: m.uid.clone(), namespace: m.namespace.clone(), attempt: m.attempt }
}

fn sandbox_state(ready: bool) -> i32 {
    if ready { v1::PodSandboxState::SandboxReady } else { v1::PodSandboxState::SandboxNotready }.into()
}

fn wire_namespaces(n: &Namespaces) -> v1::NamespaceOption {
    v1::NamespaceOption {
        network: wire_mode(n.network),
        pid: wire_mode(n.pid),
        ipc: wire_mode(n.ipc),
        target_id: n.target_id.clone(),
        userns_options: n.users.as_ref().map(|u| v1::UserNamespace {
            mode: wire_mode(u.mode),
            uids: wire_id_maps(&u.uids),
            gids: wire_id_maps(&u.gids),
        }),
    }
}

/// A list item.
pub(crate) fn sandbox_item(view: &SandboxView) -> v1::PodSandbox {
    v1::PodSandbox {
        id: view.id.as_str().to_owned(),
        metadata: Some(sandbox_metadata(&view.spec.metadata)),
        state: sandbox_state(view.ready),
        created_at: view.created_at,
        labels: wire_map(&view.spec.labels),
        annotations: wire_map(&view.spec.annotations),
        runtime_handler: view.spec.runtime_handler.clone(),
    }
}

/// A status.
pub(crate) fn sandbox_status(view: &SandboxView) -> v1::PodSandboxStatus {
    let mut ips = view.ips.iter().map(ToString::to_string);
    v1::PodSandboxStatus {
        id: view.id.as_str().to_owned(),
        metadata: Some(sandbox_metadata(&view.spec.metadata)),
        state: sandbox_state(view.ready),
        created_at: view.created_at,
        network: Some(v1::PodSandboxNetworkStatus {
            ip: ips.next().unwrap_or_default(),
            additional_ips: ips.map(|ip| v1::PodIp { ip }).collect(),
        }),
        linux: Some(v1::LinuxPodSandboxStatus {
            namespaces: Some(v1::Namespace { options: Some(wire_namespaces(&view.spec.namespaces)) }),
        }),
        labels: wire_map(&view.spec.labels),
        annotations: wire_map(&view.spec.annotations),
        runtime_handler: view.spec.runtime_handler.clone(),
    }
}

/// The state on the wire.
pub(crate) fn container_state(state: ContainerState) -> i32 {
    match state {
        ContainerState::Created => v1::ContainerState::ContainerCreated,
        ContainerState::Running => v1::ContainerState::ContainerRunning,
        ContainerState::Exited => v1::ContainerState::ContainerExited,
    }
    .into()
}

/// Name and attempt.
pub(crate) fn container_metadata(spec: &ContainerSpec) -> v1::ContainerMetadata {
    v1::ContainerMetadata { name: spec.name.clone(), attempt: spec.attempt }
}

fn image_spec(image: &str, view: &ContainerView) -> v1::ImageSpec {
    let asked = &view.facts.spec.image;
    v1::ImageSpec {
        image: image.to_owned(),
        annotations: wire_map(&asked.annotations),
        user_specified_image: asked.user_specified.clone(),
        runtime_handler: asked.runtime_handler.clone(),
        image_ref: String::new(),
    }
}

/// A list item.
pub(crate) fn container_item(view: &ContainerView) -> v1::Container {
    let spec = &view.facts.spec;
    v1::Container {
        id: view.id.as_str().to_owned(),
        pod_sandbox_id: view.sandbox.as_str().to_owned(),
        metadata: Some(container_metadata(spec)),
        image: Some(image_spec(&spec.image.image, view)),
        image_ref: view.facts.image_id.clone(),
        state: container_state(view.state),
        created_at: view.created_at,
        labels: wire_map(&spec.labels),
        annotations: wire_map(&spec.annotations),
        image_id: view.facts.image_id.clone(),
    }
}

/// A status.
pub(crate) fn container_status(view: &ContainerView) -> v1::ContainerStatus {
    let facts = &view.facts;
    let exit = view.exit.as_ref();
    let user = &facts.user;
    v1::ContainerStatus {
        id: view.id.as_str().to_owned(),
        metadata: Some(container_metadata(&facts.spec)),
        state: container_state(view.state),
        created_at: view.created_at,
        started_at: view.started_at,
        finished_at: exit.map_or(0, |e| e.finished_at),
        exit_code: exit.map_or(0, |e| e.code),
        image: Some(image_spec(&facts.image_name, view)),
        image_ref: facts.image_ref.clone(),
        reason: exit.map_or_else(String::new, |e| e.reason.clone()),
        message: exit.map_or_else(String::new, |e| e.message.clone()),
        labels: wire_map(&facts.spec.labels),
        annotations: wire_map(&facts.spec.annotations),
        mounts: facts
            .spec
            .mounts
            .iter()
            .map(|m| v1::Mount {
                container_path: m.container_path.clone(),
                host_path: m.host_path.clone(),
                readonly: m.readonly,
                selinux_relabel: m.selinux_relabel,
                propagation: wire_propagation(m.propagation),
                uid_mappings: wire_id_maps(&m.uids),
                gid_mappings: wire_id_maps(&m.gids),
                recursive_read_only: m.recursive_readonly,
                image: m.image.as_ref().map(|i| v1::ImageSpec {
                    image: i.image.clone(),
                    image_ref: i.id.clone(),
                    ..Default::default()
                }),
                image_sub_path: m.image.as_ref().map_or_else(String::new, |i| i.sub_path.clone()),
            })
            .collect(),
        log_path: facts.log_path.clone(),
        resources: Some(v1::ContainerResources { linux: Some(wire_resources(&view.resources)), windows: None }),
        image_id: facts.image_id.clone(),
        user: Some(v1::ContainerUser {
            linux: Some(v1::LinuxContainerUser {
                uid: i64::from(user.uid),
                gid: i64::from(user.gid),
                supplemental_groups: user.groups.iter().map(|g| i64::from(*g)).collect(),
            }),
        }),
        stop_signal: super::signal::cri_number(facts.stop_signal),
    }
}

fn selected(selector: &Map, labels: &Map) -> bool {
    selector.iter().all(|(k, v)| labels.get(k) == Some(v))
}

/// A filter of sandboxes.
pub(crate) struct SandboxFilter {
    id: String,
    state: Option<i32>,
    labels: Map,
}

impl SandboxFilter {
    /// From the wire; nothing = all.
    pub(crate) fn new(wire: Option<v1::PodSandboxFilter>) -> Self {
        let wire = wire.unwrap_or_default();
        Self { id: wire.id, state: wire.state.map(|s| s.state), labels: map(wire.label_selector) }
    }

    /// Whether a sandbox is meant.
    pub(crate) fn matches(&self, view: &SandboxView) -> bool {
        view.id.as_str().starts_with(&self.id)
            && self.state.is_none_or(|s| s == sandbox_state(view.ready))
            && selected(&self.labels, &view.spec.labels)
    }
}

/// A filter of containers.
pub(crate) struct ContainerFilter {
    id: String,
    sandbox: String,
    state: Option<i32>,
    labels: Map,
}

impl ContainerFilter {
    /// From the wire; nothing = all.
    pub(crate) fn new(wire: Option<v1::ContainerFilter>) -> Self {
        let wire = wire.unwrap_or_default();
        Self { id: wire.id, sandbox: wire.pod_sandbox_id, state: wire.state.map(|s| s.state), labels: map(wire.label_selector) }
    }

    /// From a statistics filter.
    pub(crate) fn of_stats(wire: Option<v1::ContainerStatsFilter>) -> Self {
        let wire = wire.unwrap_or_default();
        Self { id: wire.id, sandbox: wire.pod_sandbox_id, state: None, labels: map(wire.label_selector) }
    }

    /// Whether a container is meant.
    pub(crate) fn matches(&self, view: &ContainerView) -> bool {
        view.id.as_str().starts_with(&self.id)
            && view.sandbox.as_str().starts_with(&self.sandbox)
            && self.state.is_none_or(|s| s == container_state(view.state))
            && selected(&self.labels, &view.facts.spec.labels)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::SandboxSpec;
    use std::sync::Arc;

    fn view() -> SandboxView {
        let spec = SandboxSpec { labels: [("a".into(), "1".into()), ("b".into(), "2".into())].into(), ..Default::default() };
        SandboxView {
            id: "abcdef".into(),
            spec: Arc::new(spec),
            ready: true,
            created_at: 1,
            ips: vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
            pid: None,
            cgroup: String::new(),
            reason: String::new(),
        }
    }

    #[test]
    fn all_fields_of_a_filter_must_hold() {
        let label = |k: &str, v: &str| std::collections::HashMap::from([(k.to_owned(), v.to_owned())]);
        let ready = |s: v1::PodSandboxState| Some(v1::PodSandboxStateValue { state: s.into() });
        let cases = [
            (v1::PodSandboxFilter::default(), true),
            (v1::PodSandboxFilter { id: "abc".into(), ..Default::default() }, true),
            (v1::PodSandboxFilter { id: "bcd".into(), ..Default::default() }, false),
            (v1::PodSandboxFilter { state: ready(v1::PodSandboxState::SandboxReady), ..Default::default() }, true),
            (v1::PodSandboxFilter { state: ready(v1::PodSandboxState::SandboxNotready), ..Default::default() }, false),
            (v1::PodSandboxFilter { label_selector: label("a", "1"), ..Default::default() }, true),
            (v1::PodSandboxFilter { label_selector: label("a", "2"), ..Default::default() }, false),
            (v1::PodSandboxFilter { id: "abc".into(), label_selector: label("c", "1"), ..Default::default() }, false),
        ];
        for (wire, want) in cases {
            assert_eq!(SandboxFilter::new(Some(wire.clone())).matches(&view()), want, "{wire:?}");
        }
    }

    #[test]
    fn the_first_address_is_the_pods_and_the_others_are_additional() {
        let network = sandbox_status(&view()).network.unwrap();
        assert_eq!(network.ip, "10.0.0.1");
        assert_eq!(network.additional_ips.len(), 1);
    }
}
