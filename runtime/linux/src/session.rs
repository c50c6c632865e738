//! Sessions and session keyrings.

use std::io;

use rustix::process::Pid;

use crate::syscall::check;

/// Makes the calling process the leader of a new session without a terminal.
pub fn new_session() -> io::Result<Pid> {
    Ok(rustix::process::setsid()?)
}

/// `KEYCTL_JOIN_SESSION_KEYRING`.
const JOIN_SESSION_KEYRING: libc::c_long = 1;

/// Gives the calling process a session keyring of its own, so that it cannot see its starter's keys. It has no name of its own: a name would
/// join the keyring of another process that has opened its own under it. Returns false where the kernel has no keyrings or a filter forbids
/// them.
pub fn new_session_keyring() -> io::Result<bool> {
    let anonymous = std::ptr::null::<libc::c_char>();
    // SAFETY: a null name asks for a new keyring; nothing else is passed.
    match check(unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, anonymous) }) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => Ok(false),
        Err(error) => Err(error),
    }
}
