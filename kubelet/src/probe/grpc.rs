//! gRPC probes: one `grpc.health.v1.Health/Check` per look, on an HTTP/2 connection of its own. The two messages have one
//! field each, so they are written and read by hand.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, Request, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::Verdict;

const PATH: &str = "/grpc.health.v1.Health/Check";
/// The answer has a few bytes; a server that sends more than this is not asked further.
const MAX_BODY: usize = 10 * 1024;
/// gRPC's code of a method that is not there.
const UNIMPLEMENTED: u32 = 12;

/// Asks a server at an address whether a service of it serves.
pub(super) async fn check(address: SocketAddr, service: &str, timeout: Duration) -> Verdict {
    let deadline = Instant::now() + timeout;
    let limit = super::format_timeout(timeout);
    let unreachable =
        |why: String| Verdict::Failure(format!("timeout: failed to connect service \"{address}\" within {limit}: {why}"));
    let stream = match tokio::time::timeout_at(deadline, TcpStream::connect(address)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(e)) => return unreachable(format!("connection error: dial tcp {address}: {e}")),
        Err(_) => return unreachable("context deadline exceeded".to_owned()),
    };
    match tokio::time::timeout_at(deadline, exchange(stream, address, service)).await {
        Ok(verdict) => verdict,
        Err(_) => Verdict::Failure(format!("timeout: health rpc did not complete within {limit}")),
    }
}

async fn exchange(stream: TcpStream, address: SocketAddr, service: &str) -> Verdict {
    let failed = |what: String| Verdict::Failure(format!("error: health rpc probe failed: {what}"));
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
    let (mut sender, connection) = match handshake {
        Ok(parts) => parts,
        Err(e) => return failed(e.to_string()),
    };
    let request = match request(address, service) {
        Ok(request) => request,
        Err(e) => return failed(e.to_string()),
    };
    let ask = async {
        let response = sender.send_request(request).await.map_err(|e| e.to_string())?;
        let head = response.headers().clone();
        let body = Limited::new(response.into_body(), MAX_BODY).collect().await.map_err(|e| e.to_string())?;
        let trailers = body.trailers().cloned().unwrap_or_default();
        Ok::<_, String>((head, body.to_bytes(), trailers))
    };
    let drive = async {
        let _ = connection.await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        answer = ask => match answer {
            Ok((head, body, trailers)) => judge(&head, &body, &trailers),
            Err(e) => failed(e),
        },
        () = drive => failed("EOF".to_owned()),
    }
}

fn request(address: SocketAddr, service: &str) -> Result<Request<Full<Bytes>>, http::Error> {
    Request::post(format!("http://{address}{PATH}"))
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .header(header::USER_AGENT, "kube-probe/1.36")
        .body(Full::new(frame(service)))
}

/// The request's message behind its gRPC prefix: field 1 is the service's name.
fn frame(service: &str) -> Bytes {
    let mut message = BytesMut::new();
    if !service.is_empty() {
        message.put_u8(0x0a);
        put_varint(&mut message, service.len());
        message.put_slice(service.as_bytes());
    }
    let mut frame = BytesMut::with_capacity(message.len() + 5);
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    frame.put_slice(&message);
    frame.freeze()
}

fn put_varint(buffer: &mut BytesMut, mut value: usize) {
    while value >= 0x80 {
        buffer.put_u8((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    buffer.put_u8(value as u8);
}

fn judge(head: &HeaderMap, body: &[u8], trailers: &HeaderMap) -> Verdict {
    let field = |name: &str| trailers.get(name).or_else(|| head.get(name)).and_then(|value| value.to_str().ok());
    match field("grpc-status").and_then(|code| code.parse::<u32>().ok()) {
        Some(0) => {}
        Some(UNIMPLEMENTED) => {
            let message = field("grpc-message").unwrap_or_default();
            return Verdict::Failure(format!(
                "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): {message}"
            ));
        }
        Some(code) => {
            let message = field("grpc-message").unwrap_or_default();
            return Verdict::Failure(format!("error: health rpc probe failed: code {code}: {message}"));
        }
        None => return Verdict::Failure("error: health rpc probe failed: the answer is not gRPC".to_owned()),
    }
    match serving_status(body) {
        Some(1) => Verdict::Success,
        status => {
            let name = match status {
                Some(0) => "UNKNOWN",
                Some(2) => "NOT_SERVING",
                Some(3) => "SERVICE_UNKNOWN",
                _ => "?",
            };
            Verdict::Failure(format!("service unhealthy (responded with {name:?})"))
        }
    }
}

/// Field 1 of the answer; 0 where it is left out.
fn serving_status(body: &[u8]) -> Option<u64> {
    let message = body.get(5..)?;
    match message {
        [] => Some(0),
        [0x08, status, ..] if *status < 0x80 => Some(u64::from(*status)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Response;
    use http_body_util::StreamBody;
    use hyper::body::Frame;
    use hyper::service::service_fn;

    /// A server that answers a named service with a status, or everything with a gRPC error.
    async fn server(code: u32, status: u8) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let service = service_fn(move |request: Request<hyper::body::Incoming>| async move {
                    assert_eq!((request.uri().path(), request.headers()["te"].to_str().unwrap()), (PATH, "trailers"));
                    let asked = request.into_body().collect().await.unwrap().to_bytes();
                    assert_eq!(&asked[..], b"\0\0\0\0\x05\x0a\x03web");
                    let mut trailers = HeaderMap::new();
                    trailers.insert("grpc-status", code.into());
                    trailers.insert("grpc-message", "no".parse().unwrap());
                    let data = Bytes::copy_from_slice(&[0, 0, 0, 0, 2, 8, status]);
                    let frames = [Ok::<_, std::io::Error>(Frame::data(data)), Ok(Frame::trailers(trailers))];
                    Ok::<_, std::io::Error>(Response::new(StreamBody::new(futures::stream::iter(frames))))
                });
                tokio::spawn(async move {
                    let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        address
    }

    #[tokio::test]
    async fn the_health_service_decides() {
        let unhealthy = "service unhealthy (responded with \"NOT_SERVING\")".to_owned();
        let foreign = "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): no".to_owned();
        let cases = [
            (0, 1, Verdict::Success),
            (0, 2, Verdict::Failure(unhealthy)),
            (12, 0, Verdict::Failure(foreign)),
            (5, 0, Verdict::Failure("error: health rpc probe failed: code 5: no".to_owned())),
        ];
        for (code, status, verdict) in cases {
            let address = server(code, status).await;
            assert_eq!(check(address, "web", Duration::from_secs(5)).await, verdict);
        }
    }

    #[tokio::test]
    async fn silence_and_refusal_are_failures() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let Verdict::Failure(why) = check(address, "", Duration::from_millis(50)).await else { panic!() };
        assert!(why.starts_with("timeout: "), "{why}");
        drop(listener);
        let Verdict::Failure(why) = check(address, "", Duration::from_secs(1)).await else { panic!() };
        assert!(why.starts_with(&format!("timeout: failed to connect service \"{address}\" within 1s: ")), "{why}");
    }
}
