//! A connection with its streams: one task reads, one writes. Ends when the peer is gone or when [`Session::close`] is called.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufWriter};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::frame;
use super::headers::{Deflater, Headers};
use super::reader::{Accepted, Reader};
use crate::streaming::goodbye::goodbye;
use crate::streaming::inbox::Inbox;
use crate::streaming::wire::Peer;

/// Frames that may wait for the connection; then the sender waits.
const QUEUE: usize = 64;
/// Small answers (replies, resets, pings) that a peer may have outstanding before it is cut: more than it may have streams.
const ANSWERS: usize = 16 * 1024;
/// Payload of one data frame, as the usual clients make them.
const PIECE: usize = 32 * 1024;

/// Why a stream is reset, in the protocol's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Why {
    /// There is something wrong with how it was opened.
    Protocol = 1,
    /// It is not wanted.
    Refused = 3,
    /// It is of no use any more.
    Cancelled = 5,
    /// Its reader is too slow for the others.
    FlowControl = 7,
}

pub(super) enum Out {
    Reply(u32),
    Data { stream: u32, fin: bool, payload: Bytes },
    Reset(u32, Why),
    Ping(u32),
    Close,
}

/// What a session may be asked to bear.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// How long a stream with a full buffer may keep the connection waiting before it is reset. None: for ever, which is right
    /// where all streams belong to one process.
    pub(crate) patience: Option<Duration>,
    /// Streams that may be open at a time; more are refused.
    pub(crate) streams: usize,
}

/// A connection.
pub(crate) struct Session {
    out: mpsc::Sender<Out>,
    incoming: Accepted,
    /// Cancelled when the peer is gone.
    pub(crate) gone: CancellationToken,
    written: Arc<AtomicU64>,
    reader: tokio::task::JoinHandle<()>,
    writer: tokio::task::JoinHandle<()>,
}

/// A stream that the peer opened.
pub(crate) struct Stream {
    pub(crate) id: u32,
    pub(crate) headers: Headers,
    /// What the peer sends; ends with its FIN, its reset, or the connection.
    pub(crate) data: Inbox,
    pub(crate) writer: StreamWriter,
}

/// The sending side of a stream.
#[derive(Clone)]
pub(crate) struct StreamWriter {
    pub(super) stream: u32,
    pub(super) out: mpsc::Sender<Out>,
    /// Cancelled when the stream was reset, by either side.
    pub(crate) reset: CancellationToken,
    /// Cancelled when nothing more is sent.
    pub(super) finished: CancellationToken,
}

/// The connection is gone, or the stream.
pub(super) fn gone<T>(_: T) -> io::Error {
    io::ErrorKind::BrokenPipe.into()
}

impl StreamWriter {
    async fn put(&self, out: Out) -> io::Result<()> {
        tokio::select! {
            biased;
            () = self.reset.cancelled() => Err(gone(())),
            sent = self.out.send(out) => sent.map_err(gone),
        }
    }

    /// Sends data; waits while too much is under way.
    pub(crate) async fn send(&self, mut payload: Bytes) -> io::Result<()> {
        while !payload.is_empty() {
            let piece = payload.split_to(payload.len().min(PIECE));
            self.put(Out::Data { stream: self.stream, fin: false, payload: piece }).await?;
        }
        Ok(())
    }

    /// Nothing more will be sent on this stream.
    pub(crate) async fn finish(&self) -> io::Result<()> {
        if self.finished.is_cancelled() {
            return Ok(());
        }
        self.finished.cancel();
        self.put(Out::Data { stream: self.stream, fin: true, payload: Bytes::new() }).await
    }

    /// Aborts the stream, after what was sent on it.
    pub(crate) async fn reset(&self, why: Why) -> io::Result<()> {
        let told = self.put(Out::Reset(self.stream, why)).await;
        self.reset.cancel();
        told
    }
}

impl Session {
    /// Runs a session over a connection. Every stream that the peer opens is accepted, and handed out by [`Session::next`].
    pub(crate) fn start(io: impl AsyncRead + AsyncWrite + Send + 'static, peer: Peer, limits: Limits) -> io::Result<Self> {
        let (read, write) = tokio::io::split(io);
        let (out, queue) = mpsc::channel(QUEUE);
        let (answers, urgent) = mpsc::channel(ANSWERS);
        let (accepted, incoming) = mpsc::channel(limits.streams);
        let (gone, written) = (CancellationToken::new(), Arc::new(AtomicU64::new(0)));
        let writer = Writer {
            write: BufWriter::with_capacity(8 * 1024, write),
            deflate: Deflater::new()?,
            written: written.clone(),
            last: 0,
        };
        let ended = gone.clone();
        let writer = tokio::spawn(async move {
            writer.run(queue, urgent).await;
            ended.cancel();
        });
        let reader = Reader::new(out.clone(), answers, accepted, peer, limits);
        let ended = gone.clone();
        let reader = tokio::spawn(async move {
            if let Err(error) = reader.run(read).await {
                tracing::debug!(%error, "spdy connection");
            }
            ended.cancel();
        });
        Ok(Self { out, incoming, gone, written, reader, writer })
    }

    /// The next stream that the peer opens; none when the connection has ended.
    pub(crate) async fn next(&mut self) -> Option<Stream> {
        self.incoming.recv().await
    }

    /// The reading task's end; a panic of it is passed on.
    #[cfg(test)]
    pub(super) async fn reader_ended(mut self) {
        if let Err(error) = (&mut self.reader).await {
            std::panic::resume_unwind(error.into_panic());
        }
    }

    /// Ends the connection in order: everything sent so far arrives first, as long as the peer takes any of it.
    pub(crate) async fn close(mut self) {
        let sent = self.out.clone();
        let written = self.written.clone();
        let Self { incoming, reader, writer, .. } = &mut self;
        let send = async {
            let _ = sent.send(Out::Close).await;
            let _ = writer.await;
        };
        let answer = async {
            // Nobody looks at new streams any more, nor at what comes on the old ones.
            incoming.close();
            let _ = reader.await;
        };
        goodbye(&written, send, answer).await;
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.reader.abort();
        self.writer.abort();
    }
}

struct Writer<W> {
    write: BufWriter<W>,
    deflate: Deflater,
    written: Arc<AtomicU64>,
    last: u32,
}

impl<W: AsyncWrite + Unpin> Writer<W> {
    /// Writes what comes. Small answers go first: they are never behind data that a slow client does not take.
    async fn run(mut self, mut queue: mpsc::Receiver<Out>, mut urgent: mpsc::Receiver<Out>) {
        loop {
            let next = tokio::select! {
                biased;
                Some(answer) = urgent.recv() => Some((answer, true)),
                out = queue.recv() => out.map(|out| (out, false)),
            };
            let Some((out, is_answer)) = next else { break };
            let mut done = Ok(());
            // Whoever sends data on a stream has seen it accepted: its reply is in the other queue, and must go first.
            while !is_answer
                && done.is_ok()
                && let Ok(answer) = urgent.try_recv()
            {
                done = self.put(answer).await;
            }
            let closing = matches!(out, Out::Close);
            if done.is_ok() {
                done = self.put(out).await;
            }
            if done.is_ok() && (closing || queue.is_empty() && urgent.is_empty()) {
                done = self.write.flush().await;
            }
            if done.is_err() || closing {
                break;
            }
        }
        let _ = self.write.shutdown().await;
    }

    async fn put(&mut self, out: Out) -> io::Result<()> {
        let bytes = match out {
            Out::Reply(stream) => {
                self.last = stream;
                frame::reply(stream, &self.deflate.write(&Headers::new())?)
            }
            Out::Data { stream, fin, payload } => {
                self.write.write_all(&frame::data_head(stream, fin, payload.len())).await?;
                self.write.write_all(&payload).await?;
                self.written.fetch_add(payload.len() as u64, Ordering::AcqRel);
                return Ok(());
            }
            Out::Reset(stream, why) => frame::reset(stream, why as u32),
            Out::Ping(id) => frame::ping(id),
            Out::Close => frame::go_away(self.last, 0),
        };
        self.write.write_all(&bytes).await?;
        self.written.fetch_add(bytes.len() as u64, Ordering::AcqRel);
        Ok(())
    }
}
