//! Loading system call filters. What a filter says is made elsewhere; architectures and names are in [`crate::arch`].

use std::io;
use std::os::fd::OwnedFd;
use std::ptr;

use crate::syscall::{check, check_fd};

/// One instruction of classic BPF, as the kernel takes it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SockFilter {
    /// Operation.
    pub code: u16,
    /// How many to skip when true.
    pub jt: u8,
    /// How many to skip when false.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}

/// The most instructions the kernel takes (`BPF_MAXINSNS`).
pub const MAX_INSTRUCTIONS: usize = 4096;

bitflags::bitflags! {
    /// How to load a filter.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct SeccompFlags: u32 {
        /// For all threads of the process.
        const TSYNC = 1;
        /// Log all actions but allow.
        const LOG = 2;
        /// Without the mitigation of speculative store bypass.
        const SPEC_ALLOW = 4;
        /// Return a descriptor that receives the notifications.
        const NEW_LISTENER = 8;
        /// A notified call waits killable only.
        const WAIT_KILLABLE_RECV = 32;
    }
}

#[repr(C)]
struct SockFprog {
    len: u16,
    filter: *const SockFilter,
}

const SECCOMP_SET_MODE_FILTER: libc::c_ulong = 1;
const SECCOMP_GET_ACTION_AVAIL: libc::c_ulong = 2;

/// Loads a filter for the calling thread and all that it starts. Needs no_new_privs or CAP_SYS_ADMIN. There is no way back. With
/// [`SeccompFlags::NEW_LISTENER`] the descriptor is returned.
pub fn load(filter: &[SockFilter], flags: SeccompFlags) -> io::Result<Option<OwnedFd>> {
    let len = match u16::try_from(filter.len()) {
        Ok(len) if filter.len() <= MAX_INSTRUCTIONS && len > 0 => len,
        _ => return Err(io::Error::from_raw_os_error(libc::EINVAL)),
    };
    let program = SockFprog { len, filter: filter.as_ptr() };
    // SAFETY: the program points to `len` instructions that outlive the call; the kernel copies and verifies them.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, SECCOMP_SET_MODE_FILTER, libc::c_ulong::from(flags.bits()), ptr::from_ref(&program))
    };
    if flags.contains(SeccompFlags::NEW_LISTENER) {
        return check_fd(result).map(Some);
    }
    match check(result)? {
        0 => Ok(None),
        // TSYNC answers with the id of a thread that could not follow.
        _ => Err(io::Error::from_raw_os_error(libc::ESRCH)),
    }
}

/// Whether the kernel knows a filter's return action (`SECCOMP_RET_*`).
#[must_use]
pub fn action_avail(action: u32) -> bool {
    let zero: libc::c_ulong = 0;
    // SAFETY: the pointer is to one u32 that outlives the call.
    unsafe { libc::syscall(libc::SYS_seccomp, SECCOMP_GET_ACTION_AVAIL, zero, ptr::from_ref(&action)) == 0 }
}

/// Whether the kernel has filters at all.
#[must_use]
pub fn is_available() -> bool {
    action_avail(libc::SECCOMP_RET_ALLOW)
}
