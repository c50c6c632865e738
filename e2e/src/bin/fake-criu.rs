//! Stands in for CRIU where the real one cannot dump: `criu swrk FD` takes one dump request and answers it. It speaks the RPC's
//! bytes by itself, so that a mistake in the agent's messages is seen. What it does is in the file `criu.mode` beside it: `dump`
//! (the default), `refuse`, `die`, `hang`.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "test code")]

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::RawFd;
use std::os::unix::process::parent_id;
use std::path::PathBuf;

use nix::sys::socket::{MsgFlags, recv, send};

/// One field of a message: a number, or bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Value {
    Number(u64),
    Bytes(Vec<u8>),
}

type Message = BTreeMap<u64, Vec<Value>>;

fn varint(bytes: &mut &[u8]) -> u64 {
    let (mut value, mut shift) = (0u64, 0);
    loop {
        let (first, rest) = bytes.split_first().unwrap();
        *bytes = rest;
        value |= u64::from(first & 0x7f) << shift;
        shift += 7;
        if first & 0x80 == 0 {
            return value;
        }
    }
}

fn parse(mut bytes: &[u8]) -> Message {
    let mut message = Message::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let value = match key & 7 {
            0 => Value::Number(varint(&mut bytes)),
            2 => {
                let length = usize::try_from(varint(&mut bytes)).unwrap();
                let (own, rest) = bytes.split_at(length);
                bytes = rest;
                Value::Bytes(own.to_vec())
            }
            other => panic!("wire type {other}"),
        };
        message.entry(key >> 3).or_default().push(value);
    }
    message
}

fn number(message: &Message, field: u64) -> u64 {
    match message.get(&field).and_then(|values| values.last()) {
        Some(Value::Number(number)) => *number,
        _ => 0,
    }
}

fn texts(message: &Message, field: u64) -> Vec<Vec<u8>> {
    let bytes = |value: &Value| if let Value::Bytes(bytes) = value { bytes.clone() } else { Vec::new() };
    message.get(&field).into_iter().flatten().map(bytes).collect()
}

fn answer(socket: RawFd, success: bool, text: &str) {
    let mut bytes = vec![8, 1, 16, u8::from(success)];
    if !success {
        bytes.extend([56, 95, 74, u8::try_from(text.len()).unwrap()]);
        bytes.extend(text.as_bytes());
    }
    send(socket, &bytes, MsgFlags::empty()).unwrap();
}

/// Writes what was asked for where the images go, as `core-1.img`, and a log.
fn dump(options: &Message) {
    // The numbers are descriptors of who made the socket.
    let folder = |field: u64| PathBuf::from(format!("/proc/{}/fd/{}", parent_id(), number(options, field)));
    let lossy = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let mount = |bytes: Vec<u8>| lossy(texts(&parse(&bytes), 1).pop().unwrap_or_default());
    let mounts: Vec<String> = texts(options, 23).into_iter().map(mount).collect();
    let external: Vec<String> = texts(options, 37).into_iter().map(lossy).collect();
    let told = format!(
        "pid={}\nleave_running={}\nmounts={}\nexternal={}\n",
        number(options, 2),
        number(options, 3),
        mounts.join(","),
        external.join(",")
    );
    fs::write(folder(1).join("core-1.img"), told).unwrap();
    let log = String::from_utf8(texts(options, 10).pop().unwrap()).unwrap();
    fs::write(folder(17).join(log), "(00.000001) Error (fake.c:1): a mount is strange\n").unwrap();
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    assert_eq!(arguments[1], "swrk");
    let socket: RawFd = arguments[2].parse().unwrap();
    let mode = fs::read_to_string(PathBuf::from(&arguments[0]).with_extension("mode")).unwrap_or_default();
    if mode == "die" {
        eprintln!("Error (fake.c:2): this kernel is not for me");
        std::process::exit(1);
    }
    let mut buffer = vec![0; 64 << 10];
    let count = recv(socket, &mut buffer, MsgFlags::empty()).unwrap();
    let request = parse(&buffer[..count]);
    assert_eq!(number(&request, 1), 1, "DUMP");
    if mode == "hang" {
        std::thread::sleep(std::time::Duration::from_secs(1000));
    }
    dump(&parse(&texts(&request, 2).pop().unwrap()));
    answer(socket, mode != "refuse", "no");
}
