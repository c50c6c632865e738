//! A client's TCP connection, watched: it fails when nothing has travelled for too long, and tells whether the client has hung
//! up while nobody reads from it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// A connection that fails with `TimedOut` when nothing was read or written for `idle`.
pub(super) struct Wire<T> {
    io: T,
    idle: Duration,
    moved: Instant,
    // One for each direction: a timer wakes only the task that looked at it last.
    reading: Pin<Box<Sleep>>,
    writing: Pin<Box<Sleep>>,
}

impl<T> Wire<T> {
    pub(super) fn new(io: T, idle: Duration) -> Self {
        let timer = || Box::pin(tokio::time::sleep(idle));
        Self { io, idle, moved: Instant::now(), reading: timer(), writing: timer() }
    }
}

/// Whether the time is up; if not, the task is woken when it may be.
fn late(timer: &mut Pin<Box<Sleep>>, moved: Instant, idle: Duration, context: &mut Context<'_>) -> bool {
    while timer.as_mut().poll(context).is_ready() {
        if moved + idle <= Instant::now() {
            return true;
        }
        timer.as_mut().reset(moved + idle);
    }
    false
}

fn timed_out() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "nothing was sent for too long")
}

impl<T: AsyncRead + Unpin> AsyncRead for Wire<T> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        match Pin::new(&mut this.io).poll_read(context, buffer) {
            Poll::Pending if late(&mut this.reading, this.moved, this.idle, context) => Poll::Ready(Err(timed_out())),
            Poll::Pending => Poll::Pending,
            done => {
                this.moved = Instant::now();
                done
            }
        }
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Wire<T> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        match Pin::new(&mut this.io).poll_write(context, bytes) {
            Poll::Pending if late(&mut this.writing, this.moved, this.idle, context) => Poll::Ready(Err(timed_out())),
            Poll::Pending => Poll::Pending,
            done => {
                this.moved = Instant::now();
                done
            }
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        ready!(Pin::new(&mut this.io).poll_flush(context))?;
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

/// Tells whether a client has hung up, without reading what it has sent: whoever has no room for that must notice all the same.
pub(super) struct Peer(Option<OwnedFd>);

impl Peer {
    /// The peer at the other end of a socket.
    pub(super) fn of(socket: &impl AsFd) -> io::Result<Self> {
        Ok(Self(Some(socket.as_fd().try_clone_to_owned()?)))
    }

    /// One that nothing is known of.
    pub(super) fn unknown() -> Self {
        Self(None)
    }

    /// Whether it has closed its side.
    pub(super) fn hung_up(&self) -> bool {
        let Some(socket) = &self.0 else { return false };
        let mut fds = [PollFd::new(socket, PollFlags::RDHUP)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut fds, Some(&now)).is_ok_and(|n| n > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test(start_paused = true)]
    async fn a_silent_connection_ends_and_a_talking_one_does_not() {
        let (mut client, server) = tokio::io::duplex(64);
        let mut wire = Wire::new(server, Duration::from_secs(60));
        for _ in 0..10 {
            tokio::time::sleep(Duration::from_secs(50)).await;
            client.write_all(b"x").await.unwrap();
            assert_eq!(wire.read_u8().await.unwrap(), b'x');
        }
        let begun = Instant::now();
        assert_eq!(wire.read_u8().await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert_eq!(begun.elapsed().as_secs(), 60);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_never_reads_is_idle_too() {
        let (_client, server) = tokio::io::duplex(64);
        let mut wire = Wire::new(server, Duration::from_secs(60));
        assert_eq!(wire.write_all(&[0; 1000]).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
