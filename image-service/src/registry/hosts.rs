//! Which hosts stand for a registry name: containerd's `certs.d/<host>/hosts.toml`, and the defaults without one.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use http::{HeaderName, HeaderValue};
use toml::{Table, Value};

use crate::error::Error;

/// One host that may be asked for a registry's content.
#[derive(Clone, Debug)]
pub(crate) struct Endpoint {
    /// `http` or `https`.
    pub scheme: String,
    /// Host and port.
    pub authority: String,
    /// What precedes `/<repository>/manifests`: `/v2` or something else.
    pub prefix: String,
    pub pull: bool,
    pub resolve: bool,
    /// Has another name than the registry: it is told which one is meant.
    pub mirror: bool,
    /// Stands for the registry itself: the registry's credentials are for it.
    pub server: bool,
    pub tls: Tls,
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

/// How a host's certificate is checked and ours shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tls {
    /// More certificate authorities.
    pub ca: Vec<PathBuf>,
    pub skip_verify: bool,
    /// Certificate and key; one file may hold both.
    pub client: Vec<(PathBuf, Option<PathBuf>)>,
}

impl Endpoint {
    fn new(url: &str) -> Result<Self, String> {
        let (scheme, rest) = match url.split_once("://") {
            Some((scheme @ ("http" | "https"), rest)) => (scheme, rest),
            Some((scheme, _)) => return Err(format!("{url:?}: the scheme {scheme:?} is not http or https")),
            None => {
                let host = url.split('/').next().unwrap_or_default();
                (if is_loopback(host) { "http" } else { "https" }, url)
            }
        };
        let (authority, path) = rest.split_once('/').map_or((rest, ""), |(authority, path)| (authority, path));
        let authority = match authority {
            "docker.io" | "index.docker.io" => "registry-1.docker.io",
            other => other,
        };
        if authority.parse::<http::uri::Authority>().is_err() || authority.contains('@') {
            return Err(format!("{url:?} has no valid host"));
        }
        if path.contains(['?', '#', ' ']) {
            return Err(format!("{url:?} has more than a path behind its host"));
        }
        let path = path.trim_matches('/');
        Ok(Endpoint {
            scheme: scheme.to_string(),
            authority: authority.to_string(),
            prefix: if path.is_empty() { String::new() } else { format!("/{path}") },
            pull: true,
            resolve: true,
            mirror: false,
            server: true,
            tls: Tls::default(),
            headers: Vec::new(),
        })
    }

    /// Appends the API's version unless the configuration says that the path is whole.
    fn add_version(&mut self, is_whole: bool) {
        if !is_whole && self.prefix != "/v2" && !self.prefix.ends_with("/v2") {
            self.prefix.push_str("/v2");
        }
    }
}

/// The hosts for a registry, in the order in which they are asked.
pub(crate) fn endpoints(config_dirs: &[PathBuf], host: &str) -> Result<Vec<Endpoint>, Error> {
    for tree in config_dirs {
        for name in folder_names(host) {
            let dir = tree.join(name);
            if dir.is_dir() {
                return from_dir(&dir, host);
            }
        }
    }
    default_endpoint(host, Path::new("")).map(|endpoint| vec![endpoint])
}

fn default_endpoint(host: &str, file: &Path) -> Result<Endpoint, Error> {
    let mut endpoint = Endpoint::new(host).map_err(|reason| Error::HostsFile { path: file.to_path_buf(), reason })?;
    endpoint.add_version(false);
    Ok(endpoint)
}

/// `host:port`, the form for file systems without colons, and the default for all.
fn folder_names(host: &str) -> Vec<String> {
    let mut names = Vec::new();
    if let Some((name, port)) = host.rsplit_once(':') {
        names.push(format!("{name}_{port}_"));
    }
    names.push(host.to_string());
    names.push("_default".to_string());
    names
}

fn from_dir(dir: &Path, host: &str) -> Result<Vec<Endpoint>, Error> {
    let file = dir.join("hosts.toml");
    let text = match std::fs::read_to_string(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return from_docker_certs(dir, host),
        Err(source) => return Err(Error::file("read", &file, source)),
    };
    parse(&text, dir, host).map_err(|reason| Error::HostsFile { path: file, reason })
}

/// Docker's form: certificates in the folder and no `hosts.toml`.
fn from_docker_certs(dir: &Path, host: &str) -> Result<Vec<Endpoint>, Error> {
    let mut endpoint = default_endpoint(host, dir)?;
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir)
        .and_then(|items| items.map(|item| item.map(|item| item.path())).collect())
        .map_err(|source| Error::file("list", dir, source))?;
    files.sort();
    for file in files {
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => endpoint.tls.ca.push(file),
            Some("cert") => {
                let key = file.with_extension("key");
                endpoint.tls.client.push((file, Some(key)));
            }
            _ => {}
        }
    }
    Ok(vec![endpoint])
}

fn parse(text: &str, dir: &Path, host: &str) -> Result<Vec<Endpoint>, String> {
    let table: Table = text.parse().map_err(|error: toml::de::Error| error.message().to_string())?;
    let mut endpoints = Vec::new();
    if let Some(hosts) = table.get("host") {
        let hosts = hosts.as_table().ok_or("host is not a table")?;
        for (url, settings) in hosts {
            let settings = settings.as_table().ok_or_else(|| format!("host {url:?} is not a table"))?;
            let mirror = endpoint(url, settings, dir, host)?;
            endpoints.push(Endpoint { server: !mirror.mirror, ..mirror });
        }
    }
    let server = match table.get("server") {
        None => host.to_string(),
        Some(Value::String(server)) if !server.is_empty() => server.clone(),
        Some(_) => return Err("server is not a text".into()),
    };
    endpoints.push(endpoint(&server, &table, dir, host)?);
    Ok(endpoints)
}

fn endpoint(url: &str, settings: &Table, dir: &Path, host: &str) -> Result<Endpoint, String> {
    let mut endpoint = Endpoint::new(url)?;
    endpoint.add_version(flag(settings, "override_path")?);
    endpoint.mirror = endpoint.authority != host && !(host == "docker.io" && endpoint.authority == "registry-1.docker.io");
    if let Some(capabilities) = settings.get("capabilities") {
        let capabilities = texts(capabilities, "capabilities")?;
        endpoint.pull = capabilities.iter().any(|word| word == "pull");
        endpoint.resolve = capabilities.iter().any(|word| word == "resolve");
    }
    endpoint.tls.skip_verify = flag(settings, "skip_verify")?;
    if let Some(ca) = settings.get("ca") {
        endpoint.tls.ca = texts(ca, "ca")?.into_iter().map(|path| dir.join(path)).collect();
    }
    if let Some(client) = settings.get("client") {
        endpoint.tls.client = client_pairs(client, dir)?;
    }
    if let Some(headers) = settings.get("header") {
        for (name, value) in headers.as_table().ok_or("header is not a table")? {
            let bad = || format!("header {name:?} is not valid");
            let header = HeaderName::try_from(name.as_str()).map_err(|_| bad())?;
            for value in texts(value, "header")? {
                let mut value = HeaderValue::try_from(value).map_err(|_| bad())?;
                value.set_sensitive(true);
                endpoint.headers.push((header.clone(), value));
            }
        }
    }
    Ok(endpoint)
}

fn flag(settings: &Table, name: &str) -> Result<bool, String> {
    match settings.get(name) {
        None => Ok(false),
        Some(Value::Boolean(value)) => Ok(*value),
        Some(_) => Err(format!("{name} is not true or false")),
    }
}

fn texts(value: &Value, name: &str) -> Result<Vec<String>, String> {
    let bad = || format!("{name} is not a text or a list of texts");
    match value {
        Value::String(text) => Ok(vec![text.clone()]),
        Value::Array(list) => list.iter().map(|item| item.as_str().map(str::to_string).ok_or_else(bad)).collect(),
        _ => Err(bad()),
    }
}

/// A file, a list of files, or a list of pairs of certificate and key.
fn client_pairs(value: &Value, dir: &Path) -> Result<Vec<(PathBuf, Option<PathBuf>)>, String> {
    let list = match value {
        Value::Array(list) => list.as_slice(),
        single => std::slice::from_ref(single),
    };
    list.iter()
        .map(|item| match texts(item, "client")?.as_slice() {
            [file] => Ok((dir.join(file), None)),
            [certificate, key] if key.is_empty() => Ok((dir.join(certificate), None)),
            [certificate, key] => Ok((dir.join(certificate), Some(dir.join(key)))),
            _ => Err("client is not a list of pairs of certificate and key".to_string()),
        })
        .collect()
}

/// Whether plain HTTP is the default for a host.
pub(crate) fn is_loopback(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => authority.split(':').next().unwrap_or_default(),
    };
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        dir
    }

    fn urls(dir: &tempfile::TempDir, host: &str) -> Vec<String> {
        endpoints(&[dir.path().to_path_buf()], host)
            .unwrap()
            .iter()
            .map(|endpoint| format!("{}://{}{}", endpoint.scheme, endpoint.authority, endpoint.prefix))
            .collect()
    }

    #[test]
    fn without_configuration_loopback_is_http_and_all_else_https() {
        let dir = tree(&[]);
        for (host, expected) in [
            ("docker.io", "https://registry-1.docker.io/v2"),
            ("registry.k8s.io", "https://registry.k8s.io/v2"),
            ("localhost:5000", "http://localhost:5000/v2"),
            ("127.1.2.3", "http://127.1.2.3/v2"),
            ("[::1]:5000", "http://[::1]:5000/v2"),
            ("10.0.0.1:5000", "https://10.0.0.1:5000/v2"),
        ] {
            assert_eq!(urls(&dir, host), [expected], "{host}");
        }
    }

    #[test]
    fn hosts_keep_their_order_and_the_server_comes_last() {
        let dir = tree(&[(
            "docker.io/hosts.toml",
            r#"
            server = "https://docker.io"
            [host."https://z.example/mirror"]
              capabilities = ["pull"]
              override_path = true
              skip_verify = true
            [host."http://a.example:5000"]
              capabilities = ["pull", "resolve"]
              [host."http://a.example:5000".header]
                x-one = "1"
                x-two = ["2", "3"]
            [host."https://m.example/v2"]
              ca = ["ca.pem", "/abs/ca.pem"]
              client = [["c.pem", "k.pem"], ["both.pem", ""]]
            "#,
        )]);
        assert_eq!(
            urls(&dir, "docker.io"),
            ["https://z.example/mirror", "http://a.example:5000/v2", "https://m.example/v2", "https://registry-1.docker.io/v2"]
        );
        let all = endpoints(&[dir.path().to_path_buf()], "docker.io").unwrap();
        assert!(all[0].pull && !all[0].resolve && all[0].tls.skip_verify && all[0].mirror);
        assert!(all[1].resolve && all[1].headers.len() == 3);
        let here = dir.path().join("docker.io");
        assert_eq!(all[2].tls.ca, [here.join("ca.pem"), PathBuf::from("/abs/ca.pem")]);
        assert_eq!(all[2].tls.client, [(here.join("c.pem"), Some(here.join("k.pem"))), (here.join("both.pem"), None)]);
        assert!(!all[3].mirror && all[3].server && !all[1].server);
    }

    #[test]
    fn folders_are_found_by_host_port_and_default() {
        let dir = tree(&[
            ("a.example_5000_/hosts.toml", "server = 'http://one'"),
            ("b.example:5000/hosts.toml", "server = 'http://two'"),
            ("_default/hosts.toml", "[host.'http://cache:1']"),
        ]);
        assert_eq!(urls(&dir, "a.example:5000"), ["http://one/v2"]);
        assert_eq!(urls(&dir, "b.example:5000"), ["http://two/v2"]);
        assert_eq!(urls(&dir, "c.example"), ["http://cache:1/v2", "https://c.example/v2"]);
        let both = tree(&[("c.example/hosts.toml", "server = 'http://first'")]);
        let found = endpoints(&[both.path().into(), dir.path().into()], "c.example").unwrap();
        assert_eq!(found[0].authority, "first");
    }

    #[test]
    fn dockers_certificate_folders_are_read() {
        let dir = tree(&[("r.example/ca.crt", ""), ("r.example/x.cert", ""), ("r.example/x.key", "")]);
        let found = endpoints(&[dir.path().into()], "r.example").unwrap();
        let here = dir.path().join("r.example");
        assert_eq!(found[0].tls.ca, [here.join("ca.crt")]);
        assert_eq!(found[0].tls.client, [(here.join("x.cert"), Some(here.join("x.key")))]);
    }

    #[test]
    fn broken_files_are_reported_by_name() {
        for text in [
            "server = ",
            "server = 1",
            "server = 'ftp://x'",
            "[host.'http://']",
            "host = 3",
            "skip_verify = 'yes'",
            "[host.'http://a b']",
        ] {
            let dir = tree(&[("r.example/hosts.toml", text)]);
            let error = endpoints(&[dir.path().into()], "r.example").unwrap_err();
            assert!(error.to_string().contains("r.example/hosts.toml"), "{text}: {error}");
        }
    }
}
