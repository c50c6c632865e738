//! Killing a process with all that it started: its session and its descendants. For forked children only: it waits.

use std::collections::BTreeSet;

use berth_cgroup::Layout;
use berth_linux::Pid;
use berth_linux::pidfd::PidFd;

use crate::cgroups;
use crate::error::Error;

/// Rounds of looking for descendants before giving up.
const MAX_ROUNDS: usize = 100;

/// Kills the leader (of those in a cgroup, where one is named), its session and their descendants until none is left. Whoever is killed cannot fork any more, so each round finds
/// only what escaped the one before.
pub fn kill(within: Option<(&Layout, &str)>, leader: Pid) -> Result<(), Error> {
    kill_all(within, |table| tree_of(leader.as_raw_nonzero().get(), table))
}

/// Kills all that a process has started, and not itself. Of a subreaper that is everything, whoever started it.
pub fn kill_descendants(ancestor: Pid) -> Result<(), Error> {
    kill_all(None, |table| with_descendants(BTreeSet::new(), ancestor.as_raw_nonzero().get(), table))
}

fn kill_all(within: Option<(&Layout, &str)>, find: impl Fn(&[Process]) -> BTreeSet<i32>) -> Result<(), Error> {
    for _ in 0..MAX_ROUNDS {
        let table: Vec<Process> = candidates(within).into_iter().filter_map(Process::read).collect();
        let tree = find(&table);
        let mut changed = false;
        // All are held before the first is killed: its children get another parent.
        let mut members = Vec::new();
        for process in table.into_iter().filter(|process| tree.contains(&process.pid)) {
            match hold(process)? {
                Held::Same(pidfd) => members.push(pidfd),
                Held::Gone => {}
                Held::Changed => changed = true,
            }
        }
        let alive: Vec<PidFd> = members.into_iter().filter(|pidfd| pidfd.signal(9).is_ok()).collect();
        if alive.is_empty() && !changed {
            return Ok(());
        }
        for pidfd in &alive {
            let _ = pidfd.wait_ended(Some(std::time::Duration::from_millis(200)));
        }
    }
    Err(Error::Helper("processes of the tree are still alive".into()))
}

/// A process that was looked at before it was held.
enum Held {
    Same(PidFd),
    /// It has another parent by now, or its pid is another's: the next round decides.
    Changed,
    Gone,
}

/// Holds a process and looks again: a pid that is another's by the time of the signal is never hit. Only the tree's are held, for a
/// machine has more processes than the shim may have descriptors.
fn hold(process: Process) -> Result<Held, Error> {
    let Some(pid) = Pid::from_raw(process.pid) else { return Ok(Held::Gone) };
    let pidfd = match PidFd::open(pid) {
        Ok(pidfd) => pidfd,
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => return Ok(Held::Gone),
        Err(error) => return Err(Error::io("hold a process")(error)),
    };
    Ok(match Process::read(pid) {
        None => Held::Gone,
        Some(now) if now == process => Held::Same(pidfd),
        Some(_) => Held::Changed,
    })
}

/// All processes among which the tree's are: the cgroup's, or without one everybody.
fn candidates(within: Option<(&Layout, &str)>) -> Vec<Pid> {
    if let Some((layout, cgroup)) = within {
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
    let tree = table.iter().filter(|process| process.pid == leader || process.session == leader).map(|process| process.pid);
    with_descendants(tree.collect(), leader, table)
}

/// What is in the set, with the descendants of these and of the ancestor.
fn with_descendants(mut tree: BTreeSet<i32>, ancestor: i32, table: &[Process]) -> BTreeSet<i32> {
    loop {
        let more: Vec<i32> = table
            .iter()
            .filter(|process| !tree.contains(&process.pid) && (tree.contains(&process.parent) || process.parent == ancestor))
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
        assert_eq!(with_descendants(BTreeSet::new(), 11, &without_leader).into_iter().collect::<Vec<_>>(), [12, 13]);
    }

    #[test]
    fn what_a_process_has_started_is_killed_and_not_the_process_itself() {
        use std::process::{Command, Stdio};
        // A child, and one with a child of its own.
        let mut shell = Command::new("sh");
        shell.args(["-c", "sleep 1000 & sh -c \"sleep 1000; true\" & echo made; wait; exit 7"]).stdout(Stdio::piped());
        let mut shell = shell.spawn().unwrap();
        std::io::Read::read_exact(shell.stdout.as_mut().unwrap(), &mut [0; 5]).unwrap();
        let pid = Pid::from_raw(i32::try_from(shell.id()).unwrap()).unwrap();
        let status = berth_testkit::wait_for(std::time::Duration::from_secs(10), || {
            kill_descendants(pid).unwrap();
            shell.try_wait().unwrap()
        });
        assert_eq!(status.and_then(|status| status.code()), Some(7));
    }
}
