//! Who is at the other end of a connection: what it has shown of itself, whether it was let in, and how long it is waited
//! for. Decides nothing about what it may do.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Sleep, sleep, timeout};

use super::tls::Shown;
use crate::auth::Peer;

/// A connection without a request is closed after this long, as upstream.
pub(super) const IDLE: Duration = Duration::from_secs(90);
/// How long a stranger may leave an answer unread: answers to strangers are short, and pages are given up sooner.
const UNREAD: Duration = Duration::from_secs(60);
/// Connections of one address: half of a listener's, so that one client cannot lock out the others.
const OF_ONE_ADDRESS: usize = 256;

/// The client of a connection.
#[derive(Debug, Default)]
pub(super) struct Caller {
    shown: Shown,
    /// A guard has let a request in, or everybody is welcome who can connect.
    known: Arc<AtomicBool>,
    refused: AtomicBool,
    asked: Notify,
}

impl Caller {
    /// One whom nobody knows yet.
    pub(super) fn stranger(shown: Shown) -> Caller {
        Caller { shown, ..Caller::default() }
    }

    /// One who is welcome.
    pub(super) fn welcome() -> Caller {
        let caller = Caller::default();
        caller.let_in();
        caller
    }

    /// What it has shown, as it is to be judged now.
    pub(super) fn peer(&self) -> Peer {
        self.shown.peer()
    }

    /// A request has been let in: what is said to it may take as long as it likes.
    pub(super) fn let_in(&self) {
        self.known.store(true, Ordering::Relaxed);
    }

    /// Nobody knows who that is: the connection is of no use to it.
    pub(super) fn turn_away(&self) {
        self.refused.store(true, Ordering::Relaxed);
    }

    /// Whether it was turned away.
    pub(super) fn is_refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed)
    }

    /// Whether it was ever let in.
    pub(super) fn is_known(&self) -> bool {
        self.known.load(Ordering::Relaxed)
    }

    /// A request was answered.
    pub(super) fn has_asked(&self) {
        self.asked.notify_one();
    }

    /// Returns when it has been turned away, or has asked nothing for long.
    pub(super) async fn is_done(&self) {
        while timeout(IDLE, self.asked.notified()).await.is_ok() {
            if self.is_refused() {
                return;
            }
        }
    }

    /// The stream, given up when a stranger leaves unread what it is told.
    pub(super) fn patience<S>(&self, stream: S) -> Patient<S> {
        Patient { stream, known: self.known.clone(), stalled: None }
    }
}

/// A stream whose client has to read, unless it is known.
pub(super) struct Patient<S> {
    stream: S,
    known: Arc<AtomicBool>,
    /// Since a write waits.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<S: Unpin> Patient<S> {
    fn check<T>(&mut self, cx: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if polled.is_ready() || self.known.load(Ordering::Relaxed) {
            self.stalled = None;
            return polled;
        }
        let limit = self.stalled.get_or_insert_with(|| Box::pin(sleep(UNREAD)));
        ready!(limit.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Patient<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Patient<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.check(cx, polled)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, pieces);
        self.check(cx, polled)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_flush(cx);
        self.check(cx, polled)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let polled = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.check(cx, polled)
    }
}

/// How many connections each address has. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Addresses(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// A connection that is counted until it ends.
#[derive(Debug)]
pub(super) struct Seat {
    addresses: Addresses,
    address: IpAddr,
}

impl Addresses {
    /// A seat for one more connection of an address; none when it has its share.
    pub(super) fn seat(&self, address: IpAddr) -> Option<Seat> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = all.entry(address).or_default();
        if *count >= OF_ONE_ADDRESS {
            return None;
        }
        *count += 1;
        Some(Seat { addresses: self.clone(), address })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut all = self.addresses.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = all.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[test]
    fn an_address_has_its_share_and_no_more() {
        let addresses = Addresses::default();
        let (one, other) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 2]));
        let mut seats: Vec<Seat> = (0..OF_ONE_ADDRESS).map(|_| addresses.seat(one).unwrap()).collect();
        assert!(addresses.seat(one).is_none());
        assert!(addresses.seat(other).is_some());
        seats.pop();
        assert!(addresses.seat(one).is_some());
        drop(seats);
        assert!(addresses.0.lock().unwrap().is_empty(), "who has gone is forgotten");
    }

    #[tokio::test(start_paused = true)]
    async fn only_who_is_known_may_leave_an_answer_unread() {
        let (near, _far) = tokio::io::duplex(16);
        let stranger = Caller::stranger(Shown::default());
        let error = stranger.patience(near).write_all(&[0; 64]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        let (near, _far) = tokio::io::duplex(16);
        let mut known = Caller::welcome().patience(near);
        assert!(timeout(UNREAD * 100, known.write_all(&[0; 64])).await.is_err(), "waits on");
    }
}
