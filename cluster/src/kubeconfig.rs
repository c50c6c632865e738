//! Kubeconfig files: what of one the node needs, and those it writes. Ways to authenticate that would need another program or service
//! are refused by name. Reads no file that a kubeconfig names.

use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::json;

use crate::{Error, Result};

/// A certificate, a key or an authority.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Material {
    /// In the kubeconfig itself, PEM.
    Inline(Vec<u8>),
    /// In a file of its own, PEM.
    File(PathBuf),
}

/// How the caller shows who it is. Several may be given; all are shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Credentials {
    /// The client certificate and its chain.
    pub certificate: Option<Material>,
    /// Its key.
    pub key: Option<Material>,
    /// A bearer token.
    pub token: Option<String>,
    /// A file with one; it wins over the token, as in client-go.
    pub token_file: Option<PathBuf>,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Credentials")
    }
}

/// The current context of a kubeconfig: one server and one user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kubeconfig {
    /// The API server's URL.
    pub server: String,
    /// The authority of its certificate; none: those of the system.
    pub authority: Option<Material>,
    /// The name that its certificate is checked against, where it is not the URL's host.
    pub tls_server_name: Option<String>,
    /// Its certificate is not checked.
    pub skip_verify: bool,
    /// An HTTP proxy that the connection goes through.
    pub proxy: Option<String>,
    /// Who asks.
    pub user: Credentials,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Document {
    #[serde(rename = "kind")]
    kind: Option<String>,
    clusters: Option<Vec<NamedCluster>>,
    users: Option<Vec<NamedUser>>,
    contexts: Option<Vec<NamedContext>>,
    current_context: Option<String>,
}

#[derive(Deserialize)]
struct NamedCluster {
    #[serde(default)]
    name: String,
    #[serde(default)]
    cluster: Cluster,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct Cluster {
    server: String,
    certificate_authority: Option<PathBuf>,
    certificate_authority_data: Option<String>,
    insecure_skip_tls_verify: bool,
    tls_server_name: Option<String>,
    proxy_url: Option<String>,
}

#[derive(Deserialize)]
struct NamedUser {
    #[serde(default)]
    name: String,
    #[serde(default)]
    user: User,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
struct User {
    client_certificate: Option<PathBuf>,
    client_certificate_data: Option<String>,
    client_key: Option<PathBuf>,
    client_key_data: Option<String>,
    token: Option<String>,
    #[serde(rename = "tokenFile")]
    token_file: Option<PathBuf>,
    username: Option<String>,
    exec: Option<serde_json::Value>,
    auth_provider: Option<serde_json::Value>,
    #[serde(rename = "as")]
    impersonated: Option<String>,
}

#[derive(Deserialize)]
struct NamedContext {
    #[serde(default)]
    name: String,
    #[serde(default)]
    context: Context,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Context {
    cluster: String,
    user: String,
}

impl Kubeconfig {
    /// Reads the file; relative paths in it are meant from its folder.
    ///
    /// # Errors
    /// When it cannot be read, or as [`Kubeconfig::parse`].
    pub fn load(path: &Path) -> Result<Kubeconfig> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::ReadFile { path: path.to_owned(), source })?;
        Self::parse(&text, &path.display().to_string(), path.parent().unwrap_or(Path::new("/")))
    }

    /// Reads a text that is called `name` in errors.
    ///
    /// # Errors
    /// When it is no kubeconfig, names what it does not have, or has a user that only another program could be.
    pub fn parse(text: &str, name: &str, folder: &Path) -> Result<Kubeconfig> {
        read(text, folder).map_err(|problem| Error::Kubeconfig { name: name.to_owned(), problem })
    }

    /// The text of a kubeconfig with these names in it; files are named as they are.
    pub fn render(&self, cluster: &str, user: &str, context: &str) -> String {
        let mut server = serde_json::Map::new();
        match &self.authority {
            Some(Material::Inline(pem)) => _ = server.insert("certificate-authority-data".into(), json!(BASE64.encode(pem))),
            Some(Material::File(path)) => _ = server.insert("certificate-authority".into(), json!(path)),
            None => {}
        }
        if self.skip_verify {
            server.insert("insecure-skip-tls-verify".into(), json!(true));
        }
        for (key, value) in [("tls-server-name", &self.tls_server_name), ("proxy-url", &self.proxy)] {
            if let Some(value) = value {
                server.insert(key.into(), json!(value));
            }
        }
        server.insert("server".into(), json!(self.server));
        let mut who = serde_json::Map::new();
        for (key, material) in [("client-certificate", &self.user.certificate), ("client-key", &self.user.key)] {
            match material {
                Some(Material::Inline(pem)) => _ = who.insert(format!("{key}-data"), json!(BASE64.encode(pem))),
                Some(Material::File(path)) => _ = who.insert(key.into(), json!(path)),
                None => {}
            }
        }
        if let Some(token) = &self.user.token {
            who.insert("token".into(), json!(token));
        }
        if let Some(path) = &self.user.token_file {
            who.insert("tokenFile".into(), json!(path));
        }
        let document = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": cluster, "cluster": server}],
            "contexts": [{"name": context, "context": {"cluster": cluster, "user": user}}],
            "current-context": context,
            "users": [{"name": user, "user": who}],
        });
        // A tree of texts always has a form as YAML.
        serde_yaml_ng::to_string(&document).unwrap_or_default()
    }
}

fn read(text: &str, folder: &Path) -> std::result::Result<Kubeconfig, String> {
    let document: Document = serde_yaml_ng::from_str(text).map_err(|error| error.to_string())?;
    if document.kind.as_deref().is_some_and(|kind| kind != "Config") {
        return Err(format!("kind {:?} is not Config", document.kind.unwrap_or_default()));
    }
    let (clusters, users) = (document.clusters.unwrap_or_default(), document.users.unwrap_or_default());
    let current = document.current_context.unwrap_or_default();
    let (cluster, user) = if current.is_empty() {
        // What discovery hands out has no context.
        let [cluster] = <[NamedCluster; 1]>::try_from(clusters).map_err(|_| "there is no current-context")?;
        (cluster.cluster, User::default())
    } else {
        let context = document.contexts.unwrap_or_default().into_iter().find(|context| context.name == current);
        let context = context.ok_or_else(|| format!("there is no context {current:?}"))?.context;
        let cluster = clusters.into_iter().find(|cluster| cluster.name == context.cluster);
        let cluster = cluster.ok_or_else(|| format!("there is no cluster {:?}", context.cluster))?.cluster;
        let user = match context.user.as_str() {
            "" => User::default(),
            name => users.into_iter().find(|user| user.name == name).ok_or_else(|| format!("there is no user {name:?}"))?.user,
        };
        (cluster, user)
    };
    if cluster.server.is_empty() {
        return Err("the cluster has no server".to_owned());
    }
    refuse(&user)?;
    let material = |data: Option<String>, file: Option<PathBuf>, what: &str| match (data, file) {
        (Some(data), _) if !data.is_empty() => {
            let compact: String = data.split_ascii_whitespace().collect();
            BASE64.decode(compact).map(|pem| Some(Material::Inline(pem))).map_err(|error| format!("{what}-data: {error}"))
        }
        (_, file) => Ok(file.filter(|path| !path.as_os_str().is_empty()).map(|path| Material::File(folder.join(path)))),
    };
    Ok(Kubeconfig {
        server: cluster.server,
        authority: material(cluster.certificate_authority_data, cluster.certificate_authority, "certificate-authority")?,
        tls_server_name: cluster.tls_server_name.filter(|name| !name.is_empty()),
        skip_verify: cluster.insecure_skip_tls_verify,
        proxy: cluster.proxy_url.filter(|url| !url.is_empty()),
        user: Credentials {
            certificate: material(user.client_certificate_data, user.client_certificate, "client-certificate")?,
            key: material(user.client_key_data, user.client_key, "client-key")?,
            token: user.token.filter(|token| !token.is_empty()),
            token_file: user.token_file.filter(|path| !path.as_os_str().is_empty()).map(|path| folder.join(path)),
        },
    })
}

fn refuse(user: &User) -> std::result::Result<(), String> {
    let given = |value: &Option<serde_json::Value>| value.as_ref().is_some_and(|value| !value.is_null());
    let refused = [
        (given(&user.exec), "exec", "no other program is asked for credentials"),
        (given(&user.auth_provider), "auth-provider", "Kubernetes has removed it"),
        (user.username.as_ref().is_some_and(|name| !name.is_empty()), "username", "API servers know no passwords"),
        (user.impersonated.as_ref().is_some_and(|name| !name.is_empty()), "as", "a node is nobody but itself"),
    ];
    match refused.into_iter().find(|(is_given, ..)| *is_given) {
        Some((_, field, why)) => Err(format!("the user's {field:?} is not supported: {why}")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_user(user: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Config\nclusters:\n- name: c\n  cluster: {{server: 'https://h:6443', certificate-authority: pki/ca.crt}}\n\
             contexts:\n- name: x\n  context: {{cluster: c, user: u}}\ncurrent-context: x\nusers:\n- name: u\n  user: {user}\n"
        )
    }

    fn parsed(text: &str) -> Result<Kubeconfig> {
        Kubeconfig::parse(text, "test", Path::new("/etc/kubernetes"))
    }

    #[test]
    fn relative_files_are_meant_from_the_kubeconfigs_folder() {
        let config = parsed(&with_user("{client-certificate: a.pem, client-key: /b.pem, tokenFile: t}")).unwrap();
        assert_eq!(config.authority, Some(Material::File("/etc/kubernetes/pki/ca.crt".into())));
        assert_eq!(config.user.certificate, Some(Material::File("/etc/kubernetes/a.pem".into())));
        assert_eq!(config.user.key, Some(Material::File("/b.pem".into())));
        assert_eq!(config.user.token_file, Some("/etc/kubernetes/t".into()));
    }

    #[test]
    fn inline_data_wins_over_files() {
        let config = parsed(&with_user("{client-certificate: a.pem, client-certificate-data: aGVs\n     bG8=, token: t}"));
        let config = config.unwrap();
        assert_eq!(config.user.certificate, Some(Material::Inline(b"hello".to_vec())));
        assert_eq!(config.user.token.as_deref(), Some("t"));
    }

    #[test]
    fn what_needs_another_program_is_refused_by_name() {
        for (user, name) in [
            ("{exec: {command: aws}}", "\"exec\""),
            ("{auth-provider: {name: gcp}}", "\"auth-provider\""),
            ("{username: admin, password: x}", "\"username\""),
            ("{as: root}", "\"as\""),
        ] {
            let error = parsed(&with_user(user)).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn what_discovery_hands_out_has_no_context_and_no_user() {
        let text = "apiVersion: v1\nkind: Config\nclusters:\n- cluster:\n    certificate-authority-data: aGVsbG8=\n    server: https://cp:6443\n  name: \"\"\n\
                    contexts: null\ncurrent-context: \"\"\npreferences: {}\nusers: null\n";
        let config = parsed(text).unwrap();
        assert_eq!((config.server.as_str(), &config.user), ("https://cp:6443", &Credentials::default()));
        for (text, problem) in [
            ("kind: Config\n", "no current-context"),
            ("kind: Pod\n", "is not Config"),
            ("current-context: x\n", "no context \"x\""),
            ("[]", ""),
        ] {
            let error = parsed(text).unwrap_err().to_string();
            assert!(error.contains(problem), "{error}");
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let file = |path: &str| Some(Material::File(path.into()));
        let config = Kubeconfig {
            server: "https://cp.example:6443".into(),
            authority: Some(Material::Inline(b"pem".to_vec())),
            tls_server_name: Some("kubernetes".into()),
            skip_verify: false,
            proxy: Some("http://proxy:3128".into()),
            user: Credentials {
                certificate: file("/p/current.pem"),
                key: file("/p/current.pem"),
                token: Some("yes".into()),
                token_file: None,
            },
        };
        let text = config.render("default-cluster", "default-auth", "default-context");
        assert!(text.contains("current-context: default-context"), "{text}");
        assert_eq!(parsed(&text).unwrap(), config);
    }
}
