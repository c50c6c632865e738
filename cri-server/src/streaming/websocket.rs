//! WebSocket (RFC 6455), server side: handshake key, frames, and Kubernetes' channels over them. Knows no exec.

use std::io;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::sha1::sha1;

/// Messages larger than this are refused; the usual clients send 32 KiB.
const LIMIT: u64 = 4 << 20;
const QUEUE: usize = 32;

const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// The answer to a client's key.
pub(super) fn accept_key(key: &str) -> String {
    STANDARD.encode(sha1(format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11").as_bytes()))
}

struct Message {
    opcode: u8,
    payload: Bytes,
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
    incoming: mpsc::Receiver<Bytes>,
    /// Cancelled when the peer is gone or has said goodbye.
    pub(super) gone: CancellationToken,
    reader: tokio::task::AbortHandle,
    writer: tokio::task::JoinHandle<()>,
}

impl WebSocket {
    /// Runs a connection.
    pub(super) fn start(io: impl AsyncRead + AsyncWrite + Send + 'static, form: Form) -> Self {
        let (read, write) = tokio::io::split(io);
        let (out, queue) = mpsc::channel(QUEUE);
        let (messages, incoming) = mpsc::channel(QUEUE);
        let gone = CancellationToken::new();
        let writer = tokio::spawn(write_messages(write, queue));
        let (replies, token) = (out.clone(), gone.clone());
        let reader = tokio::spawn(async move {
            let end = read_messages(read, &replies, &messages).await;
            tracing::debug!(error = ?end.err(), "websocket ended");
            token.cancel();
        });
        Self { form, out, incoming, gone, reader: reader.abort_handle(), writer }
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

    /// The sender of the goodbye: everything sent so far arrives first, then code 1000; the peer's answer is awaited.
    pub(super) async fn close(mut self) {
        let _ = self.out.send(Message { opcode: CLOSE, payload: 1000u16.to_be_bytes().to_vec().into() }).await;
        let limit = std::time::Duration::from_secs(5);
        let drained = async { while self.incoming.recv().await.is_some() {} };
        let _ = tokio::time::timeout(limit, drained).await;
        drop(self.out);
        self.reader.abort();
        let _ = tokio::time::timeout(limit, self.writer).await;
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

async fn write_messages(mut write: impl AsyncWrite + Unpin, mut queue: mpsc::Receiver<Message>) {
    while let Some(message) = queue.recv().await {
        let mut head = vec![0x80 | message.opcode];
        match message.payload.len() {
            n @ 0..=125 => head.push(n as u8),
            n @ 126..=0xffff => {
                head.push(126);
                head.extend_from_slice(&(n as u16).to_be_bytes());
            }
            n => {
                head.push(127);
                head.extend_from_slice(&(n as u64).to_be_bytes());
            }
        }
        let sent = match write.write_all(&head).await {
            Ok(()) => write.write_all(&message.payload).await,
            Err(e) => Err(e),
        };
        if sent.is_err() || write.flush().await.is_err() {
            return;
        }
    }
    let _ = write.shutdown().await;
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("websocket: {what}"))
}

/// One frame: (last of its message, opcode, content).
async fn read_frame(read: &mut (impl AsyncRead + Unpin)) -> io::Result<(bool, u8, Vec<u8>)> {
    let mut head = [0u8; 2];
    read.read_exact(&mut head).await?;
    let length = match head[1] & 0x7f {
        126 => u64::from(read.read_u16().await?),
        127 => read.read_u64().await?,
        n => u64::from(n),
    };
    if head[1] & 0x80 == 0 {
        return Err(bad("a client's frame without a mask"));
    }
    if head[0] & 0x70 != 0 || length > LIMIT {
        return Err(bad("a frame that can not be meant"));
    }
    let mut mask = [0u8; 4];
    read.read_exact(&mut mask).await?;
    let mut payload = vec![0u8; length as usize];
    read.read_exact(&mut payload).await?;
    payload.iter_mut().zip(mask.iter().cycle()).for_each(|(b, m)| *b ^= m);
    Ok((head[0] & 0x80 != 0, head[0] & 0x0f, payload))
}

async fn read_messages(
    mut read: impl AsyncRead + Unpin,
    replies: &mpsc::Sender<Message>,
    messages: &mpsc::Sender<Bytes>,
) -> io::Result<()> {
    let mut partial: Option<Vec<u8>> = None;
    loop {
        let (last, opcode, payload) = read_frame(&mut read).await?;
        match opcode {
            PING => {
                let _ = replies.send(Message { opcode: PONG, payload: payload.into() }).await;
            }
            PONG => {}
            CLOSE => {
                let code = payload.get(..2).unwrap_or_default().to_vec();
                let _ = replies.try_send(Message { opcode: CLOSE, payload: code.into() });
                return Ok(());
            }
            0 | TEXT | BINARY => {
                let mut whole = match (opcode, partial.take()) {
                    (0, Some(begun)) => begun,
                    (0, None) | (_, Some(_)) => return Err(bad("fragments out of order")),
                    (_, None) => Vec::new(),
                };
                if whole.len() as u64 + payload.len() as u64 > LIMIT {
                    return Err(bad("a message that is too long"));
                }
                whole.extend_from_slice(&payload);
                if last {
                    // Nobody listening any more is no reason to stop answering pings.
                    let _ = messages.send(whole.into()).await;
                } else {
                    partial = Some(whole);
                }
            }
            _ => return Err(bad("an unknown opcode")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
        let mask = [1u8, 2, 3, 4];
        let mut out = vec![first, 0x80 | payload.len() as u8];
        out.extend(mask);
        out.extend(payload.iter().zip(mask.iter().cycle()).map(|(b, m)| b ^ m));
        out
    }

    #[test]
    fn the_accept_key_is_the_rfcs() {
        assert_eq!(accept_key("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }

    #[tokio::test]
    async fn fragments_are_joined_and_pings_answered_in_between() {
        let (mut client, server) = tokio::io::duplex(1 << 16);
        let mut socket = WebSocket::start(server, Form::Binary);
        client.write_all(&masked(0x02, b"\x00hel")).await.unwrap();
        client.write_all(&masked(0x89, b"p")).await.unwrap();
        client.write_all(&masked(0x80, b"lo")).await.unwrap();
        assert_eq!(socket.next().await.unwrap(), (0, Bytes::from_static(b"hello")));
        let mut pong = [0u8; 3];
        client.read_exact(&mut pong).await.unwrap();
        assert_eq!(pong, [0x8a, 1, b'p']);
        socket.channel(1).send(Bytes::from_static(b"x")).await.unwrap();
        let mut message = [0u8; 4];
        client.read_exact(&mut message).await.unwrap();
        assert_eq!(message, [0x82, 2, 1, b'x']);
        client.write_all(&masked(0x88, &1000u16.to_be_bytes())).await.unwrap();
        socket.close().await;
        let mut end = [0u8; 4];
        client.read_exact(&mut end).await.unwrap();
        assert_eq!(end, [0x88, 2, 0x03, 0xe8]);
    }

    #[tokio::test]
    async fn a_frame_without_a_mask_ends_the_connection() {
        let (mut client, server) = tokio::io::duplex(1 << 16);
        let mut socket = WebSocket::start(server, Form::Binary);
        client.write_all(&[0x82, 1, 0]).await.unwrap();
        assert!(socket.next().await.is_none());
        assert!(socket.gone.is_cancelled());
    }

    #[test]
    fn base64_channels_are_digits() {
        assert_eq!(decode(Form::Base64, Bytes::from_static(b"0aGk=")), Some((0, Bytes::from_static(b"hi"))));
        assert_eq!(decode(Form::Base64, Bytes::from_static(b"xaGk=")), None);
        assert_eq!(decode(Form::Binary, Bytes::new()), None);
    }
}
