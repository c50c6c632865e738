//! The streaming server: accepts on loopback, looks up the token, agrees on a protocol, and hands over.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use super::http::{self, Head};
use super::spdy::{Session, Stream};
use super::websocket::{Form, WebSocket, accept_key};
use super::wires::{Out, StatusForm, Wires, report};
use super::{Request, forward, process};
use crate::Server;
use crate::error::{Error, file};

/// How long a client may take to send its request, and to open its streams.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a connection may last in all.
const LIFE: Duration = Duration::from_secs(4 * 60 * 60);

const EXEC: [&str; 4] = ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"];
const FORWARD: [&str; 1] = ["portforward.k8s.io"];
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";

/// Starts the server; it ends with the server's closing.
pub(crate) async fn listen(server: &Arc<Server>) -> Result<(), Error> {
    let at = server.config.streaming;
    let failed = || file("listen on", at.to_string());
    let listener = TcpListener::bind(at).await.map_err(failed())?;
    server.tokens.listens_at(listener.local_addr().map_err(failed())?);
    let server = server.clone();
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = server.closed() => return,
            };
            match accepted {
                Ok((stream, _)) => {
                    let server = server.clone();
                    tokio::spawn(async move {
                        let closed = server.closed();
                        tokio::select! {
                            served = tokio::time::timeout(LIFE, serve(&server, stream)) => {
                                if let Ok(Err(error)) = served {
                                    tracing::debug!(%error, "streaming connection");
                                }
                            }
                            () = closed => {}
                        }
                    });
                }
                // Out of descriptors, most likely: wait until some are free again.
                Err(error) => {
                    tracing::warn!(%error, "streaming server");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        }
    });
    Ok(())
}

async fn serve(server: &Arc<Server>, stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut stream = tokio::io::BufStream::with_capacity(4096, 4096, stream);
    let head = match tokio::time::timeout(PATIENCE, http::read_head(&mut stream)).await {
        Ok(Ok(Some(head))) => head,
        Ok(Err(error)) => return http::refuse(&mut stream, "400 Bad Request", &[], &error.to_string()).await,
        Ok(Ok(None)) | Err(_) => return Ok(()),
    };
    if head.method != "GET" && head.method != "POST" {
        return http::refuse(&mut stream, "405 Method Not Allowed", &[("Allow", "GET, POST")], "use GET or POST").await;
    }
    let (spdy, websocket) = (head.upgrades_to("SPDY/3.1"), head.upgrades_to("websocket"));
    if !spdy && !websocket {
        return http::refuse(&mut stream, "400 Bad Request", &[], "unable to upgrade: SPDY/3.1 or websocket is needed").await;
    }
    let Some(request) = server.tokens.take(&head.path) else {
        return http::refuse(&mut stream, "404 Not Found", &[], "unknown, used or expired token").await;
    };
    if spdy { serve_spdy(server, stream, &head, request).await } else { serve_websocket(server, stream, &head, request).await }
}

type Connection = tokio::io::BufStream<TcpStream>;

async fn serve_spdy(server: &Arc<Server>, mut stream: Connection, head: &Head, request: Request) -> io::Result<()> {
    let ours: &[&str] = if matches!(request, Request::PortForward { .. }) { &FORWARD } else { &EXEC };
    let theirs = head.list("x-stream-protocol-version");
    if theirs.is_empty() {
        return http::refuse(&mut stream, "400 Bad Request", &[], "X-Stream-Protocol-Version is missing").await;
    }
    let Some(protocol) = theirs.iter().find(|p| ours.contains(p)) else {
        let accepted = ours.join(", ");
        let headers = [("X-Accepted-Stream-Protocol-Versions", accepted.as_str())];
        return http::refuse(&mut stream, "403 Forbidden", &headers, "no common stream protocol").await;
    };
    http::switch(&mut stream, "SPDY/3.1", &[("X-Stream-Protocol-Version", protocol)]).await?;
    let session = Session::start(stream)?;
    match &request {
        Request::PortForward { sandbox, .. } => forward::spdy(server, sandbox, session).await,
        _ => run_spdy(server, session, &request, protocol).await,
    }
    Ok(())
}

/// (tty, stdin, stdout, stderr)
fn flags(request: &Request) -> (bool, bool, bool, bool) {
    match request {
        Request::Exec { tty, stdin, stdout, stderr, .. } | Request::Attach { tty, stdin, stdout, stderr, .. } => {
            (*tty, *stdin, *stdout, *stderr)
        }
        Request::PortForward { .. } => (false, false, false, false),
    }
}

async fn run_spdy(server: &Arc<Server>, mut session: Session, request: &Request, protocol: &str) {
    let (tty, stdin, stdout, stderr) = flags(request);
    let with_resize = tty && matches!(protocol, "v4.channel.k8s.io" | "v3.channel.k8s.io");
    let mut wanted: Vec<&str> = vec!["error"];
    wanted.extend(
        [(stdin, "stdin"), (stdout, "stdout"), (stderr, "stderr"), (with_resize, "resize")]
            .iter()
            .filter(|(w, _)| *w)
            .map(|(_, n)| *n),
    );
    let mut streams: Vec<(String, Stream)> = Vec::new();
    let gather = async {
        while streams.len() < wanted.len() {
            let Some(stream) = session.next().await else { return false };
            let kind = stream.headers.get("streamtype").cloned().unwrap_or_default();
            if wanted.contains(&kind.as_str()) && !streams.iter().any(|(k, _)| *k == kind) {
                streams.push((kind, stream));
            } else {
                let _ = stream.writer.reset().await;
            }
        }
        true
    };
    if !tokio::time::timeout(PATIENCE, gather).await.unwrap_or(false) {
        return session.close().await;
    }
    let mut take = |kind: &str| streams.iter().position(|(k, _)| k == kind).map(|i| streams.swap_remove(i).1);
    let Some(error) = take("error") else { return session.close().await };
    let writer = |stream: Option<Stream>| stream.map(|s| Out::Spdy(s.writer));
    let mut wires = Wires {
        stdin: take("stdin").map(|s| s.data),
        resize: take("resize").map(|s| s.data),
        stdout: writer(take("stdout")),
        stderr: writer(take("stderr")),
        error: Out::Spdy(error.writer),
        form: if protocol == "v4.channel.k8s.io" { StatusForm::Json } else { StatusForm::Text },
        gone: session.gone.clone(),
    };
    run(server, request, &mut wires).await;
    drop(wires);
    session.close().await;
}

/// Runs the process, finishes its outputs, then tells how it ended.
async fn run(server: &Arc<Server>, request: &Request, wires: &mut Wires) {
    let outcome = match request {
        Request::Exec { container, command, tty, .. } => process::exec(server, container, command.clone(), *tty, wires).await,
        Request::Attach { container, tty, .. } => process::attach(server, container, *tty, wires).await,
        Request::PortForward { .. } => return,
    };
    for out in [&wires.stdout, &wires.stderr].into_iter().flatten() {
        let _ = out.finish().await;
    }
    report(&wires.error, wires.form, &outcome).await;
}

async fn serve_websocket(server: &Arc<Server>, mut stream: Connection, head: &Head, request: Request) -> io::Result<()> {
    let Some(key) = head.value("sec-websocket-key") else {
        return http::refuse(&mut stream, "400 Bad Request", &[], "Sec-WebSocket-Key is missing").await;
    };
    let forwards = matches!(request, Request::PortForward { .. });
    let known = |p: &&str| match *p {
        TUNNEL => forwards,
        "v4.channel.k8s.io" | "v4.base64.channel.k8s.io" => true,
        "v5.channel.k8s.io" | "channel.k8s.io" | "base64.channel.k8s.io" => !forwards,
        _ => false,
    };
    let offered = head.list("sec-websocket-protocol");
    let protocol = offered.iter().find(|p| known(p)).map(|p| (*p).to_owned());
    if protocol.is_none() && !offered.is_empty() {
        return http::refuse(&mut stream, "403 Forbidden", &[], "no common websocket protocol").await;
    }
    let accept = accept_key(key);
    let mut headers = vec![("Sec-WebSocket-Accept", accept.as_str())];
    headers.extend(protocol.as_deref().map(|p| ("Sec-WebSocket-Protocol", p)));
    http::switch(&mut stream, "websocket", &headers).await?;
    let protocol = protocol.unwrap_or_default();
    let form = if protocol.contains("base64") { Form::Base64 } else { Form::Binary };
    let socket = WebSocket::start(stream, form);
    match &request {
        Request::PortForward { sandbox, .. } if protocol == TUNNEL => tunnel(server, sandbox, socket).await,
        Request::PortForward { sandbox, ports } => super::legacy::forward(server, sandbox, ports, socket).await,
        _ => run_websocket(server, socket, &request, &protocol).await,
    }
    Ok(())
}

async fn run_websocket(server: &Arc<Server>, mut socket: WebSocket, request: &Request, protocol: &str) {
    let (tty, stdin, stdout, stderr) = flags(request);
    let (input, input_rx) = mpsc::channel(64);
    let (sizes, sizes_rx) = mpsc::channel(8);
    let out = |wanted: bool, channel: u8| wanted.then(|| Out::WebSocket(socket.channel(channel)));
    let modern = protocol.starts_with("v4") || protocol.starts_with("v5");
    let mut wires = Wires {
        stdin: stdin.then_some(input_rx),
        resize: tty.then_some(sizes_rx),
        stdout: out(stdout, 1),
        stderr: out(stderr, 2),
        error: Out::WebSocket(socket.channel(3)),
        form: if modern { StatusForm::Json } else { StatusForm::Text },
        gone: socket.gone.clone(),
    };
    // An empty message, so that proxies in between pass the headers on.
    if let Some(first) = [&wires.stdout, &wires.stderr].into_iter().flatten().next() {
        let _ = first.send(Bytes::new()).await;
    }
    let closes = protocol.starts_with("v5");
    {
        let running = run(server, request, &mut wires);
        tokio::pin!(running);
        let mut input = Some(input);
        loop {
            tokio::select! {
                () = &mut running => break,
                message = socket.next(), if !socket.gone.is_cancelled() || input.is_some() => match message {
                    Some((255, body)) if closes && body[..] == [0] => input = None,
                    Some((0, body)) => {
                        if let Some(sender) = &input {
                            // Never waits: the process must be able to end while its input is full.
                            tokio::select! {
                                sent = sender.send(body) => if sent.is_err() { input = None },
                                () = &mut running => break,
                            }
                        }
                    }
                    Some((4, body)) => {
                        let _ = sizes.try_send(body);
                    }
                    Some(_) => {}
                    None => input = None,
                },
            }
        }
    }
    drop(wires);
    socket.close().await;
}

/// SPDY inside of WebSocket messages: the bytes of the messages, joined, are the connection.
async fn tunnel(server: &Arc<Server>, sandbox: &crate::id::SandboxId, mut socket: WebSocket) {
    let (ours, theirs): (DuplexStream, DuplexStream) = tokio::io::duplex(64 * 1024);
    let Ok(session) = Session::start(theirs) else { return socket.close().await };
    let (mut read, mut write) = tokio::io::split(ours);
    let raw = socket.raw();
    let down = tokio::spawn(async move {
        let mut buffer = vec![0u8; 32 * 1024];
        while let Ok(n) = read.read(&mut buffer).await {
            if n == 0 || raw.send(Bytes::copy_from_slice(&buffer[..n])).await.is_err() {
                return;
            }
        }
    });
    let forwarding = forward::spdy(server, sandbox, session);
    tokio::pin!(forwarding);
    loop {
        tokio::select! {
            () = &mut forwarding => break,
            message = socket.next_raw() => match message {
                Some(bytes) => {
                    if write.write_all(&bytes).await.is_err() {
                        break;
                    }
                }
                None => {
                    let _ = write.shutdown().await;
                    forwarding.await;
                    break;
                }
            },
        }
    }
    drop(write);
    let _ = down.await;
    socket.close().await;
}
