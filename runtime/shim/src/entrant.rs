//! A fork of the shim that becomes an exec. It is born in the container's PID namespace and, on cgroup v2, in its cgroup; all else it
//! does itself: it parses, joins, enters and executes. So an exec costs one fork, and the shim's loop waits for none of it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use berth_cgroup::{Cgroup, Doors, Layout};
use berth_linux::child::close_from;
use berth_linux::pidfd::PidFd;
use berth_linux::process::{CloneArgs, exit_now};
use berth_linux::{Pid, prctl};
use berth_oci::plan::{Host, Namespaces};
use berth_oci::{ExecLaunch, Heard};
use berth_shim::protocol::{ExecExt, ExecSpec, Failure, FailureKind};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::creator::{Error, Streams, read_json};
use crate::error::full_text;
use crate::{cgroups, child};

/// What an entrant needs.
pub struct Order<'a> {
    /// The memfd of the request.
    pub spec: OwnedFd,
    /// What was asked for.
    pub ext: ExecExt,
    /// The container's first process.
    pub init: Pid,
    /// Its descriptor.
    pub init_pidfd: &'a PidFd,
    /// The container's cgroup as text.
    pub cgroup: &'a str,
    /// The way into it, where that is held open.
    pub doors: Option<&'a Doors>,
    /// Standard streams.
    pub streams: Streams,
    /// Where cgroups are.
    pub layout: &'a Layout,
    /// The score that the shim had before it protected itself.
    pub oom_score_adj: Option<i32>,
    /// What the machine has.
    pub host: &'a Host,
    /// The shim's own namespaces.
    pub own: &'a Namespaces,
}

/// An entrant on its way.
pub struct Entrant {
    /// It, and the exec later.
    pub pid: Pid,
    /// Its descriptor.
    pub pidfd: PidFd,
    /// Ends when the program is executed or the process ends. Non-blocking.
    pub socket: OwnedFd,
}

/// Forks an entrant. `own_pids` is the shim's PID namespace, where its later children are born again.
pub fn start(order: Order<'_>, own_pids: BorrowedFd<'_>) -> Result<Entrant, Failure> {
    let cgroup = match cgroups::takes_births(order.layout) {
        true => cgroups::at(order.layout, order.cgroup).map_err(|error| failed(&Error::from(error)))?,
        false => None,
    };
    let open = |cgroup: &Cgroup| cgroup.dirfd().map_err(|error| failed(&Error::from(error)));
    let birthplace = cgroup.as_ref().map(open).transpose()?.flatten();
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let pair = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
    let (socket, theirs) = pair.map_err(|errno| failed(&Error::Fork(errno.into())))?;
    // Whoever is in the container sees the process from its birth on, and may not look into it.
    let dumpable = prctl::is_dumpable().and_then(|was| prctl::set_dumpable(false).map(|()| was));
    let dumpable = dumpable.map_err(|error| failed(&Error::Fork(error)))?;
    let (init, init_pidfd) = (order.init, order.init_pidfd.as_fd());
    let mut life = Some((order, theirs));
    let mut fork = |cgroup: Option<&OwnedFd>| {
        let args = CloneArgs { cgroup: cgroup.map(AsFd::as_fd), ..CloneArgs::default() };
        child::fork_beside(init_pidfd, own_pids, args, || match life.take() {
            Some((order, tell)) => enter(order, tell),
            None => 1,
        })
    };
    let forked = match (fork(birthplace.as_ref()), &cgroup) {
        // Processes of the container have made cgroups below their own, which takes no others any more.
        (Err(error), Some(cgroup)) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => match cgroup.dirfd_beside(init)
        {
            Ok(Some(beside)) => fork(Some(&beside)),
            _ => Err(error),
        },
        (forked, _) => forked,
    };
    if dumpable {
        // It could a moment ago.
        let _ = prctl::set_dumpable(true);
    }
    match forked {
        Ok((pid, pidfd)) => Ok(Entrant { pid, pidfd, socket }),
        Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => {
            Err(failed(&Error::Invalid("cannot exec in a stopped container")))
        }
        Err(error) => Err(failed(&Error::Fork(error))),
    }
}

/// Why an entrant became no process that could be started, by what has been heard of it.
pub fn check(heard: &mut Heard) -> Result<(), Failure> {
    heard.check().map_err(|error| failed(&Error::Oci(error)))
}

fn failed(error: &Error) -> Failure {
    Failure { kind: FailureKind::Create, message: full_text(error), errno: error.errno() }
}

/// The entrant's life. Returns only when it never got as far as the container's own code.
fn enter(order: Order<'_>, tell: OwnedFd) -> i32 {
    let mut keep = vec![order.spec.as_fd(), order.init_pidfd.as_fd(), tell.as_fd()];
    keep.extend(order.streams.descriptors());
    keep.extend(order.doors.iter().flat_map(|doors| doors.descriptors()));
    if close_from(3, &keep).is_err() {
        return 1;
    }
    drop(keep);
    let _ = prctl::set_name(c"berth-create");
    let (host, own, layout, cgroup, doors) = (order.host, order.own, order.layout, order.cgroup, order.doors);
    let join = || match doors {
        Some(doors) => doors.enter_self(),
        // Born in it.
        None if cgroups::takes_births(layout) => Ok(()),
        None => cgroups::open(layout, cgroup)?.map_or(Ok(()), |cgroup| cgroup.attach_self()),
    };
    match launch(order) {
        Ok(launch) => berth_oci::become_exec(launch, host, own, join, tell),
        Err(error) => {
            berth_oci::tell_failure(tell, &full_text(&error));
            exit_now(1)
        }
    }
}

fn launch(order: Order<'_>) -> Result<ExecLaunch, Error> {
    let mut spec: ExecSpec = read_json(order.spec, "the exec's process")?;
    // What the spec does not set is the agent's value, not the shim's protected one.
    spec.process.oom_score_adj = spec.process.oom_score_adj.or(order.oom_score_adj);
    Ok(ExecLaunch {
        process: spec.process,
        init: order.init,
        init_pidfd: order.init_pidfd.as_fd().try_clone_to_owned().map_err(Error::Fork)?,
        cgroup: None,
        filter: spec.filter,
        stdio: order.streams.into_stdio(order.ext.console_size)?,
        preserve_fds: 0,
    })
}
