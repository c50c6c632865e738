//! The orderly end of a connection, whatever protocol it speaks: what was sent arrives first, and a peer that takes nothing is not
//! waited for.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A connection that is being closed ends when nothing more could be sent for that long.
const STUCK: Duration = Duration::from_secs(30);
/// How long the peer may take to close its side after us. Closing before it does could destroy what is still on its way to it.
const ANSWER: Duration = Duration::from_secs(5);

/// Sends what is left and the goodbye, as long as the peer takes any of it (`written` counts), then waits for the `answer`. False
/// when the peer took nothing more.
pub(super) async fn goodbye(written: &AtomicU64, send: impl Future<Output = ()>, answer: impl Future<Output = ()>) -> bool {
    tokio::pin!(send);
    let mut seen = written.load(Ordering::Acquire);
    while tokio::time::timeout(STUCK, &mut send).await.is_err() {
        let now = written.load(Ordering::Acquire);
        if now == seen {
            return false;
        }
        seen = now;
    }
    let _ = tokio::time::timeout(ANSWER, answer).await;
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_something_now_and_then_is_waited_for_and_one_that_takes_nothing_is_not() {
        let written = AtomicU64::new(0);
        let slow = async {
            for _ in 0..10 {
                tokio::time::sleep(STUCK - Duration::from_secs(1)).await;
                written.fetch_add(1, Ordering::AcqRel);
            }
        };
        assert!(goodbye(&written, slow, std::future::pending()).await);
        assert_eq!(written.load(Ordering::Acquire), 10, "all of it was sent");
        assert!(!goodbye(&written, std::future::pending(), std::future::ready(())).await);
    }
}
