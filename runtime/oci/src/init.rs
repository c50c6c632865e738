//! What the new process does, from its birth to the execution of its program. It runs in a fork with one thread: it may
//! allocate, it never returns, and every failure ends up as a sentence at the launcher.

mod cgroupfs;
mod devices;
mod home;
mod host_proc;
mod identity;
mod paths;
mod program;
mod rootfs;
mod streams;

use std::fmt::Display;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use berth_linux::beneath::Root;
use berth_linux::child::close_from;
use berth_linux::ns::{self, NamespaceKind};
use berth_linux::process::{CloneFlags, exit_now};
use berth_linux::signalfd::reset_signals;
use berth_linux::{creds, prctl, seccomp, session};
use rustix::fs::{Mode, OFlags};

use crate::channel::{Channel, Report};
use crate::hooks::{HookState, run_hooks};
use crate::launch::Stdio;
use crate::plan::{Plan, ProcessPlan};
use crate::seccomp::Filter;
use crate::spec::Spec;
use host_proc::{HostProc, PROC_MAGIC, require_filesystem};

/// Everything the new process needs, gathered by the launcher.
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) work: Work,
    pub(crate) channel: Channel,
    pub(crate) stdio: Stdio,
    /// One byte from it starts the program; none: at once.
    pub(crate) gate: Option<OwnedFd>,
    /// Where the program's failure to start is told.
    pub(crate) started: OwnedFd,
    pub(crate) filter: Option<Filter>,
    pub(crate) preserve_fds: u32,
    pub(crate) new_keyring: bool,
}

/// What kind of process it is.
#[derive(Debug)]
pub(crate) enum Work {
    /// The first process of a container.
    Container(Box<Container>),
    /// A further one: the namespaces of the first are entered through its descriptor.
    Exec {
        init_pidfd: OwnedFd,
        namespaces: CloneFlags,
        process: Box<ProcessPlan>,
        /// No launcher does anything for it.
        alone: bool,
    },
}

/// The first process of a container.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) spec: Spec,
    pub(crate) plan: Plan,
    /// The detached root filesystem; none once it is the root.
    pub(crate) root: Option<OwnedFd>,
    /// Detached trees by the number of the step that attaches them.
    pub(crate) trees: Vec<(usize, OwnedFd)>,
    /// Namespaces to enter, the user namespace first.
    pub(crate) join: Vec<(NamespaceKind, OwnedFd)>,
    /// Namespaces to make now (the others were made with the process).
    pub(crate) unshare: CloneFlags,
    /// Whether the launcher has done its part.
    pub(crate) settled: bool,
    /// Hierarchies, for a view of the control groups.
    pub(crate) layout: Option<berth_cgroup::Layout>,
}

/// A failure inside the new process: what was done, and what the kernel said.
#[derive(Debug)]
pub(crate) struct Failure(pub(crate) String);

impl Failure {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl From<crate::Error> for Failure {
    fn from(error: crate::Error) -> Self {
        Self(crate::error::chain(&error))
    }
}

pub(crate) type Done<T = ()> = Result<T, Failure>;

/// Says what was being done when something failed.
pub(crate) trait During<T> {
    fn during(self, what: impl Display) -> Done<T>;
}

impl<T> During<T> for Result<T, berth_linux::Error> {
    fn during(self, what: impl Display) -> Done<T> {
        self.map_err(|error| Failure(format!("{what}: {}", plain(crate::error::chain(&error)))))
    }
}

impl<T> During<T> for std::io::Result<T> {
    fn during(self, what: impl Display) -> Done<T> {
        self.map_err(|error| Failure(format!("{what}: {}", crate::error::errno_text(&error))))
    }
}

impl<T> During<T> for rustix::io::Result<T> {
    fn during(self, what: impl Display) -> Done<T> {
        self.map_err(std::io::Error::from).during(what)
    }
}

/// Without the number that std puts behind an errno's text.
fn plain(text: String) -> String {
    match text.rfind(" (os error ") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

/// Runs in the new process and does not return.
pub(crate) fn run(child: Child) -> ! {
    reset_signals();
    prctl::set_umask(0);
    // Only a name in process lists.
    let _ = prctl::set_name(c"berth-init");
    let failure = match Init::prepare(child) {
        Ok(init) => init.start(),
        Err((channel, failure)) => {
            let _ = channel.report(&Report::Failed(failure.0), &[]);
            exit_now(1)
        }
    };
    exit_now(failure)
}

/// What the last part of the preparation uses up.
struct Last {
    stdio: Stdio,
    master: Option<OwnedFd>,
    filter: Option<Filter>,
    preserve_fds: u32,
    new_keyring: bool,
    warnings: Vec<String>,
}

/// A process that is set up and waits.
struct Init {
    process: ProcessPlan,
    gate: Option<OwnedFd>,
    started: OwnedFd,
    /// Loaded after the gate, where no privilege is needed for it.
    late_filter: Option<Filter>,
    container: Option<Box<Container>>,
}

impl Init {
    fn prepare(mut child: Child) -> Result<Self, (Channel, Failure)> {
        let mut warnings = Vec::new();
        let mut master = None;
        let result = match &mut child.work {
            Work::Container(container) => container_up(container, &child.channel, &mut child.stdio, &mut master, &mut warnings),
            Work::Exec { init_pidfd, namespaces, alone, .. } => {
                let ready = if *alone { Ok(()) } else { wait_go(&child.channel) };
                ready.and_then(|()| exec_up(init_pidfd.as_fd(), *namespaces, &mut child.stdio, &mut master))
            }
        };
        let Child { work, channel, stdio, gate, started, filter, preserve_fds, new_keyring } = child;
        let last = Last { stdio, master, filter, preserve_fds, new_keyring, warnings };
        let (process, container) = match work {
            Work::Container(mut container) => {
                // What the container's setup has opened is closed here by its owners.
                container.trees.clear();
                container.join.clear();
                container.root = None;
                (std::mem::take(&mut container.plan.process), Some(container))
            }
            Work::Exec { process, init_pidfd, .. } => {
                drop(init_pidfd);
                (*process, None)
            }
        };
        let mut init = Self { process, gate, started, late_filter: None, container };
        match result.and_then(|host_proc| init.finish(host_proc, &channel, last)) {
            Ok(()) => Ok(init),
            Err(failure) => Err((channel, failure)),
        }
    }

    /// The last part of the preparation, the same for both kinds: from here on only this process changes.
    fn finish(&mut self, host_proc: HostProc, channel: &Channel, last: Last) -> Done {
        let Last { stdio, master, filter, preserve_fds, new_keyring, mut warnings } = last;
        identity::set_label(&self.process, &host_proc)?;
        if new_keyring && !session::new_session_keyring().during("make a session keyring")? {
            warnings.push("no session keyring of its own: the kernel has none or does not allow it".into());
        }
        self.place_stdio(stdio, master.is_some())?;
        drop(host_proc);
        let first = 3 + preserve_fds;
        self.lift_fds(first as i32)?;
        let mut keep = vec![self.started.as_fd(), channel.as_fd()];
        keep.extend(self.gate.as_ref().map(AsFd::as_fd));
        keep.extend(master.as_ref().map(AsFd::as_fd));
        // All of the machine's folders that are still open go here: none can become the working directory.
        close_from(first, &keep).during("close inherited descriptors")?;
        let entered = identity::enter_cwd(&self.process.cwd, false)?;
        identity::take_on(&self.process, &mut warnings)?;
        if !entered {
            identity::enter_cwd(&self.process.cwd, true)?;
        }
        home::add_home(&mut self.process.env, self.process.uid);
        match (filter, self.process.no_new_privs) {
            (Some(filter), false) => load(&filter)?,
            (filter, _) => self.late_filter = filter,
        }
        identity::give_up(&self.process)?;
        let console: Vec<BorrowedFd<'_>> = master.iter().map(AsFd::as_fd).collect();
        channel.report(&Report::Ready(warnings), &console).during("report to the launcher")
    }

    /// Waits for the start and executes the program. Returns the exit code when that fails.
    fn start(self) -> i32 {
        if let Some(gate) = &self.gate {
            let mut byte = [0; 1];
            match rustix::io::retry_on_intr(|| rustix::io::read(gate, &mut byte)) {
                Ok(1) => {}
                _ => return 0,
            }
        }
        let error = match self.last_steps() {
            Err(failure) => crate::StartError { message: failure.0, errno: None },
            Ok(()) => program::execute(&self.process),
        };
        let code = if error.errno == Some(2) { 127 } else { 126 };
        let message = format!("unable to start container process: {}", error.message);
        let error = crate::StartError { message, ..error };
        if let Ok(text) = serde_json::to_vec(&error) {
            let _ = rustix::io::write(&self.started, &text);
        }
        code
    }

    fn last_steps(&self) -> Done {
        if let Some(container) = &self.container
            && let Some(hooks) = &container.spec.hooks
        {
            run_hooks("startContainer", &hooks.start_container, &container.state("created"))?;
        }
        match &self.late_filter {
            Some(filter) => load(filter),
            None => Ok(()),
        }
    }
}

fn load(filter: &Filter) -> Done {
    let program: Vec<_> = filter.instructions.iter().map(|&(code, jt, jf, k)| seccomp::SockFilter { code, jt, jf, k }).collect();
    let flags = seccomp::SeccompFlags::from_bits_retain(filter.flags);
    seccomp::load(&program, flags).during("load system call filter")?;
    Ok(())
}

impl Container {
    /// Waits, once, until the launcher has put this process where it belongs (maps, control group), and makes what depends on that. Before,
    /// whatever does not is done at the same time as the launcher's part, which takes milliseconds with control groups of version 1.
    pub(crate) fn settle(&mut self, channel: &Channel) -> Done {
        if std::mem::replace(&mut self.settled, true) {
            return Ok(());
        }
        wait_go(channel)?;
        if self.plan.in_userns {
            become_root()?;
        }
        if !self.unshare.is_empty() {
            ns::unshare(self.unshare).during("make namespaces")?;
        }
        Ok(())
    }

    /// The state as hooks that run inside see it.
    fn state<'a>(&'a self, status: &'a str) -> HookState<'a> {
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        HookState { id: &self.id, bundle: &self.bundle, status, pid, spec: &self.spec }
    }
}

/// Namespaces, mounts and names of a new container.
fn container_up(
    container: &mut Container,
    channel: &Channel,
    stdio: &mut Stdio,
    master: &mut Option<OwnedFd>,
    warnings: &mut Vec<String>,
) -> Done<HostProc> {
    enter_namespaces(container, channel)?;
    let host_proc = HostProc::open()?;
    if container.plan.new.contains(CloneFlags::NEWNET) {
        rootfs::loopback_up()?;
    }
    if let Some(name) = &container.plan.hostname {
        prctl::set_hostname(name).during("set host name")?;
    }
    if let Some(name) = &container.plan.domainname {
        prctl::set_domainname(name).during("set domain name")?;
    }
    rootfs::build(container, channel, stdio, master, warnings)?;
    if let Some(hooks) = &container.spec.hooks {
        if !(hooks.prestart.is_empty() && hooks.create_runtime.is_empty()) {
            channel.report(&Report::Hooks, &[]).during("ask for hooks")?;
            wait_go(channel)?;
        }
        run_hooks("createContainer", &hooks.create_container, &container.state("creating"))?;
    }
    // After the hooks: what a parameter belongs to (an interface) may be theirs to make.
    for (path, value) in &container.plan.sysctls {
        host_proc.write(&format!("sys/{}", path.display()), value.as_bytes())?;
    }
    rootfs::change_root(container)?;
    Ok(host_proc)
}

fn enter_namespaces(container: &mut Container, channel: &Channel) -> Done {
    for (kind, fd) in &container.join {
        ns::setns(fd.as_fd(), *kind).during(format_args!("enter {} namespace", kind.proc_name()))?;
    }
    // The maps of a user namespace decide who owns everything else.
    if container.plan.in_userns { container.settle(channel) } else { Ok(()) }
}

/// Root of the user namespace: what is made from here on belongs to it.
fn become_root() -> Done {
    match creds::set_groups(&[]) {
        // Denied for the whole namespace; if the process is to have groups, that is said when they are set.
        Err(error) if error.raw_os_error() == Some(1) => {}
        result => result.during("drop supplementary groups")?,
    }
    creds::set_gid(0).during("become group 0 of the user namespace")?;
    creds::set_uid(0).during("become user 0 of the user namespace")
}

fn wait_go(channel: &Channel) -> Done {
    match channel.wait_go().during("wait for the launcher")? {
        true => Ok(()),
        false => exit_now(1),
    }
}

/// The namespaces of a running container; its root comes with the mount namespace.
fn exec_up(
    init_pidfd: BorrowedFd<'_>,
    namespaces: CloneFlags,
    stdio: &mut Stdio,
    master: &mut Option<OwnedFd>,
) -> Done<HostProc> {
    let host_proc = HostProc::open()?;
    ns::setns_of_process(init_pidfd, namespaces).during("enter the container's namespaces")?;
    if let Stdio::Pty { width, height } = *stdio {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open("/", flags, Mode::empty()).during("open the container's root")?;
        let pty = devices::open_terminal(&Root::in_root(root), (width, height))?;
        *stdio = pty.1;
        *master = Some(pty.0);
    }
    Ok(host_proc)
}
