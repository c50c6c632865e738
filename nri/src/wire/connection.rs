//! One plugin's connection: calls to the plugin with their answers, and the plugin's calls to us. Two tasks own the socket's
//! halves; both end with the connection.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::future::BoxFuture;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::mux::{self, PLUGIN, RUNTIME};
use super::ttrpc::{self, Assembler, Incoming, Request, Response};
use crate::Error;

pub(crate) use super::ttrpc::Status;

/// What a call to us comes to: the encoded answer, or how it failed.
pub(crate) type Answer = Result<Vec<u8>, Status>;

/// What the plugin may call.
pub(crate) trait Service: Send + Sync + 'static {
    /// Answers one call.
    fn call(&self, service: String, method: String, payload: Vec<u8>) -> BoxFuture<'static, Answer>;
}

/// Calls of one plugin that may be under way at once.
const CALLS: usize = 8;
/// Messages that may wait to be written.
const QUEUE: usize = 32;

#[derive(Default)]
struct Waiting {
    /// Calls so far: streams of a client are the odd numbers.
    calls: u32,
    answers: HashMap<u32, oneshot::Sender<Response>>,
}

/// A connection. It is closed when this is dropped.
pub(crate) struct Connection {
    queue: mpsc::Sender<Vec<u8>>,
    waiting: Arc<Mutex<Waiting>>,
    closed: CancellationToken,
    _guard: DropGuard,
}

fn lock(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Connection {
    /// Runs a connection.
    pub(crate) fn new(stream: UnixStream, service: Arc<dyn Service>) -> Self {
        let (reader, writer) = stream.into_split();
        let (queue, outgoing) = mpsc::channel(QUEUE);
        let closed = CancellationToken::new();
        let waiting = Arc::new(Mutex::new(Waiting::default()));
        tokio::spawn(write(writer, outgoing, closed.clone()));
        let incoming =
            Reader { service, queue: queue.clone(), waiting: waiting.clone(), running: Arc::new(Semaphore::new(CALLS)) };
        let token = closed.clone();
        tokio::spawn(async move {
            tokio::select! {
                result = incoming.run(reader) => if let Err(error) = result {
                    tracing::debug!(%error, "an NRI plugin's connection ends");
                },
                () = token.cancelled() => {}
            }
            token.cancel();
        });
        Self { queue, waiting, _guard: closed.clone().drop_guard(), closed }
    }

    /// Cancelled when the connection has ended.
    pub(crate) fn closed(&self) -> &CancellationToken {
        &self.closed
    }

    /// Calls the plugin. None: the connection is closed.
    pub(crate) async fn call(&self, service: &str, method: &str, payload: Vec<u8>, timeout_nano: i64) -> Option<Answer> {
        let (sender, answer) = oneshot::channel();
        let stream = {
            let mut waiting = lock(&self.waiting);
            waiting.calls = waiting.calls.wrapping_add(1);
            let stream = waiting.calls.wrapping_mul(2).wrapping_sub(1);
            waiting.answers.insert(stream, sender);
            stream
        };
        let _forget = Forget { waiting: &self.waiting, stream };
        let request = Request { service: service.into(), method: method.into(), payload, timeout_nano };
        let bytes = mux::chunks(PLUGIN, &ttrpc::request(stream, &request));
        let response = tokio::select! {
            () = self.closed.cancelled() => return None,
            response = async { self.queue.send(bytes).await.ok()?; answer.await.ok() } => response?,
        };
        Some(match response.status {
            Some(status) if status.code != 0 => Err(status),
            _ => Ok(response.payload),
        })
    }
}

/// A caller that gives up waits no longer.
struct Forget<'a> {
    waiting: &'a Mutex<Waiting>,
    stream: u32,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(self.waiting).answers.remove(&self.stream);
    }
}

async fn write(mut writer: OwnedWriteHalf, mut outgoing: mpsc::Receiver<Vec<u8>>, closed: CancellationToken) {
    loop {
        let bytes = tokio::select! {
            bytes = outgoing.recv() => bytes,
            () = closed.cancelled() => None,
        };
        let Some(bytes) = bytes else { return };
        let written = tokio::select! {
            result = writer.write_all(&bytes) => result.is_ok(),
            () = closed.cancelled() => false,
        };
        if !written {
            closed.cancel();
            return;
        }
    }
}

struct Reader {
    service: Arc<dyn Service>,
    queue: mpsc::Sender<Vec<u8>>,
    waiting: Arc<Mutex<Waiting>>,
    running: Arc<Semaphore>,
}

impl Reader {
    /// Reads until the connection ends.
    async fn run(self, mut reader: OwnedReadHalf) -> Result<(), Error> {
        let io = |source| Error::Connection { plugin: "(reading)".into(), source };
        let (mut answers, mut calls) = (Assembler::default(), Assembler::default());
        let mut chunk = Vec::new();
        loop {
            let mut header = [0; mux::HEADER];
            if reader.read_exact(&mut header).await.is_err() {
                return Ok(()); // The end, wherever it comes.
            }
            let (id, length) = mux::header(header)?;
            chunk.resize(length, 0);
            reader.read_exact(&mut chunk).await.map_err(io)?;
            let assembler = match id {
                PLUGIN => &mut answers,
                RUNTIME => &mut calls,
                _ => continue, // Nobody listens there.
            };
            assembler.push(&chunk);
            while let Some(message) = assembler.next()? {
                match (id, message) {
                    (PLUGIN, Incoming::Response(stream, response)) => {
                        if let Some(waiter) = lock(&self.waiting).answers.remove(&stream) {
                            let _ = waiter.send(response);
                        }
                    }
                    (RUNTIME, Incoming::Request(stream, request)) => self.serve(stream, request)?,
                    _ => return Err(Error::Protocol { what: "ttRPC", reason: "a message for the other side".into() }),
                }
            }
            // One long message shall not be paid for by every later one.
            chunk.shrink_to(64 << 10);
        }
    }

    /// Answers a call. At most [`CALLS`] are under way, their answers included; more are refused, and a plugin that reads no
    /// refusals is cut: it can not make us keep more.
    fn serve(&self, stream: u32, request: Request) -> Result<(), Error> {
        let encoded = move |answer: Answer| {
            let response = match answer {
                Ok(payload) => Response { status: None, payload },
                Err(status) => Response { status: Some(status), payload: Vec::new() },
            };
            mux::chunks(RUNTIME, &ttrpc::response(stream, &response))
        };
        let Ok(permit) = self.running.clone().try_acquire_owned() else {
            let refusal = Status { code: super::RESOURCE_EXHAUSTED, message: "too many calls at once".into() };
            let full = |_| Error::Protocol { what: "ttRPC", reason: "it calls without reading the answers".into() };
            return self.queue.try_send(encoded(Err(refusal))).map_err(full);
        };
        let (service, queue) = (self.service.clone(), self.queue.clone());
        tokio::spawn(async move {
            let answer = service.call(request.service, request.method, request.payload).await;
            let _ = queue.send(encoded(answer)).await;
            drop(permit);
        });
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The plugin's side of a connection, for tests: the same code with the two logical connections exchanged.
    pub(crate) mod fake {
        use super::*;

        /// A plugin made of a function.
        pub(crate) struct Peer {
            stream: tokio::sync::Mutex<OwnedWriteHalf>,
        }

        /// How a fake plugin answers: method and payload in, answer out.
        pub(crate) type Handler = Arc<dyn Fn(String, Vec<u8>) -> BoxFuture<'static, Answer> + Send + Sync>;

        impl Peer {
            /// Connects; answers every call by `handler`.
            pub(crate) fn new(stream: UnixStream, handler: Handler) -> Arc<Self> {
                let (mut reader, writer) = stream.into_split();
                let peer = Arc::new(Self { stream: tokio::sync::Mutex::new(writer) });
                let out = peer.clone();
                tokio::spawn(async move {
                    let mut assembler = Assembler::default();
                    loop {
                        let mut header = [0; mux::HEADER];
                        if reader.read_exact(&mut header).await.is_err() {
                            return;
                        }
                        let (id, length) = mux::header(header).unwrap();
                        let mut chunk = vec![0; length];
                        reader.read_exact(&mut chunk).await.unwrap();
                        if id != PLUGIN {
                            continue;
                        }
                        assembler.push(&chunk);
                        while let Some(Incoming::Request(stream, request)) = assembler.next().unwrap() {
                            let (out, handler) = (out.clone(), handler.clone());
                            tokio::spawn(async move {
                                let response = match handler(request.method, request.payload).await {
                                    Ok(payload) => Response { status: None, payload },
                                    Err(status) => Response { status: Some(status), payload: vec![] },
                                };
                                out.send(PLUGIN, &ttrpc::response(stream, &response)).await;
                            });
                        }
                    }
                });
                peer
            }

            async fn send(&self, id: u32, message: &[u8]) {
                let _ = self.stream.lock().await.write_all(&mux::chunks(id, message)).await;
            }

            /// Calls the runtime; the answer is not waited for.
            pub(crate) async fn call(&self, method: &str, payload: &impl prost::Message) {
                let request = Request {
                    service: "nri.pkg.api.v1alpha1.Runtime".into(),
                    method: method.into(),
                    payload: payload.encode_to_vec(),
                    timeout_nano: 0,
                };
                self.send(RUNTIME, &ttrpc::request(1, &request)).await;
            }
        }
    }

    struct Silent;

    impl Service for Silent {
        fn call(&self, _: String, _: String, _: Vec<u8>) -> BoxFuture<'static, Answer> {
            Box::pin(async { Ok(vec![]) })
        }
    }

    #[tokio::test]
    async fn answers_find_their_calls_in_any_order() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let connection = Connection::new(ours, Arc::new(Silent));
        let first = Arc::new(tokio::sync::Notify::new());
        let _peer = fake::Peer::new(
            theirs,
            Arc::new(move |method, payload| {
                let first = first.clone();
                Box::pin(async move {
                    match method.as_str() {
                        "slow" => first.notified().await,
                        _ => first.notify_one(),
                    }
                    Ok([payload, method.into_bytes()].concat())
                })
            }),
        );
        let big = vec![b'x'; 100_000];
        let (slow, fast) = tokio::join!(connection.call("s", "slow", vec![1], 0), connection.call("s", "fast", big.clone(), 0));
        assert_eq!(slow.unwrap().unwrap(), b"\x01slow");
        assert_eq!(fast.unwrap().unwrap().len(), big.len() + 4);
    }

    #[tokio::test]
    async fn a_closed_connection_ends_the_calls_that_wait() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let connection = Connection::new(ours, Arc::new(Silent));
        let call = connection.call("s", "m", vec![], 0);
        drop(theirs);
        assert!(call.await.is_none());
        connection.closed().cancelled().await;
    }

    #[tokio::test]
    async fn a_plugin_that_calls_without_reading_the_answers_is_cut() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let connection = Connection::new(ours, Arc::new(Silent));
        let request = Request { service: "s".into(), method: "m".into(), ..Default::default() };
        let flood = async {
            for stream in (1..).step_by(2) {
                if theirs.write_all(&mux::chunks(RUNTIME, &ttrpc::request(stream, &request))).await.is_err() {
                    break;
                }
            }
        };
        let cut = async {
            tokio::select! {
                () = flood => {}
                () = connection.closed().cancelled() => {}
            }
            connection.closed().cancelled().await;
        };
        tokio::time::timeout(std::time::Duration::from_secs(60), cut).await.unwrap();
    }

    #[tokio::test]
    async fn bytes_that_are_not_the_protocol_end_the_connection() {
        for garbage in [&[0xff_u8; 64][..], b"GET / HTTP/1.1\r\n\r\n", &[0, 0, 0, 1, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0, 1, 9, 0]] {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            let connection = Connection::new(ours, Arc::new(Silent));
            theirs.write_all(garbage).await.unwrap();
            connection.closed().cancelled().await;
        }
    }
}
