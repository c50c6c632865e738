//! Finding out about a kubeadm cluster with nothing but an address and a token: what it says is believed when the token has signed it
//! and a pin matches. Writes nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Node};
use kube::api::Api;
use tokio::time::Instant;

use crate::kubeconfig::{Credentials, Kubeconfig, Material};
use crate::token::{Pin, Token};
use crate::{Certificate, Connection, Error, Result, access, error};

/// Between two tries of discovery, and of reading the cluster's configuration: kubeadm's.
const PAUSE: Duration = Duration::from_secs(5);
const CONFIG_PAUSE: Duration = Duration::from_millis(500);
const CONFIG_PATIENCE: Duration = Duration::from_secs(60);
/// A server that takes a connection and says nothing is asked again after so long.
const ANSWER: Duration = Duration::from_secs(10);

/// How the cluster's answer is believed.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    /// One of these is the authority's; none: the token alone vouches.
    pub pins: Vec<Pin>,
}

/// What discovery knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Discovered {
    /// The server that the cluster names, which may be another one than was asked.
    pub server: String,
    /// Its authority, PEM.
    pub authority: Vec<u8>,
    /// The name that its certificate is checked against, where it is not the server's host.
    pub tls_server_name: Option<String>,
    /// An HTTP proxy on the way to it.
    pub proxy: Option<String>,
}

impl Discovered {
    /// A kubeconfig with this bearer token.
    pub fn with_token(&self, token: &Token) -> Kubeconfig {
        let user = Credentials { token: Some(token.text()), ..Credentials::default() };
        Kubeconfig { user, ..self.anonymous() }
    }

    fn anonymous(&self) -> Kubeconfig {
        Kubeconfig {
            server: self.server.clone(),
            authority: Some(Material::Inline(self.authority.clone())),
            tls_server_name: self.tls_server_name.clone(),
            skip_verify: false,
            proxy: self.proxy.clone(),
            user: Credentials::default(),
        }
    }

    /// From a kubeconfig that somebody gave, for `--discovery-file`. Who asks is not in it: a node joins by a token.
    ///
    /// # Errors
    /// When it has no authority of its own, which is what it is for, or wants no certificate checked.
    pub fn from_kubeconfig(config: &Kubeconfig, name: &str) -> Result<Discovered> {
        if config.skip_verify {
            let problem = "insecure-skip-tls-verify: a node that believes any server is not joined".to_owned();
            return Err(Error::Kubeconfig { name: name.to_owned(), problem });
        }
        if config.user != Credentials::default() {
            tracing::warn!(file = name, "its user is not used: the node joins by the token");
        }
        let authority = match &config.authority {
            Some(Material::Inline(pem)) => pem.clone(),
            Some(Material::File(path)) => std::fs::read(path).map_err(|source| Error::ReadFile { path: path.clone(), source })?,
            None => {
                let problem = "there is no certificate-authority in it".to_owned();
                return Err(Error::Kubeconfig { name: name.to_owned(), problem });
            }
        };
        access::certificates(&authority, name)?;
        let (tls_server_name, proxy) = (config.tls_server_name.clone(), config.proxy.clone());
        Ok(Discovered { server: config.server.clone(), authority, tls_server_name, proxy })
    }
}

/// Why the answer of a server is not believed.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Doubt {
    /// The controller may still sign it.
    Unsigned,
    /// It will not get better.
    Wrong(String),
}

/// The signed kubeconfig of cluster-info.
fn signed<'a>(data: &'a BTreeMap<String, String>, token: &Token) -> std::result::Result<&'a str, Doubt> {
    let wrong = |why: &str| Doubt::Wrong(why.to_owned());
    let text = data.get("kubeconfig").ok_or_else(|| wrong("cluster-info has no kubeconfig: this is not a cluster of kubeadm"))?;
    let signature = data.get(&format!("jws-kubeconfig-{}", token.id())).ok_or(Doubt::Unsigned)?;
    match *signature == token.signature(text.as_bytes()) {
        true => Ok(text),
        false => Err(wrong("the token has not signed what this server says: the token's second part is wrong, or the server is")),
    }
}

/// The authority's certificates against the pins: one match is enough.
fn pinned(authority: &[u8], pins: &[Pin]) -> std::result::Result<(), String> {
    if pins.is_empty() {
        return Ok(());
    }
    let certificates = access::certificates(authority, "cluster-info").map_err(|error| error.to_string())?;
    let found: Vec<Pin> = certificates.iter().filter_map(|der| Certificate::from_der(der)).map(|c| Pin(c.pin())).collect();
    if found.iter().any(|pin| pins.contains(pin)) {
        return Ok(());
    }
    let found: Vec<String> = found.iter().map(Pin::to_string).collect();
    Err(format!("the cluster's authority is {}, which no pin names: is this the right server?", found.join(", ")))
}

async fn cluster_info(config: Kubeconfig, agent: &str) -> std::result::Result<BTreeMap<String, String>, kube::Error> {
    let client = Connection::of(config, agent).client_within(ANSWER);
    let maps: Api<ConfigMap> = Api::namespaced(client, "kube-public");
    Ok(maps.get("cluster-info").await?.data.unwrap_or_default())
}

/// Asks a server who its cluster is. It is asked again while it does not answer or the token has not signed, until the time is over.
///
/// # Errors
/// What keeps from believing it, or from asking.
pub async fn discover(endpoint: &str, token: &Token, trust: &Trust, patience: Duration, agent: &str) -> Result<Discovered> {
    let until = Instant::now() + patience;
    loop {
        let error = match attempt(endpoint, token, trust, agent).await {
            Ok(found) => return Ok(found),
            Err((error, Finality::Final)) => return Err(error),
            Err((error, Finality::Passing)) => error,
        };
        if Instant::now() + PAUSE > until {
            return Err(error);
        }
        tracing::info!(problem = error::chain(&error), "asking the cluster again");
        tokio::time::sleep(PAUSE).await;
    }
}

/// Whether another try could help.
enum Finality {
    Final,
    Passing,
}

async fn attempt(
    endpoint: &str,
    token: &Token,
    trust: &Trust,
    agent: &str,
) -> std::result::Result<Discovered, (Error, Finality)> {
    let doubted = |problem: String| Error::Discovery { server: endpoint.to_owned(), problem };
    // A refusal too: the cluster may be in the making, and its cluster-info comes late.
    let unanswered = |source| (Error::Api { asking: "cluster-info".to_owned(), source: Box::new(source) }, Finality::Passing);
    let stranger = stranger(endpoint);
    let data = cluster_info(stranger.clone(), agent).await.map_err(unanswered)?;
    let text = signed(&data, token).map_err(|doubt| match doubt {
        Doubt::Unsigned => {
            let why = format!("the cluster knows no token {}: it is unknown, expired or not for signing", token.id());
            (doubted(why), Finality::Passing)
        }
        Doubt::Wrong(why) => (doubted(why), Finality::Final),
    })?;
    let config = Kubeconfig::parse(text, "cluster-info", std::path::Path::new("/"));
    let found = config.and_then(|config| Discovered::from_kubeconfig(&config, "cluster-info"));
    let found = found.map_err(|error| (error, Finality::Final))?;
    pinned(&found.authority, &trust.pins).map_err(|why| (doubted(why), Finality::Final))?;
    if !trust.pins.is_empty() {
        // Again from the same place, and this time its certificate counts.
        let checked = Kubeconfig { skip_verify: false, authority: Some(Material::Inline(found.authority.clone())), ..stranger };
        let again = cluster_info(checked, agent).await.map_err(unanswered)?;
        if again.get("kubeconfig").map(String::as_str) != Some(text) {
            let why = "its two answers are not the same: somebody may stand in between".to_owned();
            return Err((doubted(why), Finality::Final));
        }
    }
    Ok(found)
}

/// What the cluster wants its nodes to be.
#[derive(Clone, Debug, PartialEq)]
pub struct Cluster {
    /// KubeletConfiguration, YAML as it is there.
    pub kubelet: String,
    /// `clusterName`.
    pub name: String,
    /// `kubernetesVersion`.
    pub version: String,
    /// `networking.podSubnet`.
    pub pod_subnet: String,
    /// `networking.serviceSubnet`.
    pub service_subnet: String,
}

/// Reads the cluster's configuration with the token; tries for a minute, as kubeadm does.
///
/// # Errors
/// When it may not be read, or is not what kubeadm leaves.
pub async fn configuration(found: &Discovered, token: &Token, agent: &str) -> Result<Cluster> {
    let client = Connection::of(found.with_token(token), agent).client_within(ANSWER);
    let maps: Api<ConfigMap> = Api::namespaced(client, "kube-system");
    let cluster = value(&maps, "kubeadm-config", "ClusterConfiguration").await?;
    let kubelet = value(&maps, "kubelet-config", "kubelet").await?;
    let read: serde_json::Value = serde_yaml_ng::from_str(&cluster)
        .map_err(|error| Error::Discovery { server: found.server.clone(), problem: format!("ClusterConfiguration: {error}") })?;
    let text = |path: &str| read.pointer(path).and_then(serde_json::Value::as_str).unwrap_or_default().to_owned();
    Ok(Cluster {
        kubelet,
        name: text("/clusterName"),
        version: text("/kubernetesVersion"),
        pod_subnet: text("/networking/podSubnet"),
        service_subnet: text("/networking/serviceSubnet"),
    })
}

async fn value(maps: &Api<ConfigMap>, name: &str, key: &str) -> Result<String> {
    let until = Instant::now() + CONFIG_PATIENCE;
    loop {
        let source = match maps.get(name).await {
            Ok(map) => {
                let data = map.data.unwrap_or_default();
                return data.get(key).cloned().ok_or_else(|| Error::Discovery {
                    server: "the cluster".to_owned(),
                    problem: format!("its ConfigMap {name} has no {key}"),
                });
            }
            Err(source) => source,
        };
        if Instant::now() + CONFIG_PAUSE > until {
            return Err(Error::Api { asking: format!("ConfigMap kube-system/{name}"), source: Box::new(source) });
        }
        tokio::time::sleep(CONFIG_PAUSE).await;
    }
}

/// Whether a node of this name lives: to join by its name would take its place.
///
/// # Errors
/// When that cannot be asked.
pub async fn is_ready(found: &Discovered, token: &Token, node: &str, agent: &str) -> Result<bool> {
    let client = Connection::of(found.with_token(token), agent).client_within(ANSWER);
    let there = Api::<Node>::all(client).get_opt(node).await;
    let there = there.map_err(|source| Error::Api { asking: format!("node {node}"), source: Box::new(source) })?;
    Ok(there.as_ref().is_some_and(crate::ready::is_ready))
}

/// The server's clock, in seconds since 1970. Anybody may ask, and the answer is not trusted with anything.
///
/// # Errors
/// When it does not answer, or does not tell.
pub async fn clock(server: &str, agent: &str) -> Result<i64> {
    let stranger = stranger(server);
    let client = Connection::of(stranger, agent).client_within(ANSWER);
    let mut request = http::Request::new(kube::client::Body::empty());
    *request.uri_mut() = http::Uri::from_static("/version");
    let answer = client.send(request).await;
    let answer = answer.map_err(|source| Error::Api { asking: "its clock".to_owned(), source: Box::new(source) })?;
    let told = answer.headers().get(http::header::DATE).and_then(|value| value.to_str().ok()).and_then(read_date);
    told.ok_or_else(|| Error::Discovery { server: server.to_owned(), problem: "it does not tell its time".to_owned() })
}

/// `Sun, 06 Nov 1994 08:49:37 GMT` (RFC 9110, 5.6.7).
fn read_date(text: &str) -> Option<i64> {
    let format =
        time::macros::format_description!("[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT");
    time::PrimitiveDateTime::parse(text, format).ok().map(|time| time.assume_utc().unix_timestamp())
}

/// A server of which nothing is known but where it is.
pub(crate) fn stranger(server: &str) -> Kubeconfig {
    Kubeconfig {
        server: server.to_owned(),
        authority: None,
        tls_server_name: None,
        skip_verify: true,
        proxy: None,
        user: Credentials::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> Token {
        "abcdef.0123456789abcdef".parse().unwrap()
    }

    fn data(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn only_what_the_token_has_signed_is_believed() {
        let good = token().signature(b"text");
        let other = token().signature(b"other");
        let map = data(&[("kubeconfig", "text"), ("jws-kubeconfig-abcdef", &good)]);
        assert_eq!(signed(&map, &token()), Ok("text"));
        let map = data(&[("kubeconfig", "text"), ("jws-kubeconfig-abcdef", &other)]);
        assert!(matches!(signed(&map, &token()), Err(Doubt::Wrong(_))));
        let map = data(&[("kubeconfig", "text"), ("jws-kubeconfig-bcdefg", &good)]);
        assert_eq!(signed(&map, &token()), Err(Doubt::Unsigned));
        assert!(matches!(signed(&data(&[]), &token()), Err(Doubt::Wrong(_))));
    }

    #[test]
    fn a_discovery_file_says_the_whole_way_to_the_server() {
        let pem = rcgen::generate_simple_self_signed(vec!["ca".to_owned()]).unwrap().cert.pem();
        let file = Kubeconfig {
            authority: Some(Material::Inline(pem.into_bytes())),
            tls_server_name: Some("kubernetes".to_owned()),
            skip_verify: false,
            proxy: Some("http://proxy:3128".to_owned()),
            ..stranger("https://cp:6443")
        };
        let with_token = Discovered::from_kubeconfig(&file, "f").unwrap().with_token(&token());
        assert_eq!(Kubeconfig { user: Credentials::default(), ..with_token }, file);
        let problem = Discovered::from_kubeconfig(&Kubeconfig { skip_verify: true, ..file }, "f").unwrap_err().to_string();
        assert!(problem.contains("insecure-skip-tls-verify"), "{problem}");
    }

    #[test]
    fn dates_of_http_are_read() {
        assert_eq!(read_date("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(read_date("1994-11-06"), None);
    }

    #[test]
    fn one_pin_of_several_has_to_match_one_authority_of_several() {
        let made = |name: &str| rcgen::generate_simple_self_signed(vec![name.to_owned()]).unwrap().cert;
        let (a, b) = (made("a"), made("b"));
        let pin = |certificate: &rcgen::Certificate| Pin(Certificate::from_der(certificate.der()).unwrap().pin());
        let bundle = format!("{}{}", a.pem(), b.pem());
        assert_eq!(pinned(bundle.as_bytes(), &[]), Ok(()));
        assert_eq!(pinned(bundle.as_bytes(), &[Pin([0; 32]), pin(&b)]), Ok(()));
        let problem = pinned(a.pem().as_bytes(), &[pin(&b)]).unwrap_err();
        assert!(problem.contains(&pin(&a).to_string()), "{problem}");
    }
}
