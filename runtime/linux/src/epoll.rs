//! Waiting for many descriptors at once, by tokens of the caller's.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::Timespec;
use rustix::event::epoll;
pub use rustix::event::epoll::EventFlags;

/// What is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ready {
    /// The token given when the descriptor was added.
    pub token: u64,
    /// What it is ready for. Errors and hang-ups are always told.
    pub flags: EventFlags,
}

/// An epoll instance. It does not own what it watches: delete a descriptor before closing it where another process holds it too, because the kernel
/// watches the open file, not the number.
#[derive(Debug)]
pub struct Epoll {
    fd: OwnedFd,
}

impl AsFd for Epoll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Epoll {
    /// A new instance.
    pub fn new() -> io::Result<Self> {
        Ok(Self { fd: epoll::create(epoll::CreateFlags::CLOEXEC)? })
    }

    /// Watches a descriptor.
    pub fn add(&self, fd: BorrowedFd<'_>, token: u64, interest: EventFlags) -> io::Result<()> {
        Ok(epoll::add(&self.fd, fd, epoll::EventData::new_u64(token), interest)?)
    }

    /// Changes what a descriptor is watched for.
    pub fn modify(&self, fd: BorrowedFd<'_>, token: u64, interest: EventFlags) -> io::Result<()> {
        Ok(epoll::modify(&self.fd, fd, epoll::EventData::new_u64(token), interest)?)
    }

    /// Stops watching a descriptor.
    pub fn delete(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        Ok(epoll::delete(&self.fd, fd)?)
    }

    /// Waits until something is ready and appends it; at most 32 at a time. Returns at once with nothing when interrupted by a signal or
    /// when the time is over.
    pub fn wait(&self, ready: &mut Vec<Ready>, timeout: Option<Duration>) -> io::Result<()> {
        let mut buffer = [std::mem::MaybeUninit::<epoll::Event>::uninit(); 32];
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        });
        match epoll::wait(&self.fd, &mut buffer, timeout.as_ref()) {
            Ok((events, _)) => {
                ready.extend(events.iter().map(|event| Ready { token: event.data.u64(), flags: event.flags }));
                Ok(())
            }
            Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}
