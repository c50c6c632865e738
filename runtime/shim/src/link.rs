//! A non-blocking stream socket that carries frames both ways: to agents, to the log writer, from creators. Never waits.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use berth_linux::fdpass::{MAX_FDS, recv_with_fds, send_with_fds};
use berth_shim::protocol::{Decoder, FrameError, encode};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Output that the other side has not taken; beyond it the other side is taken for dead.
const MAX_QUEUED: usize = 4 << 20;

/// What a [`Link::fill`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filled {
    /// Something.
    Some,
    /// Nothing now.
    Nothing,
    /// The end of the stream.
    End,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Link {
    socket: OwnedFd,
    decoder: Decoder,
    out: VecDeque<Outgoing>,
    queued: usize,
}

#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    fds: VecDeque<OwnedFd>,
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Link {
    /// Wraps a connected socket, which must be non-blocking.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, decoder: Decoder::new(), out: VecDeque::new(), queued: 0 }
    }

    /// Both ends of a new connection.
    pub fn pair() -> io::Result<(Self, Self)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (one, other) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        Ok((Self::new(one), Self::new(other)))
    }

    /// Like [`Link::fill`]; `false` when nothing more will come, whatever the reason.
    pub fn take_in(&mut self) -> bool {
        self.fill().is_ok_and(|filled| filled != Filled::End)
    }

    /// The socket, without what has been read or queued.
    pub fn into_socket(self) -> OwnedFd {
        self.socket
    }

    /// Takes in what has arrived, at most one piece.
    pub fn fill(&mut self) -> io::Result<Filled> {
        let mut buffer = [0u8; 4096];
        match recv_with_fds(self.socket.as_fd(), &mut buffer, MAX_FDS) {
            Ok((0, _)) => Ok(Filled::End),
            Ok((count, fds)) => {
                self.decoder.push(&buffer[..count], fds);
                Ok(Filled::Some)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Filled::Nothing),
            Err(error) => Err(error),
        }
    }

    /// The next complete message.
    #[allow(clippy::should_implement_trait, reason = "each call names the type that it expects")]
    pub fn next<T: DeserializeOwned>(&mut self) -> Result<Option<(T, Vec<OwnedFd>)>, FrameError> {
        self.decoder.next()
    }

    /// Queues a message and sends what can be sent at once. An error means that the connection is of no use any more.
    pub fn send<T: Serialize>(&mut self, message: &T, fds: Vec<OwnedFd>) -> io::Result<()> {
        let bytes = encode(message, fds.len()).map_err(io::Error::other)?;
        if self.queued + bytes.len() > MAX_QUEUED {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        self.queued += bytes.len();
        self.out.push_back(Outgoing { bytes, sent: 0, fds: fds.into() });
        self.flush()
    }

    /// Whether output waits for room.
    pub fn wants_write(&self) -> bool {
        !self.out.is_empty()
    }

    /// Sends what can be sent now.
    pub fn flush(&mut self) -> io::Result<()> {
        while let Some(first) = self.out.front_mut() {
            match first.send_some(self.socket.as_fd()) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
            if first.sent == first.bytes.len() {
                self.queued -= first.bytes.len();
                self.out.pop_front();
            }
        }
        self.out = VecDeque::new();
        Ok(())
    }
}

impl Outgoing {
    /// One `sendmsg`. With more descriptors than one takes, single bytes carry them, so that all have left before the rest.
    fn send_some(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        let count = self.fds.len().min(MAX_FDS);
        let rest = &self.bytes[self.sent..];
        let piece = if self.fds.len() > count { &rest[..1] } else { rest };
        let fds: Vec<BorrowedFd<'_>> = self.fds.iter().take(count).map(AsFd::as_fd).collect();
        let sent = send_with_fds(socket, piece, &fds)?;
        self.sent += sent;
        self.fds.drain(..count);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_cross_with_more_descriptors_than_one_sendmsg_takes() {
        let (mut one, mut other) = Link::pair().unwrap();
        let fds: Vec<OwnedFd> = (0..600).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect();
        one.send(&vec![7u32; 3], fds).unwrap();
        one.send(&vec![8u32], Vec::new()).unwrap();
        let mut seen = Vec::new();
        while seen.len() < 2 {
            assert_ne!(other.fill().unwrap(), Filled::End);
            while let Some((numbers, fds)) = other.next::<Vec<u32>>().unwrap() {
                seen.push((numbers.len(), fds.len()));
            }
            one.flush().unwrap();
        }
        assert_eq!(seen, [(3, 600), (1, 0)]);
        drop(one);
        assert_eq!(other.fill().unwrap(), Filled::End);
    }

    #[test]
    fn a_side_that_never_reads_is_given_up() {
        let (mut one, _other) = Link::pair().unwrap();
        let text = "x".repeat(100_000);
        let sent = (0..100).take_while(|_| one.send(&text, Vec::new()).is_ok()).count();
        assert!(sent > 30 && sent < 100, "{sent} messages were taken");
    }
}
