//! The ends of children: whose child was it, and what follows.

use berth_linux::Pid;
use berth_linux::pidfd::{ExitStatus, PidFd, waitid_any};
use berth_shim::protocol::Event;

use super::{Daemon, Wait};
use crate::clock;

impl Daemon {
    /// Reaps every child that has ended, adopted orphans too.
    pub(super) fn reap(&mut self) {
        // Only SIGCHLD means something; the others are taken so that they are ignored.
        while let Ok(Some(_)) = self.parts.signals.read() {}
        while let Ok(Some((pid, status))) = waitid_any(true) {
            self.reaped(pid, status, clock::now_ns());
        }
        let creating = |wait: &Wait| matches!(wait, Wait::Creating { .. } | Wait::ExecCreating { .. });
        if !self.waits.values().any(creating) {
            self.unclaimed = Vec::new();
        }
    }

    fn reaped(&mut self, pid: Pid, status: ExitStatus, now: i64) {
        if let Some(id) = self.containers.iter().find(|(_, c)| c.is_init(pid)).map(|(id, _)| id.clone()) {
            return self.container_exited(&id, status, now);
        }
        if let Some(id) = self.exec_of(pid) {
            return self.exec_exited(&id, status);
        }
        if self.logs.is_process(pid) {
            return self.writer_died();
        }
        if self.parts.pod.pause.as_ref().is_some_and(|pause| pause.pid == pid) {
            self.parts.pod.pause = None;
            self.publish(&Event::PauseExited { pid: pid.as_raw_nonzero().get() });
            return self.go_on_shutting_down();
        }
        let made_by =
            |wait: &Wait| matches!(wait, Wait::Creating { creator, .. } | Wait::ExecCreating { creator, .. } if *creator == pid);
        if let Some(token) = self.waits.iter().find(|(_, wait)| made_by(wait)).map(|(token, _)| *token) {
            return self.creator_ended(token);
        }
        // An orphan, a sweeper, or the child of a creator whose report has not been read.
        self.unclaimed.push((pid, status, now));
    }

    /// A creator has ended whose report has not been read: it is read now. (The end of its socket does not come while the init that
    /// it made holds a copy.)
    fn creator_ended(&mut self, token: u64) {
        self.serve_wait(token);
        if let Some(Wait::Creating { link, .. } | Wait::ExecCreating { link, .. }) = self.waits.get_mut(&token) {
            let _ = rustix::net::shutdown(&*link, rustix::net::Shutdown::Both);
            self.serve_wait(token);
        }
    }

    /// The end of a child that was reaped before its creator's report was read. One that lives is not meant: its pid was an orphan's before.
    pub(super) fn take_unclaimed(&mut self, pid: Pid, pidfd: &PidFd) -> Option<(ExitStatus, i64)> {
        if pidfd.is_alive().unwrap_or(true) {
            return None;
        }
        let at = self.unclaimed.iter().rposition(|(other, ..)| *other == pid)?;
        let (_, status, ended_at) = self.unclaimed.swap_remove(at);
        Some((status, ended_at))
    }
}
