//! The `info` maps of verbose statuses: one JSON object each, in the fields that tools look for.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::Server;
use crate::board::{ContainerView, SandboxView};

type Info = HashMap<String, String>;

fn one(key: &str, value: &Value) -> Info {
    HashMap::from([(key.to_owned(), value.to_string())])
}

/// Of a sandbox.
pub(super) fn sandbox(server: &Server, view: &SandboxView) -> Info {
    let cni = server.network.attachment(view.id.as_str()).and_then(|a| serde_json::from_str::<Value>(&a.result_json).ok());
    one(
        "info",
        &json!({
            "pid": view.pid.unwrap_or(0),
            "processStatus": if view.ready { "running" } else { "deleted" },
            "runtimeHandler": view.spec.runtime_handler,
            "runtimeType": "berth-shim",
            "cgroupsPath": view.cgroup,
            "config": &*view.spec,
            "cniResult": cni,
        }),
    )
}

/// Of a container.
pub(super) async fn container(server: &Arc<Server>, view: &ContainerView) -> Info {
    let path = server.paths.oci_spec(&view.sandbox, &view.id);
    let spec =
        tokio::task::spawn_blocking(move || std::fs::read(path).ok().and_then(|b| serde_json::from_slice::<Value>(&b).ok()));
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
