//! The shim's loop and its state: one thread, level-triggered epoll, no call that can sleep on storage. What can sleep is done by
//! forked children (creators, sweepers, the log writer) that report over descriptors which the loop waits for.

mod attach;
mod connections;
mod containers;
mod ends;
mod execs;
mod logging;
mod reap;
mod sweeps;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use berth_cgroup::Layout;
use berth_linux::Pid;
use berth_linux::epoll::{Epoll, EventFlags, Ready};
use berth_linux::pidfd::ExitStatus;
use berth_linux::signalfd::SignalFd;
use berth_oci::Heard;
use berth_shim::protocol::{Event, Failure, FailureKind, Reply};

use crate::clock::monotonic_ms;
use crate::exit_record::ExitRecords;
use crate::link::Link;
use crate::pod::Pod;

use connections::Connection;
use containers::Container;
use execs::{Entered, Exec};
use logging::LogWriter;
use sweeps::After;

const LISTENER: u64 = 0;
const SIGNALS: u64 = 1;
const WRITER: u64 = 2;
/// Tokens from here on are given out once each, to connections and waits.
const FIRST_FREE: u64 = 16;

/// Memory is given back when nothing has happened for so long.
const IDLE_MS: u64 = 500;
/// The log writer may take so long to end at a shutdown.
const WRITER_END_MS: u64 = 2000;

/// Where an answer goes.
#[derive(Debug, Clone, Copy)]
struct ReplyTo {
    connection: u64,
    seq: u64,
}

/// What else the loop waits for, besides connections, signals and the log writer.
enum Wait {
    /// A container's creator.
    Creating { id: String, link: Link, gate: OwnedFd, creator: Pid },
    /// An exec's creator.
    ExecCreating { id: String, link: Link, creator: Pid },
    /// The end of a `started` pipe.
    Starting { id: String, fd: OwnedFd, text: Vec<u8> },
    /// The end of an exec's `started` pipe.
    ExecStarting { id: String, fd: OwnedFd, text: Vec<u8> },
    /// The end of an entrant's socket; what it says on the way can wait until then.
    ExecEntering { id: String, socket: OwnedFd, heard: Heard },
    /// A sweeper's report.
    Sweeping { fd: OwnedFd, text: Vec<u8>, after: After },
}

impl Wait {
    fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Wait::Creating { link, .. } | Wait::ExecCreating { link, .. } => link.as_fd(),
            Wait::ExecEntering { socket, .. } => socket.as_fd(),
            Wait::Starting { fd, .. } | Wait::ExecStarting { fd, .. } | Wait::Sweeping { fd, .. } => fd.as_fd(),
        }
    }
}

/// Longest report that is kept.
const MAX_REPORT: usize = 64 * 1024;

/// Takes in what a non-blocking pipe holds; `true` when it has ended.
fn read_to_end(fd: &OwnedFd, text: &mut Vec<u8>) -> bool {
    let mut buffer = [0u8; 1024];
    loop {
        match rustix::io::retry_on_intr(|| rustix::io::read(fd, &mut buffer)) {
            Ok(0) => return true,
            Ok(count) if text.len() < MAX_REPORT => text.extend_from_slice(&buffer[..count]),
            Ok(_) => {}
            Err(rustix::io::Errno::AGAIN) => return false,
            Err(_) => return true,
        }
    }
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    Ok(rustix::io::ioctl_fionbio(fd, true)?)
}

/// A shutdown under way.
struct Shutdown {
    reply: Option<ReplyTo>,
    /// When the log writer is killed.
    deadline: Option<u64>,
}

/// What the start made, for the loop to own.
pub struct Parts {
    /// The sandbox.
    pub sandbox_id: String,
    /// Where exit records go.
    pub records: ExitRecords,
    /// Where cgroups are.
    pub layout: Layout,
    /// What containers share.
    pub pod: Pod,
    /// SIGCHLD, and what is ignored.
    pub signals: SignalFd,
    /// Agents connect here.
    pub listener: OwnedFd,
    /// The score that the shim had before it protected itself.
    pub oom_score_adj: Option<i32>,
}

/// The shim.
pub struct Daemon {
    parts: Parts,
    epoll: Epoll,
    connections: BTreeMap<u64, Connection>,
    waits: BTreeMap<u64, Wait>,
    next_token: u64,
    containers: BTreeMap<String, Container>,
    execs: BTreeMap<String, Exec>,
    entered: Option<Entered>,
    /// When to look for cgroups that need not be held open.
    doors_until: Option<u64>,
    logs: LogWriter,
    /// Children that ended while a creator might still have to report them.
    unclaimed: Vec<(Pid, ExitStatus, i64)>,
    trim_at: Option<u64>,
    /// When connections are accepted again.
    accept_at: Option<u64>,
    shutdown: Option<Shutdown>,
    done: bool,
}

fn failure(kind: FailureKind, message: impl Into<String>) -> Failure {
    Failure { kind, message: message.into(), errno: None }
}

fn system_failure(what: &str, error: &io::Error) -> Failure {
    Failure { kind: FailureKind::System, message: format!("{what}: {error}"), errno: error.raw_os_error() }
}

impl Daemon {
    /// Takes over from the start.
    pub fn new(parts: Parts) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        epoll.add(parts.listener.as_fd(), LISTENER, EventFlags::IN)?;
        epoll.add(parts.signals.as_fd(), SIGNALS, EventFlags::IN)?;
        Ok(Self {
            parts,
            epoll,
            connections: BTreeMap::new(),
            waits: BTreeMap::new(),
            next_token: FIRST_FREE,
            containers: BTreeMap::new(),
            execs: BTreeMap::new(),
            entered: None,
            doors_until: None,
            logs: LogWriter::default(),
            unclaimed: Vec::new(),
            trim_at: Some(monotonic_ms()),
            accept_at: None,
            shutdown: None,
            done: false,
        })
    }

    /// Serves until a shutdown is complete.
    pub fn run(&mut self) -> io::Result<()> {
        let mut ready: Vec<Ready> = Vec::new();
        while !self.done {
            ready.clear();
            self.epoll.wait(&mut ready, self.timeout())?;
            // Reports come before deaths: a creator's report names the child whose death may be in the same batch.
            for event in ready.iter().filter(|event| event.token != SIGNALS) {
                match event.token {
                    LISTENER => self.accept(),
                    WRITER => self.serve_writer(),
                    token if self.connections.contains_key(&token) => self.serve_connection(token, event.flags),
                    token => self.serve_wait(token),
                }
            }
            if ready.iter().any(|event| event.token == SIGNALS) {
                self.reap();
            }
            self.expire();
            if !ready.is_empty() {
                self.trim_at = Some(monotonic_ms() + IDLE_MS);
            }
        }
        Ok(())
    }

    fn timeout(&self) -> Option<Duration> {
        let shutdown = self.shutdown.as_ref().and_then(|shutdown| shutdown.deadline);
        let next = [self.trim_at, self.accept_at, self.logs.retry_at, self.doors_until, shutdown].into_iter().flatten().min()?;
        Some(Duration::from_millis(next.saturating_sub(monotonic_ms())))
    }

    fn expire(&mut self) {
        let now = monotonic_ms();
        if self.trim_at.is_some_and(|at| at <= now) {
            self.trim_at = None;
            berth_linux::heap::trim();
        }
        if self.accept_at.is_some_and(|at| at <= now) {
            self.listen_again();
        }
        if self.doors_until.is_some_and(|at| at <= now) {
            self.release_doors(now);
        }
        if self.logs.retry_at.is_some_and(|at| at <= now) {
            self.start_writer();
        }
        if self.shutdown.as_ref().and_then(|shutdown| shutdown.deadline).is_some_and(|at| at <= now) {
            self.kill_writer();
        }
    }

    fn add_wait(&mut self, wait: Wait) -> io::Result<()> {
        let token = self.next_token;
        self.next_token += 1;
        let interest = match wait {
            // Hang-ups are told always.
            Wait::ExecEntering { .. } => EventFlags::empty(),
            _ => EventFlags::IN,
        };
        self.epoll.add(wait.fd(), token, interest)?;
        self.waits.insert(token, wait);
        Ok(())
    }

    fn end_wait(&mut self, token: u64) -> Option<Wait> {
        let wait = self.waits.remove(&token)?;
        // Deleted by hand: a child forked meanwhile may hold the file too.
        let _ = self.epoll.delete(wait.fd());
        Some(wait)
    }

    fn serve_wait(&mut self, token: u64) {
        match self.waits.get(&token) {
            Some(Wait::Creating { .. }) => self.read_creator(token),
            Some(Wait::ExecCreating { .. }) => self.read_exec_creator(token),
            Some(Wait::ExecEntering { .. }) => self.read_entrant(token),
            Some(Wait::Starting { .. } | Wait::ExecStarting { .. } | Wait::Sweeping { .. }) => self.read_text(token),
            None => {}
        }
    }

    /// Reads a report whose end is the news.
    fn read_text(&mut self, token: u64) {
        let Some(Wait::Starting { fd, text, .. } | Wait::ExecStarting { fd, text, .. } | Wait::Sweeping { fd, text, .. }) =
            self.waits.get_mut(&token)
        else {
            return;
        };
        if !read_to_end(fd, text) {
            return;
        }
        match self.end_wait(token) {
            Some(Wait::Starting { id, text, .. }) => self.container_started(&id, &text),
            Some(Wait::ExecStarting { id, text, .. }) => self.exec_started(&id, &text),
            Some(Wait::Sweeping { text, after, .. }) => self.swept(after, &text),
            _ => {}
        }
    }

    fn answer(&mut self, to: ReplyTo, reply: Reply) {
        self.answer_with(to, reply, Vec::new());
    }

    fn answer_result(&mut self, to: ReplyTo, result: Result<(), Failure>) {
        let reply = match result {
            Ok(()) => Reply::Done,
            Err(failure) => Reply::Error(failure),
        };
        self.answer(to, reply);
    }

    fn publish(&mut self, event: &Event) {
        let subscribers: Vec<u64> =
            self.connections.iter().filter(|(_, connection)| connection.subscribed).map(|(token, _)| *token).collect();
        for token in subscribers {
            self.tell(token, event.clone());
        }
    }
}
