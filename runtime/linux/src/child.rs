//! What a forked child does to its descriptors before it becomes another program: none of its parent's reaches that. For single-threaded processes that end by exec or [`crate::process::exit_now`].

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::syscall::check;

/// Closes every descriptor from `first` on but those in `keep`.
///
/// Owned descriptors that are closed by this must never be dropped afterwards: the caller is a forked child that does not return to code
/// which owns any.
pub fn close_from(first: u32, keep: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut keep: Vec<u32> = keep.iter().map(|fd| fd.as_raw_fd() as u32).filter(|fd| *fd >= first).collect();
    keep.sort_unstable();
    keep.dedup();
    let mut next = first;
    for fd in keep.into_iter().chain([u32::MAX]) {
        if fd > next {
            let last = if fd == u32::MAX { u32::MAX } else { fd - 1 };
            // SAFETY: numbers only; that nobody uses what is closed is this function's documented condition.
            check(unsafe { libc::syscall(libc::SYS_close_range, next, last, 0) })?;
        }
        next = fd.saturating_add(1);
    }
    Ok(())
}

/// Whether a descriptor came from this process's starter: it is open and not close-on-exec, which all are that are made here.
#[must_use]
pub fn is_inherited(number: i32) -> bool {
    // SAFETY: numbers only; one that is not open is refused without harm.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    flags >= 0 && flags & libc::FD_CLOEXEC == 0
}
