//! Signals as a descriptor, and the signal state of a child.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;

use crate::syscall::{check, check_fd};

/// A descriptor that becomes readable when one of its signals is pending.
#[derive(Debug)]
pub struct SignalFd {
    fd: OwnedFd,
}

/// A signal that was taken from the descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SignalInfo {
    /// Which.
    pub signal: i32,
    /// Who sent it, or which child changed.
    pub pid: i32,
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn signal_set(signals: &[i32]) -> libc::sigset_t {
    // SAFETY: sigset_t is plain data, which sigemptyset and sigaddset (refusing bad numbers) fill in.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in signals {
            libc::sigaddset(&mut set, *signal);
        }
        set
    }
}

impl SignalFd {
    /// Blocks the signals in the calling thread (before it has others) and takes them from a non-blocking descriptor from now on.
    pub fn new(signals: &[i32]) -> io::Result<Self> {
        let set = signal_set(signals);
        // SAFETY: the set is initialised and outlives both calls.
        unsafe {
            let result = libc::pthread_sigmask(libc::SIG_BLOCK, &set, ptr::null_mut());
            if result != 0 {
                return Err(io::Error::from_raw_os_error(result));
            }
            let fd = check_fd(libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK).into())?;
            Ok(Self { fd })
        }
    }

    /// Takes one signal; `None` when none is pending.
    pub fn read(&self) -> io::Result<Option<SignalInfo>> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::zeroed();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the buffer is one signalfd_siginfo; the kernel writes whole ones or nothing.
        match check(unsafe { libc::read(self.fd.as_raw_fd(), info.as_mut_ptr().cast(), size) } as libc::c_long) {
            Ok(_) => {
                // SAFETY: plain data, zeroed before and filled in by the read.
                let info = unsafe { info.assume_init() };
                Ok(Some(SignalInfo { signal: info.ssi_signo as i32, pid: info.ssi_pid as i32 }))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Gives a forked child the signal state that a program expects: every handler the default one, nothing blocked.
pub fn reset_signals() {
    reset_signal_handlers();
    let none = signal_set(&[]);
    // SAFETY: the set is initialised and outlives the call.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &none, ptr::null_mut()) };
}

/// Makes every handler the default one. Exec does that too, but keeps ignored signals ignored (Rust ignores SIGPIPE). It asks the kernel itself,
/// because the C library refuses to touch the two signals it keeps for itself, which a starter may have left ignored.
pub(crate) fn reset_signal_handlers() {
    // The kernel's sigaction is at most handler, flags, restorer and a mask of 8 bytes; all zeroes is SIG_DFL whatever their order.
    let default = [0u64; 4];
    let mask_size: libc::size_t = 8;
    for signal in 1..=64 as libc::c_long {
        let old = ptr::null_mut::<u64>();
        // SAFETY: the structure is as large as the kernel's and outlives the call, and the old action is not asked for. SIG_DFL runs no code of
        // ours. KILL and STOP are refused without harm.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), old, mask_size) };
    }
}

/// The number of a signal by name: `SIGTERM`, `TERM`, `SIGRTMIN+3`, `15`; any case. Checked against the kernel's range.
#[must_use]
pub fn signal_number(name: &str) -> Option<i32> {
    let upper = name.trim().to_ascii_uppercase();
    if let Ok(number) = upper.parse::<i32>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let bare = upper.strip_prefix("SIG").unwrap_or(&upper);
    // The C library keeps 32 and 33 for itself; programs' RTMIN is 34.
    for (prefix, base, sign) in [("RTMIN", 34, 1), ("RTMAX", 64, -1)] {
        if let Some(rest) = bare.strip_prefix(prefix) {
            let offset = match rest.strip_prefix(if sign > 0 { '+' } else { '-' }) {
                Some(digits) => digits.parse::<i32>().ok()?,
                None if rest.is_empty() => 0,
                None => return None,
            };
            return (0..=30).contains(&offset).then_some(base + sign * offset);
        }
    }
    SIGNALS.iter().find(|(known, _)| *known == bare).map(|(_, number)| *number)
}

/// The name of a signal (`SIGTERM`), by number.
#[must_use]
pub fn signal_name(number: i32) -> Option<String> {
    match number {
        34 => Some("SIGRTMIN".to_owned()),
        35..=49 => Some(format!("SIGRTMIN+{}", number - 34)),
        50..=63 => Some(format!("SIGRTMAX-{}", 64 - number)),
        64 => Some("SIGRTMAX".to_owned()),
        _ => SIGNALS.iter().find(|(_, known)| *known == number).map(|(name, _)| format!("SIG{name}")),
    }
}

const SIGNALS: &[(&str, i32)] = &[
    ("HUP", libc::SIGHUP),
    ("INT", libc::SIGINT),
    ("QUIT", libc::SIGQUIT),
    ("ILL", libc::SIGILL),
    ("TRAP", libc::SIGTRAP),
    ("ABRT", libc::SIGABRT),
    ("IOT", libc::SIGIOT),
    ("BUS", libc::SIGBUS),
    ("FPE", libc::SIGFPE),
    ("KILL", libc::SIGKILL),
    ("USR1", libc::SIGUSR1),
    ("SEGV", libc::SIGSEGV),
    ("USR2", libc::SIGUSR2),
    ("PIPE", libc::SIGPIPE),
    ("ALRM", libc::SIGALRM),
    ("TERM", libc::SIGTERM),
    ("STKFLT", libc::SIGSTKFLT),
    ("CHLD", libc::SIGCHLD),
    ("CLD", libc::SIGCHLD),
    ("CONT", libc::SIGCONT),
    ("STOP", libc::SIGSTOP),
    ("TSTP", libc::SIGTSTP),
    ("TTIN", libc::SIGTTIN),
    ("TTOU", libc::SIGTTOU),
    ("URG", libc::SIGURG),
    ("XCPU", libc::SIGXCPU),
    ("XFSZ", libc::SIGXFSZ),
    ("VTALRM", libc::SIGVTALRM),
    ("PROF", libc::SIGPROF),
    ("WINCH", libc::SIGWINCH),
    ("IO", libc::SIGIO),
    ("POLL", libc::SIGPOLL),
    ("PWR", libc::SIGPWR),
    ("SYS", libc::SIGSYS),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_are_known_by_name_and_number() {
        for (name, number) in [
            ("SIGTERM", Some(15)),
            ("term", Some(15)),
            ("9", Some(9)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMAX-1", Some(63)),
            ("RTMAX", Some(64)),
            ("0", None),
            ("65", None),
            ("SIGFOO", None),
            ("RTMIN-1", None),
        ] {
            assert_eq!(signal_number(name), number, "{name}");
        }
        assert_eq!(signal_name(15).as_deref(), Some("SIGTERM"));
        assert_eq!(signal_name(37).as_deref(), Some("SIGRTMIN+3"));
        assert_eq!(signal_name(0), None);
    }
}
