//! WebSocket (RFC 6455), client side, with Kubernetes' channels: the first byte of a message says which stream it is of. Speaks
//! to the loopback address that the CRI server gave; knows no exec.

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

/// The channel protocols in the order of preference; the fifth version can end standard input.
const PROTOCOLS: &str = "v5.channel.k8s.io, v4.channel.k8s.io";
/// Larger messages are nobody's; servers send 32 KiB.
const LIMIT: u64 = 4 << 20;
/// The longest answer to the handshake.
const HEAD_LIMIT: usize = 16 * 1024;

const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

/// The sending side.
pub struct Sender {
    stream: OwnedWriteHalf,
    can_close: bool,
}

/// The receiving side.
pub struct Receiver(BufReader<OwnedReadHalf>);

/// What comes from the server.
#[derive(Debug, PartialEq)]
pub enum Message {
    /// Bytes of a channel.
    Data(u8, Vec<u8>),
    /// A question that wants these bytes back.
    Ping(Vec<u8>),
}

/// Connects to `http://ADDRESS:PORT/PATH`.
///
/// # Errors
/// When the server does not answer, or refuses; its words are in the error.
pub async fn connect(url: &str) -> Result<(Sender, Receiver)> {
    let rest = url.strip_prefix("http://").with_context(|| format!("{url}: not an address of a streaming server"))?;
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let address: std::net::SocketAddr = host.parse().with_context(|| format!("{host:?} is not an address and a port"))?;
    let mut stream = TcpStream::connect(address).await.with_context(|| format!("connecting to {address}"))?;
    stream.set_nodelay(true)?;
    let mut nonce = [0; 16];
    rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty())?;
    let request = format!(
        "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: {}\r\nSec-WebSocket-Protocol: {PROTOCOLS}\r\n\r\n",
        base64(&nonce)
    );
    stream.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        // Byte by byte: what follows the head is the first frame.
        head.push(stream.read_u8().await.context("the streaming server went away")?);
        if head.len() > HEAD_LIMIT {
            bail!("the streaming server's answer has no end");
        }
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let status = head.lines().next().unwrap_or_default();
    if status.split(' ').nth(1) != Some("101") {
        let mut body = Vec::new();
        let _ = stream.take(HEAD_LIMIT as u64).read_to_end(&mut body).await;
        bail!("the streaming server refused: {status} {}", String::from_utf8_lossy(&body).trim());
    }
    let can_close = head.to_ascii_lowercase().contains("v5.channel.k8s.io");
    let (read, write) = stream.into_split();
    Ok((Sender { stream: write, can_close }, Receiver(BufReader::new(read))))
}

/// Base64 with padding (RFC 4648).
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = bytes.chunks(3).flat_map(|chunk| {
        let group = chunk.iter().enumerate().fold(0u32, |sum, (i, byte)| sum | u32::from(*byte) << (16 - 8 * i));
        (0..4).map(move |i| if i <= chunk.len() { char::from(DIGITS[(group >> (18 - 6 * i)) as usize & 63]) } else { '=' })
    });
    digits.collect()
}

/// A whole frame from a client: its payload is masked, as the protocol demands.
fn frame(opcode: u8, mask: [u8; 4], parts: &[&[u8]]) -> Vec<u8> {
    let length: usize = parts.iter().map(|p| p.len()).sum();
    let mut out = Vec::with_capacity(length + 14);
    out.push(0x80 | opcode);
    match length {
        0..126 => out.push(0x80 | length as u8),
        126..65_536 => {
            out.push(0x80 | 126);
            out.extend_from_slice(&(length as u16).to_be_bytes());
        }
        _ => {
            out.push(0x80 | 127);
            out.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(&mask);
    out.extend(parts.iter().copied().flatten().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    out
}

impl Sender {
    async fn frame(&mut self, opcode: u8, parts: &[&[u8]]) -> Result<()> {
        let mut mask = [0; 4];
        rustix::rand::getrandom(&mut mask, rustix::rand::GetRandomFlags::empty())?;
        Ok(self.stream.write_all(&frame(opcode, mask, parts)).await?)
    }

    /// Sends bytes on a channel.
    pub async fn send(&mut self, channel: u8, bytes: &[u8]) -> Result<()> {
        self.frame(BINARY, &[&[channel], bytes]).await
    }

    /// Ends a channel; false where the server's protocol has no word for it.
    pub async fn end(&mut self, channel: u8) -> Result<bool> {
        if self.can_close {
            self.frame(BINARY, &[&[255, channel]]).await?;
        }
        Ok(self.can_close)
    }

    /// Answers a ping.
    pub async fn pong(&mut self, bytes: &[u8]) -> Result<()> {
        self.frame(PONG, &[bytes]).await
    }
}

impl Receiver {
    /// The next message; `None` when the server has said goodbye or is gone. Not to be dropped half-way.
    pub async fn next(&mut self) -> Result<Option<Message>> {
        let mut whole = Vec::new();
        loop {
            let mut head = [0; 2];
            if self.0.read_exact(&mut head).await.is_err() {
                return Ok(None);
            }
            let (last, opcode) = (head[0] & 0x80 != 0, head[0] & 0x0f);
            let length = match head[1] & 0x7f {
                126 => u64::from(self.0.read_u16().await?),
                127 => self.0.read_u64().await?,
                short => u64::from(short),
            };
            if length > LIMIT || head[1] & 0x80 != 0 || whole.len() as u64 > LIMIT {
                bail!("the streaming server sent a frame that cannot be meant");
            }
            let mut payload = vec![0; length as usize];
            self.0.read_exact(&mut payload).await?;
            match opcode {
                CLOSE => return Ok(None),
                PING => return Ok(Some(Message::Ping(payload))),
                PONG => continue,
                _ => whole.extend_from_slice(&payload),
            }
            if last {
                // An empty one opens the connection: it is of no channel.
                match whole.split_first() {
                    Some((channel, bytes)) => return Ok(Some(Message::Data(*channel, bytes.to_vec()))),
                    None => continue,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_pads() {
        for (bytes, text) in [(&b""[..], ""), (b"f", "Zg=="), (b"fo", "Zm8="), (b"foo", "Zm9v"), (b"foob", "Zm9vYg==")] {
            assert_eq!(base64(bytes), text);
        }
    }

    #[test]
    fn frames_carry_their_length_and_are_masked() {
        assert_eq!(frame(BINARY, [1, 2, 3, 4], &[b"\0", b"ab"]), [0x82, 0x83, 1, 2, 3, 4, 1, b'a' ^ 2, b'b' ^ 3]);
        assert_eq!(frame(BINARY, [0; 4], &[&[7; 300]])[..4], [0x82, 0xfe, 1, 44]);
        assert_eq!(frame(BINARY, [0; 4], &[&[7; 70_000]])[..2], [0x82, 0xff]);
    }

    #[tokio::test]
    async fn a_server_is_asked_and_its_messages_are_read() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/exec/token", listener.local_addr().expect("an address"));
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("a client");
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.expect("a head"));
            }
            let text = String::from_utf8(head).expect("text");
            assert!(text.starts_with("GET /exec/token HTTP/1.1\r\n") && text.contains("v5.channel.k8s.io"), "{text}");
            let answer = b"HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Protocol: v5.channel.k8s.io\r\n\r\n";
            stream.write_all(answer).await.expect("sent");
            stream.write_all(&[0x89, 1, b'?', 0x02, 2, 1, b'h', 0x80, 1, b'i', 0x88, 0]).await.expect("sent");
            let mut frame = [0; 9];
            stream.read_exact(&mut frame).await.expect("a frame");
            frame
        });
        let (mut sender, mut receiver) = connect(&url).await.expect("connected");
        assert_eq!(receiver.next().await.expect("a message"), Some(Message::Ping(b"?".to_vec())));
        assert_eq!(receiver.next().await.expect("a message"), Some(Message::Data(1, b"hi".to_vec())), "in two frames");
        assert_eq!(receiver.next().await.expect("the end"), None);
        sender.send(0, b"ab").await.expect("sent");
        assert_eq!(server.await.expect("served")[..2], [0x82, 0x83]);
    }

    #[tokio::test]
    async fn a_refusal_is_told_in_the_servers_words() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}/x", listener.local_addr().expect("an address"));
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("a client");
            let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 10\r\n\r\nno token\n\n").await;
            let _ = stream.shutdown().await;
        });
        let error = connect(&url).await.err().expect("refused").to_string();
        assert!(error.contains("404 Not Found no token"), "{error}");
    }
}
