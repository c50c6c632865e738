//! Frames on the wire.

use std::io;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt};

/// Longest control frame: header blocks are the only ones of more than a few bytes. Data frames are read in pieces and may have
/// any length.
const LIMIT: usize = 64 * 1024;
/// The version in each control frame, with the bit that marks it as one.
const CONTROL: u16 = 0x8003;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const PING: u16 = 6;
const GOAWAY: u16 = 7;

/// The last frame of a sender on a stream.
const FIN: u8 = 1;

/// A frame that matters; others are skipped.
#[derive(Debug, PartialEq)]
pub(super) enum Frame {
    Open {
        stream: u32,
        fin: bool,
        headers: Bytes,
    },
    Reply {
        stream: u32,
    },
    /// The payload follows on the wire.
    Data {
        stream: u32,
        fin: bool,
        length: usize,
    },
    Reset {
        stream: u32,
    },
    Ping {
        id: u32,
    },
    GoAway,
    Other,
}

fn u32_at(bytes: &[u8], at: usize) -> io::Result<u32> {
    let part = bytes.get(at..at + 4).and_then(|p| p.try_into().ok());
    part.map(u32::from_be_bytes).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "spdy frame: too short"))
}

/// Reads the next frame, of data only the head; none at the end of the connection.
pub(super) async fn read(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Frame>> {
    let mut head = [0u8; 8];
    match from.read_exact(&mut head).await {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(e) => return Err(e),
    }
    let flags = head[4];
    let length = u32::from_be_bytes([0, head[5], head[6], head[7]]) as usize;
    let first = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
    if first >> 31 == 0 {
        return Ok(Some(Frame::Data { stream: first, fin: flags & FIN != 0, length }));
    }
    let bad = |text| io::Error::new(io::ErrorKind::InvalidData, text);
    if (first >> 16) as u16 != CONTROL {
        return Err(bad(format!("spdy frame of version {}", first >> 16 & 0x7fff)));
    }
    if length > LIMIT {
        return Err(bad(format!("spdy control frame of {length} bytes")));
    }
    let mut payload = vec![0u8; length];
    from.read_exact(&mut payload).await?;
    let id = |at| u32_at(&payload, at).map(|v| v & 0x7fff_ffff);
    Ok(Some(match (first & 0xffff) as u16 {
        SYN_STREAM => {
            let stream = id(0)?;
            let headers = payload.get(10..).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "spdy frame: too short"))?;
            Frame::Open { stream, fin: flags & FIN != 0, headers: Bytes::copy_from_slice(headers) }
        }
        SYN_REPLY => Frame::Reply { stream: id(0)? },
        RST_STREAM => Frame::Reset { stream: id(0)? },
        PING => Frame::Ping { id: u32_at(&payload, 0)? },
        GOAWAY => Frame::GoAway,
        _ => Frame::Other,
    }))
}

fn control(kind: u16, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(8 + payload.len());
    out.extend_from_slice(&CONTROL.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.push(flags);
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
    out.extend_from_slice(payload);
    out
}

/// The answer that opens a stream.
pub(super) fn reply(stream: u32, headers: &[u8]) -> Vec<u8> {
    control(SYN_REPLY, 0, &[&stream.to_be_bytes()[..], headers].concat())
}

/// A refusal or abort; the status says which.
pub(super) fn reset(stream: u32, status: u32) -> Vec<u8> {
    control(RST_STREAM, 0, &[stream.to_be_bytes(), status.to_be_bytes()].concat())
}

/// A ping's echo.
pub(super) fn ping(id: u32) -> Vec<u8> {
    control(PING, 0, &id.to_be_bytes())
}

/// The end of the connection: 0 = in order, 1 = the peer broke the protocol.
pub(super) fn go_away(last: u32, status: u32) -> Vec<u8> {
    control(GOAWAY, 0, &[last.to_be_bytes(), status.to_be_bytes()].concat())
}

/// The head of a data frame; the payload follows.
pub(super) fn data_head(stream: u32, fin: bool, length: usize) -> [u8; 8] {
    let s = stream.to_be_bytes();
    let l = (length as u32).to_be_bytes();
    [s[0], s[1], s[2], s[3], if fin { FIN } else { 0 }, l[1], l[2], l[3]]
}

#[cfg(test)]
pub(super) fn open(stream: u32, headers: &[u8]) -> Vec<u8> {
    control(SYN_STREAM, 0, &[&stream.to_be_bytes()[..], &[0; 6], headers].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_are_read_as_they_are_written() {
        let mut wire = Vec::new();
        wire.extend(open(1, b"h"));
        wire.extend(ping(7));
        wire.extend(reset(5, 3));
        wire.extend(go_away(0, 0));
        wire.extend(data_head(3, true, 0xff_ffff));
        let mut from = wire.as_slice();
        let mut seen = Vec::new();
        while let Some(frame) = read(&mut from).await.unwrap() {
            seen.push(frame);
        }
        assert_eq!(
            seen,
            [
                Frame::Open { stream: 1, fin: false, headers: Bytes::from_static(b"h") },
                Frame::Ping { id: 7 },
                Frame::Reset { stream: 5 },
                Frame::GoAway,
                Frame::Data { stream: 3, fin: true, length: 0xff_ffff },
            ]
        );
    }

    #[tokio::test]
    async fn what_is_cut_off_too_long_or_of_another_version_is_an_error() {
        let whole = reset(5, 3);
        let mut other = whole.clone();
        other[1] = 2;
        let mut long = whole.clone();
        long[5] = 1;
        let short = control(PING, 0, b"x");
        for wire in [&whole[..10], &other, &long, &short] {
            assert!(read(&mut &wire[..]).await.is_err(), "{wire:?}");
        }
    }
}
