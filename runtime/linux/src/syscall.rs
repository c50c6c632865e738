//! Raw system calls that neither libc nor rustix wrap: one function, one errno convention.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// The result of `libc::syscall` or of a libc function that returns -1 and sets errno.
pub(crate) fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Like [`check`], for a call that returns a new descriptor.
pub(crate) fn check_fd(result: libc::c_long) -> io::Result<OwnedFd> {
    let raw = check(result)?;
    let raw = RawFd::try_from(raw).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: the kernel just returned this descriptor to us and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}
