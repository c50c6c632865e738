//! Making containers and execs by a foreign runtime. Runs in a creator, which is the subreaper of what the runtime leaves behind
//! until it has a descriptor of it; when the creator ends, the shim is the parent.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use berth_cgroup::{CgroupPath, Layout};
use berth_linux::caps::{self, CapSet};
use berth_linux::child::close_from;
use berth_linux::fdpass::recv_with_fds;
use berth_linux::memfd::sealed_memfd;
use berth_linux::pidfd::PidFd;
use berth_linux::process::{CloneArgs, pipe};
use berth_linux::{Pid, prctl, tty};
use berth_oci::spec::{NamespaceType, Process, Spec};
use berth_oci::{Init, RootSource, StartError};
use berth_shim::protocol::{CreateExt, PidMode, PodNamespace};
use rustix::fs::{Mode, OFlags};

use super::bundle::{self, Places};
use super::call::{Stdio, shared_path};
use super::{Error, Instance};
use crate::child;
use crate::creator::Streams;
use crate::error::full_text;
use crate::pod::Pod;
use crate::tree;

/// What making a container needs besides its [`Instance`].
pub struct Order<'a> {
    /// The spec as the agent wrote it.
    pub spec: Spec,
    /// What was asked for.
    pub ext: &'a CreateExt,
    /// Where the root comes from.
    pub root: RootSource,
    /// Detached trees by destination.
    pub trees: BTreeMap<String, OwnedFd>,
    /// The pod.
    pub pod: &'a Pod,
    /// How the machine has its cgroups.
    pub layout: &'a Layout,
    /// The shim, whose descriptors of the pod's namespaces the runtime opens.
    pub shim: Pid,
    /// The PID namespace of another container that is wanted.
    pub target: Option<OwnedFd>,
    /// Read end of the gate.
    pub gate: OwnedFd,
    /// Standard streams.
    pub streams: Streams,
}

/// Makes a container that waits for its start. What is left after a failure goes as with one that has ended: its cgroup is killed,
/// the runtime forgets it ([`Instance::delete`]), the cgroup is removed.
pub fn create(instance: &Instance, mut order: Order<'_>) -> Result<Init, Error> {
    prctl::set_child_subreaper(true).map_err(Error::system("become a subreaper"))?;
    let runtime = instance.runtime.name.as_str();
    let refuse = |what: &str| Error::Refused { runtime: runtime.to_owned(), what: what.to_owned() };
    if CgroupPath::parse(&order.ext.cgroup).is_err() {
        return Err(refuse("a container of a foreign runtime needs a cgroup"));
    }
    bundle::make(&instance.bundle)?;
    let root = std::mem::replace(&mut order.root, RootSource::Spec);
    let places = place(instance, &order, root)?;
    let (spec, warnings) = bundle::localize(runtime, order.spec, &places)?;
    let json = serde_json::to_vec(&spec).map_err(|error| refuse(&format!("the spec: {error}")))?;
    bundle::write_config(&instance.bundle, &json)?;

    let pid_file = instance.bundle.join("init.pid");
    let mut arguments: Vec<OsString> = vec!["--bundle".into(), instance.bundle.clone().into()];
    arguments.extend(["--pid-file".into(), pid_file.clone().into()]);
    let console = Console::wanted(instance, &order.streams)?;
    arguments.extend(console.iter().flat_map(Console::arguments));
    arguments.push(instance.id.clone().into());
    let stdio = stdio(order.streams)?;
    instance.call("create", arguments, stdio)?;
    let (pid, pidfd) = take_process(runtime, &pid_file)?;
    let console = console.map(|console| console.take(order.ext.console_size)).transpose()?;
    let started = wait_for_start(instance, order.gate, &pidfd)?;
    Ok(Init { pid, pidfd: pidfd.into(), console, started, warnings })
}

/// Puts root and volumes into the bundle.
fn place(instance: &Instance, order: &Order<'_>, root: RootSource) -> Result<Places, Error> {
    let userns = order.pod.namespace(PodNamespace::User).filter(|_| !order.ext.stay_out.contains(&PodNamespace::User));
    let root = match root {
        RootSource::Spec => order.spec.root.as_ref().map(|root| PathBuf::from(&root.path)).unwrap_or_default(),
        overlay => {
            let label = Some(order.spec.linux.mount_label.as_str()).filter(|label| !label.is_empty());
            let tree = berth_oci::open_root(overlay, None, userns.map(|fd| (fd, own_root_ids(&order.spec))), label)?;
            bundle::attach_root(&instance.bundle, &tree)?
        }
    };
    let mut mounts = BTreeMap::new();
    for (number, (destination, tree)) in order.trees.iter().enumerate() {
        let of_spec = order.spec.mounts.iter().find(|mount| mount.destination == *destination);
        let shared = of_spec.is_some_and(|mount| mount.options.iter().any(|option| option == "rshared" || option == "shared"));
        mounts.insert(destination.clone(), bundle::attach(&instance.bundle, number, tree, shared)?);
    }
    Ok(Places {
        root,
        mounts,
        namespaces: namespaces(instance, order)?,
        cgroup: order.ext.cgroup.clone(),
        lowest_oom_score: lowest_oom_score(),
        hugetlb: limits_huge_pages(order.layout),
    })
}

/// What root of the container's user namespace is outside.
fn own_root_ids(spec: &Spec) -> (u32, u32) {
    let outside =
        |maps: &[berth_oci::spec::IdMapping]| maps.iter().find(|map| map.container_id == 0).map_or(0, |map| map.host_id);
    (outside(&spec.linux.uid_mappings), outside(&spec.linux.gid_mappings))
}

/// The namespaces of others that the container enters, as paths that hold as long as the shim, or for a target's this creator, lives.
fn namespaces(instance: &Instance, order: &Order<'_>) -> Result<Vec<(NamespaceType, String)>, Error> {
    let refuse = |what: &str| Error::Refused { runtime: instance.runtime.name.clone(), what: what.to_owned() };
    let mut entered = Vec::new();
    for (namespace, fd) in &order.pod.namespaces {
        let wanted = match namespace {
            PodNamespace::Pid => order.ext.pid == PidMode::Pod,
            other => !order.ext.stay_out.contains(other),
        };
        if wanted {
            entered.push((kind(*namespace), format!("/proc/{}/fd/{}", order.shim.as_raw_nonzero(), fd.as_raw_fd())));
        }
    }
    match &order.ext.pid {
        PidMode::Pod if order.pod.namespace(PodNamespace::Pid).is_none() => {
            return Err(refuse("the pod does not share a PID namespace"));
        }
        PidMode::Target(_) => {
            let target = order.target.as_ref().ok_or_else(|| refuse("the target container does not run"))?;
            entered.push((NamespaceType::Pid, shared_path(target).to_string_lossy().into_owned()));
        }
        _ => {}
    }
    Ok(entered)
}

fn kind(namespace: PodNamespace) -> NamespaceType {
    match namespace {
        PodNamespace::Net => NamespaceType::Network,
        PodNamespace::Ipc => NamespaceType::Ipc,
        PodNamespace::Uts => NamespaceType::Uts,
        PodNamespace::Pid => NamespaceType::Pid,
        PodNamespace::User => NamespaceType::User,
    }
}

/// Whether runtimes find the controller: on a hybrid layout they look at v1 alone.
fn limits_huge_pages(layout: &Layout) -> bool {
    if layout.is_v2() { layout.controllers().iter().any(|name| name == "hugetlb") } else { layout.v1_mount("hugetlb").is_some() }
}

/// The present score, where it may not be lowered (CAP_SYS_RESOURCE): runtimes fail on what the built-in one reports and leaves.
fn lowest_oom_score() -> Option<i32> {
    let resource = CapSet::from_name("CAP_SYS_RESOURCE").unwrap_or(CapSet::EMPTY);
    if caps::capget().is_ok_and(|(effective, ..)| effective.intersection(resource) == resource) {
        return None;
    }
    std::fs::read_to_string("/proc/self/oom_score_adj").ok()?.trim().parse().ok()
}

/// With a terminal the runtime's own streams are nobody's.
fn stdio(streams: Streams) -> Result<Stdio, Error> {
    let Some([stdout, stderr]) = streams.output else {
        return Ok(Stdio::none());
    };
    let stdin = match streams.stdin {
        Some(stdin) => stdin,
        None => File::open("/dev/null").map_err(Error::system("open /dev/null"))?.into(),
    };
    Ok(Stdio::of([stdin, stdout, stderr]))
}

/// The process that a runtime has left to us.
fn take_process(runtime: &str, pid_file: &Path) -> Result<(Pid, PidFd), Error> {
    let file = |source| Error::File { action: "read", path: pid_file.to_owned(), source };
    let text = std::fs::read_to_string(pid_file).map_err(file)?;
    let pid = text.trim().parse().ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| Error::Refused { runtime: runtime.to_owned(), what: format!("it wrote the pid {text:?}") })?;
    let _ = std::fs::remove_file(pid_file);
    Ok((pid, PidFd::open(pid).map_err(Error::system("hold the process of the OCI runtime"))?))
}

/// Leaves a child behind that starts the container when the gate opens, and goes when the gate closes. What comes back ends when
/// the container runs, or has the reason why not.
fn wait_for_start(instance: &Instance, gate: OwnedFd, init: &PidFd) -> Result<OwnedFd, Error> {
    let (reader, writer) = pipe().map_err(Error::system("make a pipe"))?;
    let run = || {
        if close_from(3, &[gate.as_fd(), writer.as_fd(), init.as_fd()]).is_err() {
            return 1;
        }
        let _ = prctl::set_name(c"berth-start");
        if !matches!(rustix::io::retry_on_intr(|| rustix::io::read(&gate, &mut [0u8])), Ok(1)) {
            return 0;
        }
        let Err(error) = instance.call("start", [instance.id.clone().into()], Stdio::none()) else {
            return 0;
        };
        let text = serde_json::to_vec(&StartError { message: full_text(&error), errno: None }).unwrap_or_default();
        let _ = File::from(writer).write_all(&text);
        // Its end is the container's, as when it could not be executed.
        let _ = init.signal(9);
        1
    };
    child::fork(CloneArgs::default(), run).map_err(Error::system("fork a starter"))?;
    Ok(reader)
}

/// Makes a further process in a container.
pub fn exec(instance: &Instance, mut process: Process, streams: Streams, size: (u16, u16)) -> Result<Init, Error> {
    prctl::set_child_subreaper(true).map_err(Error::system("become a subreaper"))?;
    let runtime = instance.runtime.name.as_str();
    let mut warnings = Vec::new();
    bundle::localize_process(runtime, &mut process, lowest_oom_score(), &mut warnings)?;
    let refuse = |error: serde_json::Error| Error::Refused { runtime: runtime.to_owned(), what: format!("the process: {error}") };
    let json = serde_json::to_vec(&process).map_err(refuse)?;
    let file = sealed_memfd("process", &json, false).map_err(Error::system("make a file in memory"))?;
    let pid_file = instance.bundle.join(format!("exec-{}.pid", rustix::process::getpid().as_raw_nonzero()));
    let mut arguments: Vec<OsString> = vec!["--detach".into(), "--process".into(), shared_path(&file)];
    arguments.extend(["--pid-file".into(), pid_file.clone().into()]);
    let console = Console::wanted(instance, &streams)?;
    arguments.extend(console.iter().flat_map(Console::arguments));
    arguments.push(instance.id.clone().into());
    let stdio = stdio(streams)?;
    let made = instance.call("exec", arguments, stdio).and_then(|()| take_process(runtime, &pid_file));
    let (pid, pidfd) = made.inspect_err(|_| {
        // A runtime that failed, or was killed, may have let go of its process already: as a subreaper we are its parent then.
        let _ = tree::kill_descendants(rustix::process::getpid());
        let _ = std::fs::remove_file(&pid_file);
    })?;
    // Without its terminal nobody would know of it.
    let console = console.map(|console| console.take(size)).transpose().inspect_err(|_| drop(pidfd.signal(9)))?;
    // It runs already: the end of the pipe says so.
    let (started, _) = pipe().map_err(Error::system("make a pipe"))?;
    Ok(Init { pid, pidfd: pidfd.into(), console, started, warnings })
}

/// The socket by which a runtime hands over a terminal's master.
struct Console {
    listener: UnixListener,
    /// By which the runtime finds it: short, where the bundle's path is longer than a socket's may be.
    path: String,
    /// Where it is.
    file: PathBuf,
    _folder: OwnedFd,
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

impl Console {
    fn wanted(instance: &Instance, streams: &Streams) -> Result<Option<Self>, Error> {
        if streams.output.is_some() {
            return Ok(None);
        }
        let failed = |source| Error::File { action: "make a console socket in", path: instance.bundle.clone(), source };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(&instance.bundle, flags, Mode::empty()).map_err(|errno| failed(errno.into()))?;
        let own = rustix::process::getpid().as_raw_nonzero();
        let name = format!("console-{own}.sock");
        let path = format!("/proc/{own}/fd/{}/{name}", folder.as_raw_fd());
        let listener = UnixListener::bind(&path).map_err(failed)?;
        Ok(Some(Self { listener, path, file: instance.bundle.join(name), _folder: folder }))
    }

    fn arguments(&self) -> [OsString; 2] {
        ["--console-socket".into(), self.path.clone().into()]
    }

    /// The runtime has ended well, so the master has been sent.
    fn take(self, (width, height): (u16, u16)) -> Result<OwnedFd, Error> {
        let failed = Error::system("take the terminal from the OCI runtime");
        let master = self.listener.set_nonblocking(true).and_then(|()| {
            let (stream, _) = self.listener.accept()?;
            stream.set_nonblocking(true)?;
            let (_, mut fds) = recv_with_fds(stream.as_fd(), &mut [0u8; 4096], 1)?;
            fds.pop().ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into())
        });
        let master = master.map_err(failed)?;
        if (width, height) != (0, 0) {
            tty::set_window_size(master.as_fd(), width, height).map_err(Error::system("size the terminal"))?;
        }
        Ok(master)
    }
}
