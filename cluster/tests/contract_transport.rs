//! The transport against a TLS server that tells what it sees: identities that are exchanged, connections that are given up.
#![allow(clippy::unwrap_used)]

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use berth_cluster::kubeconfig::{Credentials, Material};
use berth_cluster::{Certificate, Connection, Kubeconfig, Limit, Limits, Pings};
use bytes::Bytes;
use futures::StreamExt;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::pki_types::PrivateKeyDer;
use rustls::server::WebPkiClientVerifier;
use serde_json::{Value, json};

const AGENT: &str = "berth/test kubelet";

type Issuer = CertifiedIssuer<'static, KeyPair>;

fn authority() -> Issuer {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "kubernetes");
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

fn issued(issuer: &Issuer, name: &str, hosts: &[&str]) -> (rcgen::Certificate, KeyPair) {
    let mut params = CertificateParams::new(hosts.iter().map(|h| (*h).to_owned()).collect::<Vec<_>>()).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    let key = KeyPair::generate().unwrap();
    (params.signed_by(&key, issuer).unwrap(), key)
}

/// A server of HTTP/2 over TLS that wants a certificate. `/hang` has no answer and `/watch` no end; everything else tells who asked,
/// over which connection, and how.
struct Server {
    issuer: Issuer,
    address: std::net::SocketAddr,
    connections: Arc<AtomicUsize>,
}

impl Server {
    async fn start() -> Server {
        let issuer = authority();
        let (certificate, key) = issued(&issuer, "server", &["127.0.0.1"]);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(issuer.der().clone()).unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build().unwrap();
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(vec![certificate.der().clone()], PrivateKeyDer::try_from(key.serialize_der()).unwrap())
            .unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::new(AtomicUsize::new(0));
        let count = connections.clone();
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                let (acceptor, count) = (acceptor.clone(), count.clone());
                tokio::spawn(async move {
                    let Ok(tls) = acceptor.accept(tcp).await else { return };
                    let shown = tls.get_ref().1.peer_certificates().unwrap()[0].clone();
                    let who = Certificate::from_der(&shown).unwrap().common_name;
                    let number = count.fetch_add(1, Ordering::SeqCst) + 1;
                    let service = service_fn(move |request| answer(request, who.clone(), number));
                    let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                    let _ = server.serve_connection(TokioIo::new(tls), service).await;
                });
            }
        });
        Server { issuer, address, connections }
    }

    /// Writes a kubeconfig and the pair that it names.
    fn write(&self, folder: &Path, name: &str) -> PathBuf {
        let pair = folder.join("pair.pem");
        let (certificate, key) = issued(&self.issuer, name, &[]);
        std::fs::write(folder.join("new"), format!("{}{}", certificate.pem(), key.serialize_pem())).unwrap();
        std::fs::rename(folder.join("new"), &pair).unwrap();
        let pair = Some(Material::File(pair));
        let config = Kubeconfig {
            server: format!("https://{}/below", self.address),
            authority: Some(Material::Inline(self.issuer.pem().into_bytes())),
            tls_server_name: None,
            skip_verify: false,
            proxy: None,
            user: Credentials { certificate: pair.clone(), key: pair, token: Some("t0".into()), token_file: None },
        };
        let path = folder.join("kubeconfig");
        std::fs::write(folder.join("new"), config.render("c", "u", "x")).unwrap();
        std::fs::rename(folder.join("new"), &path).unwrap();
        path
    }
}

async fn answer(
    request: Request<Incoming>,
    who: String,
    number: usize,
) -> Result<Response<BoxBody<Bytes, Infallible>>, Infallible> {
    let header = |name: &str| request.headers().get(name).map(|v| v.to_str().unwrap().to_owned());
    let seen = json!({"who": who, "connection": number, "path": request.uri().path(),
        "token": header("authorization"), "agent": header("user-agent")});
    let first = Full::new(Bytes::from(seen.to_string()));
    if request.uri().path().ends_with("/hang") {
        std::future::pending::<()>().await;
    }
    if request.uri().path().ends_with("/watch") {
        let frame = futures::stream::iter([Ok(hyper::body::Frame::data(Bytes::from(seen.to_string())))]);
        let endless = frame.chain(futures::stream::pending());
        return Ok(Response::new(BodyExt::boxed(http_body_util::StreamBody::new(endless))));
    }
    Ok(Response::new(first.boxed()))
}

async fn ask(client: &kube::Client, path: &str) -> Result<Value, kube::Error> {
    client.request::<Value>(Request::get(path).body(Vec::new()).unwrap()).await
}

/// A watch of which the beginning has come.
async fn watch(client: &kube::Client) -> kube::client::Body {
    let request = Request::get("/watch").body(kube::client::Body::empty()).unwrap();
    let mut body = client.send(request).await.unwrap().into_body();
    body.frame().await.unwrap().unwrap();
    body
}

#[tokio::test]
async fn a_changed_certificate_ends_the_old_connections_and_is_shown_on_the_new_one() {
    let (server, folder) = (Server::start().await, tempfile::tempdir().unwrap());
    let connection = Connection::of_file(server.write(folder.path(), "system:node:a"), AGENT);
    let client = connection.client(Limit::NONE);
    let seen = ask(&client, "/api/v1/nodes").await.unwrap();
    let expected =
        json!({"who": "system:node:a", "connection": 1, "path": "/below/api/v1/nodes", "token": "Bearer t0", "agent": AGENT});
    assert_eq!(seen, expected);
    let mut body = watch(&client).await;
    server.write(folder.path(), "system:node:b");
    connection.refresh();
    let seen = ask(&client, "/api").await.unwrap();
    assert_eq!((&seen["who"], &seen["connection"]), (&json!("system:node:b"), &json!(2)));
    let ended = tokio::time::timeout(Duration::from_secs(10), body.frame()).await.expect("the old connection is closed");
    assert!(ended.is_none_or(|frame| frame.is_err()));
    // Who writes the files need not tell: they are looked at with a request, a second later at most.
    server.write(folder.path(), "system:node:c");
    let mut who = Value::Null;
    for _ in 0..200 {
        who = ask(&client, "/api").await.unwrap()["who"].clone();
        if who == "system:node:c" {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(who, "system:node:c");
}

#[tokio::test]
async fn requests_fail_until_there_is_a_kubeconfig_and_unusable_files_change_nothing() {
    let (server, folder) = (Server::start().await, tempfile::tempdir().unwrap());
    let connection = Connection::of_file(folder.path().join("kubeconfig"), AGENT);
    let client = connection.client(Limit::NONE);
    let error = ask(&client, "/api").await.unwrap_err().to_string();
    assert!(error.contains("no credentials for the API server yet"), "{error}");
    server.write(folder.path(), "system:node:a");
    assert_eq!(ask(&client, "/api").await.unwrap()["who"], "system:node:a");
    std::fs::write(folder.path().join("pair.pem"), "half a certi").unwrap();
    connection.refresh();
    assert_eq!(ask(&client, "/api").await.unwrap()["connection"], 1, "the old identity stays");
}

#[tokio::test]
async fn more_watches_than_a_connection_carries_get_another_one() {
    let (server, folder) = (Server::start().await, tempfile::tempdir().unwrap());
    let connection = Connection::of_file(server.write(folder.path(), "system:node:a"), AGENT);
    let client = connection.client(Limit::NONE);
    let mut open = Vec::new();
    for _ in 0..120 {
        open.push(watch(&client).await);
    }
    assert_eq!(ask(&client, "/api").await.unwrap()["connection"], 2);
    assert_eq!(server.connections.load(Ordering::SeqCst), 2);
    drop(open);
    assert_eq!(ask(&client, "/api").await.unwrap()["connection"], 1);
}

#[tokio::test]
async fn two_heartbeats_without_an_answer_get_a_new_connection() {
    let (server, folder) = (Server::start().await, tempfile::tempdir().unwrap());
    let connection = Connection::of_file(server.write(folder.path(), "system:node:a"), AGENT);
    let clients = connection.clients(Limits { heartbeat: Duration::from_secs(2), ..Limits::default() });
    let number = async || ask(&clients.heartbeats, "/api").await.unwrap()["connection"].clone();
    assert_eq!(number().await, 1);
    let mut body = watch(&clients.ordinary).await;
    for expected in [1, 3] {
        assert!(ask(&clients.heartbeats, "/hang").await.is_err());
        if expected == 1 {
            // One is not enough, and an answer in between begins the count anew.
            assert_eq!(number().await, 1);
            assert!(ask(&clients.heartbeats, "/hang").await.is_err());
        } else {
            assert_eq!(number().await, 3);
        }
    }
    let still = tokio::time::timeout(Duration::from_millis(50), body.frame()).await;
    assert!(still.is_err(), "a watch that is under way goes on");
}

#[tokio::test]
async fn a_proxy_is_asked_for_the_servers_address_and_sees_no_more() {
    let (server, folder) = (Server::start().await, tempfile::tempdir().unwrap());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = listener.local_addr().unwrap();
    let wanted = server.address;
    let asked = tokio::spawn(async move {
        use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
        let mut from = BufReader::new(listener.accept().await.unwrap().0);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            from.read_line(&mut head).await.unwrap();
        }
        let mut to = tokio::net::TcpStream::connect(wanted).await.unwrap();
        from.write_all(b"HTTP/1.1 200 yes\r\n\r\n").await.unwrap();
        tokio::spawn(async move { tokio::io::copy_bidirectional(&mut from, &mut to).await });
        head
    });
    let path = server.write(folder.path(), "system:node:a");
    let config = Kubeconfig { proxy: Some(format!("http://{proxy}")), ..Kubeconfig::load(&path).unwrap() };
    assert_eq!(ask(&Connection::of(config, AGENT).client(Limit::NONE), "/api").await.unwrap()["who"], "system:node:a");
    assert_eq!(asked.await.unwrap(), format!("CONNECT {wanted} HTTP/1.1\r\nHost: {wanted}\r\n\r\n"));
}

#[tokio::test]
async fn a_server_with_another_authority_is_not_believed() {
    let (server, other, folder) = (Server::start().await, Server::start().await, tempfile::tempdir().unwrap());
    let path = server.write(folder.path(), "system:node:a");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace(&server.address.to_string(), &other.address.to_string())).unwrap();
    let error = ask(&Connection::of_file(path, AGENT).client(Limit::NONE), "/api").await.unwrap_err();
    assert!(format!("{error:?}").contains("UnknownIssuer") || format!("{error:?}").contains("BadSignature"), "{error:?}");
}

/// A way to the server on which nothing comes through any more once `dead` is set, and nobody is told.
async fn way_that_dies(server: &Server) -> (std::net::SocketAddr, Arc<std::sync::atomic::AtomicBool>) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, wanted, dead) =
        (listener.local_addr().unwrap(), server.address, Arc::<std::sync::atomic::AtomicBool>::default());
    let is_dead = dead.clone();
    tokio::spawn(async move {
        while let Ok((from, _)) = listener.accept().await {
            let (from, to) = (from.into_split(), tokio::net::TcpStream::connect(wanted).await.unwrap().into_split());
            let was_dead = is_dead.load(Ordering::SeqCst);
            for (mut from, mut to) in [(from.0, to.1), (to.0, from.1)] {
                let is_dead = is_dead.clone();
                tokio::spawn(async move {
                    let mut bytes = vec![0; 4096];
                    // What is read of a dead way is swallowed; a way that is made later works.
                    while let Ok(length @ 1..) = from.read(&mut bytes).await {
                        if is_dead.load(Ordering::SeqCst) == was_dead && to.write_all(&bytes[..length]).await.is_err() {
                            return;
                        }
                    }
                });
            }
        }
    });
    (address, dead)
}

#[tokio::test]
async fn a_watch_over_a_dead_connection_ends_by_pings_and_the_next_one_goes_another_way() {
    assert_eq!(Pings::default(), Pings { after: Duration::from_secs(30), answer: Duration::from_secs(15) });
    let (server, folder) = (Server::start().await, tempfile::tempdir().unwrap());
    let (way, dead) = way_that_dies(&server).await;
    let path = server.write(folder.path(), "system:node:a");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace(&server.address.to_string(), &way.to_string())).unwrap();
    let pings = Pings { after: Duration::from_millis(200), answer: Duration::from_secs(2) };
    let client = Connection::pinged(path, AGENT, pings).client(Limit::NONE);
    let mut body = watch(&client).await;
    let still = tokio::time::timeout(Duration::from_secs(1), body.frame()).await;
    assert!(still.is_err(), "a watch on which nothing happens lives");
    dead.store(true, Ordering::SeqCst);
    let ended = tokio::time::timeout(Duration::from_secs(10), body.frame()).await.expect("the dead connection is noticed");
    assert!(ended.is_none_or(|frame| frame.is_err()));
    assert_eq!(ask(&client, "/api").await.unwrap()["connection"], 2);
}
