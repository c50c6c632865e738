//! The streaming server: accepts on loopback, looks up the token, agrees on a protocol, and hands over.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::BufReader;
use tokio::net::{TcpListener, TcpStream};

use super::http::{self, Head};
use super::inbox::{End, Feeder, Pool, inbox};
use super::spdy::{Limits, Session, Stream, Why};
use super::websocket::{Form, WebSocket, accept_key, is_key};
use super::wire::{Peer, Wire};
use super::wires::{Out, StatusForm, Wires, report};
use super::{Request, forward, legacy, process, tunnel};
use crate::Server;
use crate::error::{Error, file};

/// How long clients get to take their leave when the agent ends.
const FAREWELL: Duration = Duration::from_secs(3);

/// In the order of preference where the client has none of its own: v5 adds nothing to SPDY, and the reference server does not
/// have it there.
const EXEC: [&str; 5] = ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io", "v5.channel.k8s.io"];
const FORWARD: [&str; 1] = ["portforward.k8s.io"];
const TUNNEL: &str = "SPDY/3.1+portforward.k8s.io";

/// The streams of one process: five, and some room for those of a client that asks for more than there are.
const PROCESS: Limits = Limits { patience: None, streams: 16 };

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
                    server.tasks.spawn(attend(server.clone(), stream));
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

/// One connection. When the agent ends it gets a moment to end in order.
async fn attend(server: Arc<Server>, stream: TcpStream) {
    let closing = async {
        server.closed().await;
        tokio::time::sleep(FAREWELL).await;
    };
    tokio::select! {
        served = serve(&server, stream) => {
            if let Err(error) = served {
                tracing::debug!(%error, "streaming connection");
            }
        }
        () = closing => {}
    }
}

type Connection = BufReader<Wire<TcpStream>>;

async fn serve(server: &Arc<Server>, stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let peer = Peer::of(&stream)?;
    let mut stream = BufReader::with_capacity(4096, Wire::new(stream, server.config.streaming_idle));
    let head = tokio::select! {
        head = tokio::time::timeout(server.config.streaming_patience, http::read_head(&mut stream)) => head,
        () = server.closed() => return Ok(()),
    };
    let head = match head {
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
    if head.has_body() {
        return http::refuse(&mut stream, "400 Bad Request", &[], "unable to upgrade a request with a body").await;
    }
    let Some(request) = server.tokens.take(&head.path) else {
        return http::refuse(&mut stream, "404 Not Found", &[], "unknown, used or expired token").await;
    };
    match spdy {
        true => serve_spdy(server, stream, peer, &head, request).await,
        false => serve_websocket(server, stream, peer, &head, request).await,
    }
}

async fn serve_spdy(server: &Arc<Server>, mut stream: Connection, peer: Peer, head: &Head, request: Request) -> io::Result<()> {
    let ours: &[&str] = if matches!(request, Request::PortForward { .. }) { &FORWARD } else { &EXEC };
    let theirs = head.list("x-stream-protocol-version");
    if theirs.is_empty() {
        return http::refuse(&mut stream, "400 Bad Request", &[], "X-Stream-Protocol-Version is missing").await;
    }
    let last_resort = || theirs.iter().find(|p| ours.contains(p));
    let Some(protocol) = theirs.iter().find(|p| ours.contains(p) && !p.starts_with("v5")).or_else(last_resort) else {
        let accepted = ours.join(", ");
        let headers = [("X-Accepted-Stream-Protocol-Versions", accepted.as_str())];
        return http::refuse(&mut stream, "403 Forbidden", &headers, "no common stream protocol").await;
    };
    http::switch(&mut stream, "SPDY/3.1", &[("X-Stream-Protocol-Version", protocol)]).await?;
    match &request {
        Request::PortForward { sandbox, .. } => {
            forward::spdy(server, sandbox, Session::start(stream, peer, forward::LIMITS)?).await;
        }
        _ => run_spdy(server, Session::start(stream, peer, PROCESS)?, &request, protocol).await,
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
    let with_resize = tty && !matches!(protocol, "v2.channel.k8s.io" | "channel.k8s.io");
    let wanted: Vec<&str> = [(true, "error"), (stdin, "stdin"), (stdout, "stdout"), (stderr, "stderr"), (with_resize, "resize")]
        .iter()
        .filter(|(wanted, _)| *wanted)
        .map(|(_, name)| *name)
        .collect();
    let gathered = tokio::select! {
        gathered = tokio::time::timeout(server.config.streaming_patience, gather(&mut session, &wanted)) => gathered,
        () = server.closed() => return session.close().await,
    };
    let Ok(Some(mut streams)) = gathered else {
        tracing::debug!(?wanted, "a client did not open the streams it had asked for");
        return session.close().await;
    };
    let mut take = |kind: &str| streams.iter().position(|(k, _)| k == kind).map(|i| streams.swap_remove(i).1);
    let Some(error) = take("error") else { return session.close().await };
    let writer = |stream: Option<Stream>| stream.map(|s| Out::Spdy(s.writer));
    let mut wires = Wires {
        stdin: take("stdin").map(|s| s.data),
        resize: take("resize").map(|s| s.data),
        stdout: writer(take("stdout")),
        stderr: writer(take("stderr")),
        error: Out::Spdy(error.writer),
        form: StatusForm::of(protocol),
        gone: session.gone.clone(),
        closing: server.closing_token(),
    };
    let unwanted = async {
        while let Some(stream) = session.next().await {
            let _ = stream.writer.reset(Why::Refused).await;
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = run(server, request, &mut wires) => {}
        () = unwanted => {}
    }
    drop(wires);
    session.close().await;
}

/// Waits until the client has opened its streams; what is unknown or doubled is refused.
async fn gather(session: &mut Session, wanted: &[&str]) -> Option<Vec<(String, Stream)>> {
    let mut streams: Vec<(String, Stream)> = Vec::new();
    while streams.len() < wanted.len() {
        let stream = session.next().await?;
        let kind = stream.headers.get("streamtype").cloned().unwrap_or_default();
        if wanted.contains(&kind.as_str()) && !streams.iter().any(|(k, _)| *k == kind) {
            streams.push((kind, stream));
        } else {
            let _ = stream.writer.reset(Why::Refused).await;
        }
    }
    Some(streams)
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

async fn serve_websocket(
    server: &Arc<Server>,
    mut stream: Connection,
    peer: Peer,
    head: &Head,
    request: Request,
) -> io::Result<()> {
    if head.value("sec-websocket-version") != Some("13") {
        let headers = [("Sec-WebSocket-Version", "13")];
        return http::refuse(&mut stream, "426 Upgrade Required", &headers, "websocket version 13 is needed").await;
    }
    let Some(key) = head.value("sec-websocket-key").filter(|key| is_key(key)) else {
        return http::refuse(&mut stream, "400 Bad Request", &[], "Sec-WebSocket-Key is missing or broken").await;
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
    let tunnelled = protocol.as_deref() == Some(TUNNEL);
    let form = if protocol.as_deref().is_some_and(|p| p.contains("base64")) { Form::Base64 } else { Form::Binary };
    if let Request::PortForward { ports, .. } = &request
        && !tunnelled
        && (ports.is_empty() || form == Form::Base64 && ports.len() > legacy::PORTS_IN_BASE64)
    {
        let text = format!("{} ports do not go over this protocol", ports.len());
        return http::refuse(&mut stream, "400 Bad Request", &[], &text).await;
    }
    let accept = accept_key(key);
    let mut headers = vec![("Sec-WebSocket-Accept", accept.as_str())];
    headers.extend(protocol.as_deref().map(|p| ("Sec-WebSocket-Protocol", p)));
    http::switch(&mut stream, "websocket", &headers).await?;
    let protocol = protocol.unwrap_or_default();
    let socket = WebSocket::start(stream, peer, form);
    match &request {
        Request::PortForward { sandbox, .. } if tunnelled => tunnel::forward(server, sandbox, socket).await,
        Request::PortForward { sandbox, ports } => legacy::forward(server, sandbox, ports, socket).await,
        _ => run_websocket(server, socket, &request, &protocol).await,
    }
    Ok(())
}

async fn run_websocket(server: &Arc<Server>, mut socket: WebSocket, request: &Request, protocol: &str) {
    let (tty, stdin, stdout, stderr) = flags(request);
    let pool = Arc::new(Pool::default());
    let ((input, stdin_inbox), (sizes, resize_inbox)) = (inbox(&pool), inbox(&pool));
    let out = |wanted: bool, channel: u8| wanted.then(|| Out::WebSocket(socket.channel(channel)));
    let mut wires = Wires {
        stdin: stdin.then_some(stdin_inbox),
        resize: tty.then_some(resize_inbox),
        stdout: out(stdout, 1),
        stderr: out(stderr, 2),
        error: Out::WebSocket(socket.channel(3)),
        form: StatusForm::of(protocol),
        gone: socket.gone.clone(),
        closing: server.closing_token(),
    };
    // An empty message, so that proxies in between pass the headers on.
    if let Some(first) = [&wires.stdout, &wires.stderr].into_iter().flatten().next() {
        let _ = first.send(Bytes::new()).await;
    }
    let closes = protocol.starts_with("v5");
    tokio::select! {
        () = run(server, request, &mut wires) => {}
        () = sort(&mut socket, input, sizes, closes) => {}
    }
    drop(wires);
    socket.close().await;
}

/// Brings a client's messages to their channels, for ever: what ends is the process.
async fn sort(socket: &mut WebSocket, input: Feeder, sizes: Feeder, closes: bool) {
    while let Some((channel, body)) = socket.next().await {
        match channel {
            0 => input.push(body).await,
            4 => sizes.push(body).await,
            255 if closes && body[..] == [0] => input.end(End::Finished),
            _ => {}
        }
    }
    drop((input, sizes));
    std::future::pending().await
}
