//! Out-of-memory kills: counted by the kernel, and a descriptor that wakes when the count may have changed.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use berth_linux::eventfd::EventFd;
use rustix::event::PollFlags;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::cgroup::{Cgroup, child_names};
use crate::{Error, Result, file};

/// A descriptor to poll. It also wakes when the cgroup is removed.
#[derive(Debug)]
pub enum OomWatch {
    /// v1: an eventfd, readable.
    V1(EventFd),
    /// v2: the events file, with an exceptional condition.
    V2(OwnedFd),
}

impl AsFd for OomWatch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::V1(event) => event.as_fd(),
            Self::V2(file) => file.as_fd(),
        }
    }
}

impl OomWatch {
    /// What to poll the descriptor for.
    #[must_use]
    pub fn interest(&self) -> PollFlags {
        match self {
            Self::V1(_) => PollFlags::IN,
            Self::V2(_) => PollFlags::PRI,
        }
    }

    /// Makes the descriptor quiet until the next event. Call it before [`Cgroup::oom_kills`], so that no event is lost between.
    pub fn rearm(&self) {
        match self {
            Self::V1(event) => {
                // A count that could not be taken only wakes once more.
                let _ = event.take();
            }
            Self::V2(file) => {
                // The kernel compares with what the last read saw.
                let mut buffer = [0u8; 256];
                let _ = rustix::io::pread(file, &mut buffer, 0);
            }
        }
    }
}

impl Cgroup {
    /// How many processes of the cgroup and of those below it were killed because memory ran out. 0 when the cgroup is gone or memory is
    /// not controlled.
    pub fn oom_kills(&self) -> Result<u64> {
        match (self.v1_dir("memory"), self.v2_dir()) {
            (Some(dir), _) => v1_oom_kills(dir),
            (None, Some(dir)) => {
                let text = file::read_optional(&dir.join("memory.events"))?.unwrap_or_default();
                Ok(file::keyed(&text, "oom_kill").unwrap_or(0))
            }
            (None, None) => Ok(0),
        }
    }

    /// A descriptor that wakes when memory has run out. `None` where memory is not controlled.
    pub fn oom_event_fd(&self) -> Result<Option<OomWatch>> {
        if let Some(dir) = self.v1_dir("memory") {
            return watch_v1(dir).map(Some);
        }
        let Some(dir) = self.v2_dir() else { return Ok(None) };
        match rustix::fs::open(dir.join("memory.events"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(file) => {
                let watch = OomWatch::V2(file);
                watch.rearm();
                Ok(Some(watch))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(Error::OomWatch { path: dir.to_owned(), source: errno.into() }),
        }
    }
}

/// v1 counts a kill only in the cgroup that the killed process was in.
fn v1_oom_kills(dir: &Path) -> Result<u64> {
    let text = file::read_optional(&dir.join("memory.oom_control"))?.unwrap_or_default();
    let mut kills = file::keyed(&text, "oom_kill").unwrap_or(0);
    for name in child_names(dir)? {
        kills += v1_oom_kills(&dir.join(name))?;
    }
    Ok(kills)
}

fn watch_v1(dir: &Path) -> Result<OomWatch> {
    let fail = |source| Error::OomWatch { path: dir.to_owned(), source };
    let event = EventFd::new().map_err(fail)?;
    let control = rustix::fs::open(dir.join("memory.oom_control"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let control = control.map_err(|errno| fail(errno.into()))?;
    let line = format!("{} {}", event.as_fd().as_raw_fd(), control.as_raw_fd());
    file::write_raw(&dir.join("cgroup.event_control"), &line).map_err(fail)?;
    Ok(OomWatch::V1(event))
}
