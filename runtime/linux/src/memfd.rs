//! Sealed files in memory, and opening a descriptor's file anew.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};

/// A memfd with this content that nobody can change any more, not even through its path in /proc. `exec`: it may be
/// executed (where `vm.memfd_noexec` is 2 the kernel refuses this with EACCES).
pub fn sealed_memfd(name: &str, bytes: &[u8], exec: bool) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let executable = if exec { MemfdFlags::EXEC } else { MemfdFlags::NOEXEC_SEAL };
    let fd = match rustix::fs::memfd_create(name, flags | executable) {
        // Kernels before 6.3 know neither flag.
        Err(rustix::io::Errno::INVAL) => rustix::fs::memfd_create(name, flags)?,
        result => result?,
    };
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    rustix::io::retry_on_intr(|| rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0)))?;
    seal(file.as_fd())?;
    Ok(file.into())
}

/// What makes a file in memory one that nobody can change.
const SEALS: SealFlags = SealFlags::SEAL.union(SealFlags::SHRINK).union(SealFlags::GROW).union(SealFlags::WRITE);

/// How often a seal is asked for while something holds one of the file's pages. The kernel itself waits about 150 ms for each
/// (memfd_wait_for_pins, Linux 3.17 and later), so this gives up after 3 s.
const SEAL_TRIES: u32 = 20;

/// Seals a memfd. EBUSY has two causes: a writable shared mapping, which no caller of this crate makes, or a reference to a page that
/// outlasts the kernel's own wait. The kernel takes such references by itself (to move or to reclaim a page), and on a machine
/// with more work than processors whoever holds one may not run for long: that passes, so it is asked again.
pub fn seal(memfd: BorrowedFd<'_>) -> io::Result<()> {
    let mut tries = 1;
    loop {
        match rustix::fs::fcntl_add_seals(memfd, SEALS) {
            Err(rustix::io::Errno::BUSY) if tries < SEAL_TRIES => tries += 1,
            result => return Ok(result?),
        }
    }
}

/// Whether a descriptor is a memfd that nobody can change any more.
#[must_use]
pub fn is_sealed(fd: BorrowedFd<'_>) -> bool {
    rustix::fs::fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SEALS))
}

/// Opens the file behind a descriptor anew (other flags, own offset) through `/proc/self/fd`: also for O_PATH descriptors.
pub fn reopen(fd: BorrowedFd<'_>, flags: OFlags) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(proc_path(fd), flags | OFlags::CLOEXEC, Mode::empty())?)
}

/// The path by which system calls without an fd form reach the file behind a descriptor. Valid while it is open.
#[must_use]
pub fn proc_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}
