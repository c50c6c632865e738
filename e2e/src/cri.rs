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

/// A sandbox's configuration; logs go to `logs/<name>` in `state`.
#[must_use]
pub fn sandbox(state: &TempState, name: &str, shape: PidShape) -> Value {
    let pid = if shape == PidShape::PerContainer { 1 } else { 0 };
    json!({
        "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}"), "attempt": 0},
        "hostname": name,
        "log_directory": state.dir(&format!("logs/{name}")),
        "labels": {"e2e": name},
        "linux": {"security_context": {"namespace_options": {"pid": pid}}},
    })
}

/// A container's configuration that runs a shell script in the busybox image.
#[must_use]
pub fn container(name: &str, script: &str) -> Value {
    json!({
        "metadata": {"name": name, "attempt": 0},
        "image": {"image": image::BUSYBOX_IMAGE},
        "command": ["sh", "-c", script],
        "log_path": format!("{name}.log"),
        "linux": {},
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
    let container_config = file(state, &format!("{name}-container.json"), &container(name, script));
    let pod = crictl.run(&["runp", &pod_config]);
    let container = crictl.run(&["create", &pod, &container_config, &pod_config]);
    crictl.run(&["start", &container]);
    (pod, container)
}
