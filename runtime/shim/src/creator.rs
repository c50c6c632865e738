//! A short-lived fork of the shim that makes a container's first process, or an exec by a foreign runtime. The process becomes the shim's child
//! (CLONE_PARENT), what there is to know of it goes to the shim over a socket, and the creator ends. So specs are parsed,
//! filters compiled and files touched in memory that goes away, and the shim's loop never waits for any of it.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use berth_cgroup::Layout;
use berth_linux::child::close_from;
use berth_linux::ns::NamespaceKind;
use berth_linux::pidfd::PidFd;
use berth_linux::process::CloneArgs;
use berth_linux::{Pid, mount, prctl};
use berth_oci::seccomp::Filter;
use berth_oci::{Gate, Init, Launch, Parentage, RootSource, Stdio};
use berth_shim::protocol::{CreateExt, ExecExt, ExecSpec, Failure, FailureKind, FdIndex, PidMode, PodNamespace, Root};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::full_text;
use crate::foreign::{self, Instance};
use crate::link::Link;
use crate::pod::{Pod, kind};
use crate::{cgroups, child};

/// What a creator tells the shim.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// The process waits at its gate (an exec: is about to execute). Descriptors: its pidfd, the `started` pipe, and the
    /// terminal master if it has one.
    Made {
        /// Its process id.
        pid: i32,
        /// What could not be done as asked.
        warnings: Vec<String>,
    },
    /// Nothing was made, nothing is left.
    Failed {
        /// For the user.
        message: String,
        /// Error number behind it.
        errno: Option<i32>,
    },
}

/// A process that a creator has made.
pub struct Made {
    /// Its process id.
    pub pid: Pid,
    /// Its descriptor.
    pub pidfd: PidFd,
    /// End of file when it was executed, else the reason first. Non-blocking.
    pub started: OwnedFd,
    /// The master of its terminal.
    pub console: Option<OwnedFd>,
    /// What could not be done as asked.
    pub warnings: Vec<String>,
}

impl Report {
    /// Stands for the report of a creator that died without one.
    fn lost() -> Self {
        Self::Failed { message: String::new(), errno: None }
    }

    /// Whether the creator itself has cleaned up.
    pub fn left_nothing(&self) -> bool {
        matches!(self, Self::Failed { message, .. } if !message.is_empty())
    }

    /// With its descriptors in their places.
    pub fn into_made(self, fds: Vec<OwnedFd>) -> Result<Made, Failure> {
        let failed = |message: &str, errno| Failure { kind: FailureKind::Create, message: message.to_owned(), errno };
        match self {
            Self::Failed { message, errno: None } if message.is_empty() => Err(failed("the creator was killed", None)),
            Self::Failed { message, errno } => Err(failed(&message, errno)),
            Self::Made { pid, warnings } => {
                let mut fds = fds.into_iter();
                match (Pid::from_raw(pid), fds.next(), fds.next()) {
                    (Some(pid), Some(pidfd), Some(started)) if rustix::io::ioctl_fionbio(&started, true).is_ok() => {
                        Ok(Made { pid, pidfd: pidfd.into(), started, console: fds.next(), warnings })
                    }
                    _ => Err(failed("the creator's report is not complete", None)),
                }
            }
        }
    }
}

/// Why nothing was made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("make the container's process")]
    Fork(#[source] std::io::Error),
    #[error("descriptor {index} of the request: {reason}")]
    Descriptor { index: FdIndex, reason: &'static str },
    #[error("read {what}")]
    Read { what: &'static str, source: std::io::Error },
    #[error("parse {what}")]
    Parse { what: &'static str, source: serde_json::Error },
    #[error("{0}")]
    Invalid(&'static str),
    #[error(transparent)]
    Linux(#[from] berth_linux::Error),
    #[error(transparent)]
    Cgroup(#[from] berth_cgroup::Error),
    #[error(transparent)]
    Oci(#[from] berth_oci::Error),
    #[error(transparent)]
    Foreign(#[from] foreign::Error),
    #[error("open /dev/null")]
    Null(#[source] std::io::Error),
}

impl Error {
    /// The number behind it.
    pub fn errno(&self) -> Option<i32> {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(error) = cause {
            if let Some(errno) = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error) {
                return Some(errno);
            }
            cause = error.source();
        }
        None
    }
}

/// Standard streams that the shim made; a missing stdin is `/dev/null`.
pub struct Streams {
    /// Read end.
    pub stdin: Option<OwnedFd>,
    /// Write ends of stdout and stderr; absent with a terminal.
    pub output: Option<[OwnedFd; 2]>,
}

impl Streams {
    /// All of them.
    pub fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.stdin.iter().chain(self.output.iter().flatten()).map(AsFd::as_fd)
    }

    /// For a process that is made here.
    pub fn into_stdio(self, size: (u16, u16)) -> Result<Stdio, Error> {
        let Some([stdout, stderr]) = self.output else {
            return Ok(Stdio::Pty { width: size.0, height: size.1 });
        };
        let stdin = match self.stdin {
            Some(stdin) => stdin,
            None => File::open("/dev/null").map_err(Error::Null)?.into(),
        };
        Ok(Stdio::Fds([stdin, stdout, stderr]))
    }
}

/// What a creator needs for a container.
pub struct ContainerOrder<'a> {
    /// Container.
    pub id: &'a str,
    /// Who makes it, when that is not this program.
    pub foreign: Option<&'a Instance>,
    /// What was asked for.
    pub ext: CreateExt,
    /// Descriptors of the request; the spec is the first.
    pub fds: Vec<OwnedFd>,
    /// The pod.
    pub pod: &'a Pod,
    /// First process of the container whose PID namespace is wanted.
    pub target: Option<Target>,
    /// Read end of the gate.
    pub gate: OwnedFd,
    /// Standard streams.
    pub streams: Streams,
    /// Where cgroups are.
    pub layout: &'a Layout,
    /// The score that the shim had before it protected itself.
    pub oom_score_adj: Option<i32>,
}

/// What a creator needs for an exec by a foreign runtime.
pub struct ExecOrder<'a> {
    /// The memfd of the request.
    pub spec: OwnedFd,
    /// What was asked for.
    pub ext: ExecExt,
    /// Who makes it.
    pub foreign: &'a Instance,
    /// Standard streams.
    pub streams: Streams,
    /// The score that the shim had before it protected itself.
    pub oom_score_adj: Option<i32>,
}

/// A container whose PID namespace is wanted, by its first process.
pub struct Target {
    /// Its pid.
    pub pid: Pid,
    /// What says that the pid is still its.
    pub pidfd: PidFd,
}

impl Target {
    /// Its PID namespace. A process that ended may have left its pid to another one, also of the machine's.
    fn pid_namespace(&self) -> Result<OwnedFd, Error> {
        let namespace = berth_linux::ns::open_ns(Some(self.pid), NamespaceKind::Pid)?;
        match self.pidfd.is_alive() {
            Ok(true) => Ok(namespace),
            _ => Err(Error::Invalid("the target container has ended")),
        }
    }
}

/// Forks a creator; `run` is its whole life. Returns where its report arrives, and its process.
pub fn start(run: impl FnOnce(Link) -> i32) -> std::io::Result<(Link, Pid)> {
    let (link, theirs) = Link::pair()?;
    let (creator, _) = child::fork(CloneArgs::default(), || run(theirs))?;
    Ok((link, creator))
}

/// The report of a creator, once it is there; [`Report::lost`] when none will come.
pub fn take_report(link: &mut Link) -> Option<(Report, Vec<OwnedFd>)> {
    let open = link.take_in();
    match link.next::<Report>() {
        Ok(Some(message)) => Some(message),
        Ok(None) if open => None,
        _ => Some((Report::lost(), Vec::new())),
    }
}

/// The creator's life for a container.
pub fn create(order: ContainerOrder<'_>, link: Link) -> i32 {
    let mut keep: Vec<BorrowedFd<'_>> = order.fds.iter().map(AsFd::as_fd).collect();
    keep.extend(order.pod.descriptors());
    keep.extend(order.streams.descriptors());
    keep.extend([order.gate.as_fd(), link.as_fd()]);
    keep.extend(order.target.iter().map(|target| target.pidfd.as_fd()));
    if close_from(3, &keep).is_err() {
        return 1;
    }
    drop(keep);
    prepare(order.oom_score_adj);
    report(link, make_container(order))
}

/// The creator's life for an exec by a foreign runtime.
pub fn exec(order: ExecOrder<'_>, link: Link) -> i32 {
    let mut keep = vec![order.spec.as_fd(), link.as_fd()];
    keep.extend(order.streams.descriptors());
    if close_from(3, &keep).is_err() {
        return 1;
    }
    drop(keep);
    prepare(order.oom_score_adj);
    report(link, make_exec(order))
}

fn prepare(oom_score_adj: Option<i32>) {
    let _ = prctl::set_name(c"berth-create");
    if let Some(score) = oom_score_adj {
        // What the spec does not set is the agent's value, not the shim's protected one. Raising is always allowed.
        let _ = prctl::set_oom_score_adj(None, score);
    }
}

fn report(mut link: Link, result: Result<Init, Error>) -> i32 {
    let (report, fds) = match result {
        Ok(init) => {
            let report = Report::Made { pid: init.pid.as_raw_nonzero().get(), warnings: init.warnings };
            (report, [init.pidfd, init.started].into_iter().chain(init.console).collect())
        }
        Err(error) => (Report::Failed { message: full_text(&error), errno: error.errno() }, Vec::new()),
    };
    i32::from(link.send(&report, fds).is_err())
}

/// Descriptors of a request, each taken once.
struct Given(Vec<Option<OwnedFd>>);

impl Given {
    fn take(&mut self, index: FdIndex) -> Result<OwnedFd, Error> {
        let slot = self.0.get_mut(index as usize).ok_or(Error::Descriptor { index, reason: "was not sent" })?;
        slot.take().ok_or(Error::Descriptor { index, reason: "is used twice" })
    }
}

/// The longest description of a container or a process: far above what fits the arguments and environment of one.
const MAX_JSON: u64 = 64 << 20;

/// Reads a memfd from its beginning without moving its offset: the agent may have sent the same open file to others.
pub fn read_json<T: DeserializeOwned>(fd: OwnedFd, what: &'static str) -> Result<T, Error> {
    let file = File::from(fd);
    let length = file.metadata().map_err(|source| Error::Read { what, source })?.len();
    if length > MAX_JSON {
        return Err(Error::Read { what, source: std::io::ErrorKind::FileTooLarge.into() });
    }
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, 0).map_err(|source| Error::Read { what, source })?;
    serde_json::from_slice(&bytes).map_err(|source| Error::Parse { what, source })
}

/// The same folder by a mount of our own mount namespace: overlayfs takes no layers from mounts of another one, and the agent
/// opened it in the host's. Where the path means something else here, the descriptor stays as it came.
fn seen_from_here(dir: OwnedFd) -> OwnedFd {
    let identity = |fd: &OwnedFd| rustix::fs::fstat(fd).map(|stat| (stat.st_dev, stat.st_ino)).ok();
    let path = rustix::fs::readlink(berth_linux::memfd::proc_path(dir.as_fd()), Vec::new());
    let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    let own = path.and_then(|path| rustix::fs::open(path, flags, rustix::fs::Mode::empty()));
    match own {
        Ok(own) if identity(&own).is_some() && identity(&own) == identity(&dir) => own,
        _ => dir,
    }
}

fn make_container(mut order: ContainerOrder<'_>) -> Result<Init, Error> {
    let mut given = Given(order.fds.into_iter().map(Some).collect());
    let spec: berth_oci::spec::Spec = read_json(given.take(0)?, "the OCI spec")?;
    let is_foreign = order.foreign.is_some();
    if !is_foreign && spec.hooks.as_ref().is_some_and(|hooks| !hooks.poststart.is_empty() || !hooks.poststop.is_empty()) {
        return Err(Error::Invalid("hooks.poststart and hooks.poststop are not supported"));
    }
    let filter: Option<Filter> = match order.ext.filter {
        Some(index) => Some(read_json(given.take(index)?, "the compiled filter")?),
        None => None,
    };
    let root = match std::mem::take(&mut order.ext.root) {
        Root::Spec => RootSource::Spec,
        Root::Overlay { dir, lowers, upper, work, volatile } => {
            RootSource::Overlay { dir: seen_from_here(given.take(dir)?), lowers, upper, work, volatile }
        }
    };
    let mut mounts = BTreeMap::new();
    for (destination, index) in &order.ext.mounts {
        mounts.insert(destination.clone(), given.take(*index)?);
    }
    if order.ext.shm {
        let shm = order.pod.shm.as_ref().ok_or(Error::Invalid("the pod has no /dev/shm of its own"))?;
        mounts.insert("/dev/shm".to_owned(), mount::open_tree(shm.as_fd(), Path::new(""), true, false)?);
    }
    if let Some(instance) = order.foreign {
        let order = foreign::Order {
            spec,
            ext: &order.ext,
            root,
            trees: mounts,
            pod: order.pod,
            layout: order.layout,
            shim: rustix::process::getppid().ok_or(Error::Invalid("the shim has ended"))?,
            target: order.target.map(|target| target.pid_namespace()).transpose()?,
            gate: order.gate,
            streams: order.streams,
        };
        return Ok(foreign::create(instance, order)?);
    }
    let join = join(order.pod, &order.ext.pid, &order.ext.stay_out, order.target.as_ref())?;
    let stdio = order.streams.into_stdio(order.ext.console_size)?;
    let cgroup = cgroups::prepare(order.layout, &order.ext.cgroup, spec.linux.resources.as_ref())?;
    let launched = berth_oci::launch(Launch {
        id: order.id.to_owned(),
        bundle: order.ext.bundle,
        spec,
        root,
        cgroup,
        join,
        mounts,
        stdio,
        gate: Gate::Pipe(order.gate),
        parent: Parentage::CallersParent,
        filter,
        preserve_fds: 0,
        new_keyring: true,
    });
    launched.map_err(|error| {
        let _ = cgroups::remove(order.layout, &order.ext.cgroup);
        Error::Oci(error)
    })
}

/// The namespaces of others that a container enters.
fn join(
    pod: &Pod,
    pid: &PidMode,
    stay_out: &[PodNamespace],
    target: Option<&Target>,
) -> Result<Vec<(NamespaceKind, OwnedFd)>, Error> {
    let mut join = Vec::new();
    for (namespace, fd) in &pod.namespaces {
        let wanted = match namespace {
            PodNamespace::Pid => *pid == PidMode::Pod,
            other => !stay_out.contains(other),
        };
        if wanted {
            let fd = fd.try_clone().map_err(|source| Error::Read { what: "a namespace of the pod", source })?;
            join.push((kind(*namespace), fd));
        }
    }
    match pid {
        PidMode::Pod if pod.namespace(PodNamespace::Pid).is_none() => {
            Err(Error::Invalid("the pod does not share a PID namespace"))
        }
        PidMode::Target(_) => {
            let target = target.ok_or(Error::Invalid("the target container does not run"))?;
            join.push((NamespaceKind::Pid, target.pid_namespace()?));
            Ok(join)
        }
        _ => Ok(join),
    }
}

fn make_exec(order: ExecOrder<'_>) -> Result<Init, Error> {
    let spec: ExecSpec = read_json(order.spec, "the exec's process")?;
    Ok(foreign::exec(order.foreign, spec.process, order.streams, order.ext.console_size)?)
}
