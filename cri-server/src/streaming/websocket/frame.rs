//! Frames of a client, put together to messages, and the heads of ours.

use std::io;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, BufReader};

/// Messages larger than this are refused; the usual clients send 32 KiB.
const LIMIT: u64 = 512 * 1024;
/// Longest content of a ping, pong or close.
const CONTROL_LIMIT: u64 = 125;

pub(super) const TEXT: u8 = 1;
pub(super) const BINARY: u8 = 2;
pub(super) const CLOSE: u8 = 8;
const PING: u8 = 9;
pub(super) const PONG: u8 = 10;

/// A message of ours.
pub(super) struct Message {
    pub(super) opcode: u8,
    pub(super) payload: Bytes,
}

/// What a client says.
#[derive(Debug, PartialEq)]
pub(super) enum Incoming {
    /// A text or binary message.
    Message(Vec<u8>),
    Ping(Vec<u8>),
    /// With its code, when it gave one.
    Close(Vec<u8>),
}

/// Why a connection can not go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("connection")]
    Io(#[from] io::Error),
    #[error("protocol: {0}")]
    Protocol(&'static str),
    #[error("a message is too long")]
    TooLong,
}

impl Broken {
    /// The code to tell the client (RFC 6455, 7.4.1).
    pub(super) fn code(&self) -> Option<u16> {
        match self {
            Self::Io(_) => None,
            Self::Protocol(_) => Some(1002),
            Self::TooLong => Some(1009),
        }
    }
}

/// The head of a whole, unmasked message.
pub(super) fn head(opcode: u8, length: usize) -> Vec<u8> {
    let mut head = vec![0x80 | opcode];
    match length {
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
    head
}

/// Reads a client's messages.
pub(super) struct Messages<R> {
    read: BufReader<R>,
    partial: Option<Vec<u8>>,
}

impl<R: AsyncRead + Unpin> Messages<R> {
    pub(super) fn new(read: R) -> Self {
        Self { read: BufReader::with_capacity(8 * 1024, read), partial: None }
    }

    pub(super) async fn next(&mut self) -> Result<Incoming, Broken> {
        loop {
            let (last, opcode, length, mask) = self.head().await?;
            if opcode >= CLOSE {
                let mut payload = self.payload(length, mask, Vec::new()).await?;
                match opcode {
                    PING => return Ok(Incoming::Ping(payload)),
                    PONG => continue,
                    _ => {
                        payload.truncate(2);
                        return Ok(Incoming::Close(payload));
                    }
                }
            }
            let begun = match (opcode, self.partial.take()) {
                (0, Some(begun)) => begun,
                (TEXT | BINARY, None) => Vec::new(),
                _ => return Err(Broken::Protocol("fragments out of order")),
            };
            if begun.len() as u64 + length > LIMIT {
                return Err(Broken::TooLong);
            }
            let whole = self.payload(length, mask, begun).await?;
            if last {
                return Ok(Incoming::Message(whole));
            }
            self.partial = Some(whole);
        }
    }

    /// (last of its message, opcode, length, mask)
    async fn head(&mut self) -> Result<(bool, u8, u64, [u8; 4]), Broken> {
        let mut head = [0u8; 2];
        self.read.read_exact(&mut head).await?;
        let (last, opcode) = (head[0] & 0x80 != 0, head[0] & 0x0f);
        if head[0] & 0x70 != 0 {
            return Err(Broken::Protocol("reserved bits"));
        }
        if !matches!(opcode, 0 | TEXT | BINARY | CLOSE | PING | PONG) {
            return Err(Broken::Protocol("an unknown opcode"));
        }
        if head[1] & 0x80 == 0 {
            return Err(Broken::Protocol("a client's frame without a mask"));
        }
        let length = match head[1] & 0x7f {
            126 => u64::from(self.read.read_u16().await?),
            127 => self.read.read_u64().await?,
            n => u64::from(n),
        };
        if opcode >= CLOSE && (!last || length > CONTROL_LIMIT) {
            return Err(Broken::Protocol("a control frame that is long or a fragment"));
        }
        if length > LIMIT {
            return Err(Broken::TooLong);
        }
        let mut mask = [0u8; 4];
        self.read.read_exact(&mut mask).await?;
        Ok((last, opcode, length, mask))
    }

    /// Appends the content of a frame, unmasked.
    async fn payload(&mut self, length: u64, mask: [u8; 4], mut to: Vec<u8>) -> Result<Vec<u8>, Broken> {
        let from = to.len();
        to.resize(from + length as usize, 0);
        self.read.read_exact(&mut to[from..]).await?;
        to[from..].iter_mut().zip(mask.iter().cycle()).for_each(|(b, m)| *b ^= m);
        Ok(to)
    }
}
