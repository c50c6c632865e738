//! Pseudo terminals and window sizes.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

/// A pseudo terminal: both ends, close-on-exec.
#[derive(Debug)]
pub struct Pty {
    /// The end of the one who types.
    pub master: OwnedFd,
    /// The end of the program.
    pub slave: OwnedFd,
    /// Its number: the slave is `pts/<number>` of its devpts.
    pub number: u32,
}

/// Opens a pseudo terminal of the devpts mounted at `pts_dir` (a container's `/dev/pts`).
pub fn open_pty_in(pts_dir: BorrowedFd<'_>) -> io::Result<Pty> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    from_master(rustix::fs::openat(pts_dir, c"ptmx", flags, Mode::empty())?)
}

/// Opens a pseudo terminal of the caller's own `/dev/ptmx`.
pub fn open_pty() -> io::Result<Pty> {
    from_master(rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?)
}

fn from_master(master: OwnedFd) -> io::Result<Pty> {
    rustix::pty::unlockpt(&master)?;
    // By descriptor, never by path: a path could lead to another devpts.
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    let name = rustix::pty::ptsname(&master, Vec::new())?;
    let number = name.to_str().ok().and_then(|name| name.rsplit('/').next()?.parse().ok());
    let number = number.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOTTY))?;
    Ok(Pty { master, slave, number })
}

/// Makes the terminal the controlling one of the calling process, which must lead a session that has none.
pub fn set_controlling_terminal(slave: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::process::ioctl_tiocsctty(slave)?)
}

/// Tells a terminal its size; its foreground programs get SIGWINCH.
pub fn set_window_size(terminal: BorrowedFd<'_>, columns: u16, rows: u16) -> io::Result<()> {
    let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(rustix::termios::tcsetwinsize(terminal, size)?)
}

/// The size of a terminal: (columns, rows).
pub fn window_size(terminal: BorrowedFd<'_>) -> io::Result<(u16, u16)> {
    let size = rustix::termios::tcgetwinsize(terminal)?;
    Ok((size.ws_col, size.ws_row))
}
