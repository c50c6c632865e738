//! The shim's side of the log writer: starting it, telling it what to read, starting it again when it dies.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

use berth_linux::child::close_from;
use berth_linux::epoll::EventFlags;
use berth_linux::pidfd::PidFd;
use berth_linux::process::CloneArgs;
use berth_linux::{Pid, prctl};
use berth_shim::protocol::{Failure, FailureKind};

use super::{Daemon, ReplyTo, WRITER, failure};
use crate::child;
use crate::clock::monotonic_ms;
use crate::link::Link;
use crate::logs::{FromWriter, ToWriter, writer};

/// A writer that dies sooner is not started again at once.
const SETTLED_MS: u64 = 1000;

/// The log writer as the shim sees it.
#[derive(Default)]
pub struct LogWriter {
    link: Option<Link>,
    process: Option<(Pid, PidFd)>,
    started_at: u64,
    /// When it is started again.
    pub retry_at: Option<u64>,
    reopens: BTreeMap<u64, (ReplyTo, String)>,
    next_ticket: u64,
    /// Bytes of output that could not be written, in all.
    pub dropped: u64,
}

impl LogWriter {
    /// Whether its process has not been reaped.
    pub fn is_running(&self) -> bool {
        self.process.is_some()
    }

    /// Whether this is its process.
    pub fn is_process(&self, pid: Pid) -> bool {
        self.process.as_ref().is_some_and(|(other, _)| *other == pid)
    }
}

impl Daemon {
    /// Forks the writer and hands it all output that has not been read to its end.
    pub(super) fn start_writer(&mut self) {
        self.logs.retry_at = None;
        if self.logs.process.is_some() {
            return;
        }
        let forked = Link::pair().and_then(|(ours, theirs)| {
            let process = child::fork(CloneArgs::default(), || {
                if close_from(3, &[theirs.as_fd()]).is_err() {
                    return 1;
                }
                let _ = prctl::set_name(c"berth-log");
                i32::from(writer::run(theirs).is_err())
            })?;
            self.epoll.add(ours.as_fd(), WRITER, EventFlags::IN)?;
            Ok((ours, process))
        });
        self.logs.started_at = monotonic_ms();
        let Ok((link, process)) = forked else {
            // No memory for a process now: the containers' pipes hold what they can until the next try.
            self.logs.retry_at = Some(monotonic_ms() + SETTLED_MS);
            return;
        };
        self.logs.link = Some(link);
        self.logs.process = Some(process);
        let ids: Vec<String> = self.containers.iter().filter(|(_, c)| c.unread().is_some()).map(|(id, _)| id.clone()).collect();
        for id in ids {
            self.hand_over(&id);
        }
    }

    /// Has the output of a new container read.
    pub(super) fn add_output(&mut self, id: &str) {
        if self.logs.process.is_some() {
            self.hand_over(id);
        } else if self.logs.retry_at.is_none() {
            self.start_writer();
        }
    }

    fn hand_over(&mut self, id: &str) {
        let Some((outputs, log)) = self.containers.get(id).and_then(|container| container.unread()) else {
            return;
        };
        let message = ToWriter::Add { id: id.to_owned(), log: log.clone() };
        let fds: std::io::Result<Vec<OwnedFd>> = outputs.iter().map(OwnedFd::try_clone).collect();
        match fds {
            Ok(fds) => self.tell_writer(&message, fds),
            // Out of descriptors: as if the writer had died.
            Err(_) => self.kill_writer(),
        }
    }

    /// Sends a message; a writer that does not take it is killed, and started again when that has been seen.
    pub(super) fn tell_writer(&mut self, message: &ToWriter, fds: Vec<OwnedFd>) {
        let Some(link) = &mut self.logs.link else {
            return;
        };
        if link.send(message, fds).is_err() {
            return self.kill_writer();
        }
        let mut interest = EventFlags::IN;
        if link.wants_write() {
            interest |= EventFlags::OUT;
        }
        let _ = self.epoll.modify(link.as_fd(), WRITER, interest);
    }

    /// Lets go of the writer: it ends when all output has.
    pub(super) fn release_writer(&mut self) {
        if let Some(link) = self.logs.link.take() {
            let _ = self.epoll.delete(link.as_fd());
        }
    }

    pub(super) fn kill_writer(&mut self) {
        self.release_writer();
        if let Some((_, pidfd)) = &self.logs.process {
            let _ = pidfd.signal(9);
        }
    }

    pub(super) fn serve_writer(&mut self) {
        let Some(link) = &mut self.logs.link else {
            return;
        };
        let open = link.flush().is_ok() && link.take_in();
        let mut interest = EventFlags::IN;
        if link.wants_write() {
            interest |= EventFlags::OUT;
        }
        let _ = self.epoll.modify(link.as_fd(), WRITER, interest);
        while let Some(link) = &mut self.logs.link {
            match link.next::<FromWriter>() {
                Ok(Some((message, _))) => self.hear_writer(message),
                Ok(None) => break,
                Err(_) => return self.kill_writer(),
            }
        }
        if !open {
            self.kill_writer();
        }
    }

    fn hear_writer(&mut self, message: FromWriter) {
        match message {
            FromWriter::Opened { id, error } => self.log_opened(&id, error),
            FromWriter::Drained { id } => self.output_drained(&id),
            FromWriter::Dropped { bytes } => self.logs.dropped += bytes,
            FromWriter::Reopened { ticket, error } => {
                let Some((to, id)) = self.logs.reopens.remove(&ticket) else {
                    return;
                };
                let result = match error {
                    None => {
                        self.log_reopened(&id);
                        Ok(())
                    }
                    Some(error) => Err(Failure { kind: FailureKind::Log, message: error.message, errno: error.errno }),
                };
                self.answer_result(to, result);
            }
        }
    }

    pub(super) fn ask_reopen(&mut self, to: ReplyTo, id: &str) {
        if self.logs.link.is_none() {
            let failure = failure(FailureKind::Log, "the log writer is being started again");
            return self.answer_result(to, Err(failure));
        }
        let ticket = self.logs.next_ticket;
        self.logs.next_ticket += 1;
        self.logs.reopens.insert(ticket, (to, id.to_owned()));
        self.tell_writer(&ToWriter::Reopen { id: id.to_owned(), ticket }, Vec::new());
    }

    /// The writer has been reaped.
    pub(super) fn writer_died(&mut self) {
        self.release_writer();
        self.logs.process = None;
        for (to, _) in std::mem::take(&mut self.logs.reopens).into_values() {
            self.answer_result(to, Err(failure(FailureKind::Log, "the log writer died")));
        }
        let unread = self.containers.values().any(|container| container.unread().is_some());
        if unread && self.shutdown.is_none() {
            let now = monotonic_ms();
            if now < self.logs.started_at + SETTLED_MS {
                self.logs.retry_at = Some(now + SETTLED_MS);
            } else {
                self.start_writer();
            }
        }
        self.go_on_shutting_down();
    }
}
