//! ttRPC's messages: a header of ten bytes, then protobuf. Unary calls alone: NRI has no streams.

use prost::Message as _;

use super::MAX_MESSAGE;
use crate::Error;

/// Bytes before each message.
pub(super) const HEADER: usize = 10;
const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;

/// A call.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Request {
    #[prost(string, tag = "1")]
    pub(super) service: String,
    #[prost(string, tag = "2")]
    pub(super) method: String,
    #[prost(bytes = "vec", tag = "3")]
    pub(super) payload: Vec<u8>,
    #[prost(int64, tag = "4")]
    pub(super) timeout_nano: i64,
}

/// Its answer.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Response {
    #[prost(message, optional, tag = "1")]
    pub(super) status: Option<Status>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) payload: Vec<u8>,
}

/// How a call ended: gRPC's code, 0 is good.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Status {
    #[prost(int32, tag = "1")]
    pub(crate) code: i32,
    #[prost(string, tag = "2")]
    pub(crate) message: String,
}

/// What came.
#[derive(Debug, PartialEq)]
pub(super) enum Incoming {
    /// A call, with its stream.
    Request(u32, Request),
    /// An answer to one of ours, with its stream.
    Response(u32, Response),
}

/// A message with its header.
pub(super) fn request(stream: u32, request: &Request) -> Vec<u8> {
    message(REQUEST, stream, request)
}

/// A message with its header.
pub(super) fn response(stream: u32, response: &Response) -> Vec<u8> {
    message(RESPONSE, stream, response)
}

fn message(kind: u8, stream: u32, body: &impl prost::Message) -> Vec<u8> {
    let length = body.encoded_len();
    let mut out = Vec::with_capacity(HEADER + length);
    out.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(&[kind, 0]);
    out.extend_from_slice(&body.encode_to_vec());
    out
}

/// Puts messages together from the bytes of one logical connection.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    bytes: Vec<u8>,
    /// So many of them have been taken: they are dropped with the next that come, not once for each message.
    taken: usize,
}

impl Assembler {
    /// Takes the next bytes.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..std::mem::take(&mut self.taken));
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message, if it is there.
    pub(super) fn next(&mut self) -> Result<Option<Incoming>, Error> {
        let wrong = |reason: String| Error::Protocol { what: "ttRPC", reason };
        let rest = self.bytes.get(self.taken..).unwrap_or_default();
        let Some(&[a, b, c, d, e, f, g, h, kind, _flags]) = rest.first_chunk::<HEADER>() else { return Ok(None) };
        let (length, stream) = (u32::from_be_bytes([a, b, c, d]) as usize, u32::from_be_bytes([e, f, g, h]));
        if length > MAX_MESSAGE {
            return Err(wrong(format!("a message of {length} bytes")));
        }
        let Some(body) = rest.get(HEADER..HEADER + length) else { return Ok(None) };
        let incoming = match kind {
            REQUEST => Incoming::Request(stream, Request::decode(body).map_err(|e| wrong(e.to_string()))?),
            RESPONSE => Incoming::Response(stream, Response::decode(body).map_err(|e| wrong(e.to_string()))?),
            other => return Err(wrong(format!("a message of the kind {other}"))),
        };
        self.taken += HEADER + length;
        Ok(Some(incoming))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Request {
        Request { service: "s".into(), method: "m".into(), payload: vec![1, 2, 3], timeout_nano: 5 }
    }

    #[test]
    fn messages_are_found_in_bytes_however_they_are_cut() {
        let mut bytes = request(1, &sample());
        bytes.extend(response(3, &Response { status: None, payload: vec![9; 300] }));
        for size in [1, 2, 7, 10, 11, 64, 1000] {
            let mut assembler = Assembler::default();
            let mut got = Vec::new();
            for part in bytes.chunks(size) {
                assembler.push(part);
                while let Some(message) = assembler.next().unwrap() {
                    got.push(message);
                }
            }
            assert_eq!(got.len(), 2, "{size}");
            assert_eq!(got[0], Incoming::Request(1, sample()));
        }
    }

    #[test]
    fn no_bytes_whatever_make_it_panic() {
        // A small generator of our own (xorshift): the same bytes in every run.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let good = request(1, &sample());
        for round in 0..20_000 {
            let mut bytes = if round % 2 == 0 { good.clone() } else { Vec::new() };
            for _ in 0..random() % 24 {
                let at = random() as usize % (bytes.len() + 1);
                bytes.insert(at, random() as u8);
            }
            if let Some(byte) = bytes.get_mut(random() as usize % 40) {
                *byte ^= random() as u8;
            }
            let mut assembler = Assembler::default();
            assembler.push(&bytes);
            while let Ok(Some(_)) = assembler.next() {}
        }
    }
}
