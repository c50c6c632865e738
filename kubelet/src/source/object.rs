//! Documents that are not pods: ConfigMaps, Secrets, classes, service accounts and what [`super::storage`] knows. Decoding and
//! the API's rules for them; who refers to them is not known here.

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::parse::{Problem, QUOTE};
use super::storage;
use super::validate::{is_dns_label, is_dns_subdomain};
use super::yaml::Lines;
use crate::objects::Object;
use crate::quantity::Amount;
use crate::typed;

/// Most that one object may hold: the API server's limit.
const MAX_BYTES: usize = 1024 * 1024;

/// The kinds of objects that are kept for pods, with their versions.
pub(super) const KINDS: [(&str, &str); 9] = [
    ("v1", "ConfigMap"),
    ("v1", "Secret"),
    ("v1", "ServiceAccount"),
    ("v1", "PersistentVolume"),
    ("v1", "PersistentVolumeClaim"),
    ("node.k8s.io/v1", "RuntimeClass"),
    ("scheduling.k8s.io/v1", "PriorityClass"),
    ("storage.k8s.io/v1", "StorageClass"),
    ("storage.k8s.io/v1", "CSIDriver"),
];

/// Whether a document of this kind is an object that is kept for pods.
pub(super) fn is_object(api_version: &str, kind: &str) -> bool {
    KINDS.contains(&(api_version, kind))
}

/// An object of a document, or what is wrong with it.
pub(super) fn decode(kind: &str, mut value: Value, lines: &Lines, warnings: &mut Vec<Problem>) -> Result<Object, Vec<Problem>> {
    if let Value::Object(map) = &mut value
        && matches!(kind, "PersistentVolume" | "PersistentVolumeClaim")
    {
        // Documents that come from a cluster have one.
        map.shift_remove("status");
    }
    if matches!(kind, "PersistentVolume" | "PersistentVolumeClaim" | "RuntimeClass") {
        storage::quantities_as_text(&mut value);
    }
    let object = match kind {
        "ConfigMap" => Object::ConfigMap(typed(&value, lines, warnings)?),
        "Secret" => Object::Secret(secret(typed(&value, lines, warnings)?)),
        "RuntimeClass" => Object::RuntimeClass(typed(&value, lines, warnings)?),
        "ServiceAccount" => Object::ServiceAccount(typed(&value, lines, warnings)?),
        "PersistentVolume" => Object::PersistentVolume(Box::new(typed(&value, lines, warnings)?)),
        "PersistentVolumeClaim" => Object::PersistentVolumeClaim(Box::new(typed(&value, lines, warnings)?)),
        "StorageClass" => Object::StorageClass(typed(&value, lines, warnings)?),
        "CSIDriver" => Object::CsiDriver(typed(&value, lines, warnings)?),
        _ => Object::PriorityClass(typed(&value, lines, warnings)?),
    };
    if let Object::StorageClass(class) = &object
        && let Some(message) = storage::class_warning(class)
    {
        warnings.push(Problem { line: lines.of("provisioner"), message });
    }
    let problems: Vec<Problem> = validate(&object)
        .into_iter()
        .map(|(path, message)| Problem { line: lines.of(&path), message: format!("{path}: {message}") })
        .collect();
    if value.get("immutable") == Some(&Value::Bool(true)) {
        let message = "immutable is not enforced on files: an edit counts".to_owned();
        warnings.push(Problem { line: lines.of("immutable"), message });
    }
    if problems.is_empty() { Ok(object) } else { Err(problems) }
}

fn typed<T: DeserializeOwned + Serialize>(value: &Value, lines: &Lines, warnings: &mut Vec<Problem>) -> Result<T, Vec<Problem>> {
    let object: T = typed::read(value).map_err(|e| {
        let path = e.path().to_string();
        let cause = e.inner().to_string();
        let is_data = path.starts_with("data") || path.starts_with("stringData") || path.starts_with("binaryData");
        let is_text = value.pointer(&format!("/{}", path.replacen('.', "/", 1))).is_some_and(Value::is_string);
        let message = match (is_data, is_text) {
            (true, true) if path.starts_with("data") => {
                format!("{path}: is not base64: plain text goes into stringData ({cause})")
            }
            (true, true) => format!("{path}: is not base64 ({cause})"),
            (true, false) => format!("{path}: {cause}{QUOTE}"),
            _ => format!("{path}: {cause}"),
        };
        vec![Problem { line: lines.of(&path), message }]
    })?;
    let known = serde_json::to_value(&object).unwrap_or(Value::Null);
    unknown_fields(value, &known, String::new(), lines, warnings);
    Ok(object)
}

fn unknown_fields(written: &Value, known: &Value, path: String, lines: &Lines, warnings: &mut Vec<Problem>) {
    let (Value::Object(written), Value::Object(known)) = (written, known) else { return };
    for (key, value) in written {
        let below = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match known.get(key) {
            _ if value.is_null() || value.as_array().is_some_and(Vec::is_empty) => {}
            Some(known) => unknown_fields(value, known, below, lines, warnings),
            None => {
                warnings.push(Problem { line: lines.of(&below), message: format!("unknown field {below}: it has no effect") })
            }
        }
    }
}

/// `stringData` is written into data, over what was there, as the API server does.
fn secret(mut secret: Secret) -> Secret {
    for (key, text) in secret.string_data.take().unwrap_or_default() {
        secret.data.get_or_insert_default().insert(key, ByteString(text.into_bytes()));
    }
    secret.type_.get_or_insert_with(|| "Opaque".to_owned());
    secret
}

/// Fields and what is wrong with them.
pub(super) type Invalid = Vec<(String, String)>;

fn validate(object: &Object) -> Invalid {
    let mut problems = Invalid::new();
    match object {
        Object::ConfigMap(map) => {
            validate_metadata(&map.metadata, &mut problems);
            validate_config_map(map, &mut problems);
        }
        Object::Secret(secret) => {
            validate_metadata(&secret.metadata, &mut problems);
            validate_secret(secret, &mut problems);
        }
        Object::RuntimeClass(class) => {
            validate_metadata(&class.metadata, &mut problems);
            if !is_dns_label(&class.handler) {
                problems.push(("handler".to_owned(), format!("{:?} is not a DNS label", class.handler)));
            }
            for (name, amount) in class.overhead.iter().flat_map(|overhead| overhead.pod_fixed.iter().flatten()) {
                let field = format!("overhead.podFixed.{name}");
                match Amount::parse(&amount.0) {
                    Ok(amount) if amount.is_negative() => problems.push((field, "must not be negative".to_owned())),
                    Ok(_) => {}
                    Err(error) => problems.push((field, error.to_string())),
                }
            }
            if class.scheduling.is_some() {
                problems.push(("scheduling".to_owned(), "means nothing without a scheduler: not supported".to_owned()));
            }
        }
        Object::PriorityClass(class) => validate_metadata(&class.metadata, &mut problems),
        Object::ServiceAccount(account) => validate_metadata(&account.metadata, &mut problems),
        Object::PersistentVolume(volume) => {
            validate_metadata(&volume.metadata, &mut problems);
            storage::validate_volume(volume, &mut problems);
        }
        Object::PersistentVolumeClaim(claim) => {
            validate_metadata(&claim.metadata, &mut problems);
            storage::validate_claim(claim, &mut problems);
        }
        Object::StorageClass(class) => validate_metadata(&class.metadata, &mut problems),
        Object::CsiDriver(driver) => {
            validate_metadata(&driver.metadata, &mut problems);
            storage::validate_driver(driver, &mut problems);
        }
    }
    problems
}

fn validate_metadata(metadata: &ObjectMeta, problems: &mut Invalid) {
    let name = metadata.name.as_deref().unwrap_or_default();
    if !is_dns_subdomain(name) {
        problems.push(("metadata.name".to_owned(), format!("{name:?} is not a DNS subdomain")));
    }
    if metadata.namespace.as_deref().is_some_and(|namespace| !is_dns_label(namespace)) {
        problems.push(("metadata.namespace".to_owned(), "is not a DNS label".to_owned()));
    }
}

/// A name that a key of data may have: it becomes a file name.
fn is_key(key: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !key.is_empty() && key.len() <= 253 && key.chars().all(plain) && key != "." && !key.starts_with("..")
}

fn validate_keys<'a>(field: &str, keys: impl Iterator<Item = &'a String>, problems: &mut Invalid) {
    for key in keys.filter(|key| !is_key(key)) {
        let message = "is not a key: letters, digits, '-', '_' and '.', at most 253".to_owned();
        problems.push((format!("{field}.{key}"), message));
    }
}

fn validate_config_map(map: &ConfigMap, problems: &mut Invalid) {
    let (data, binary) = (map.data.clone().unwrap_or_default(), map.binary_data.clone().unwrap_or_default());
    validate_keys("data", data.keys(), problems);
    validate_keys("binaryData", binary.keys(), problems);
    for key in binary.keys().filter(|key| data.contains_key(*key)) {
        problems.push((format!("binaryData.{key}"), "is in data too".to_owned()));
    }
    let bytes = data.values().map(String::len).chain(binary.values().map(|b| b.0.len())).sum();
    validate_size(bytes, problems);
}

fn validate_secret(secret: &Secret, problems: &mut Invalid) {
    let data = secret.data.clone().unwrap_or_default();
    validate_keys("data", data.keys(), problems);
    validate_size(data.values().map(|b| b.0.len()).sum(), problems);
    let wanted: &[&str] = match secret.type_.as_deref().unwrap_or_default() {
        "kubernetes.io/dockerconfigjson" => &[".dockerconfigjson"],
        "kubernetes.io/dockercfg" => &[".dockercfg"],
        "kubernetes.io/ssh-auth" => &["ssh-privatekey"],
        "kubernetes.io/tls" => &["tls.crt", "tls.key"],
        _ => &[],
    };
    for key in wanted.iter().filter(|key| !data.contains_key(**key)) {
        problems.push((format!("data.{key}"), format!("is required by type {}", secret.type_.clone().unwrap_or_default())));
    }
    for key in [".dockerconfigjson", ".dockercfg"].iter().filter(|key| wanted.contains(key)) {
        if data.get(*key).is_some_and(|bytes| serde_json::from_slice::<Value>(&bytes.0).is_err()) {
            problems.push((format!("data.{key}"), "is not JSON".to_owned()));
        }
    }
}

fn validate_size(bytes: usize, problems: &mut Invalid) {
    if bytes > MAX_BYTES {
        problems.push(("data".to_owned(), format!("holds {bytes} bytes: at most {MAX_BYTES} are allowed")));
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse::parse_manifest;
    use super::*;

    fn problems(text: &str) -> Vec<(usize, String)> {
        parse_manifest(text).unwrap_err().into_iter().map(|p| (p.line, p.message)).collect()
    }

    #[test]
    fn objects_are_read_beside_pods_and_string_data_becomes_data() {
        let text = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: m}\ndata: {a: x}\nbinaryData: {b: AAH/}\n---\n\
            apiVersion: v1\nkind: Secret\nmetadata: {name: s}\ndata: {k: b2xk, other: b2xk}\nstringData: {k: new}\n---\n\
            apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata: {name: r}\nhandler: runc\n";
        let file = parse_manifest(text).unwrap();
        assert!(file.pods.is_empty() && file.warnings.is_empty());
        let [Object::ConfigMap(map), Object::Secret(secret), Object::RuntimeClass(class)] = &file.objects[..] else {
            panic!("{:?}", file.objects)
        };
        assert_eq!(map.binary_data.as_ref().unwrap()["b"].0, [0, 1, 255]);
        let data = secret.data.as_ref().unwrap();
        assert_eq!((data["k"].0.as_slice(), data["other"].0.as_slice()), (&b"new"[..], &b"old"[..]));
        assert_eq!(class.handler, "runc");
    }

    #[test]
    fn wrong_objects_are_refused_by_line() {
        for (text, line, message) in [
            ("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: M}\n", 3, "metadata.name: \"M\" is not a DNS subdomain"),
            (
                "apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata: {name: r}\nhandler: vm\noverhead:\n  podFixed:\n    cpu: -1\n",
                7,
                "overhead.podFixed.cpu: must not be negative",
            ),
            ("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: m}\ndata:\n  a/b: x\n", 5, "data.a/b: is not a key"),
            ("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: m}\ndata:\n  a: on\n", 5, "data.a: invalid type: boolean `true`"),
            (
                "apiVersion: v1\nkind: Secret\nmetadata: {name: m}\ndata:\n  a: '%'\n",
                5,
                "data.a: is not base64: plain text goes into stringData",
            ),
            (
                "apiVersion: v1\nkind: Secret\nmetadata: {name: m}\ndata:\n  a.b: 's3cret!'\n",
                5,
                "data.a.b: is not base64: plain text",
            ),
            (
                "apiVersion: v1\nkind: Secret\nmetadata: {name: m}\nstringData:\n  a: n\n",
                5,
                "stringData.a: invalid type: boolean `false`",
            ),
            (
                "apiVersion: v1\nkind: Secret\nmetadata: {name: m}\ntype: kubernetes.io/tls\nstringData: {tls.crt: x}\n",
                0,
                "data.tls.key: is required by type kubernetes.io/tls",
            ),
        ] {
            let found = problems(text);
            assert!(found[0].1.starts_with(message), "{text}: {found:?}");
            assert!(line == 0 || found[0].0 == line, "{text}: {found:?}");
        }
    }

    #[test]
    fn documents_of_volumes_are_held_to_what_a_node_can_do() {
        let volume = |spec: &str| format!("apiVersion: v1\nkind: PersistentVolume\nmetadata: {{name: v}}\nspec: {spec}\n");
        let claim = |spec: &str| format!("apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {{name: c}}\nspec: {spec}\n");
        let head = "capacity: {storage: 1}, accessModes: [ReadWriteOnce]";
        for (text, field) in [
            (volume("{accessModes: [ReadWriteOnce], hostPath: {path: /x}}"), "spec.capacity.storage"),
            (volume(&format!("{{{head}}}")), "spec"),
            (volume(&format!("{{{head}, hostPath: {{path: ../x}}}}")), "spec.hostPath.path"),
            (volume(&format!("{{{head}, local: {{path: /x}}}}")), "spec.nodeAffinity"),
            (volume(&format!("{{{head}, hostPath: {{path: /x}}, mountOptions: [ro]}}")), "spec.mountOptions"),
            (volume(&format!("{{{head}, rbd: {{image: x, monitors: []}}}}")), "spec.rbd"),
            (volume(&format!("{{{head}, volumeMode: Block, hostPath: {{path: /x}}}}")), "spec.volumeMode"),
            (claim("{accessModes: [ReadWriteOncePod], resources: {requests: {storage: 1Gi}}}"), "spec.accessModes[0]"),
            (claim("{accessModes: [ReadWriteOnce]}"), "spec.resources.requests.storage"),
            ("apiVersion: storage.k8s.io/v1\nkind: CSIDriver\nmetadata: {name: d}\nspec: {}\n".to_owned(), "spec.attachRequired"),
        ] {
            let found = problems(&text);
            assert!(found.iter().any(|(_, message)| message.starts_with(&format!("{field}: "))), "{text}: {found:?}");
        }
        let good = volume(&format!(
            "{{{head}, hostPath: {{path: /x}}, persistentVolumeReclaimPolicy: Retain}}\nstatus: {{phase: Bound}}"
        ));
        assert!(parse_manifest(&good).unwrap().warnings.is_empty());
    }

    #[test]
    fn unknown_fields_of_objects_are_named() {
        let file =
            parse_manifest("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: m}\ndatta: {a: x}\nimmutable: true\n").unwrap();
        let warnings: Vec<_> = file.warnings.iter().map(|w| (w.line, w.message.as_str())).collect();
        assert_eq!(warnings[0], (4, "unknown field datta: it has no effect"));
        assert_eq!(warnings[1].0, 5);
    }
}
