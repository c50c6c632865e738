//! inotify on the manifests' folder: tells that something happened and which files are complete. Reads no file.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;

use super::manifest::is_manifest_name;

/// An inotify descriptor on the folder, where that works.
pub(super) struct Watch {
    fd: Option<AsyncFd<OwnedFd>>,
    only: Option<OsString>,
    watching: bool,
}

impl Watch {
    pub(super) fn new(path: &Path) -> Watch {
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        // `register` is unsafe for types that may lie about their descriptor; an OwnedFd cannot.
        #[expect(deprecated)]
        let fd = inotify::init(flags).map_err(io::Error::from).and_then(AsyncFd::new);
        if let Err(error) = &fd {
            tracing::warn!(%error, "no inotify: manifests are only read again now and then");
        }
        let mut watch = Watch { fd: fd.ok(), only: None, watching: false };
        watch.ensure(path);
        watch
    }

    /// Whether events come.
    pub(super) fn is_watching(&self) -> bool {
        self.fd.is_some() && self.watching
    }

    /// Watches the folder if it exists and is not being watched.
    pub(super) fn ensure(&mut self, path: &Path) {
        let Some(fd) = self.fd.as_ref().filter(|_| !self.watching) else { return };
        let folder = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
        let is_file = folder != path;
        let events = inotify::WatchFlags::CLOSE_WRITE
            | inotify::WatchFlags::MOVED_TO
            | inotify::WatchFlags::MOVED_FROM
            | inotify::WatchFlags::DELETE
            | inotify::WatchFlags::CREATE
            | inotify::WatchFlags::DELETE_SELF
            | inotify::WatchFlags::MOVE_SELF
            | inotify::WatchFlags::ONLYDIR;
        match inotify::add_watch(fd.get_ref(), folder, events) {
            Ok(_) => {
                self.watching = path.exists();
                self.only = is_file.then(|| path.file_name().unwrap_or_default().to_owned());
            }
            Err(error) => tracing::debug!(path = %folder.display(), %error, "cannot watch yet"),
        }
    }

    /// Waits for a change; gives the names of files that are complete.
    pub(super) async fn changed(&mut self) -> Vec<OsString> {
        let Some(fd) = &self.fd else { return std::future::pending().await };
        loop {
            let Ok(mut ready) = fd.readable().await else { return std::future::pending().await };
            let mut buffer = [std::mem::MaybeUninit::uninit(); 8192];
            let mut reader = inotify::Reader::new(fd.get_ref(), &mut buffer);
            let mut names = Vec::new();
            let mut relevant = false;
            while let Ok(event) = reader.next() {
                let events = event.events();
                if events
                    .intersects(inotify::ReadFlags::DELETE_SELF | inotify::ReadFlags::MOVE_SELF | inotify::ReadFlags::IGNORED)
                {
                    self.watching = false;
                    relevant = true;
                }
                relevant |= events.contains(inotify::ReadFlags::QUEUE_OVERFLOW);
                let Some(name) = event.file_name() else { continue };
                let name = OsString::from(name.to_string_lossy().into_owned());
                let ours = match &self.only {
                    Some(only) => *only == name,
                    None => is_manifest_name(Path::new(&name)),
                };
                relevant |= ours;
                if ours && events.intersects(inotify::ReadFlags::CLOSE_WRITE | inotify::ReadFlags::MOVED_TO) {
                    names.push(name);
                }
            }
            ready.clear_ready();
            if relevant {
                return names;
            }
        }
    }
}
