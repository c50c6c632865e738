//! Documents of volumes: PersistentVolumes, claims, storage classes and CSI drivers. The API's rules for them as far as a node
//! carries them out; what it does not is refused by name.

use k8s_openapi::api::core::v1::{NodeSelector, PersistentVolume, PersistentVolumeClaim};
use k8s_openapi::api::storage::v1::{CSIDriver, StorageClass};
use serde_json::Value;

use super::object::Invalid;
use crate::quantity::Amount;

/// What a volume may be asked for by; the scheduler enforces `ReadWriteOncePod`, and there is none.
const ACCESS_MODES: &[&str] = &["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany"];

/// The API accepts plain numbers where it wants quantities; the types here want text.
pub(super) fn quantities_as_text(object: &mut Value) {
    for path in ["/spec/capacity", "/spec/resources/requests", "/spec/resources/limits", "/overhead/podFixed"] {
        for value in object.pointer_mut(path).and_then(Value::as_object_mut).into_iter().flat_map(|map| map.values_mut()) {
            if let Value::Number(number) = value {
                *value = Value::String(number.to_string());
            }
        }
    }
}

fn add(problems: &mut Invalid, path: impl Into<String>, message: impl Into<String>) {
    problems.push((path.into(), message.into()));
}

fn validate_modes(modes: Option<&[String]>, problems: &mut Invalid) {
    if modes.is_none_or(<[String]>::is_empty) {
        add(problems, "spec.accessModes", "at least one is required");
    }
    for (i, mode) in modes.unwrap_or_default().iter().enumerate() {
        if mode == "ReadWriteOncePod" {
            add(
                problems,
                format!("spec.accessModes[{i}]"),
                "ReadWriteOncePod is a scheduler's to enforce: not supported by berth yet",
            );
        } else if !ACCESS_MODES.contains(&mode.as_str()) {
            add(problems, format!("spec.accessModes[{i}]"), format!("{mode:?} is not one of {}", ACCESS_MODES.join(", ")));
        }
    }
}

fn validate_volume_mode(mode: Option<&str>, problems: &mut Invalid) {
    match mode {
        None | Some("Filesystem") => {}
        Some("Block") => add(problems, "spec.volumeMode", "Block is not supported by berth yet"),
        Some(other) => add(problems, "spec.volumeMode", format!("{other:?} is not one of Filesystem, Block")),
    }
}

fn validate_amount(path: &str, text: Option<&str>, problems: &mut Invalid) {
    match text.map(Amount::parse) {
        None => add(problems, path, "is required"),
        Some(Err(error)) => add(problems, path, error.to_string()),
        Some(Ok(amount)) if amount.is_negative() || amount.is_zero() => add(problems, path, "must be more than nothing"),
        Some(Ok(_)) => {}
    }
}

/// A PersistentVolume: its source is one that berth mounts.
pub(super) fn validate_volume(volume: &PersistentVolume, problems: &mut Invalid) {
    let Some(spec) = &volume.spec else { return add(problems, "spec", "is required") };
    validate_modes(spec.access_modes.as_deref(), problems);
    validate_volume_mode(spec.volume_mode.as_deref(), problems);
    let storage = spec.capacity.as_ref().and_then(|c| c.get("storage")).map(|q| q.0.as_str());
    validate_amount("spec.capacity.storage", storage, problems);
    let supported = ["hostPath", "local", "nfs", "csi"];
    let sources = [spec.host_path.is_some(), spec.local.is_some(), spec.nfs.is_some(), spec.csi.is_some()];
    let value = serde_json::to_value(spec).unwrap_or_default();
    // What else is an object in the specification and no attribute is a source.
    let attributes = ["capacity", "claimRef", "nodeAffinity"];
    let others =
        value.as_object().into_iter().flatten().filter(|(key, value)| {
            value.is_object() && !attributes.contains(&key.as_str()) && !supported.contains(&key.as_str())
        });
    for (key, _) in others {
        add(problems, format!("spec.{key}"), format!("not supported by berth: only {}", supported.join(", ")));
    }
    match sources.iter().filter(|set| **set).count() {
        1 => {}
        0 => add(problems, "spec", format!("must have one of {}", supported.join(", "))),
        _ => add(problems, "spec", "may not specify more than one volume type"),
    }
    let options = spec.mount_options.as_ref().is_some_and(|options| !options.is_empty());
    if options && (spec.host_path.is_some() || spec.local.is_some()) {
        add(problems, "spec.mountOptions", "may not be specified for this volume type");
    }
    for (field, path) in [
        ("hostPath", spec.host_path.as_ref().map(|source| &source.path)),
        ("local", spec.local.as_ref().map(|source| &source.path)),
    ] {
        if path.is_some_and(|path| !path.starts_with('/') || path.split('/').any(|part| part == "..")) {
            add(problems, format!("spec.{field}.path"), "must be an absolute path without '..'");
        }
    }
    if spec.local.is_some() && spec.node_affinity.as_ref().and_then(|a| a.required.as_ref()).is_none() {
        add(problems, "spec.nodeAffinity", "Local volume requires node affinity");
    }
    if let Some(csi) = &spec.csi {
        for (field, text) in [("driver", &csi.driver), ("volumeHandle", &csi.volume_handle)] {
            if text.is_empty() {
                add(problems, format!("spec.csi.{field}"), "is required");
            }
        }
    }
    if let Some(terms) = spec.node_affinity.as_ref().and_then(|a| a.required.as_ref()) {
        validate_terms(terms, problems);
    }
}

fn validate_terms(selector: &NodeSelector, problems: &mut Invalid) {
    let known = ["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"];
    for (i, term) in selector.node_selector_terms.iter().enumerate() {
        let path = format!("spec.nodeAffinity.required.nodeSelectorTerms[{i}]");
        for (list, items) in [("matchExpressions", &term.match_expressions), ("matchFields", &term.match_fields)] {
            for (j, item) in items.iter().flatten().enumerate() {
                if !known.contains(&item.operator.as_str()) {
                    let message = format!("{:?} is not one of {}", item.operator, known.join(", "));
                    add(problems, format!("{path}.{list}[{j}].operator"), message);
                }
            }
        }
    }
}

/// A PersistentVolumeClaim.
pub(super) fn validate_claim(claim: &PersistentVolumeClaim, problems: &mut Invalid) {
    let Some(spec) = &claim.spec else { return add(problems, "spec", "is required") };
    validate_modes(spec.access_modes.as_deref(), problems);
    validate_volume_mode(spec.volume_mode.as_deref(), problems);
    let requests = spec.resources.as_ref().and_then(|r| r.requests.as_ref());
    validate_amount("spec.resources.requests.storage", requests.and_then(|r| r.get("storage")).map(|q| q.0.as_str()), problems);
    if spec.data_source.is_some() || spec.data_source_ref.is_some() {
        add(problems, "spec.dataSource", "volumes are filled by a control plane: not supported by berth");
    }
    if spec.volume_attributes_class_name.as_deref().is_some_and(|name| !name.is_empty()) {
        add(problems, "spec.volumeAttributesClassName", "is a control plane's to carry out: not supported by berth");
    }
    let known = ["In", "NotIn", "Exists", "DoesNotExist"];
    for (i, item) in spec.selector.iter().flat_map(|s| s.match_expressions.iter().flatten()).enumerate() {
        if !known.contains(&item.operator.as_str()) {
            let message = format!("{:?} is not one of {}", item.operator, known.join(", "));
            add(problems, format!("spec.selector.matchExpressions[{i}].operator"), message);
        }
    }
}

/// What of a StorageClass means nothing here.
pub(super) fn class_warning(class: &StorageClass) -> Option<String> {
    (class.provisioner != "kubernetes.io/no-provisioner").then(|| {
        format!(
            "provisioner {}: nothing is provisioned without a control plane, claims bind to PersistentVolumes of files",
            class.provisioner
        )
    })
}

/// A CSIDriver, as far as a node has to do with it.
pub(super) fn validate_driver(driver: &CSIDriver, problems: &mut Invalid) {
    if driver.spec.attach_required != Some(false) {
        add(problems, "spec.attachRequired", "must be false: nothing attaches volumes without a control plane");
    }
    if driver.spec.token_requests.as_ref().is_some_and(|requests| !requests.is_empty()) {
        add(problems, "spec.tokenRequests", "service account tokens come from an API server: not supported by berth yet");
    }
    let policies = ["ReadWriteOnceWithFSType", "File", "None"];
    if driver.spec.fs_group_policy.as_deref().is_some_and(|policy| !policies.contains(&policy)) {
        add(problems, "spec.fsGroupPolicy", format!("is not one of {}", policies.join(", ")));
    }
    if driver.spec.se_linux_mount == Some(true) {
        add(problems, "spec.seLinuxMount", "the gate SELinuxMount is off in Kubernetes 1.36: not supported by berth");
    }
}
