//! The rules of a container's variables and of what they come from.

use k8s_openapi::api::core::v1::{Container, EnvVarSource, FileKeySelector, ObjectFieldSelector, PodSpec, ResourceFieldSelector};

use super::Problems;
use super::container::exactly_one;

/// The only version of the API whose fields can be shown.
const API_VERSION: &str = "v1";

/// `env` and `envFrom`.
pub(super) fn validate_env(path: &str, container: &Container, spec: &PodSpec, problems: &mut Problems) {
    for (i, env) in container.env.iter().flatten().enumerate() {
        let path = format!("{path}.env[{i}]");
        if !crate::env::is_variable_name(&env.name) {
            problems.add(format!("{path}.name"), format!("{:?} is not an environment variable name", env.name));
        }
        if let Some(from) = &env.value_from {
            validate_source(&format!("{path}.valueFrom"), from, spec, problems);
            if env.value.as_deref().is_some_and(|value| !value.is_empty()) {
                problems.add(path, "may not have both value and valueFrom");
            }
        }
    }
    for (i, source) in container.env_from.iter().flatten().enumerate() {
        let path = format!("{path}.envFrom[{i}]");
        let names = [source.config_map_ref.as_ref().map(|r| &r.name), source.secret_ref.as_ref().map(|r| &r.name)];
        match names.into_iter().flatten().collect::<Vec<_>>()[..] {
            [name] if !name.is_empty() => {}
            [_] => problems.add(path.clone(), "needs a name"),
            _ => problems.add(path.clone(), "must have one of configMapRef and secretRef"),
        }
        let prefix = source.prefix.as_deref().unwrap_or_default();
        if !prefix.is_empty() && !crate::env::is_variable_name(prefix) {
            problems.add(format!("{path}.prefix"), format!("{prefix:?} cannot begin an environment variable name"));
        }
    }
}

fn validate_source(path: &str, from: &EnvVarSource, spec: &PodSpec, problems: &mut Problems) {
    let kinds = [
        from.field_ref.is_some(),
        from.resource_field_ref.is_some(),
        from.config_map_key_ref.is_some(),
        from.secret_key_ref.is_some(),
        from.file_key_ref.is_some(),
    ];
    exactly_one(path, &kinds, "fieldRef, resourceFieldRef, configMapKeyRef, secretKeyRef and fileKeyRef", problems);
    if let Some(field) = &from.field_ref {
        validate_field(&format!("{path}.fieldRef"), field, problems);
        if !crate::env::is_env_field(&field.field_path) {
            let message = format!("{:?} is not a field that an environment variable can take", field.field_path);
            problems.add(format!("{path}.fieldRef.fieldPath"), message);
        }
    }
    let keys = [
        ("configMapKeyRef", from.config_map_key_ref.as_ref().map(|r| &r.key)),
        ("secretKeyRef", from.secret_key_ref.as_ref().map(|r| &r.key)),
    ];
    for (field, _) in keys.iter().filter(|(_, key)| key.is_some_and(String::is_empty)) {
        problems.add(format!("{path}.{field}.key"), "is required");
    }
    if let Some(file) = &from.file_key_ref {
        validate_file_key(&format!("{path}.fileKeyRef"), file, spec, problems);
    }
    if let Some(resource) = &from.resource_field_ref {
        validate_resource_field(&format!("{path}.resourceFieldRef"), resource, problems);
    }
}

/// The version in which a field of the pod is named; the field itself depends on where it is shown.
pub(super) fn validate_field(path: &str, field: &ObjectFieldSelector, problems: &mut Problems) {
    problems.one_of(&format!("{path}.apiVersion"), field.api_version.as_deref(), &[API_VERSION]);
}

/// A file of variables: in an emptyDir, where a container of the pod has written it.
fn validate_file_key(path: &str, from: &FileKeySelector, spec: &PodSpec, problems: &mut Problems) {
    match spec.volumes.iter().flatten().find(|volume| volume.name == from.volume_name) {
        None => problems.add(format!("{path}.volumeName"), format!("no volume is called {:?}", from.volume_name)),
        Some(volume) if volume.empty_dir.is_none() => {
            problems.add(format!("{path}.volumeName"), "must be an emptyDir volume");
        }
        Some(_) => {}
    }
    if from.path.is_empty() || !crate::volume::sub_path::is_sub_path(&from.path) {
        problems.add(format!("{path}.path"), "must be a relative path without '..'");
    }
    if !crate::env::is_variable_name(&from.key) {
        problems.add(format!("{path}.key"), format!("{:?} is not an environment variable name", from.key));
    }
}

/// What a value of a container's resources may be: the API's resources and divisors.
pub(super) fn validate_resource_field(path: &str, from: &ResourceFieldSelector, problems: &mut Problems) {
    let name = from.resource.strip_prefix("limits.").or_else(|| from.resource.strip_prefix("requests.")).unwrap_or_default();
    if !matches!(name, "cpu" | "memory" | "ephemeral-storage") && !name.starts_with("hugepages-") {
        problems.add(format!("{path}.resource"), format!("{:?} is not a resource that a field can show", from.resource));
    }
    let divisor = from.divisor.as_ref().map_or("0", |divisor| divisor.0.as_str());
    let bytes = ["0", "1", "1k", "1M", "1G", "1T", "1P", "1E", "1Ki", "1Mi", "1Gi", "1Ti", "1Pi", "1Ei"];
    let allowed: &[&str] = if name == "cpu" { &["0", "1", "1m"] } else { &bytes };
    if !allowed.contains(&divisor) {
        problems.add(format!("{path}.divisor"), format!("{divisor:?} is not one of {}", allowed[1..].join(", ")));
    }
}
