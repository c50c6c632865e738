//! The reading task of a connection: frames in, streams and their data out. It waits only where a stream's buffer is full.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, BufReader};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::frame::{self, Frame};
use super::headers::Inflater;
use super::session::{Limits, Out, Stream, StreamWriter, Why, gone};
use crate::streaming::inbox::{End, Feeder, Pool, Push, inbox};
use crate::streaming::wire::Peer;

/// Data frames of any length are taken apart into pieces of this size.
const PIECE: usize = 16 * 1024;
/// How often a reader without room looks whether its client is still there.
const LOOK: Duration = Duration::from_secs(5);

/// The streams as they come.
pub(super) type Accepted = mpsc::Receiver<Stream>;

/// A stream that is open in at least one direction.
struct Open {
    /// None when the peer has finished its direction.
    feeder: Option<Feeder>,
    reset: CancellationToken,
    finished: CancellationToken,
}

impl Open {
    /// Nothing more is sent on it, and what comes is nobody's: also when a client never ends its side.
    fn over(&self) -> bool {
        let heard = self.feeder.as_ref().is_some_and(Feeder::is_read);
        self.reset.is_cancelled() || !heard && self.finished.is_cancelled()
    }
}

pub(super) struct Reader {
    out: mpsc::Sender<Out>,
    answers: mpsc::Sender<Out>,
    accepted: mpsc::Sender<Stream>,
    peer: Peer,
    limits: Limits,
    pool: Arc<Pool>,
    streams: HashMap<u32, Open>,
    /// The peer's last stream.
    last: u32,
    /// So many streams are known before those that are over are forgotten.
    sweep_at: usize,
}

fn bad(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

impl Reader {
    pub(super) fn new(
        out: mpsc::Sender<Out>,
        answers: mpsc::Sender<Out>,
        accepted: mpsc::Sender<Stream>,
        peer: Peer,
        limits: Limits,
    ) -> Self {
        let (pool, streams) = (Arc::default(), HashMap::new());
        Self { out, answers, accepted, peer, limits, pool, streams, last: 0, sweep_at: 256 }
    }

    /// Reads until the peer has closed, or has broken the protocol.
    pub(super) async fn run(mut self, read: impl AsyncRead + Unpin) -> io::Result<()> {
        let mut read = BufReader::with_capacity(8 * 1024, read);
        let mut inflate = Inflater::new();
        while let Some(frame) = frame::read(&mut read).await? {
            match frame {
                Frame::Open { stream, fin, headers } => {
                    // The context is the connection's: what is refused must be inflated all the same.
                    let headers = inflate.read(&headers)?;
                    self.open(stream, fin, headers)?;
                }
                Frame::Data { stream, fin, length } => {
                    let mut left = length;
                    while left > 0 {
                        let mut piece = vec![0u8; left.min(PIECE)];
                        read.read_exact(&mut piece).await?;
                        left -= piece.len();
                        self.deliver(stream, piece.into()).await?;
                    }
                    if fin && let Some(feeder) = self.streams.get_mut(&stream).and_then(|open| open.feeder.take()) {
                        feeder.end(End::Finished);
                    }
                }
                Frame::Reset { stream } => {
                    // Dropped with its feeder, which tells whoever reads.
                    if let Some(open) = self.streams.remove(&stream) {
                        open.reset.cancel();
                    }
                }
                // Odd ids are the peer's pings, even ones would be answers to ours.
                Frame::Ping { id } if id % 2 == 1 => self.answer(Out::Ping(id))?,
                Frame::Ping { .. } | Frame::Reply { .. } | Frame::GoAway | Frame::Other => {}
            }
        }
        Ok(())
    }

    fn answer(&self, answer: Out) -> io::Result<()> {
        self.answers.try_send(answer).map_err(|e| match e {
            mpsc::error::TrySendError::Full(_) => bad("spdy peer asks but does not read the answers"),
            mpsc::error::TrySendError::Closed(_) => gone(()),
        })
    }

    fn open(&mut self, stream: u32, fin: bool, headers: super::headers::Headers) -> io::Result<()> {
        if stream.is_multiple_of(2) || stream <= self.last {
            return Err(bad(format!("spdy stream {stream} after {}", self.last)));
        }
        self.last = stream;
        if self.streams.len() >= self.sweep_at {
            self.streams.retain(|_, open| !open.over());
            self.sweep_at = self.streams.len() * 2 + 256;
        }
        if self.streams.len() >= self.limits.streams {
            self.streams.retain(|_, open| !open.over());
        }
        if self.streams.len() >= self.limits.streams {
            return self.answer(Out::Reset(stream, Why::Refused));
        }
        let (feeder, data) = inbox(&self.pool);
        if fin {
            feeder.end(End::Finished);
        }
        let (reset, finished) = (CancellationToken::new(), CancellationToken::new());
        let writer = StreamWriter { stream, out: self.out.clone(), reset: reset.clone(), finished: finished.clone() };
        match self.accepted.try_reserve() {
            Ok(place) => {
                // The reply goes before any data on the stream.
                self.answer(Out::Reply(stream))?;
                self.streams.insert(stream, Open { feeder: (!fin).then_some(feeder), reset, finished });
                place.send(Stream { id: stream, headers, data, writer });
                Ok(())
            }
            Err(_) => self.answer(Out::Reset(stream, Why::Refused)),
        }
    }

    /// Gives a piece to its stream. Where that has no room, the others wait too, but not for ever: see [`Limits::patience`].
    async fn deliver(&mut self, stream: u32, mut piece: Bytes) -> io::Result<()> {
        loop {
            // Data on a stream that was reset meanwhile is on its way still: nobody's.
            let Some(open) = self.streams.get(&stream).filter(|open| !open.reset.is_cancelled()) else { return Ok(()) };
            let Some(feeder) = &open.feeder else { return Ok(()) };
            match feeder.try_push(piece) {
                Push::Done => return Ok(()),
                Push::Full(back) => piece = back,
            }
            let patience = self.limits.patience.and_then(|p| self.stuck_since().map(|since| since + p));
            let look = Instant::now() + LOOK;
            let pool = self.pool.clone();
            tokio::select! {
                () = pool.freed() => {}
                () = tokio::time::sleep_until(patience.map_or(look, |p| p.min(look))) => {
                    self.cut_the_stuck()?;
                    if self.peer.hung_up() {
                        return Err(gone(()));
                    }
                }
            }
        }
    }

    fn stuck_since(&self) -> Option<Instant> {
        self.streams.values().filter_map(|open| open.feeder.as_ref()?.stuck_since()).min()
    }

    /// Resets the streams whose readers have taken nothing for too long.
    fn cut_the_stuck(&mut self) -> io::Result<()> {
        let Some(patience) = self.limits.patience else { return Ok(()) };
        let now = Instant::now();
        for (stream, open) in &self.streams {
            let stuck = open.feeder.as_ref().filter(|f| f.stuck_since().is_some_and(|since| since + patience <= now));
            if let Some(feeder) = stuck {
                feeder.discard();
                open.reset.cancel();
                self.answer(Out::Reset(*stream, Why::FlowControl))?;
            }
        }
        self.streams.retain(|_, open| !open.over());
        Ok(())
    }
}
