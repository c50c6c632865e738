//! Execs: further processes in containers. Each belongs to the connection that asked for it and dies with that.

use std::os::fd::{AsFd, OwnedFd};

use berth_cgroup::Doors;
use berth_linux::Pid;
use berth_linux::ns::NamespaceKind;
use berth_linux::pidfd::{ExitStatus, PidFd};
use berth_linux::process::pipe;
use berth_oci::Heard;
use berth_oci::plan::{Host, Namespaces};
use berth_shim::protocol::{Event, ExecExt, Failure, FailureKind, FdIndex, Reply};

use super::containers::{Container, start_error};
use super::sweeps::{After, Sweep};
use super::{Daemon, ReplyTo, Wait, failure, read_to_end, system_failure};
use crate::clock::monotonic_ms;
use crate::creator::{self, ExecOrder, Made, Streams};
use crate::{cgroups, entrant};

/// Execs in one container that are no further apart than this are taken for a probe's.
const DOORS_MS: u64 = 60_000;

/// How far an exec is.
enum Stage {
    /// Its creator works.
    Creating { reply: ReplyTo },
    /// `execve` has not been heard of.
    Starting { reply: ReplyTo },
    /// The program runs.
    Running,
    /// It could not be started; it only has to be reaped.
    Failed,
}

/// An exec.
pub struct Exec {
    /// The container it runs in.
    pub container: String,
    /// The connection that it belongs to.
    owner: u64,
    stage: Stage,
    pid: Option<Pid>,
    pidfd: Option<PidFd>,
    /// What the agent gets when it runs: stdin, stdout, stderr.
    streams: [Option<OwnedFd>; 3],
    /// Its terminal, until the agent has it.
    console: Option<OwnedFd>,
    /// Its owner has gone.
    doomed: bool,
}

impl Daemon {
    pub(super) fn exec(&mut self, to: ReplyTo, container: String, id: String, ext: ExecExt, fds: Vec<OwnedFd>) {
        if let Err(failure) = self.try_exec(to, container, id, ext, fds) {
            self.answer(to, Reply::Error(failure));
        }
    }

    fn try_exec(
        &mut self,
        to: ReplyTo,
        container_id: String,
        id: String,
        ext: ExecExt,
        fds: Vec<OwnedFd>,
    ) -> Result<(), Failure> {
        let container = self.containers.get(&container_id).ok_or_else(|| Self::no_container(&container_id))?;
        if container.running().is_none() {
            return Err(failure(FailureKind::WrongState, format!("container {container_id} does not run")));
        }
        if self.execs.contains_key(&id) {
            return Err(failure(FailureKind::AlreadyExists, format!("exec {id} exists")));
        }
        let Some(spec) = fds.into_iter().next() else {
            return Err(failure(FailureKind::Invalid, "an exec needs a descriptor with its process"));
        };
        let system = |error: std::io::Error| system_failure("prepare an exec", &error);
        let (streams, theirs) = make_pipes(&ext).map_err(system)?;
        let oom_score_adj = self.parts.oom_score_adj;
        let mut exec = Exec {
            container: container_id,
            owner: to.connection,
            stage: Stage::Creating { reply: to },
            pid: None,
            pidfd: None,
            streams,
            console: None,
            doomed: false,
        };
        if let Some(foreign) = &container.foreign {
            let order = ExecOrder { spec, ext, foreign, streams: theirs, oom_score_adj };
            let (link, creator) = creator::start(|link| creator::exec(order, link)).map_err(system)?;
            self.add_wait(Wait::ExecCreating { id: id.clone(), link, creator }).map_err(system)?;
            self.execs.insert(id, exec);
            return Ok(());
        }
        self.hold_doors(&exec.container);
        let container = self.containers.get(&exec.container).ok_or_else(|| Self::no_container(&exec.container))?;
        let Some((init, init_pidfd)) = container.running() else {
            return Err(failure(FailureKind::WrongState, format!("container {} does not run", container.id)));
        };
        let entered = match &mut self.entered {
            Some(entered) => entered,
            none => none.insert(Entered::look().map_err(system)?),
        };
        let order = entrant::Order {
            spec,
            ext,
            init,
            init_pidfd,
            cgroup: &container.cgroup,
            doors: container.doors.as_ref(),
            streams: theirs,
            layout: &self.parts.layout,
            oom_score_adj,
            host: &entered.host,
            own: &entered.namespaces,
        };
        let made = entrant::start(order, entered.own_pids.as_fd())?;
        exec.stage = Stage::Starting { reply: to };
        exec.pid = Some(made.pid);
        exec.pidfd = Some(made.pidfd);
        self.execs.insert(id.clone(), exec);
        if let Err(error) = self.add_wait(Wait::ExecEntering { id: id.clone(), socket: made.socket, heard: Heard::default() }) {
            if let Some(exec) = self.execs.get_mut(&id) {
                exec.stage = Stage::Failed;
            }
            self.kill_tree(&id, After::Nothing);
            return Err(system_failure("watch an exec's start", &error));
        }
        Ok(())
    }

    /// The second exec within the time is taken for one of many, as a probe's: from then on the way into the cgroup is held open. On a
    /// v2 layout processes are born in it.
    fn hold_doors(&mut self, container: &str) {
        let Some(container) = self.containers.get_mut(container) else {
            return;
        };
        let now = monotonic_ms();
        let before = container.last_exec.replace(now);
        let layout = &self.parts.layout;
        let again = before.is_some_and(|before| now - before < DOORS_MS);
        if again && container.doors.is_none() && !cgroups::takes_births(layout) {
            // What is wrong with it the exec finds out.
            let cgroup = cgroups::at(layout, &container.cgroup).ok().flatten();
            container.doors = cgroup.and_then(|cgroup| Doors::open(cgroup).ok());
            self.doors_until.get_or_insert(now + DOORS_MS);
        }
    }

    /// Lets go of the cgroups in which nothing was executed for a while.
    pub(super) fn release_doors(&mut self, now: u64) {
        let until = |container: &Container| container.last_exec.map(|last| last + DOORS_MS);
        for container in self.containers.values_mut().filter(|container| until(container).is_none_or(|until| until <= now)) {
            container.doors = None;
        }
        self.doors_until = self.containers.values().filter(|container| container.doors.is_some()).filter_map(until).min();
    }

    /// An entrant has executed its program, or has ended.
    pub(super) fn read_entrant(&mut self, token: u64) {
        let Some(Wait::ExecEntering { socket, heard, .. }) = self.waits.get_mut(&token) else {
            return;
        };
        if heard.listen(socket.as_fd()) {
            self.entrant_done(token);
        }
    }

    fn entrant_done(&mut self, token: u64) {
        let Some(Wait::ExecEntering { id, mut heard, .. }) = self.end_wait(token) else {
            return;
        };
        let Some(exec) = self.execs.get_mut(&id) else {
            return;
        };
        if let Err(failure) = entrant::check(&mut heard) {
            if let Some(Exec { stage: Stage::Starting { reply }, .. }) = self.execs.remove(&id) {
                self.answer(reply, Reply::Error(failure));
            }
            return;
        }
        exec.console = heard.console;
        self.exec_started(&id, &heard.start_error);
    }

    /// A creator has something to say, or has ended.
    pub(super) fn read_exec_creator(&mut self, token: u64) {
        let Some(Wait::ExecCreating { link, .. }) = self.waits.get_mut(&token) else {
            return;
        };
        let Some((report, fds)) = creator::take_report(link) else {
            return;
        };
        let Some(Wait::ExecCreating { id, .. }) = self.end_wait(token) else {
            return;
        };
        match report.into_made(fds) {
            Ok(made) => self.exec_made(id, made),
            Err(failure) => {
                if let Some(Exec { stage: Stage::Creating { reply }, .. }) = self.execs.remove(&id) {
                    self.answer(reply, Reply::Error(failure));
                }
            }
        }
    }

    fn exec_made(&mut self, id: String, made: Made) {
        let Some(exec) = self.execs.get_mut(&id) else {
            return;
        };
        let Stage::Creating { reply } = exec.stage else {
            return;
        };
        let unclaimed = self.take_unclaimed(made.pid, &made.pidfd);
        let Some(exec) = self.execs.get_mut(&id) else {
            return;
        };
        exec.pid = Some(made.pid);
        exec.pidfd = Some(made.pidfd);
        exec.console = made.console;
        exec.stage = Stage::Starting { reply };
        let doomed = exec.doomed;
        let wait = Wait::ExecStarting { id: id.clone(), fd: made.started, text: Vec::new() };
        if let Err(error) = self.add_wait(wait) {
            if let Some(exec) = self.execs.get_mut(&id) {
                exec.stage = Stage::Failed;
            }
            self.answer(reply, Reply::Error(system_failure("watch an exec's start", &error)));
            return self.kill_tree(&id, After::Nothing);
        }
        if let Some((status, _)) = unclaimed {
            self.exec_exited(&id, status);
        } else if doomed {
            self.kill_tree(&id, After::Nothing);
        }
    }

    /// The `started` pipe has ended: the program runs, or `text` says why not.
    pub(super) fn exec_started(&mut self, id: &str, text: &[u8]) {
        let Some(exec) = self.execs.get_mut(id) else {
            return;
        };
        let Stage::Starting { reply } = exec.stage else {
            return;
        };
        let streams = std::mem::take(&mut exec.streams);
        if let Some(failure) = start_error(text) {
            exec.stage = Stage::Failed;
            return self.answer(reply, Reply::Error(failure));
        }
        exec.stage = Stage::Running;
        let mut fds: Vec<OwnedFd> = Vec::new();
        let mut hand_out = |fd: OwnedFd| -> FdIndex {
            fds.push(fd);
            fds.len() as FdIndex - 1
        };
        let [stdin, stdout, stderr] = streams.map(|stream| stream.map(&mut hand_out));
        let console = exec.console.take().map(&mut hand_out);
        let pid = exec.pid.map_or(0, |pid| pid.as_raw_nonzero().get());
        self.answer_with(reply, Reply::Execed { pid, stdin, stdout, stderr, console }, fds);
    }

    /// The exec's first process has been reaped.
    pub(super) fn exec_exited(&mut self, id: &str, status: ExitStatus) {
        self.finish_start(id);
        let Some(exec) = self.execs.remove(id) else {
            return;
        };
        if let Stage::Running = exec.stage {
            let event = Event::ExecExited {
                container: exec.container,
                id: id.to_owned(),
                code: status.code,
                signal: status.signal.unwrap_or(0),
            };
            self.tell(exec.owner, event);
        }
    }

    /// Learns how the start of an exec went that has ended.
    fn finish_start(&mut self, id: &str) {
        let waiting = |wait: &Wait| matches!(wait, Wait::ExecStarting { id: other, .. } | Wait::ExecEntering { id: other, .. } if other == id);
        let Some(token) = self.waits.iter().find(|(_, wait)| waiting(wait)).map(|(token, _)| *token) else {
            return;
        };
        if let Some(Wait::ExecEntering { socket, heard, .. }) = self.waits.get_mut(&token) {
            heard.listen(socket.as_fd());
            return self.entrant_done(token);
        }
        if let Some(Wait::ExecStarting { fd, mut text, .. }) = self.end_wait(token) {
            read_to_end(&fd, &mut text);
            self.exec_started(id, &text);
        }
    }

    pub(super) fn exec_of(&self, pid: Pid) -> Option<String> {
        self.execs.iter().find(|(_, exec)| exec.pid == Some(pid)).map(|(id, _)| id.clone())
    }

    pub(super) fn kill_exec(&mut self, to: ReplyTo, container: &str, id: &str, signal: i32, all: bool) {
        if !self.containers.contains_key(container) {
            return self.answer(to, Reply::Error(Self::no_container(container)));
        }
        if !(1..=64).contains(&signal) {
            return self.answer(to, Reply::Error(failure(FailureKind::Invalid, format!("no signal {signal}"))));
        }
        let Some(exec) = self.execs.get_mut(id).filter(|exec| exec.container == container) else {
            return self.answer(to, Reply::Done);
        };
        if exec.pidfd.is_none() && signal == 9 {
            // Its creator works: it is killed as soon as it is there.
            exec.doomed = true;
            return self.answer(to, Reply::Done);
        }
        if all && signal == 9 {
            return self.kill_tree(id, After::Reply(to));
        }
        let result = exec.pidfd.as_ref().map_or(Ok(()), |pidfd| pidfd.signal(signal));
        let result = match result {
            Err(error) if error.raw_os_error() != Some(rustix::io::Errno::SRCH.raw_os_error()) => {
                Err(system_failure("send the signal", &error))
            }
            _ => Ok(()),
        };
        self.answer_result(to, result);
    }

    /// The connection is gone: so are its execs.
    pub(super) fn kill_execs_of(&mut self, connection: u64) {
        let mut ids = Vec::new();
        for (id, exec) in &mut self.execs {
            if exec.owner == connection {
                exec.doomed = true;
                ids.push(id.clone());
            }
        }
        for id in ids {
            self.kill_tree(&id, After::Nothing);
        }
    }

    /// Kills an exec with all that it has started.
    fn kill_tree(&mut self, id: &str, after: After) {
        let Some(Exec { container, pid: Some(pid), stage, pidfd, .. }) = self.execs.get(id) else {
            return;
        };
        if let (Stage::Starting { .. }, Some(pidfd)) = (stage, pidfd) {
            // It may not be in the container's cgroup yet, where a sweeper looks for it, and has started nothing.
            let _ = pidfd.signal(9);
        }
        let cgroup = self.containers.get(container).map(|container| container.cgroup.clone()).unwrap_or_default();
        self.sweep(Sweep::KillTree { cgroup, leader: *pid }, after);
    }
}

/// What entrants are made with, found out once.
pub struct Entered {
    host: Host,
    namespaces: Namespaces,
    /// The shim's PID namespace.
    own_pids: OwnedFd,
}

impl Entered {
    fn look() -> std::io::Result<Self> {
        let own_pids = berth_linux::ns::open_ns(None, NamespaceKind::Pid).map_err(std::io::Error::other)?;
        let namespaces = Namespaces::look(None).map_err(std::io::Error::other)?;
        Ok(Self { host: Host::look(), namespaces, own_pids })
    }
}

/// The agent's ends, and the exec's.
fn make_pipes(ext: &ExecExt) -> std::io::Result<([Option<OwnedFd>; 3], Streams)> {
    if ext.tty {
        return Ok(([None, None, None], Streams { stdin: None, output: None }));
    }
    let (stdin_reader, stdin_writer) = match ext.stdin {
        true => pipe().map(|(reader, writer)| (Some(reader), Some(writer)))?,
        false => (None, None),
    };
    let (stdout_reader, stdout_writer) = pipe()?;
    let (stderr_reader, stderr_writer) = pipe()?;
    let theirs = Streams { stdin: stdin_reader, output: Some([stdout_writer, stderr_writer]) };
    Ok(([stdin_writer, Some(stdout_reader), Some(stderr_reader)], theirs))
}
