//! Port-forward: TCP connections into a sandbox's network namespace, joined to a client's streams.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream as StdStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use super::spdy::{Session, Stream};
use super::wires::Out;
use crate::Server;
use crate::error::{Error, text};
use crate::id::SandboxId;
use crate::sandbox::holdings::Live;
use crate::sandbox::owner;
use crate::sandbox::state::Op;

/// How long half of a pair waits for the other.
const PAIR: Duration = Duration::from_secs(30);
/// How long a connection into the pod may take to be made.
const CONNECT: Duration = Duration::from_secs(10);
const BUFFER: usize = 16 * 1024;

/// Serves a SPDY connection to its end.
pub(super) async fn spdy(server: &Arc<Server>, sandbox: &SandboxId, mut session: Session) {
    let live = match owner::submit(server, sandbox, Op::Live).await {
        Ok(live) => live,
        Err(error) => {
            tracing::debug!(error = %text(&*error), "port-forward");
            return session.close().await;
        }
    };
    let mut halves: HashMap<String, (tokio::time::Instant, Stream)> = HashMap::new();
    let mut tasks = tokio::task::JoinSet::new();
    let mut look = tokio::time::interval(Duration::from_secs(5));
    loop {
        let stream = tokio::select! {
            stream = session.next() => stream,
            _ = look.tick() => {
                while tasks.try_join_next().is_some() {}
                expire(&mut halves).await;
                if live.is_dead() {
                    break;
                }
                continue;
            }
            () = ended(&live) => break,
        };
        let Some(stream) = stream else { break };
        let Some((key, port)) = identify(&stream) else {
            let _ = stream.writer.reset().await;
            continue;
        };
        match halves.remove(&key) {
            Some((_, other)) => {
                let (error, data) = if is_error(&stream) { (stream, other) } else { (other, stream) };
                tasks.spawn(pair(live.clone(), port, error, data));
            }
            None => {
                halves.insert(key, (tokio::time::Instant::now(), stream));
            }
        }
    }
    tasks.abort_all();
    session.close().await;
}

async fn ended(live: &Live) {
    match &live.process {
        Some(process) => process.ended.cancelled().await,
        None => std::future::pending().await,
    }
}

fn is_error(stream: &Stream) -> bool {
    stream.headers.get("streamtype").is_some_and(|t| t == "error")
}

/// What pairs a stream, and its port. Old clients send no request id: then the numbers of the streams tell.
fn identify(stream: &Stream) -> Option<(String, u16)> {
    let port: u16 = stream.headers.get("port")?.parse().ok().filter(|p| *p > 0)?;
    let kind = stream.headers.get("streamtype")?;
    let key = match (kind.as_str(), stream.headers.get("requestid")) {
        ("error" | "data", Some(id)) => format!("r{id}"),
        ("error", None) => format!("s{}", stream.id),
        ("data", None) => format!("s{}", stream.id.checked_sub(2)?),
        _ => return None,
    };
    Some((key, port))
}

async fn expire(halves: &mut HashMap<String, (tokio::time::Instant, Stream)>) {
    let late: Vec<String> = halves.iter().filter(|(_, (since, _))| since.elapsed() > PAIR).map(|(k, _)| k.clone()).collect();
    for key in late {
        if let Some((_, stream)) = halves.remove(&key) {
            let _ = stream.writer.send(Bytes::from_static(b"the other stream of this connection did not come")).await;
            let _ = stream.writer.reset().await;
        }
    }
}

async fn pair(live: Arc<Live>, port: u16, error: Stream, data: Stream) {
    let (error, writer) = (Out::Spdy(error.writer), Out::Spdy(data.writer));
    match connect(&live, port).await {
        Ok(tcp) => join(tcp, data.data, &writer).await,
        Err(failed) => {
            let text = format!("error forwarding port {port} to pod {}: {}", live.id, text(&failed));
            let _ = error.send(text.into()).await;
            let _ = writer.finish().await;
        }
    }
    let _ = error.finish().await;
}

/// Connects to a port of the pod from inside its network namespace.
pub(super) async fn connect(live: &Arc<Live>, port: u16) -> Result<TcpStream, Error> {
    let live = live.clone();
    let stream = crate::blocking(move || {
        let dial = || {
            let address = |ip| SocketAddr::new(ip, port);
            StdStream::connect_timeout(&address(Ipv4Addr::LOCALHOST.into()), CONNECT)
                .or_else(|first| StdStream::connect_timeout(&address(Ipv6Addr::LOCALHOST.into()), CONNECT).map_err(|_| first))
        };
        let dialled = match &live.netns {
            Some(netns) => berth_linux::ns::with_netns(netns.as_fd(), dial)
                .map_err(|e| Error::Linux { action: "enter the pod's network".into(), source: Box::new(e) })?,
            None => dial(),
        };
        dialled.map_err(|source| Error::File { action: "connect to port", path: port.to_string().into(), source })
    })
    .await?;
    let io = |source: io::Error| Error::File { action: "watch port", path: port.to_string().into(), source };
    stream.set_nonblocking(true).map_err(io)?;
    TcpStream::from_std(stream).map_err(io)
}

/// Copies both ways; each direction ends on its own.
pub(super) async fn join(tcp: TcpStream, mut from: mpsc::Receiver<Bytes>, to: &Out) {
    let (mut read, mut write) = tcp.into_split();
    let up = async {
        while let Some(bytes) = from.recv().await {
            if write.write_all(&bytes).await.is_err() {
                return;
            }
        }
        let _ = write.shutdown().await;
    };
    let down = async {
        let mut buffer = vec![0u8; BUFFER];
        loop {
            match read.read(&mut buffer).await {
                Ok(n) if n > 0 => {
                    if to.send(Bytes::copy_from_slice(&buffer[..n])).await.is_err() {
                        return;
                    }
                }
                _ => break,
            }
        }
        let _ = to.finish().await;
    };
    // The pod has said all it will: what the client still sends gets a moment, not for ever.
    tokio::pin!(up, down);
    tokio::select! {
        () = &mut down => {
            let _ = tokio::time::timeout(Duration::from_secs(1), &mut up).await;
        }
        () = &mut up => down.await,
    }
}
