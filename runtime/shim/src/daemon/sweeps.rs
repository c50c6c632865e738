//! Sweepers: forked children that kill and remove what may take a while to die.

use std::collections::BTreeSet;

use berth_cgroup::Layout;
use berth_linux::Pid;
use berth_linux::pidfd::PidFd;
use berth_linux::prctl;
use berth_shim::protocol::{Failure, FailureKind, Reply};

use super::{Daemon, ReplyTo, Wait, failure, set_nonblocking, system_failure};
use crate::error::Error;
use crate::{cgroups, child};

/// Rounds of looking for an exec's descendants before giving up.
const MAX_ROUNDS: usize = 100;

/// What a sweeper does.
pub enum Sweep {
    /// Kills every process of a cgroup.
    Kill { cgroup: String },
    /// Kills every process of a cgroup and removes it.
    Delete { cgroup: String },
    /// Kills a process, its session and its descendants, as far as they are in the cgroup.
    KillTree { cgroup: String, leader: Pid },
}

/// What follows.
pub enum After {
    /// The rest of a container's cgroup is dead.
    Ended { id: String },
    /// A container's cgroup is gone.
    Deleted { id: String },
    /// What a dead creator left is gone.
    NotCreated { id: String, failure: Failure },
    /// Somebody waits for it.
    Reply(ReplyTo),
    /// Nobody waits for it.
    Nothing,
}

impl Daemon {
    pub(super) fn sweep(&mut self, sweep: Sweep, after: After) {
        if sweep.is_nothing() {
            return self.swept(after, b"");
        }
        let layout = &self.parts.layout;
        let forked = child::fork_reporting(&[], || {
            let _ = prctl::set_name(c"berth-sweep");
            sweep.run(layout)
        });
        let fd = match forked.and_then(|(_, _, fd)| set_nonblocking(&fd).map(|()| fd)) {
            Ok(fd) => fd,
            Err(error) => return self.swept(after, system_failure("fork a sweeper", &error).message.as_bytes()),
        };
        let wait = Wait::Sweeping { fd, text: Vec::new(), after };
        // Should even this fail, the sweeper works unheard, and who waits is not answered: the descriptor limit is used up.
        let _ = self.add_wait(wait);
    }

    /// A sweeper has ended; `text` is its error.
    pub(super) fn swept(&mut self, after: After, text: &[u8]) {
        let result = match text {
            b"" => Ok(()),
            text => Err(failure(FailureKind::System, String::from_utf8_lossy(text))),
        };
        match after {
            // Whatever could not be killed: the first process has ended, and that is not kept secret.
            After::Ended { id } => self.container_ended(&id),
            After::Deleted { id } => self.deleted(&id, result),
            After::NotCreated { id, failure } => self.not_created(&id, failure),
            After::Reply(to) => self.answer(to, result.map_or_else(Reply::Error, |()| Reply::Done)),
            After::Nothing => {}
        }
    }
}

impl Sweep {
    fn is_nothing(&self) -> bool {
        match self {
            Sweep::Kill { cgroup } | Sweep::Delete { cgroup } => cgroup.is_empty(),
            Sweep::KillTree { .. } => false,
        }
    }

    /// Sweeper.
    fn run(&self, layout: &Layout) -> Result<(), Error> {
        match self {
            Sweep::Kill { cgroup } => cgroups::kill(layout, cgroup),
            Sweep::Delete { cgroup } => cgroups::remove(layout, cgroup),
            Sweep::KillTree { cgroup, leader } => kill_tree(layout, cgroup, *leader),
        }
    }
}

/// Kills the leader, its session and their descendants until none is left. Whoever is killed cannot fork any more, so each round finds
/// only what escaped the one before.
fn kill_tree(layout: &Layout, cgroup: &str, leader: Pid) -> Result<(), Error> {
    for _ in 0..MAX_ROUNDS {
        // Each is held before it is looked at: a pid that is another's by the time of the signal is never hit.
        let hold = |pid| Some((PidFd::open(pid).ok()?, Process::read(pid)?));
        let (held, table): (Vec<PidFd>, Vec<Process>) = candidates(layout, cgroup).into_iter().filter_map(hold).unzip();
        let tree = tree_of(leader.as_raw_nonzero().get(), &table);
        let members = held.into_iter().zip(&table).filter(|(_, process)| tree.contains(&process.pid));
        let alive: Vec<PidFd> = members.map(|(pidfd, _)| pidfd).filter(|pidfd| pidfd.signal(9).is_ok()).collect();
        if alive.is_empty() {
            return Ok(());
        }
        for pidfd in &alive {
            let _ = pidfd.wait_ended(Some(std::time::Duration::from_millis(200)));
        }
    }
    Err(Error::Helper("processes of the exec are still alive".into()))
}

/// All processes among which the exec's are: the cgroup's, or without one everybody.
fn candidates(layout: &Layout, cgroup: &str) -> Vec<Pid> {
    if !cgroup.is_empty() {
        return cgroups::processes(layout, cgroup);
    }
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries.flatten().filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)).collect()
}

/// A line of the process table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Process {
    pid: i32,
    parent: i32,
    session: i32,
}

impl Process {
    /// `None` for one that has ended.
    fn read(pid: Pid) -> Option<Self> {
        let pid = pid.as_raw_nonzero().get();
        Self::parse(pid, &std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// The name in parentheses may hold anything, parentheses and blanks too: what counts is behind the last one.
    fn parse(pid: i32, stat: &str) -> Option<Self> {
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        let state = fields.next()?;
        let parent = fields.next()?.parse().ok()?;
        let session = fields.nth(1)?.parse().ok()?;
        (state != "Z" && state != "X").then_some(Self { pid, parent, session })
    }
}

/// The leader, the members of its session, and all their descendants. A session counts only when it is the leader's own.
fn tree_of(leader: i32, table: &[Process]) -> BTreeSet<i32> {
    let mut tree: BTreeSet<i32> =
        table.iter().filter(|process| process.pid == leader || process.session == leader).map(|process| process.pid).collect();
    loop {
        let more: Vec<i32> = table
            .iter()
            .filter(|process| !tree.contains(&process.pid) && (tree.contains(&process.parent) || process.parent == leader))
            .map(|process| process.pid)
            .collect();
        if more.is_empty() {
            return tree;
        }
        tree.extend(more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_lines_are_read_whatever_the_name() {
        let line = "42 (a) b (c) S 7 41 40 0 -1 4194304 85 0";
        assert_eq!(Process::parse(42, line), Some(Process { pid: 42, parent: 7, session: 40 }));
        assert_eq!(Process::parse(42, "42 (x) Z 7 41 40 0"), None);
        assert_eq!(Process::parse(42, "42 (x"), None);
    }

    #[test]
    fn the_tree_of_an_exec_is_its_session_and_its_descendants() {
        let table: Vec<Process> = [
            (1, 0, 1),    // the container's init
            (10, 99, 10), // the exec's leader (its parent is the shim)
            (11, 10, 10), // its child
            (12, 11, 12), // a grandchild with a session of its own
            (13, 12, 12),
            (14, 1, 10), // an orphan of the session
            (20, 1, 1),  // the container's
            (21, 99, 21),
        ]
        .map(|(pid, parent, session)| Process { pid, parent, session })
        .to_vec();
        assert_eq!(tree_of(10, &table).into_iter().collect::<Vec<_>>(), [10, 11, 12, 13, 14]);
        let without_leader: Vec<Process> = table.into_iter().filter(|process| process.pid != 10).collect();
        assert_eq!(tree_of(10, &without_leader).into_iter().collect::<Vec<_>>(), [11, 12, 13, 14]);
    }
}
