//! One connection to the API server: TCP, a proxy where there is one, TLS with the identity of the moment. It can be cut from
//! outside, whoever is using it.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tower::Service;

use crate::access::Access;
use crate::resolver::Resolver;
use crate::{Error, Result};

/// From the name to the end of the handshake: as long as a heartbeat may take.
const CONNECT: Duration = Duration::from_secs(10);
/// The answer of a proxy to CONNECT is a few lines.
const PROXY_ANSWER: usize = 8 << 10;

/// Makes connections with one access; what it made ends when the token is cancelled.
#[derive(Clone, Debug)]
pub(crate) struct Connector {
    pub(crate) access: Arc<Access>,
    pub(crate) closed: CancellationToken,
}

impl Service<Uri> for Connector {
    type Response = TokioIo<Stream>;
    type Error = Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// All requests are to the one server: the address is the access's own.
    fn call(&mut self, _: Uri) -> Self::Future {
        let Connector { access, closed } = self.clone();
        Box::pin(async move {
            let failed = |source| Error::Connect { server: access.server(), source };
            let connecting = tokio::time::timeout(CONNECT, connect(&access));
            let connected = match connecting.await {
                Ok(connected) => connected.map_err(failed)?,
                Err(_) => return Err(failed(io::ErrorKind::TimedOut.into())),
            };
            let (io, h2) = connected;
            Ok(TokioIo::new(Stream { io, h2, closed: Box::pin(closed.cancelled_owned()) }))
        })
    }
}

async fn connect(access: &Access) -> io::Result<(Box<dyn Io>, bool)> {
    let server = access.uri().ok_or(io::ErrorKind::InvalidInput)?;
    let tcp = match &access.proxy {
        Some(proxy) => through_proxy(dial(proxy.clone()).await?, &access.host_and_port()).await?,
        None => dial(server).await?,
    };
    let Some((config, name)) = &access.tls else { return Ok((Box::new(tcp), false)) };
    let stream = tokio_rustls::TlsConnector::from(config.clone()).connect(name.clone(), tcp).await?;
    let h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    Ok((Box::new(stream), h2))
}

async fn dial(to: Uri) -> io::Result<TcpStream> {
    let mut http = HttpConnector::new_with_resolver(Resolver);
    http.enforce_http(false);
    http.set_nodelay(true);
    http.set_connect_timeout(Some(CONNECT));
    http.set_keepalive(Some(Duration::from_secs(30)));
    let connected = http.call(to).await.map_err(io::Error::other)?;
    Ok(connected.into_inner())
}

/// CONNECT (RFC 9110, 9.3.6).
async fn through_proxy(mut proxy: TcpStream, server: &str) -> io::Result<TcpStream> {
    proxy.write_all(format!("CONNECT {server} HTTP/1.1\r\nHost: {server}\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    // Byte by byte: what follows the empty line is the server's.
    while !answer.ends_with(b"\r\n\r\n") {
        if answer.len() >= PROXY_ANSWER {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the proxy's answer has no end"));
        }
        answer.push(proxy.read_u8().await?);
    }
    let line = String::from_utf8_lossy(&answer);
    let line = line.lines().next().unwrap_or_default();
    match line.split_ascii_whitespace().nth(1) {
        Some(status) if status.starts_with('2') => Ok(proxy),
        _ => Err(io::Error::other(format!("the proxy says {line:?}"))),
    }
}

/// What bytes flow through.
trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A connection that ends when it is cut.
pub(crate) struct Stream {
    io: Box<dyn Io>,
    h2: bool,
    closed: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        let connected = Connected::new();
        if self.h2 { connected.negotiated_h2() } else { connected }
    }
}

impl Stream {
    fn poll_cut(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.closed.as_mut().poll(context) {
            Poll::Ready(()) => Err(io::ErrorKind::ConnectionAborted.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, to: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.poll_cut(context)?;
        Pin::new(&mut self.io).poll_read(context, to)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_cut(context)?;
        Pin::new(&mut self.io).poll_write(context, from)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}
