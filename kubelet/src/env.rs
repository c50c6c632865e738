//! Environment of a container: literal values with `$(NAME)` expansion, pod fields, resource numbers and keys of ConfigMaps
//! and Secrets. Pure but for looking those up. Values are bytes: a Secret may hold anything.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use k8s_openapi::api::core::v1::{Container, EnvFromSource, EnvVarSource, Pod, ResourceFieldSelector};

use crate::node::Capacity;
use crate::objects::Objects;
use crate::quantity::Amount;
use crate::volume::empty_dir;
use crate::{env_file, pod};

/// What environment values may refer to.
#[derive(Clone, Copy, Debug)]
pub struct EnvContext<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// The node's name.
    pub node_name: &'a str,
    /// The node's addresses, primary first.
    pub host_ips: &'a [String],
    /// The pod's addresses, primary first.
    pub pod_ips: &'a [String],
    /// What a missing limit stands for.
    pub capacity: &'a Capacity,
    /// ConfigMaps and Secrets.
    pub objects: &'a dyn Objects,
    /// The pod's folder: files of its volumes may hold values.
    pub pod_dir: &'a Path,
    /// The variables of the services that the pod can see.
    pub services: &'a [Variable],
}

/// A variable's name and value.
pub type Variable = (String, Vec<u8>);

const FIELDS: &[&str] = &[
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "spec.serviceAccountName",
    "status.hostIP",
    "status.hostIPs",
    "status.podIP",
    "status.podIPs",
];

/// Whether an environment variable may take the field.
pub fn is_env_field(path: &str) -> bool {
    FIELDS.contains(&path) || keyed(path).is_some()
}

/// `metadata.labels['k']` → (`labels`, `k`).
pub(crate) fn keyed(path: &str) -> Option<(&str, &str)> {
    let (field, rest) = path.strip_prefix("metadata.")?.split_once("['")?;
    let key = rest.strip_suffix("']")?;
    (matches!(field, "labels" | "annotations") && !key.is_empty()).then_some((field, key))
}

/// The variables of a container in order, a later one replacing an earlier one of its name.
pub fn container_env(container: &Container, context: &EnvContext<'_>) -> Result<Vec<Variable>, String> {
    let mut variables: Vec<Variable> = Vec::new();
    let set = |variables: &mut Vec<Variable>, name: &str, value: Vec<u8>| match variables.iter_mut().find(|(n, _)| n == name) {
        Some(existing) => existing.1 = value,
        None => variables.push((name.to_owned(), value)),
    };
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        for (key, value) in env_from(source, context)? {
            let name = format!("{prefix}{key}");
            if is_variable_name(&name) {
                set(&mut variables, &name, value);
            }
        }
    }
    for env in container.env.iter().flatten() {
        let value = match &env.value_from {
            None => {
                // What the spec says counts more than a service's variable of that name.
                let both = context.services.iter().chain(&variables);
                let so_far = both.map(|(n, v)| (n.as_str(), v.as_slice())).collect();
                Some(expand_bytes(env.value.as_deref().unwrap_or_default(), &so_far))
            }
            Some(source) => resolve_source(source, container, context)?,
        };
        if let Some(value) = value {
            set(&mut variables, &env.name, value);
        }
    }
    let own: BTreeSet<String> = variables.iter().map(|(name, _)| name.clone()).collect();
    variables.extend(context.services.iter().filter(|(name, _)| !own.contains(name)).cloned());
    Ok(variables)
}

/// What an event says of keys that cannot be variables and are left out: one text a source.
pub fn skipped_keys(container: &Container, context: &EnvContext<'_>) -> Vec<String> {
    let mut told = Vec::new();
    for source in container.env_from.iter().flatten() {
        let prefix = source.prefix.as_deref().unwrap_or_default();
        let names = env_from(source, context).unwrap_or_default().into_iter().map(|(key, _)| format!("{prefix}{key}"));
        let invalid: Vec<String> = names.filter(|name| !is_variable_name(name)).collect();
        let (kind, object) = match (&source.config_map_ref, &source.secret_ref) {
            (Some(from), _) => ("configMap", from.name.as_str()),
            (None, Some(from)) => ("secret", from.name.as_str()),
            (None, None) => continue,
        };
        if !invalid.is_empty() {
            told.push(format!(
                "Keys [{}] from the EnvFrom {kind} {}/{object} were skipped since they are considered invalid environment variable names.",
                invalid.join(", "),
                pod::namespace(context.pod)
            ));
        }
    }
    told
}

/// Printable ASCII without `=`: what the API accepts as a variable's name.
pub fn is_variable_name(name: &str) -> bool {
    !name.is_empty() && !name.contains('=') && name.chars().all(|c| (' '..='~').contains(&c))
}

/// All keys of a ConfigMap or Secret; none of an optional one that is missing.
fn env_from(source: &EnvFromSource, context: &EnvContext<'_>) -> Result<Vec<Variable>, String> {
    let namespace = pod::namespace(context.pod);
    if let Some(from) = &source.config_map_ref {
        return match context.objects.config_map(namespace, &from.name)? {
            Some(map) => Ok(map.data.iter().flatten().map(|(k, v)| (k.clone(), v.clone().into_bytes())).collect()),
            None if from.optional == Some(true) => Ok(Vec::new()),
            None => Err(format!("configmap {:?} not found", from.name)),
        };
    }
    let Some(from) = &source.secret_ref else { return Ok(Vec::new()) };
    match context.objects.secret(namespace, &from.name)? {
        Some(secret) => Ok(secret.data.iter().flatten().map(|(k, v)| (k.clone(), v.0.clone())).collect()),
        None if from.optional == Some(true) => Ok(Vec::new()),
        None => Err(format!("secret {:?} not found", from.name)),
    }
}

/// The value of a source; `None` where it is optional and missing: then there is no such variable.
fn resolve_source(source: &EnvVarSource, container: &Container, context: &EnvContext<'_>) -> Result<Option<Vec<u8>>, String> {
    if let Some(field) = &source.field_ref {
        return pod_field(&field.field_path, context).map(|text| Some(text.into_bytes()));
    }
    if let Some(resource) = &source.resource_field_ref {
        return resource_field(resource, container, context).map(|text| Some(text.into_bytes()));
    }
    let namespace = pod::namespace(context.pod);
    if let Some(from) = &source.config_map_key_ref {
        let optional = from.optional == Some(true);
        let Some(map) = context.objects.config_map(namespace, &from.name)? else {
            return if optional { Ok(None) } else { Err(format!("configmap {:?} not found", from.name)) };
        };
        return match map.data.as_ref().and_then(|data| data.get(&from.key)) {
            Some(value) => Ok(Some(value.clone().into_bytes())),
            None if optional => Ok(None),
            None => Err(format!("couldn't find key {} in ConfigMap {namespace}/{}", from.key, from.name)),
        };
    }
    if let Some(from) = &source.secret_key_ref {
        let optional = from.optional == Some(true);
        let Some(secret) = context.objects.secret(namespace, &from.name)? else {
            return if optional { Ok(None) } else { Err(format!("secret {:?} not found", from.name)) };
        };
        return match secret.data.as_ref().and_then(|data| data.get(&from.key)) {
            Some(value) => Ok(Some(value.0.clone())),
            None if optional => Ok(None),
            None => Err(format!("couldn't find key {} in Secret {namespace}/{}", from.key, from.name)),
        };
    }
    if let Some(from) = &source.file_key_ref {
        let root = empty_dir::path(context.pod_dir, &from.volume_name);
        return env_file::value(&root, from);
    }
    Err("environment variable has a source that is not supported".to_owned())
}

fn pod_field(path: &str, context: &EnvContext<'_>) -> Result<String, String> {
    let metadata = &context.pod.metadata;
    if let Some((field, key)) = keyed(path) {
        let map = if field == "labels" { &metadata.labels } else { &metadata.annotations };
        return Ok(map.as_ref().and_then(|m| m.get(key)).cloned().unwrap_or_default());
    }
    let first = |ips: &[String]| ips.first().cloned().unwrap_or_default();
    Ok(match path {
        "metadata.name" => metadata.name.clone().unwrap_or_default(),
        "metadata.namespace" => metadata.namespace.clone().unwrap_or_default(),
        "metadata.uid" => metadata.uid.clone().unwrap_or_default(),
        "spec.nodeName" => context.node_name.to_owned(),
        "spec.serviceAccountName" => pod::spec(context.pod).service_account_name.clone().unwrap_or_default(),
        "status.hostIP" => first(context.host_ips),
        "status.hostIPs" => context.host_ips.join(","),
        "status.podIP" => first(context.pod_ips),
        "status.podIPs" => context.pod_ips.join(","),
        other => return Err(format!("field path {other:?} is not supported")),
    })
}

/// `ceil(quantity / divisor)`; a missing limit is the node's capacity, a missing request is zero.
pub(crate) fn resource_field(
    selector: &ResourceFieldSelector,
    container: &Container,
    context: &EnvContext<'_>,
) -> Result<String, String> {
    let spec = context.pod.spec.as_ref();
    let all = || spec.into_iter().flat_map(|s| s.init_containers.iter().flatten().chain(&s.containers));
    let target = match selector.container_name.as_deref().filter(|n| !n.is_empty()) {
        None => container,
        Some(name) => all().find(|c| c.name == name).ok_or_else(|| format!("container {name:?} not found"))?,
    };
    let (kind, name) = selector
        .resource
        .split_once('.')
        .filter(|(kind, _)| matches!(*kind, "limits" | "requests"))
        .ok_or_else(|| format!("unsupported container resource: {}", selector.resource))?;
    let resources = target.resources.clone().unwrap_or_default();
    let list = if kind == "limits" { resources.limits } else { resources.requests };
    let amount = match list.as_ref().and_then(|l| l.get(name)) {
        Some(quantity) => Amount::of(quantity),
        None if kind == "limits" => context.capacity.amount(name),
        None => Amount::default(),
    };
    let divisor = selector.divisor.as_ref().map(Amount::of).unwrap_or_default();
    Ok(amount.divided_by(divisor).to_string())
}

/// `$(NAME)` from `variables`, `$$` → `$`; what is not known stays as it is.
pub fn expand(text: &str, variables: &BTreeMap<&str, &str>) -> String {
    let bytes = variables.iter().map(|(name, value)| (*name, value.as_bytes())).collect();
    String::from_utf8_lossy(&expand_bytes(text, &bytes)).into_owned()
}

/// [`expand`] with values that may be any bytes.
pub fn expand_bytes(text: &str, variables: &BTreeMap<&str, &[u8]>) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(dollar) = rest.find('$') {
        out.extend_from_slice(&rest.as_bytes()[..dollar]);
        rest = &rest[dollar..];
        if let Some(after) = rest.strip_prefix("$$") {
            out.push(b'$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix("$(").and_then(|r| r.split_once(')')) {
            match variables.get(name) {
                Some(value) => out.extend_from_slice(value),
                None => out.extend_from_slice(format!("$({name})").as_bytes()),
            }
            rest = after;
        } else {
            out.push(b'$');
            rest = &rest[1..];
        }
    }
    out.extend_from_slice(rest.as_bytes());
    out
}

/// Expansion of `command` and `args` with the container's final environment. Arguments are text in the CRI: a variable that
/// is not cannot be part of one.
pub fn expand_all(texts: Option<&Vec<String>>, variables: &[Variable]) -> Result<Vec<String>, String> {
    let map: BTreeMap<&str, &[u8]> = variables.iter().map(|(n, v)| (n.as_str(), v.as_slice())).collect();
    let expanded = texts.into_iter().flatten().map(|text| String::from_utf8(expand_bytes(text, &map)));
    expanded.collect::<Result<_, _>>().map_err(|_| "a variable that is not UTF-8 cannot be part of a command".to_owned())
}

/// A `subPathExpr` with the container's variables; one that is missing or empty is an error.
pub fn expand_path(text: &str, variables: &[Variable]) -> Result<String, String> {
    let mut rest = text;
    while let Some((_, after)) = rest.split_once('$') {
        if let Some(after) = after.strip_prefix('$') {
            rest = after;
            continue;
        }
        if let Some((name, after)) = after.strip_prefix('(').and_then(|r| r.split_once(')')) {
            if !variables.iter().any(|(n, value)| n == name && !value.is_empty()) {
                return Err(format!("missing value for {name:?}"));
            }
            rest = after;
            continue;
        }
        rest = after;
    }
    let map = variables.iter().map(|(n, v)| (n.as_str(), v.as_slice())).collect();
    String::from_utf8(expand_bytes(text, &map)).map_err(|_| "a variable that is not UTF-8 cannot be part of a path".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::LocalObjects;
    use crate::source::{defaults::apply_defaults, parse::parse_manifest};

    #[test]
    fn expansion_is_the_one_of_the_kubelet() {
        let variables = BTreeMap::from([("A", "1"), ("B", "two")]);
        let cases = [
            ("$(A)-$(B)", "1-two"),
            ("$$(A)", "$(A)"),
            ("$(C)", "$(C)"),
            ("$A", "$A"),
            ("$(A", "$(A"),
            ("$", "$"),
            ("a$$b$$", "a$b$"),
            ("$()", "$()"),
            ("$$$(A)", "$1"),
        ];
        for (text, expected) in cases {
            assert_eq!(expand(text, &variables), expected, "{text}");
        }
    }

    #[test]
    fn variables_come_from_values_fields_and_resources() {
        let text = "
apiVersion: v1
kind: Pod
metadata: {name: web, uid: u1, labels: {app: shop}}
spec:
  containers:
  - name: c
    image: i
    resources: {limits: {memory: 64Mi, cpu: 1500m}}
    env:
    - {name: A, value: a}
    - {name: B, value: '$(A)b'}
    - {name: A, value: '$(B)c'}
    - {name: NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
    - {name: LABEL, valueFrom: {fieldRef: {fieldPath: \"metadata.labels['app']\"}}}
    - {name: IPS, valueFrom: {fieldRef: {fieldPath: status.podIPs}}}
    - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
    - {name: CPU, valueFrom: {resourceFieldRef: {resource: limits.cpu}}}
    - {name: MEM, valueFrom: {resourceFieldRef: {resource: limits.memory, divisor: 1Mi}}}
    - {name: DISK, valueFrom: {resourceFieldRef: {resource: requests.ephemeral-storage}}}
";
        let mut pod = parse_manifest(text).unwrap().pods.remove(0).pod;
        apply_defaults(&mut pod);
        let capacity = Capacity::default();
        let context = EnvContext {
            pod: &pod,
            node_name: "n1",
            host_ips: &[],
            pod_ips: &["10.0.0.1".to_owned(), "fd00::1".to_owned()],
            capacity: &capacity,
            objects: &LocalObjects::default(),
            pod_dir: Path::new("/none"),
            services: &[],
        };
        let env = container_env(&pod.spec.as_ref().unwrap().containers[0], &context).unwrap();
        let text: Vec<_> = env.iter().map(|(n, v)| format!("{n}={}", String::from_utf8_lossy(v))).collect();
        let expected =
            ["A=abc", "B=ab", "NAME=web", "LABEL=shop", "IPS=10.0.0.1,fd00::1", "NODE=n1", "CPU=2", "MEM=64", "DISK=0"];
        assert_eq!(text, expected);
        let services = ["A", "SHOP_PORT"].map(|name| (name.to_owned(), b"service".to_vec()));
        let mut container = pod.spec.as_ref().unwrap().containers[0].clone();
        container.env.as_mut().unwrap()[0].value = Some("abc".to_owned());
        container.env.as_mut().unwrap()[1].value = Some("$(SHOP_PORT)".to_owned());
        let env = container_env(&container, &EnvContext { services: &services, ..context }).unwrap();
        let value = |name: &str| env.iter().find(|(n, _)| n == name).map(|(_, v)| String::from_utf8_lossy(v).into_owned());
        let values = ["A", "B", "SHOP_PORT"].map(|name| value(name).unwrap());
        assert_eq!(values, ["servicec", "service", "service"], "the spec's variable hides a service's, which others may use");
        assert_eq!(env.last().unwrap().0, "SHOP_PORT", "services come last");
    }

    /// The environment of a container with these fields, beside one ConfigMap and one Secret.
    fn with_objects(fields: &str) -> Result<Vec<Variable>, String> {
        let text = "{apiVersion: v1, kind: ConfigMap, metadata: {name: m}, data: {A: one, B.x: two}}";
        let objects = LocalObjects::default();
        let mut held = parse_manifest(text).unwrap().objects;
        let secret = "{apiVersion: v1, kind: Secret, metadata: {name: s}, data: {RAW: /wA=, A: c2VjcmV0}}";
        held.extend(parse_manifest(secret).unwrap().objects);
        objects.replace(held);
        let text = format!(
            "{{apiVersion: v1, kind: Pod, metadata: {{name: w}}, spec: {{containers: [{{name: c, image: i, {fields}}}]}}}}"
        );
        let mut pod = parse_manifest(&text).unwrap().pods.remove(0).pod;
        apply_defaults(&mut pod);
        let capacity = Capacity::default();
        let context = EnvContext {
            pod: &pod,
            node_name: "n",
            host_ips: &[],
            pod_ips: &[],
            capacity: &capacity,
            objects: &objects,
            pod_dir: Path::new("/none"),
            services: &[],
        };
        container_env(&pod.spec.as_ref().unwrap().containers[0], &context)
    }

    #[test]
    fn config_maps_and_secrets_give_variables() {
        let fields = "envFrom: [{configMapRef: {name: m}, prefix: P_}, {configMapRef: {name: m}}, {secretRef: {name: s}},             {secretRef: {name: none, optional: true}}], env: [{name: K, valueFrom: {secretKeyRef: {name: s, key: A}}},             {name: E, value: 'x$(P_A)'}, {name: O, valueFrom: {configMapKeyRef: {name: m, key: none, optional: true}}}]";
        let found = with_objects(fields).unwrap();
        let wanted: [(&str, &[u8]); 7] = [
            ("P_A", b"one"),
            ("P_B.x", b"two"),
            ("A", b"secret"),
            ("B.x", b"two"),
            ("RAW", &[0xff, 0]),
            ("K", b"secret"),
            ("E", b"xone"),
        ];
        let wanted: Vec<Variable> = wanted.iter().map(|(n, v)| ((*n).to_owned(), v.to_vec())).collect();
        assert_eq!(found, wanted);
    }

    #[test]
    fn what_a_variable_lacks_is_named() {
        for (fields, expected) in [
            ("envFrom: [{configMapRef: {name: none}}]", "configmap \"none\" not found"),
            ("envFrom: [{secretRef: {name: none}}]", "secret \"none\" not found"),
            ("env: [{name: A, valueFrom: {secretKeyRef: {name: none, key: A}}}]", "secret \"none\" not found"),
            (
                "env: [{name: A, valueFrom: {configMapKeyRef: {name: m, key: none}}}]",
                "couldn't find key none in ConfigMap default/m",
            ),
            ("env: [{name: A, valueFrom: {secretKeyRef: {name: s, key: none}}}]", "couldn't find key none in Secret default/s"),
        ] {
            assert_eq!(with_objects(fields).unwrap_err(), expected, "{fields}");
        }
    }

    #[test]
    fn a_path_needs_all_its_variables() {
        let variables = [("POD".to_owned(), b"web".to_vec()), ("EMPTY".to_owned(), Vec::new())];
        assert_eq!(expand_path("logs/$(POD)/$$(X)", &variables).unwrap(), "logs/web/$(X)");
        assert_eq!(expand_path("$(NO)", &variables).unwrap_err(), "missing value for \"NO\"");
        assert_eq!(expand_path("$(EMPTY)", &variables).unwrap_err(), "missing value for \"EMPTY\"");
    }
}
