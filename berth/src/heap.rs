//! The agent's memory stays near what is in use: few arenas, and what a burst of pods needed, heap and code, goes back to the kernel
//! when it is over. Decides when; how is runtime/linux's.

use std::time::Duration;

/// glibc makes eight arenas a core, each with free memory of its own. The agent's threads wait far more than they allocate. With one
/// arena statistics of 110 pods took half as long again, and the idle server was no smaller.
const ARENAS: i32 = 2;
/// How often the heap is looked at: one read of a file in /proc.
const EVERY: Duration = Duration::from_secs(15);
/// Growth since the last time that is worth the walk through all free chunks, a few milliseconds: in pages of 4 KiB.
const GROWTH: u64 = 256;

/// Before the first thread starts.
pub fn prepare() {
    berth_linux::heap::limit_arenas(ARENAS);
}

/// Gives free memory back whenever there was growth, for as long as it is polled.
pub async fn give_back() {
    let mut settled = 0;
    loop {
        tokio::time::sleep(EVERY).await;
        if anonymous_pages() <= settled + GROWTH {
            continue;
        }
        // It takes each arena's lock in turn: not on a thread that serves.
        let given = tokio::task::spawn_blocking(|| {
            berth_linux::heap::trim();
            berth_linux::code::forget()
        });
        let _ = given.await;
        settled = anonymous_pages();
    }
}

/// Resident pages that are no file's; 0 where /proc does not say.
fn anonymous_pages() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let mut fields = text.split(' ').skip(1).map_while(|field| field.parse::<u64>().ok());
    let (resident, shared) = (fields.next().unwrap_or(0), fields.next().unwrap_or(0));
    resident.saturating_sub(shared)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_allocated_and_freed_is_given_back() {
        prepare();
        let before = anonymous_pages();
        assert!(before > 0);
        // Small pieces, of which the last keeps the heap's end where it is.
        let mut pieces: Vec<Vec<u8>> = (0..64_000).map(|n| vec![n as u8; 500]).collect();
        let grown = anonymous_pages();
        assert!(grown > before + 4000, "{before} {grown}");
        let last = pieces.pop();
        drop(pieces);
        berth_linux::heap::trim();
        let after = anonymous_pages();
        assert!(after < before + 2000, "{before} {grown} {after}");
        drop(last);
    }
}
