//! Pods and containers as plugins are told of them.

use std::sync::Arc;

use berth_nri::api::{
    self, CdiDevice, Container, Hook, Hooks, Image, LinuxContainer, LinuxDevice, LinuxDeviceCgroup, LinuxMemory, LinuxNamespace,
    LinuxPids, LinuxPodSandbox, LinuxResources, Mount, OptionalFileMode, OptionalInt, OptionalInt64, OptionalUInt32, PodSandbox,
    PosixRlimit, SecurityProfile, User,
};
use berth_oci::spec::{self, NamespaceType, Spec};

use super::limits;
use crate::Server;
use crate::board::{ContainerState, ContainerView, SandboxView, ShownContainer};
use crate::id::ContainerId;
use crate::sandbox::holdings::Live;
use crate::spec::{ContainerSpec, Profile, SandboxSpec};

/// A pod on the board.
pub(super) fn pod(view: &SandboxView) -> PodSandbox {
    let pid = view.pid.unwrap_or(0).unsigned_abs();
    described(view.id.as_str(), &view.spec, &view.cgroup, pid, &view.ips)
}

/// A pod by its holdings: also one that is being made.
pub(super) fn live_pod(live: &Live) -> PodSandbox {
    let pid = live.process.as_ref().map_or(0, |p| p.pid.unsigned_abs());
    described(live.id.as_str(), &live.spec, &live.cgroup, pid, &live.ips)
}

fn described(id: &str, spec: &SandboxSpec, cgroup: &str, pid: u32, ips: &[std::net::IpAddr]) -> PodSandbox {
    let resources = spec.resources.as_ref().map(limits::wire);
    PodSandbox {
        id: id.to_owned(),
        name: spec.metadata.name.clone(),
        uid: spec.metadata.uid.clone(),
        namespace: spec.metadata.namespace.clone(),
        labels: spec.labels.clone(),
        annotations: spec.annotations.clone(),
        runtime_handler: spec.runtime_handler.clone(),
        linux: Some(LinuxPodSandbox {
            pod_overhead: spec.overhead.as_ref().map(limits::wire),
            pod_resources: resources.clone(),
            cgroup_parent: spec.cgroup_parent.clone(),
            cgroups_path: cgroup.to_owned(),
            namespaces: Vec::new(),
            resources,
        }),
        pid,
        ips: ips.iter().map(ToString::to_string).collect(),
    }
}

/// A container on the board: what is known without its OCI spec.
pub(super) fn container(view: &ContainerView) -> Container {
    let facts = &view.facts;
    let spec = &facts.spec;
    let state = match view.state {
        ContainerState::Created => api::ContainerState::ContainerCreated,
        ContainerState::Running => api::ContainerState::ContainerRunning,
        ContainerState::Exited => api::ContainerState::ContainerStopped,
    };
    let exit = view.exit.as_ref();
    Container {
        state: state.into(),
        pid: view.pid.unwrap_or(0).unsigned_abs(),
        created_at: view.created_at,
        started_at: view.started_at,
        finished_at: exit.map_or(0, |e| e.finished_at),
        exit_code: exit.map_or(0, |e| e.code),
        status_reason: exit.map(|e| e.reason.clone()).unwrap_or_default(),
        status_message: exit.map(|e| e.message.clone()).unwrap_or_default(),
        image: Some(Image {
            name: facts.image_name.clone(),
            digest: facts.image_ref.clone(),
            config_digest: facts.image_id.clone(),
        }),
        linux: Some(LinuxContainer {
            cgroups_path: facts.cgroup.clone(),
            resources: Some(limits::wire(&view.resources)),
            ..Default::default()
        }),
        ..asked(view.id.as_str(), view.sandbox.as_str(), spec)
    }
}

/// What only the request says.
fn asked(id: &str, sandbox: &str, spec: &ContainerSpec) -> Container {
    Container {
        id: id.to_owned(),
        pod_sandbox_id: sandbox.to_owned(),
        name: spec.name.clone(),
        labels: spec.labels.clone(),
        annotations: spec.annotations.clone(),
        cdi_devices: spec.cdi_devices.iter().map(|name| CdiDevice { name: name.clone() }).collect(),
        ..Default::default()
    }
}

/// A container that is about to be made.
pub(super) fn new_container(live: &Live, id: &ContainerId, spec: &ContainerSpec, oci: &Spec) -> Container {
    let image = Image { name: spec.image.image.clone(), ..Default::default() };
    let mut out = Container { image: Some(image), ..asked(id.as_str(), live.id.as_str(), spec) };
    add_spec(&mut out, oci);
    if let Some(linux) = &mut out.linux {
        linux.seccomp_profile = Some(profile(spec));
    }
    out
}

/// A container on the board, with its OCI spec as it is on file. Without one, what is known else.
pub(super) async fn on_file(server: &Arc<Server>, view: ShownContainer) -> Container {
    let path = server.paths.oci_spec(&view.sandbox, &view.id);
    let loaded = crate::blocking(move || {
        let bytes = std::fs::read(&path).map_err(crate::error::file("read", &path))?;
        serde_json::from_slice::<Spec>(&bytes)
            .map_err(|e| crate::error::Error::Record { path: path.clone(), reason: e.to_string() })
    })
    .await;
    let mut out = container(&view);
    match loaded {
        Ok(oci) => {
            let resources = out.linux.take().and_then(|l| l.resources);
            add_spec(&mut out, &oci);
            if let (Some(linux), Some(now)) = (&mut out.linux, resources) {
                // They may have changed since.
                let resources = linux.resources.get_or_insert_default();
                (resources.cpu, resources.hugepage_limits, resources.unified) = (now.cpu, now.hugepage_limits, now.unified);
                let memory = resources.memory.get_or_insert_default();
                if let Some(now) = now.memory {
                    (memory.limit, memory.swap) = (now.limit, now.swap);
                }
                linux.seccomp_profile = Some(profile(&view.facts.spec));
            }
        }
        Err(error) => tracing::debug!(container = %view.id, error = %crate::error::text(&error), "NRI: no OCI spec to tell"),
    }
    out
}

fn profile(spec: &ContainerSpec) -> SecurityProfile {
    use api::ProfileType::{Localhost, RuntimeDefault, Unconfined};
    let (kind, name) = match &spec.security.seccomp {
        Some(Profile::RuntimeDefault) => (RuntimeDefault, String::new()),
        Some(Profile::Localhost(name)) => (Localhost, name.clone()),
        Some(Profile::Unconfined) | None => (Unconfined, String::new()),
    };
    SecurityProfile { profile_type: kind.into(), localhost_ref: name }
}

/// The kinds of namespaces by the OCI specification's names.
pub(super) const NAMESPACES: [(NamespaceType, &str); 7] = [
    (NamespaceType::Pid, "pid"),
    (NamespaceType::Network, "network"),
    (NamespaceType::Mount, "mount"),
    (NamespaceType::Ipc, "ipc"),
    (NamespaceType::Uts, "uts"),
    (NamespaceType::User, "user"),
    (NamespaceType::Cgroup, "cgroup"),
];

/// Adds what the OCI spec says. Environment values that are no text are told as near as text can be.
fn add_spec(out: &mut Container, oci: &Spec) {
    let name = |kind| NAMESPACES.iter().find(|(k, _)| *k == kind).map_or("", |(_, name)| name).to_owned();
    if let Some(process) = &oci.process {
        out.args.clone_from(&process.args);
        out.env = process.env.iter().map(|e| String::from_utf8_lossy(&e.0).into_owned()).collect();
        let limit = |l: &spec::Rlimit| PosixRlimit { r#type: l.kind.clone(), hard: l.hard, soft: l.soft };
        out.rlimits = process.rlimits.iter().map(limit).collect();
        let user = &process.user;
        out.user = Some(User { uid: user.uid, gid: user.gid, additional_gids: user.additional_gids.clone() });
    }
    out.mounts = oci.mounts.iter().map(mount).collect();
    out.hooks = oci.hooks.as_ref().map(hooks);
    let linux = &oci.linux;
    out.linux = Some(LinuxContainer {
        namespaces: linux.namespaces.iter().map(|n| LinuxNamespace { r#type: name(n.kind), path: n.path.clone() }).collect(),
        devices: linux.devices.iter().map(device).collect(),
        resources: linux.resources.as_ref().map(resources),
        oom_score_adj: oci.process.as_ref().and_then(|p| p.oom_score_adj).map(|v| OptionalInt { value: v.into() }),
        cgroups_path: linux.cgroups_path.clone(),
        sysctl: linux.sysctl.clone(),
        ..Default::default()
    });
}

fn mount(mount: &spec::Mount) -> Mount {
    Mount {
        destination: mount.destination.clone(),
        r#type: mount.kind.clone(),
        source: mount.source.clone(),
        options: mount.options.clone(),
    }
}

fn hooks(hooks: &spec::Hooks) -> Hooks {
    let all = |hooks: &[spec::Hook]| {
        let hook = |h: &spec::Hook| Hook {
            path: h.path.clone(),
            args: h.args.clone(),
            env: h.env.clone(),
            timeout: h.timeout.map(|seconds| OptionalInt { value: seconds.into() }),
        };
        hooks.iter().map(hook).collect()
    };
    Hooks {
        prestart: all(&hooks.prestart),
        create_runtime: all(&hooks.create_runtime),
        create_container: all(&hooks.create_container),
        start_container: all(&hooks.start_container),
        poststart: all(&hooks.poststart),
        poststop: all(&hooks.poststop),
    }
}

fn device(device: &spec::Device) -> LinuxDevice {
    LinuxDevice {
        path: device.path.clone(),
        r#type: device.kind.clone(),
        major: device.major.into(),
        minor: device.minor.into(),
        file_mode: device.file_mode.map(|value| OptionalFileMode { value }),
        uid: device.uid.map(|value| OptionalUInt32 { value }),
        gid: device.gid.map(|value| OptionalUInt32 { value }),
    }
}

fn resources(from: &spec::Resources) -> LinuxResources {
    let signed = |v: Option<i64>| v.map(|value| OptionalInt64 { value });
    let unsigned = |v: Option<u64>| v.map(|value| api::OptionalUInt64 { value });
    let memory = from.memory.clone().unwrap_or_default();
    let cpu = from.cpu.clone().unwrap_or_default();
    LinuxResources {
        memory: Some(LinuxMemory {
            limit: signed(memory.limit),
            reservation: signed(memory.reservation),
            swap: signed(memory.swap),
            swappiness: unsigned(memory.swappiness),
            disable_oom_killer: memory.disable_oom_killer.map(|value| api::OptionalBool { value }),
            ..Default::default()
        }),
        cpu: Some(api::LinuxCpu {
            shares: unsigned(cpu.shares),
            quota: signed(cpu.quota),
            period: unsigned(cpu.period),
            realtime_runtime: signed(cpu.realtime_runtime),
            realtime_period: unsigned(cpu.realtime_period),
            cpus: cpu.cpus.unwrap_or_default(),
            mems: cpu.mems.unwrap_or_default(),
        }),
        hugepage_limits: from
            .hugepage_limits
            .iter()
            .map(|l| api::HugepageLimit { page_size: l.page_size.clone(), limit: l.limit })
            .collect(),
        unified: from.unified.clone(),
        devices: from
            .devices
            .iter()
            .map(|d| LinuxDeviceCgroup {
                allow: d.allow,
                r#type: d.kind.clone().unwrap_or_default(),
                major: signed(d.major),
                minor: signed(d.minor),
                access: d.access.clone().unwrap_or_default(),
            })
            .collect(),
        pids: from.pids.as_ref().and_then(|p| p.limit).map(|limit| LinuxPids { limit }),
        ..Default::default()
    }
}
