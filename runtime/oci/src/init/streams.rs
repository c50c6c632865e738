//! Standard streams and the few other descriptors that a process keeps until it executes its program, each at its number.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use berth_linux::process::dup_onto;
use berth_linux::{session, tty};

use super::{Done, During, Failure, Init, identity};
use crate::launch::Stdio;

impl Init {
    pub(super) fn place_stdio(&self, stdio: Stdio, terminal: bool) -> Done {
        session::new_session().during("start a session")?;
        let fds = match &stdio {
            Stdio::Fds(fds) => [fds[0].as_fd(), fds[1].as_fd(), fds[2].as_fd()],
            Stdio::Pty { .. } => return Err(Failure::new("no terminal was opened")),
        };
        if terminal {
            tty::set_controlling_terminal(fds[0]).during("make the terminal the controlling one")?;
        }
        for fd in fds {
            identity::give_stream(fd, self.process.uid)?;
        }
        // Copies above 2 first: one of them may have a number that another one is to get.
        let lifted = fds.map(|fd| rustix::io::fcntl_dupfd_cloexec(fd, 3));
        for (target, fd) in lifted.into_iter().enumerate() {
            let fd = fd.during("duplicate standard stream")?;
            dup_onto(fd.as_fd(), target as i32).during("place standard stream")?;
        }
        if let Stdio::Fds(fds) = stdio {
            // An original with one of the three numbers has just been replaced: its drop would close the new one.
            fds.into_iter().filter(|fd| fd.as_raw_fd() < 3).for_each(std::mem::forget);
        }
        Ok(())
    }

    /// Moves the descriptors that are needed until the end above those that are passed on.
    pub(super) fn lift_fds(&mut self, first: i32) -> Done {
        let lift = |fd: BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(fd, first).during("duplicate descriptor");
        self.started = lift(self.started.as_fd())?;
        if let Some(gate) = &self.gate {
            self.gate = Some(lift(gate.as_fd())?);
        }
        Ok(())
    }
}
