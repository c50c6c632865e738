//! What probes and hooks ask that busybox cannot answer: `demo-probed TLS-PORT GRPC-PORT` answers every HTTPS request with 200, under a
//! certificate that nobody has signed, and says by gRPC's health protocol that the service `ready` serves and no other does.

use std::convert::Infallible;
use std::io::Error;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::future::BoxFuture;
use rustls::pki_types::PrivatePkcs8KeyDer;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tower::Service;

/// The one service that serves.
const READY: &str = "ready";

/// `grpc.health.v1.HealthCheckRequest`.
#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

/// `grpc.health.v1.HealthCheckResponse`; 1 is SERVING, 2 NOT_SERVING.
#[derive(Clone, PartialEq, prost::Message)]
struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// gRPC's health service: its only method is Check.
#[derive(Clone)]
struct Health;

impl tonic::server::NamedService for Health {
    const NAME: &'static str = "grpc.health.v1.Health";
}

impl Service<Request<Body>> for Health {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let check = tower::service_fn(|asked: tonic::Request<HealthCheckRequest>| async move {
            let status = if asked.into_inner().service == READY { 1 } else { 2 };
            Ok::<_, tonic::Status>(tonic::Response::new(HealthCheckResponse { status }))
        });
        Box::pin(async move {
            let mut server = tonic::server::Grpc::new(tonic_prost::ProstCodec::default());
            Ok(server.unary(check, request).await)
        })
    }
}

fn acceptor() -> Result<TlsAcceptor, Error> {
    let made = rcgen::generate_simple_self_signed(vec!["elsewhere.invalid".to_owned()]).map_err(Error::other)?;
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der()).into();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = builder.map_err(Error::other)?.with_no_client_auth();
    let config = builder.with_single_cert(vec![made.cert.der().clone()], key).map_err(Error::other)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

async fn answer(acceptor: TlsAcceptor, stream: TcpStream) -> Result<(), Error> {
    let mut stream = BufReader::new(acceptor.accept(stream).await?);
    let mut line = String::new();
    // The head ends with an empty line.
    while stream.read_line(&mut line).await? > 2 {
        line.clear();
    }
    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await?;
    stream.shutdown().await
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let mut ports = std::env::args().skip(1).map(|port| port.parse::<u16>().map_err(Error::other));
    let mut next = || ports.next().unwrap_or_else(|| Err(Error::other("usage: demo-probed TLS-PORT GRPC-PORT")));
    let (tls, grpc) = (next()?, next()?);
    let health = tonic::transport::Server::builder().add_service(Health).serve((Ipv4Addr::UNSPECIFIED, grpc).into());
    let acceptor = acceptor()?;
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, tls)).await?;
    let web = async {
        loop {
            let (stream, _) = listener.accept().await?;
            // A client that went away, or speaks no TLS, is its own problem.
            tokio::spawn(answer(acceptor.clone(), stream));
        }
    };
    tokio::select! {
        ended = health => ended.map_err(Error::other),
        ended = web => ended,
    }
}
