//! inotify on a folder of logs: wakes a follower. Tells nothing but that something has changed.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;

/// A watched folder; where that does not work (the limit of instances, for one), the follower looks now and then.
#[derive(Debug)]
pub(super) struct LogWatch(Option<AsyncFd<OwnedFd>>);

impl LogWatch {
    pub(super) fn new(folder: &Path) -> LogWatch {
        let made = Self::watch(folder);
        if let Err(error) = &made {
            tracing::debug!(path = %folder.display(), %error, "no inotify: the log is looked at each second");
        }
        LogWatch(made.ok())
    }

    fn watch(folder: &Path) -> io::Result<AsyncFd<OwnedFd>> {
        let fd = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        let events = inotify::WatchFlags::MODIFY
            | inotify::WatchFlags::CREATE
            | inotify::WatchFlags::MOVED_TO
            | inotify::WatchFlags::ONLYDIR;
        inotify::add_watch(&fd, folder, events)?;
        // `register` is unsafe for types that may lie about their descriptor; an OwnedFd cannot.
        #[expect(deprecated)]
        AsyncFd::new(fd)
    }

    /// Waits for the next change.
    pub(super) async fn changed(&mut self) {
        let Some(fd) = &self.0 else { return std::future::pending().await };
        let Ok(mut ready) = fd.readable().await else { return std::future::pending().await };
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(fd.get_ref(), &mut buffer);
        while reader.next().is_ok() {}
        ready.clear_ready();
    }
}
