//! WebSocket (RFC 6455), server side: handshake key, frames, and Kubernetes' channels over them. Knows no exec.

mod frame;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::goodbye::goodbye;
use super::inbox::{Feeder, Inbox, Pool, Push, inbox};
use super::sha1::sha1;
use super::wire::Peer;
use frame::{BINARY, CLOSE, Incoming, Message, Messages, PONG, TEXT};

/// Messages that may wait for the connection; then the sender waits.
const QUEUE: usize = 32;
/// Pongs that a peer may have outstanding before further pings go unanswered: it does not read them.
const ANSWERS: usize = 64;
/// Clients give a connection up when no pong came for a minute; the answer to a ping behind data that has no room comes unasked.
const LOOK: Duration = Duration::from_secs(5);
/// Close codes.
const NORMAL: u16 = 1000;

/// The answer to a client's key.
pub(super) fn accept_key(key: &str) -> String {
    STANDARD.encode(sha1(format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11").as_bytes()))
}

/// Whether a client's key is one: 16 bytes in base64.
pub(super) fn is_key(key: &str) -> bool {
    STANDARD.decode(key).is_ok_and(|key| key.len() == 16)
}

/// How channel messages are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Binary, the first byte is the channel.
    Binary,
    /// Text, the first character is the channel's digit, the rest base64.
    Base64,
}

/// The sending side of one channel.
#[derive(Clone)]
pub(super) struct ChannelWriter {
    channel: u8,
    form: Form,
    out: mpsc::Sender<Message>,
}

impl ChannelWriter {
    /// Sends a message on the channel.
    pub(super) async fn send(&self, bytes: Bytes) -> io::Result<()> {
        let message = match self.form {
            Form::Binary => Message { opcode: BINARY, payload: [&[self.channel], &bytes[..]].concat().into() },
            Form::Base64 => Message { opcode: TEXT, payload: format!("{}{}", self.channel, STANDARD.encode(&bytes)).into() },
        };
        self.out.send(message).await.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

/// A connection after its handshake.
pub(super) struct WebSocket {
    form: Form,
    out: mpsc::Sender<Message>,
    incoming: Inbox,
    /// Cancelled when the peer is gone or has said goodbye.
    pub(super) gone: CancellationToken,
    written: Arc<AtomicU64>,
    reader: tokio::task::JoinHandle<()>,
    writer: tokio::task::JoinHandle<()>,
}

impl WebSocket {
    /// Runs a connection.
    pub(super) fn start(io: impl AsyncRead + AsyncWrite + Send + 'static, peer: Peer, form: Form) -> Self {
        let (read, write) = tokio::io::split(io);
        let (out, queue) = mpsc::channel(QUEUE);
        let (answers, urgent) = mpsc::channel(ANSWERS);
        let (gone, written, pool) = (CancellationToken::new(), Arc::new(AtomicU64::new(0)), Arc::new(Pool::default()));
        let (messages, incoming) = inbox(&pool);
        let (ended, counter) = (gone.clone(), written.clone());
        let writer = tokio::spawn(async move {
            write_messages(write, queue, urgent, &counter).await;
            ended.cancel();
        });
        let ended = gone.clone();
        let reader = Reader { answers, messages, pool, peer };
        let reader = tokio::spawn(async move {
            reader.run(read).await;
            ended.cancel();
        });
        Self { form, out, incoming, gone, written, reader, writer }
    }

    /// The sending side of a channel.
    pub(super) fn channel(&self, channel: u8) -> ChannelWriter {
        ChannelWriter { channel, form: self.form, out: self.out.clone() }
    }

    /// The next message of the client: channel and content.
    pub(super) async fn next(&mut self) -> Option<(u8, Bytes)> {
        loop {
            let message = self.incoming.recv().await?;
            if let Some(decoded) = decode(self.form, message) {
                return Some(decoded);
            }
        }
    }

    /// The next message of the client, as it is.
    pub(super) async fn next_raw(&mut self) -> Option<Bytes> {
        self.incoming.recv().await
    }

    /// A sender of whole binary messages.
    pub(super) fn raw(&self) -> RawWriter {
        RawWriter { out: self.out.clone() }
    }

    /// The sender of the goodbye: everything sent so far arrives first, as long as the peer takes any of it, then code 1000; the
    /// peer's answer is awaited.
    pub(super) async fn close(mut self) {
        let sent = self.out.clone();
        let written = self.written.clone();
        let Self { incoming, reader, writer, .. } = &mut self;
        let send = async {
            let _ = sent.send(Message { opcode: CLOSE, payload: NORMAL.to_be_bytes().to_vec().into() }).await;
            let _ = writer.await;
        };
        let answer = async {
            while incoming.recv().await.is_some() {}
            let _ = reader.await;
        };
        goodbye(&written, send, answer).await;
    }
}

impl Drop for WebSocket {
    fn drop(&mut self) {
        self.reader.abort();
        self.writer.abort();
    }
}

/// Sends whole binary messages.
pub(super) struct RawWriter {
    out: mpsc::Sender<Message>,
}

impl RawWriter {
    pub(super) async fn send(&self, payload: Bytes) -> io::Result<()> {
        self.out.send(Message { opcode: BINARY, payload }).await.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

fn decode(form: Form, message: Bytes) -> Option<(u8, Bytes)> {
    let first = *message.first()?;
    match form {
        Form::Binary => Some((first, message.slice(1..))),
        Form::Base64 => {
            let channel = first.checked_sub(b'0').filter(|c| *c <= 9)?;
            Some((channel, STANDARD.decode(&message[1..]).ok()?.into()))
        }
    }
}

/// Writes what comes, pongs first: they are never behind data that a slow client does not take. Nothing follows a goodbye.
async fn write_messages(
    mut write: impl AsyncWrite + Unpin,
    mut queue: mpsc::Receiver<Message>,
    mut urgent: mpsc::Receiver<Message>,
    written: &AtomicU64,
) {
    loop {
        let next = tokio::select! {
            biased;
            Some(answer) = urgent.recv() => Some(answer),
            message = queue.recv() => message,
        };
        let Some(message) = next else { break };
        let sent = match write.write_all(&frame::head(message.opcode, message.payload.len())).await {
            Ok(()) => write.write_all(&message.payload).await,
            Err(e) => Err(e),
        };
        if sent.is_err() || write.flush().await.is_err() {
            return;
        }
        written.fetch_add(message.payload.len() as u64 + 2, Ordering::AcqRel);
        if message.opcode == CLOSE {
            break;
        }
    }
    let _ = write.shutdown().await;
}

struct Reader {
    answers: mpsc::Sender<Message>,
    messages: Feeder,
    pool: Arc<Pool>,
    peer: Peer,
}

impl Reader {
    async fn run(self, read: impl AsyncRead + Unpin) {
        let mut messages = Messages::new(read);
        loop {
            match messages.next().await {
                Ok(Incoming::Message(message)) => {
                    if !self.deliver(message.into()).await {
                        return;
                    }
                }
                Ok(Incoming::Ping(payload)) => self.answer(PONG, payload),
                Ok(Incoming::Close(code)) => return self.answer(CLOSE, code),
                Err(error) => {
                    tracing::debug!(%error, "websocket");
                    if let Some(code) = error.code() {
                        self.answer(CLOSE, code.to_be_bytes().to_vec());
                    }
                    return;
                }
            }
        }
    }

    fn answer(&self, opcode: u8, payload: Vec<u8>) {
        let _ = self.answers.try_send(Message { opcode, payload: payload.into() });
    }

    /// Waits for room. Meanwhile no ping can be read: the client is told that we live. False when it is gone.
    async fn deliver(&self, mut message: Bytes) -> bool {
        while let Push::Full(back) = self.messages.try_push(message) {
            message = back;
            if tokio::time::timeout(LOOK, self.pool.freed()).await.is_err() {
                if self.peer.hung_up() {
                    return false;
                }
                self.answer(PONG, Vec::new());
            }
        }
        true
    }
}
