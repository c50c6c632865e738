//! A server side against a client that writes frames by hand, well and badly.

use tokio::io::AsyncReadExt;

use super::*;

fn masked(first: u8, payload: &[u8]) -> Vec<u8> {
    let mask = [1u8, 2, 3, 4];
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

fn start(buffer: usize, form: Form) -> (tokio::io::DuplexStream, WebSocket) {
    let (client, server) = tokio::io::duplex(buffer);
    (client, WebSocket::start(server, Peer::unknown(), form))
}

#[test]
fn the_accept_key_is_the_rfcs() {
    assert_eq!(accept_key("dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    assert!(is_key("dGhlIHNhbXBsZSBub25jZQ==") && !is_key("") && !is_key("c2hvcnQ=") && !is_key("no base64"));
}

#[tokio::test]
async fn fragments_are_joined_and_pings_answered_in_between() {
    let (mut client, mut socket) = start(1 << 16, Form::Binary);
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
    socket.gone.cancelled().await;
    socket.close().await;
    let mut end = Vec::new();
    client.read_to_end(&mut end).await.unwrap();
    assert_eq!(end, [0x88, 2, 0x03, 0xe8], "one goodbye, not two");
}

#[tokio::test]
async fn our_goodbye_comes_after_all_output_and_waits_for_the_answer() {
    let (mut client, socket) = start(1 << 10, Form::Binary);
    let out = socket.channel(1);
    let closing = tokio::spawn(async move {
        for _ in 0..20 {
            out.send(vec![5; 1000].into()).await.unwrap();
        }
        drop(out);
        socket.close().await;
    });
    let mut seen = vec![0u8; 20 * 1005 + 4];
    client.read_exact(&mut seen).await.unwrap();
    assert_eq!(seen[seen.len() - 4..], [0x88, 2, 0x03, 0xe8]);
    assert!(!closing.is_finished());
    client.write_all(&masked(0x88, &1000u16.to_be_bytes())).await.unwrap();
    closing.await.unwrap();
}

#[tokio::test]
async fn what_breaks_the_protocol_is_answered_with_its_code() {
    let mut long = vec![0x82, 0xff];
    long.extend((u64::MAX / 2).to_be_bytes());
    for (what, bytes, code) in [
        ("no mask", vec![0x82, 1, 0], 1002u16),
        ("reserved bits", masked(0xc2, b"x"), 1002),
        ("unknown opcode", masked(0x83, b"x"), 1002),
        ("long ping", masked(0x89, &[0; 126]), 1002),
        ("ping in pieces", masked(0x09, b"x"), 1002),
        ("a piece of nothing", masked(0x80, b"x"), 1002),
        ("a message in a message", [masked(0x02, b"x"), masked(0x82, b"y")].concat(), 1002),
        ("too long", long, 1009),
    ] {
        let (mut client, mut socket) = start(1 << 16, Form::Binary);
        client.write_all(&bytes).await.unwrap();
        assert!(socket.next().await.is_none(), "{what}");
        socket.gone.cancelled().await;
        let mut end = [0u8; 4];
        client.read_exact(&mut end).await.unwrap();
        assert_eq!((end[..2].to_vec(), u16::from_be_bytes([end[2], end[3]])), (vec![0x88, 2], code), "{what}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_whose_input_waits_is_told_that_we_live() {
    let (client, mut socket) = start(1 << 16, Form::Binary);
    let (mut read, mut write) = tokio::io::split(client);
    let sender = tokio::spawn(async move {
        for _ in 0..200 {
            write.write_all(&masked(0x82, &[0; 32 * 1024])).await.unwrap();
        }
        write
    });
    let mut pong = [0u8; 2];
    tokio::time::timeout(Duration::from_secs(60), read.read_exact(&mut pong)).await.unwrap().unwrap();
    assert_eq!(pong, [0x8a, 0]);
    assert!(!sender.is_finished(), "what waits has a bound");
    for _ in 0..200 {
        socket.next().await.unwrap();
    }
    sender.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn closing_does_not_wait_for_ever_for_a_client_that_reads_nothing() {
    let (_client, socket) = start(1 << 10, Form::Binary);
    let out = socket.channel(1);
    let output = tokio::spawn(async move { while out.send(vec![0; 32 * 1024].into()).await.is_ok() {} });
    tokio::time::timeout(Duration::from_secs(300), socket.close()).await.unwrap();
    tokio::time::timeout(Duration::from_secs(300), output).await.unwrap().unwrap();
}

#[test]
fn base64_channels_are_digits() {
    assert_eq!(decode(Form::Base64, Bytes::from_static(b"0aGk=")), Some((0, Bytes::from_static(b"hi"))));
    assert_eq!(decode(Form::Base64, Bytes::from_static(b"xaGk=")), None);
    assert_eq!(decode(Form::Binary, Bytes::new()), None);
}

#[tokio::test]
async fn no_bytes_from_the_wire_make_it_panic_or_hang() {
    let good = [masked(0x02, b"\0ab"), masked(0x89, b"p"), masked(0x80, b"cd"), masked(0x82, &[1; 300])].concat();
    for seed in 1..1500u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as u8
        };
        let mut bytes = good.clone();
        match seed % 3 {
            0 => bytes = (0..200).map(|_| random()).collect(),
            1 => (0..4).for_each(|_| bytes[usize::from(random()) % 300] = random()),
            _ => bytes.truncate(usize::from(random())),
        }
        let (mut client, mut socket) = start(1 << 16, if seed % 2 == 0 { Form::Binary } else { Form::Base64 });
        client.write_all(&bytes).await.unwrap();
        drop(client);
        let served = async {
            while socket.next().await.is_some() {}
            socket.gone.cancelled().await;
            if let Err(error) = (&mut socket.reader).await {
                std::panic::resume_unwind(error.into_panic());
            }
        };
        tokio::time::timeout(Duration::from_secs(30), served).await.unwrap();
    }
}
