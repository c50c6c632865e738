//! What the files of a configMap, secret, downwardAPI or projected volume hold, by path: looked up, chosen and given modes.
//! Pure but for the look-ups; writes nothing.

use std::collections::BTreeMap;

use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::{
    Container, DownwardAPIVolumeFile, KeyToPath, Pod, ProjectedVolumeSource, ResourceFieldSelector,
    ServiceAccountTokenProjection, Volume, VolumeProjection,
};

use super::{VolumeContext, empty_dir};
use crate::env::{self, EnvContext};
use crate::pod;

/// One file of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileContent {
    /// What it holds.
    pub bytes: Vec<u8>,
    /// Its permission bits.
    pub mode: u32,
    /// Whose it is; `None`: root's.
    pub owner: Option<u32>,
}

/// The files of a volume, by their paths in it.
pub type Payload = BTreeMap<String, FileContent>;

/// Mode of files where nobody says another.
pub const DEFAULT_MODE: i32 = 0o644;

/// The files of a volume; the error is the kubelet's message. `None`: the volume is of another kind.
pub fn collect(context: &VolumeContext<'_>, volume: &Volume) -> Option<Result<Payload, String>> {
    let mut payload = Payload::new();
    let collected = if let Some(source) = &volume.config_map {
        let mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        let choice = Choice { items: source.items.as_deref(), mode, optional: source.optional == Some(true) };
        config_map(context, &source.name, &choice, &mut payload)
    } else if let Some(source) = &volume.secret {
        let mode = source.default_mode.unwrap_or(DEFAULT_MODE);
        let choice = Choice { items: source.items.as_deref(), mode, optional: source.optional == Some(true) };
        secret(context, source.secret_name.as_deref().unwrap_or_default(), &choice, &mut payload)
    } else if let Some(source) = &volume.downward_api {
        downward(context, source.items.as_deref().unwrap_or_default(), source.default_mode.unwrap_or(DEFAULT_MODE), &mut payload)
    } else if let Some(source) = &volume.projected {
        projected(context, source, &mut payload)
    } else {
        return None;
    };
    Some(collected.map(|()| payload))
}

/// Which keys of an object become which files.
struct Choice<'a> {
    items: Option<&'a [KeyToPath]>,
    mode: i32,
    optional: bool,
}

fn bits(mode: i32) -> u32 {
    u32::try_from(mode).unwrap_or(0) & 0o777
}

fn config_map(context: &VolumeContext<'_>, name: &str, choice: &Choice<'_>, payload: &mut Payload) -> Result<(), String> {
    let Some(map) = context.objects.config_map(pod::namespace(context.pod), name)? else {
        return if choice.optional { Ok(()) } else { Err(format!("configmap {name:?} not found")) };
    };
    let text = map.data.iter().flatten().map(|(key, value)| (key.as_str(), value.as_bytes()));
    let binary = map.binary_data.iter().flatten().map(|(key, value)| (key.as_str(), value.0.as_slice()));
    let missing = |key: &str| format!("configmap references non-existent config key: {key}");
    choose(text.chain(binary).collect(), choice, missing, payload)
}

fn secret(context: &VolumeContext<'_>, name: &str, choice: &Choice<'_>, payload: &mut Payload) -> Result<(), String> {
    let Some(secret) = context.objects.secret(pod::namespace(context.pod), name)? else {
        return if choice.optional { Ok(()) } else { Err(format!("secret {name:?} not found")) };
    };
    let bytes = |(key, value): (&'_ String, &'_ ByteString)| (key.clone(), value.0.clone());
    let data: Vec<(String, Vec<u8>)> = secret.data.iter().flatten().map(bytes).collect();
    let missing = |key: &str| format!("references non-existent secret key: {key}");
    choose(data.iter().map(|(key, value)| (key.as_str(), value.as_slice())).collect(), choice, missing, payload)
}

fn choose(
    data: BTreeMap<&str, &[u8]>,
    choice: &Choice<'_>,
    missing: impl Fn(&str) -> String,
    payload: &mut Payload,
) -> Result<(), String> {
    let Some(items) = choice.items.filter(|items| !items.is_empty()) else {
        let file = |bytes: &[u8]| FileContent { bytes: bytes.to_vec(), mode: bits(choice.mode), owner: None };
        payload.extend(data.iter().map(|(key, bytes)| ((*key).to_owned(), file(bytes))));
        return Ok(());
    };
    for item in items {
        let Some(bytes) = data.get(item.key.as_str()) else {
            if choice.optional {
                continue;
            }
            return Err(missing(&item.key));
        };
        let mode = bits(item.mode.unwrap_or(choice.mode));
        payload.insert(item.path.clone(), FileContent { bytes: bytes.to_vec(), mode, owner: None });
    }
    Ok(())
}

fn projected(context: &VolumeContext<'_>, source: &ProjectedVolumeSource, payload: &mut Payload) -> Result<(), String> {
    let mode = source.default_mode.unwrap_or(DEFAULT_MODE);
    for part in source.sources.iter().flatten() {
        let VolumeProjection { config_map: map, secret: hidden, downward_api, service_account_token: account, .. } = part;
        if part.cluster_trust_bundle.is_some() || part.pod_certificate.is_some() {
            return Err("clusterTrustBundle and podCertificate projections are not supported by berth".to_owned());
        }
        if let Some(map) = map {
            let choice = Choice { items: map.items.as_deref(), mode, optional: map.optional == Some(true) };
            config_map(context, &map.name, &choice, payload)?;
        }
        if let Some(hidden) = hidden {
            let choice = Choice { items: hidden.items.as_deref(), mode, optional: hidden.optional == Some(true) };
            secret(context, &hidden.name, &choice, payload)?;
        }
        if let Some(fields) = downward_api {
            downward(context, fields.items.as_deref().unwrap_or_default(), mode, payload)?;
        }
        if let Some(account) = account {
            payload.insert(account.path.clone(), token_file(context, account, mode)?);
        }
    }
    Ok(())
}

/// Seconds that a token lives for where nobody says otherwise: what the API server writes into such projections.
pub(crate) const TOKEN_SECONDS: i64 = 3600;

/// Audience and life of the token of a projection.
pub(crate) fn wanted_token(projection: &ServiceAccountTokenProjection) -> (&str, i64) {
    (projection.audience.as_deref().unwrap_or_default(), projection.expiration_seconds.unwrap_or(TOKEN_SECONDS))
}

/// A token's file: for the pod's only user, or its group, and nobody else; without either for whoever the volume is for.
fn token_file(context: &VolumeContext<'_>, projection: &ServiceAccountTokenProjection, mode: i32) -> Result<FileContent, String> {
    let (audience, seconds) = wanted_token(projection);
    let token = context.objects.token(context.pod, audience, seconds)?;
    let owner = only_user(context.pod);
    let private = owner.is_some() || empty_dir::fs_group(context.pod).is_some();
    let mode = if private { 0o600 } else { bits(mode) };
    Ok(FileContent { bytes: token.text.clone().into_bytes(), mode, owner })
}

/// The user that all containers of the pod say they run as.
fn only_user(pod: &Pod) -> Option<u32> {
    let of_pod = pod::spec(pod).security_context.as_ref().and_then(|s| s.run_as_user);
    let mut users = pod::all_containers(pod).map(|c| c.security_context.as_ref().and_then(|s| s.run_as_user).or(of_pod));
    let first = users.next()??;
    users.all(|user| user == Some(first)).then(|| u32::try_from(first).ok())?
}

fn downward(
    context: &VolumeContext<'_>,
    items: &[DownwardAPIVolumeFile],
    mode: i32,
    payload: &mut Payload,
) -> Result<(), String> {
    for item in items {
        let text = match (&item.field_ref, &item.resource_field_ref) {
            (Some(field), _) => pod_field(context.pod, &field.field_path)?,
            (None, Some(resource)) => resource_field(context, resource)?,
            (None, None) => return Err(format!("{}: neither fieldRef nor resourceFieldRef", item.path)),
        };
        let mode = bits(item.mode.unwrap_or(mode));
        payload.insert(item.path.clone(), FileContent { bytes: text.into_bytes(), mode, owner: None });
    }
    Ok(())
}

/// Whether a volume may show the field.
pub fn is_volume_field(path: &str) -> bool {
    matches!(path, "metadata.name" | "metadata.namespace" | "metadata.uid" | "metadata.labels" | "metadata.annotations")
        || env::keyed(path).is_some()
}

fn pod_field(pod: &Pod, path: &str) -> Result<String, String> {
    let metadata = &pod.metadata;
    Ok(match path {
        "metadata.name" => pod::name(pod).to_owned(),
        "metadata.namespace" => pod::namespace(pod).to_owned(),
        "metadata.uid" => pod::uid(pod).to_owned(),
        "metadata.labels" => lines(metadata.labels.as_ref()),
        "metadata.annotations" => lines(metadata.annotations.as_ref()),
        _ => {
            let (field, key) = env::keyed(path).ok_or_else(|| format!("unsupported fieldPath: {path}"))?;
            let map = if field == "labels" { &metadata.labels } else { &metadata.annotations };
            map.as_ref().and_then(|map| map.get(key)).cloned().unwrap_or_default()
        }
    })
}

/// `key="value"` lines, sorted, with the escapes of a Go string.
fn lines(map: Option<&BTreeMap<String, String>>) -> String {
    let line = |(key, value): (&String, &String)| format!("{key}={}", quoted(value));
    map.into_iter().flatten().map(line).collect::<Vec<_>>().join("\n")
}

fn quoted(text: &str) -> String {
    let mut out = String::from('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{b}' => out.push_str("\\v"),
            '\u{c}' => out.push_str("\\f"),
            c if u32::from(c) < 0x20 || c == '\u{7f}' => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

fn resource_field(context: &VolumeContext<'_>, selector: &ResourceFieldSelector) -> Result<String, String> {
    let name = selector.container_name.as_deref().unwrap_or_default();
    let all = pod::init_containers(context.pod).iter().chain(&pod::spec(context.pod).containers);
    let container: &Container =
        all.into_iter().find(|c| c.name == name).ok_or_else(|| format!("container {name:?} not found"))?;
    let fields = EnvContext {
        pod: context.pod,
        node_name: "",
        host_ips: &[],
        pod_ips: &[],
        capacity: context.capacity,
        objects: context.objects,
        pod_dir: context.dir,
        services: &[],
    };
    env::resource_field(selector, container, &fields)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::node::Capacity;
    use crate::objects::LocalObjects;
    use crate::source::{defaults::apply_defaults, parse::parse_manifest};

    const OBJECTS: &str = "
apiVersion: v1
kind: ConfigMap
metadata: {name: m}
data: {a: one, b: two}
binaryData: {c: AAE=}
---
apiVersion: v1
kind: Secret
metadata: {name: s}
stringData: {password: hunter2}
";

    fn collected(volume: &str) -> Result<Vec<(String, String, u32)>, String> {
        let objects = LocalObjects::default();
        objects.replace(parse_manifest(OBJECTS).unwrap().objects);
        let text = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: web, uid: u1, labels: {{app: shop, tier: 'a\"b'}}, annotations: {{note: 'x'}}}}, \
             spec: {{volumes: [{{name: v, {volume}}}], containers: [{{name: c, image: i, volumeMounts: [{{name: v, mountPath: /v}}], \
             resources: {{limits: {{memory: 64Mi}}}}}}]}}}}"
        );
        let mut pod = parse_manifest(&text).unwrap().pods.remove(0).pod;
        apply_defaults(&mut pod);
        let capacity = Capacity::default();
        let services = crate::volume::Services::default();
        let context =
            VolumeContext { pod: &pod, dir: Path::new("/none"), capacity: &capacity, objects: &objects, services: &services };
        let volume = pod::spec(&pod).volumes.as_ref().unwrap()[0].clone();
        let files = collect(&context, &volume).expect("a volume of files")?;
        Ok(files.into_iter().map(|(path, f)| (path, String::from_utf8_lossy(&f.bytes).into_owned(), f.mode)).collect())
    }

    #[test]
    fn a_token_is_the_only_users_and_what_is_not_there_is_refused() {
        let pod = |of_pod: serde_json::Value, users: [Option<i64>; 2]| -> Pod {
            let container = |user: Option<i64>| serde_json::json!({"name": "c", "securityContext": {"runAsUser": user}});
            let containers = users.map(container);
            let spec = serde_json::json!({"securityContext": {"runAsUser": of_pod}, "initContainers": [containers[0]], "containers": [containers[1]]});
            serde_json::from_value(serde_json::json!({"metadata": {"name": "a", "uid": "u"}, "spec": spec})).unwrap()
        };
        let (none, five) = (serde_json::Value::Null, serde_json::json!(5));
        for (of_pod, users, expected) in [
            (&none, [Some(7), Some(7)], Some(7)),
            (&none, [Some(7), None], None),
            (&none, [Some(7), Some(8)], None),
            (&five, [None, None], Some(5)),
            (&five, [None, Some(6)], None),
            (&none, [None, None], None),
        ] {
            assert_eq!(only_user(&pod(of_pod.clone(), users)), expected, "{of_pod} {users:?}");
        }
        let (objects, capacity, services) = (LocalObjects::default(), Capacity::default(), crate::volume::Services::default());
        let pod = pod(none, [None, None]);
        let context =
            VolumeContext { pod: &pod, dir: Path::new("/none"), capacity: &capacity, objects: &objects, services: &services };
        for (part, expected) in [
            (serde_json::json!({"clusterTrustBundle": {"path": "x"}}), "not supported by berth"),
            (serde_json::json!({"podCertificate": {"keyType": "ED25519", "signerName": "s"}}), "not supported by berth"),
            (serde_json::json!({"serviceAccountToken": {"path": "x"}}), "need an API server"),
        ] {
            let source = serde_json::from_value(serde_json::json!({"sources": [part]})).unwrap();
            let error = projected(&context, &source, &mut Payload::new()).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    fn file(path: &str, text: &str, mode: u32) -> (String, String, u32) {
        (path.to_owned(), text.to_owned(), mode)
    }

    #[test]
    fn keys_become_files_with_the_modes_asked_for() {
        assert_eq!(
            collected("configMap: {name: m}").unwrap(),
            [file("a", "one", 0o644), file("b", "two", 0o644), file("c", "\0\u{1}", 0o644)]
        );
        let items = "configMap: {name: m, defaultMode: 0400, items: [{key: a, path: x/y}, {key: b, path: z, mode: 0444}]}";
        assert_eq!(collected(items).unwrap(), [file("x/y", "one", 0o400), file("z", "two", 0o444)]);
        assert_eq!(collected("secret: {secretName: s, defaultMode: 256}").unwrap(), [file("password", "hunter2", 0o400)]);
    }

    #[test]
    fn what_is_missing_is_an_error_unless_it_is_optional() {
        for (volume, expected) in [
            ("configMap: {name: none}", Err("configmap \"none\" not found")),
            ("secret: {secretName: none}", Err("secret \"none\" not found")),
            ("configMap: {name: none, optional: true}", Ok(0)),
            ("secret: {secretName: none, optional: true}", Ok(0)),
            ("configMap: {name: m, items: [{key: none, path: x}]}", Err("configmap references non-existent config key: none")),
            ("secret: {secretName: s, items: [{key: none, path: x}]}", Err("references non-existent secret key: none")),
            ("configMap: {name: m, optional: true, items: [{key: none, path: x}, {key: a, path: a}]}", Ok(1)),
        ] {
            assert_eq!(
                collected(volume).map(|f| f.len()).as_ref().map_err(String::as_str),
                expected.as_ref().map_err(|e| *e),
                "{volume}"
            );
        }
    }

    #[test]
    fn the_downward_api_tells_fields_and_limits() {
        let volume = "downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}, \
            {path: app, fieldRef: {fieldPath: \"metadata.labels['app']\"}}, {path: name, mode: 0400, fieldRef: {fieldPath: metadata.name}}, \
            {path: mem, resourceFieldRef: {containerName: c, resource: limits.memory, divisor: 1Mi}}]}";
        assert_eq!(
            collected(volume).unwrap(),
            [
                file("app", "shop", 0o644),
                file("labels", "app=\"shop\"\ntier=\"a\\\"b\"", 0o644),
                file("mem", "64", 0o644),
                file("name", "web", 0o400)
            ]
        );
    }

    #[test]
    fn projections_are_joined_and_later_ones_win() {
        let volume = "projected: {defaultMode: 0440, sources: [{configMap: {name: m, items: [{key: a, path: a}, {key: b, path: both}]}}, \
            {secret: {name: s, items: [{key: password, path: both}]}}, \
            {downwardAPI: {items: [{path: ns, fieldRef: {fieldPath: metadata.namespace}}]}}, {configMap: {name: none, optional: true}}]}";
        assert_eq!(
            collected(volume).unwrap(),
            [file("a", "one", 0o440), file("both", "hunter2", 0o440), file("ns", "default", 0o440)]
        );
    }
}
