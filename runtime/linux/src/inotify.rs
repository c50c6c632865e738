//! Changes of folders and files as events.

use std::ffi::OsString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use rustix::fs::inotify;
pub use rustix::fs::inotify::{ReadFlags, WatchFlags};

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Which watch. -1 for [`ReadFlags::QUEUE_OVERFLOW`]: events were lost, look at everything again.
    pub watch: i32,
    /// What happened.
    pub flags: ReadFlags,
    /// Joins the two halves of a rename.
    pub cookie: u32,
    /// The entry of the watched folder.
    pub name: Option<OsString>,
}

/// An inotify instance, non-blocking.
#[derive(Debug)]
pub struct Inotify {
    fd: OwnedFd,
}

impl AsFd for Inotify {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Inotify {
    /// A new instance.
    pub fn new() -> io::Result<Self> {
        Ok(Self { fd: inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)? })
    }

    /// Watches a path; the result names the watch in events.
    pub fn add(&self, path: &Path, flags: WatchFlags) -> io::Result<i32> {
        Ok(inotify::add_watch(&self.fd, path, flags)?)
    }

    /// Ends a watch.
    pub fn remove(&self, watch: i32) -> io::Result<()> {
        Ok(inotify::remove_watch(&self.fd, watch)?)
    }

    /// Takes all events that are there now.
    pub fn read(&self) -> io::Result<Vec<Event>> {
        let mut buffer = [MaybeUninit::<u8>::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.fd, &mut buffer);
        let mut events = Vec::new();
        loop {
            match reader.next() {
                Ok(event) => events.push(Event {
                    watch: event.wd(),
                    flags: event.events(),
                    cookie: event.cookie(),
                    name: event.file_name().map(|name| OsString::from_vec(name.to_bytes().to_vec())),
                }),
                Err(rustix::io::Errno::AGAIN) => return Ok(events),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}
