//! CRI configurations as crictl reads them from files.

use berth_testkit::TempState;
use serde_json::{Value, json};

use crate::crictl::Crictl;
use crate::image;

/// Whose PID namespace the containers of a pod have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PidShape {
    /// Each its own, as kubelets ask.
    PerContainer,
    /// One for the pod, crictl's default.
    Shared,
}

impl PidShape {
    /// The CRI's NamespaceMode.
    fn mode(self) -> u32 {
        match self {
            Self::Shared => 0,
            Self::PerContainer => 1,
        }
    }
}

/// A sandbox's configuration; logs go to `logs/<name>` in `state`.
#[must_use]
pub fn sandbox(state: &TempState, name: &str, shape: PidShape) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}"), "attempt": 0},
        "hostname": name,
        "log_directory": state.dir(&format!("logs/{name}")),
        "labels": {"e2e": name},
        "linux": {"security_context": {"namespace_options": {"pid": shape.mode()}}},
    })
}

/// A container's configuration that runs a shell script in the busybox image.
#[must_use]
pub fn container(name: &str, shape: PidShape, script: &str) -> Value {
    json!({
        "metadata": {"name": name, "attempt": 0},
        "image": {"image": image::BUSYBOX_IMAGE},
        "command": ["sh", "-c", script],
        "log_path": format!("{name}.log"),
        "linux": {"security_context": {"namespace_options": {"pid": shape.mode()}}},
    })
}

/// Writes a configuration to a file and returns its path.
#[must_use]
pub fn file(state: &TempState, name: &str, config: &Value) -> String {
    state.file(name, config.to_string()).to_string_lossy().into_owned()
}

/// Runs a pod with one container and returns their ids.
pub fn run_pod(crictl: &Crictl, state: &TempState, name: &str, shape: PidShape, script: &str) -> (String, String) {
    let pod_config = file(state, &format!("{name}-pod.json"), &sandbox(state, name, shape));
    let container_config = file(state, &format!("{name}-container.json"), &container(name, shape, script));
    let pod = crictl.run(&["runp", &pod_config]);
    let container = crictl.run(&["create", &pod, &container_config, &pod_config]);
    crictl.run(&["start", &container]);
    (pod, container)
}
