//! Text of a manifest file to v1 Pods as written (no defaults yet). Names every problem with its line; a document that
//! berth cannot carry out in full is refused, never trimmed.

use k8s_openapi::api::core::v1::Pod;
use serde_json::Value;

use super::yaml::{self, Lines};
use super::{fields, object};
use crate::objects::Object;
use crate::typed;

/// Something to tell the author of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Line in the file, from 1; 0 where none applies.
    pub line: usize,
    /// What is wrong.
    pub message: String,
}

/// One pod of a file, as written.
#[derive(Clone, Debug)]
pub struct ParsedPod {
    /// The pod.
    pub pod: Pod,
    /// The document it came from, for digests.
    pub document: Value,
    /// Where each element stands.
    pub lines: Lines,
}

/// A file that is usable as a whole.
#[derive(Clone, Debug, Default)]
pub struct ParsedFile {
    /// The pods in order.
    pub pods: Vec<ParsedPod>,
    /// ConfigMaps, Secrets and classes in order.
    pub objects: Vec<Object>,
    /// Unknown fields and the like.
    pub warnings: Vec<Problem>,
    /// Documents for a control plane.
    others: Vec<Problem>,
}

/// Parses a file. One bad document spoils the file: half of a file is never acted on.
pub fn parse_manifest(text: &str) -> Result<ParsedFile, Vec<Problem>> {
    let documents = yaml::parse_documents(text).map_err(|e| vec![Problem { line: e.line, message: e.message }])?;
    let mut file = ParsedFile::default();
    let mut errors = Vec::new();
    if documents.is_empty() {
        errors.push(Problem { line: 0, message: "holds no document; remove the file to stop its pods".to_owned() });
    }
    for document in documents {
        parse_object(document.value, document.lines, &mut file, &mut errors);
    }
    // Beside what runs here they are left out by name; a file of nothing else is a mistake.
    if file.pods.is_empty() && file.objects.is_empty() {
        errors.append(&mut file.others);
    }
    file.warnings.append(&mut file.others);
    if errors.is_empty() { Ok(file) } else { Err(errors) }
}

/// What to do about a value that is no text: `n`, `on` and `off` are booleans of YAML 1.1.
pub(super) const QUOTE: &str = " (quote the value: without quotes y, n, yes, no, on and off are booleans of YAML 1.1)";

/// What a manifest may hold.
const ONLY: &str = "only Pod, ConfigMap, Secret, ServiceAccount, PersistentVolume, PersistentVolumeClaim, StorageClass, CSIDriver, \
                    RuntimeClass, PriorityClass and List";

/// Kinds of the core group that a control plane carries out.
const CORE: [&str; 10] = [
    "Endpoints",
    "Event",
    "LimitRange",
    "Namespace",
    "Node",
    "PodTemplate",
    "ReplicationController",
    "ResourceQuota",
    "Service",
    "ComponentStatus",
];

/// Whether a document is a control plane's: a kind of it, or of an API group that no pod has to do with. A kind that berth reads, in
/// another group, and another kind of a group that it reads are mistakes: what they were meant to be would end unnoticed.
fn is_control_planes(api_version: &str, kind: &str) -> bool {
    let read = ["Pod", "PodList", "List"].contains(&kind) || object::KINDS.iter().any(|(_, read)| *read == kind);
    let foreign = |(group, version): (&str, &str)| {
        !version.is_empty() && !object::KINDS.iter().any(|(read, _)| read.split_once('/').is_some_and(|(read, _)| read == group))
    };
    !read && (api_version == "v1" && CORE.contains(&kind) || api_version.split_once('/').is_some_and(foreign))
}

fn parse_object(value: Value, lines: Lines, file: &mut ParsedFile, errors: &mut Vec<Problem>) {
    let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (api_version, kind) = (text("apiVersion"), text("kind"));
    let refuse = |path: &str, message: String| Problem { line: lines.of(path), message };
    match (api_version.as_str(), kind.as_str()) {
        ("v1", "Pod") => decode_pod(value, lines, file, errors),
        ("v1", "List" | "PodList") => parse_list(value, &kind, &lines, file, errors),
        (version, kind) if object::is_object(version, kind) => match object::decode(kind, value, &lines, &mut file.warnings) {
            Ok(object) => file.objects.push(object),
            Err(problems) => errors.extend(problems),
        },
        ("", "") => errors.push(refuse("", "apiVersion and kind are missing: expected v1 Pod".to_owned())),
        (_, "") => errors.push(refuse("apiVersion", "kind is missing".to_owned())),
        ("", _) => errors.push(refuse("kind", "apiVersion is missing".to_owned())),
        (version, kind) if is_control_planes(version, kind) => {
            let name = value.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
            let what = format!("{version} {kind} {name}");
            let message = format!("{} has no effect: it does not run on a node, {ONLY}", what.trim_end());
            file.others.push(refuse("kind", message));
        }
        _ => errors.push(refuse("kind", format!("{api_version} {kind} does not run on a node: {ONLY}"))),
    }
}

fn parse_list(value: Value, kind: &str, lines: &Lines, file: &mut ParsedFile, errors: &mut Vec<Problem>) {
    let items = match value {
        Value::Object(mut map) => map.remove("items").unwrap_or(Value::Null),
        _ => Value::Null,
    };
    let Value::Array(items) = items else {
        errors.push(Problem { line: lines.of("items"), message: format!("{kind} needs a list of items") });
        return;
    };
    for (i, mut item) in items.into_iter().enumerate() {
        if let (Value::Object(map), "PodList") = (&mut item, kind) {
            map.entry("apiVersion").or_insert_with(|| "v1".into());
            map.entry("kind").or_insert_with(|| "Pod".into());
        }
        parse_object(item, lines.below(&format!("items[{i}]")), file, errors);
    }
}

fn decode_pod(mut value: Value, lines: Lines, file: &mut ParsedFile, errors: &mut Vec<Problem>) {
    if let Value::Object(map) = &mut value {
        let status = map.shift_remove("status");
        if status.is_some_and(|s| s.as_object().is_none_or(|o| !o.is_empty())) {
            file.warnings.push(Problem { line: lines.of("status"), message: "status is not read".to_owned() });
        }
    }
    let document = value.clone();
    quantities_as_text(&mut value);
    let pod: Pod = match typed::read(&value) {
        Ok(pod) => pod,
        Err(e) => {
            let path = e.path().to_string();
            let mut message = format!("{path}: {}", e.inner());
            if message.contains("invalid type: boolean") || message.contains("invalid type: integer") {
                message.push_str(QUOTE);
            }
            errors.push(Problem { line: lines.of(&path), message });
            return;
        }
    };
    let known = serde_json::to_value(&pod).unwrap_or(Value::Null);
    let before = errors.len();
    check_fields(&value, &known, String::new(), &lines, &mut file.warnings, errors);
    if errors.len() == before {
        file.pods.push(ParsedPod { pod, document, lines });
    }
}

/// Walks what was written beside what the API knows of it.
fn check_fields(
    written: &Value,
    known: &Value,
    path: String,
    lines: &Lines,
    warnings: &mut Vec<Problem>,
    errors: &mut Vec<Problem>,
) {
    if let Some(why) = fields::meaningless(&path) {
        if !fields::says_nothing(&path, written) {
            let message = format!("{path}: has no effect without a control plane: {why}");
            warnings.push(Problem { line: lines.of(&path), message });
        }
        return;
    }
    if !path.is_empty() && !fields::is_supported(&path) {
        let message = format!("{path}: {}", why_not(&path));
        errors.push(Problem { line: lines.of(&path), message });
        return;
    }
    match (written, known) {
        (Value::Object(written), Value::Object(known)) => {
            for (key, value) in written {
                let below = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                match known.get(key) {
                    _ if is_nothing(value) => {}
                    Some(known) => check_fields(value, known, below, lines, warnings, errors),
                    None => warnings
                        .push(Problem { line: lines.of(&below), message: format!("unknown field {below}: it has no effect") }),
                }
            }
        }
        (Value::Array(written), Value::Array(known)) => {
            for (i, (written, known)) in written.iter().zip(known).enumerate() {
                check_fields(written, known, format!("{path}[{i}]"), lines, warnings, errors);
            }
        }
        _ => {}
    }
}

fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

/// Why a field that the API knows is refused: the upstream's words where it refuses too.
fn why_not(path: &str) -> String {
    let references = [("spec.resourceClaims", "resourceclaims")];
    if path.ends_with(".serviceAccountToken") {
        return "static pods may not reference serviceaccounts (via projected volumes)".to_owned();
    }
    for (field, what) in references {
        if path == field {
            return format!("static pods may not reference {what}");
        }
    }
    if path.ends_with(".clusterTrustBundle") || path.ends_with(".podCertificate") {
        return "its gate is off in Kubernetes 1.36: not supported by berth".to_owned();
    }
    if path.starts_with("spec.volumes[") && path.ends_with(".ephemeral") {
        return "generic ephemeral volumes need a provisioner, which is a control plane's: not supported by berth".to_owned();
    }
    if path == "spec.ephemeralContainers" {
        return "ephemeral containers are not allowed in static pods".to_owned();
    }
    "not supported by berth yet".to_owned()
}

/// The API accepts plain numbers where it wants quantities (`cpu: 2`); the types here want text.
fn quantities_as_text(pod: &mut Value) {
    let Some(spec) = pod.get_mut("spec") else { return };
    numbers_as_text(spec.get_mut("overhead"));
    resource_lists(spec.get_mut("resources"));
    for key in ["containers", "initContainers"] {
        for container in spec.get_mut(key).and_then(Value::as_array_mut).into_iter().flatten() {
            resource_lists(container.get_mut("resources"));
            for env in container.get_mut("env").and_then(Value::as_array_mut).into_iter().flatten() {
                if let Some(divisor) = env.pointer_mut("/valueFrom/resourceFieldRef/divisor") {
                    number_as_text(divisor);
                }
            }
        }
    }
    for volume in spec.get_mut("volumes").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(limit) = volume.pointer_mut("/emptyDir/sizeLimit") {
            number_as_text(limit);
        }
        let divisors = |source: &mut Value| {
            for item in source.pointer_mut("/downwardAPI/items").and_then(Value::as_array_mut).into_iter().flatten() {
                if let Some(divisor) = item.pointer_mut("/resourceFieldRef/divisor") {
                    number_as_text(divisor);
                }
            }
        };
        divisors(volume);
        volume.pointer_mut("/projected/sources").and_then(Value::as_array_mut).into_iter().flatten().for_each(divisors);
    }
}

fn resource_lists(resources: Option<&mut Value>) {
    if let Some(resources) = resources {
        numbers_as_text(resources.get_mut("limits"));
        numbers_as_text(resources.get_mut("requests"));
    }
}

fn numbers_as_text(map: Option<&mut Value>) {
    for value in map.and_then(Value::as_object_mut).into_iter().flat_map(|m| m.values_mut()) {
        number_as_text(value);
    }
}

fn number_as_text(value: &mut Value) {
    if let Value::Number(number) = value {
        *value = Value::String(number.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata:\n  name: web\nspec:\n  containers:\n  - name: c\n    image: i\n";

    fn errors(text: &str) -> Vec<(usize, String)> {
        parse_manifest(text).unwrap_err().into_iter().map(|p| (p.line, p.message)).collect()
    }

    #[test]
    fn pods_lists_and_several_documents_are_read() {
        let list = "apiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Pod\n  metadata: {name: a}\n  spec: {containers: [{name: c, image: i}]}\n";
        let pod_list =
            list.replace("kind: List", "kind: PodList").replace("- apiVersion: v1\n  kind: Pod\n  metadata", "- metadata");
        for (text, names) in [
            (POD.to_owned(), vec!["web"]),
            (format!("{POD}---\n{}", POD.replace("web", "two")), vec!["web", "two"]),
            (list.to_owned(), vec!["a"]),
            (pod_list, vec!["a"]),
        ] {
            let file = parse_manifest(&text).unwrap();
            let found: Vec<_> = file.pods.iter().map(|p| p.pod.metadata.name.clone().unwrap()).collect();
            assert_eq!(found, names);
            assert!(file.warnings.is_empty());
        }
    }

    #[test]
    fn unknown_fields_are_warned_about_by_line_and_unsupported_ones_refused() {
        let file = parse_manifest(&format!("{POD}    imagePullPolcy: Always\n  hostNetwrk: true\n")).unwrap();
        assert_eq!(
            file.warnings,
            [
                Problem { line: 9, message: "unknown field spec.containers[0].imagePullPolcy: it has no effect".into() },
                Problem { line: 10, message: "unknown field spec.hostNetwrk: it has no effect".into() },
            ]
        );
        let text = format!(
            "{POD}    volumeDevices:\n    - {{name: x, devicePath: /x}}\n  resourceClaims: [{{name: x}}]\n  imagePullSecrets: []\n"
        );
        assert_eq!(
            errors(&text),
            [
                (9, "spec.containers[0].volumeDevices: not supported by berth yet".to_owned()),
                (11, "spec.resourceClaims: static pods may not reference resourceclaims".to_owned()),
            ]
        );
    }

    #[test]
    fn what_is_a_control_planes_is_left_out_by_name_beside_what_runs_here() {
        let text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: web}}\n---\n{POD}---\napiVersion: apps/v1\nkind: Deployment\n"
        );
        let file = parse_manifest(&text).unwrap();
        assert_eq!(file.pods.len(), 1);
        let warned: Vec<_> = file.warnings.iter().map(|w| (w.line, w.message.as_str())).collect();
        assert!(
            warned[0].0 == 2 && warned[0].1.starts_with("v1 Service web has no effect: it does not run on a node"),
            "{warned:?}"
        );
        assert!(warned[1].0 == 15 && warned[1].1.starts_with("apps/v1 Deployment has no effect"), "{warned:?}");
        // What may be a mistake for something that runs spoils the file.
        for (version, kind) in [
            ("v1", "Pdo"),
            ("v2", "Pod"),
            ("apps/v1", "Pod"),
            ("apps/v1", "Secret"),
            ("storage.k8s.io/v1", "StorageClas"),
            ("/", "X"),
        ] {
            let error = errors(&format!("{POD}---\napiVersion: {version}\nkind: {kind}\n"));
            assert!(error[0].1.starts_with(&format!("{version} {kind} does not run on a node")), "{error:?}");
        }
    }

    #[test]
    fn what_pods_from_a_cluster_carry_along_is_warned_of() {
        let from_cluster = POD.replace(
            "  name: web\n",
            "  name: web\n  resourceVersion: '12'\n  ownerReferences:\n  - {apiVersion: apps/v1, kind: ReplicaSet, name: web, uid: u}\n\
            \x20 generateName: web-\n  finalizers: [x/y]\n",
        );
        let file = parse_manifest(&from_cluster).unwrap();
        let fields: Vec<_> = file.warnings.iter().map(|w| w.message.split(':').next().unwrap_or_default()).collect();
        assert_eq!(
            fields,
            ["metadata.resourceVersion", "metadata.ownerReferences", "metadata.generateName", "metadata.finalizers"]
        );
    }

    #[test]
    fn other_kinds_are_named_not_skipped() {
        let only = errors("apiVersion: apps/v1\nkind: Deployment\n");
        assert!(only.len() == 1 && only[0].0 == 2, "{only:?}");
        assert!(
            only[0].1.starts_with("apps/v1 Deployment has no effect: it does not run on a node, only Pod, ConfigMap"),
            "{only:?}"
        );
        assert_eq!(errors(&format!("{POD}---\nkind: Pod\n"))[0].1, "apiVersion is missing");
        assert_eq!(errors("")[0].1, "holds no document; remove the file to stop its pods");
        assert_eq!(errors("just text\n")[0].1, "apiVersion and kind are missing: expected v1 Pod");
    }

    #[test]
    fn booleans_are_yaml_1_1_and_a_boolean_for_text_is_an_error_with_its_path() {
        let file = parse_manifest(&format!("{POD}    stdin: on\n    env:\n    - name: A\n      value: \"on\"\n")).unwrap();
        let container = &file.pods[0].pod.spec.as_ref().unwrap().containers[0];
        assert_eq!(container.stdin, Some(true));
        assert_eq!(container.env.as_ref().unwrap()[0].value.as_deref(), Some("on"));
        let errors = errors(&format!("{POD}    env:\n    - name: A\n      value: on\n"));
        assert_eq!(errors[0].0, 11);
        assert!(errors[0].1.starts_with("spec.containers[0].env[0].value: invalid type: boolean `true`, expected a string"));
        assert!(errors[0].1.ends_with(QUOTE));
    }

    #[test]
    fn numbers_are_accepted_as_quantities() {
        let text = format!(
            "{POD}    resources:\n      limits:\n        cpu: 2\n        memory: 134217728\n  volumes:\n  - name: v\n    emptyDir:\n      sizeLimit: 1.5\n"
        );
        let file = parse_manifest(&text).unwrap();
        let spec = file.pods[0].pod.spec.as_ref().unwrap();
        assert_eq!(spec.containers[0].resources.as_ref().unwrap().limits.as_ref().unwrap()["cpu"].0, "2");
        assert_eq!(spec.volumes.as_ref().unwrap()[0].empty_dir.as_ref().unwrap().size_limit.as_ref().unwrap().0, "1.5");
    }

    #[test]
    fn half_a_file_is_an_error() {
        for end in [20, 40, 70] {
            assert!(parse_manifest(&POD[..end]).is_err(), "{:?}", &POD[..end]);
        }
    }
}
