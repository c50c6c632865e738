//! Deletes links late and in batches: one deletion costs the kernel as much as forty at once, and nobody should wait for it.
//!
//! A deletion is on record before its link is touched, so that it outlives a killed agent. An address goes back to its pool only
//! when its link is gone. The batch is deleted by group; the group's number is random and was just seen to be unused, because the
//! kernel would delete other people's links in it as well.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use berth_linux::netlink::ROUTE;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::netlink::{Socket, link};
use crate::plugins::host_local::{self, Owner};
use crate::{Error, Result, records};

const INTERVAL: Duration = Duration::from_millis(100);
const BATCH: usize = 32;
const SLOWEST_RETRY: Duration = Duration::from_secs(5);

/// A link to delete, and the leases that end with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Pending {
    pub owner: Owner,
    pub link: String,
    /// The folder of the leases; none where another plugin manages addresses.
    pub leases: Option<PathBuf>,
}

impl Pending {
    fn path(&self, folder: &Path) -> PathBuf {
        folder.join(format!("{}-{}.json", self.owner.container_id, self.owner.ifname))
    }
}

/// The thread's end that others hold. The thread ends when the last of these is gone and its queue is empty.
#[derive(Debug, Clone)]
pub(crate) struct Reaper {
    folder: Arc<PathBuf>,
    queue: mpsc::Sender<Pending>,
    count: watch::Sender<usize>,
}

impl Reaper {
    /// Starts the thread in the calling thread's network namespace; it begins with the deletions on record.
    pub(crate) fn spawn(folder: PathBuf, boot_id: String) -> Result<Self> {
        let socket = Socket::open(ROUTE).map_err(|e| Error::netlink("open", "netlink socket")(e.into()))?;
        let (queue, receiver) = mpsc::channel();
        let recorded: Vec<Pending> = records::list(&folder)?;
        let count = watch::Sender::new(recorded.len());
        let thread = Thread { folder: folder.clone(), boot_id, socket, count: count.clone() };
        std::thread::Builder::new()
            .name("berth-net-reap".to_owned())
            .spawn(move || thread.run(&receiver, recorded))
            .map_err(|source| Error::netlink("start", "the link reaper")(source.into()))?;
        Ok(Self { folder: Arc::new(folder), queue, count })
    }

    /// Puts a deletion on record. To be called before the link is touched.
    pub(crate) fn record(&self, pending: &Pending) -> Result<()> {
        records::write(&pending.path(&self.folder), pending)
    }

    /// Hands over a deletion that is on record.
    pub(crate) fn push(&self, pending: Pending) -> Result<()> {
        self.count.send_modify(|count| *count += 1);
        self.queue.send(pending).map_err(|_| Error::WorkerEnded)
    }

    /// Whether a deletion of this owner's link is on record.
    pub(crate) fn is_pending(&self, owner: &Owner) -> bool {
        let pending = Pending { owner: owner.clone(), link: String::new(), leases: None };
        pending.path(&self.folder).exists()
    }

    /// Deletions on record.
    pub(crate) fn pending(&self) -> Result<Vec<Pending>> {
        records::list(&self.folder)
    }

    /// Waits until the queue is empty; false at the timeout.
    pub(crate) async fn settle(&self, timeout: Duration) -> bool {
        let mut count = self.count.subscribe();
        tokio::time::timeout(timeout, count.wait_for(|count| *count == 0)).await.is_ok_and(|seen| seen.is_ok())
    }
}

struct Thread {
    folder: PathBuf,
    boot_id: String,
    socket: Socket,
    count: watch::Sender<usize>,
}

impl Thread {
    fn run(mut self, receiver: &mpsc::Receiver<Pending>, mut batch: Vec<Pending>) {
        let mut retry = INTERVAL;
        loop {
            if batch.is_empty() {
                let Ok(first) = receiver.recv() else { return };
                batch.push(first);
            }
            let ended = collect(receiver, &mut batch, Instant::now() + retry);
            match self.reap(&batch) {
                Ok(()) => {
                    self.count.send_modify(|count| *count = count.saturating_sub(batch.len()));
                    batch.clear();
                    retry = INTERVAL;
                }
                Err(error) => {
                    tracing::warn!(error = error.chain_text(), links = batch.len(), "links not deleted yet");
                    retry = (retry * 2).min(SLOWEST_RETRY);
                    if ended {
                        // They are on record: the next agent goes on.
                        return;
                    }
                }
            }
        }
    }

    /// Deletes the links of a batch, frees their addresses and ends their records.
    fn reap(&mut self, batch: &[Pending]) -> Result<()> {
        self.delete_links(batch)?;
        let mut folders: BTreeMap<&Path, BTreeSet<Owner>> = BTreeMap::new();
        for pending in batch {
            if let Some(leases) = &pending.leases {
                folders.entry(leases).or_default().insert(pending.owner.clone());
            }
        }
        for (folder, owners) in folders {
            host_local::release(folder, &owners, &self.boot_id)?;
        }
        batch.iter().try_for_each(|pending| records::remove(&pending.path(&self.folder)))
    }

    fn delete_links(&mut self, batch: &[Pending]) -> Result<()> {
        let links = link::dump_links(&mut self.socket).map_err(Error::netlink("list", "links"))?;
        let groups: HashSet<u32> = links.iter().map(|link| link.group).collect();
        let wanted: HashSet<&str> = batch.iter().map(|pending| pending.link.as_str()).collect();
        let group = unused_group(&groups)?;
        let mut found = false;
        for link in links.iter().filter(|link| link.kind == "veth" && wanted.contains(link.name.as_str())) {
            match self.socket.one(link::set_group(&link.name, group)) {
                Ok(()) => found = true,
                // It went with its pod's namespace.
                Err(error) if is_gone(error.errno) => {}
                Err(error) => return Err(Error::netlink("mark", link.name.clone())(error)),
            }
        }
        if !found {
            return Ok(());
        }
        match self.socket.one(link::delete_group(group)) {
            Err(error) if !is_gone(error.errno) => Err(Error::netlink("delete links of", format!("group {group}"))(error)),
            _ => Ok(()),
        }
    }
}

/// Adds what comes until the deadline or until the batch is full; true when nothing can come any more.
fn collect(receiver: &mpsc::Receiver<Pending>, batch: &mut Vec<Pending>, deadline: Instant) -> bool {
    while batch.len() < BATCH {
        match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(pending) => batch.push(pending),
            Err(mpsc::RecvTimeoutError::Timeout) => return false,
            Err(mpsc::RecvTimeoutError::Disconnected) => return true,
        }
    }
    false
}

fn is_gone(errno: Option<i32>) -> bool {
    errno == Some(rustix::io::Errno::NODEV.raw_os_error())
}

/// A random 31-bit number that no link's group has.
pub(crate) fn unused_group(groups: &HashSet<u32>) -> Result<u32> {
    loop {
        let group = u32::from_ne_bytes(random()?) >> 1;
        // Small numbers are what people choose by hand.
        if group > 0xffff && !groups.contains(&group) {
            return Ok(group);
        }
    }
}

/// Random bytes of the kernel.
pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())
        .map_err(|e| Error::file("read", Path::new("/dev/urandom"))(e.into()))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_31_bits_and_not_taken() {
        for _ in 0..100 {
            let group = unused_group(&HashSet::from([0, 1])).unwrap();
            assert!(group > 0xffff && group <= i32::MAX as u32);
        }
    }
}
