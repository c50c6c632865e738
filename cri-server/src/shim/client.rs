//! One connection to a shim: requests with descriptors, replies by number, events to whoever asked for them. Must not decide anything.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use berth_linux::fdpass::{MAX_FDS, recv_with_fds, send_with_fds};
use berth_shim::protocol::{Decoder, Event, FailureKind, FrameError, FromShim, Reply, Request, ToShim, VERSION, encode};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use crate::error::Error;
use crate::progress::Progress;
use crate::steps::Step;

/// A reply with its descriptors.
pub(crate) struct Answer {
    pub(crate) reply: Reply,
    fds: Vec<Option<OwnedFd>>,
}

impl Answer {
    /// Takes the descriptor at an index, once.
    pub(crate) fn take(&mut self, index: Option<u32>) -> Option<OwnedFd> {
        self.fds.get_mut(index? as usize)?.take()
    }

    /// All descriptors in order.
    pub(crate) fn into_fds(self) -> Vec<OwnedFd> {
        self.fds.into_iter().flatten().collect()
    }
}

/// Nobody waits for an answer any more.
struct Forget<'a> {
    shared: &'a Mutex<Shared>,
    seq: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(self.shared).pending.remove(&self.seq);
    }
}

/// The connection has ended.
#[derive(Debug, Clone)]
pub(crate) struct Gone;

type Waiter = oneshot::Sender<Answer>;

/// What goes to the shim, in a box: the room that a channel sets aside is for 32 of them at least, one for each shim.
type Frame = (Vec<u8>, Vec<OwnedFd>);

#[derive(Default)]
struct Shared {
    closed: bool,
    pending: HashMap<u64, Waiter>,
    execs: HashMap<String, oneshot::Sender<i32>>,
}

/// A connection to a shim. Dropping the last handle closes it, which kills the execs it owns.
pub(crate) struct ShimClient {
    sandbox: String,
    /// The shim's, once it has said hello.
    pid: AtomicI32,
    progress: Arc<Progress>,
    seq: AtomicU64,
    shared: Arc<Mutex<Shared>>,
    out: mpsc::UnboundedSender<Box<Frame>>,
    reader: tokio::task::AbortHandle,
}

impl Drop for ShimClient {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl ShimClient {
    /// Takes over a connected socket. `events` gets what the shim reports (after [`Request::Subscribe`]); `gone` is called
    /// once when the connection ends.
    pub(crate) fn new(
        sandbox: &str,
        progress: Arc<Progress>,
        stream: std::os::unix::net::UnixStream,
        events: impl Fn(Event) + Send + Sync + 'static,
        gone: impl FnOnce(Gone) + Send + 'static,
    ) -> io::Result<Self> {
        let stream = Arc::new(UnixStream::from_std(stream)?);
        let shared = Arc::new(Mutex::new(Shared::default()));
        let (out, queue) = mpsc::unbounded_channel();
        tokio::spawn(write_frames(stream.clone(), queue));
        let reading = shared.clone();
        let reader = tokio::spawn(async move {
            let end = read_frames(&stream, &reading, &events).await;
            tracing::debug!(error = ?end.err(), "connection to shim ended");
            let mut state = lock(&reading);
            state.closed = true;
            state.pending.clear();
            state.execs.clear();
            drop(state);
            gone(Gone);
        });
        let (pid, seq) = (AtomicI32::new(0), AtomicU64::new(1));
        Ok(Self { sandbox: sandbox.into(), pid, progress, seq, shared, out, reader: reader.abort_handle() })
    }

    fn gone(&self, reason: &str) -> Error {
        Error::ShimGone { id: self.sandbox.clone(), reason: reason.into() }
    }

    /// Sends a request and waits for its answer; a refusal is an error with the shim's text. Each request is a step with a
    /// limit. One that is given up may still be carried out: requests are done in their order, so what undoes it comes after it.
    pub(crate) async fn call(&self, action: &'static str, request: Request, fds: Vec<OwnedFd>) -> Result<Answer, Error> {
        let (step, about) = Step::of(&request);
        let subject = about.unwrap_or(&self.sandbox).to_owned();
        let object = match self.pid.load(Ordering::Relaxed) {
            0 => format!("{action}, asked of its shim"),
            pid => format!("{action}, asked of shim {pid}"),
        };
        let asked = self.ask(action, request, fds);
        self.progress.step(&subject, step, object, asked).await
    }

    async fn ask(&self, action: &'static str, request: Request, fds: Vec<OwnedFd>) -> Result<Answer, Error> {
        let seq = self.seq.fetch_add(1, Ordering::Relaxed);
        let frame = encode(&ToShim { seq, request }, fds.len()).map_err(|e| Error::Shim { action, message: e.to_string() })?;
        let (tx, rx) = oneshot::channel();
        {
            let mut state = lock(&self.shared);
            if state.closed {
                return Err(self.gone("the connection is closed"));
            }
            state.pending.insert(seq, tx);
        }
        let _forget = Forget { shared: &self.shared, seq };
        self.out.send(Box::new((frame, fds))).map_err(|_| self.gone("the connection is closed"))?;
        let answer = rx.await.map_err(|_| self.gone("it ended before it answered"))?;
        match answer.reply {
            Reply::Error(failure) => Err(match failure.kind {
                FailureKind::Start => Error::Start { id: action.into(), message: failure.message },
                _ => Error::Shim { action, message: failure.message },
            }),
            _ => Ok(answer),
        }
    }

    /// Says hello and asks for events; everything after this is heard.
    pub(crate) async fn greet(&self) -> Result<i32, Error> {
        let answer = self.call("greet the shim", Request::Hello { version: VERSION }, Vec::new()).await?;
        let Reply::Hello { pid, .. } = answer.reply else { return Err(self.unexpected("greet the shim")) };
        self.pid.store(pid, Ordering::Relaxed);
        self.call("subscribe to the shim", Request::Subscribe, Vec::new()).await?;
        Ok(pid)
    }

    /// The reply was of the wrong kind.
    pub(crate) fn unexpected(&self, action: &'static str) -> Error {
        Error::Shim { action, message: "the shim's answer is of another kind".into() }
    }

    /// Asks to be told when an exec ends. Must come before the exec is requested.
    pub(crate) fn watch_exec(&self, id: &str) -> oneshot::Receiver<i32> {
        let (tx, rx) = oneshot::channel();
        lock(&self.shared).execs.insert(id.to_owned(), tx);
        rx
    }

    /// No longer interested.
    pub(crate) fn forget_exec(&self, id: &str) {
        lock(&self.shared).execs.remove(id);
    }
}

async fn write_frames(stream: Arc<UnixStream>, mut queue: mpsc::UnboundedReceiver<Box<Frame>>) {
    while let Some(frame) = queue.recv().await {
        let (bytes, fds) = *frame;
        if let Err(error) = write_frame(&stream, &bytes, &fds).await {
            tracing::debug!(%error, "writing to shim");
            return; // The reader sees the end of the connection too.
        }
    }
}

async fn write_frame(stream: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let (mut rest, mut left) = (bytes, borrowed.as_slice());
    while !rest.is_empty() {
        let (now, later) = left.split_at(left.len().min(MAX_FDS));
        let piece = if later.is_empty() { rest } else { &rest[..1] };
        let sent = stream.async_io(Interest::WRITABLE, || send_with_fds(stream.as_fd(), piece, now)).await?;
        rest = &rest[sent..];
        left = later;
    }
    Ok(())
}

async fn read_frames(stream: &UnixStream, shared: &Mutex<Shared>, events: &(impl Fn(Event) + Sync)) -> io::Result<()> {
    let mut decoder = Decoder::new();
    loop {
        stream.readable().await?;
        // The buffer lives only while there is something to read: an idle connection costs nothing.
        let mut buffer = vec![0u8; 16 * 1024];
        match stream.try_io(Interest::READABLE, || recv_with_fds(stream.as_fd(), &mut buffer, MAX_FDS)) {
            Ok((0, _)) => return Ok(()),
            Ok((n, fds)) => decoder.push(&buffer[..n], fds),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
            Err(e) => return Err(e),
        }
        drop(buffer);
        loop {
            match decoder.next::<FromShim>() {
                Ok(Some((message, fds))) => dispatch(message, fds, shared, events),
                Ok(None) => break,
                // A message of a later version: skipped, the stream is in step.
                Err(FrameError::Body { source, .. }) => tracing::debug!(%source, "message of a later shim skipped"),
                Err(e) => return Err(io::Error::other(e)),
            }
        }
    }
}

fn dispatch(message: FromShim, fds: Vec<OwnedFd>, shared: &Mutex<Shared>, events: &(impl Fn(Event) + Sync)) {
    match message {
        FromShim::Reply { seq, reply } => {
            if let Some(waiter) = lock(shared).pending.remove(&seq) {
                let _ = waiter.send(Answer { reply, fds: fds.into_iter().map(Some).collect() });
            }
        }
        FromShim::Event(Event::ExecExited { id, code, .. }) => {
            if let Some(waiter) = lock(shared).execs.remove(&id) {
                let _ = waiter.send(code);
            }
        }
        FromShim::Event(event) => events(event),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_shim::protocol::{ExitRecord, Failure};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream as Socket;

    /// The other end of a connection, driven by hand.
    struct FakeShim(Socket);

    impl FakeShim {
        fn request(&mut self) -> ToShim {
            let mut head = [0u8; 8];
            self.0.read_exact(&mut head).unwrap();
            let mut body = vec![0u8; u32::from_le_bytes(head[..4].try_into().unwrap()) as usize];
            self.0.read_exact(&mut body).unwrap();
            serde_json::from_slice(&body).unwrap()
        }

        fn send(&mut self, message: &FromShim) {
            self.0.write_all(&encode(message, 0).unwrap()).unwrap();
        }

        fn reply(&mut self, seq: u64, reply: Reply) {
            self.send(&FromShim::Reply { seq, reply });
        }
    }

    fn pair(
        events: impl Fn(Event) + Send + Sync + 'static,
        gone: impl FnOnce(Gone) + Send + 'static,
    ) -> (Arc<ShimClient>, FakeShim) {
        let (ours, theirs) = Socket::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Arc::new(ShimClient::new("s", Arc::default(), ours, events, gone).unwrap()), FakeShim(theirs))
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn replies_find_their_requests_in_any_order() {
        let (client, mut shim) = pair(|_| {}, |_| {});
        let calls: Vec<_> = (0..3)
            .map(|_| {
                let client = client.clone();
                tokio::spawn(async move { client.call("ask", Request::State, Vec::new()).await })
            })
            .collect();
        let asked: Vec<u64> = (0..3).map(|_| shim.request().seq).collect();
        for seq in asked.iter().rev() {
            shim.reply(*seq, Reply::Done);
        }
        for call in calls {
            assert!(matches!(call.await.unwrap().unwrap().reply, Reply::Done));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_shim_that_does_not_answer_is_given_up_by_name_and_its_late_answer_is_dropped() {
        let (client, mut shim) = pair(|_| {}, |_| {});
        let error = client.call("ask", Request::State, Vec::new()).await.err().unwrap();
        assert!(error.to_string().starts_with("ask the shim of s (ask, asked of its shim): not ended since"), "{error}");
        assert!(lock(&client.shared).pending.is_empty());
        let seq = shim.request().seq;
        shim.reply(seq, Reply::Done);
        let next = client.call("ask", Request::State, Vec::new());
        let asked = async {
            let seq = tokio::task::spawn_blocking(move || (shim.request().seq, shim)).await.unwrap();
            let (seq, mut shim) = seq;
            shim.reply(seq, Reply::Done);
            shim
        };
        assert!(tokio::join!(next, asked).0.is_ok());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn descriptors_travel_with_their_request() {
        use berth_linux::fdpass::recv_with_fds;
        let (client, shim) = pair(|_| {}, |_| {});
        let file: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
        let caller = client.clone();
        tokio::spawn(async move { caller.call("make", Request::Namespaces, vec![file]).await });
        let mut buffer = vec![0u8; 4096];
        let (n, fds) = recv_with_fds(shim.0.as_fd(), &mut buffer, MAX_FDS).unwrap();
        assert!(n > 8);
        assert_eq!(fds.len(), 1);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_refusal_carries_the_shims_own_words() {
        let (client, mut shim) = pair(|_| {}, |_| {});
        let caller = client.clone();
        let call = tokio::spawn(async move { caller.call("start container", Request::State, Vec::new()).await });
        let seq = shim.request().seq;
        let failure = Failure { kind: FailureKind::Start, message: "exec: \"nope\": not found".into(), errno: Some(2) };
        shim.reply(seq, Reply::Error(failure));
        let Err(Error::Start { message, .. }) = call.await.unwrap() else { panic!("not a start error") };
        assert_eq!(message, "exec: \"nope\": not found");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn events_and_the_end_of_an_exec_are_heard_and_the_end_of_the_shim_ends_all_calls() {
        let (heard, mut events) = mpsc::unbounded_channel();
        let (over, ended) = oneshot::channel();
        let (client, mut shim) = pair(
            move |event| {
                let _ = heard.send(event);
            },
            move |_| {
                let _ = over.send(());
            },
        );
        let exec = client.watch_exec("e1");
        let lost = client.watch_exec("e2");
        let exit = ExitRecord {
            pid: 1,
            code: 2,
            signal: 0,
            oom: false,
            started_at_ns: 0,
            finished_at_ns: 1,
            start_error: String::new(),
        };
        shim.send(&FromShim::Event(Event::Exited { id: "c".into(), exit }));
        // A message of a later version is skipped.
        let later = br#"{"event":{"moon":{"phase":3}}}"#;
        shim.0.write_all(&[&(later.len() as u32).to_le_bytes()[..], &[0; 4], later].concat()).unwrap();
        shim.send(&FromShim::Event(Event::ExecExited { container: "c".into(), id: "e1".into(), code: 7, signal: 0 }));
        assert_eq!(exec.await.unwrap(), 7);
        assert!(matches!(events.recv().await.unwrap(), Event::Exited { .. }));
        let caller = client.clone();
        let call = tokio::spawn(async move { caller.call("ask", Request::State, Vec::new()).await });
        shim.request();
        drop(shim);
        assert!(matches!(call.await.unwrap(), Err(Error::ShimGone { .. })));
        assert!(lost.await.is_err());
        ended.await.unwrap();
        assert!(matches!(client.call("ask", Request::State, Vec::new()).await, Err(Error::ShimGone { .. })));
    }
}
