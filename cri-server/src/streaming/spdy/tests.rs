//! A session against a client that speaks frames by hand, well and badly.

use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::frame::{self, Frame};
use super::headers::{Deflater, Headers};
use super::{Limits, Session, Why};
use crate::streaming::wire::Peer;

const LIMITS: Limits = Limits { patience: Some(Duration::from_secs(10)), streams: 64 };

struct Client {
    io: DuplexStream,
    deflate: Deflater,
}

impl Client {
    fn connect(limits: Limits, buffer: usize) -> (Self, Session) {
        let (io, server) = tokio::io::duplex(buffer);
        (Self { io, deflate: Deflater::new().unwrap() }, Session::start(server, Peer::unknown(), limits).unwrap())
    }

    async fn open(&mut self, stream: u32, kind: &str) {
        let headers: Headers = [("streamtype".to_owned(), kind.to_owned())].into();
        let block = self.deflate.write(&headers).unwrap();
        self.io.write_all(&frame::open(stream, &block)).await.unwrap();
    }

    async fn data(&mut self, stream: u32, fin: bool, bytes: &[u8]) {
        self.io.write_all(&frame::data_head(stream, fin, bytes.len())).await.unwrap();
        self.io.write_all(bytes).await.unwrap();
    }

    async fn next(&mut self) -> Option<(Frame, Vec<u8>)> {
        let frame = frame::read(&mut self.io).await.unwrap()?;
        let mut payload = vec![0; if let Frame::Data { length, .. } = frame { length } else { 0 }];
        self.io.read_exact(&mut payload).await.unwrap();
        Some((frame, payload))
    }

    /// Frames up to the first that is wanted.
    async fn until(&mut self, wanted: impl Fn(&Frame) -> bool) -> Vec<u8> {
        let seen = async {
            while let Some((frame, payload)) = self.next().await {
                if wanted(&frame) {
                    return payload;
                }
            }
            panic!("the connection has ended");
        };
        tokio::time::timeout(Duration::from_secs(60), seen).await.unwrap()
    }
}

#[tokio::test]
async fn streams_are_replied_to_and_carry_data_both_ways() {
    let (mut client, mut session) = Client::connect(LIMITS, 1 << 16);
    client.open(1, "stdin").await;
    client.data(1, true, b"hello").await;
    client.io.write_all(&frame::ping(3)).await.unwrap();
    let mut stream = session.next().await.unwrap();
    assert_eq!(stream.headers["streamtype"], "stdin");
    assert_eq!(stream.data.recv().await.unwrap(), "hello");
    assert!(stream.data.recv().await.is_none() && !stream.data.aborted());
    stream.writer.send(Bytes::from_static(b"world")).await.unwrap();
    stream.writer.finish().await.unwrap();
    drop(stream);
    let closing = tokio::spawn(session.close());
    let mut seen = Vec::new();
    while let Some(frame) = client.next().await {
        seen.push(frame);
    }
    assert!(matches!(seen[0].0, Frame::Reply { stream: 1 }));
    assert!(seen.iter().any(|(f, _)| *f == Frame::Ping { id: 3 }));
    assert!(seen.contains(&(Frame::Data { stream: 1, fin: false, length: 5 }, b"world".to_vec())));
    assert!(seen.iter().any(|(f, _)| *f == Frame::Data { stream: 1, fin: true, length: 0 }));
    assert_eq!(seen.last().map(|(f, _)| f), Some(&Frame::GoAway));
    drop(client);
    closing.await.unwrap();
}

#[tokio::test]
async fn a_frame_of_any_length_comes_through_in_pieces() {
    let (mut client, mut session) = Client::connect(LIMITS, 1 << 16);
    let sent = vec![9u8; 5_000_000];
    let copy = sent.clone();
    let sender = tokio::spawn(async move {
        client.open(1, "data").await;
        client.data(1, true, &copy).await;
        client
    });
    let mut stream = session.next().await.unwrap();
    let mut seen = 0;
    while let Some(piece) = stream.data.recv().await {
        assert!(piece.len() <= 16 * 1024 && piece.iter().all(|b| *b == 9));
        seen += piece.len();
    }
    assert_eq!(seen, sent.len());
    sender.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_nobody_reads_is_cut_and_the_others_go_on() {
    let (mut client, mut session) = Client::connect(LIMITS, 1 << 16);
    client.open(1, "data").await;
    client.open(3, "data").await;
    let mut stuck = session.next().await.unwrap();
    let mut other = session.next().await.unwrap();
    for _ in 0..40 {
        client.data(1, false, &[1; 64 * 1024]).await;
    }
    client.data(3, false, b"still here").await;
    assert_eq!(tokio::time::timeout(Duration::from_secs(60), other.data.recv()).await.unwrap().unwrap(), "still here");
    client.until(|f| *f == Frame::Reset { stream: 1 }).await;
    while stuck.data.recv().await.is_some() {}
    assert!(stuck.data.aborted());
    assert!(stuck.writer.send(Bytes::from_static(b"x")).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn without_a_limit_of_patience_the_client_waits_for_its_reader() {
    let (mut client, mut session) = Client::connect(Limits { patience: None, ..LIMITS }, 1 << 16);
    client.open(1, "stdin").await;
    let mut stream = session.next().await.unwrap();
    let sender = tokio::spawn(async move {
        for _ in 0..40 {
            client.data(1, false, &[1; 64 * 1024]).await;
        }
        client.data(1, true, b"").await;
        client
    });
    tokio::time::sleep(Duration::from_secs(24 * 3600)).await;
    assert!(!sender.is_finished(), "the buffer has a bound");
    let mut seen = 0;
    while let Some(piece) = stream.data.recv().await {
        seen += piece.len();
    }
    assert_eq!((seen, stream.data.aborted()), (40 * 64 * 1024, false));
    sender.await.unwrap();
}

#[tokio::test]
async fn pings_are_answered_while_output_waits_for_its_client() {
    let (mut client, mut session) = Client::connect(LIMITS, 256 * 1024);
    client.open(1, "stdout").await;
    let stream = session.next().await.unwrap();
    let writer = stream.writer.clone();
    let output = tokio::spawn(async move { while writer.send(vec![0; 32 * 1024].into()).await.is_ok() {} });
    for id in (1..200).step_by(2) {
        client.io.write_all(&frame::ping(id)).await.unwrap();
    }
    // The reader has taken all pings though nothing of the output was read: the next stream is seen.
    client.open(3, "stdin").await;
    assert_eq!(tokio::time::timeout(Duration::from_secs(20), session.next()).await.unwrap().unwrap().id, 3);
    client.until(|f| *f == Frame::Ping { id: 199 }).await;
    output.abort();
}

#[tokio::test]
async fn too_many_streams_are_refused_and_room_is_made_when_some_end() {
    let (mut client, mut session) = Client::connect(LIMITS, 1 << 20);
    let mut held = Vec::new();
    for i in 0..64u32 {
        client.open(2 * i + 1, "data").await;
        held.push(session.next().await.unwrap());
    }
    client.open(129, "data").await;
    client.until(|f| *f == Frame::Reset { stream: 129 }).await;
    client.io.write_all(&frame::reset(1, 5)).await.unwrap();
    client.open(131, "data").await;
    assert_eq!(session.next().await.unwrap().id, 131);
    held[1].writer.finish().await.unwrap();
    client.data(3, true, b"").await;
    client.open(133, "data").await;
    assert_eq!(session.next().await.unwrap().id, 133);
}

#[tokio::test]
async fn thousands_of_streams_may_follow_each_other() {
    let (mut client, mut session) = Client::connect(LIMITS, 1 << 16);
    for i in 0..3000u32 {
        let stream = 2 * i + 1;
        client.open(stream, "data").await;
        client.data(stream, true, b"ab").await;
        let mut opened = session.next().await.unwrap();
        assert_eq!(opened.data.recv().await.unwrap(), "ab");
        opened.writer.finish().await.unwrap();
        client.until(|f| matches!(f, Frame::Data { fin: true, .. })).await;
    }
}

#[tokio::test]
async fn a_reset_stream_fails_its_writer_and_not_the_connection() {
    let (mut client, mut session) = Client::connect(LIMITS, 1 << 16);
    client.open(1, "data").await;
    let mut stream = session.next().await.unwrap();
    client.io.write_all(&frame::reset(1, Why::Cancelled as u32)).await.unwrap();
    assert!(stream.data.recv().await.is_none() && stream.data.aborted());
    assert!(stream.writer.send(Bytes::from_static(b"x")).await.is_err());
    client.open(3, "data").await;
    assert_eq!(session.next().await.unwrap().id, 3);
    assert!(!session.gone.is_cancelled());
}

#[tokio::test]
async fn stream_ids_must_be_odd_and_rise() {
    for ids in [[2, 3], [3, 3], [3, 1]] {
        let (mut client, mut session) = Client::connect(LIMITS, 1 << 16);
        for id in ids {
            client.open(id, "data").await;
        }
        while session.next().await.is_some() {}
        assert!(session.gone.is_cancelled(), "{ids:?}");
    }
}

#[tokio::test]
async fn a_client_that_asks_and_never_reads_is_cut() {
    let (mut client, session) = Client::connect(LIMITS, 1 << 10);
    let pings = async {
        let ping = frame::ping(1);
        while client.io.write_all(&ping).await.is_ok() {
            if session.gone.is_cancelled() {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(60), pings).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn closing_does_not_wait_for_ever_for_a_client_that_reads_nothing() {
    let (mut client, mut session) = Client::connect(LIMITS, 1 << 10);
    client.open(1, "stdout").await;
    let stream = session.next().await.unwrap();
    let writer = stream.writer.clone();
    let output = tokio::spawn(async move { while writer.send(vec![0; 32 * 1024].into()).await.is_ok() {} });
    tokio::time::timeout(Duration::from_secs(300), session.close()).await.unwrap();
    tokio::time::timeout(Duration::from_secs(300), output).await.unwrap().unwrap();
}

/// A small generator of pseudo-random bytes: the same in every run.
fn noise(seed: u64) -> impl FnMut() -> u8 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    }
}

/// Runs a session on bytes as they come; it must end by itself.
async fn survives(bytes: &[u8]) {
    let (mut io, server) = tokio::io::duplex(1 << 20);
    let mut session = Session::start(server, Peer::unknown(), LIMITS).unwrap();
    let _ = io.write_all(bytes).await;
    drop(io);
    let served = async {
        while let Some(mut stream) = session.next().await {
            while stream.data.recv().await.is_some() {}
        }
        session.gone.cancelled().await;
    };
    tokio::time::timeout(Duration::from_secs(30), served).await.unwrap();
    session.reader_ended().await;
}

#[tokio::test]
async fn no_bytes_from_the_wire_make_it_panic_or_hang() {
    let mut deflate = Deflater::new().unwrap();
    let headers: Headers = [("streamtype".to_owned(), "data".to_owned()), ("port".to_owned(), "80".to_owned())].into();
    let mut good = frame::open(1, &deflate.write(&headers).unwrap());
    good.extend(frame::data_head(1, false, 3));
    good.extend(b"abc");
    good.extend(frame::open(3, &deflate.write(&headers).unwrap()));
    good.extend(frame::ping(1));
    good.extend(frame::reset(1, 5));
    for seed in 0..1500u64 {
        let mut random = noise(seed);
        let mut bytes = good.clone();
        match seed % 4 {
            // All noise, noise behind a good head, a good conversation with some bytes changed, or cut short.
            0 => bytes = (0..200).map(|_| random()).collect(),
            1 => {
                bytes = vec![0x80, 3, 0, 1 + random() % 10, random(), 0, 0, random()];
                bytes.extend((0..300).map(|_| random()));
            }
            2 => {
                for _ in 0..1 + random() % 6 {
                    let at = usize::from(random()) % bytes.len();
                    bytes[at] = random();
                }
            }
            _ => bytes.truncate(usize::from(random()) % good.len()),
        }
        survives(&bytes).await;
    }
}
