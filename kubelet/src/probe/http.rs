//! HTTP and HTTPS probes and hooks: one GET per look on a connection of its own, redirects on the same host followed.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::HTTPGetAction;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use super::{Verdict, tls};

const MAX_REDIRECTS: usize = 10;
const MAX_BODY: usize = 10 * 1024;

/// Where and how to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    place: Place,
    headers: Vec<(String, String)>,
    agent: &'static str,
}

/// What a redirect can change.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    tls: bool,
    address: SocketAddr,
    path: String,
}

impl Place {
    fn url(&self) -> String {
        format!("{}://{}{}", if self.tls { "https" } else { "http" }, self.address, self.path)
    }
}

struct Answer {
    status: StatusCode,
    location: Option<String>,
    body: Bytes,
}

impl Target {
    /// The target of an action at an address.
    pub(super) fn new(address: SocketAddr, get: &HTTPGetAction) -> Target {
        let path = get.path.as_deref().filter(|p| !p.is_empty()).unwrap_or("/");
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        let headers = get.http_headers.iter().flatten().map(|h| (h.name.clone(), h.value.clone())).collect();
        let tls = get.scheme.as_deref() == Some("HTTPS");
        Target { place: Place { tls, address, path }, headers, agent: "kube-probe/1.36" }
    }

    /// As a lifecycle hook asks.
    pub(super) fn of_hook(self) -> Target {
        Target { agent: "kube-lifecycle/1.36", ..self }
    }

    /// The same over plain HTTP, where it is asked over TLS.
    pub(crate) fn without_tls(&self) -> Option<Target> {
        let place = Place { tls: false, ..self.place.clone() };
        self.place.tls.then(|| Target { place, ..self.clone() })
    }

    /// Asks once, without a time limit; any answer will do.
    pub(crate) async fn ask(&self) -> Result<(), String> {
        get(self, &self.place).await.map(drop).map_err(|e| format!("Get {:?}: {e}", self.place.url()))
    }
}

/// Whether an error of [`Target::ask`] says that the server does not speak TLS.
pub(crate) fn is_plain_answer(error: &str) -> bool {
    error.ends_with(tls::PLAIN_ANSWER)
}

/// Asks once, redirects included, within the time limit.
pub(super) async fn check(target: &Target, timeout: Duration) -> Verdict {
    let ask = async {
        let mut place = target.place.clone();
        for _ in 0..=MAX_REDIRECTS {
            let answer = match get(target, &place).await {
                Err(e) => return Verdict::Failure(format!("Get {:?}: {e}", place.url())),
                Ok(answer) => answer,
            };
            // A redirect without a place to go to is an answer like any other.
            if let Some(location) = answer.location.as_deref().filter(|_| answer.status.is_redirection()) {
                match same_host(&place, location) {
                    Some(next) => place = next,
                    None => {
                        let body = String::from_utf8_lossy(&answer.body).into_owned();
                        return Verdict::Warning(format!("Probe terminated redirects, Response body: {body}"));
                    }
                }
            } else if answer.status.is_success() || answer.status.is_redirection() {
                return Verdict::Success;
            } else {
                return Verdict::Failure(format!("HTTP probe failed with statuscode: {}", answer.status.as_u16()));
            }
        }
        Verdict::Failure(format!("Get {:?}: stopped after {MAX_REDIRECTS} redirects", place.url()))
    };
    match tokio::time::timeout(timeout, ask).await {
        Ok(verdict) => verdict,
        Err(_) => Verdict::Failure(format!(
            "Get {:?}: context deadline exceeded (Client.Timeout exceeded while awaiting headers)",
            target.place.url()
        )),
    }
}

/// Where a redirect leads that stays on this host; another port or scheme of it is still the same host.
fn same_host(place: &Place, location: &str) -> Option<Place> {
    if location.starts_with("//") || location.contains("://") {
        let text = if location.starts_with("//") { format!("{}:{location}", place.scheme()) } else { location.to_owned() };
        let uri: Uri = text.parse().ok()?;
        let tls = match uri.scheme_str()? {
            "http" => false,
            "https" => true,
            _ => return None,
        };
        let host = uri.host()?.trim_start_matches('[').trim_end_matches(']');
        let same = host.parse() == Ok(place.address.ip());
        let port = uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
        let path = uri.path_and_query().map_or("/", |p| p.as_str()).to_owned();
        return same.then(|| Place { tls, address: SocketAddr::new(place.address.ip(), port), path });
    }
    let path = if location.starts_with('/') {
        location.to_owned()
    } else {
        let folder = place.path.split('?').next().unwrap_or("/");
        format!("{}/{location}", folder.rsplit_once('/').map_or("", |(folder, _)| folder))
    };
    Some(Place { path, ..place.clone() })
}

impl Place {
    fn scheme(&self) -> &'static str {
        if self.tls { "https" } else { "http" }
    }
}

async fn get(target: &Target, place: &Place) -> Result<Answer, String> {
    let address = place.address;
    let stream = TcpStream::connect(address).await.map_err(|e| format!("dial tcp {address}: {e}"))?;
    if place.tls {
        exchange(tls::connect(stream, address.ip()).await?, target, place).await
    } else {
        exchange(stream, target, place).await
    }
}

async fn exchange<S>(stream: S, target: &Target, place: &Place) -> Result<Answer, String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| text(&e))?;
    let request = request(target, place)?;
    let exchange = async {
        let response = sender.send_request(request).await.map_err(|e| text(&e))?;
        let status = response.status();
        let location = response.headers().get(header::LOCATION).and_then(|l| l.to_str().ok()).map(str::to_owned);
        // A body that is too long or broken off does not change the verdict.
        let body = Limited::new(response.into_body(), MAX_BODY).collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        Ok(Answer { status, location, body })
    };
    // The connection only has to be driven: how it ended is told by the exchange.
    let drive = async {
        let _ = connection.await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        answer = exchange => answer,
        () = drive => Err("EOF".to_owned()),
    }
}

fn request(target: &Target, place: &Place) -> Result<Request<Empty<Bytes>>, String> {
    let mut builder = Request::get(place.path.as_str()).header(header::CONNECTION, "close");
    let own = |name: &str| target.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name));
    let host = own("Host").map_or_else(|| place.address.to_string(), |(_, value)| value.clone());
    builder = builder.header(header::HOST, host);
    for (name, default) in [("User-Agent", target.agent), ("Accept", "*/*")] {
        if own(name).is_none() {
            builder = builder.header(name, default);
        }
    }
    for (name, value) in &target.headers {
        let removed = value.is_empty() && ["User-Agent", "Accept"].iter().any(|n| n.eq_ignore_ascii_case(name));
        if !removed && !name.eq_ignore_ascii_case("Host") {
            builder = builder.header(name.as_str(), value.as_str());
        }
    }
    builder.body(Empty::new()).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::HTTPHeader;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// Answers each connection by the path that was asked for; gives the requests back.
    async fn server(
        answers: &'static [(&'static str, &'static str)],
    ) -> (SocketAddr, tokio::sync::mpsc::UnboundedReceiver<String>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut request = vec![0; 4096];
                let n = stream.read(&mut request).await.unwrap();
                let request = String::from_utf8_lossy(&request[..n]).into_owned();
                let path = request.split(' ').nth(1).unwrap().to_owned();
                sender.send(request).unwrap();
                let head = answers.iter().find(|(p, _)| *p == path).map_or("404 Not Found\r\n", |(_, a)| a);
                stream.write_all(format!("HTTP/1.1 {head}Content-Length: 2\r\n\r\nhi").as_bytes()).await.unwrap();
            }
        });
        (address, receiver)
    }

    fn target(address: SocketAddr, path: &str, headers: &[(&str, &str)]) -> Target {
        let headers = headers.iter().map(|(n, v)| HTTPHeader { name: (*n).into(), value: (*v).into() }).collect();
        let get = HTTPGetAction { path: Some(path.into()), http_headers: Some(headers), ..HTTPGetAction::default() };
        Target::new(address, &get)
    }

    #[tokio::test]
    async fn statuses_and_redirects_decide() {
        let (address, _requests) = server(&[
            ("/ok", "204 No Content\r\n"),
            ("/bad", "500 Oops\r\n"),
            ("/to-ok", "302 Found\r\nLocation: /ok\r\n"),
            ("/to-bad", "302 Found\r\nLocation: /bad\r\n"),
            ("/nowhere", "304 Not Modified\r\n"),
            ("/dir/relative", "302 Found\r\nLocation: ok\r\n"),
            ("/dir/ok", "200 OK\r\n"),
            ("/away", "302 Found\r\nLocation: http://elsewhere.invalid/\r\n"),
            ("/round", "302 Found\r\nLocation: /round\r\n"),
        ])
        .await;
        let failed = |code: u16| Verdict::Failure(format!("HTTP probe failed with statuscode: {code}"));
        for (path, verdict) in [
            ("/ok", Verdict::Success),
            ("/bad", failed(500)),
            ("/none", failed(404)),
            ("/to-ok", Verdict::Success),
            ("/to-bad", failed(500)),
            ("/away", Verdict::Warning("Probe terminated redirects, Response body: hi".into())),
            ("/nowhere", Verdict::Success),
            ("/dir/relative", Verdict::Success),
        ] {
            assert_eq!(check(&target(address, path, &[]), Duration::from_secs(5)).await, verdict, "{path}");
        }
        let Verdict::Failure(why) = check(&target(address, "/round", &[]), Duration::from_secs(5)).await else { panic!() };
        assert!(why.ends_with("stopped after 10 redirects"), "{why}");
    }

    #[tokio::test]
    async fn headers_are_the_probes_own() {
        let (address, mut requests) = server(&[]).await;
        check(&target(address, "x?a=b", &[("X-A", "1"), ("host", "me"), ("accept", "")]), Duration::from_secs(5)).await;
        let request = requests.recv().await.unwrap().to_lowercase();
        assert!(request.starts_with("get /x?a=b http/1.1\r\n"), "{request}");
        for (line, there) in
            [("host: me\r\n", true), ("x-a: 1\r\n", true), ("user-agent: kube-probe/1.36\r\n", true), ("accept:", false)]
        {
            assert_eq!(request.contains(line), there, "{line} in {request}");
        }
    }

    #[tokio::test]
    async fn silence_and_refusal_are_failures() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let Verdict::Failure(why) = check(&target(address, "/", &[]), Duration::from_millis(50)).await else { panic!() };
        assert!(why.contains("context deadline exceeded"), "{why}");
        drop(listener);
        let Verdict::Failure(why) = check(&target(address, "/", &[]), Duration::from_secs(5)).await else { panic!() };
        assert!(why.contains("onnection refused"), "{why}");
    }

    /// A server with a certificate that nobody has signed; says which address it has.
    async fn tls_server() -> SocketAddr {
        use rustls::pki_types::PrivatePkcs8KeyDer;
        let made = rcgen::generate_simple_self_signed(vec!["elsewhere.invalid".to_owned()]).unwrap();
        let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()).into();
        let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let config = builder.with_no_client_auth().with_single_cert(vec![made.cert.der().clone()], key).unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(mut stream) = acceptor.accept(stream).await else { continue };
                let _ = stream.read(&mut [0; 4096]).await.unwrap();
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi").await.unwrap();
                let _ = stream.shutdown().await;
            }
        });
        address
    }

    #[tokio::test]
    async fn tls_is_spoken_whatever_the_certificate_says() {
        let get = HTTPGetAction { scheme: Some("HTTPS".into()), ..HTTPGetAction::default() };
        let target = Target::new(tls_server().await, &get);
        assert_eq!(check(&target, Duration::from_secs(20)).await, Verdict::Success);
        let (plain, _requests) = server(&[("/", "200 OK\r\n")]).await;
        let target = Target::new(plain, &get);
        let error = target.ask().await.unwrap_err();
        assert!(is_plain_answer(&error), "{error}");
        assert_eq!(target.without_tls().unwrap().ask().await, Ok(()));
    }
}
