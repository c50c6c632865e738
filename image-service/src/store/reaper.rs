//! Deletes what nobody uses, on a thread of its own: staged data that was given up at once, layers, blobs and
//! records of removed images once the reaper is armed.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::core::Core;
use super::disk;

/// What wakes the reaper. Kept apart from it so that content can signal without owning the store.
pub(crate) struct Signal {
    work: Mutex<Work>,
    wake: Condvar,
    settled: watch::Sender<bool>,
}

#[derive(Default)]
struct Work {
    discarded: Vec<PathBuf>,
    idle: bool,
    armed: bool,
    stop: bool,
    /// Pulls and imports under way, and what is left of those that were given up.
    busy: usize,
}

impl Work {
    fn is_due(&self) -> bool {
        !self.discarded.is_empty() || (self.idle && self.armed)
    }
}

/// Work of which something may be left over: the store is not settled before it has ended.
pub(crate) struct Busy(Arc<Signal>);

impl Busy {
    pub(crate) fn new(signal: &Arc<Signal>) -> Self {
        signal.change(|work| work.busy += 1);
        Busy(signal.clone())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.change(|work| work.busy -= 1);
    }
}

impl Signal {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Signal { work: Mutex::default(), wake: Condvar::new(), settled: watch::Sender::new(true) })
    }

    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Work)) {
        let mut work = self.lock();
        change(&mut work);
        if work.is_due() || work.busy > 0 {
            self.settled.send_replace(false);
        }
        self.wake.notify_all();
    }

    /// Some content has no user any more.
    pub(crate) fn idle(&self) {
        self.change(|work| work.idle = true);
    }

    /// A staged file or folder was given up.
    pub(crate) fn discard(&self, path: PathBuf) {
        self.change(|work| work.discarded.push(path));
    }

    /// Idle content may be deleted from now on.
    pub(crate) fn arm(&self) {
        self.change(|work| {
            work.armed = true;
            work.idle = true;
        });
    }

    /// Ends the reaper's thread after what it is doing.
    pub(crate) fn stop(&self) {
        self.change(|work| work.stop = true);
    }

    /// Whether there is nothing to do; changes are seen by the receiver.
    pub(crate) fn settled(&self) -> watch::Receiver<bool> {
        self.settled.subscribe()
    }
}

/// The reaper's thread.
pub(crate) fn run(core: &Core) {
    let signal = &core.signal;
    loop {
        let (discarded, idle) = {
            let mut work = signal.lock();
            loop {
                if work.stop {
                    return;
                }
                if work.is_due() {
                    break;
                }
                signal.settled.send_replace(work.busy == 0);
                work = signal.wake.wait(work).unwrap_or_else(PoisonError::into_inner);
            }
            let idle = work.idle && work.armed;
            if idle {
                work.idle = false;
            }
            (std::mem::take(&mut work.discarded), idle)
        };
        let mut doomed = discarded;
        if idle {
            doomed.extend(core.collect_idle());
        }
        for path in doomed {
            delete(&path);
        }
    }
}

fn delete(path: &Path) {
    if let Err(error) = berth_linux::tree::remove_all(path) {
        // It stays in the staging folder, where the next start finds it.
        tracing::warn!(path = %path.display(), %error, "cannot delete discarded image data");
    }
}

/// Makes removals of records durable before what they named is deleted.
pub(crate) fn sync_records(core: &Core) -> bool {
    match disk::sync_dir(&core.layout.records()) {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(%error, "cannot sync the image records: nothing is deleted");
            false
        }
    }
}
