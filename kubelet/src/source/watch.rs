//! inotify on the manifests' folder: tells that something happened and which files are complete. Reads no file.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;

use super::manifest::is_manifest_name;

/// What the events have told and nobody has taken up yet.
#[derive(Debug, Default)]
struct News {
    /// Something happened that is worth a look.
    relevant: bool,
    /// The folder itself went.
    lost: bool,
    /// Files that were complete when they were last heard of.
    complete: BTreeSet<OsString>,
    /// Files that were written to since, and not closed.
    open: BTreeSet<OsString>,
    /// The only file that counts; `None`: all manifests of the folder.
    only: Option<OsString>,
}

impl News {
    fn add(&mut self, name: OsString, events: inotify::ReadFlags) {
        let ours = match &self.only {
            Some(only) => *only == name,
            None => is_manifest_name(Path::new(&name)),
        };
        if !ours {
            return;
        }
        if events.intersects(inotify::ReadFlags::CLOSE_WRITE | inotify::ReadFlags::MOVED_TO) {
            self.open.remove(&name);
            self.complete.insert(name);
        } else if events.contains(inotify::ReadFlags::MODIFY) {
            // Each write tells: worth a look is only its end.
            self.complete.remove(&name);
            self.open.insert(name);
            return;
        }
        self.relevant = true;
    }
}

/// The events of the folder as they come. Clones share them.
#[derive(Clone, Debug)]
pub(super) struct Events {
    fd: Arc<OwnedFd>,
    news: Arc<Mutex<News>>,
}

impl Events {
    /// Takes in what the kernel has ready.
    fn pump<T>(&self, look: impl FnOnce(&mut News) -> T) -> T {
        let mut news = self.news.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = [std::mem::MaybeUninit::uninit(); 8192];
        let mut reader = inotify::Reader::new(&*self.fd, &mut buffer);
        while let Ok(event) = reader.next() {
            let events = event.events();
            let gone = inotify::ReadFlags::DELETE_SELF | inotify::ReadFlags::MOVE_SELF | inotify::ReadFlags::IGNORED;
            news.lost |= events.intersects(gone);
            news.relevant |= news.lost || events.contains(inotify::ReadFlags::QUEUE_OVERFLOW);
            if let Some(name) = event.file_name() {
                news.add(OsString::from(name.to_string_lossy().into_owned()), events);
            }
        }
        look(&mut news)
    }

    /// The files that are complete as far as it is known now. What is written to from now on is told by [`Events::is_open`].
    pub(super) fn take_complete(&self) -> BTreeSet<OsString> {
        self.pump(|news| {
            news.open.clear();
            std::mem::take(&mut news.complete)
        })
    }

    /// Whether somebody has written to the file since, and not closed it: what was read of it may be half of a file.
    pub(super) fn is_open(&self, name: &OsStr) -> bool {
        self.pump(|news| news.open.contains(name))
    }
}

/// An inotify descriptor on the folder, where that works.
pub(super) struct Watch {
    fd: Option<AsyncFd<Arc<OwnedFd>>>,
    events: Option<Events>,
    watching: bool,
}

impl Watch {
    pub(super) fn new(path: &Path) -> Watch {
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        // `register` is unsafe for types that may lie about their descriptor; an OwnedFd cannot.
        #[expect(deprecated)]
        let fd = inotify::init(flags).map_err(io::Error::from).and_then(|fd| AsyncFd::new(Arc::new(fd)));
        if let Err(error) = &fd {
            tracing::warn!(%error, "no inotify: manifests are only read again now and then");
        }
        let fd = fd.ok();
        let events = fd.as_ref().map(|fd| Events { fd: fd.get_ref().clone(), news: Arc::default() });
        let mut watch = Watch { fd, events, watching: false };
        watch.ensure(path);
        watch
    }

    /// The events, while they come.
    pub(super) fn events(&self) -> Option<Events> {
        self.events.clone().filter(|_| self.watching)
    }

    /// Watches the folder if it exists and is not being watched.
    pub(super) fn ensure(&mut self, path: &Path) {
        let Some(events) = self.events.as_ref().filter(|_| !self.watching) else { return };
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
        let is_file = folder != path;
        let wanted = inotify::WatchFlags::CLOSE_WRITE
            | inotify::WatchFlags::MODIFY
            | inotify::WatchFlags::MOVED_TO
            | inotify::WatchFlags::MOVED_FROM
            | inotify::WatchFlags::DELETE
            | inotify::WatchFlags::CREATE
            | inotify::WatchFlags::DELETE_SELF
            | inotify::WatchFlags::MOVE_SELF
            | inotify::WatchFlags::ONLYDIR;
        match inotify::add_watch(&*events.fd, folder, wanted) {
            Ok(_) => {
                self.watching = path.exists();
                let only = is_file.then(|| path.file_name().unwrap_or_default().to_owned());
                events.pump(|news| news.only = only);
            }
            Err(error) => tracing::debug!(path = %folder.display(), %error, "cannot watch yet"),
        }
    }

    /// Waits for a change that is worth a look.
    pub(super) async fn changed(&mut self) {
        let (Some(fd), Some(events)) = (&self.fd, &self.events) else { return std::future::pending().await };
        loop {
            let (relevant, lost) = events.pump(|news| (std::mem::take(&mut news.relevant), std::mem::take(&mut news.lost)));
            self.watching &= !lost;
            if relevant {
                return;
            }
            let Ok(mut ready) = fd.readable().await else { return std::future::pending().await };
            ready.clear_ready();
        }
    }
}
