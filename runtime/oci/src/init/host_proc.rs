//! /proc of the machine, for what is written to it on the container's behalf.

use std::os::fd::{AsFd, BorrowedFd};

use berth_linux::beneath::Root;
use rustix::fs::{Mode, OFlags};

use super::{Done, During, Failure};

/// /proc of the machine, opened before the root changes and checked to be what it says: nothing that is written below it
/// can be led elsewhere by the container's own mounts or links.
pub(crate) struct HostProc {
    root: Root,
}

impl HostProc {
    pub(super) fn open() -> Done<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open("/proc", flags, Mode::empty()).during("open /proc")?;
        require_filesystem(fd.as_fd(), PROC_MAGIC, "/proc is not a proc filesystem")?;
        Ok(Self { root: Root::in_root(fd) })
    }

    /// Writes to a file of the process or of the kernel, which must be proc's own.
    pub(crate) fn write(&self, path: &str, value: &[u8]) -> Done {
        let fd = self
            .root
            .open(path.as_ref(), OFlags::WRONLY | OFlags::NOFOLLOW, Mode::empty())
            .during(format_args!("open /proc/{path}"))?;
        require_filesystem(fd.as_fd(), PROC_MAGIC, "a file below /proc is not proc's own")?;
        rustix::io::write(&fd, value).during(format_args!("write /proc/{path}"))?;
        Ok(())
    }
}

pub(crate) const PROC_MAGIC: i64 = 0x9fa0;

pub(crate) fn require_filesystem(fd: BorrowedFd<'_>, magic: i64, otherwise: &str) -> Done {
    let found = rustix::fs::fstatfs(fd).during("stat filesystem")?.f_type;
    if found == magic { Ok(()) } else { Err(Failure::new(otherwise)) }
}
