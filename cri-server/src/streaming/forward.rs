//! Port-forward: TCP connections into a sandbox's network namespace, joined to a client's streams.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream as StdStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::Instant;

use super::inbox::Inbox;
use super::spdy::{Limits, Session, Stream, Why};
use super::wires::Out;
use crate::Server;
use crate::error::{Error, text};
use crate::id::SandboxId;
use crate::sandbox::holdings::Live;
use crate::sandbox::owner;
use crate::sandbox::state::Op;

/// How long a pod may leave data untaken, with the buffer of its connection full, before that connection is cut for the sake of
/// the others.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// Two streams make one forwarded connection: 4,096 of them at a time.
pub(super) const LIMITS: Limits = Limits { patience: Some(PATIENCE), streams: 8192 };
/// How long a connection into the pod may take to be made.
const CONNECT: Duration = Duration::from_secs(10);
/// A client that has heard the pod's last word may go on talking; when it is silent for that long, it is over.
const HALF_CLOSED: Duration = Duration::from_secs(300);
const BUFFER: usize = 16 * 1024;

/// Halves of pairs by what pairs them, since when they wait.
type Halves = HashMap<String, (Instant, Stream)>;

/// Serves a SPDY connection to its end.
pub(super) async fn spdy(server: &Arc<Server>, sandbox: &SandboxId, mut session: Session) {
    let live = match owner::submit(server, sandbox, Op::Live).await {
        Ok(live) => live,
        Err(error) => {
            tracing::debug!(error = %text(&*error), "port-forward");
            return session.close().await;
        }
    };
    let patience = server.config.streaming_patience;
    let mut halves = Halves::new();
    let mut tasks = tokio::task::JoinSet::new();
    loop {
        let oldest = halves.values().map(|(since, _)| *since + patience).min();
        let stream = tokio::select! {
            stream = session.next() => stream,
            Some(_) = tasks.join_next() => continue,
            () = until(oldest) => {
                expire(&mut halves, patience).await;
                continue;
            }
            () = ended(&live) => break,
            () = server.closed() => break,
        };
        let Some(stream) = stream else { break };
        let Some((key, port)) = identify(&stream) else {
            let _ = stream.writer.reset(Why::Protocol).await;
            continue;
        };
        match halves.remove(&key) {
            Some((_, other)) if is_error(&stream) != is_error(&other) => {
                let (error, data) = if is_error(&stream) { (stream, other) } else { (other, stream) };
                tasks.spawn(pair(live.clone(), port, error, data));
            }
            Some(twice) => {
                let _ = stream.writer.reset(Why::Protocol).await;
                halves.insert(key, twice);
            }
            None => {
                halves.insert(key, (Instant::now(), stream));
            }
        }
    }
    tasks.shutdown().await;
    session.close().await;
}

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// Ends with the sandbox.
pub(super) async fn ended(live: &Live) {
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

async fn expire(halves: &mut Halves, patience: Duration) {
    let late: Vec<String> = halves.iter().filter(|(_, (since, _))| since.elapsed() >= patience).map(|(k, _)| k.clone()).collect();
    for key in late {
        if let Some((_, stream)) = halves.remove(&key) {
            let _ = stream.writer.send(Bytes::from_static(b"the other stream of this connection did not come")).await;
            let _ = stream.writer.reset(Why::Cancelled).await;
        }
    }
}

async fn pair(live: Arc<Live>, port: u16, error: Stream, data: Stream) {
    let Stream { data: from, writer, .. } = data;
    let (error, to) = (Out::Spdy(error.writer), Out::Spdy(writer.clone()));
    let forwarded = async {
        match connect(&live, port).await {
            Ok(tcp) => join(tcp, from, &to, Some(&error)).await,
            Err(failed) => {
                let text = format!("error forwarding port {port} to pod {}: {}", live.id, text(&failed));
                let _ = error.send(text.into()).await;
                let _ = to.finish().await;
                let _ = error.finish().await;
                false
            }
        }
    };
    let client_done = tokio::select! {
        done = forwarded => done,
        // Given up by the client, or cut by us: the pod's side ends with it.
        () = writer.reset.cancelled() => true,
    };
    if !client_done {
        // What the client still sends on it is nobody's.
        let _ = writer.reset(Why::Cancelled).await;
    }
    let _ = error.finish().await;
}

/// Connects to a port of the pod from inside its network namespace: 127.0.0.1 first, then ::1.
pub(super) async fn connect(live: &Arc<Live>, port: u16) -> Result<TcpStream, Error> {
    let failed = |source: io::Error| Error::File { action: "connect to port", path: port.to_string().into(), source };
    let first = match dial(live, Ipv4Addr::LOCALHOST.into(), port).await {
        Ok(stream) => return Ok(stream),
        Err(Dial::Refused(error)) => error,
        Err(Dial::Failed(error)) => return Err(error),
    };
    match dial(live, Ipv6Addr::LOCALHOST.into(), port).await {
        Ok(stream) => Ok(stream),
        Err(_) => Err(failed(first)),
    }
}

enum Dial {
    /// By the pod, or its kernel.
    Refused(io::Error),
    Failed(Error),
}

async fn dial(live: &Arc<Live>, ip: IpAddr, port: u16) -> Result<TcpStream, Dial> {
    let (pod, family) = (live.clone(), if ip.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 });
    // Only the socket is made in the pod's namespace, where it stays; the waiting is done here, so that a pod that does not
    // answer takes up no thread.
    let socket = crate::blocking(move || {
        let make = || socket_with(family, SocketType::STREAM, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None);
        Ok(match &pod.netns {
            Some(netns) => berth_linux::ns::with_netns(netns.as_fd(), make)
                .map_err(|e| Error::Linux { action: "enter the pod's network".into(), source: Box::new(e) })?,
            None => make(),
        })
    });
    let socket: OwnedFd = socket.await.map_err(Dial::Failed)?.map_err(|e| Dial::Refused(e.into()))?;
    let connecting = TcpSocket::from_std_stream(StdStream::from(socket)).connect(SocketAddr::new(ip, port));
    let stream = tokio::time::timeout(CONNECT, connecting).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let stream = stream.map_err(Dial::Refused)?;
    let _ = stream.set_nodelay(true);
    Ok(stream)
}

/// Copies both ways; each direction ends on its own. `error` is finished with the pod's last word: clients wait for it then.
/// Without one the protocol has no half-close, and the pod's last word is the end. True when the client has ended its direction.
pub(super) async fn join(tcp: TcpStream, mut from: Inbox, to: &Out, error: Option<&Out>) -> bool {
    let (mut read, mut write) = tcp.into_split();
    let sent = AtomicU64::new(0);
    let up = async {
        while let Some(bytes) = from.recv().await {
            if write.write_all(&bytes).await.is_err() {
                return Up::Deaf;
            }
            sent.fetch_add(1, Ordering::Relaxed);
        }
        if from.aborted() {
            return Up::Aborted;
        }
        let _ = write.shutdown().await;
        Up::Finished
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
        if let Some(error) = error {
            let _ = error.finish().await;
        }
    };
    tokio::pin!(up, down);
    tokio::select! {
        ended = &mut up => match ended {
            Up::Aborted => return true,
            Up::Finished => {
                down.await;
                return true;
            }
            Up::Deaf => {
                down.await;
                return false;
            }
        },
        () = &mut down => {}
    }
    if error.is_none() {
        return false;
    }
    let mut seen = sent.load(Ordering::Relaxed);
    loop {
        match tokio::time::timeout(HALF_CLOSED, &mut up).await {
            Ok(ended) => return ended != Up::Deaf,
            Err(_) if sent.load(Ordering::Relaxed) == seen => return false,
            Err(_) => seen = sent.load(Ordering::Relaxed),
        }
    }
}

/// How a client's direction has ended.
#[derive(PartialEq, Eq)]
enum Up {
    Finished,
    Aborted,
    /// The pod does not take any more.
    Deaf,
}
