//! Streaming clients that speak the bytes themselves: SPDY over TCP or in a WebSocket, and WebSocket channels.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flate2::{Compress, Compression, FlushCompress};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

const DICTIONARY: &[u8] = include_bytes!("../../src/streaming/spdy/dictionary.bin");
const LONG: Duration = Duration::from_secs(60);

/// Waits, but not for ever.
pub async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, future).await.expect("this should have happened by now")
}

/// Sends an upgrade; the answer's head and the connection behind it.
pub async fn upgrade(url: &str, method: &str, headers: &[(&str, &str)]) -> (String, TcpStream) {
    let rest = url.strip_prefix("http://").unwrap();
    let (address, path) = rest.split_once('/').unwrap();
    let mut tcp = TcpStream::connect(address).await.unwrap();
    // As clients of streams do: a small frame that follows another does not wait for its acknowledgement.
    tcp.set_nodelay(true).unwrap();
    let mut text = format!("{method} /{path} HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\n");
    headers.iter().for_each(|(name, value)| text.push_str(&format!("{name}: {value}\r\n")));
    tcp.write_all(format!("{text}\r\n").as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(soon(tcp.read_u8()).await.unwrap());
    }
    (String::from_utf8(head).unwrap(), tcp)
}

pub async fn upgrade_spdy(url: &str, protocol: &str) -> (String, TcpStream) {
    upgrade(url, "POST", &[("Upgrade", "SPDY/3.1"), ("X-Stream-Protocol-Version", protocol)]).await
}

pub async fn upgrade_websocket(url: &str, protocol: &str) -> (String, TcpStream) {
    let mut headers =
        vec![("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13"), ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")];
    if !protocol.is_empty() {
        headers.push(("Sec-WebSocket-Protocol", protocol));
    }
    upgrade(url, "GET", &headers).await
}

/// What comes on a stream.
#[derive(Debug, PartialEq)]
pub enum Event {
    Reply,
    Data(Vec<u8>),
    Fin,
    Reset(u32),
}

type Listeners = Arc<Mutex<HashMap<u32, mpsc::UnboundedSender<Event>>>>;

/// A SPDY connection.
pub struct Spdy {
    out: mpsc::Sender<Vec<u8>>,
    listeners: Listeners,
    deflate: Compress,
    next: u32,
    /// Frames of the connection itself: (type, payload).
    pub control: mpsc::UnboundedReceiver<(u16, Vec<u8>)>,
    reader: tokio::task::JoinHandle<()>,
    writer: tokio::task::JoinHandle<()>,
}

/// One stream of it.
pub struct Stream {
    pub id: u32,
    out: mpsc::Sender<Vec<u8>>,
    pub events: mpsc::UnboundedReceiver<Event>,
}

fn control_frame(kind: u16, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&[0x80, 3][..], &kind.to_be_bytes(), &[0], &length[1..], payload].concat()
}

impl Spdy {
    pub async fn connect(url: &str, protocol: &str) -> Self {
        let (head, tcp) = upgrade_spdy(url, protocol).await;
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        Self::over(tcp)
    }

    /// Inside a WebSocket, whose messages are cut where it is least convenient.
    pub async fn tunnel(url: &str) -> Self {
        let (head, tcp) = upgrade_websocket(url, "SPDY/3.1+portforward.k8s.io").await;
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let (mut from_server, mut to_server) = tcp.into_split();
        let (mut read, mut write) = tokio::io::split(theirs);
        tokio::spawn(async move {
            let mut buffer = vec![0; 1500];
            while let Ok(n) = read.read(&mut buffer).await {
                if n == 0 || to_server.write_all(&masked(0x82, &buffer[..n])).await.is_err() {
                    return;
                }
            }
        });
        tokio::spawn(async move {
            while let Some((opcode, payload)) = frame(&mut from_server).await {
                if opcode == 8 || opcode == 2 && write.write_all(&payload).await.is_err() {
                    return;
                }
            }
        });
        Self::over(ours)
    }

    fn over(io: impl AsyncRead + AsyncWrite + Send + 'static) -> Self {
        let (read, mut write) = tokio::io::split(io);
        let (out, mut queue) = mpsc::channel::<Vec<u8>>(256);
        let (tell, control) = mpsc::unbounded_channel();
        let listeners = Listeners::default();
        let writer = tokio::spawn(async move {
            while let Some(bytes) = queue.recv().await {
                if write.write_all(&bytes).await.is_err() {
                    return;
                }
            }
        });
        let reader = tokio::spawn(read_frames(read, listeners.clone(), tell));
        let mut deflate = Compress::new(Compression::fast(), true);
        deflate.set_dictionary(DICTIONARY).unwrap();
        Self { out, listeners, deflate, next: 1, control, reader, writer }
    }

    /// Opens a stream and waits for its acceptance.
    pub async fn open(&mut self, headers: &[(&str, &str)]) -> Stream {
        let mut stream = self.begin(headers).await;
        assert_eq!(soon(stream.events.recv()).await, Some(Event::Reply));
        stream
    }

    /// Opens a stream.
    pub async fn begin(&mut self, headers: &[(&str, &str)]) -> Stream {
        let mut plain = (headers.len() as u32).to_be_bytes().to_vec();
        for (name, value) in headers {
            for text in [name, value] {
                plain.extend((text.len() as u32).to_be_bytes());
                plain.extend(text.as_bytes());
            }
        }
        let mut block = Vec::with_capacity(plain.len() * 2 + 1024);
        self.deflate.compress_vec(&plain, &mut block, FlushCompress::Sync).unwrap();
        let id = self.next;
        self.next += 2;
        let (tell, events) = mpsc::unbounded_channel();
        self.listeners.lock().unwrap().insert(id, tell);
        self.out.send(control_frame(1, &[&id.to_be_bytes()[..], &[0; 6], &block].concat())).await.unwrap();
        Stream { id, out: self.out.clone(), events }
    }

    /// The streams of an exec or attach, by name, in order.
    pub async fn streams<const N: usize>(&mut self, names: [&str; N]) -> [Stream; N] {
        let mut streams = Vec::new();
        for name in names {
            streams.push(self.open(&[("streamtype", name)]).await);
        }
        streams.try_into().ok().unwrap()
    }

    /// The two streams of a forwarded connection: error, data.
    pub async fn pair(&mut self, port: u16, id: u32) -> (Stream, Stream) {
        let (port, id) = (port.to_string(), id.to_string());
        let mut error = self.begin(&[("streamtype", "error"), ("port", &port), ("requestid", &id)]).await;
        let mut data = self.begin(&[("streamtype", "data"), ("port", &port), ("requestid", &id)]).await;
        assert_eq!(soon(error.events.recv()).await, Some(Event::Reply));
        assert_eq!(soon(data.events.recv()).await, Some(Event::Reply));
        error.finish().await;
        (error, data)
    }

    pub async fn ping(&self, id: u32) {
        self.out.send(control_frame(6, &id.to_be_bytes())).await.unwrap();
    }

    /// Whether the server says goodbye, and closes.
    pub async fn said_goodbye(&mut self) -> bool {
        let mut goodbye = false;
        while let Some((kind, _)) = soon(self.control.recv()).await {
            goodbye |= kind == 7;
        }
        goodbye
    }

    /// Hangs up without a word.
    pub async fn hang_up(self) {
        self.reader.abort();
        self.writer.abort();
        let _ = (self.reader.await, self.writer.await);
    }
}

async fn read_frames(mut read: impl AsyncRead + Unpin, listeners: Listeners, control: mpsc::UnboundedSender<(u16, Vec<u8>)>) {
    let mut head = [0u8; 8];
    while read.read_exact(&mut head).await.is_ok() {
        let mut payload = vec![0; u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize];
        if read.read_exact(&mut payload).await.is_err() {
            break;
        }
        let tell = |id: u32, event| {
            if let Some(listener) = listeners.lock().unwrap().get(&id) {
                let _ = listener.send(event);
            }
        };
        let number = |at: usize| u32::from_be_bytes(payload[at..at + 4].try_into().unwrap());
        if head[0] & 0x80 == 0 {
            let id = u32::from_be_bytes(head[..4].try_into().unwrap());
            if !payload.is_empty() {
                tell(id, Event::Data(payload));
            }
            if head[4] & 1 != 0 {
                tell(id, Event::Fin);
            }
            continue;
        }
        match u16::from_be_bytes([head[2], head[3]]) {
            2 => tell(number(0), Event::Reply),
            3 => tell(number(0), Event::Reset(number(4))),
            kind => drop(control.send((kind, payload))),
        }
    }
    listeners.lock().unwrap().clear();
}

impl Stream {
    pub async fn send(&self, bytes: &[u8]) {
        assert!(self.try_send(bytes, false).await);
    }

    /// Half-closes.
    pub async fn finish(&self) {
        self.try_send(b"", true).await;
    }

    /// False when the connection is gone.
    pub async fn try_send(&self, bytes: &[u8], fin: bool) -> bool {
        let length = (bytes.len() as u32).to_be_bytes();
        let frame = [&self.id.to_be_bytes()[..], &[u8::from(fin)], &length[1..], bytes].concat();
        self.out.send(frame).await.is_ok()
    }

    pub async fn reset(&self) {
        self.out.send(control_frame(3, &[self.id.to_be_bytes(), 5u32.to_be_bytes()].concat())).await.unwrap();
    }

    /// Reads until the text so far is enough, or to the end of the stream.
    pub async fn read_until(&mut self, enough: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let mut all = Vec::new();
        while !enough(&all) {
            match soon(self.events.recv()).await {
                Some(Event::Data(data)) => all.extend(data),
                Some(Event::Fin | Event::Reset(_)) | None => break,
                Some(Event::Reply) => {}
            }
        }
        all
    }

    pub async fn read_to_end(&mut self) -> Vec<u8> {
        self.read_until(|_| false).await
    }

    /// The status of a v4 error stream.
    pub async fn status(&mut self) -> serde_json::Value {
        serde_json::from_slice(&self.read_to_end().await).unwrap()
    }
}

/// A client's frame.
pub fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
    let mask = [0x5a, 0xa5, 0x0f, 0xf0];
    let mut out = vec![first];
    match payload.len() {
        n @ 0..=125 => out.push(0x80 | n as u8),
        n => {
            out.push(0x80 | 126);
            out.extend((n as u16).to_be_bytes());
        }
    }
    out.extend(mask);
    out.extend(payload.iter().zip(mask.iter().cycle()).map(|(b, m)| b ^ m));
    out
}

/// A server's frame: opcode and content.
async fn frame(read: &mut (impl AsyncRead + Unpin)) -> Option<(u8, Vec<u8>)> {
    let mut head = [0u8; 2];
    read.read_exact(&mut head).await.ok()?;
    let length = match head[1] & 0x7f {
        126 => u64::from(read.read_u16().await.ok()?),
        127 => read.read_u64().await.ok()?,
        n => u64::from(n),
    };
    let mut payload = vec![0; length as usize];
    read.read_exact(&mut payload).await.ok()?;
    Some((head[0] & 0x0f, payload))
}

/// WebSocket channels.
pub struct Channels {
    tcp: TcpStream,
    base64: bool,
}

impl Channels {
    pub async fn connect(url: &str, protocol: &str) -> Self {
        let (head, tcp) = upgrade_websocket(url, protocol).await;
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        assert!(protocol.is_empty() || head.contains(&format!("Sec-WebSocket-Protocol: {protocol}\r\n")), "{head}");
        Self { tcp, base64: protocol.contains("base64") }
    }

    pub async fn send(&mut self, channel: u8, bytes: &[u8]) {
        let bytes = match self.base64 {
            true => masked(0x81, format!("{channel}{}", STANDARD.encode(bytes)).as_bytes()),
            false => masked(0x82, &[&[channel], bytes].concat()),
        };
        self.tcp.write_all(&bytes).await.unwrap();
    }

    /// The next message with something in it; none after the server's goodbye, whose code must be 1000.
    pub async fn next(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            let (opcode, payload) = soon(frame(&mut self.tcp)).await.expect("a goodbye before the end");
            if opcode == 8 {
                assert_eq!(payload, 1000u16.to_be_bytes());
                self.tcp.write_all(&masked(0x88, &payload)).await.unwrap();
                return None;
            }
            let (channel, body) = match self.base64 {
                true => (payload[0] - b'0', STANDARD.decode(&payload[1..]).unwrap()),
                false => (payload[0], payload[1..].to_vec()),
            };
            if !body.is_empty() {
                return Some((channel, body));
            }
        }
    }

    /// Everything by channel, up to the goodbye.
    pub async fn rest(&mut self) -> HashMap<u8, Vec<u8>> {
        let mut all: HashMap<u8, Vec<u8>> = HashMap::new();
        while let Some((channel, body)) = self.next().await {
            all.entry(channel).or_default().extend(body);
        }
        all
    }
}
