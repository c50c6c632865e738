//! The launcher's side of making a process.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use berth_cgroup::{Cgroup, Layout};
use berth_linux::caps::{self, CapSet};
use berth_linux::ns::{self, IdMap, NamespaceKind};
use berth_linux::pidfd::PidFd;
use berth_linux::process::{CloneArgs, CloneFlags, Fork, clone3, exit_now, pipe};
use berth_linux::{prctl, rlimit};
use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;

use super::{ExecLaunch, Gate, Init, Launch, Parentage, RootSource, root, trees};
use crate::Error;
use crate::channel::{Channel, Report};
use crate::hooks::{HookState, run_hooks};
use crate::init::{self, Child, Container, Work};
use crate::plan::{self, Extension, Host, Mount, Plan, ProcessPlan, Source, Step};
use crate::seccomp;
use crate::spec::Spec;

/// Makes the container's first process. When this returns, everything is done but executing the program.
///
/// Only a process with one thread may call it. On failure no process is left behind (with [`Parentage::CallersParent`] it has
/// ended and waits to be reaped); the control group and the overlay's folders stay the caller's to remove.
pub fn launch(mut launch: Launch) -> Result<Init, Error> {
    let host = look_at_host();
    let mut join = std::mem::take(&mut launch.join);
    let extension = extension(&launch, &join)?;
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
pub fn exec(exec: ExecLaunch) -> Result<Init, Error> {
    let mut warnings = Vec::new();
    let process = plan::plan_process(&exec.process, &look_at_host(), &mut warnings)?;
    let mut namespaces = CloneFlags::empty();
    let mut pid_namespace = None;
    for kind in NamespaceKind::ALL {
        let theirs = ns::open_ns(Some(exec.init), kind).map_err(Error::Namespace)?;
        let ours = ns::open_ns(None, kind).map_err(Error::Namespace)?;
        if same(ours.as_fd(), theirs.as_fd()) {
            continue;
        }
        match kind {
            NamespaceKind::Pid => pid_namespace = Some(theirs),
            kind => namespaces |= kind.clone_flag(),
        }
    }
    // The pid was used to look: it is the process we mean if that one still lives.
    if !PidFd::from(exec.init_pidfd.try_clone().map_err(Error::Clone)?).is_alive().map_err(Error::Clone)? {
        return Err(Error::Init { message: "cannot exec in a stopped container".into() });
    }
    let (gate, started, report) = open_gate(&Gate::Open)?;
    let parent_plan = ParentPlan { process: process.clone(), warnings, ..ParentPlan::default() };
    let maker = Maker {
        parent: exec.parent,
        pid_namespace,
        cgroup: exec.cgroup.as_ref(),
        flags: CloneFlags::empty(),
        stage_user: false,
    };
    let (ours, theirs) = Channel::pair().map_err(Error::Channel)?;
    let child = Child {
        work: Work::Exec { init_pidfd: exec.init_pidfd, namespaces, process: Box::new(process) },
        channel: theirs,
        stdio: exec.stdio,
        gate,
        started,
        filter: exec.filter,
        preserve_fds: exec.preserve_fds,
        new_keyring: false,
    };
    maker.make(child, ours, parent_plan, report)
}

fn look_at_host() -> Host {
    let enabled = std::fs::read("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.starts_with(b"Y"));
    Host { bounding: caps::bounding(), apparmor: enabled }
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
    let wants_own = plan.steps.iter().any(|step| matches!(step, Step::Mount(Mount { idmap: Some((uids, ..)), .. }) if uids.is_empty()));
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
    let root = root::open_root(source, plan.root.as_deref(), userns)?;
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
                None => Err(plan::refuse(format!("mounts[{}]", mount.destination.display()), "idmap without a mapping or a user namespace")),
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

/// What the launcher does for the process from outside.
#[derive(Default)]
struct ParentPlan {
    process: ProcessPlan,
    id_maps: Option<(Vec<IdMap>, Vec<IdMap>)>,
    warnings: Vec<String>,
}

impl ParentPlan {
    fn of(plan: &Plan) -> Self {
        let new_user = plan.new.contains(CloneFlags::NEWUSER);
        Self {
            process: plan.process.clone(),
            id_maps: new_user.then(|| plan.id_maps.clone()),
            warnings: plan.warnings.clone(),
        }
    }

    /// What needs the machine's own privileges: the limits' ceilings and the memory score. What is not allowed is left as it is.
    fn raise(&mut self, pid: Pid) {
        for (_, resource, limit) in &self.process.rlimits {
            let now = rlimit::get(*resource);
            if limit.hard > now.hard {
                // The process itself says what came of it.
                let _ = rlimit::set_clamped(Some(pid), *resource, rlimit::Limit { soft: now.soft, hard: limit.hard });
            }
        }
        let Some(adj) = self.process.oom_score_adj else { return };
        match prctl::set_oom_score_adj(Some(pid), adj) {
            Ok(prctl::OomScore::Set) => {}
            Ok(prctl::OomScore::Kept(kept)) => {
                self.warnings.push(format!("oom_score_adj {adj} may not be set here, {kept} is kept"));
            }
            Err(error) => self.warnings.push(format!("oom_score_adj {adj} could not be set: {error}")),
        }
    }
}

struct Maker<'a> {
    parent: Parentage,
    pid_namespace: Option<OwnedFd>,
    cgroup: Option<&'a Cgroup>,
    flags: CloneFlags,
    /// The process is made by a helper inside the user namespace that is entered, so that its new PID namespace belongs to that.
    stage_user: bool,
}

impl Maker<'_> {
    fn make(self, child: Child, channel: Channel, mut plan: ParentPlan, started: OwnedFd) -> Result<Init, Error> {
        let hooks = match &child.work {
            Work::Container(container) => container.spec.hooks.as_ref().map(|_| {
                (container.id.clone(), container.bundle.clone(), Spec { process: None, mounts: Vec::new(), ..container.spec.clone() })
            }),
            Work::Exec { .. } => None,
        };
        // Nothing that lives in a namespace we enter may look into the new process, its memory or its descriptors.
        prctl::set_dumpable(false).map_err(Error::Clone)?;
        let (pid, pidfd) = self.birth(child, &channel)?;
        let result = self.guide(pid, &channel, &mut plan, hooks);
        match result {
            Ok(console) => Ok(Init { pid, pidfd, console, started, warnings: plan.warnings }),
            Err(error) => {
                let process = PidFd::from(pidfd);
                let _ = process.signal(9);
                if self.parent == Parentage::Caller {
                    let _ = process.wait(false);
                }
                Err(error)
            }
        }
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
        let unified = self.cgroup.filter(|cgroup| cgroup.is_v2());
        let cgroup = unified.map(Cgroup::dirfd).transpose().map_err(Error::Cgroup)?.flatten();
        let stage = CloneFlags::PARENT & flags;
        let args = CloneArgs {
            flags: if self.stage_user { stage } else { flags },
            cgroup: cgroup.as_ref().map(AsFd::as_fd),
            ..CloneArgs::default()
        };
        let forked = clone3(args);
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
        if let Some(cgroup) = self.cgroup
            && !cgroup.is_v2()
        {
            cgroup.attach(pid).map_err(Error::Cgroup)?;
        }
        plan.raise(pid);
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
        let Work::Container(container) = &mut child.work else { return Err(berth_linux::Error::Spawn {
            subject: "process".into(),
            source: std::io::ErrorKind::InvalidInput.into(),
        }) };
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
