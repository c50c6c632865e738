//! Sessions and session keyrings.

use std::ffi::CStr;
use std::io;

use rustix::process::Pid;

use crate::syscall::check;

/// Makes the calling process the leader of a new session without a terminal.
pub fn new_session() -> io::Result<Pid> {
    Ok(rustix::process::setsid()?)
}

/// `KEYCTL_JOIN_SESSION_KEYRING`.
const JOIN_SESSION_KEYRING: libc::c_long = 1;

/// Gives the calling process a session keyring of its own, so that it cannot see its starter's keys. Returns false where the kernel has no
/// keyrings or a filter forbids them.
pub fn join_session_keyring(name: &CStr) -> io::Result<bool> {
    // SAFETY: the name is a C string that outlives the call; the kernel copies it.
    match check(unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, name.as_ptr()) }) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => Ok(false),
        Err(error) => Err(error),
    }
}
