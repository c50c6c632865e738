//! Frames on the stream socket between the agent and the shim: an 8-byte header, then JSON. Sync and free of I/O: the
//! caller moves the bytes and the descriptors. Must not know what a message means.
//!
//! ```text
//! u32 LE  length of the JSON in bytes (at most MAX_FRAME_BYTES)
//! u32 LE  number of descriptors that belong to this frame (at most MAX_FRAME_FDS)
//! JSON
//! ```
//!
//! Descriptors ride by SCM_RIGHTS on the first bytes of their frame. One `sendmsg` carries at most
//! [`MAX_FDS_PER_SEND`]; a frame with more is sent in pieces (any cut after the first byte will do), each with its share,
//! in order. The kernel never delivers a descriptor before the byte it was sent with and keeps their order, so a frame's
//! descriptors are the oldest ones not yet claimed when its last byte arrives.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Longest JSON body of one frame. Big things (OCI specs) travel as memfds.
pub const MAX_FRAME_BYTES: usize = 1 << 20;
/// Most descriptors of one frame.
pub const MAX_FRAME_FDS: usize = 1024;
/// The kernel's limit for one `sendmsg` (SCM_MAX_FD).
pub const MAX_FDS_PER_SEND: usize = 253;
/// Bytes before the JSON.
pub const HEADER_BYTES: usize = 8;

/// Why a byte stream is not our protocol. The connection cannot be used any more, except after [`FrameError::Body`].
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// A header announces more than is allowed.
    #[error("frame of {bytes} bytes with {fds} descriptors is over the limit")]
    TooLarge {
        /// Announced length of the JSON.
        bytes: usize,
        /// Announced number of descriptors.
        fds: usize,
    },
    /// The frame is complete but its descriptors did not come, or more came than frames announced.
    #[error("frame announces {announced} descriptors, {arrived} arrived")]
    Descriptors {
        /// Number in the header.
        announced: usize,
        /// Number at hand.
        arrived: usize,
    },
    /// The JSON is not a message of this version. The frame has been consumed: the stream is still in step.
    #[error("message cannot be read")]
    Body {
        /// The body as it came, for a reply with its `seq` (see [`super::seq_of`]).
        body: Vec<u8>,
        /// What the JSON reader said.
        #[source]
        source: serde_json::Error,
    },
    /// A message cannot be written as JSON.
    #[error("message cannot be encoded")]
    Encode(#[source] serde_json::Error),
}

/// Encodes `message`, which travels with `fds` descriptors, as one frame.
pub fn encode<T: Serialize>(message: &T, fds: usize) -> Result<Vec<u8>, FrameError> {
    let mut out = vec![0; HEADER_BYTES];
    serde_json::to_writer(&mut out, message).map_err(FrameError::Encode)?;
    let bytes = out.len() - HEADER_BYTES;
    if bytes > MAX_FRAME_BYTES || fds > MAX_FRAME_FDS {
        return Err(FrameError::TooLarge { bytes, fds });
    }
    out[..4].copy_from_slice(&(bytes as u32).to_le_bytes());
    out[4..HEADER_BYTES].copy_from_slice(&(fds as u32).to_le_bytes());
    Ok(out)
}

/// The JSON of a frame and its descriptors.
type Body = (Vec<u8>, Vec<OwnedFd>);

/// Puts frames together again. Holds no memory while nothing is half-read.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    fds: VecDeque<OwnedFd>,
}

impl Decoder {
    /// An empty decoder, for a fresh connection.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds what one `recvmsg` returned.
    pub fn push(&mut self, bytes: &[u8], fds: impl IntoIterator<Item = OwnedFd>) {
        self.bytes.extend_from_slice(bytes);
        self.fds.extend(fds);
    }

    /// Takes the next complete frame, `None` when more bytes are needed.
    #[allow(clippy::should_implement_trait, reason = "each call names the type that it expects")]
    pub fn next<T: DeserializeOwned>(&mut self) -> Result<Option<(T, Vec<OwnedFd>)>, FrameError> {
        let Some((body, fds)) = self.next_body()? else {
            return Ok(None);
        };
        match serde_json::from_slice(&body) {
            Ok(message) => Ok(Some((message, fds))),
            Err(source) => Err(FrameError::Body { body, source }),
        }
    }

    /// Whether a frame has begun that is not complete (an end of the stream here is a cut one).
    pub fn is_mid_frame(&self) -> bool {
        !self.bytes.is_empty()
    }

    fn next_body(&mut self) -> Result<Option<Body>, FrameError> {
        let Some(header) = self.bytes.get(..HEADER_BYTES) else {
            return Ok(None);
        };
        let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let count = u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize;
        if length > MAX_FRAME_BYTES || count > MAX_FRAME_FDS {
            return Err(FrameError::TooLarge { bytes: length, fds: count });
        }
        let end = HEADER_BYTES + length;
        if self.bytes.len() < end {
            return Ok(None);
        }
        if self.fds.len() < count {
            return Err(FrameError::Descriptors { announced: count, arrived: self.fds.len() });
        }
        let rest = self.bytes.split_off(end);
        let mut body = std::mem::replace(&mut self.bytes, rest);
        body.drain(..HEADER_BYTES);
        let fds: Vec<OwnedFd> = self.fds.drain(..count).collect();
        if self.bytes.is_empty() {
            self.bytes = Vec::new();
            if !self.fds.is_empty() {
                return Err(FrameError::Descriptors { announced: count, arrived: count + self.fds.len() });
            }
            self.fds = VecDeque::new();
        }
        Ok(Some((body, fds)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    fn fd() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn frames_come_back_whatever_the_cuts_of_the_stream() {
        let mut stream = Vec::new();
        for n in 0..5u32 {
            stream.extend(encode(&vec![n; n as usize * 7], 0).unwrap());
        }
        for step in 1..stream.len() {
            let mut decoder = Decoder::new();
            let mut seen = Vec::new();
            for chunk in stream.chunks(step) {
                decoder.push(chunk, []);
                while let Some((message, fds)) = decoder.next::<Vec<u32>>().unwrap() {
                    assert!(fds.is_empty());
                    seen.push(message.len());
                }
            }
            assert_eq!(seen, [0, 7, 14, 21, 28]);
            assert!(!decoder.is_mid_frame());
        }
    }

    #[test]
    fn descriptors_go_to_the_frame_that_announced_them() {
        let mut decoder = Decoder::new();
        let first = encode(&1, 0).unwrap();
        let second = encode(&2, 2).unwrap();
        let third = encode(&3, 1).unwrap();
        // The kernel may glue a frame without descriptors to the one behind it that has some.
        let mut glued = first;
        glued.extend(&second[..3]);
        decoder.push(&glued, [fd(), fd()]);
        assert_eq!(decoder.next::<u32>().unwrap().unwrap().0, 1);
        assert!(decoder.next::<u32>().unwrap().is_none());
        decoder.push(&second[3..], []);
        decoder.push(&third, [fd()]);
        let (n, fds) = decoder.next::<u32>().unwrap().unwrap();
        assert_eq!((n, fds.len()), (2, 2));
        let (n, fds) = decoder.next::<u32>().unwrap().unwrap();
        assert_eq!((n, fds.len()), (3, 1));
    }

    #[test]
    fn missing_and_surplus_descriptors_are_errors() {
        let mut decoder = Decoder::new();
        decoder.push(&encode(&1, 1).unwrap(), []);
        assert!(matches!(decoder.next::<u32>(), Err(FrameError::Descriptors { announced: 1, arrived: 0 })));
        let mut decoder = Decoder::new();
        decoder.push(&encode(&1, 0).unwrap(), [fd()]);
        assert!(matches!(decoder.next::<u32>(), Err(FrameError::Descriptors { announced: 0, arrived: 1 })));
    }

    #[test]
    fn an_oversized_header_is_refused_before_its_body() {
        let mut decoder = Decoder::new();
        decoder.push(&u32::MAX.to_le_bytes(), []);
        decoder.push(&0u32.to_le_bytes(), []);
        assert!(matches!(decoder.next::<u32>(), Err(FrameError::TooLarge { .. })));
    }

    #[test]
    fn a_body_that_cannot_be_read_leaves_the_stream_in_step() {
        let mut decoder = Decoder::new();
        decoder.push(&encode(&"text", 0).unwrap(), []);
        decoder.push(&encode(&7, 0).unwrap(), []);
        assert!(matches!(decoder.next::<u32>(), Err(FrameError::Body { .. })));
        assert_eq!(decoder.next::<u32>().unwrap().unwrap().0, 7);
    }
}
