//! The kubelet's servers over real sockets: TLS with certificates and tokens, permissions, logs, joined streams, refusals.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod support;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use berth_kubelet::auth::{Attributes, Review, Reviewer, User};
use berth_kubelet::{Authentication, Authorization, Config, ServerConfig, TlsConfig};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject};
use support::Node;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;

/// A port that was free a moment ago.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new(name: &str) -> Authority {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Authority(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// A certificate and its key, in PEM.
    fn issue(&self, name: &str, group: &str, usage: ExtendedKeyUsagePurpose) -> (String, String) {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.distinguished_name.push(DnType::OrganizationName, group);
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem())
    }

    fn client(&self, name: &str) -> Option<(String, String)> {
        Some(self.issue(name, "system:masters", ExtendedKeyUsagePurpose::ClientAuth))
    }
}

/// An API server's answers: token `good` is of `prometheus`, who may everything but `proxy`; `admin` may everything.
#[derive(Debug, Default)]
struct Answers(Mutex<Vec<String>>);

impl Reviewer for Answers {
    fn token<'a>(&'a self, token: &'a str) -> Review<'a, Option<User>> {
        self.0.lock().unwrap().push(format!("token {token}"));
        let user = User { name: "prometheus".into(), ..User::default() };
        Box::pin(std::future::ready(Ok((token == "good").then_some(user))))
    }

    fn access<'a>(&'a self, user: &'a User, wanted: &'a Attributes) -> Review<'a, bool> {
        self.0.lock().unwrap().push(format!("{} {} {}", user.name, wanted.verb, wanted.subresource));
        Box::pin(std::future::ready(Ok(user.name == "admin" || wanted.subresource != "proxy")))
    }
}

fn client_config(identity: Option<&(String, String)>) -> Arc<rustls::ClientConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions().unwrap();
    let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(support::AnyCertificate(provider)));
    Arc::new(match identity {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => {
            let chain = CertificateDer::pem_slice_iter(cert.as_bytes()).map(Result::unwrap).collect();
            builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap()).unwrap()
        }
    })
}

type Tls = tokio_rustls::client::TlsStream<TcpStream>;

async fn dial(port: u16, identity: Option<&(String, String)>) -> Tls {
    let limit = std::time::Instant::now() + Duration::from_secs(30);
    loop {
        match TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))).await {
            Ok(stream) => {
                let name = ServerName::try_from("localhost").unwrap();
                return TlsConnector::from(client_config(identity)).connect(name, stream).await.unwrap();
            }
            Err(error) => assert!(std::time::Instant::now() < limit, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn ask<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, method: &str, path: &str, headers: &str) -> (u16, String) {
    let request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut answer)).await.unwrap();
    support::parse_answer(&answer)
}

/// Asks for the pods and keeps the connection; the status line of the answer, whose body is read.
async fn ask_again(stream: &mut Tls) -> String {
    stream.write_all(b"GET /pods HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(tokio::time::timeout(Duration::from_secs(60), stream.read_u8()).await.unwrap().unwrap());
    }
    let head = String::from_utf8(head).unwrap().to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap();
    let mut body = vec![0; length.parse().unwrap()];
    stream.read_exact(&mut body).await.unwrap();
    head.lines().next().unwrap().to_owned()
}

async fn get(port: u16, identity: Option<&(String, String)>, path: &str, headers: &str) -> (u16, String) {
    ask(dial(port, identity).await, "GET", path, headers).await
}

async fn config(node: &Node, change: impl FnOnce(&mut ServerConfig)) -> (Config, u16) {
    let (mut config, port) = (node.config().await, free_port());
    config.server = ServerConfig {
        address: [127, 0, 0, 1].into(),
        port: Some(port),
        authentication: Authentication { anonymous: true, ..Authentication::default() },
        authorization: Authorization::AlwaysAllow,
        ..ServerConfig::default()
    };
    change(&mut config.server);
    (config, port)
}

fn write(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
}

#[tokio::test]
async fn no_certificate_is_made_for_a_server_that_is_not_asked_for() {
    let mut node = Node::new();
    let config = node.config().await;
    assert!(config.server.port.is_none() && config.server.read_only_port.is_none() && config.healthz_port.is_none());
    node.start_with(config);
    node.wait_socket().await;
    assert!(!node.path("kubelet/pki").exists(), "no certificate is made for a server that is not there");
}

#[tokio::test]
async fn a_certificate_of_the_authority_opens_the_door_and_no_other() {
    let mut node = Node::new();
    let (ours, theirs) = (Authority::new("ours"), Authority::new("theirs"));
    write(&node.path("ca.crt"), &ours.0.pem());
    let bundle = node.path("ca.crt");
    let (config, port) = config(&node, |server| {
        server.authentication = Authentication { client_ca_file: Some(bundle), ..Authentication::default() };
    })
    .await;
    node.start_with(config);
    let server_cert = Some(ours.issue("x", "y", ExtendedKeyUsagePurpose::ServerAuth));
    for (identity, expected) in [(ours.client("admin"), 200), (None, 401), (theirs.client("admin"), 401), (server_cert, 401)] {
        let (code, body) = get(port, identity.as_ref(), "/pods", "").await;
        assert_eq!(code, expected, "{body}");
        assert!(code == 200 || body == "Unauthorized", "{body}");
    }
    // One that is kept.
    let mut kept = dial(port, ours.client("admin").as_ref()).await;
    assert_eq!(ask_again(&mut kept).await, "http/1.1 200 ok");
    // The bundle changes: the next connection knows, and so does the next request.
    write(&node.path("ca.crt.new"), &theirs.0.pem());
    std::fs::rename(node.path("ca.crt.new"), node.path("ca.crt")).unwrap();
    assert_eq!(get(port, theirs.client("admin").as_ref(), "/pods", "").await.0, 200);
    assert_eq!(get(port, ours.client("admin").as_ref(), "/pods", "").await.0, 401);
    assert_eq!(ask_again(&mut kept).await, "http/1.1 401 unauthorized");
    let mut rest = Vec::new();
    let closed = tokio::time::timeout(Duration::from_secs(60), kept.read_to_end(&mut rest)).await;
    assert!(closed.is_ok(), "a stranger's connection is not kept");
    // What cannot be read changes nothing.
    write(&node.path("ca.crt"), "half a bun");
    assert_eq!(get(port, theirs.client("admin").as_ref(), "/pods", "").await.0, 200);
}

#[tokio::test]
async fn the_self_signed_certificate_is_kept_and_a_configured_one_is_reloaded() {
    let mut node = Node::new();
    let (own, port) = config(&node, |_| {}).await;
    let serving = async |port| {
        let stream = dial(port, None).await;
        stream.get_ref().1.peer_certificates().unwrap()[0].as_ref().to_vec()
    };
    node.start_with(own.clone());
    let first = serving(port).await;
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(node.path("kubelet/pki/kubelet.key")).unwrap());
    assert_eq!(mode & 0o777, 0o600);
    node.stop().await;
    node.start_with(own);
    assert_eq!(serving(port).await, first, "the same after a restart");
    node.stop().await;

    let authority = Authority::new("a");
    let install = |node: &Node| {
        let (cert, key) = authority.issue("n1", "g", ExtendedKeyUsagePurpose::ServerAuth);
        for (name, text) in [("tls.key", &key), ("tls.crt", &cert)] {
            write(&node.path(&format!("{name}.new")), text);
            std::fs::rename(node.path(&format!("{name}.new")), node.path(name)).unwrap();
        }
        CertificateDer::from_pem_slice(cert.as_bytes()).unwrap().as_ref().to_vec()
    };
    let one = install(&node);
    let tls = TlsConfig { cert_file: Some(node.path("tls.crt")), key_file: Some(node.path("tls.key")), ..TlsConfig::default() };
    let (config, port) = config(&node, |server| server.tls = tls).await;
    node.start_with(config);
    assert_eq!(serving(port).await, one);
    let two = install(&node);
    assert_eq!(serving(port).await, two, "without a restart");
}

#[tokio::test]
async fn tokens_and_permissions_are_the_api_servers_to_judge() {
    let mut node = Node::new();
    let answers = Arc::new(Answers::default());
    let ours = Authority::new("ours");
    write(&node.path("ca.crt"), &ours.0.pem());
    let (bundle, reviewer) = (node.path("ca.crt"), answers.clone());
    let (config, port) = config(&node, |server| {
        server.authentication =
            Authentication { client_ca_file: Some(bundle), webhook: Some(Authentication::WEBHOOK_TTL), anonymous: true };
        server.authorization = Authorization::WEBHOOK;
        server.reviewer = Some(reviewer);
    })
    .await;
    node.start_with(config);
    let good = "Authorization: Bearer good\r\n";
    assert_eq!(get(port, None, "/pods", good).await.0, 200);
    let forbidden = "Forbidden (user=prometheus, verb=get, resource=nodes, subresource(s)=[proxy])";
    assert_eq!(get(port, None, "/containerLogs/a/b/c", good).await, (403, forbidden.to_owned()));
    assert_eq!(get(port, None, "/pods", "Authorization: Bearer bad\r\n").await.0, 401);
    assert_eq!(get(port, None, "/healthz", "").await, (200, "ok".to_owned()));
    let admin = ours.client("admin");
    assert_eq!(get(port, admin.as_ref(), "/containerLogs/a/b/c", "").await.0, 404, "who may is told what there is");
    assert_eq!(
        ask(dial(port, admin.as_ref()).await, "POST", "/run/a/b/c?cmd=x", "").await,
        (404, "pod does not exist".to_owned())
    );
    assert_eq!(
        *answers.0.lock().unwrap(),
        [
            "token good",
            "prometheus get pods",
            "prometheus get proxy",
            "token bad",
            "system:anonymous get healthz",
            "admin get proxy",
            "admin create proxy"
        ]
    );
}

#[tokio::test]
async fn the_read_only_port_shows_and_does_nothing() {
    let mut node = Node::new();
    let port = free_port();
    let mut config = node.config().await;
    config.server.address = [127, 0, 0, 1].into();
    config.server.read_only_port = Some(port);
    node.start_with(config);
    node.wait_socket().await;
    let get = async |method, path| ask(TcpStream::connect(("127.0.0.1", port)).await.unwrap(), method, path, "").await.0;
    for path in ["/pods", "/healthz"] {
        assert_eq!(get("GET", path).await, 200, "{path}");
    }
    for path in ["/containerLogs/a/b/c", "/run/a/b/c", "/configz", "/logs/", "/runningpods/", "/problems"] {
        assert_eq!(get("GET", path).await, 404, "{path}");
    }
}

/// A runtime's streaming server: takes any upgrade, says its first word, then gives back what it gets.
async fn echo_server() -> (String, Arc<Mutex<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/exec/token", listener.local_addr().unwrap());
    let seen = Arc::new(Mutex::new(String::new()));
    let heads = seen.clone();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            let head = String::from_utf8(head).unwrap();
            let upgrade = if head.to_lowercase().contains("upgrade: spdy/3.1") { "SPDY/3.1" } else { "websocket" };
            *heads.lock().unwrap() = head;
            let answer = format!(
                "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {upgrade}\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\nhello"
            );
            stream.write_all(answer.as_bytes()).await.unwrap();
            let (mut read, mut write) = stream.split();
            let _ = tokio::io::copy(&mut read, &mut write).await;
        }
    });
    (url, seen)
}

async fn upgrade(port: u16, method: &str, path: &str, headers: &str) -> (Tls, String) {
    let mut stream = dial(port, None).await;
    let request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n{headers}\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    (stream, String::from_utf8(head).unwrap())
}

#[tokio::test]
async fn streams_are_joined_to_the_runtimes_and_nobody_is_sent_elsewhere() {
    let mut node = Node::new();
    let (url, seen) = echo_server().await;
    node.cri.lock().streaming = url;
    node.apply("web.yaml", &support::pod("web", ""));
    let (config, port) = config(&node, |_| {}).await;
    node.start_with(config);
    let pod = node.wait_pod("web-n1", "running", |p| p["status"]["phase"] == "Running").await;
    let spdy = "Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\nAuthorization: Bearer secret\r\n";
    let websocket = "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n";
    let uid = pod["metadata"]["uid"].as_str().unwrap();
    for (method, path, headers, call) in [
        (
            "POST",
            "/exec/default/web-n1/c?command=sh&command=-c&command=echo+%24HOME&input=1&output=1&tty=1&error=1".to_owned(),
            spdy,
            "Exec c/0 io-t sh -c echo $HOME",
        ),
        ("GET", format!("/exec/default/web-n1/{uid}/c?command=id&output=1&error=1"), websocket, "Exec c/0 -oe- id"),
        ("POST", "/attach/default/web-n1/c?output=1&error=1".to_owned(), spdy, "Attach c/0 -oe-"),
        ("POST", "/portForward/default/web-n1".to_owned(), spdy, "PortForward []"),
        ("GET", "/portForward/default/web-n1?port=80,81".to_owned(), websocket, "PortForward [80, 81]"),
    ] {
        let (mut stream, head) = upgrade(port, method, &path, headers).await;
        assert!(head.starts_with("HTTP/1.1 101 ") && head.to_lowercase().contains("x-stream-protocol-version: v4"), "{head}");
        stream.write_all(b" world").await.unwrap();
        let mut said = [0; 11];
        stream.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"hello world");
        assert_eq!(node.cri.calls(call).len(), 1, "{call}: {:?}", node.cri.call_names());
        let head = seen.lock().unwrap().to_lowercase();
        assert!(head.starts_with(&format!("{} /exec/token http/1.1", method.to_lowercase())), "{head}");
        assert!(!head.contains("secret"), "the runtime learns no credentials: {head}");
    }
}

#[tokio::test]
async fn what_cannot_be_streamed_is_refused_as_upstream() {
    let mut node = Node::new();
    node.apply("web.yaml", &support::pod("web", ""));
    let (config, port) = config(&node, |_| {}).await;
    node.start_with(config);
    node.wait_pod("web-n1", "running", |p| p["status"]["phase"] == "Running").await;
    for (method, path, code, text) in [
        ("POST", "/exec/default/web-n1/c?command=id", 400, "you must specify at least 1 of stdin, stdout, stderr"),
        ("POST", "/exec/default/none/c?command=id&output=1", 404, "pod does not exist"),
        ("POST", "/exec/default/web-n1/other-uid/c?command=id&output=1", 404, "pod does not exist"),
        ("POST", "/exec/default/web-n1/x?command=id&output=1", 500, "container not found (\"x\")"),
        ("POST", "/exec/default/web-n1/c?command=id&output=1", 400, "unable to upgrade"),
        ("PUT", "/exec/default/web-n1/c?command=id&output=1", 405, "405: Method Not Allowed"),
        ("GET", "/run/default/web-n1/c?cmd=id", 405, "405: Method Not Allowed"),
        ("POST", "/run/default/web-n1/c?cmd=id+-u", 200, "said"),
        ("GET", "/debug/pprof/heap", 501, "this kubelet has none"),
        ("PUT", "/debug/flags/v", 501, "verbosity"),
        ("GET", "/spec", 404, "404 page not found"),
        ("GET", "/pods/", 404, "404 page not found"),
    ] {
        let (found, body) = ask(dial(port, None).await, method, path, "").await;
        assert!(found == code && body.contains(text), "{method} {path}: {found} {body}");
    }
    assert_eq!(node.cri.calls("ExecSync c/0 id -u").len(), 1);
    node.cri.fail("ExecSync", [tonic::Status::aborted("exit code 1")]);
    let (code, body) = ask(dial(port, None).await, "POST", "/run/default/web-n1/c?cmd=false", "").await;
    assert_eq!((code, body.as_str()), (500, "command 'false' exited with 1: "));
    let (code, body) = ask(dial(port, None).await, "POST", "/checkpoint/default/web-n1/c?timeout=7", "").await;
    assert!(code == 200 && body.contains("/checkpoints/checkpoint-web-n1_default-c-"), "{body}");
    assert_eq!(node.cri.calls("CheckpointContainer c/0 7").len(), 1);
    assert_eq!(ask(dial(port, None).await, "POST", "/checkpoint/default/web-n1/x", "").await.0, 404);
}

#[tokio::test]
async fn debugging_handlers_can_be_turned_off() {
    let mut node = Node::new();
    let (config, port) = config(&node, |server| server.debugging_handlers = false).await;
    node.start_with(config);
    for path in ["/exec/a/b/c", "/containerLogs/a/b/c", "/configz", "/logs/", "/runningpods/"] {
        assert_eq!(get(port, None, path, "").await, (405, "Debug endpoints are disabled.\n".to_owned()), "{path}");
    }
    assert_eq!(get(port, None, "/pods", "").await.0, 200);
}

#[tokio::test]
async fn the_configuration_in_effect_is_shown() {
    let mut node = Node::new();
    let (config, port) = config(&node, |s| s.configz = Arc::new(serde_json::json!({"maxPods": 42}))).await;
    node.start_with(config);
    let (code, body) = get(port, None, "/configz", "").await;
    let shown: serde_json::Value = serde_json::from_str(&body).unwrap();
    assert_eq!(
        (code, &shown["kubeletconfig"]["maxPods"], &shown["kubeletconfig"]["kind"]),
        (200, &42.into(), &"KubeletConfiguration".into())
    );
}

#[tokio::test]
async fn logs_are_followed_over_http_until_the_container_ends() {
    let mut node = Node::new();
    node.apply("web.yaml", &support::pod("web", "  restartPolicy: Never\n"));
    let (config, port) = config(&node, |_| {}).await;
    node.start_with(config);
    let pod = node.wait_pod("web-n1", "running", |p| p["status"]["phase"] == "Running").await;
    let folder = node.path("logs").join(format!("default_web-n1_{}", pod["metadata"]["uid"].as_str().unwrap())).join("c");
    std::fs::create_dir_all(&folder).unwrap();
    let log = folder.join("0.log");
    let line = |n: u32| format!("2026-01-01T00:00:00.000000000Z stdout F {n}\n");
    write(&log, &line(0));
    let mut stream = dial(port, None).await;
    let path = "/containerLogs/default/web-n1/c?follow=true&tailLines=5";
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"0\n\r\n") {
        answer.push(stream.read_u8().await.unwrap());
    }
    for n in 1..4 {
        std::fs::rename(&log, folder.join(format!("0.log.20260101-00000{n}"))).unwrap();
        write(&log, &line(n));
    }
    node.cri.exit("c", 0);
    let _ = tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut answer)).await.unwrap();
    let (code, body) = support::parse_answer(&answer);
    assert_eq!((code, body.as_str()), (200, "0\n1\n2\n3\n"));
    assert_eq!(get(port, None, "/containerLogs/default/web-n1/x", "").await.0, 404);
}

/// The names of a page's families, which must each have one head and one piece.
fn families(page: &str) -> Vec<&str> {
    let heads: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let mut pieces: Vec<&str> = Vec::new();
    for line in page.lines().filter(|line| !line.starts_with('#')) {
        let name = line.split(['{', ' ']).next().unwrap();
        let of = heads
            .iter()
            .find(|head| name.strip_prefix(**head).is_some_and(|rest| ["", "_bucket", "_sum", "_count"].contains(&rest)));
        let family = of.unwrap_or_else(|| panic!("{name} has no head"));
        if pieces.last() != Some(family) {
            pieces.push(family);
        }
    }
    let mut unique = pieces.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(unique.len(), pieces.len(), "a family is in several pieces: {pieces:?}");
    heads
}

#[tokio::test]
async fn metrics_have_the_names_that_dashboards_use() {
    let mut node = Node::new();
    let probe = "    readinessProbe: {exec: {command: [ready]}, periodSeconds: 1}\n";
    node.apply(
        "web.yaml",
        &format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: web}}\nspec:\n  containers:\n  - name: c\n    image: 'img:1'\n{probe}"
        ),
    );
    let (config, port) = config(&node, |_| {}).await;
    node.start_with(config);
    node.wait_pod("web-n1", "ready", |p| p["status"]["containerStatuses"][0]["ready"] == true).await;
    let page = async |path: &str| {
        let (code, body) = get(port, None, path, "").await;
        assert_eq!(code, 200, "{path}: {body}");
        body
    };
    let own = page("/metrics").await;
    let has = families(&own);
    for name in [
        "node_name",
        "running_pods",
        "running_containers",
        "desired_pods",
        "active_pods",
        "mirror_pods",
        "cgroup_version",
        "runtime_operations_total",
        "runtime_operations_duration_seconds",
        "run_podsandbox_duration_seconds",
        "started_pods_total",
        "started_pods_errors_total",
        "started_containers_total",
        "pod_start_duration_seconds",
        "pleg_relist_duration_seconds",
        "container_log_filesystem_used_bytes",
        "orphaned_runtime_pods_total",
    ] {
        assert!(has.contains(&format!("kubelet_{name}").as_str()), "{name}: {has:?}");
    }
    for name in ["process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds", "kubernetes_build_info"] {
        assert!(has.contains(&name), "{name}");
    }
    for line in [
        "kubelet_running_pods 1",
        "kubelet_running_containers{container_state=\"running\"} 1",
        "kubelet_desired_pods{static=\"true\"} 1",
        "kubelet_started_containers_total{container_type=\"container\"} 1",
        "kubelet_runtime_operations_total{operation_type=\"run_podsandbox\"} 1",
        "kubelet_run_podsandbox_duration_seconds_count{runtime_handler=\"\"} 1",
        "kubelet_pod_start_duration_seconds_count 1",
        "kubelet_node_name{node=\"n1\"} 1",
    ] {
        assert!(own.contains(&format!("{line}\n")), "{line}\n{own}");
    }
    assert!(!own.contains("kubelet_runtime_operations_errors_total{operation_type=\"run_podsandbox\"}"), "{own}");
    assert!(page("/metrics").await.contains(
        "kubelet_http_requests_total{method=\"GET\",path=\"metrics\",server_type=\"readwrite\",long_running=\"false\"} "
    ));

    let probes = page("/metrics/probes").await;
    assert_eq!(families(&probes), ["prober_probe_total", "prober_probe_duration_seconds"]);
    assert!(probes.contains("prober_probe_total{probe_type=\"Readiness\",result=\"successful\",container=\"c\",pod=\"web-n1\",namespace=\"default\",pod_uid=\""));
    assert!(page("/metrics/slis").await.contains("kubernetes_healthcheck{name=\"syncloop\",type=\"healthz\"} 1\n"));

    let resource = page("/metrics/resource").await;
    assert_eq!(
        families(&resource),
        [
            "node_cpu_usage_seconds_total",
            "node_memory_working_set_bytes",
            "node_swap_usage_bytes",
            "container_cpu_usage_seconds_total",
            "container_memory_working_set_bytes",
            "container_start_time_seconds",
            "container_swap_usage_bytes",
            "container_swap_limit_bytes",
            "pod_cpu_usage_seconds_total",
            "pod_memory_working_set_bytes",
            "pod_swap_usage_bytes",
            "scrape_error",
            "resource_scrape_error",
        ]
    );
    let of_container = "{container=\"c\",namespace=\"default\",pod=\"web-n1\"}";
    for line in [
        format!("container_cpu_usage_seconds_total{of_container} 1.5 5000"),
        format!("container_memory_working_set_bytes{of_container} 1000 5000"),
        format!("container_swap_limit_bytes{of_container} 7 5000"),
        "pod_cpu_usage_seconds_total{namespace=\"default\",pod=\"web-n1\"} 3 5000".to_owned(),
        "scrape_error 0".to_owned(),
    ] {
        assert!(resource.contains(&format!("{line}\n")), "{line}\n{resource}");
    }

    let cadvisor = page("/metrics/cadvisor").await;
    let has = families(&cadvisor);
    for name in [
        "container_processes",
        "container_cpu_usage_seconds_total",
        "container_network_receive_bytes_total",
        "container_memory_working_set_bytes",
        "container_scrape_error",
        "machine_cpu_cores",
        "machine_memory_bytes",
        "machine_scrape_error",
        "cadvisor_version_info",
    ] {
        assert!(has.contains(&name), "{name}: {has:?}");
    }
    assert!(cadvisor.contains("container_cpu_usage_seconds_total{container=\"c\",id=\"/kubepods/c\",image=\"img:\\\"1\\\"\",namespace=\"default\",pod=\"web-n1\",name=\""), "{cadvisor}");
    assert!(cadvisor.contains(",cpu=\"total\"} 1.5 5000\n"), "precise, not the runtime's whole seconds: {cadvisor}");
}

#[tokio::test]
async fn the_summary_has_what_dashboards_read() {
    let mut node = Node::new();
    node.apply("web.yaml", "apiVersion: v1\nkind: Pod\nmetadata: {name: web}\nspec:\n  volumes: [{name: data, emptyDir: {}}]\n  containers: [{name: c, image: 'img:1', volumeMounts: [{name: data, mountPath: /d}]}]\n");
    let port = free_port();
    let mut config = node.config().await;
    config.server.address = [127, 0, 0, 1].into();
    config.server.read_only_port = Some(port);
    node.start_with(config);
    node.wait_pod("web-n1", "running", |p| p["status"]["phase"] == "Running").await;
    let get = async |path| {
        let (code, body) = ask(TcpStream::connect(("127.0.0.1", port)).await.unwrap(), "GET", path, "").await;
        assert_eq!(code, 200, "{body}");
        serde_json::from_str::<serde_json::Value>(&body).unwrap()
    };
    let summary = get("/stats/summary").await;
    for pointer in [
        "/node/nodeName",
        "/node/startTime",
        "/node/cpu/usageCoreNanoSeconds",
        "/node/memory/workingSetBytes",
        "/node/memory/availableBytes",
        "/node/memory/rssBytes",
        "/node/network/interfaces",
        "/node/fs/capacityBytes",
        "/node/fs/inodesFree",
        "/node/runtime/imageFs/usedBytes",
        "/node/runtime/containerFs/usedBytes",
        "/node/rlimit/maxpid",
        "/node/rlimit/curproc",
        "/node/swap/swapUsageBytes",
        "/node/systemContainers/0/name",
        "/pods/0/podRef/uid",
        "/pods/0/startTime",
        "/pods/0/cpu/usageNanoCores",
        "/pods/0/memory/workingSetBytes",
        "/pods/0/network/rxBytes",
        "/pods/0/network/interfaces/0/name",
        "/pods/0/process_stats/process_count",
        "/pods/0/ephemeral-storage/usedBytes",
        "/pods/0/volume/0/name",
        "/pods/0/volume/0/usedBytes",
        "/pods/0/swap/swapUsageBytes",
        "/pods/0/containers/0/name",
        "/pods/0/containers/0/startTime",
        "/pods/0/containers/0/cpu/time",
        "/pods/0/containers/0/memory/rssBytes",
        "/pods/0/containers/0/rootfs/usedBytes",
        "/pods/0/containers/0/logs/usedBytes",
        "/pods/0/containers/0/rootfs/inodesUsed",
    ] {
        assert!(summary.pointer(pointer).is_some_and(|v| !v.is_null()), "{pointer}: {summary:#}");
    }
    assert_eq!(summary["pods"][0]["containers"][0]["cpu"]["time"], "1970-01-01T00:00:05Z");
    assert_eq!(summary["node"]["runtime"]["imageFs"]["usedBytes"], 1000);
    assert_eq!(summary["pods"][0]["containers"][0]["rootfs"]["usedBytes"], 11);
    let brief = get("/stats/summary?only_cpu_and_memory=true").await;
    assert!(brief["pods"][0]["memory"].is_object() && brief["pods"][0]["network"].is_null() && brief["node"]["fs"].is_null());
}
