//! Processes by descriptor: signal, wait and liveness without pid reuse. It never waits for a pid by number.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, WaitOptions, pidfd_open, waitid};

use crate::syscall::check;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitStatus {
    /// The exit code; 128 + the signal's number when a signal ended it.
    pub code: i32,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Whether a core file was written.
    pub core_dumped: bool,
}

impl ExitStatus {
    fn exited(code: i32) -> Self {
        Self { code, signal: None, core_dumped: false }
    }

    fn signaled(signal: i32, core_dumped: bool) -> Self {
        Self { code: 128 + signal, signal: Some(signal), core_dumped }
    }

    /// Whether the process exited by itself with code 0.
    #[must_use]
    pub fn success(&self) -> bool {
        self.code == 0
    }
}

/// A process held by descriptor: the pid cannot be reused under it.
#[derive(Debug)]
pub struct PidFd {
    fd: OwnedFd,
}

impl From<OwnedFd> for PidFd {
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

impl From<PidFd> for OwnedFd {
    fn from(pidfd: PidFd) -> Self {
        pidfd.fd
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl PidFd {
    /// Holds the process that has this pid now. ESRCH when there is none.
    pub fn open(pid: Pid) -> io::Result<Self> {
        Ok(Self { fd: pidfd_open(pid, PidfdFlags::empty())? })
    }

    /// Sends a signal by number (real-time signals too). ESRCH when the process is gone.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        let info = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: the descriptor is ours and open, a null siginfo asks the kernel to fill it in, and flags are 0.
        check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.fd.as_raw_fd(), signal, info, 0) })?;
        Ok(())
    }

    /// Reaps the process, which must be a child of the caller. `None` when `nohang` and it still runs.
    pub fn wait(&self, nohang: bool) -> io::Result<Option<ExitStatus>> {
        let mut options = WaitIdOptions::EXITED;
        if nohang {
            options |= WaitIdOptions::NOHANG;
        }
        loop {
            match waitid(WaitId::PidFd(self.fd.as_fd()), options) {
                Ok(None) => return Ok(None),
                Ok(Some(status)) => {
                    return Ok(Some(match (status.exit_status(), status.terminating_signal()) {
                        (Some(code), _) => ExitStatus::exited(code),
                        (None, Some(signal)) => ExitStatus::signaled(signal, status.dumped()),
                        (None, None) => continue,
                    }));
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Whether the process has not ended yet. An ended process that nobody has reaped is not alive.
    pub fn is_alive(&self) -> io::Result<bool> {
        Ok(!self.wait_ended(Some(std::time::Duration::ZERO))?)
    }

    /// Waits until the process has ended (any process, not only a child), without reaping it. `None` waits for ever;
    /// false when the time is over.
    pub fn wait_ended(&self, timeout: Option<std::time::Duration>) -> io::Result<bool> {
        let deadline = timeout.map(|timeout| std::time::Instant::now() + timeout);
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(std::time::Instant::now()));
            let left = left.map(|left| rustix::event::Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            });
            let mut fds = [rustix::event::PollFd::new(&self.fd, rustix::event::PollFlags::IN)];
            match rustix::event::poll(&mut fds, left.as_ref()) {
                Ok(ready) => return Ok(ready > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Reaps any one child. `None` when `nohang` and no child has ended, or when there is no child at all.
pub fn waitid_any(nohang: bool) -> io::Result<Option<(Pid, ExitStatus)>> {
    let options = if nohang { WaitOptions::NOHANG } else { WaitOptions::empty() };
    loop {
        match rustix::process::wait(options) {
            Ok(None) | Err(rustix::io::Errno::CHILD) => return Ok(None),
            Ok(Some((pid, status))) => {
                if let Some(code) = status.exit_status() {
                    return Ok(Some((pid, ExitStatus::exited(code))));
                }
                if let Some(signal) = status.terminating_signal() {
                    return Ok(Some((pid, ExitStatus::signaled(signal, libc::WCOREDUMP(status.as_raw())))));
                }
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
