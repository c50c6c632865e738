//! Environment of a container: literal values with `$(NAME)` expansion, pod fields and resource numbers. Pure; knows no
//! ConfigMaps yet.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, EnvVarSource, Pod, ResourceFieldSelector};

use crate::node::Capacity;
use crate::quantity::Amount;

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
}

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
fn keyed(path: &str) -> Option<(&str, &str)> {
    let (field, rest) = path.strip_prefix("metadata.")?.split_once("['")?;
    let key = rest.strip_suffix("']")?;
    (matches!(field, "labels" | "annotations") && !key.is_empty()).then_some((field, key))
}

/// The variables of a container in order, a later one replacing an earlier one of its name.
pub fn container_env(container: &Container, context: &EnvContext<'_>) -> Result<Vec<(String, String)>, String> {
    let mut variables: Vec<(String, String)> = Vec::new();
    for env in container.env.iter().flatten() {
        let value = match &env.value_from {
            None => {
                let so_far: BTreeMap<&str, &str> = variables.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
                expand(env.value.as_deref().unwrap_or_default(), &so_far)
            }
            Some(source) => resolve_source(source, container, context)?,
        };
        match variables.iter_mut().find(|(name, _)| *name == env.name) {
            Some(existing) => existing.1 = value,
            None => variables.push((env.name.clone(), value)),
        }
    }
    Ok(variables)
}

fn resolve_source(source: &EnvVarSource, container: &Container, context: &EnvContext<'_>) -> Result<String, String> {
    if let Some(field) = &source.field_ref {
        return pod_field(&field.field_path, context);
    }
    if let Some(resource) = &source.resource_field_ref {
        return resource_field(resource, container, context);
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
        "spec.serviceAccountName" => String::new(),
        "status.hostIP" => first(context.host_ips),
        "status.hostIPs" => context.host_ips.join(","),
        "status.podIP" => first(context.pod_ips),
        "status.podIPs" => context.pod_ips.join(","),
        other => return Err(format!("field path {other:?} is not supported")),
    })
}

/// `ceil(quantity / divisor)`; a missing limit is the node's capacity, a missing request is zero.
fn resource_field(selector: &ResourceFieldSelector, container: &Container, context: &EnvContext<'_>) -> Result<String, String> {
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
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(dollar) = rest.find('$') {
        out.push_str(&rest[..dollar]);
        rest = &rest[dollar..];
        if let Some(after) = rest.strip_prefix("$$") {
            out.push('$');
            rest = after;
        } else if let Some((name, after)) = rest.strip_prefix("$(").and_then(|r| r.split_once(')')) {
            match variables.get(name) {
                Some(value) => out.push_str(value),
                None => {
                    out.push_str("$(");
                    out.push_str(name);
                    out.push(')');
                }
            }
            rest = after;
        } else {
            out.push('$');
            rest = &rest[1..];
        }
    }
    out.push_str(rest);
    out
}

/// Expansion of `command` and `args` with the container's final environment.
pub fn expand_all(texts: Option<&Vec<String>>, variables: &[(String, String)]) -> Vec<String> {
    let map: BTreeMap<&str, &str> = variables.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    texts.into_iter().flatten().map(|text| expand(text, &map)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
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
        };
        let env = container_env(&pod.spec.as_ref().unwrap().containers[0], &context).unwrap();
        let text: Vec<_> = env.iter().map(|(n, v)| format!("{n}={v}")).collect();
        let expected =
            ["A=abc", "B=ab", "NAME=web", "LABEL=shop", "IPS=10.0.0.1,fd00::1", "NODE=n1", "CPU=2", "MEM=64", "DISK=0"];
        assert_eq!(text, expected);
    }
}
