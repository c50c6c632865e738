//! Waiting for a process in the foreground: signals are passed on, a terminal is connected to ours.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use berth_linux::pidfd::PidFd;
use berth_linux::signalfd::SignalFd;
use berth_linux::tty;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::termios::{OptionalActions, Termios};

use super::Outcome;

const SIGWINCH: i32 = 28;
/// What is passed on besides the real-time signals: HUP, INT, QUIT, USR1, USR2, ALRM, TERM, CONT, XCPU, XFSZ, VTALRM, PROF, IO, PWR. Those that are
/// missing report our own faults, our own children, or what a terminal thinks of us.
const PASSED_ON: [i32; 14] = [1, 2, 3, 10, 12, 14, 15, 18, 24, 25, 26, 27, 29, 30];
const REAL_TIME: std::ops::RangeInclusive<i32> = 34..=64;

/// Our own terminal, raw until this is dropped.
struct RawTerminal {
    before: Option<Termios>,
}

impl RawTerminal {
    fn enter() -> Self {
        let stdin = std::io::stdin();
        let before = rustix::termios::tcgetattr(&stdin).ok();
        if let Some(before) = &before {
            let mut raw = before.clone();
            raw.make_raw();
            // A terminal that cannot be made raw still works line by line.
            let _ = rustix::termios::tcsetattr(&stdin, OptionalActions::Now, &raw);
        }
        Self { before }
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = rustix::termios::tcsetattr(std::io::stdin(), OptionalActions::Now, before);
        }
    }
}

/// From here on signals wait for [`attend`]. To be called before the child is made, so that none ends us and leaves it behind.
pub(super) fn take_signals() -> Result<SignalFd, String> {
    let signals: Vec<i32> = PASSED_ON.into_iter().chain([SIGWINCH]).chain(REAL_TIME).collect();
    SignalFd::new(&signals).map_err(|error| format!("take signals: {error}"))
}

/// Waits for the end of a child of ours and returns its exit code.
pub(super) fn attend(process: PidFd, console: Option<OwnedFd>, signals: &SignalFd) -> Outcome {
    let raw = console.is_some().then(RawTerminal::enter);
    let console = console.map(File::from);
    if let Some(console) = &console {
        copy_size(console.as_fd());
    }
    let code = pump(&process, console.as_ref(), signals).map_err(|error| format!("wait for the process: {error}"));
    drop(raw);
    code
}

fn copy_size(console: BorrowedFd<'_>) {
    if let Ok((columns, rows)) = tty::window_size(std::io::stdin().as_fd()) {
        let _ = tty::set_window_size(console, columns, rows);
    }
}

fn pump(process: &PidFd, mut console: Option<&File>, signals: &SignalFd) -> std::io::Result<i32> {
    let stdin = std::io::stdin();
    let mut feeding = console.is_some();
    loop {
        let mut fds = vec![PollFd::new(process, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        if let Some(console) = console {
            fds.push(PollFd::new(console, PollFlags::IN));
            if feeding {
                fds.push(PollFd::new(&stdin, PollFlags::IN));
            }
        }
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            result => result?,
        };
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        while let Some(info) = signals.read()? {
            match (info.signal, console) {
                (SIGWINCH, Some(console)) => copy_size(console.as_fd()),
                (SIGWINCH, None) => {}
                (signal, _) => match process.signal(signal) {
                    Err(error) if error.raw_os_error() != Some(3) => return Err(error),
                    _ => {}
                },
            }
        }
        if let Some(open) = console {
            if ready.get(3) == Some(&true) {
                feeding = feed(open)?;
            }
            // Its end says so for ever: nobody in the container has the terminal open any more.
            if ready[2] && !relay(open) {
                (console, feeding) = (None, false);
            }
        }
        if ready[0] {
            if let Some(console) = console {
                // What was written before the end is still in the terminal; at its end reading fails.
                while has_output(console) && relay(console) {}
            }
            if let Some(status) = process.wait(true)? {
                return Ok(status.code);
            }
        }
    }
}

fn has_output(console: &File) -> bool {
    let mut fds = [PollFd::new(console, PollFlags::IN)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut fds, Some(&now)).is_ok_and(|_| fds[0].revents().contains(PollFlags::IN))
}

/// Terminal to our output. False at the terminal's end.
fn relay(mut console: &File) -> bool {
    let mut buffer = [0; 4096];
    match console.read(&mut buffer) {
        Ok(length) if length > 0 => {
            let mut stdout = std::io::stdout();
            // Read even when nobody takes it: the container must not wait for a reader that is gone.
            let _ = stdout.write_all(&buffer[..length]).and_then(|()| stdout.flush());
            true
        }
        Err(error) if error.kind() == std::io::ErrorKind::Interrupted => true,
        _ => false,
    }
}

/// Our input to the terminal. False at its end.
fn feed(mut console: &File) -> std::io::Result<bool> {
    let mut buffer = [0; 4096];
    match rustix::io::read(std::io::stdin(), &mut buffer)? {
        0 => Ok(false),
        length => console.write_all(&buffer[..length]).map(|()| true).or(Ok(false)),
    }
}
