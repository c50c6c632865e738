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

/// Takes close-on-exec from the descriptors `first..first + count` that are open, so that they reach the program.
pub fn pass_range(first: i32, count: u32) {
    for fd in (first..).take(count as usize) {
        // SAFETY: numbers only; a number that is not open is refused without harm.
        unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
    }
}
