//! The `info` maps of verbose statuses: one JSON object each, in the fields that tools look for.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Value, json};

use super::cni_result;
use super::namespaces::PodNamespaces;
use crate::Server;
use crate::board::{ContainerState, ContainerView, SandboxView};
use crate::container::mounts::oci_maps;
use crate::id::SandboxId;
use crate::sandbox::owner;
use crate::sandbox::state::Op;
use crate::spec::NamespaceMode;

type Info = HashMap<String, String>;

fn one(key: &str, value: &Value) -> Info {
    HashMap::from([(key.to_owned(), value.to_string())])
}

/// Of a sandbox.
pub(super) async fn sandbox(server: &Arc<Server>, view: &SandboxView) -> Info {
    let shim = view.pid.filter(|_| view.ready);
    let live = match shim {
        Some(_) => owner::submit(server, &view.id, Op::Live).await.ok(),
        None => None,
    };
    let mut inside = running(server, &view.id);
    inside.extend(live.and_then(|live| live.pause));
    let attachment = server.network.attachment(view.id.as_str());
    let looked = tokio::task::spawn_blocking(move || {
        let namespaces = shim.map(PodNamespaces::of_shim).unwrap_or_default();
        let pid = inside.into_iter().find(|pid| namespaces.hold(*pid)).or(shim).unwrap_or(0);
        let cni = attachment.and_then(|a| serde_json::from_str::<Value>(&a.result_json).ok());
        let cni = cni.map(|result| cni_result::shown(&result, namespaces.network(), has_ipv6_loopback(pid)));
        (pid, namespaces.entries(), cni)
    });
    let (pid, namespaces, cni) = looked.await.unwrap_or_default();
    let users = view.spec.namespaces.own_users();
    one(
        "info",
        &json!({
            "pid": pid,
            "shimPid": view.pid.unwrap_or(0),
            "processStatus": if view.ready { "running" } else { "deleted" },
            "runtimeHandler": view.spec.runtime_handler,
            "runtimeType": "berth-shim",
            "cgroupsPath": view.cgroup,
            "config": &*view.spec,
            "runtimeSpec": {
                "ociVersion": berth_oci::spec::VERSION,
                "hostname": crate::sandbox::files::hostname(&view.spec),
                "annotations": view.spec.annotations,
                "linux": {
                    "cgroupsPath": view.cgroup,
                    "namespaces": namespaces,
                    "sysctl": view.spec.sysctls,
                    "uidMappings": users.map(|u| oci_maps(&u.uids)).unwrap_or_default(),
                    "gidMappings": users.map(|u| oci_maps(&u.gids)).unwrap_or_default(),
                },
            },
            "cniResult": cni,
        }),
    )
}

/// The first processes of a pod's running containers, the one that has run for longest first.
fn running(server: &Server, id: &SandboxId) -> Vec<i32> {
    let mut running = server.board.containers_of(id);
    running.retain(|c| c.state == ContainerState::Running);
    running.sort_by_key(|c| c.started_at);
    running.iter().filter_map(|c| c.pid).collect()
}

/// Whether the loopback interface that a process sees has its IPv6 address. Blocking.
fn has_ipv6_loopback(pid: i32) -> bool {
    let addresses = std::fs::read_to_string(format!("/proc/{pid}/net/if_inet6")).unwrap_or_default();
    addresses.lines().any(|line| line.ends_with(" lo"))
}

/// Of a container.
pub(super) async fn container(server: &Arc<Server>, view: &ContainerView) -> Info {
    let path = server.paths.oci_spec(&view.sandbox, &view.id);
    let shim = server.board.sandbox(view.sandbox.as_str()).and_then(|pod| pod.pid.filter(|_| pod.ready));
    let pid = view.pid.filter(|_| view.state != ContainerState::Exited);
    let own = &view.facts.spec.security.namespaces;
    let target = match own.pid {
        NamespaceMode::Target => server.board.container(&own.target_id).and_then(|c| c.pid),
        _ => None,
    };
    let spec = tokio::task::spawn_blocking(move || {
        let mut spec = serde_json::from_slice::<Value>(&std::fs::read(path).ok()?).ok()?;
        if let (Some(shim), Some(pid)) = (shim, pid) {
            PodNamespaces::of_shim(shim).show_in(&mut spec, pid, target);
        }
        Some(spec)
    });
    one(
        "info",
        &json!({
            "sandboxID": view.sandbox.as_str(),
            "pid": view.pid.unwrap_or(0),
            "runtimeType": "berth-shim",
            "snapshotKey": view.id.as_str(),
            "snapshotter": "overlayfs",
            "cgroupsPath": view.facts.cgroup,
            "config": &view.facts.spec,
            "runtimeSpec": spec.await.ok().flatten(),
        }),
    )
}

/// Of the server.
pub(super) fn server(server: &Server, network: &berth_cni::NetworkStatus) -> Info {
    let config = json!({
        "root": server.config.root,
        "stateDir": server.config.state,
        "instance": server.instance,
        "cgroupV2": server.cgroups.is_v2(),
        "apparmorProfile": server.apparmor.default_profile(),
        "selinux": server.selinux.text(),
        "cgroupTop": server.cgroups.top(),
        "systemdCgroup": server.cgroups.driver() == crate::CgroupDriver::Systemd,
        "cniConfDir": server.config.cni_conf_dir,
        "cniBinDirs": server.config.cni_bin_dirs,
        "registryConfigDirs": server.config.registry_config_dirs,
    });
    let invalid: Vec<String> = network.invalid.iter().map(|(path, reason)| format!("{}: {reason}", path.display())).collect();
    let cni = json!({ "network": network.network, "source": network.source, "invalid": invalid });
    HashMap::from([
        ("config".to_owned(), config.to_string()),
        ("cniconfig".to_owned(), cni.to_string()),
        ("lastCNILoadStatus".to_owned(), if network.ready { "OK".to_owned() } else { network.message.clone() }),
    ])
}

/// Of an image.
pub(super) fn image(config: &berth_image::ImageConfig) -> Info {
    let spec = json!({
        "created": config.created,
        "architecture": config.architecture,
        "os": config.os,
        "config": {
            "User": config.user,
            "Env": config.env,
            "Entrypoint": config.entrypoint,
            "Cmd": config.cmd,
            "WorkingDir": config.working_dir,
            "StopSignal": config.stop_signal,
            "Labels": config.labels,
        },
    });
    one("info", &json!({ "imageSpec": spec, "labels": config.labels }))
}
