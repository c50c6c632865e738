//! Joining a client's streams to a process: an exec's or a container's own.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use berth_shim::protocol::{Reply, Request as ShimRequest};
use bytes::Bytes;
use rustix::fs::OFlags;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::wires::{Out, Outcome, Wires};
use crate::Server;
use crate::board::ContainerState;
use crate::error::{Error, text};
use crate::exec;
use crate::id::ContainerId;

/// How long output is read on after the process has ended while others keep its pipes open.
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
    match try_exec(server, container, command, tty, wires).await {
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
    let mut tasks = Tasks::default();
    let mut outputs = Vec::new();
    if let Some(console) = running.console.take() {
        let console = Arc::new(console_fd(console)?);
        if let Some(stdin) = stdin {
            tasks.0.push(tokio::spawn(write_console(stdin, console.clone())));
        }
        outputs.push(tokio::spawn(read_console(console, wires.stdout.clone(), wires.gone.clone())));
    } else {
        if let (Some(stdin), Some(fd)) = (stdin, running.stdin.take()) {
            tasks.0.push(tokio::spawn(write_pipe(stdin, fd)));
        }
        outputs.extend(running.stdout.take().map(|fd| tokio::spawn(read_pipe(fd, wires.stdout.clone()))));
        outputs.extend(running.stderr.take().map(|fd| tokio::spawn(read_pipe(fd, wires.stderr.clone()))));
    }
    let code = {
        let mut resize = wires.resize.take();
        let mut sizes = Sizes::default();
        loop {
            tokio::select! {
                code = running.handle.wait() => break code,
                chunk = next(&mut resize) => match chunk {
                    Some(chunk) => for (width, height) in sizes.push(&chunk) {
                        let _ = running.handle.resize(width, height).await;
                    },
                    None => resize = None,
                },
            }
        }
    };
    drain(outputs).await;
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

async fn next(receiver: &mut Option<mpsc::Receiver<Bytes>>) -> Option<Bytes> {
    match receiver {
        Some(receiver) => receiver.recv().await,
        None => std::future::pending().await,
    }
}

/// Waits until the outputs have been passed on, or nobody writes any more to speak of.
async fn drain(outputs: Vec<tokio::task::JoinHandle<()>>) {
    let deadline = tokio::time::Instant::now() + DRAIN;
    for mut output in outputs {
        if tokio::time::timeout_at(deadline, &mut output).await.is_err() {
            output.abort();
        }
    }
}

async fn read_pipe(fd: OwnedFd, to: Option<Out>) {
    let Some(mut pipe) = exec::reader(fd) else { return };
    let mut buffer = vec![0u8; BUFFER];
    let mut to = to;
    loop {
        match pipe.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            // A client that is gone does not stop the process: its output is read and thrown away.
            Ok(n) => {
                if let Some(out) = &to
                    && out.send(Bytes::copy_from_slice(&buffer[..n])).await.is_err()
                {
                    to = None;
                }
            }
        }
    }
}

async fn write_pipe(mut from: mpsc::Receiver<Bytes>, fd: OwnedFd) {
    let Some(mut pipe) = exec::writer(fd) else { return };
    while let Some(bytes) = from.recv().await {
        if pipe.write_all(&bytes).await.is_err() {
            // The process does not read any more: the rest is thrown away, so that the connection goes on.
            drop(pipe);
            while from.recv().await.is_some() {}
            return;
        }
    }
}

fn console_fd(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>, Error> {
    let io = |source: io::Error| Error::File { action: "open", path: "terminal".into(), source };
    let flags = rustix::fs::fcntl_getfl(&fd).map_err(|e| io(e.into()))?;
    rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(|e| io(e.into()))?;
    super::async_fd(fd, Interest::READABLE | Interest::WRITABLE).map_err(io)
}

/// Reads a terminal until its other side is closed, or the client is gone: then it is let go, which hangs the process up.
async fn read_console(console: Arc<AsyncFd<OwnedFd>>, to: Option<Out>, gone: CancellationToken) {
    let mut buffer = vec![0u8; BUFFER];
    loop {
        let read = console.async_io(Interest::READABLE, |fd| rustix::io::read(fd.as_fd(), &mut buffer).map_err(io::Error::from));
        let read = tokio::select! {
            read = read => read,
            () = gone.cancelled() => return,
        };
        match read {
            // A terminal whose other side is closed says so with an error.
            Ok(0) | Err(_) => return,
            Ok(n) => {
                if let Some(out) = &to
                    && out.send(Bytes::copy_from_slice(&buffer[..n])).await.is_err()
                {
                    return;
                }
            }
        }
    }
}

async fn write_console(mut from: mpsc::Receiver<Bytes>, console: Arc<AsyncFd<OwnedFd>>) {
    while let Some(bytes) = from.recv().await {
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            match console.async_io(Interest::WRITABLE, |fd| rustix::io::write(fd.as_fd(), rest).map_err(io::Error::from)).await {
                Ok(n) => rest = &rest[n..],
                Err(_) => return,
            }
        }
    }
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
    match try_attach(server, container, tty, wires).await {
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
    let mut tasks = Tasks::default();
    if let (Some(from), Some(fd)) = (wires.stdin.take(), answer.take(stdin)) {
        let task =
            if tty { tokio::spawn(write_console(from, Arc::new(console_fd(fd)?))) } else { tokio::spawn(write_pipe(from, fd)) };
        tasks.0.push(task);
    }
    let stdout = answer.take(stdout).map(|fd| read_pipe(fd, wires.stdout.clone()));
    let stderr = answer.take(stderr).map(|fd| read_pipe(fd, wires.stderr.clone()));
    let mut resize = wires.resize.take();
    let mut sizes = Sizes::default();
    let outputs = async {
        match (stdout, stderr) {
            (Some(a), Some(b)) => {
                tokio::join!(a, b);
            }
            (Some(a), None) | (None, Some(a)) => a.await,
            // Only input: it lasts as long as the container.
            (None, None) => {
                while server.board.container(container.as_str()).is_some_and(|c| c.state == ContainerState::Running) {
                    if let Err(tokio::sync::broadcast::error::RecvError::Closed) = events.recv().await {
                        break;
                    }
                }
            }
        }
    };
    tokio::pin!(outputs);
    loop {
        tokio::select! {
            () = &mut outputs => return Ok(()),
            () = wires.gone.cancelled() => return Ok(()),
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

#[cfg(test)]
mod tests {
    use super::*;

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
