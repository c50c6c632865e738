//! Credentials for pulls from the Secrets that a pod names: the docker configuration in them, and which of its entries fit an
//! image. Pure; who pulls tries them in the order given here.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use berth_cri_api::v1::AuthConfig;
use k8s_openapi::api::core::v1::{Pod, Secret};
use serde::Deserialize;
use std::collections::BTreeMap;

use crate::objects::Objects;
use crate::pod;

/// The registry that names without one mean, by the key that docker writes for it.
const DEFAULT_REGISTRY: &str = "docker.io";

#[derive(Deserialize)]
struct DockerConfig {
    auths: BTreeMap<String, Entry>,
}

#[derive(Clone, Default, Deserialize)]
#[serde(default)]
struct Entry {
    username: String,
    password: String,
    auth: String,
    #[serde(alias = "identityToken")]
    identitytoken: String,
    #[serde(alias = "registryToken")]
    registrytoken: String,
}

/// The credentials for an image that the pod's `imagePullSecrets` hold, the best match first; and what is wrong with the Secrets,
/// as events tell it.
pub fn credentials(pod: &Pod, image: &str, objects: &dyn Objects) -> (Vec<AuthConfig>, Vec<String>) {
    let mut problems = Vec::new();
    let mut found: Vec<(usize, AuthConfig)> = Vec::new();
    for name in secret_names(pod, objects) {
        let Ok(Some(secret)) = objects.secret(pod::namespace(pod), &name) else {
            problems.push(format!("Unable to retrieve some image pull secrets ({name}){UNLIKELY}"));
            continue;
        };
        let entries = entries(&secret).unwrap_or_else(|problem| {
            problems.push(format!("Unable to read some image pull secrets ({name}: {problem}){UNLIKELY}"));
            BTreeMap::new()
        });
        for (key, entry) in entries {
            if let Some(length) = matches(&key, image) {
                found.push((length, auth(entry)));
            }
        }
    }
    found.sort_by_key(|(length, _)| std::cmp::Reverse(*length));
    (found.into_iter().map(|(_, auth)| auth).collect(), problems)
}

const UNLIKELY: &str = "; attempting to pull the image may not succeed.";

/// The Secrets with the pod's credentials: its own, or those of its service account, as the API server's admission adds them.
fn secret_names(pod: &Pod, objects: &dyn Objects) -> Vec<String> {
    let spec = pod::spec(pod);
    let own: Vec<String> = spec.image_pull_secrets.iter().flatten().map(|r| r.name.clone()).collect();
    if !own.is_empty() {
        return own;
    }
    let account = spec.service_account_name.as_deref().filter(|name| !name.is_empty()).unwrap_or("default");
    let account = objects.service_account(pod::namespace(pod), account);
    account.iter().flat_map(|a| a.image_pull_secrets.iter().flatten()).map(|r| r.name.clone()).collect()
}

/// The entries of a Secret. What is wrong with one is told without a word of its content.
fn entries(secret: &Secret) -> Result<BTreeMap<String, Entry>, String> {
    let data = |key: &str| secret.data.as_ref().and_then(|data| data.get(key)).map(|bytes| bytes.0.as_slice());
    let place = |e: serde_json::Error| format!("not a docker configuration, line {} column {}", e.line(), e.column());
    if let Some(bytes) = data(".dockerconfigjson") {
        return serde_json::from_slice::<DockerConfig>(bytes).map(|config| config.auths).map_err(place);
    }
    let bytes = data(".dockercfg").ok_or("neither .dockerconfigjson nor .dockercfg is in it")?;
    serde_json::from_slice(bytes).map_err(place)
}

fn auth(entry: Entry) -> AuthConfig {
    let decoded = STANDARD.decode(entry.auth.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    let (username, password) = match decoded.as_deref().and_then(|text| text.split_once(':')) {
        Some((username, password)) => (username.to_owned(), password.trim_end_matches('\0').to_owned()),
        None => (entry.username, entry.password),
    };
    AuthConfig {
        username,
        password,
        identity_token: entry.identitytoken,
        registry_token: entry.registrytoken,
        ..AuthConfig::default()
    }
}

/// Registry and path of an image, in the form that keys are compared with.
fn place(name: &str) -> (String, String) {
    let (first, rest) = name.split_once('/').unwrap_or(("", name));
    let (host, path) = match first.contains(['.', ':']) || first == "localhost" {
        true => (first, rest),
        false => ("", name),
    };
    let host = match host {
        "" | "index.docker.io" | "registry-1.docker.io" => DEFAULT_REGISTRY,
        host => host,
    };
    (host.to_owned(), path.to_owned())
}

/// How long the match of a key with an image is; `None` where it does not fit.
fn matches(key: &str, image: &str) -> Option<usize> {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let key = key.trim_end_matches('/');
    let key = key.strip_suffix("/v1").or_else(|| key.strip_suffix("/v2")).unwrap_or(key);
    let (host, path) = key.split_once('/').unwrap_or((key, ""));
    let host = if host == "index.docker.io" { DEFAULT_REGISTRY } else { host };
    let (image_host, image_path) = place(image);
    let labels = |text: &str| text.split('.').map(str::to_owned).collect::<Vec<_>>();
    let (wanted, given) = (labels(host), labels(&image_host));
    let fits = wanted.len() == given.len() && wanted.iter().zip(&given).all(|(pattern, label)| glob(pattern, label));
    let below = path.is_empty()
        || image_path == path
        || image_path.strip_prefix(path).is_some_and(|rest| rest.starts_with(['/', ':', '@']));
    (fits && below).then(|| host.len() + path.len())
}

/// One label of a host name; `*` stands for any run of characters.
fn glob(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((before, after)) => text
            .strip_prefix(before)
            .is_some_and(|rest| (0..=rest.len()).filter(|at| rest.is_char_boundary(*at)).any(|at| glob(after, &rest[at..]))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::LocalObjects;
    use crate::source::parse::parse_manifest;

    #[test]
    fn keys_match_hosts_and_paths() {
        for (key, image, expected) in [
            ("https://index.docker.io/v1/", "busybox:1", true),
            ("docker.io", "library/busybox", true),
            ("registry.example", "registry.example/app:1", true),
            ("registry.example/team", "registry.example/team/app:1", true),
            ("registry.example/team", "registry.example/teams/app:1", false),
            ("registry.example", "registry.example:5000/app", false),
            ("registry.example:5000", "registry.example:5000/app", true),
            ("*.example", "registry.example/app", true),
            ("*.example", "a.registry.example/app", false),
            ("reg*y.example", "registry.example/app", true),
        ] {
            assert_eq!(matches(key, image).is_some(), expected, "{key} {image}");
        }
    }

    #[test]
    fn a_broken_secret_is_told_of_without_its_content_and_a_service_accounts_secrets_are_used() {
        let secret =
            |data: &str| serde_json::from_value::<Secret>(serde_json::json!({"data": {".dockerconfigjson": data}})).unwrap();
        // `{"auths": hunter2`
        let problem = entries(&secret("eyJhdXRocyI6IGh1bnRlcjI=")).err().unwrap();
        assert_eq!(problem, "not a docker configuration, line 1 column 11");
        assert!(entries(&Secret::default()).is_err());
        let text = "apiVersion: v1\nkind: Secret\nmetadata: {name: pull}\ntype: kubernetes.io/dockercfg\nstringData:\n  \
            .dockercfg: '{\"reg.example\": {\"username\": \"u\", \"password\": \"p\"}}'\n---\n\
            apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: robot}\nimagePullSecrets: [{name: pull}]\n";
        let objects = LocalObjects::default();
        objects.replace(parse_manifest(text).unwrap().objects);
        let found = |account: &str| {
            let text = format!(
                "{{apiVersion: v1, kind: Pod, metadata: {{name: a}}, spec: {{{account} containers: [{{name: c, image: i}}]}}}}"
            );
            let pod = parse_manifest(&text).unwrap().pods.remove(0).pod;
            credentials(&pod, "reg.example/app", &objects).0.len()
        };
        assert_eq!((found("serviceAccountName: robot,"), found("")), (1, 0));
        assert_eq!(found("serviceAccountName: robot, imagePullSecrets: [{name: none}],"), 0, "the pod's own come first");
    }

    #[test]
    fn the_pods_secrets_give_the_longest_match_first() {
        let config = r#"{"auths": {"registry.example": {"auth": "dXNlcjpvbmU="}, "registry.example/team": {"username": "u", "password": "two"}, "other.example": {"auth": "eDp5"}}}"#;
        let secret = format!(
            "apiVersion: v1\nkind: Secret\nmetadata: {{name: pull}}\ntype: kubernetes.io/dockerconfigjson\nstringData:\n  .dockerconfigjson: '{config}'\n"
        );
        let objects = LocalObjects::default();
        objects.replace(parse_manifest(&secret).unwrap().objects);
        let text = "{apiVersion: v1, kind: Pod, metadata: {name: a}, spec: {imagePullSecrets: [{name: none}, {name: pull}], containers: [{name: c, image: i}]}}";
        let pod = parse_manifest(text).unwrap().pods.remove(0).pod;
        let (found, problems) = credentials(&pod, "registry.example/team/app:1", &objects);
        assert_eq!(
            problems,
            ["Unable to retrieve some image pull secrets (none); attempting to pull the image may not succeed."]
        );
        let pairs: Vec<_> = found.iter().map(|a| (a.username.as_str(), a.password.as_str())).collect();
        assert_eq!(pairs, [("u", "two"), ("user", "one")]);
        assert!(credentials(&pod, "elsewhere.example/app", &objects).0.is_empty());
    }
}
