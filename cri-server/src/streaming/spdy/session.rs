//! A connection with its streams: one task reads, one writes. Ends when the peer is gone or when [`Session::close`] is called.

use std::collections::HashMap;
use std::io;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufWriter};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::frame::{self, Frame};
use super::headers::{Deflater, Headers, Inflater};

/// Frames that may wait on one stream, or for the connection; then the sender waits.
const QUEUE: usize = 64;
/// Payload of one data frame, as the usual clients make them.
const PIECE: usize = 32 * 1024;

enum Out {
    Reply(u32),
    Data { stream: u32, fin: bool, payload: Bytes },
    Reset(u32),
    Ping(u32),
    Close,
}

/// A connection.
pub(crate) struct Session {
    out: mpsc::Sender<Out>,
    incoming: mpsc::Receiver<Stream>,
    /// Cancelled when the peer is gone.
    pub(crate) gone: CancellationToken,
    reader: tokio::task::AbortHandle,
    writer: tokio::task::JoinHandle<()>,
}

/// A stream that the peer opened.
pub(crate) struct Stream {
    pub(crate) id: u32,
    pub(crate) headers: Headers,
    /// What the peer sends; ends with its FIN, its reset, or the connection.
    pub(crate) data: mpsc::Receiver<Bytes>,
    pub(crate) writer: StreamWriter,
}

/// The sending side of a stream.
#[derive(Clone)]
pub(crate) struct StreamWriter {
    stream: u32,
    out: mpsc::Sender<Out>,
}

/// The connection is gone.
fn gone<T>(_: T) -> io::Error {
    io::ErrorKind::BrokenPipe.into()
}

impl StreamWriter {
    /// Sends data; waits while too much is under way.
    pub(crate) async fn send(&self, mut payload: Bytes) -> io::Result<()> {
        while !payload.is_empty() {
            let piece = payload.split_to(payload.len().min(PIECE));
            self.out.send(Out::Data { stream: self.stream, fin: false, payload: piece }).await.map_err(gone)?;
        }
        Ok(())
    }

    /// Nothing more will be sent on this stream.
    pub(crate) async fn finish(&self) -> io::Result<()> {
        self.out.send(Out::Data { stream: self.stream, fin: true, payload: Bytes::new() }).await.map_err(gone)
    }

    /// Aborts the stream.
    pub(crate) async fn reset(&self) -> io::Result<()> {
        self.out.send(Out::Reset(self.stream)).await.map_err(gone)
    }
}

impl Session {
    /// Runs a session over a connection. Every stream that the peer opens is accepted, and handed out by [`Session::next`].
    pub(crate) fn start(io: impl AsyncRead + AsyncWrite + Send + 'static) -> io::Result<Self> {
        let (read, write) = tokio::io::split(io);
        let (out, queue) = mpsc::channel(QUEUE);
        let (accepted, incoming) = mpsc::channel(QUEUE);
        let writer = tokio::spawn(write_frames(write, queue, Deflater::new()?));
        let replies = out.clone();
        let gone = CancellationToken::new();
        let token = gone.clone();
        let reader = tokio::spawn(async move {
            if let Err(error) = read_frames(read, &replies, &accepted).await {
                tracing::debug!(%error, "spdy connection");
            }
            token.cancel();
        });
        Ok(Self { out, incoming, gone, reader: reader.abort_handle(), writer })
    }

    /// The next stream that the peer opens; none when the connection has ended.
    pub(crate) async fn next(&mut self) -> Option<Stream> {
        self.incoming.recv().await
    }

    /// Ends the connection in order: everything sent so far arrives first.
    pub(crate) async fn close(mut self) {
        let _ = self.out.send(Out::Close).await;
        let _ = tokio::time::timeout(std::time::Duration::from_secs(5), &mut self.writer).await;
        self.reader.abort();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

async fn write_frames(write: impl AsyncWrite + Unpin, mut queue: mpsc::Receiver<Out>, mut deflate: Deflater) {
    let mut write = BufWriter::with_capacity(8 * 1024, write);
    let mut last = 0;
    while let Some(out) = queue.recv().await {
        let result = match out {
            Out::Reply(stream) => {
                last = stream;
                match deflate.write(&Headers::new()) {
                    Ok(headers) => write.write_all(&frame::reply(stream, &headers)).await,
                    Err(e) => Err(e),
                }
            }
            Out::Data { stream, fin, payload } => match write.write_all(&frame::data_head(stream, fin, payload.len())).await {
                Ok(()) => write.write_all(&payload).await,
                Err(e) => Err(e),
            },
            Out::Reset(stream) => write.write_all(&frame::reset(stream, 3)).await,
            Out::Ping(id) => write.write_all(&frame::ping(id)).await,
            Out::Close => {
                let _ = write.write_all(&frame::go_away(last)).await;
                let _ = write.flush().await;
                let _ = write.shutdown().await;
                return;
            }
        };
        let flushed = if queue.is_empty() { write.flush().await } else { Ok(()) };
        if result.and(flushed).is_err() {
            return;
        }
    }
    let _ = write.shutdown().await;
}

async fn read_frames(
    mut read: impl AsyncRead + Unpin,
    out: &mpsc::Sender<Out>,
    accepted: &mpsc::Sender<Stream>,
) -> io::Result<()> {
    let mut inflate = Inflater::new();
    let mut streams: HashMap<u32, mpsc::Sender<Bytes>> = HashMap::new();
    while let Some(frame) = frame::read(&mut read).await? {
        match frame {
            Frame::Open { stream, fin, headers } => {
                let headers = inflate.read(&headers)?;
                let (sender, data) = mpsc::channel(QUEUE);
                if !fin {
                    streams.insert(stream, sender);
                }
                // The reply goes before any data on the stream.
                out.send(Out::Reply(stream)).await.map_err(gone)?;
                let writer = StreamWriter { stream, out: out.clone() };
                accepted.send(Stream { id: stream, headers, data, writer }).await.map_err(gone)?;
            }
            Frame::Data { stream, fin, payload } => {
                if let Some(sender) = streams.get(&stream) {
                    // Whoever reads this stream may have lost interest: that is no error.
                    if !payload.is_empty() && sender.send(payload).await.is_err() || fin {
                        streams.remove(&stream);
                    }
                }
            }
            Frame::Reset { stream } => {
                streams.remove(&stream);
            }
            // Odd ids are the peer's pings, even ones would be answers to ours.
            Frame::Ping { id } if id % 2 == 1 => out.send(Out::Ping(id)).await.map_err(gone)?,
            Frame::Ping { .. } | Frame::Reply { .. } | Frame::GoAway | Frame::Other => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    #[tokio::test]
    async fn streams_are_replied_to_and_carry_data_both_ways() {
        let (mut client, server) = tokio::io::duplex(1 << 16);
        let mut session = Session::start(server).unwrap();
        let mut deflate = Deflater::new().unwrap();
        let block = deflate.write(&[("streamtype".to_owned(), "stdin".to_owned())].into()).unwrap();
        client.write_all(&frame::open(1, &block)).await.unwrap();
        client.write_all(&frame::data_head(1, true, 5)).await.unwrap();
        client.write_all(b"hello").await.unwrap();
        client.write_all(&frame::ping(3)).await.unwrap();
        let mut stream = session.next().await.unwrap();
        assert_eq!(stream.headers["streamtype"], "stdin");
        assert_eq!(stream.data.recv().await.unwrap(), "hello");
        assert!(stream.data.recv().await.is_none());
        stream.writer.send(Bytes::from_static(b"world")).await.unwrap();
        stream.writer.finish().await.unwrap();
        drop(stream);
        session.close().await;
        let mut seen = Vec::new();
        while let Some(frame) = frame::read(&mut client).await.unwrap() {
            seen.push(frame);
        }
        assert!(matches!(seen[0], Frame::Reply { stream: 1 }));
        assert!(seen.contains(&Frame::Ping { id: 3 }));
        assert!(seen.contains(&Frame::Data { stream: 1, fin: false, payload: Bytes::from_static(b"world") }));
        assert!(seen.contains(&Frame::Data { stream: 1, fin: true, payload: Bytes::new() }));
        assert_eq!(seen.last(), Some(&Frame::GoAway));
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).await.unwrap();
    }
}
