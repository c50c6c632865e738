//! Sweepers: forked children that kill and remove what may take a while to die.

use std::os::fd::{AsFd, BorrowedFd};

use berth_cgroup::Layout;
use berth_linux::pidfd::PidFd;
use berth_linux::{Pid, prctl};
use berth_shim::protocol::{Failure, FailureKind, Reply};

use super::{Daemon, ReplyTo, Wait, failure, set_nonblocking, system_failure};
use crate::error::Error;
use crate::foreign::Instance;
use crate::{cgroups, child, tree};

/// What a sweeper does.
pub enum Sweep {
    /// Kills every process of a cgroup.
    Kill { cgroup: String },
    /// Kills every process of a cgroup and removes it; a foreign runtime forgets the container.
    Delete { cgroup: String, foreign: Option<Instance> },
    /// Sends a signal to the first process by its runtime.
    Signal { foreign: Instance, init: PidFd, signal: i32 },
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
        let forked = child::fork_reporting(&sweep.descriptors(), || {
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
            After::NotCreated { id, failure } => self.not_created(&id, failure, result),
            After::Reply(to) => self.answer(to, result.map_or_else(Reply::Error, |()| Reply::Done)),
            After::Nothing => {}
        }
    }
}

impl Sweep {
    fn is_nothing(&self) -> bool {
        match self {
            Sweep::Kill { cgroup } | Sweep::Delete { cgroup, foreign: None } => cgroup.is_empty(),
            Sweep::Delete { .. } | Sweep::Signal { .. } | Sweep::KillTree { .. } => false,
        }
    }

    /// Descriptors that the sweeper needs.
    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Sweep::Signal { init, .. } => vec![init.as_fd()],
            _ => Vec::new(),
        }
    }

    /// Sweeper.
    fn run(&self, layout: &Layout) -> Result<(), Error> {
        match self {
            Sweep::Kill { cgroup } => cgroups::kill(layout, cgroup),
            Sweep::Delete { cgroup, foreign: None } => cgroups::remove(layout, cgroup),
            Sweep::Delete { cgroup, foreign: Some(foreign) } => {
                cgroups::kill(layout, cgroup)?;
                let forgotten = foreign.delete();
                cgroups::remove(layout, cgroup)?;
                Ok(forgotten?)
            }
            Sweep::Signal { foreign, init, signal } => Ok(foreign.signal(*signal, init)?),
            Sweep::KillTree { cgroup, leader } => tree::kill((!cgroup.is_empty()).then_some((layout, cgroup)), *leader),
        }
    }
}
