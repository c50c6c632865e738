//! Forked children of the shim: helpers that do what must not happen in it. They never return into the loop.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use berth_linux::Pid;
use berth_linux::child::close_from;
use berth_linux::pidfd::PidFd;
use berth_linux::process::{CloneArgs, Fork, clone3, clone3_beside, exit_now, pipe};

use crate::error::Error;

/// Ends the process when a child's code unwinds: nothing of the parent's stack may run twice.
struct NeverReturn;

impl Drop for NeverReturn {
    fn drop(&mut self) {
        exit_now(101);
    }
}

/// Forks. `run` is the child's whole life; its result is the exit code. A child that may live long, or that makes others which
/// do, begins with `close_from`.
pub fn fork(args: CloneArgs<'_>, run: impl FnOnce() -> i32) -> io::Result<(Pid, PidFd)> {
    live(clone3(args)?, run)
}

/// Forks a child that is born in the PID namespace of a process; `own` is that of the shim.
pub fn fork_beside(
    process: BorrowedFd<'_>,
    own: BorrowedFd<'_>,
    args: CloneArgs<'_>,
    run: impl FnOnce() -> i32,
) -> io::Result<(Pid, PidFd)> {
    live(clone3_beside(process, own, args)?, run)
}

fn live(side: Fork, run: impl FnOnce() -> i32) -> io::Result<(Pid, PidFd)> {
    match side {
        Fork::Child => {
            let _guard = NeverReturn;
            exit_now(run())
        }
        Fork::Parent { pid, pidfd } => Ok((pid, pidfd.into())),
    }
}

/// Forks a helper whose failure arrives as text, then the end of the file, at the descriptor returned. It has no descriptors but
/// `keep`.
pub fn fork_reporting(keep: &[BorrowedFd<'_>], run: impl FnOnce() -> Result<(), Error>) -> io::Result<(Pid, PidFd, OwnedFd)> {
    let (reader, writer) = pipe()?;
    let (pid, pidfd) = fork(CloneArgs::default(), || {
        let keep: Vec<BorrowedFd<'_>> = keep.iter().copied().chain([writer.as_fd()]).collect();
        let closed = close_from(3, &keep).map_err(Error::io("close descriptors"));
        let Err(error) = closed.and_then(|()| run()) else {
            return 0;
        };
        let _ = File::from(writer).write_all(error.full_text().as_bytes());
        1
    })?;
    Ok((pid, pidfd, reader))
}

/// Runs a helper to its end. For the start only: it waits.
pub fn run_to_end(keep: &[BorrowedFd<'_>], run: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
    let (_, pidfd, report) = fork_reporting(keep, run).map_err(Error::io("fork a helper"))?;
    finish(&pidfd, report)
}

/// Waits for a helper's end and takes its report.
pub fn finish(pidfd: &PidFd, report: OwnedFd) -> Result<(), Error> {
    let mut text = String::new();
    let read = File::from(report).read_to_string(&mut text);
    let status = pidfd.wait(false).map_err(Error::io("wait for a helper"))?;
    read.map_err(Error::io("read a helper's report"))?;
    match (text.is_empty(), status) {
        (true, Some(status)) if !status.success() => Err(Error::Helper(format!("a helper ended with code {}", status.code))),
        (true, _) => Ok(()),
        (false, _) => Err(Error::Helper(text)),
    }
}
