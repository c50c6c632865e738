//! The launcher's side of making a process.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use berth_cgroup::{Layout, Placement};
use berth_linux::caps::{self, CapSet};
use berth_linux::child::is_inherited;
use berth_linux::ns::{self, IdMap, NamespaceKind};
use berth_linux::pidfd::PidFd;
use berth_linux::process::{CloneFlags, exit_now, pipe};
use rustix::fs::{Mode, OFlags};

use super::maker::{Maker, ParentPlan};
use super::{ExecLaunch, Gate, Init, Launch, Parentage, RootSource, root, trees};
use crate::Error;
use crate::channel::{Channel, Report};
use crate::init::{Child, Container, Work};
use crate::plan::{self, Extension, Host, Mount, Namespaces, Plan, ProcessPlan, Source, Step};
use crate::seccomp;
use crate::spec::Spec;

/// Makes the container's first process. When this returns, everything is done but executing the program.
///
/// Only a process with one thread may call it. On failure no process is left behind (with [`Parentage::CallersParent`] it has
/// ended and waits to be reaped); the control group and the overlay's folders stay the caller's to remove.
pub fn launch(mut launch: Launch) -> Result<Init, Error> {
    check_preserved(launch.preserve_fds)?;
    let host = Host::look();
    let mut join = std::mem::take(&mut launch.join);
    let extension = extension(&launch, &join)?;
    let memory_limit = memory_limit(&launch.spec);
    let plan = plan::plan(&launch.spec, &launch.bundle, &extension, &host)?;
    for (kind, path) in &plan.join_paths {
        join.push((*kind, ns::open_ns_path(path, *kind).map_err(Error::Namespace)?));
    }
    join.retain(|(kind, _)| !extension.shared_with_host.contains(kind));
    let filter = match (launch.filter.take(), &launch.spec.linux.seccomp) {
        (Some(filter), _) => Some(filter),
        (None, Some(profile)) => Some(seccomp::compile(profile)?),
        (None, None) => None,
    };
    let (gate, started, report) = open_gate(&launch.gate)?;
    let prepared = prepare_mounts(&mut launch, &plan, &join)?;
    let pid_namespace = take(&mut join, NamespaceKind::Pid);
    join.sort_by_key(|(kind, _)| *kind != NamespaceKind::User);
    let joins_user = join.first().is_some_and(|(kind, _)| *kind == NamespaceKind::User);
    let maker = Maker {
        parent: launch.parent,
        pid_namespace,
        cgroup: launch.cgroup.as_ref(),
        memory_limit,
        beside: None,
        // Owned by the user namespace, which exists by then, or free of it: see `namespaces`.
        flags: namespaces(&plan, joins_user).0,
        stage_user: joins_user && plan.new.contains(CloneFlags::NEWPID),
    };
    let layout = has_cgroup_mount(&plan).then(Layout::detect).transpose().unwrap_or(None);
    let parent_plan = ParentPlan::of(&plan);
    let container = Container {
        id: launch.id,
        bundle: launch.bundle,
        spec: launch.spec,
        unshare: namespaces(&plan, joins_user).1,
        plan,
        root: Some(prepared.root),
        trees: prepared.trees,
        join,
        settled: false,
        layout,
    };
    let (ours, theirs) = Channel::pair().map_err(Error::Channel)?;
    let child = Child {
        work: Work::Container(Box::new(container)),
        channel: theirs,
        stdio: launch.stdio,
        gate,
        started,
        filter,
        preserve_fds: launch.preserve_fds,
        new_keyring: launch.new_keyring,
    };
    maker.make(child, ours, parent_plan, report)
}

/// Makes a further process in a container. Only a process with one thread may call it.
pub fn exec(exec: ExecLaunch, parent: Parentage) -> Result<Init, Error> {
    check_preserved(exec.preserve_fds)?;
    let mut warnings = Vec::new();
    let process = plan::plan_process(&exec.process, &Host::look(), &mut warnings)?;
    let mut namespaces = Namespaces::look(Some(exec.init))?.other_than(&Namespaces::look(None)?);
    let pid_namespace = match namespaces.contains(CloneFlags::NEWPID) {
        true => Some(ns::open_ns(Some(exec.init), NamespaceKind::Pid).map_err(Error::Namespace)?),
        false => None,
    };
    namespaces -= CloneFlags::NEWPID;
    need_alive(exec.init_pidfd.as_fd())?;
    let (gate, started, report) = open_gate(&Gate::Open)?;
    let parent_plan = ParentPlan { process: process.clone(), warnings, ..ParentPlan::default() };
    let placement = exec.cgroup.map(Placement::In);
    let maker = Maker {
        parent,
        pid_namespace,
        cgroup: placement.as_ref(),
        memory_limit: None,
        flags: CloneFlags::empty(),
        beside: Some(exec.init),
        stage_user: false,
    };
    let (ours, theirs) = Channel::pair().map_err(Error::Channel)?;
    let child = Child {
        work: Work::Exec { init_pidfd: exec.init_pidfd, namespaces, process: Box::new(process), alone: false },
        channel: theirs,
        stdio: exec.stdio,
        gate,
        started,
        filter: exec.filter,
        preserve_fds: exec.preserve_fds,
        // Not its starter's, and not the container's: nobody else's keys are its own.
        new_keyring: true,
    };
    maker.make(child, ours, parent_plan, report)
}

/// Becomes a further process in a container. The caller is a fork that lives for nothing else, was born in the container's PID namespace
/// ([`berth_linux::process::clone3_beside`]) and on a v2 layout in its control group, and may not be looked into; who reaps it hears by
/// `tell` how far it comes ([`super::Heard`]). `own` are the caller's namespaces but for that of PIDs, `join` puts it
/// into the control group.
pub fn become_exec(
    exec: ExecLaunch,
    host: &Host,
    own: &Namespaces,
    join: impl FnOnce() -> Result<(), berth_cgroup::Error>,
    tell: OwnedFd,
) -> ! {
    let channel = Channel::from(tell);
    let ready = enter_alone(&exec, host, own, join)
        .and_then(|entered| Ok((entered, channel.as_fd().try_clone_to_owned().map_err(Error::Channel)?)));
    let ((namespaces, process), started) = match ready {
        Ok(ready) => ready,
        Err(error) => {
            let _ = channel.report(&Report::Failed(crate::error::chain(&error)), &[]);
            exit_now(1)
        }
    };
    crate::init::run(Child {
        work: Work::Exec { init_pidfd: exec.init_pidfd, namespaces, process: Box::new(process), alone: true },
        channel,
        stdio: exec.stdio,
        gate: None,
        started,
        filter: exec.filter,
        preserve_fds: exec.preserve_fds,
        new_keyring: true,
    })
}

/// What [`super::Heard`] hears of a process that does not even come as far as [`become_exec`].
pub fn tell_failure(tell: OwnedFd, message: &str) {
    let _ = Channel::from(tell).report(&Report::Failed(message.to_owned()), &[]);
}

/// What a launcher does for a process from outside, done by itself before it enters anything.
fn enter_alone(
    exec: &ExecLaunch,
    host: &Host,
    own: &Namespaces,
    join: impl FnOnce() -> Result<(), berth_cgroup::Error>,
) -> Result<(CloneFlags, ProcessPlan), Error> {
    let process = plan::plan_process(&exec.process, host, &mut Vec::new())?;
    let namespaces = Namespaces::look(Some(exec.init))?.other_than(own) - CloneFlags::NEWPID;
    need_alive(exec.init_pidfd.as_fd())?;
    join().map_err(Error::Cgroup)?;
    let mut outside = ParentPlan { process, ..ParentPlan::default() };
    outside.raise(None);
    Ok((namespaces, outside.process))
}

/// The pid was used to look: it is the process we mean if that one still lives.
fn need_alive(init: BorrowedFd<'_>) -> Result<(), Error> {
    match PidFd::from(init.try_clone_to_owned().map_err(Error::Clone)?).is_alive().map_err(Error::Clone)? {
        true => Ok(()),
        false => Err(Error::Init { message: "cannot exec in a stopped container".into() }),
    }
}

/// A number that the launcher's starter has not filled is one of the launcher's own descriptors by now, or of the machine's folders.
fn check_preserved(count: u32) -> Result<(), Error> {
    let missing = (3i32..).take(count as usize).find(|number| !is_inherited(*number));
    missing.map_or(Ok(()), |number| Err(Error::Preserve { number }))
}

/// The memory limit of a container, if it has one.
fn memory_limit(spec: &Spec) -> Option<i64> {
    let memory = spec.linux.resources.as_ref()?.memory.as_ref()?;
    memory.limit.filter(|limit| *limit > 0)
}

fn same(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> bool {
    matches!((ns::ns_id(one), ns::ns_id(other)), (Ok(one), Ok(other)) if one == other)
}

fn take(join: &mut Vec<(NamespaceKind, OwnedFd)>, kind: NamespaceKind) -> Option<OwnedFd> {
    let at = join.iter().position(|(other, _)| *other == kind)?;
    Some(join.swap_remove(at).1)
}

fn extension(launch: &Launch, join: &[(NamespaceKind, OwnedFd)]) -> Result<Extension, Error> {
    let mut shared_with_host = BTreeSet::new();
    let mut note = |kind: NamespaceKind, fd: BorrowedFd<'_>| {
        if ns::open_ns(None, kind).is_ok_and(|own| same(own.as_fd(), fd)) {
            shared_with_host.insert(kind);
        }
    };
    for (kind, fd) in join {
        note(*kind, fd.as_fd());
    }
    for namespace in launch.spec.linux.namespaces.iter().filter(|namespace| !namespace.path.is_empty()) {
        let kind = plan::namespace_kind(namespace.kind);
        note(kind, ns::open_ns_path(Path::new(&namespace.path), kind).map_err(Error::Namespace)?.as_fd());
    }
    Ok(Extension {
        joined: join.iter().map(|(kind, _)| *kind).collect(),
        shared_with_host,
        trees: launch.mounts.keys().cloned().collect(),
        root: matches!(launch.root, RootSource::Overlay { .. }),
    })
}

fn has_cgroup_mount(plan: &Plan) -> bool {
    plan.steps.iter().any(|step| matches!(step, Step::Mount(Mount { source: Source::Cgroup, .. })))
}

/// Which namespaces are made with the process and which by it. With a user namespace, its maps must be written before the others are
/// made: what they own on their creation (message queues, links) would else belong to nobody. The cgroup namespace
/// starts at the group that the process is in when it is made, so it is always made later.
fn namespaces(plan: &Plan, joins_user: bool) -> (CloneFlags, CloneFlags) {
    let with_user = CloneFlags::NEWUSER | CloneFlags::NEWPID;
    let first = match plan.new.contains(CloneFlags::NEWUSER) || joins_user {
        true => plan.new & with_user,
        false => plan.new - CloneFlags::NEWCGROUP,
    };
    (first, plan.new - first)
}

struct Prepared {
    root: OwnedFd,
    trees: Vec<(usize, OwnedFd)>,
}

fn prepare_mounts(launch: &mut Launch, plan: &Plan, join: &[(NamespaceKind, OwnedFd)]) -> Result<Prepared, Error> {
    let joined = join.iter().find(|(kind, _)| *kind == NamespaceKind::User).map(|(_, fd)| fd);
    let overlay = matches!(launch.root, RootSource::Overlay { .. });
    let wants_own =
        plan.steps.iter().any(|step| matches!(step, Step::Mount(Mount { idmap: Some((uids, ..)), .. }) if uids.is_empty()));
    // The container's user namespace, or one like it where it does not exist yet.
    let alike = match joined {
        _ if !plan.in_userns || !(overlay || wants_own) => None,
        Some(fd) => Some(fd.try_clone().map_err(Error::Channel)?),
        None => Some(root::user_namespace(&plan.id_maps.0, &plan.id_maps.1)?),
    };
    let root_ids = (outside(&plan.id_maps.0), outside(&plan.id_maps.1));
    let userns = alike.as_ref().map(|fd| (fd.as_fd(), root_ids));
    let source = std::mem::replace(&mut launch.root, RootSource::Spec);
    if overlay && userns.is_some() && plan.id_maps.0.is_empty() {
        return Err(plan::refuse("linux.uidMappings", "needed for an overlay in a user namespace"));
    }
    let root = root::open_root(source, plan.root.as_deref(), userns, plan.mount_label.as_deref())?;
    let mut given: BTreeMap<PathBuf, OwnedFd> = BTreeMap::new();
    for (destination, tree) in std::mem::take(&mut launch.mounts) {
        given.insert(plan::absolute("mounts", &destination)?, tree);
    }
    let bind_devices = plan.in_userns || !may_make_nodes();
    let trees = trees::open_trees(
        &plan.steps,
        |mount| given.remove(&mount.destination),
        |mount| match &mount.idmap {
            None => Ok(None),
            Some((uids, gids, _)) if !uids.is_empty() => root::user_namespace(uids, gids).map(Some),
            Some(_) => match &alike {
                Some(fd) => fd.try_clone().map(Some).map_err(Error::Channel),
                None => Err(plan::refuse(
                    format!("mounts[{}]", mount.destination.display()),
                    "idmap without a mapping or a user namespace",
                )),
            },
        },
        bind_devices,
    )?;
    Ok(Prepared { root, trees })
}

/// What id 0 of a map is outside.
fn outside(map: &[IdMap]) -> u32 {
    map.iter().find(|range| range.inside == 0).map_or(0, |range| range.outside)
}

fn may_make_nodes() -> bool {
    let mknod = CapSet::from_name("CAP_MKNOD").unwrap_or(CapSet::EMPTY);
    caps::capget().is_ok_and(|(effective, ..)| effective.intersection(mknod) == mknod)
}

type Ends = (Option<OwnedFd>, OwnedFd, OwnedFd);

/// (gate, the new process's end of the report, ours).
fn open_gate(gate: &Gate) -> Result<Ends, Error> {
    let piped = || pipe().map_err(Error::Channel);
    match gate {
        Gate::Pipe(fd) => {
            let (reader, writer) = piped()?;
            Ok((Some(fd.try_clone().map_err(Error::Channel)?), writer, reader))
        }
        Gate::Open => {
            let (reader, writer) = piped()?;
            Ok((None, writer, reader))
        }
        Gate::ExecFifo(path) => {
            let mut report = OsString::from(path);
            report.push(".report");
            let open = |path: &Path, flags| {
                let fail = |errno: rustix::io::Errno| Error::Open { path: path.to_owned(), source: errno.into() };
                rustix::fs::open(path, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty()).map_err(fail)
            };
            // Open in both directions: nobody has to be at the other end yet, and a writer that goes away ends nothing.
            let gate = open(path, OFlags::RDWR)?;
            let reader = open(report.as_ref(), OFlags::RDONLY | OFlags::NONBLOCK)?;
            let writer = open(report.as_ref(), OFlags::WRONLY)?;
            rustix::fs::fcntl_setfl(&reader, OFlags::empty()).map_err(|errno| Error::Channel(errno.into()))?;
            Ok((Some(gate), writer, reader))
        }
    }
}
