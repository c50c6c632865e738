//! The birth of a process, and what is done for it from outside until it waits at its gate.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use berth_cgroup::{Cgroup, Placement};
use berth_linux::ns::{self, IdMap, NamespaceKind};
use berth_linux::pidfd::PidFd;
use berth_linux::process::{CloneArgs, CloneFlags, Fork, clone3, exit_now};
use berth_linux::{prctl, rlimit};
use rustix::process::Pid;

use super::{Init, Parentage};
use crate::Error;
use crate::channel::{Channel, Report};
use crate::hooks::{HookState, run_hooks};
use crate::init::{self, Child, Work};
use crate::plan::{Plan, ProcessPlan};
use crate::spec::Spec;

/// A control group of v2 that has given controllers to groups below it takes no processes itself.
const EBUSY: i32 = 16;

/// The limit on memory leaves no room for another process.
const ENOMEM: i32 = 12;

/// Whether a group's own memory limit was met, which nothing but the first process can have done yet: kills are counted for the limits
/// of the groups above too.
fn has_met_its_limit(cgroup: &Cgroup) -> bool {
    cgroup.stats().is_ok_and(|stats| stats.memory.limit_hits > 0)
}

/// What the launcher does for the process from outside.
#[derive(Default)]
pub(super) struct ParentPlan {
    pub(super) process: ProcessPlan,
    pub(super) id_maps: Option<(Vec<IdMap>, Vec<IdMap>)>,
    pub(super) warnings: Vec<String>,
}

impl ParentPlan {
    pub(super) fn of(plan: &Plan) -> Self {
        let new_user = plan.new.contains(CloneFlags::NEWUSER);
        Self { process: plan.process.clone(), id_maps: new_user.then(|| plan.id_maps.clone()), warnings: plan.warnings.clone() }
    }

    /// What needs the machine's own privileges, of another process or of this: the limits' ceilings and the memory score. What is not
    /// allowed is left as it is.
    pub(super) fn raise(&mut self, pid: Option<Pid>) {
        for (_, resource, limit) in &self.process.rlimits {
            let now = rlimit::get(*resource);
            if limit.hard > now.hard {
                // The process itself says what came of it.
                let _ = rlimit::set_clamped(pid, *resource, rlimit::Limit { soft: now.soft, hard: limit.hard });
            }
        }
        let Some(adj) = self.process.oom_score_adj else { return };
        match prctl::set_oom_score_adj(pid, adj) {
            Ok(prctl::OomScore::Set) => {}
            Ok(prctl::OomScore::Kept(kept)) => {
                self.warnings.push(format!("oom_score_adj {adj} may not be set here, {kept} is kept"));
            }
            Err(error) => self.warnings.push(format!("oom_score_adj {adj} could not be set: {error}")),
        }
    }
}

pub(super) struct Maker<'a> {
    pub(super) parent: Parentage,
    pub(super) pid_namespace: Option<OwnedFd>,
    pub(super) cgroup: Option<&'a Placement>,
    /// What the control group limits memory to, in bytes, as it was asked for.
    pub(super) memory_limit: Option<i64>,
    pub(super) flags: CloneFlags,
    /// A process of the control group that the new one belongs to, for when the group itself takes no more.
    pub(super) beside: Option<Pid>,
    /// The process is made by a helper inside the user namespace that is entered, so that its new PID namespace belongs to that.
    pub(super) stage_user: bool,
}

impl Maker<'_> {
    pub(super) fn make(self, child: Child, channel: Channel, mut plan: ParentPlan, started: OwnedFd) -> Result<Init, Error> {
        let hooks = match &child.work {
            Work::Container(container) => container.spec.hooks.as_ref().map(|_| {
                (
                    container.id.clone(),
                    container.bundle.clone(),
                    Spec { process: None, mounts: Vec::new(), ..container.spec.clone() },
                )
            }),
            Work::Exec { .. } => None,
        };
        // Nothing that lives in a namespace we enter may look into the new process, its memory or its descriptors.
        prctl::set_dumpable(false).map_err(Error::Clone)?;
        let (pid, pidfd) = self.birth(child, &channel).map_err(|error| self.explain(error))?;
        let result = self.guide(pid, &channel, &mut plan, hooks);
        match result {
            Ok(console) => Ok(Init { pid, pidfd, console, started, warnings: plan.warnings }),
            Err(error) => {
                let process = PidFd::from(pidfd);
                let _ = process.signal(9);
                // When it failed first, ours is only what followed from that.
                let error = match (error, channel.hear()) {
                    (Error::Init { message }, _) | (_, Ok((Report::Failed(message), _))) => Error::Init { message },
                    (error, _) => self.explain(error),
                };
                if self.parent == Parentage::Caller {
                    let _ = process.wait(false);
                }
                Err(error)
            }
        }
    }

    /// A process that never said a word, in a group that has met its memory limit, was killed for that.
    fn explain(&self, error: Error) -> Error {
        let (Some(limit), Some(group)) = (self.memory_limit, self.cgroup.map(Placement::cgroup)) else { return error };
        let killed = match &error {
            Error::Clone(source) => source.raw_os_error() == Some(ENOMEM) && has_met_its_limit(group),
            // A scope of systemd's goes with its last process, and its counters with it.
            Error::Channel(_) => !group.exists() || has_met_its_limit(group),
            Error::Cgroup(_) | Error::IdMap(_) => has_met_its_limit(group),
            _ => false,
        };
        if killed { Error::MemoryLimit { limit } } else { error }
    }

    fn birth(&self, child: Child, channel: &Channel) -> Result<(Pid, OwnedFd), Error> {
        let mut flags = self.flags;
        if self.parent == Parentage::CallersParent {
            flags |= CloneFlags::PARENT;
        }
        let own_pids = match &self.pid_namespace {
            None => None,
            Some(fd) => {
                let own = ns::open_ns(None, NamespaceKind::Pid).map_err(Error::Namespace)?;
                ns::setns(fd.as_fd(), NamespaceKind::Pid).map_err(Error::Namespace)?;
                Some(own)
            }
        };
        let unified = self.cgroup.and_then(Placement::birthplace);
        let cgroup = unified.map(Cgroup::dirfd).transpose().map_err(Error::Cgroup)?.flatten();
        let stage = CloneFlags::PARENT & flags;
        let args = CloneArgs {
            flags: if self.stage_user { stage } else { flags },
            cgroup: cgroup.as_ref().map(AsFd::as_fd),
            ..CloneArgs::default()
        };
        let forked = match (clone3(args), unified, self.beside) {
            (Err(error), Some(cgroup), Some(process)) if error.raw_os_error() == Some(EBUSY) => {
                let beside = cgroup.dirfd_beside(process).map_err(Error::Cgroup)?.ok_or(Error::Clone(error))?;
                clone3(CloneArgs { cgroup: Some(beside.as_fd()), ..args })
            }
            (forked, ..) => forked,
        };
        if let (Some(own), false) = (own_pids, matches!(forked, Ok(Fork::Child))) {
            // Later children of the launcher are its own again.
            ns::setns(own.as_fd(), NamespaceKind::Pid).map_err(Error::Namespace)?;
        }
        match forked.map_err(Error::Clone)? {
            Fork::Child if self.stage_user => stage_two(child, flags),
            Fork::Child => init::run(child),
            Fork::Parent { pid, pidfd } => {
                drop(child);
                if !self.stage_user {
                    return Ok((pid, pidfd));
                }
                let heard = channel.hear();
                if self.parent == Parentage::Caller {
                    PidFd::from(pidfd).wait(false).map_err(Error::Clone)?;
                }
                match heard.map_err(Error::Channel)? {
                    (Report::Moved(pid), Some(pidfd)) => match Pid::from_raw(pid) {
                        Some(pid) => Ok((pid, pidfd)),
                        None => Err(Error::Channel(std::io::ErrorKind::InvalidData.into())),
                    },
                    (Report::Failed(message), _) => Err(Error::Init { message }),
                    _ => Err(Error::Channel(std::io::ErrorKind::InvalidData.into())),
                }
            }
        }
    }

    /// Leads the process to its gate.
    fn guide(
        &self,
        pid: Pid,
        channel: &Channel,
        plan: &mut ParentPlan,
        hooks: Option<(String, PathBuf, Spec)>,
    ) -> Result<Option<OwnedFd>, Error> {
        if let Some((uids, gids)) = &plan.id_maps {
            if !rustix::process::geteuid().is_root() {
                ns::deny_setgroups(pid).map_err(Error::IdMap)?;
            }
            ns::write_id_maps(pid, uids, gids).map_err(Error::IdMap)?;
        }
        if let Some(cgroup) = self.cgroup {
            cgroup.settle(pid).map_err(Error::Cgroup)?;
        }
        plan.raise(Some(pid));
        channel.go().map_err(Error::Channel)?;
        loop {
            match channel.hear().map_err(Error::Channel)? {
                (Report::Hooks, _) => {
                    if let Some((id, bundle, spec)) = &hooks
                        && let Some(hooks) = &spec.hooks
                    {
                        let pid = pid.as_raw_nonzero().get();
                        let state = HookState { id, bundle, status: "creating", pid, spec };
                        run_hooks("prestart", &hooks.prestart, &state)?;
                        run_hooks("createRuntime", &hooks.create_runtime, &state)?;
                    }
                    channel.go().map_err(Error::Channel)?;
                }
                (Report::Ready(warnings), console) => {
                    plan.warnings.extend(warnings);
                    return Ok(console);
                }
                (Report::Failed(message), _) => return Err(Error::Init { message }),
                (Report::Moved(_), _) => return Err(Error::Channel(std::io::ErrorKind::InvalidData.into())),
            }
        }
    }
}

/// The helper inside the user namespace: it makes the process, says who that is, and ends.
fn stage_two(mut child: Child, flags: CloneFlags) -> ! {
    let made = (|| {
        let Work::Container(container) = &mut child.work else {
            return Err(berth_linux::Error::Spawn { subject: "process".into(), source: std::io::ErrorKind::InvalidInput.into() });
        };
        if !container.join.is_empty() {
            let (kind, user) = container.join.remove(0);
            ns::setns(user.as_fd(), kind)?;
        }
        clone3(CloneArgs { flags: flags | CloneFlags::PARENT, ..CloneArgs::default() })
            .map_err(|source| berth_linux::Error::Spawn { subject: "process in user namespace".into(), source })
    })();
    let report = match made {
        Ok(Fork::Child) => init::run(child),
        Ok(Fork::Parent { pid, pidfd }) => child.channel.report(&Report::Moved(pid.as_raw_nonzero().get()), &[pidfd.as_fd()]),
        Err(error) => child.channel.report(&Report::Failed(crate::error::chain(&error)), &[]),
    };
    exit_now(i32::from(report.is_err()))
}
