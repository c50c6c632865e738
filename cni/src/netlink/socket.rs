//! A netlink conversation: a batch of requests in one datagram, its acknowledgements, and dumps.
//!
//! The kernel works a request off inside `send` and its replies are queued before that returns, so receiving never waits.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use berth_linux::netlink::NetlinkSocket;
use rustix::net::RecvFlags;

use super::attributes::{as_string, find};
use super::flags;
use crate::error::KernelError;

const HEADER: usize = 16;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const CAPPED: u16 = 0x100;
const HAS_TEXT: u16 = 0x200;
const TEXT: u16 = 1;
/// A dump that changed under way.
const INTERRUPTED: u16 = 0x10;
const RECEIVE: usize = 64 * 1024;
const DUMP_TRIES: usize = 10;

/// One message to the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub kind: u16,
    pub flags: u16,
    pub body: Vec<u8>,
}

/// One message from the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    pub kind: u16,
    pub flags: u16,
    pub sequence: u32,
    pub port: u32,
    pub body: Vec<u8>,
}

/// The first request of a batch that was refused; no index: the batch as a whole was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub index: Option<usize>,
    pub error: KernelError,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self { index: None, error: error.into() }
    }
}

/// A netlink socket of one protocol in one network namespace.
#[derive(Debug)]
pub(crate) struct Socket {
    socket: NetlinkSocket,
    sequence: u32,
}

impl Socket {
    /// Opens a socket in the calling thread's network namespace.
    pub(crate) fn open(protocol: i32) -> io::Result<Self> {
        let socket = NetlinkSocket::open(protocol)?;
        // A batch of nf_tables rules or of many acknowledgements outgrows the default; a refusal only lowers the limit.
        let _ = socket.set_buffers(1 << 20, 1 << 20);
        socket.set_receive_timeout(Some(Duration::from_secs(10)))?;
        Ok(Self { socket, sequence: 1 })
    }

    pub(crate) fn inner(&self) -> &NetlinkSocket {
        &self.socket
    }

    fn send(&mut self, requests: &[Request]) -> io::Result<u32> {
        let first = self.sequence;
        let mut bytes = Vec::with_capacity(requests.iter().map(|r| HEADER + r.body.len() + 4).sum());
        for request in requests {
            encode(&mut bytes, request, self.sequence);
            self.sequence = self.sequence.wrapping_add(1).max(1);
        }
        self.socket.send(&bytes)?;
        Ok(first)
    }

    /// Everything that is queued now.
    fn receive(&self) -> io::Result<Vec<Message>> {
        let mut messages = Vec::new();
        let mut buffer = vec![0u8; RECEIVE];
        loop {
            match rustix::net::recv(self.socket.as_fd(), &mut buffer[..], RecvFlags::DONTWAIT | RecvFlags::TRUNC) {
                Ok((_, length)) if length > buffer.len() => {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "a netlink datagram was cut"));
                }
                Ok((_, length)) => decode(&buffer[..length], &mut messages),
                Err(rustix::io::Errno::AGAIN) => return Ok(messages),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends the requests in one datagram and checks that each one with the ACK flag was accepted. Replies other than
    /// acknowledgements are returned.
    pub(crate) fn run(&mut self, requests: &[Request]) -> Result<Vec<Message>, Failure> {
        let first = self.send(requests)?;
        let mut replies = Vec::new();
        let mut accepted = 0;
        let mut failure: Option<Failure> = None;
        for message in self.receive()? {
            let index = message.sequence.wrapping_sub(first) as usize;
            if index >= requests.len() {
                continue;
            }
            if message.kind != ERROR {
                replies.push(message);
                continue;
            }
            match error_of(&message) {
                None => accepted += 1,
                Some(error) => {
                    let index = (requests[index].flags & flags::ACK != 0).then_some(index);
                    failure.get_or_insert(Failure { index, error });
                }
            }
        }
        if let Some(failure) = failure {
            return Err(failure);
        }
        if accepted < requests.iter().filter(|r| r.flags & flags::ACK != 0).count() {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the kernel did not acknowledge every request").into());
        }
        Ok(replies)
    }

    /// One request that is acknowledged.
    pub(crate) fn one(&mut self, request: Request) -> Result<(), KernelError> {
        self.run(&[request]).map(drop).map_err(|f| f.error)
    }

    /// One request that is answered by one message and an acknowledgement.
    pub(crate) fn get(&mut self, request: Request) -> Result<Option<Message>, KernelError> {
        self.run(&[request]).map(|replies| replies.into_iter().next()).map_err(|f| f.error)
    }

    /// All messages of a dump, tried again when the kernel says that it changed under way.
    pub(crate) fn dump(&mut self, mut request: Request) -> Result<Vec<Message>, KernelError> {
        request.flags |= flags::REQUEST | flags::DUMP;
        for _ in 0..DUMP_TRIES {
            if let Some(messages) = self.dump_once(&request)? {
                return Ok(messages);
            }
        }
        Err(KernelError { errno: None, text: "a dump was interrupted by changes again and again".to_owned() })
    }

    fn dump_once(&mut self, request: &Request) -> Result<Option<Vec<Message>>, KernelError> {
        let sequence = self.send(std::slice::from_ref(request))?;
        let mut out = Vec::new();
        let mut consistent = true;
        let mut buffer = Vec::new();
        loop {
            self.socket.recv(&mut buffer)?;
            let mut messages = Vec::new();
            decode(&buffer, &mut messages);
            for message in messages.into_iter().filter(|m| m.sequence == sequence) {
                consistent &= message.flags & INTERRUPTED == 0;
                match message.kind {
                    DONE => {
                        let code = message.body.get(..4).and_then(|b| b.try_into().ok()).map_or(0, i32::from_ne_bytes);
                        return match code {
                            0.. => Ok(consistent.then_some(out)),
                            _ => Err(io::Error::from_raw_os_error(-code).into()),
                        };
                    }
                    ERROR => match error_of(&message) {
                        Some(error) => return Err(error),
                        None => return Ok(Some(out)),
                    },
                    _ => out.push(message),
                }
            }
        }
    }
}

fn encode(bytes: &mut Vec<u8>, request: &Request, sequence: u32) {
    let length = u32::try_from(HEADER + request.body.len()).unwrap_or(u32::MAX);
    bytes.extend_from_slice(&length.to_ne_bytes());
    bytes.extend_from_slice(&request.kind.to_ne_bytes());
    bytes.extend_from_slice(&(request.flags | flags::REQUEST).to_ne_bytes());
    bytes.extend_from_slice(&sequence.to_ne_bytes());
    bytes.extend_from_slice(&0u32.to_ne_bytes());
    bytes.extend_from_slice(&request.body);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Appends the messages of one datagram; what does not fit is left out.
pub(crate) fn decode(mut bytes: &[u8], messages: &mut Vec<Message>) {
    while let Some((header, _)) = bytes.split_at_checked(HEADER) {
        let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let length = word(0) as usize;
        let Some(body) = bytes.get(HEADER..length) else { return };
        messages.push(Message {
            kind: u16::from_ne_bytes([header[4], header[5]]),
            flags: u16::from_ne_bytes([header[6], header[7]]),
            sequence: word(8),
            port: word(12),
            body: body.to_vec(),
        });
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
}

/// None for an acknowledgement.
fn error_of(message: &Message) -> Option<KernelError> {
    let code = i32::from_ne_bytes(message.body.get(..4)?.try_into().ok()?);
    if code == 0 {
        return None;
    }
    let mut text = String::new();
    if message.flags & HAS_TEXT != 0 {
        let original = if message.flags & CAPPED != 0 {
            HEADER
        } else {
            message.body.get(4..8).and_then(|b| b.try_into().ok()).map_or(HEADER, |b| u32::from_ne_bytes(b) as usize)
        };
        let rest = message.body.get(4 + original.next_multiple_of(4)..).unwrap_or_default();
        text = find(rest, TEXT).map(as_string).unwrap_or_default();
    }
    Some(KernelError { errno: Some(-code), text })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datagram_of_several_messages_is_split() {
        let mut bytes = Vec::new();
        for (sequence, body) in [(1, vec![1u8]), (2, vec![1, 2, 3, 4, 5])] {
            encode(&mut bytes, &Request { kind: 16, flags: flags::ACK, body }, sequence);
        }
        let mut messages = Vec::new();
        decode(&bytes, &mut messages);
        assert_eq!(messages.iter().map(|m| (m.sequence, m.body.len())).collect::<Vec<_>>(), [(1, 1), (2, 5)]);
        messages.clear();
        decode(&bytes[..bytes.len() - 8], &mut messages);
        assert_eq!(messages.len(), 1, "a cut message is left out");
    }

    #[test]
    fn the_kernel_s_text_is_part_of_an_error() {
        let mut body = (-17i32).to_ne_bytes().to_vec();
        body.extend_from_slice(&[0; HEADER]);
        body.extend_from_slice(super::super::Attributes::new().string(TEXT, "why").as_bytes());
        let message = Message { kind: ERROR, flags: CAPPED | HAS_TEXT, sequence: 1, port: 0, body };
        let error = error_of(&message).unwrap();
        assert_eq!(error.errno, Some(17));
        assert_eq!(error.to_string(), "File exists (os error 17): why");
    }
}
