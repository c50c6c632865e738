//! HTTP probes: one GET per look on a connection of its own, redirects on the same host followed.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::HTTPGetAction;
use tokio::net::TcpStream;

use super::Verdict;

const MAX_REDIRECTS: usize = 10;
const MAX_BODY: usize = 10 * 1024;

/// Where and how to ask.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    address: SocketAddr,
    path: String,
    headers: Vec<(String, String)>,
    agent: &'static str,
}

impl Target {
    /// The target of an action at an address.
    pub(super) fn new(address: SocketAddr, get: &HTTPGetAction) -> Target {
        let path = get.path.as_deref().filter(|p| !p.is_empty()).unwrap_or("/");
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        let headers = get.http_headers.iter().flatten().map(|h| (h.name.clone(), h.value.clone())).collect();
        Target { address, path, headers, agent: "kube-probe/1.36" }
    }

    /// As a lifecycle hook asks.
    pub(super) fn of_hook(self) -> Target {
        Target { agent: "kube-lifecycle/1.36", ..self }
    }

    /// Asks once, without a time limit; any answer will do.
    pub(crate) async fn ask(&self) -> Result<(), String> {
        get(self, &self.path).await.map(drop)
    }
}

/// Asks once, redirects included, within the time limit.
pub(super) async fn check(target: &Target, timeout: Duration) -> Verdict {
    let url = |path: &str| format!("http://{}{path}", target.address);
    let ask = async {
        let mut path = target.path.clone();
        for _ in 0..=MAX_REDIRECTS {
            match get(target, &path).await {
                Err(e) => return Verdict::Failure(format!("Get {:?}: {e}", url(&path))),
                Ok((status, location)) if status.is_redirection() => match same_host(target, location.as_deref()) {
                    Some(next) => path = next,
                    // Somewhere else, or nowhere: the answer itself is good enough.
                    None => return Verdict::Success,
                },
                Ok((status, _)) if status.is_success() => return Verdict::Success,
                Ok((status, _)) => {
                    return Verdict::Failure(format!("HTTP probe failed with statuscode: {}", status.as_u16()));
                }
            }
        }
        Verdict::Failure(format!("Get {:?}: stopped after {MAX_REDIRECTS} redirects", url(&path)))
    };
    match tokio::time::timeout(timeout, ask).await {
        Ok(verdict) => verdict,
        Err(_) => Verdict::Failure(format!(
            "Get {:?}: context deadline exceeded (Client.Timeout exceeded while awaiting headers)",
            url(&target.path)
        )),
    }
}

/// The path of a redirect that stays on this host.
fn same_host(target: &Target, location: Option<&str>) -> Option<String> {
    let location = location?;
    if location.starts_with('/') && !location.starts_with("//") {
        return Some(location.to_owned());
    }
    let uri: Uri = location.parse().ok()?;
    let same = uri.scheme_str() == Some("http") && uri.authority()?.as_str() == target.address.to_string();
    same.then(|| uri.path_and_query().map_or("/", |p| p.as_str()).to_owned())
}

async fn get(target: &Target, path: &str) -> Result<(StatusCode, Option<String>), String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let stream = TcpStream::connect(target.address).await.map_err(|e| format!("dial tcp {}: {e}", target.address))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| text(&e))?;
    let request = request(target, path)?;
    let exchange = async {
        let response = sender.send_request(request).await.map_err(|e| text(&e))?;
        let status = response.status();
        let location = response.headers().get(header::LOCATION).and_then(|l| l.to_str().ok()).map(str::to_owned);
        // A body that is too long or broken off does not change the verdict.
        let _ = Limited::new(response.into_body(), MAX_BODY).collect().await;
        Ok((status, location))
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

fn request(target: &Target, path: &str) -> Result<Request<Empty<Bytes>>, String> {
    let mut builder = Request::get(path).header(header::CONNECTION, "close");
    let own = |name: &str| target.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name));
    let host = own("Host").map_or_else(|| target.address.to_string(), |(_, value)| value.clone());
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
            ("/away", Verdict::Success),
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
}
