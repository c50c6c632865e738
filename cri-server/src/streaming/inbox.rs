//! What a client has sent on one stream and nobody has read yet. Bounded for each stream and for the whole connection, because
//! these protocols, as their clients speak them, have no flow control. Knows no protocol.
//!
//! Everything that is fed from one [`Pool`] is fed by one task: it alone waits for room.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::Instant;

/// What may wait on one stream.
const STREAM: usize = 1 << 20;
/// What may wait on all streams of a connection together.
const CONNECTION: usize = 16 << 20;
/// What a chunk costs besides its bytes: else a million chunks of one byte would be a million bytes.
const OVERHEAD: usize = 128;

/// The room that the streams of a connection share.
#[derive(Default)]
pub(super) struct Pool {
    used: AtomicUsize,
    freed: Notify,
}

impl Pool {
    /// Waits until somebody has taken something. What was taken before the call counts too.
    pub(super) async fn freed(&self) {
        self.freed.notified().await;
    }

    fn give_back(&self, cost: usize) {
        self.used.fetch_sub(cost, Ordering::AcqRel);
        self.freed.notify_one();
    }
}

/// How a stream has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The client has sent all it wanted to.
    Finished,
    /// The client has given the stream up, or is gone.
    Aborted,
}

struct State {
    waiting: VecDeque<Bytes>,
    cost: usize,
    end: Option<End>,
    /// Somebody may still read.
    read: bool,
    /// When something was last taken, or put where nothing was.
    moved: Instant,
}

struct Shared {
    pool: Arc<Pool>,
    state: Mutex<State>,
    filled: Notify,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, end: End) {
        self.state().end.get_or_insert(end);
        self.filled.notify_one();
    }
}

/// The side that puts in. Dropping it aborts the stream where it has not ended.
pub(super) struct Feeder(Arc<Shared>);

/// The side that takes out. Dropping it lets the rest be thrown away.
pub(crate) struct Inbox(Arc<Shared>);

/// What became of a chunk.
#[derive(Debug, PartialEq)]
pub(super) enum Push {
    /// It waits for its reader, or nobody wants it.
    Done,
    /// There is no room.
    Full(Bytes),
}

/// A stream's two sides.
pub(super) fn inbox(pool: &Arc<Pool>) -> (Feeder, Inbox) {
    let state = State { waiting: VecDeque::new(), cost: 0, end: None, read: true, moved: Instant::now() };
    let shared = Arc::new(Shared { pool: pool.clone(), state: Mutex::new(state), filled: Notify::new() });
    (Feeder(shared.clone()), Inbox(shared))
}

impl Feeder {
    /// Puts a chunk in where there is room. One chunk always fits into an empty stream.
    pub(super) fn try_push(&self, chunk: Bytes) -> Push {
        let cost = chunk.len() + OVERHEAD;
        let pool = &self.0.pool;
        {
            let mut state = self.0.state();
            if !state.read || state.end.is_some() || chunk.is_empty() {
                return Push::Done;
            }
            let used = pool.used.load(Ordering::Acquire);
            if state.cost > 0 && state.cost + cost > STREAM || used > 0 && used + cost > CONNECTION {
                return Push::Full(chunk);
            }
            pool.used.fetch_add(cost, Ordering::AcqRel);
            if state.waiting.is_empty() {
                state.moved = Instant::now();
            }
            state.cost += cost;
            state.waiting.push_back(chunk);
        }
        self.0.filled.notify_one();
        Push::Done
    }

    /// Puts a chunk in, whenever there is room.
    pub(super) async fn push(&self, mut chunk: Bytes) {
        while let Push::Full(back) = self.try_push(chunk) {
            chunk = back;
            self.0.pool.freed().await;
        }
    }

    /// Nothing more comes.
    pub(super) fn end(&self, end: End) {
        self.0.end(end);
    }

    /// Since when nothing was taken though something waits.
    pub(super) fn stuck_since(&self) -> Option<Instant> {
        let state = self.0.state();
        (state.read && !state.waiting.is_empty()).then_some(state.moved)
    }

    /// Whether somebody may still read.
    pub(super) fn is_read(&self) -> bool {
        self.0.state().read
    }

    /// Gives the stream up with all that waits on it.
    pub(super) fn discard(&self) {
        self.0.end(End::Aborted);
        clear(&self.0);
    }
}

impl Drop for Feeder {
    fn drop(&mut self) {
        self.0.end(End::Aborted);
    }
}

fn clear(shared: &Shared) {
    let cost = {
        let mut state = shared.state();
        state.waiting = VecDeque::new();
        std::mem::take(&mut state.cost)
    };
    shared.pool.give_back(cost);
}

impl Inbox {
    /// The next chunk; none at the stream's end.
    pub(crate) async fn recv(&mut self) -> Option<Bytes> {
        loop {
            {
                let mut state = self.0.state();
                if let Some(chunk) = state.waiting.pop_front() {
                    let cost = chunk.len() + OVERHEAD;
                    state.cost -= cost;
                    state.moved = Instant::now();
                    drop(state);
                    self.0.pool.give_back(cost);
                    return Some(chunk);
                }
                if state.end.is_some() {
                    return None;
                }
            }
            self.0.filled.notified().await;
        }
    }

    /// Whether the client has given the stream up instead of finishing it.
    pub(crate) fn aborted(&self) -> bool {
        self.0.state().end == Some(End::Aborted)
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        self.0.state().read = false;
        clear(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(n: usize) -> Bytes {
        vec![7u8; n].into()
    }

    #[tokio::test]
    async fn a_full_stream_takes_more_when_its_reader_does() {
        let pool = Arc::new(Pool::default());
        let (feeder, mut inbox) = inbox(&pool);
        let mut taken = 0;
        while feeder.try_push(chunk(64 * 1024)) == Push::Done {
            taken += 1;
        }
        assert_eq!(taken, 15, "with its cost, the sixteenth does not fit into a mebibyte");
        assert!(feeder.stuck_since().is_some());
        assert_eq!(inbox.recv().await.unwrap().len(), 64 * 1024);
        tokio::time::timeout(std::time::Duration::from_secs(5), feeder.push(chunk(64 * 1024))).await.unwrap();
        feeder.end(End::Finished);
        let mut rest = 0;
        while inbox.recv().await.is_some() {
            rest += 1;
        }
        assert_eq!((rest, inbox.aborted()), (15, false));
        assert_eq!(pool.used.load(Ordering::Acquire), 0);
    }

    #[tokio::test]
    async fn tiny_chunks_are_charged_for_their_keeping() {
        let pool = Arc::new(Pool::default());
        let (feeder, _inbox) = inbox(&pool);
        let mut taken = 0;
        while feeder.try_push(chunk(1)) == Push::Done {
            taken += 1;
        }
        assert!(taken < 10_000, "{taken}");
    }

    #[tokio::test]
    async fn all_streams_together_have_a_bound_too() {
        let pool = Arc::new(Pool::default());
        let streams: Vec<_> = (0..64).map(|_| inbox(&pool)).collect();
        let full =
            streams.iter().filter(|(feeder, _)| (0..15).any(|_| matches!(feeder.try_push(chunk(64 * 1024)), Push::Full(_))));
        assert!(full.count() > 40);
        assert!(pool.used.load(Ordering::Acquire) <= CONNECTION);
        drop(streams);
        assert_eq!(pool.used.load(Ordering::Acquire), 0);
    }

    #[tokio::test]
    async fn nobody_reading_is_no_reason_to_wait() {
        let pool = Arc::new(Pool::default());
        let (feeder, reader) = inbox(&pool);
        drop(reader);
        for _ in 0..100 {
            assert_eq!(feeder.try_push(chunk(1 << 20)), Push::Done);
        }
        let (feeder, mut reader) = inbox(&pool);
        drop(feeder);
        assert!(reader.recv().await.is_none() && reader.aborted());
    }
}
