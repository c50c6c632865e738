//! The streams of running containers in the hands of agents: taps, stdin, terminals, logs.

use std::os::fd::{AsFd, OwnedFd};

use berth_linux::process::pipe;
use berth_linux::tty;
use berth_shim::protocol::{Failure, FailureKind, FdIndex, Reply};

use super::containers::Stage;
use super::{Daemon, ReplyTo, failure, set_nonblocking, system_failure};
use crate::logs::ToWriter;

/// What a tap may hold before its reader is too slow. Taken from the kernel only as it fills.
const TAP_BYTES: usize = 1 << 20;

impl Daemon {
    pub(super) fn attach(&mut self, to: ReplyTo, id: &str, stdin: bool, stdout: bool, stderr: bool) {
        match self.try_attach(id, stdin, stdout, stderr) {
            Ok((reply, fds)) => self.answer_with(to, reply, fds),
            Err(failure) => self.answer(to, Reply::Error(failure)),
        }
    }

    fn try_attach(&mut self, id: &str, stdin: bool, stdout: bool, stderr: bool) -> Result<(Reply, Vec<OwnedFd>), Failure> {
        let system = |error: std::io::Error| system_failure("attach", &error);
        let container = self.containers.get_mut(id).ok_or_else(|| Self::no_container(id))?;
        if !matches!(container.stage, Stage::Created { .. } | Stage::Starting { .. } | Stage::Running) {
            return Err(failure(FailureKind::WrongState, format!("container {id} does not run")));
        }
        if container.tty && stderr {
            return Err(failure(FailureKind::Invalid, "a terminal has no separate stderr"));
        }
        let mut fds: Vec<OwnedFd> = Vec::new();
        let mut hand_out = |fd: OwnedFd| -> Option<FdIndex> {
            fds.push(fd);
            Some(fds.len() as FdIndex - 1)
        };
        let mut reply = (None, None, None);
        if stdin {
            let fd = match (container.tty, container.stdin_once) {
                (true, _) if container.has_stdin => container.outputs.first().map(OwnedFd::try_clone).transpose(),
                (true, _) => Ok(None),
                (false, true) => Ok(container.stdin.take()),
                (false, false) => container.stdin.as_ref().map(OwnedFd::try_clone).transpose(),
            };
            // None left, as after a client that was to be the only one: that is no reason to keep the outputs from this one.
            reply.0 = fd.map_err(system)?.and_then(&mut hand_out);
        }
        let mut taps = Vec::new();
        for (wanted, is_stderr, place) in [(stdout, false, &mut reply.1), (stderr, true, &mut reply.2)] {
            if !wanted {
                continue;
            }
            let (reader, writer) = pipe().map_err(system)?;
            set_nonblocking(&writer).map_err(system)?;
            let _ = rustix::pipe::fcntl_setpipe_size(&writer, TAP_BYTES);
            *place = hand_out(reader);
            taps.push((is_stderr, writer));
        }
        for (stderr, writer) in taps {
            self.tell_writer(&ToWriter::Tap { id: id.to_owned(), stderr }, vec![writer]);
        }
        Ok((Reply::Attached { stdin: reply.0, stdout: reply.1, stderr: reply.2 }, fds))
    }

    pub(super) fn resize(&mut self, id: &str, exec: Option<&str>, width: u16, height: u16) -> Result<(), Failure> {
        if let Some(exec) = exec {
            // It is in the hands of whoever asked for the exec, who can set its size, and hangs it up by letting go of it.
            return Err(failure(FailureKind::WrongState, format!("the terminal of exec {exec} is not here")));
        }
        let container = self.containers.get(id).ok_or_else(|| Self::no_container(id))?;
        let terminal = container.outputs.first().filter(|_| container.tty);
        let Some(terminal) = terminal else {
            return Err(failure(FailureKind::WrongState, format!("container {id} has no such terminal")));
        };
        tty::set_window_size(terminal.as_fd(), width, height).map_err(|error| system_failure("resize the terminal", &error))
    }

    pub(super) fn close_stdin(&mut self, id: &str) -> Result<(), Failure> {
        let container = self.containers.get_mut(id).ok_or_else(|| Self::no_container(id))?;
        container.stdin = None;
        Ok(())
    }

    pub(super) fn reopen_log(&mut self, to: ReplyTo, id: &str) {
        let Some(container) = self.containers.get(id) else {
            return self.answer(to, Reply::Error(Self::no_container(id)));
        };
        let running = matches!(container.stage, Stage::Created { .. } | Stage::Starting { .. } | Stage::Running);
        if !running || container.log.is_none() {
            let text = format!("container {id} does not run, or has no log");
            return self.answer(to, Reply::Error(failure(FailureKind::WrongState, text)));
        }
        self.ask_reopen(to, id);
    }
}
