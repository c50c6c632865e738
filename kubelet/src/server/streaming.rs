//! exec, attach and port-forward: the runtime is asked for a URL, and the client's upgraded connection is joined to it byte
//! for byte, SPDY as well as WebSocket. Speaks neither; the client is never sent elsewhere.

use std::net::{IpAddr, SocketAddr};

use berth_cri_api::v1 as cri;
use bytes::Bytes;
use http::header::{self, HeaderValue};
use http::{Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use super::query::{self, flag};
use super::{Api, Body, lookup, text};
use crate::pod;

/// What a runtime says instead of upgrading is passed on up to this size.
const REFUSAL_BYTES: usize = 64 * 1024;

/// `/exec/…`.
pub(super) async fn exec(api: &Api, asked: &lookup::Asked<'_>, request: Request<Incoming>) -> Response<Body> {
    let pairs = query::pairs(request.uri().query());
    let streams = match Streams::of(&pairs) {
        Ok(streams) => streams,
        Err(refused) => return *refused,
    };
    let cmd = pairs.iter().filter(|(name, _)| name == "command").map(|(_, value)| value.clone()).collect();
    let (_, container) = match asked.running(api).await {
        Ok(found) => found,
        Err(refused) => return *refused,
    };
    let Streams { stdin, stdout, stderr, tty } = streams;
    let call = cri::ExecRequest { container_id: container.id, cmd, tty, stdin, stdout, stderr };
    join(api, api.runtime.exec_url(call).await, request).await
}

/// `/attach/…`. Whether there is a terminal is the container's matter.
pub(super) async fn attach(api: &Api, asked: &lookup::Asked<'_>, request: Request<Incoming>) -> Response<Body> {
    let streams = match Streams::of(&query::pairs(request.uri().query())) {
        Ok(streams) => streams,
        Err(refused) => return *refused,
    };
    let (pod, container) = match asked.running(api).await {
        Ok(found) => found,
        Err(refused) => return *refused,
    };
    let tty = pod::container(&pod, asked.container).is_some_and(|c| c.tty == Some(true));
    let Streams { stdin, stdout, stderr, .. } = streams;
    let call = cri::AttachRequest { container_id: container.id, stdin, tty, stdout, stderr: stderr && !tty };
    join(api, api.runtime.attach_url(call).await, request).await
}

/// `/portForward/…`. The ports are named on the connection, or in the query by old WebSocket clients.
pub(super) async fn port_forward(api: &Api, pod: &Pod, request: Request<Incoming>) -> Response<Body> {
    let pairs = query::pairs(request.uri().query());
    let ports: Result<Vec<i32>, _> =
        pairs.iter().filter(|(n, _)| n == "port").flat_map(|(_, v)| v.split(',')).map(str::parse).collect();
    let Ok(port) = ports else { return text(StatusCode::BAD_REQUEST, "query parameter \"port\" is not a number\n") };
    let sandboxes = match api.runtime.list_pod_sandboxes(pod.metadata.uid.as_deref()).await {
        Ok(sandboxes) => sandboxes,
        Err(error) => return text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    };
    let ready = sandboxes.into_iter().filter(|s| s.state() == cri::PodSandboxState::SandboxReady);
    let Some(sandbox) = ready.max_by_key(|s| s.created_at) else {
        return text(StatusCode::INTERNAL_SERVER_ERROR, format!("pod {:?} has no running sandbox\n", pod::name(pod)));
    };
    let call = cri::PortForwardRequest { pod_sandbox_id: sandbox.id, port };
    join(api, api.runtime.port_forward_url(call).await, request).await
}

#[derive(Debug, PartialEq, Eq)]
struct Streams {
    stdin: bool,
    stdout: bool,
    stderr: bool,
    tty: bool,
}

impl Streams {
    /// A terminal has one output: its errors are there too.
    fn of(pairs: &[(String, String)]) -> Result<Streams, Box<Response<Body>>> {
        let tty = flag(pairs, "tty");
        let streams =
            Streams { stdin: flag(pairs, "input"), stdout: flag(pairs, "output"), stderr: flag(pairs, "error") && !tty, tty };
        if !streams.stdin && !streams.stdout && !streams.stderr {
            let problem = "you must specify at least 1 of stdin, stdout, stderr";
            return Err(Box::new(text(StatusCode::BAD_REQUEST, problem)));
        }
        Ok(streams)
    }
}

async fn join(api: &Api, url: crate::Result<String>, request: Request<Incoming>) -> Response<Body> {
    let joined = match url {
        Ok(url) => tunnel(&url, request, api.stop.clone()).await,
        Err(error) => Err((StatusCode::INTERNAL_SERVER_ERROR, error.to_string())),
    };
    joined.unwrap_or_else(|(status, problem)| text(status, problem))
}

/// Headers that are between the client and the kubelet, or say who the client is.
fn is_private(name: &header::HeaderName) -> bool {
    [header::AUTHORIZATION, header::COOKIE, header::HOST, header::CONTENT_LENGTH].contains(name)
}

/// Asks the runtime to upgrade as the client asked us, and joins the two.
async fn tunnel(
    url: &str,
    mut request: Request<Incoming>,
    stop: CancellationToken,
) -> Result<Response<Body>, (StatusCode, String)> {
    if !request.headers().contains_key(header::UPGRADE) {
        return Err((StatusCode::BAD_REQUEST, "unable to upgrade: SPDY/3.1 or websocket is needed\n".to_owned()));
    }
    let failed = |what: &str, why: &dyn std::fmt::Display| {
        (StatusCode::INTERNAL_SERVER_ERROR, format!("{what} of the runtime's streaming server: {why}\n"))
    };
    let target: Uri = url.parse().map_err(|e| failed("address", &e))?;
    let authority = match (target.scheme_str(), target.authority()) {
        (Some("http"), Some(authority)) => authority.clone(),
        _ => return Err(failed("address", &format!("{url:?}: only http:// is spoken with a runtime"))),
    };
    // An address, never a name: a static binary resolves none by the C library.
    let host = authority.host().trim_matches(['[', ']']).replace("localhost", "127.0.0.1");
    let host: IpAddr = host.parse().map_err(|e| failed("address", &e))?;
    let address = SocketAddr::new(host, authority.port_u16().unwrap_or(80));
    let stream = TcpStream::connect(address).await.map_err(|e| failed("connection", &e))?;
    let _ = stream.set_nodelay(true);
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|e| failed("connection", &e))?;
    tokio::spawn(connection.with_upgrades());

    let mut outgoing = Request::new(Empty::<Bytes>::new());
    *outgoing.method_mut() = request.method().clone();
    let path = target.path_and_query().map_or("/", |p| p.as_str());
    *outgoing.uri_mut() = path.parse().map_err(|e| failed("address", &e))?;
    let kept = request.headers().iter().filter(|(name, _)| !is_private(name));
    outgoing.headers_mut().extend(kept.map(|(name, value)| (name.clone(), value.clone())));
    if let Ok(host) = HeaderValue::from_str(authority.as_str()) {
        outgoing.headers_mut().insert(header::HOST, host);
    }
    let mut answer = sender.send_request(outgoing).await.map_err(|e| failed("answer", &e))?;
    if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Ok(pass_on(answer).await);
    }
    let mut response = Response::new(Empty::new().map_err(|e| match e {}).boxed_unsync());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *response.headers_mut() = answer.headers().clone();
    let (client, runtime) = (hyper::upgrade::on(&mut request), hyper::upgrade::on(&mut answer));
    tokio::spawn(async move {
        let copy = async {
            let (client, runtime) = (client.await?, runtime.await?);
            let (mut client, mut runtime) = (TokioIo::new(client), TokioIo::new(runtime));
            // Either side going away is the end of a session, not an error.
            let _ = tokio::io::copy_bidirectional(&mut client, &mut runtime).await;
            Ok::<_, hyper::Error>(())
        };
        tokio::select! {
            _ = copy => {}
            () = stop.cancelled() => {}
        }
    });
    Ok(response)
}

async fn pass_on(answer: Response<Incoming>) -> Response<Body> {
    let (head, body) = answer.into_parts();
    let content = Limited::new(body, REFUSAL_BYTES).collect().await.map(|b| b.to_bytes()).unwrap_or_default();
    text(head.status, String::from_utf8_lossy(&content))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_has_no_second_output_and_something_must_flow() {
        let of = |query| Streams::of(&query::pairs(Some(query))).map_err(|refused| refused.status());
        assert_eq!(of("input=1&output=1&error=1&tty=1"), Ok(Streams { stdin: true, stdout: true, stderr: false, tty: true }));
        assert_eq!(of("output=1&error=1"), Ok(Streams { stdin: false, stdout: true, stderr: true, tty: false }));
        assert_eq!(of("tty=1&error=1"), Err(StatusCode::BAD_REQUEST));
        assert_eq!(of("command=x"), Err(StatusCode::BAD_REQUEST));
    }
}
