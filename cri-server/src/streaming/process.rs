//! Joining a client's streams to a process: an exec's or a container's own.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use berth_shim::protocol::{Reply, Request as ShimRequest};
use bytes::Bytes;
use rustix::fs::OFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio_util::sync::CancellationToken;

use super::inbox::Inbox;
use super::wires::{Out, Outcome, Wires};
use crate::Server;
use crate::board::ContainerState;
use crate::error::{Error, text};
use crate::exec;
use crate::id::ContainerId;

/// How long output is read on after the process has ended while others keep its pipes open; and how long the end of a container
/// whose output has ended may take to be known.
const DRAIN: Duration = Duration::from_secs(2);
const BUFFER: usize = 16 * 1024;

/// An exec for a client, to its end. The outcome is still to be reported.
pub(super) async fn exec(
    server: &Arc<Server>,
    container: &ContainerId,
    command: Vec<String>,
    tty: bool,
    wires: &mut Wires,
) -> Outcome {
    let closing = wires.closing.clone();
    let ended = tokio::select! {
        ended = try_exec(server, container, command, tty, wires) => ended,
        // What was begun is dropped, and the command killed with it.
        () = closing.cancelled() => Err(Arc::new(Error::Closing)),
    };
    match ended {
        Ok(code) => Outcome::Exit(code),
        Err(error) => Outcome::Failure(text(&*error)),
    }
}

async fn try_exec(
    server: &Arc<Server>,
    container: &ContainerId,
    command: Vec<String>,
    tty: bool,
    wires: &mut Wires,
) -> Result<i32, Arc<Error>> {
    let (container, live) = exec::running(server, container.as_str()).await?;
    let stdin = wires.stdin.take();
    let mut running = exec::start(server, &live, &container, command, stdin.is_some(), tty).await?;
    let mut inputs = Tasks::default();
    let mut outputs = Outputs::new(wires);
    let mut terminal = None;
    if let Some(console) = running.console.take() {
        let console = Arc::new(watched(console, Interest::READABLE | Interest::WRITABLE)?);
        if let Some(stdin) = stdin {
            inputs.0.push(tokio::spawn(feed(stdin, console.clone())));
        }
        outputs.copy(console.clone(), wires.stdout.clone());
        terminal = Some(console);
    } else {
        if let (Some(stdin), Some(fd)) = (stdin, running.stdin.take()) {
            inputs.0.push(tokio::spawn(feed(stdin, Arc::new(watched(fd, Interest::WRITABLE)?))));
        }
        for (fd, to) in [(running.stdout.take(), &wires.stdout), (running.stderr.take(), &wires.stderr)] {
            if let Some(fd) = fd {
                outputs.copy(Arc::new(watched(fd, Interest::READABLE)?), to.clone());
            }
        }
    }
    let mut resize = wires.resize.take();
    let mut sizes = Sizes::default();
    let code = loop {
        tokio::select! {
            code = running.handle.wait() => break code,
            chunk = next(&mut resize) => match chunk {
                Some(chunk) => for (width, height) in sizes.push(&chunk) {
                    if let Some(terminal) = &terminal {
                        let _ = berth_linux::tty::set_window_size(terminal.get_ref().as_fd(), width, height);
                    }
                },
                None => resize = None,
            },
            () = wires.gone.cancelled() => {
                // As in containerd: the process finds its pipes broken, or its terminal hung up, and goes on if it likes.
                tokio::spawn(async move { running.handle.wait().await });
                return Err(Arc::new(Error::ClientGone));
            }
        }
    };
    drop(inputs);
    outputs.drain().await;
    Ok(code?)
}

/// Tasks that end with their owner.
#[derive(Default)]
struct Tasks(Vec<tokio::task::JoinHandle<()>>);

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

async fn next(inbox: &mut Option<Inbox>) -> Option<Bytes> {
    match inbox {
        Some(inbox) => inbox.recv().await,
        None => std::future::pending().await,
    }
}

type Watched = Arc<AsyncFd<OwnedFd>>;

/// The outputs of a process on their way to the client.
struct Outputs {
    tasks: Tasks,
    gone: CancellationToken,
    ended: CancellationToken,
}

impl Outputs {
    fn new(wires: &Wires) -> Self {
        Self { tasks: Tasks::default(), gone: wires.gone.clone(), ended: CancellationToken::new() }
    }

    fn copy(&mut self, from: Watched, to: Option<Out>) {
        self.tasks.0.push(tokio::spawn(copy(from, to, self.gone.clone(), self.ended.clone())));
    }

    /// The process has ended: returns when the client has all that it wrote, however slowly it reads.
    async fn drain(&mut self) {
        self.ended.cancel();
        for task in &mut self.tasks.0 {
            let _ = task.await;
        }
    }
}

/// Copies one output. When the client is gone it stops, and lets go: a process that writes on learns it by its broken pipe, one
/// with a terminal by its hangup. After the process's end, what it has written is passed on, and what others who have inherited
/// its output write within [`DRAIN`].
async fn copy(from: Watched, to: Option<Out>, gone: CancellationToken, ended: CancellationToken) {
    let mut buffer = vec![0u8; BUFFER];
    // After the end: what the process has left, and until when others are listened to.
    let mut left: Option<u64> = None;
    let mut until = None;
    loop {
        if left == Some(0) && until.is_none() {
            until = Some(tokio::time::Instant::now() + DRAIN);
        }
        let read = tokio::select! {
            biased;
            () = gone.cancelled() => return,
            () = ended.cancelled(), if left.is_none() => {
                left = Some(rustix::io::ioctl_fionread(from.get_ref()).unwrap_or(0));
                continue;
            }
            // Whoever writes for ever gets no more time than who is silent.
            () = tokio::time::sleep_until(until.unwrap_or_else(tokio::time::Instant::now)), if until.is_some() => return,
            read = from.async_io(Interest::READABLE, |fd| rustix::io::read(fd.as_fd(), &mut buffer).map_err(io::Error::from)) => read,
        };
        match read {
            // A terminal whose other side is closed says so with an error.
            Ok(0) | Err(_) => return,
            Ok(n) => {
                left = left.map(|left| left.saturating_sub(n as u64));
                if let Some(out) = &to {
                    let sent = tokio::select! {
                        sent = out.send(Bytes::copy_from_slice(&buffer[..n])) => sent,
                        () = gone.cancelled() => return,
                    };
                    if sent.is_err() {
                        return;
                    }
                }
            }
        }
    }
}

/// Copies a client's input. A process that does not read any more ends it: the rest is thrown away, so that the connection goes on.
async fn feed(mut from: Inbox, to: Watched) {
    while let Some(bytes) = from.recv().await {
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            match to.async_io(Interest::WRITABLE, |fd| rustix::io::write(fd.as_fd(), rest).map_err(io::Error::from)).await {
                Ok(n) => rest = &rest[n..],
                Err(_) => return,
            }
        }
    }
}

/// A pipe or terminal, for async use.
fn watched(fd: OwnedFd, interest: Interest) -> Result<AsyncFd<OwnedFd>, Error> {
    let io = |source: io::Error| Error::File { action: "watch", path: "a process's stream".into(), source };
    let flags = rustix::fs::fcntl_getfl(&fd).map_err(|e| io(e.into()))?;
    rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(|e| io(e.into()))?;
    super::async_fd(fd, interest).map_err(io)
}

/// Reads `{"Width":80,"Height":24}` objects from chunks that may be cut anywhere.
#[derive(Default)]
struct Sizes {
    text: Vec<u8>,
}

#[derive(serde::Deserialize)]
struct Size {
    #[serde(rename = "Width", default)]
    width: u16,
    #[serde(rename = "Height", default)]
    height: u16,
}

impl Sizes {
    fn push(&mut self, chunk: &[u8]) -> Vec<(u16, u16)> {
        self.text.extend_from_slice(chunk);
        let mut sizes = Vec::new();
        let mut objects = serde_json::Deserializer::from_slice(&self.text).into_iter::<Size>();
        let mut used = 0;
        while let Some(Ok(size)) = objects.next() {
            used = objects.byte_offset();
            if size.width > 0 && size.height > 0 {
                sizes.push((size.width, size.height));
            }
        }
        self.text.drain(..used);
        // What is no size and does not become one is dropped.
        if self.text.len() > 1024 {
            self.text.clear();
        }
        sizes
    }
}

/// An attach for a client, until the container's output or the client ends.
pub(super) async fn attach(server: &Arc<Server>, container: &ContainerId, tty: bool, wires: &mut Wires) -> Outcome {
    let closing = wires.closing.clone();
    let ended = tokio::select! {
        ended = try_attach(server, container, tty, wires) => ended,
        () = closing.cancelled() => Err(Arc::new(Error::Closing)),
    };
    match ended {
        Ok(()) => Outcome::Exit(0),
        Err(error) => Outcome::Failure(text(&*error)),
    }
}

async fn try_attach(server: &Arc<Server>, container: &ContainerId, tty: bool, wires: &mut Wires) -> Result<(), Arc<Error>> {
    let (container, live) = exec::running(server, container.as_str()).await?;
    let has_stdin = server.board.container(container.as_str()).is_some_and(|c| c.facts.spec.stdin);
    let mut events = server.events.listen();
    let shim = live.shim()?.clone();
    let request = ShimRequest::Attach {
        id: container.as_str().into(),
        stdin: wires.stdin.is_some() && has_stdin,
        stdout: wires.stdout.is_some(),
        stderr: wires.stderr.is_some() && !tty,
    };
    let mut answer = shim.call("attach to container", request, Vec::new()).await?;
    let Reply::Attached { stdin, stdout, stderr } = answer.reply else {
        return Err(Arc::new(shim.unexpected("attach to container")));
    };
    let mut inputs = Tasks::default();
    if let (Some(from), Some(fd)) = (wires.stdin.take(), answer.take(stdin)) {
        let interest = if tty { Interest::READABLE | Interest::WRITABLE } else { Interest::WRITABLE };
        inputs.0.push(tokio::spawn(feed(from, Arc::new(watched(fd, interest)?))));
    }
    let mut outputs = Outputs::new(wires);
    for (index, to) in [(stdout, &wires.stdout), (stderr, &wires.stderr)] {
        if let Some(fd) = answer.take(index) {
            outputs.copy(Arc::new(watched(fd, Interest::READABLE)?), to.clone());
        }
    }
    let only_input = outputs.tasks.0.is_empty();
    let mut resize = wires.resize.take();
    let mut sizes = Sizes::default();
    let ended = async {
        for task in &mut outputs.tasks.0 {
            let _ = task.await;
        }
        // Only input: it lasts as long as the container.
        while only_input && server.board.container(container.as_str()).is_some_and(|c| c.state == ContainerState::Running) {
            if let Err(tokio::sync::broadcast::error::RecvError::Closed) = events.recv().await {
                break;
            }
        }
    };
    tokio::pin!(ended);
    loop {
        tokio::select! {
            () = &mut ended => return if runs_on(server, &container).await { Err(Arc::new(Error::OutputEnded)) } else { Ok(()) },
            () = wires.gone.cancelled() => return Err(Arc::new(Error::ClientGone)),
            chunk = next(&mut resize) => match chunk {
                Some(chunk) => for (width, height) in sizes.push(&chunk) {
                    let request = ShimRequest::Resize { id: container.as_str().into(), exec: None, width, height };
                    let _ = shim.call("resize the terminal", request, Vec::new()).await;
                },
                None => resize = None,
            },
        }
    }
}

/// Whether a container whose output has ended is still running a moment later: its end may be heard of after that of its output.
async fn runs_on(server: &Server, container: &ContainerId) -> bool {
    let mut events = server.events.listen();
    let exited = async {
        while server.board.container(container.as_str()).is_some_and(|c| c.state == ContainerState::Running) {
            if let Err(tokio::sync::broadcast::error::RecvError::Closed) = events.recv().await {
                return;
            }
        }
    };
    tokio::time::timeout(DRAIN, exited).await.is_err()
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;
    use crate::streaming::websocket::{Form, WebSocket};
    use crate::streaming::wire::Peer;

    #[tokio::test(start_paused = true)]
    async fn what_a_process_has_written_arrives_however_late_it_is_read() {
        // What inherited the output keeps it open, and says nothing.
        let (read, inherited) = rustix::pipe::pipe().unwrap();
        let text = vec![b'x'; 60_000];
        assert_eq!(rustix::io::write(&inherited, &text).unwrap(), text.len());
        let (mut client, server) = tokio::io::duplex(1024);
        let socket = WebSocket::start(server, Peer::unknown(), Form::Binary);
        let out = Out::WebSocket(socket.channel(1));
        let mut before = 0;
        while tokio::time::timeout(DRAIN, out.send(vec![b'y'; 1000].into())).await.is_ok() {
            before += 1000;
        }
        let (gone, ended) = (CancellationToken::new(), CancellationToken::new());
        ended.cancel();
        let copied = tokio::spawn(copy(Arc::new(watched(read, Interest::READABLE).unwrap()), Some(out), gone, ended));
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert!(!copied.is_finished(), "the client has read nothing yet");
        let mut seen = (0, 0);
        while seen != (before, text.len()) {
            let mut buffer = vec![0; 4096];
            let n = tokio::time::timeout(Duration::from_secs(3600), client.read(&mut buffer)).await.unwrap().unwrap();
            assert!(n > 0, "{seen:?}");
            seen.0 += buffer[..n].iter().filter(|b| **b == b'y').count();
            seen.1 += buffer[..n].iter().filter(|b| **b == b'x').count();
        }
        tokio::time::timeout(Duration::from_secs(3600), copied).await.unwrap().unwrap();
        drop((inherited, socket));
    }

    #[test]
    fn terminal_sizes_are_read_whatever_the_cuts() {
        let mut sizes = Sizes::default();
        let text = "{\"Width\":80,\"Height\":24}\n{\"Height\":50,\"Width\":100}\n{\"Width\":0,\"Height\":9}\n";
        let mut seen = Vec::new();
        for byte in text.as_bytes().chunks(3) {
            seen.extend(sizes.push(byte));
        }
        assert_eq!(seen, [(80, 24), (100, 50)]);
    }
}
